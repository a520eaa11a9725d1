"""The steering form of an edit: one vector, added to the dense stream at a site, with no counterfactual.

A patch moves its nodes to their values on a counterfactual prompt. Where text has none, the nodes move by
what a patch moves them by on average, in one direction: on the clean prompts of the training pairs, or on
the corrupted ones. The vector is added at every position, or only where a gate is open: where a reading of
the unedited stream at the site is above a threshold. The gate is as narrow as the training prompts allow: at
least half way between the reading's means on the two kinds of prompts, and open on 19 of 20 that are edited.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.choose import PromptStreams
from bridges.crossing import cross
from bridges.edit import Edit
from bridges.reading import BridgeReader
from bridges.tails import PromptTails
from extractor.errors import InputError
from extractor.intervention import Intervention, steer
from extractor.sites import Site
from extractor.student import Student
from extractor.tasks import TaskBatch

Direction = Literal["clean", "corrupted"]
"""Which prompts are edited: `clean` ones are moved towards their distractor, or `corrupted` ones."""
DIRECTIONS: tuple[Direction, ...] = ("clean", "corrupted")
LARGE = 0.5  # of a prompt's largest change
MISSED = 0.05  # share of the edited readings that may lie below a gate's threshold
MARGIN = 0.1  # of the gap between the two means: readings that are all alike must not shut it


@dataclass(frozen=True)
class Gate:
    """Open where a reading of the unedited stream is above a threshold."""

    direction: Float[Tensor, " d"]
    """What the reading is projected on: of the dense stream, or of the sparse read if there is a reader."""
    threshold: float
    removes_mean: bool = False
    """The dense stream is centred first; a reader knows this itself."""
    reader: BridgeReader | None = None
    """Reads the one site of its own as the student would."""

    def reading(self, resid: Float[Tensor, "*batch d_dense"]) -> Float[Tensor, "*batch"]:
        resid = resid.float()
        if self.reader is not None:
            (site,) = self.reader.sites
            return self.reader.read(site, resid)[site.read_address] @ self.direction
        centred = resid - resid.mean(-1, keepdim=True) if self.removes_mean else resid
        return centred @ self.direction

    def open(self, resid: Float[Tensor, "*batch d_dense"]) -> Bool[Tensor, "*batch"]:
        return self.reading(resid) > self.threshold


@dataclass(frozen=True)
class Steering:
    """A vector of the dense stream at a site, and where it is added."""

    site: Site
    vector: Float[Tensor, " d_dense"]
    gate: Gate | None = None
    """None: at every position."""

    def delta(
        self, resid: Float[Tensor, "batch seq d_dense"], strength: float = 1.0
    ) -> Float[Tensor, "batch seq d_dense"]:
        """What is added to the unedited stream `resid` of the site."""
        added = (strength * self.vector).expand_as(resid)
        if self.gate is None:
            return added
        return torch.where(self.gate.open(resid)[..., None], added, torch.zeros_like(added))

    def gated(
        self,
        reading_direction: Float[Tensor, " d_dense"],
        low: float,
        high: float,
        least: float | None = None,
        *,
        removes_mean: bool = False,
    ) -> "Steering":
        """Only where the stream's projection on a direction is near what it is on the edited prompts.

        `low`, `high` and `least` are those of `mean_reading`; without `least` the threshold is half way. A
        direction on which `high` is the smaller is turned round.
        """
        sign = 1.0 if high >= low else -1.0
        threshold = sign * (low + high) / 2
        if least is not None:
            threshold = max(threshold, sign * least)
        return replace(self, gate=Gate(sign * reading_direction, threshold, removes_mean))

    def ungated(self) -> "Steering":
        return replace(self, gate=None)

    def scaled(self, strength: float) -> "Steering":
        return replace(self, vector=strength * self.vector)


def half(batch: TaskBatch, direction: Direction) -> Bool[Tensor, " example"]:
    """The examples that this direction edits."""
    is_clean = torch.arange(len(batch), device=batch.ids.device) < len(batch) // 2
    return is_clean if direction == "clean" else ~is_clean


@torch.no_grad()
def steering_form(
    edit: Edit, streams: PromptStreams, student: Student, bridges: BridgeSet, direction: Direction
) -> Steering:
    """A patch of reads at one site as one gated vector; `ungated()` is the form that is added everywhere.

    `streams` are of the training prompts. The gate reads the edit's nodes through the bridge's encoder, along
    the difference of their means on the two halves.

    Raises:
        InputError: the nodes are the same on both prompts of every pair.
    """
    (crossing,) = cross(mean_change(edit, streams, direction), student, bridges, rms="mean")
    values = torch.tensor(crossing.change.values, device=crossing.directions.device)
    steering = Steering(edit.site, values @ crossing.directions * crossing.rms)
    reader = BridgeReader.of(student, bridges, [edit.site], {})
    read = reader.read(edit.site, streams.resid[edit.site])[edit.site.read_address]
    channels = [node.channel for node in edit.nodes]
    edited, other = class_means(streams.batch, read[..., channels], direction)
    along = torch.zeros_like(read[0, 0])
    along[channels] = edited - other
    low, high, least = _readings(streams.batch, read[..., channels], edited - other, direction)
    return replace(steering, gate=Gate(along, max((low + high) / 2, least), reader=reader))


def mean_change(edit: Edit, streams: PromptStreams, direction: Direction) -> Intervention:
    """The steer of the student that moves an edit's nodes as the patch does on average.

    Raises:
        InputError: the nodes are the same on both prompts of every pair.
    """
    presented = streams.presented[edit.site.read_address][..., [node.channel for node in edit.nodes]]
    change = streams.batch.counterfactual(presented) - presented
    if not change.abs().max() > 0:
        raise InputError(f"edit at {edit.site}: its nodes are the same on both prompts of every pair")
    weights = told_apart(streams.batch, presented)[half(streams.batch, direction)]
    moved = change[half(streams.batch, direction)]
    values = torch.einsum("es,esn->n", weights, moved) / weights.sum().clamp(min=1)
    return steer(edit.nodes, values.tolist())


def told_apart(batch: TaskBatch, activation: Float[Tensor, "example seq d"]) -> Float[Tensor, "example seq"]:
    """Weights, of sum 1 per prompt, of the positions that tell a prompt from its counterfactual.

    The last position, if the activation's change there is at least half of its largest; else all positions
    where it is. (Attention spreads a little of an early difference to every later position.)
    """
    change = (batch.counterfactual(activation) - activation).norm(dim=-1)
    is_large = change >= LARGE * change.amax(1, keepdim=True).clamp(min=torch.finfo(change.dtype).tiny)
    column = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    is_last = column == batch.last[:, None]
    is_early = is_large.any(1, keepdim=True) & ~(is_large & is_last).any(1, keepdim=True)
    chosen = torch.where(is_early, is_large, is_last).float()
    return chosen / chosen.sum(1, keepdim=True)


def class_means(
    batch: TaskBatch, activation: Float[Tensor, "example seq d"], direction: Direction
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Mean of an activation, where it tells prompts apart, on the edited half and on the other."""
    per_prompt = torch.einsum("es,esd->ed", told_apart(batch, activation), activation)
    edited = half(batch, direction)
    return per_prompt[edited].mean(0), per_prompt[~edited].mean(0)


