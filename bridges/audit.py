"""What an edit did: to its own task, to everything else, and against what the student predicted.

log_odds    change of the answer's log-odds on held-out prompts per strength, and its slope
share       the edit's part of what all channels of its site do together, by the indirect effect
steering    the steering form in both directions, everywhere and gated: its own task, held-out text, and
            the other tasks; gate and strength are chosen in training (`bridges.steering_gate`)
prediction  the effect of an intervention in the student against that of its crossing in the dense model,
            over many nodes and strengths (`bridges.prediction`)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.edit import Edit
from bridges.off_target import HeldOutText, other_tasks, steered
from bridges.prediction import PredictionConfig, node_pool, prediction
from bridges.steering import Direction, Steering, flip_rate, half
from bridges.steering_gate import GateConfig, Trial, best_direction, steering_forms
from bridges.streams import PromptStreams
from bridges.tails import PromptTails
from extractor.circuit import Circuit
from extractor.config import Config
from extractor.errors import InputError
from extractor.sites import Node
from extractor.statistics import mean_interval, ratio_interval, undefined
from extractor.student import Student

Differences = Mapping[float, tuple[Float[Tensor, " example"], Float[Tensor, " example"]]]
"""Answer minus distractor by strength: by the total and by the indirect effect."""


class EditAuditConfig(Config):
    """What is measured of an edit besides its flip rates."""

    gate: GateConfig = GateConfig()
    steering_strengths: tuple[float, ...] = ()
    """Of the steering form, measured besides its own; 1 is the patch's own mean change."""
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
    train_text: HeldOutText | None = None,
    forms: Mapping[Direction, Trial] | None = None,
    strengths: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    seed: int = 0,
) -> dict[str, Any]:
    """Everything above of a patch of reads at one site, for JSON.

    `off_target_kl` is the one to hold a limit against: of `steering_form`, the gated steering of one
    direction at its own strength, with its flips on held-out prompts beside it. A patch has two directions,
    and one of them may be to take away what most text does not have either; the one that does better in
    training counts.

    Args:
        text: held out.
        train_text: what the gate learns to stay shut on. None: it tells only the sides of the pairs apart.
        forms: of `steering_forms`, where they are known already.
        strengths: of the patch, and those among which the steering's is chosen.
    """
    delta = held_out.delta(edit)
    with torch.no_grad():
        effects = {s: held_out.differences(edit.site, s * delta) for s in strengths}
    found: dict[str, Any] = {
        "log_odds": log_odds(held_out, effects, seed=seed),
        "share_of_all_channels": share_of_all(edit, held_out, bridges, effects, seed=seed),
    }
    try:
        if forms is None:
            forms = steering_forms(edit, train, student, bridges, train_text, strengths, config.gate)
    except InputError as error:
        found |= dict.fromkeys(("off_target_kl", "steering_form", "steering"), undefined(str(error)))
    else:
        found |= _audit_steerings(forms, held_out, text, others, train_text, config, seed)
    few = torch.arange(min(config.prediction.pairs, len(held_out.batch) // 2), device=delta.device)
    few_streams = PromptStreams(
        held_out.dense, student, bridges, held_out.batch.select(few), source=edit.source
    )
    pool, name = node_pool(edit, circuit, train, bridges)
    found["prediction"] = prediction(few_streams, pool, student, bridges, config.prediction, seed=seed)
    return found | {"predictions_drawn_from": name}


def _audit_steerings(
    chosen: Mapping[Direction, Trial],
    held_out: PromptTails,
    text: HeldOutText,
    others: Mapping[str, PromptTails],
    train_text: HeldOutText | None,
    config: EditAuditConfig,
    seed: int,
) -> dict[str, Any]:
    found: dict[Direction, dict[str, Any]] = {}
    for side, trial in chosen.items():
        steps = sorted({trial.strength, *config.steering_strengths})
        forms = {"everywhere": trial.steering.ungated(), "gated": trial.steering}
        found[side] = {
            name: audit_steering(form, held_out, side, text, others, steps, seed=seed)
            for name, form in forms.items()
        }
        found[side]["gated"]["gate"] = trial.as_json()

    main = best_direction(chosen, config.gate)
    gated = found[main]["gated"]
    (row,) = (row for row in gated["strengths"] if row["strength"] == chosen[main].strength)
    form = {
        "direction": main,
        "cut": chosen[main].cut,
        "train_text_blocks": 0 if train_text is None else len(train_text.blocks),
        **{name: row[name] for name in ("strength", "flip_rate", "flip_rate_indirect")},
        **{name: row["text"][name] for name in ("kl", "kl_near", "share_of_tokens")},
        "train": gated["gate"]["train"],
    }
    return {
        "off_target_kl": row["text"]["kl"],
        "steering_direction": main,
        "steering_form": form,
        "steering": found,
    }


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


@torch.no_grad()
def share_of_all(
    edit: Edit, tails: PromptStreams, bridges: BridgeSet, effects: Differences, *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """By strength, the edit's mean indirect change of answer minus distractor over that of all channels.

    All channels are patched at the edit's site and at the same strength; above 1 where the others hold back.
    """
    width = bridges[edit.site].decoder.in_features
    every = [Node(edit.site.read_address, channel) for channel in range(width)]
    delta = tails.delta(Edit.from_nodes(every, edit.site, bridges))
    shares = {}
    for strength, (_, indirect) in effects.items():
        whole = tails.differences(edit.site, strength * delta)[1] - tails.unedited
        own = indirect - tails.unedited
        shares[f"{strength:g}"] = ratio_interval(own, whole, tails.batch.cluster, seed=seed)
    return shares


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
