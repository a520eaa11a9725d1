"""An edit beside the plain ways to get the same: flip rate at equal off-target KL.

    edit                    the nodes of a circuit, in steering form (`bridges.steering`)
    random nodes            as many others of the same site
    random directions
    difference of means     of the stream at the site, on the two kinds of training prompts
    linear probe            regularised logistic regression between the two
    dense channel           the one channel of the stream that moves the training answers most
    unembedding             what final norm and unembedding read as distractor minus answer: an edit that does
                            no better has only found the logits
    LoRA                    of the edit's rank, on the module that writes to the site (`bridges.task_lora`)

All are deltas at one site. All but the LoRA, which is a function of the text as it is, are one vector, added
everywhere or behind a gate. Every vector gets its gate in the same way, on training prompts and training text
(`bridges.steering_gate`, at strength 1), so that what is compared is what is added.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.edit import Edit
from bridges.flip_curves import Curve, DeltaOf, EditedPrompts, curve_json, measure_curve
from bridges.off_target import HeldOutText
from bridges.plain_directions import (
    best_channel,
    difference_of_means,
    probe_direction,
    unembedding_difference,
)
from bridges.steering import DIRECTIONS, Direction, Steering, acts_at, mean_vector, told_apart
from bridges.steering_gate import GateConfig, fit_steering
from bridges.streams import PromptStreams
from bridges.tails import PromptTails
from bridges.task_lora import TaskLora, TaskLoraConfig, train_lora
from extractor.config import Config
from extractor.errors import InputError
from extractor.sites import Node
from extractor.statistics import mean_interval, undefined
from extractor.student import Student

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EDIT, MEANS, LORA = "edit", "difference of means", "LoRA"
FORMS = ("everywhere", "gated")
Method = Literal[
    "difference of means", "linear probe", "dense channel", "unembedding", "random nodes",
    "random directions", "LoRA",
]  # fmt: skip

Curves = Mapping[tuple[str, str, Direction], Sequence[Curve]]
"""By method, form and direction; several where draws are averaged."""


class AlternativesConfig(Config):
    """How an edit is compared with other ways to flip the same answers."""

    enabled: bool = False
    """Takes longer than all else that is measured of an edit."""
    methods: tuple[Method, ...] = Field(get_args(Method), min_length=1)
    """What an edit is compared with; each takes about as long as the edit itself."""
    limits: tuple[float, ...] = (0.001, 0.005, 0.02, 0.1)
    """Off-target KL, nats/token, at which flip rates are compared."""
    max_strength: float = Field(16.0, gt=0)
    """Largest strength; 1 is the norm of the difference of means, for the LoRA what it was trained to."""
    control_draws: int = Field(2, ge=1)
    """Random node sets and random directions, whose flip rates are averaged."""
    probe_l2: float = Field(0.01, gt=0)
    """Of the linear probe, on a stream scaled to a mean square of 1 per prompt."""
    channels_tried: int = Field(16, ge=1)
    """Dense channels, of the largest gradient or difference of means, among which the best is chosen."""
    lora: TaskLoraConfig = TaskLoraConfig()


@dataclass(frozen=True)
class Recorded(Steering):
    """Not a vector but what was recorded on one text, for `HeldOutText.effect` of that text."""

    recorded: Float[Tensor, "block token d_dense"] | None = None

    def delta(
        self, resid: Float[Tensor, "batch seq d_dense"], strength: float = 1.0
    ) -> Float[Tensor, "batch seq d_dense"]:
        return strength * self.recorded


def compare_alternatives(
    edit: Edit,
    train: PromptStreams,
    held_out: PromptTails,
    text: HeldOutText,
    student: Student,
    bridges: BridgeSet,
    config: AlternativesConfig,
    seed: int = 0,
    *,
    train_text: HeldOutText | None = None,
    gate: GateConfig = GateConfig(),  # noqa: B008  frozen
) -> dict[str, Any]:
    """Curves of every method, form and direction, and the edit against the difference of means.

    Args:
        edit: a patch of reads at one site.
        train, held_out: pairs from different templates.
        text: held out.
        train_text: what gates learn to stay shut on. None: they tell only the sides of the pairs apart.

    Returns:
        JSON-ready; rates are of the prompts that are answered right without the edit.
    """
    site = edit.site
    curves: dict[tuple[str, str, Direction], list[Curve]] = {}
    prompts = {d: EditedPrompts(held_out, site, d) for d in DIRECTIONS}
    found: dict[str, Any] = {
        "site": str(site),
        "num_nodes": len(edit.nodes),
        "limits": list(config.limits),
        "num_prompts": {direction: len(own) for direction, own in prompts.items()},
        "num_tokens": text.blocks.numel(),
        "control_draws": config.control_draws,
        "methods": {},
    }
    for direction, own in prompts.items():
        if not len(own):
            continue
        steerings = all_steerings(
            edit, train, student, bridges, direction, config, seed, train_text=train_text, gate=gate
        )
        for form in FORMS:
            first = 1.0
            for name, draws in steerings.items():
                own_curves = curves[name, form, direction] = []
                for way in draws:
                    way = way if form == "gated" else way.ungated()
                    own_curves.append(steered_curve(way, own, text, config, first))
                    first = own_curves[-1].top
        if LORA not in config.methods:
            continue
        try:
            lora = train_lora(train, site, len(edit.nodes), direction, config.lora, seed)
            curves[LORA, "trained", direction] = [lora_curve(lora, own, text, config)]
            found["lora_budget"] = {**config.lora.model_dump(), "rank": lora.rank, "module": lora.writer.name}
        except InputError as error:
            found["methods"][LORA] = undefined(str(error))
    for (name, form, direction), draws in curves.items():
        forms = found["methods"].setdefault(name, {})
        forms.setdefault(form, {})[direction] = _mean_json(draws, config.limits)
    for name, form in dict.fromkeys(key[:2] for key in curves):
        found["methods"][name][form] |= _both_directions(curves, name, form, config.limits)
    if MEANS in config.methods:
        found["against_difference_of_means"] = {
            form: _against_means(curves, prompts, form, config.limits, seed) for form in FORMS
        }
    return found


# --- the ways ----------------------------------------------------------------------------------------------


def all_steerings(
    edit: Edit,
    train: PromptStreams,
    student: Student,
    bridges: BridgeSet,
    direction: Direction,
    config: AlternativesConfig,
    seed: int,
    *,
    train_text: HeldOutText | None = None,
    gate: GateConfig = GateConfig(),  # noqa: B008  frozen
) -> dict[str, list[Steering]]:
    """Gated vectors of the edit and of every method asked for, several draws of the random ones, all of the
    norm of the difference of means.

    Raises:
        InputError: the stream at the edit's site is the same on both kinds of prompts.
    """
    site, generator = edit.site, torch.Generator().manual_seed(seed)
    means = difference_of_means(train, site, direction)
    norm = means.norm()
    if not norm > 0:
        raise InputError(f"alternatives: the stream at {site} is the same on both kinds of training prompts")
    stream_parts = told_apart(train.batch, train.resid[site].float())

    def gated(vector: Tensor, acts: Tensor = stream_parts) -> Steering:
        scaled = vector * norm / vector.norm().clamp(min=1e-30)
        return fit_steering(scaled, site, acts, train, train_text, direction, (1.0,), gate).steering

    def of_nodes(nodes: Edit) -> Steering:
        vector = mean_vector(nodes, train, student, bridges, direction)
        return gated(vector, acts_at(nodes, train))

    random_vectors = [
        torch.randn(len(means), generator=generator).to(means) for _ in range(config.control_draws)
    ]
    ways: dict[str, Callable[[], list[Steering]]] = {
        MEANS: lambda: [gated(means)],
        "linear probe": lambda: [gated(probe_direction(train, site, direction, config.probe_l2))],
        "dense channel": lambda: [
            gated(best_channel(train, site, direction, float(norm), config.channels_tried))
        ],
        "unembedding": lambda: [gated(unembedding_difference(train, direction))],
        "random nodes": lambda: [
            of_nodes(nodes) for nodes in random_nodes(edit, train, bridges, config, generator)
        ],
        "random directions": lambda: [gated(vector) for vector in random_vectors],
    }
    return {EDIT: [of_nodes(edit)]} | {name: way() for name, way in ways.items() if name in config.methods}


def random_nodes(
    edit: Edit,
    train: PromptStreams,
    bridges: BridgeSet,
    config: AlternativesConfig,
    generator: torch.Generator,
) -> list[Edit]:
    """As many other nodes of the same site per draw, from those that differ on the training pairs."""
    presented = train.presented[edit.site.read_address]
    moves = (train.batch.counterfactual(presented) - presented).abs().amax((0, 1)) > 0
    moves[[node.channel for node in edit.nodes]] = False
    free = moves.nonzero()[:, 0].tolist()
    draws = []
    for _ in range(config.control_draws):
        chosen = torch.randperm(len(free), generator=generator)[: len(edit.nodes)].tolist()
        nodes = [Node(edit.site.read_address, free[i]) for i in chosen]
        draws += [Edit.from_nodes(nodes, edit.site, bridges)] if nodes else []
    return draws


# --- their curves ------------------------------------------------------------------------------------------


def steered_curve(
    steering: Steering,
    prompts: EditedPrompts,
    text: HeldOutText,
    config: AlternativesConfig,
    first: float = 1.0,
) -> Curve:
    """`first`: the strength that is tried first."""
    on_text = steering.delta(text.resid(steering.site))
    return _curve(
        lambda part: steering.delta(part.resid[steering.site]), on_text, prompts, text, config, first
    )


def lora_curve(
    lora: TaskLora, prompts: EditedPrompts, text: HeldOutText, config: AlternativesConfig
) -> Curve:
    """Strength is the adapter's scale."""
    with torch.no_grad():
        on_text = lora.delta(lora.inputs(text.blocks))
    return _curve(lambda part: lora.delta(lora.inputs(part.batch.ids)), on_text, prompts, text, config)


