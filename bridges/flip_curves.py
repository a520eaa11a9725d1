"""Flip rate against off-target KL: one curve per way to steer, on the prompts that one direction edits.

Everything compared adds a delta at a site that is linear in its strength. Strengths are placed by the KL that
they cause on held-out text: per limit the largest found whose measured KL is just below it, and more between
where the gaps are wide (a gate that seldom opens on text lets the strength grow at no cost).
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache

from bridges.steering import Direction, half
from bridges.tails import PromptTails
from extractor.sites import Site
from extractor.tasks import TaskBatch

DeltaOf = Callable[[PromptTails], Float[Tensor, "example seq d_dense"]]
"""What is added to prompts at strength 1."""

AIM, NEAR_ENOUGH = (
    0.9,
    0.75,
)  # of a limit: the KL a strength is sought for, and the least that ends the search
TRIES = 3  # strengths tried per limit
WIDE = 2.5  # neighbouring strengths further apart than this factor get one between them
MOST_BETWEEN = 4


def select_prompts(tails: PromptTails, rows: Tensor, sites: Collection[Site] | None = None) -> PromptTails:
    """Some of the prompts, without their partners, cut to the longest; `sites`: whose streams are kept.

    Args:
        rows: indices, or which ones.
    """
    part, batch = copy.copy(tails), tails.batch
    last, start = batch.last[rows], tails.start[rows]
    width = int(last.max()) + 1 if len(last) else 1
    rest = (getattr(batch, name)[rows] for name in ("answer", "distractor", "cluster"))
    part.batch = TaskBatch(batch.ids[rows, :width], last, *rest)
    kept = tails.resid if sites is None else sites
    part.resid = {site: tails.resid[site][rows, :width] for site in kept}
    part.unedited, part.start = tails.unedited[rows], start
    length = int((last - start).max()) + 1 if len(last) else 1
    part.columns = (start[:, None] + torch.arange(length, device=last.device)).clamp(max=width - 1)
    if tails.prefix is not None:
        longest = int(start.max()) if len(last) else 0
        part.prefix = None
        if longest:
            kept_slots = (
                (k.keys[rows, :, :longest], k.values[rows, :, :longest]) for k in tails.prefix.layers
            )
            part.prefix = DynamicCache(kept_slots)
    return part


def inside(batch: TaskBatch) -> Bool[Tensor, "example seq 1"]:
    """The positions that are no padding."""
    column = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return (column <= batch.last[:, None])[..., None]


class EditedPrompts:
    """The prompts that one direction edits and that are answered right without it."""

    def __init__(self, tails: PromptTails, site: Site, direction: Direction):
        self.site = site
        right = half(tails.batch, direction) & (tails.unedited > 0)
        rows = right.nonzero()[:, 0]
        rows = rows[torch.argsort(tails.batch.last[rows], stable=True)]
        # two groups by length: short prompts need not run as long as the longest
        self.parts = [select_prompts(tails, part, [site]) for part in rows.chunk(2) if len(part)]
        self.cluster, self.unedited = tails.batch.cluster[rows], tails.unedited[rows]

    def __len__(self) -> int:
        return len(self.cluster)

    @torch.no_grad()
    def deltas(self, delta_of: DeltaOf) -> list[Float[Tensor, "example seq d_dense"]]:
        """At strength 1, by part; nothing is added to padding."""
        return [delta_of(part) * inside(part.batch) for part in self.parts]

    @torch.no_grad()
    def differences(self, deltas: Sequence[Tensor], strength: float) -> tuple[Tensor, Tensor]:
        """Answer minus distractor: by the total and by the indirect effect."""
        if not self.parts:
            return self.unedited, self.unedited
        both = [
            self._differences(part, strength * delta) for part, delta in zip(self.parts, deltas, strict=True)
        ]
        total, indirect = map(torch.cat, zip(*both, strict=True))
        return total, indirect

    def flipped(self, deltas: Sequence[Tensor], strength: float) -> tuple[Tensor, Tensor]:
        """Which prompts change their answer: by the total and by the indirect effect."""
        total, indirect = self.differences(deltas, strength)
        return total < 0, indirect < 0

    def _differences(self, part: PromptTails, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts to which nothing is added keep their answers; late deltas take the short way."""
        total, indirect = part.unedited.clone(), part.unedited.clone()
        column = torch.arange(delta.shape[1], device=delta.device)
        is_touched = delta.any(-1)
        is_early = (is_touched & (column < part.start[:, None])).any(1)
        for rows in (is_touched.any(1) & ~is_early, is_early):
            if not rows.any():
                continue
            some = part if rows.all() else select_prompts(part, rows, [self.site])
            found = some.differences(self.site, delta[rows, : some.batch.ids.shape[1]])
            total[rows], indirect[rows] = found
        return total, indirect


