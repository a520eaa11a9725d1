"""A circuit: nodes of a student, the nonzero weights between them, and what they were found to do.

An edge is a nonzero weight that joins two kept nodes within a sublayer: act_in to q, k, v; v to
resid_delta; act_in to post_act; post_act to resid_delta (Gao et al. 2025, section 2). Reads and writes of the
same residual channel are joined by the stream itself, which has no weight.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from extractor.artifacts import SCHEMA_VERSION, read_json, write_json
from extractor.circuit_graph import Comparison, compare, to_networkx
from extractor.closed_edges import StudentEdges
from extractor.compact import CompactStudent
from extractor.edges import EdgeGates
from extractor.errors import InputError
from extractor.masks import Frozen, Means, ablation_tap, live_channels
from extractor.sites import Node, Tap, compose, no_tap
from extractor.student import Student


class Edge(NamedTuple):
    """A weight from one node to another; with grouped queries a v channel has one per head of its group."""

    source: Node
    target: Node
    weight: float


@dataclass(frozen=True)
class Calibration:
    """Scale and shift of the circuit's logit difference between a pair's two answers.

    The shift favours the clean side's answer over the corrupted side's, on both sides alike, so it
    cannot answer anything by itself. (A shift of all logits would do nothing at all.)
    """

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, difference: Float[Tensor, " example"]) -> Float[Tensor, " example"]:
        """Apply to answer-minus-distractor of a batch: clean examples first, then corrupted."""
        return self.scale * difference + self.shift * sides(difference)


def sides(difference: Float[Tensor, " example"]) -> Float[Tensor, " example"]:
    """+1 for the clean half of a batch, -1 for the corrupted half, whose answers are swapped."""
    half = len(difference) // 2
    return torch.cat([torch.ones(half), -torch.ones(half)]).to(difference)


@dataclass(frozen=True)
class Circuit:
    """A task's circuit in one student, named by the hash of its weights."""

    task: str
    nodes: frozenset[Node]
    edges: tuple[Edge, ...]
    student_sha256: str
    settings: dict[str, object]
    calibration: Calibration = Calibration()
    evidence: dict[str, object] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def pairs(self) -> list[tuple[Node, Node]]:
        """Source and target of every edge."""
        return [(edge.source, edge.target) for edge in self.edges]

    def tap(self, frozen: Frozen, *, complement: bool = False) -> Tap:
        """The student as this circuit's nodes only; with `complement`, as everything but the circuit.

        Whatever is outside carries what `frozen` holds: its mean, zero, or activations drawn from text.
        A tap sees activations: all weights between the nodes work. Where edges were learned (fewer than
        those weights), the circuit is `applied` or `compact`.
        """
        return keep_nodes(self.nodes, frozen, complement=complement)

    @contextmanager
    def applied(self, student: Student, means: Means) -> Iterator[Student]:
        """The student as this circuit only, its nodes and its edges, in its forward and in `generate()`.

        A weight between the nodes that is no edge of the circuit carries its source's mean. Taps of the
        caller see what is left: `student(ids, tap=recorder)`.
        """
        own = self.tap(means)

        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, kwargs | {"tap": compose(own, kwargs.get("tap", no_tap))}

        edges = StudentEdges(student, self.nodes, self.pairs, means)
        with edges.applied(torch.ones(len(self.pairs), device=student.device)):
            handle = student.register_forward_pre_hook(before, with_kwargs=True)
            try:
                yield student
            finally:
                handle.remove()

    def compact(self, student: Student, means: Means) -> CompactStudent:
        """The student as this circuit only, as a small dense model of its own: its nodes and its edges.

        A weight that is no edge of the circuit carries its source's mean.
        """
        model = CompactStudent(student, live_channels(self.nodes), means)
        return EdgeGates(model, means).close_(self.pairs)

    def export(self, folder: Path, student: Student, means: Means, ids: Int[Tensor, "batch seq"]) -> float:
        """Save the compact model; returns (and writes) its largest logit difference from the masked student
        on these tokens, beside the largest logit."""
        compact = self.compact(student, means)
        with torch.no_grad(), self.applied(student, means):
            masked = student(ids).logits
            difference = (compact(ids).logits - masked).abs().max().item()
        facts = {
            "task": self.task,
            "student_sha256": self.student_sha256,
            "calibration": asdict(self.calibration),
            "max_logit_difference": difference,
            "max_logit": masked.abs().max().item(),
            "compared_on_tokens": ids.numel(),
        }
        compact.save(folder, facts)
        return difference

    def to_networkx(self, **options: bool) -> nx.DiGraph:
        """The circuit as a graph; options as `extractor.circuit_graph.to_networkx`."""
        return to_networkx(self, **options)

    def compare(self, other: "Circuit") -> Comparison:
        """Shared nodes and edges, and what only one of the two has."""
        return compare(self, other)

    def save(self, path: Path) -> None:
        write_json(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "task": self.task,
                "student_sha256": self.student_sha256,
                "hashes": self.hashes,
                "settings": self.settings,
                "calibration": asdict(self.calibration),
                "evidence": self.evidence,
                "nodes": [str(node) for node in sorted(self.nodes, key=lambda n: n.sort_key)],
                "edges": [[str(e.source), str(e.target), e.weight] for e in self.edges],
            },
        )

    @classmethod
    def load(cls, path: Path) -> "Circuit":
        """Read a circuit file.

        Raises:
            InputError: missing, damaged, or of another schema version.
        """
        value = read_json(path, "circuit", "recipes/extract.py")
        try:
            return cls(
                task=value["task"],
                nodes=frozenset(Node.parse(name) for name in value["nodes"]),
                edges=tuple(
                    Edge(Node.parse(source), Node.parse(target), weight)
                    for source, target, weight in value["edges"]
                ),
                student_sha256=value["student_sha256"],
                settings=value["settings"],
                calibration=Calibration(**value["calibration"]),
                evidence=value["evidence"],
                hashes=value.get("hashes", {}),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"circuit '{path}' is damaged ({error!r})") from None


