"""Where a steering's gate opens and how strongly it steers, chosen on training prompts and training text.

A steering is tried at several strengths, and at each behind its reading (`bridges.steering.Discriminant`) cut
at several places. Chosen is the smallest strength at which enough training prompts flip within a budget of KL
on training text; where no cut is within it, larger strengths are not tried. Of cuts that flip alike it is the
widest: prompts of other templates read lower than those that the gate was fitted to. (With whole templates
left out of the fit, the narrowest gate that flips as many training prompts flips 9 % of the others where the
widest flips 36 %.) The reading is fitted to one half of the text, the KL is of the other: fitted to both, a
wide gate has half the KL there that it has elsewhere. Nothing held out is looked at.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.edit import Edit
from bridges.flip_curves import EditedPrompts
from bridges.off_target import HeldOutText
from bridges.steering import (
    DIRECTIONS,
    HALF_WAY,
    Direction,
    Steering,
    acts_at,
    discriminant,
    mean_vector,
)
from bridges.streams import PromptStreams
from bridges.tails import PromptTails
from extractor.config import Config
from extractor.errors import InputError
from extractor.sites import Site
from extractor.statistics import undefined
from extractor.student import Student

ALIKE = 0.9  # of the most flips
KEPT = 0.5  # of the most flips: a gate that is all but shut costs no KL, and is no edit


class GateConfig(Config):
    """How a steering's gate and strength are chosen on training prompts and text."""

    kl_budget: float = Field(0.01, gt=0)
    """On training text, nats/token: half of `limits.off_target_kl`, since held-out text is other text."""
    goal: float = Field(0.8, gt=0, le=1)
    """Indirect flip rate on training prompts that makes a strength large enough."""
    cuts: tuple[float, ...] = Field((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0), min_length=1)
    """Places tried between the mean reading where nothing is to be added (0) and where the edit acts (1)."""
    text_blocks: int = Field(128, ge=2)
    """Of training text: the gate is fitted to every other, the KL is of the rest."""


class Effect(NamedTuple):
    """What a steering does on the training prompts that it edits and that are answered right without it."""

    flip_rate: float
    flip_rate_indirect: float
    moved: float  # nats


@dataclass(frozen=True)
class Trial:
    """A steering at one strength behind one gate, and what it does on training prompts and text."""

    steering: Steering
    strength: float
    cut: float
    flip_rate: float
    flip_rate_indirect: float
    moved: float
    """Mean indirect change of answer minus distractor on the edited prompts that are answered right, nats."""
    kl: float
    """nats/token; 0 without text."""
    share_of_tokens: float | None
    """At which something is added; None without text."""

    def as_json(self) -> dict[str, Any]:
        no_text = undefined("the gate has seen no text") if self.share_of_tokens is None else None
        return {
            "strength": self.strength,
            "cut": self.cut,
            "threshold": self.steering.gate.threshold,
            "train": {
                "flip_rate": self.flip_rate,
                "flip_rate_indirect": self.flip_rate_indirect,
                "kl": no_text or (self.kl if math.isfinite(self.kl) else undefined("it is not finite")),
                "share_of_tokens": no_text or self.share_of_tokens,
            },
        }


def fit_steering(
    vector: Float[Tensor, " d_dense"],
    site: Site,
    acts: Float[Tensor, "example seq"],
    train: PromptTails,
    text: HeldOutText | None,
    direction: Direction,
    strengths: Sequence[float],
    config: GateConfig,
) -> Trial:
    """A vector behind the gate, and at the strength, that do best on training prompts and training text.

    Args:
        acts: weights of the positions where the vector stands for an edit, as of `told_apart`.
        text: training text of two blocks at least, never held-out. None: the gate tells only the two sides
            of the pairs apart, and is cut half way.
    """
    seen, unseen = (None, None) if text is None else text.halves
    told = discriminant(train, site, acts, direction, None if seen is None else seen.resid(site))
    cuts = (HALF_WAY,) if text is None else config.cuts
    tried = [Steering(site, vector, told.gate(cut)) for cut in cuts]
    prompts = EditedPrompts(train, site, direction)
    trials: list[Trial] = []
    for strength in sorted(set(strengths)):
        effects = zip(tried, cuts, _on_prompts(prompts, tried, strength), strict=True)
        found = [Trial(steering, strength, cut, *effect, 0.0, None) for steering, cut, effect in effects]
        alike = ALIKE * max(trial.flip_rate_indirect for trial in found)
        for trial in sorted(found, key=lambda t: (-min(t.flip_rate_indirect, alike), t.cut)):
            trials.append(trial if unseen is None else _on_text(trial, unseen))
            if trials[-1].kl <= config.kl_budget:
                break  # the others flip fewer or are narrower
        if trials[-1].kl > config.kl_budget or trials[-1].flip_rate_indirect >= config.goal:
            break  # no gate is within the budget, so none is at a larger strength; or this one does
    return choose(trials, config)


