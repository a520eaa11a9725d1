"""Interventions as data: what to change in the student, in words that are saved, loaded and composed.

    ablate  the node goes to its mean over text, or to zero
    clamp   the node goes to a given value
    steer   a given value is added to the node
    patch   the node goes to its value on a counterfactual prompt, position by position

A change holds at all positions, at the last one of the prompt, or from there on, and only where its
condition on a node holds. A node moves from its own value (strength 0, exactly) to the new one (strength
1, exactly) on a straight line, and beyond it. A condition reads its node as it is before any change.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from extractor.artifacts import SCHEMA_VERSION, read_json, write_json
from extractor.errors import InputError, UsageError
from extractor.masks import Means
from extractor.positions import Positions, PromptPositions
from extractor.sites import Node, Tap, compose, no_tap

Kind = Literal["ablate", "clamp", "steer", "patch"]
Comparison = Literal[">", ">=", "<", "<="]
COMPARE = {">": torch.gt, ">=": torch.ge, "<": torch.lt, "<=": torch.le}

Counterfactual = Mapping[str, Float[Tensor, "batch seq _"]]
"""Activations on the counterfactual prompts by address, aligned with the presented ones."""


@dataclass(frozen=True)
class Condition:
    """Holds at the positions where the node's activation compares so with the threshold."""

    node: Node
    comparison: Comparison
    threshold: float

    def holds(self, activation: Float[Tensor, "batch seq _"]) -> Bool[Tensor, "batch seq"]:
        return COMPARE[self.comparison](activation[..., self.node.channel], self.threshold)


@dataclass(frozen=True)
class Change:
    """One change of some nodes.

    `values`, one per node: the targets of ablate and clamp, what steer adds; patch has none.

    Raises:
        UsageError: values that do not fit the nodes, or a condition on a node that comes later.
    """

    kind: Kind
    nodes: tuple[Node, ...]
    values: tuple[float, ...] = ()
    positions: Positions = "all"
    condition: Condition | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, get_args(Kind)),
            ("positions", self.positions, get_args(Positions)),
        ):
            if value not in allowed:
                raise UsageError(f"change: {name} {value!r}; it is one of {', '.join(allowed)}")
        if len(set(self.nodes)) != len(self.nodes) or not self.nodes:
            raise UsageError(f"{self.kind}: give at least one node, and each once")
        if len(self.values) != (0 if self.kind == "patch" else len(self.nodes)):
            wanted = "no value" if self.kind == "patch" else f"one value for each of {len(self.nodes)} nodes"
            raise UsageError(f"{self.kind}: {len(self.values)} values; it takes {wanted}")
        if not all(map(math.isfinite, (*self.values, self.strength))):
            raise UsageError(f"{self.kind}: values and strength must be finite numbers")
        self._check_condition()

    def _check_condition(self) -> None:
        if self.condition is None:
            return
        if self.condition.comparison not in COMPARE:
            raise UsageError(f"condition: {self.condition.comparison!r}; it is one of {', '.join(COMPARE)}")
        late = [n for n in self.nodes if n.sort_key[:2] < self.condition.node.sort_key[:2]]
        if late:
            raise UsageError(
                f"condition: {self.condition.node} is computed after {late[0]}, which it decides"
            )

    def at(self, address: str) -> tuple[list[int], list[float]]:
        """Channels at this address and their values."""
        values = self.values or (0.0,) * len(self.nodes)
        found = [(n.channel, v) for n, v in zip(self.nodes, values, strict=True) if n.address == address]
        return [channel for channel, _ in found], [value for _, value in found]

    def by_address(self) -> list["Change"]:
        """One change per address, in forward order."""
        parts: dict[str, list[int]] = {}
        for index, node in sorted(enumerate(self.nodes), key=lambda item: item[1].sort_key):
            parts.setdefault(node.address, []).append(index)
        return [
            replace(
                self,
                nodes=tuple(self.nodes[i] for i in part),
                values=tuple(self.values[i] for i in part) if self.values else (),
            )
            for part in parts.values()
        ]

    def moved(
        self,
        old: Float[Tensor, "batch seq node"],
        values: Float[Tensor, "batch seq node"] | Float[Tensor, " node"],
        where: Bool[Tensor, "batch seq"] | None,
    ) -> Float[Tensor, "batch seq node"]:
        """The nodes' new activations: `values` are the targets, or what steer adds."""
        values = values.to(old)
        if self.kind == "steer":
            new = old + self.strength * values
        else:  # lerp is exact at 0 and at 1, which old + strength * (target - old) is not
            new = torch.lerp(old, values.expand_as(old), self.strength)
        return new if where is None else torch.where(where[..., None], new, old)