def keep_nodes(nodes: Collection[Node], frozen: Frozen, *, complement: bool = False) -> Tap:
    """A tap that keeps these nodes (or, with `complement`, all others) and ablates the rest."""
    by_address = _channels(nodes)
    gates = {}
    for address, carried in frozen.items():
        gate = torch.full(carried.shape[-1:], float(complement), device=carried.device)
        gate[by_address[address]] = float(not complement)
        gates[address] = gate
    return ablation_tap(gates, frozen)


def edges_between(student: Student, nodes: Collection[Node]) -> tuple[Edge, ...]:
    """Every nonzero weight that joins two of the nodes, in forward order."""
    by_address = _channels(nodes)
    edges = []
    for source, target, weight in weight_joins(student):
        rows, columns = by_address[target], by_address[source]
        block = weight[rows][:, columns]
        for row, column in block.nonzero().tolist():
            edges.append(
                Edge(
                    Node(source, columns[column]),
                    Node(target, rows[row]),
                    block[row, column].item(),
                )
            )
    return tuple(edges)


def count_edges(student: Student) -> int:
    """All nonzero weights that could be edges."""
    return sum(int(weight.count_nonzero()) for _, _, weight in weight_joins(student))


def weight_joins(student: Student) -> list[tuple[str, str, Tensor]]:
    """(source address, target address, weight (target, source)) of every matrix that holds edges."""
    joins = []
    for index, layer in enumerate(student.layers):
        attn, mlp = layer.attn, layer.mlp
        for name, linear in (("q", attn.q_proj), ("k", attn.k_proj), ("v", attn.v_proj)):
            joins.append((f"{index}.attn.act_in", f"{index}.attn.{name}", linear.weight.detach()))
        # Columns of o_proj: (key/value head, query head of its group, channel).
        of_head = attn.o_proj.weight.detach().unflatten(1, (-1, attn.group_size, attn.head_dim))
        for member in range(attn.group_size):
            joins.append((f"{index}.attn.v", f"{index}.attn.resid_delta", of_head[:, :, member].flatten(1)))
        pairs = [("act_in", "post_act", mlp.up_proj), ("post_act", "resid_delta", mlp.down_proj)]
        if mlp.gate_proj is not None:
            pairs.append(("act_in", "post_act", mlp.gate_proj))
        for source, target, linear in pairs:
            joins.append((f"{index}.mlp.{source}", f"{index}.mlp.{target}", linear.weight.detach()))
    return joins


def _channels(nodes: Collection[Node]) -> dict[str, list[int]]:
    by_address: dict[str, list[int]] = defaultdict(list)
    for node in sorted(nodes, key=lambda n: n.sort_key):
        by_address[node.address].append(node.channel)
    return by_address