@dataclass(frozen=True)
class Point:
    """One strength, measured."""

    strength: float
    kl: float
    """Off target, nats/token."""
    total: Bool[Tensor, " example"]
    indirect: Bool[Tensor, " example"]

    @property
    def flips_any(self) -> bool:
        return bool((self.total | self.indirect).any())

    def as_json(self) -> dict[str, float]:
        return {
            "strength": self.strength,
            "kl": self.kl,
            "flip_rate": self.total.float().mean().item(),
            "flip_rate_indirect": self.indirect.float().mean().item(),
        }


@dataclass(frozen=True)
class Curve:
    """Measured points in the order of strength; the first is strength 0, where nothing changes."""

    points: tuple[Point, ...]

    @property
    def top(self) -> float:
        """The largest strength measured; 1 where there is none but 0."""
        return self.points[-1].strength or 1.0

    def best(self, limit: float, effect: str = "indirect") -> Bool[Tensor, " example"]:
        """Which prompts flip at the strength that flips most of those whose KL is within the limit."""
        allowed = [getattr(point, effect) for point in self.points if point.kl <= limit]
        return max(allowed, key=lambda flipped: int(flipped.sum()))

    def flip_at(self, limit: float, effect: str = "indirect") -> float:
        """The largest measured flip rate among strengths whose measured KL is within the limit."""
        return self.best(limit, effect).float().mean().item()


def measure_curve(
    kl_at: Callable[[float], float],
    flipped_at: Callable[[float], tuple[Tensor, Tensor]],
    num_prompts: int,
    limits: Sequence[float],
    max_strength: float,
    first: float = 1.0,
) -> Curve:
    """Place strengths by their KL, the largest limit first, and measure what flips at each.

    The curve ends downwards where nothing flips at a limit's strength: smaller ones are not measured.

    Args:
        first: the strength that is tried first; a good guess saves time.
    """
    known: dict[float, float] = {}
    nothing = torch.zeros(num_prompts, dtype=torch.bool)
    points = {0.0: Point(0.0, 0.0, nothing, nothing)}

    def measure(strength: float) -> Point:
        if strength not in points:
            total, indirect = (flips.cpu() for flips in flipped_at(strength))
            points[strength] = Point(strength, known[strength], total, indirect)
        return points[strength]

    for limit in sorted(limits, reverse=True):
        _find_strength(kl_at, known, limit, first, max_strength)
        top = max((s for s, kl in known.items() if kl <= limit), default=0.0)
        # at the largest strength it may be that less is flipped by too much
        if not measure(top).flips_any and 0 < top < max_strength:
            break
    for strength in _between(known, max(limits)):
        known[strength] = kl_at(strength)
    for strength, kl in known.items():
        if kl <= max(limits):
            measure(strength)
    return Curve(tuple(points[s] for s in sorted(points)))


def _find_strength(
    kl_at: Callable[[float], float], known: dict[float, float], limit: float, first: float, most: float
) -> None:
    """Measure strengths until one has a KL just below the limit, or the largest one is allowed."""
    for left in reversed(range(TRIES)):
        below = [(s, kl) for s, kl in known.items() if kl <= limit]
        if any(kl >= NEAR_ENOUGH * limit or s == most for s, kl in below):
            return
        strength = min(most, _predict(known, AIM * limit) if known else first)
        if not left and len(below) == len(known):  # it grows too slowly to be predicted
            strength = most
        known[strength] = kl_at(strength)


def _predict(known: Mapping[float, float], target: float) -> float:
    """The strength at which the KL should be `target`: a power law, between two points or beyond them."""
    below = max(((s, kl) for s, kl in known.items() if kl <= target), default=None)
    above = sorted((s, kl) for s, kl in known.items() if kl > target)
    if below is None:
        power = 2.0
        if len(above) > 1 and above[1][1] > above[0][1]:
            power = math.log(above[1][1] / above[0][1]) / math.log(above[1][0] / above[0][0])
        return above[0][0] * max((target / above[0][1]) ** (1 / max(power, 1.0)), 1 / 16)
    if not above:
        return below[0] * min(math.sqrt(target / below[1]), 16.0) if below[1] > 0 else math.inf
    if below[1] <= 0:  # no power law starts there
        return math.sqrt(below[0] * above[0][0])
    share = math.log(target / below[1]) / math.log(above[0][1] / below[1])
    return below[0] * (above[0][0] / below[0]) ** share


def _between(known: Mapping[float, float], limit: float) -> Iterator[float]:
    """Strengths that fill wide gaps among those within the largest limit."""
    allowed = sorted(s for s, kl in known.items() if kl <= limit)
    for low, high in zip(allowed, allowed[1:], strict=False):
        pieces = min(MOST_BETWEEN + 1, math.ceil(math.log(high / low) / math.log(WIDE)))
        yield from (low * (high / low) ** (i / pieces) for i in range(1, pieces))


def curve_json(curve: Curve, limits: Sequence[float]) -> dict[str, Any]:
    return {
        "points": [point.as_json() for point in curve.points],
        **{
            name: {f"{limit:g}": curve.flip_at(limit, effect) for limit in limits}
            for name, effect in (("flip_at", "indirect"), ("flip_at_total", "total"))
        },
    }