def mean_reading(
    tails: PromptTails, site: Site, reading_direction: Float[Tensor, " d_dense"], direction: Direction
) -> tuple[float, float, float]:
    """`low`, `high` and `least` for `Steering.gated`, in the stream that the dense model reads.

    Mean projection on the half that is not edited, and on the one that is; and what 19 of 20 of the edited
    readings are past.
    """
    resid = tails.resid[site].float()
    centred = resid - resid.mean(-1, keepdim=True) if tails.dense.removes_mean else resid
    return _readings(tails.batch, centred, reading_direction, direction)


def _readings(
    batch: TaskBatch, activation: Float[Tensor, "example seq d"], along: Tensor, direction: Direction
) -> tuple[float, float, float]:
    edited, other = (mean @ along for mean in class_means(batch, activation, direction))
    at_edited = told_apart(batch, activation)[half(batch, direction)] > 0
    own = (activation @ along)[half(batch, direction)][at_edited]
    least = own.quantile(MISSED if edited >= other else 1 - MISSED) - MARGIN * (edited - other)
    return other.item(), edited.item(), least.item()


def flip_rate(tails: PromptTails, difference: Float[Tensor, " example"], direction: Direction) -> float:
    """Share of the edited half's prompts, right without the edit, whose answer is another with it."""
    right = (tails.unedited > 0) & half(tails.batch, direction)
    return (right & (difference < 0)).sum().item() / max(1, int(right.sum()))