@dataclass(frozen=True)
class Intervention:
    """Changes, applied in order, of the student whose weights have this hash."""

    changes: tuple[Change, ...] = ()
    student_sha256: str = "none"

    def __add__(self, other: "Intervention") -> "Intervention":
        known = {self.student_sha256, other.student_sha256} - {"none"}
        if len(known) > 1:
            names = " and ".join(sorted(sha[:12] for sha in known))
            raise InputError(f"interventions on two students ({names}) cannot be composed")
        return Intervention(self.changes + other.changes, next(iter(known), "none"))

    def of_student(self, sha256: str) -> "Intervention":
        return replace(self, student_sha256=sha256)

    def scaled(self, strength: float) -> "Intervention":
        """Every strength times this one."""
        return replace(self, changes=tuple(replace(c, strength=c.strength * strength) for c in self.changes))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node that is changed, once, in forward order."""
        return tuple(sorted({n for c in self.changes for n in c.nodes}, key=lambda n: n.sort_key))

    @property
    def needs_counterfactual(self) -> bool:
        return any(change.kind == "patch" for change in self.changes)

    def tap(
        self, *, last: Int[Tensor, " batch"] | None = None, counterfactual: Counterfactual | None = None
    ) -> Tap:
        """For one batch of whole prompts; `applied` is the form for `generate()`.

        Args:
            last: each prompt's last position, where prompts are padded.
            counterfactual: what `patch` needs (`TaskBatch.counterfactual` aligns).
        """
        return InterventionTap(self, PromptPositions(last), counterfactual)

    @contextmanager
    def applied(
        self,
        student: nn.Module,
        *,
        last: Int[Tensor, " batch"] | None = None,
        counterfactual: Counterfactual | None = None,
    ) -> Iterator[nn.Module]:
        """The student under the intervention, in its forward and in `generate()`, cached or not.

        Generated positions are changed too, except by `last` (the prompt's) and by `patch` (no
        counterfactual goes so far).
        """
        positions = PromptPositions(last)
        own = InterventionTap(self, positions, counterfactual)

        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            positions(module, args, kwargs)
            return args, kwargs | {"tap": compose(own, kwargs.get("tap", no_tap))}

        handle = student.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield student
        finally:
            handle.remove()

    def as_json(self) -> dict[str, Any]:
        changes = [
            asdict(c)
            | {
                "nodes": list(map(str, c.nodes)),
                "values": list(c.values),
                "condition": asdict(c.condition) | {"node": str(c.condition.node)} if c.condition else None,
            }
            for c in self.changes
        ]
        return {"student_sha256": self.student_sha256, "changes": changes}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], what: str = "intervention") -> "Intervention":
        """Raises InputError where the value is not what `as_json` gives."""
        try:
            return cls(tuple(map(_change_from_json, value["changes"])), value["student_sha256"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{what} is damaged: {error}") from None

    def save(self, path: Path) -> None:
        write_json(path, {"schema_version": SCHEMA_VERSION, **self.as_json()})

    @classmethod
    def load(cls, path: Path, student_sha256: str | None = None) -> "Intervention":
        """Read a file of `save`.

        Raises:
            InputError: missing, damaged, or of another student than `student_sha256`.
        """
        value = read_json(path, "intervention", "Intervention.save")
        found = cls.from_json(value, f"intervention '{path}'")
        if student_sha256 not in (None, found.student_sha256):
            raise InputError(
                f"intervention '{path}' belongs to a student with weights {found.student_sha256[:12]}, "
                f"this one has {student_sha256[:12]}"
            )
        return found


class InterventionTap:
    """The tap of an intervention; whoever runs the model keeps `positions` right."""

    def __init__(
        self,
        intervention: Intervention,
        positions: PromptPositions,
        counterfactual: Counterfactual | None = None,
    ):
        if intervention.needs_counterfactual and counterfactual is None:
            raise UsageError("patch: give the counterfactual activations (counterfactual=...)")
        self.positions = positions
        self.counterfactual = counterfactual or {}
        self.changes = [change for change in intervention.changes if change.strength]
        self.conditions = {c.condition.node.address for c in self.changes if c.condition is not None}
        self.before: dict[str, Tensor] = {}  # of this forward, for the conditions

    def __call__(self, address: str, activation: Tensor) -> Tensor:
        if address == "final_resid":
            self.before.clear()
        if address in self.conditions:
            self.before[address] = activation
        for change in self.changes:
            activation = self.apply(change, address, activation)
        return activation

    def apply(self, change: Change, address: str, activation: Tensor) -> Tensor:
        """One change at one address."""
        columns, values = change.at(address)
        if not columns:
            return activation
        old = activation[..., columns]
        targets = torch.tensor(values, device=old.device)
        where = self.where(change, activation)
        if change.kind == "patch":
            targets, known = self._counterfactual_of(address, columns, old)
            where = known if where is None else where & known
        activation = activation.clone()
        activation[..., columns] = change.moved(old, targets, where)
        return activation

    def where(self, change: Change, activation: Tensor) -> Bool[Tensor, "batch seq"] | None:
        """The positions that a change holds at; None: all."""
        where = self.positions.mask(change.positions, activation)
        if change.condition is None:
            return where
        if (read := self.before.get(change.condition.node.address)) is None:
            raise UsageError(f"condition: this forward starts after {change.condition.node}")
        holds = change.condition.holds(read)
        return holds if where is None else where & holds

    def _counterfactual_of(
        self, address: str, columns: Sequence[int], old: Tensor
    ) -> tuple[Tensor, Bool[Tensor, "batch seq"]]:
        """This forward's part of the counterfactual, and where it has one."""
        if address not in self.counterfactual:
            raise UsageError(f"patch: the counterfactual has no activations at {address}")
        rows, length = old.shape[:2]
        start = self.positions.start
        part = self.counterfactual[address][:, start : start + length, columns]
        part = self.positions.rows_of(part, rows).to(old)
        known = torch.arange(length, device=old.device) < part.shape[1]
        padded = nn.functional.pad(part, (0, 0, 0, length - part.shape[1]))
        return padded, known[None].expand(rows, -1)


