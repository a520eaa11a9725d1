"""What an edit did: to its own task, to everything else, and against what the student predicted.

log_odds    change of the answer's log-odds on held-out prompts per strength, and its slope
steering    the steering form in both directions, everywhere and gated: its own task, held-out text, and
            the other tasks
prediction  the effect of an intervention in the student against that of its crossing in the dense model,
            over many nodes and strengths (`bridges.prediction`)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.choose import PromptStreams
from bridges.edit import Edit
from bridges.off_target import HeldOutText, other_tasks, steered
from bridges.prediction import PredictionConfig, prediction
from bridges.steering import DIRECTIONS, Direction, Steering, flip_rate, half, steering_form
from bridges.tails import PromptTails
from extractor.circuit import Circuit
from extractor.config import Config
from extractor.errors import InputError
from extractor.statistics import mean_interval, undefined
from extractor.student import Student

Differences = Mapping[float, tuple[Float[Tensor, " example"], Float[Tensor, " example"]]]
"""Answer minus distractor by strength: by the total and by the indirect effect."""


class EditAuditConfig(Config):
    """What is measured of an edit besides its flip rates."""

    steering_strengths: tuple[float, ...] = ()
    """Of the steering form, besides 1, the patch's own mean change."""
    prediction: PredictionConfig = PredictionConfig()


def audit_edit(
    edit: Edit,
    circuit: Circuit,
    train: PromptStreams,
    held_out: PromptStreams,
    student: Student,
    bridges: BridgeSet,
    text: HeldOutText,
    others: Mapping[str, PromptTails],
    config: EditAuditConfig,
    *,
    strengths: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    seed: int = 0,
) -> dict[str, Any]:
    """Everything above of a patch of reads at one site, for JSON; `strengths` are those of the patch.

    `off_target_kl` is the one to hold a limit against: of the gated steering form at strength 1, in the
    direction that moves training answers further by its indirect effect (`steering_direction`). A patch has
    two, and one of them may be to take away what most text does not have either.
    """
    delta = held_out.delta(edit)
    with torch.no_grad():
        effects = {s: held_out.differences(edit.site, s * delta) for s in strengths}
    found = {"log_odds": log_odds(held_out, effects, seed=seed)}
    try:
        gated = {side: steering_form(edit, train, student, bridges, side) for side in DIRECTIONS}
    except InputError as error:
        found |= {"off_target_kl": undefined(str(error)), "steering": undefined(str(error))}
    else:
        found |= _audit_steerings(gated, train, held_out, text, others, config.steering_strengths, seed)
    few = torch.arange(min(config.prediction.pairs, len(held_out.batch) // 2), device=delta.device)
    few_streams = PromptStreams(
        held_out.dense, student, bridges, held_out.batch.select(few), source=edit.source
    )
    found["prediction"] = prediction(few_streams, circuit, student, bridges, config.prediction, seed=seed)
    return found


def _audit_steerings(
    gated: Mapping[Direction, Steering],
    train: PromptTails,
    held_out: PromptTails,
    text: HeldOutText,
    others: Mapping[str, PromptTails],
    strengths: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    steps = sorted({1.0, *strengths})
    found = {
        side: {
            name: audit_steering(form, held_out, side, text, others, steps, seed=seed)
            for name, form in (("everywhere", steering.ungated()), ("gated", steering))
        }
        for side, steering in gated.items()
    }

    def moved(side: Direction) -> float:
        return (steered(train, gated[side])[1] - train.unedited)[half(train.batch, side)].mean().item()

    main = min(DIRECTIONS, key=moved)
    row = found[main]["gated"]["strengths"][steps.index(1.0)]
    return {"off_target_kl": row["text"]["kl"], "steering_direction": main, "steering": found}


def audit_steering(
    steering: Steering,
    held_out: PromptTails,
    direction: Direction,
    text: HeldOutText,
    others: Mapping[str, PromptTails],
    strengths: Sequence[float],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The half of the prompts that is edited, held-out text, and the other tasks; one row per strength."""
    effects = {strength: steered(held_out, steering, strength) for strength in strengths}
    rows = [
        {
            "strength": strength,
            "flip_rate": flip_rate(held_out, total, direction),
            "flip_rate_indirect": flip_rate(held_out, indirect, direction),
            "text": text.effect(steering, strength).as_json(seed),
            "other_tasks": other_tasks(others, steering, strength, seed=seed),
        }
        for strength, (total, indirect) in effects.items()
    ]
    examples = half(held_out.batch, direction)
    return {"log_odds": log_odds(held_out, effects, examples=examples, seed=seed), "strengths": rows}


def log_odds(
    tails: PromptTails,
    effects: Differences,
    *,
    examples: Bool[Tensor, " example"] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean change of answer minus distractor, in nats, over all prompts or these; below 0 is away from it.

    The slope is in nats per unit of strength: least squares through the unedited point, prompt by prompt, so
    that its mean is the slope of the mean and has an interval over templates.
    """
    chosen = torch.ones_like(tails.unedited, dtype=torch.bool) if examples is None else examples
    cluster = tails.batch.cluster[chosen]
    steps = list(effects)
    energy = sum(s * s for s in steps)
    found: dict[str, Any] = {"strengths": steps}
    for index, name in enumerate(("total", "indirect")):
        changes = [(effects[s][index] - tails.unedited)[chosen] for s in steps]
        found[name] = [mean_interval(change, cluster, seed=seed) for change in changes]
        if energy:
            slopes = sum(s * change for s, change in zip(steps, changes, strict=True)) / energy
            found[f"slope_{name}"] = mean_interval(slopes, cluster, seed=seed)
        else:
            found[f"slope_{name}"] = undefined("no strength but zero was measured")
    return found