def _curve(
    delta_of: DeltaOf,
    on_text: Float[Tensor, "block token d_dense"],
    prompts: EditedPrompts,
    text: HeldOutText,
    config: AlternativesConfig,
    first: float = 1.0,
) -> Curve:
    deltas = prompts.deltas(delta_of)
    recorded = Recorded(prompts.site, on_text[0, 0], recorded=on_text)

    @cache
    def kl_at(strength: float) -> float:
        kl = text.effect(recorded, strength).kl
        return math.inf if math.isnan(kl) else kl

    return measure_curve(
        kl_at,
        lambda strength: prompts.flipped(deltas, strength),
        len(prompts),
        config.limits,
        config.max_strength,
        first,
    )


def _mean_json(draws: Sequence[Curve], limits: Sequence[float]) -> dict[str, Any]:
    """One curve, or several draws with their mean flip rates."""
    found = [curve_json(curve, limits) for curve in draws]
    if len(found) == 1:
        return found[0]
    means = {
        effect: {key: float(np.mean([one[effect][key] for one in found])) for key in found[0][effect]}
        for effect in ("flip_at", "flip_at_total")
    }
    return {"draws": [one["points"] for one in found], **means}


def _pooled(
    curves: Mapping[tuple[str, str, Direction], Sequence[Curve]],
    name: str,
    form: str,
    limit: float,
    effect: str,
) -> Float[Tensor, " example"]:
    """Per prompt of both directions, the share of a method's draws that flip it at the limit."""
    own = [curves[name, form, direction] for direction in DIRECTIONS if (name, form, direction) in curves]
    return torch.cat(
        [torch.stack([curve.best(limit, effect).float() for curve in draws]).mean(0) for draws in own]
    )