def ablate(nodes: Sequence[Node], means: Means | None = None, **where: Any) -> Intervention:
    """To their means over text (`masks.mean_activations`), or to zero.

    `where`, here and below: positions, condition, strength.
    """
    values = [0.0 if means is None else means[node.address][node.channel].item() for node in nodes]
    return _one("ablate", nodes, values, where)


def clamp(nodes: Sequence[Node], values: Sequence[float], **where: Any) -> Intervention:
    """To these values."""
    return _one("clamp", nodes, values, where)


def steer(nodes: Sequence[Node], values: Sequence[float], **where: Any) -> Intervention:
    """Add these values."""
    return _one("steer", nodes, values, where)


def patch(nodes: Sequence[Node], **where: Any) -> Intervention:
    """To their values on the counterfactual prompt."""
    return _one("patch", nodes, (), where)


def _one(kind: Kind, nodes: Sequence[Node], values: Sequence[float], where: dict[str, Any]) -> Intervention:
    return Intervention((Change(kind, tuple(nodes), tuple(map(float, values)), **where),))


def _change_from_json(value: Mapping[str, Any]) -> Change:
    condition = value["condition"]
    if condition is not None:
        condition = Condition(
            Node.parse(condition["node"]), condition["comparison"], float(condition["threshold"])
        )
    return Change(
        value["kind"],
        tuple(map(Node.parse, value["nodes"])),
        tuple(map(float, value["values"])),
        value["positions"],
        condition,
        float(value["strength"]),
    )