def steering_forms(
    edit: Edit,
    train: PromptStreams,
    student: Student,
    bridges: BridgeSet,
    text: HeldOutText | None,
    strengths: Sequence[float],
    config: GateConfig,
) -> dict[Direction, Trial]:
    """An edit's steering form in both directions, by `fit_steering`, at one of the strengths above 0 (or 1).

    Raises:
        InputError: the nodes are the same on both prompts of every pair.
    """
    vectors = {side: mean_vector(edit, train, student, bridges, side) for side in DIRECTIONS}
    acts, tried = acts_at(edit, train), tuple(filter(None, strengths)) or (1.0,)
    return {
        side: fit_steering(vector, edit.site, acts, train, text, side, tried, config)
        for side, vector in vectors.items()
    }


def best_direction(forms: Mapping[Direction, Trial], config: GateConfig) -> Direction:
    """The better one in training: within the budget, then by flips, then by how far answers move."""

    def rank(side: Direction) -> tuple[bool, float, float]:
        trial = forms[side]
        return trial.kl <= config.kl_budget, trial.flip_rate_indirect, -trial.moved

    return max(DIRECTIONS, key=rank)


def steering_again(
    edit: Edit,
    train: PromptStreams,
    student: Student,
    bridges: BridgeSet,
    text: HeldOutText | None,
    form: Mapping[str, Any],
) -> Steering:
    """The steering that an edit was audited with, from the same training prompts and text.

    Args:
        form: `steering_form` of the edit's facts: its `direction` and `cut`.

    Raises:
        InputError: the edit has none.
    """
    if len(edit.sites) != 1 or "cut" not in form:
        raise InputError("this edit has no steering form")
    vector = mean_vector(edit, train, student, bridges, form["direction"])
    seen = None if text is None else text.halves[0].resid(edit.site)
    told = discriminant(train, edit.site, acts_at(edit, train), form["direction"], seen)
    return Steering(edit.site, vector, told.gate(form["cut"]))


def choose(trials: Sequence[Trial], config: GateConfig) -> Trial:
    """The best of several, ordered by strength.

    The first within the budget that reaches the goal. Or else, of those within it that flip at least half as
    many prompts as any, the one that flips most, or moves the answers furthest. Or else, over the budget, the
    one of the smallest KL among those that flip nearly as many as any.
    """
    within = [trial for trial in trials if trial.kl <= config.kl_budget]
    for trial in within:
        if trial.flip_rate_indirect >= config.goal:
            return trial
    most = max(trial.flip_rate_indirect for trial in trials)
    if kept := [trial for trial in within if trial.flip_rate_indirect >= KEPT * most]:
        return max(kept, key=lambda trial: (trial.flip_rate_indirect, -trial.moved))
    return min((t for t in trials if t.flip_rate_indirect >= ALIKE * most), key=lambda trial: trial.kl)


def _on_prompts(prompts: EditedPrompts, tried: Sequence[Steering], strength: float) -> Iterator[Effect]:
    """What each steering does; gates that open at the same places of these prompts do the same."""
    known: dict[bytes, Effect] = {}
    for steering in tried:
        deltas = prompts.deltas(lambda part: steering.delta(part.resid[steering.site]))  # noqa: B023
        opened = b"".join(delta.any(-1).cpu().numpy().tobytes() for delta in deltas)
        if opened not in known:
            total, indirect = prompts.differences(deltas, strength)
            count = max(1, len(prompts))
            rates = ((effect < 0).sum().item() / count for effect in (total, indirect))
            known[opened] = Effect(*rates, (indirect - prompts.unedited).sum().item() / count)
        yield known[opened]


def _on_text(trial: Trial, text: HeldOutText) -> Trial:
    effect = text.effect(trial.steering, trial.strength)
    kl = math.inf if math.isnan(effect.kl) else effect.kl
    return replace(trial, kl=kl, share_of_tokens=effect.share_of_tokens)