def _both_directions(curves: Curves, name: str, form: str, limits: Sequence[float]) -> dict[str, Any]:
    return {
        key: {f"{limit:g}": _pooled(curves, name, form, limit, effect).mean().item() for limit in limits}
        for key, effect in (("flip_at", "indirect"), ("flip_at_total", "total"))
    }


def _against_means(
    curves: Curves, prompts: Mapping[Direction, EditedPrompts], form: str, limits: Sequence[float], seed: int
) -> dict[str, Any]:
    """Per limit, indirect flip rates of edit and difference of means, and their paired difference.

    Strengths are chosen on the prompts that are compared, for both alike.
    """
    cluster = torch.cat([own.cluster.cpu() for own in prompts.values()])
    if not len(cluster):
        return undefined("no held-out prompt is answered right")
    rows = {}
    for limit in limits:
        edit, means = (_pooled(curves, name, form, limit, "indirect") for name in (EDIT, MEANS))
        rows[f"{limit:g}"] = {
            "edit": edit.mean().item(),
            "difference_of_means": means.mean().item(),
            "difference": mean_interval(edit - means, cluster, bounds=(-1.0, 1.0), seed=seed),
            "at_least_as_good": (
                edit.mean().item() >= means.mean().item()
                if (edit + means).any()
                else undefined("neither flips a prompt within this KL")
            ),
        }
    return rows


# --- tables and plots --------------------------------------------------------------------------------------


def alternatives_table(found: Mapping[str, Any]) -> str:
    """Indirect flip rates at each limit as a Markdown table, a row per method and form."""
    limits = [f"{limit:g}" for limit in found["limits"]]
    head = ["| method | form | " + " | ".join(f"KL <= {limit}" for limit in limits) + " |"]
    head.append("|---" * (len(limits) + 2) + "|")
    rows = []
    for name, forms in found["methods"].items():
        if "undefined" in forms:
            rows.append(f"| {name} | {forms['undefined']} |" + " - |" * len(limits))
            continue
        for form, own in forms.items():
            shown = " | ".join(f"{own['flip_at'][limit]:.0%}" for limit in limits)
            rows.append(f"| {name} | {form} | {shown} |")
    return "\n".join([*head, *rows]) + "\n"


def draw_alternatives(figure: "Figure", found: Mapping[str, Any]) -> bool:
    """Indirect flip rate against off-target KL: a panel per form and direction, a line per method."""
    figure.set_size_inches(10, 7)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes_of_form, form in zip(panels, FORMS, strict=True):
        for axes, direction in zip(axes_of_form, DIRECTIONS, strict=True):
            for name, forms in found["methods"].items():
                own = forms.get(form, forms.get("trained", {})).get(direction)
                for points in own.get("draws", [own.get("points")])[:1] if own else ():
                    kl, rate = ([point[key] for point in points] for key in ("kl", "flip_rate_indirect"))
                    axes.plot(kl, rate, marker="o", markersize=3, label=name)
            axes.set_title(f"{form}, {direction} prompts")
            axes.set_xscale("symlog", linthresh=min(found["limits"]))
    figure.supxlabel("off-target KL, nats/token")
    figure.supylabel("indirect flip rate")
    panels[0][0].legend(fontsize="small")
    return True
