"""The steering form of an edit: one vector, added to the dense stream at a site, with no counterfactual.

A patch moves its nodes to their values on a counterfactual prompt. Where text has none, the nodes move by
what a patch moves them by on average, in one direction: on the clean prompts of the training pairs, or on
the corrupted ones. The vector is added at every position, or only where a gate is open: where a reading of
the unedited stream at the site is above a threshold.

The reading is a linear discriminant of the stream: of the positions where the edit acts on the prompts that
it edits, from the same positions on the other side and from the tokens of text. A reading that has seen the
two sides only opens on ordinary tokens, most of which are neither. How wide a gate opens, and at which
strength it steers, is chosen in `bridges.steering_gate`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.crossing import cross
from bridges.edit import Edit
from bridges.streams import PromptStreams
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
HALF_WAY = 0.5  # where a discriminant cuts by itself
RIDGE = 0.1  # of a channel's mean variance: prompts are fewer than channels


@dataclass(frozen=True)
class Gate:
    """Open where a reading of the unedited stream is above a threshold."""

    direction: Float[Tensor, " d_dense"]
    threshold: float
    removes_mean: bool = False
    """The stream is centred first."""

    def reading(self, resid: Float[Tensor, "*batch d_dense"]) -> Float[Tensor, "*batch"]:
        return _as_read(resid, self.removes_mean) @ self.direction

    def open(self, resid: Float[Tensor, "*batch d_dense"]) -> Bool[Tensor, "*batch"]:
        return self.reading(resid) > self.threshold


@dataclass(frozen=True)
class Discriminant:
    """A reading of the stream that is high where an edit acts, and low where it must not."""

    direction: Float[Tensor, " d_dense"]
    low: float
    """Mean reading where nothing is to be added: of the other side and of text, each counted alike."""
    high: float
    """Mean reading where the edit acts; above `low`."""
    removes_mean: bool

    def gate(self, cut: float = HALF_WAY) -> Gate:
        """A cut of 0 is at the one mean, 1 at the other: the larger, the narrower."""
        return Gate(self.direction, self.low + cut * (self.high - self.low), self.removes_mean)


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

    def ungated(self) -> "Steering":
        return replace(self, gate=None)

    def scaled(self, strength: float) -> "Steering":
        return replace(self, vector=strength * self.vector)


def half(batch: TaskBatch, direction: Direction) -> Bool[Tensor, " example"]:
    """The examples that this direction edits."""
    is_clean = torch.arange(len(batch), device=batch.ids.device) < len(batch) // 2
    return is_clean if direction == "clean" else ~is_clean


def mean_vector(
    edit: Edit, streams: PromptStreams, student: Student, bridges: BridgeSet, direction: Direction
) -> Float[Tensor, " d_dense"]:
    """What the patch adds on average, at the site's mean RMS.

    Raises:
        InputError: the nodes are the same on both prompts of every pair.
    """
    (crossing,) = cross(mean_change(edit, streams, direction), student, bridges, rms="mean")
    values = torch.tensor(crossing.change.values, device=crossing.directions.device)
    return values @ crossing.directions * crossing.rms


def acts_at(edit: Edit, streams: PromptStreams) -> Float[Tensor, "example seq"]:
    """Weights, as of `told_apart`, of the positions at which a patch moves its nodes."""
    presented = streams.presented[edit.site.read_address]
    return told_apart(streams.batch, presented[..., [node.channel for node in edit.nodes]])


@torch.no_grad()
def discriminant(
    tails: PromptTails,
    site: Site,
    weights: Float[Tensor, "example seq"],
    direction: Direction,
    text: Float[Tensor, "*batch d_dense"] | None = None,
) -> Discriminant:
    """Fisher's: the inverse of the covariance within a class, times the difference of the means.

    In closed form, and, on templates left out of the fit, as good as a logistic regression. The covariance is
    the mean of the classes' own, with a ridge.

    Args:
        weights: by `told_apart`; a position counts where they are above zero.
        text: the stream at the site on training text, every token of it, or None.
    """
    removes_mean = tails.dense.removes_mean
    resid = _as_read(tails.resid[site], removes_mean).double()
    edited, acts = half(tails.batch, direction)[:, None], weights > 0
    inside, others = resid[edited & acts], [resid[~edited & acts]]
    if text is not None:
        others.append(_as_read(text, removes_mean).flatten(0, -2).double())
    within = torch.stack([group.T.cov(correction=0) for group in (inside, *others)]).mean(0)
    scale = within.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    outside = torch.stack([group.mean(0) for group in others]).mean(0)
    difference = inside.mean(0) - outside
    eye = torch.eye(len(within), dtype=within.dtype, device=within.device)
    along = torch.linalg.solve(within + RIDGE * scale * eye, difference)
    along = along / along.norm().clamp(min=torch.finfo(along.dtype).tiny)
    low, high = (outside @ along).item(), (inside.mean(0) @ along).item()
    return Discriminant(along.float(), low, high, removes_mean)


def _as_read(resid: Float[Tensor, "*batch d_dense"], removes_mean: bool) -> Float[Tensor, "*batch d_dense"]:
    resid = resid.float()
    return resid - resid.mean(-1, keepdim=True) if removes_mean else resid


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


def flip_rate(tails: PromptTails, difference: Float[Tensor, " example"], direction: Direction) -> float:
    """Share of the edited half's prompts, right without the edit, whose answer is another with it."""
    right = (tails.unedited > 0) & half(tails.batch, direction)
    return (right & (difference < 0)).sum().item() / max(1, int(right.sum()))
