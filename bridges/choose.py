"""Which nodes of a circuit make the smallest edit, and what it does beside its controls.

Site and nodes are chosen on training prompts, by the *indirect* effect: the same delta is taken out again
before the final norm, because a late channel can be nothing but the answer's logit direction.
Everything here is a patch: nodes at one site move to their values on the counterfactual prompt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.crossing import Source
from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.reading import BridgeReader
from bridges.tails import PromptTails
from extractor.circuit import Circuit
from extractor.config import Config
from extractor.sites import Node, Recorder, Site
from extractor.statistics import undefined
from extractor.student import Student
from extractor.tasks import TaskBatch


class EditConfig(Config):
    """How an edit is chosen and measured."""

    nodes: Literal["circuit", "student"] = "circuit"
    """What an edit may move: the circuit's nodes, or any channel that the student reads at the site."""
    max_size: int = Field(8, ge=1)
    """Most nodes of an edit."""
    candidates: int = Field(16, ge=1)
    """Nodes per site, best ranked first, among which the greedy search chooses."""
    tried: int = Field(5, ge=1)
    """Of these, how many are tried in each round after the first."""
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)
    """Strengths measured on held-out prompts; 1 is the counterfactual's own value."""
    sought: tuple[float, ...] = Field((1.0, 2.0), min_length=1)
    """Strengths for which the smallest edit is looked for, the most wanted first."""
    goal: float = Field(0.9, gt=0, le=1)
    """Indirect flip rate on training prompts that makes an edit large enough."""
    sites_tried: int = Field(2, ge=1)
    """Sites at which nodes are searched for, most promising first."""
    control_draws: int = Field(2, ge=1)
    """Random node sets and random directions, whose flip rates are averaged."""
    attribution_points: int = Field(3, ge=1)
    """Steps of the path integral that ranks nodes."""


@dataclass(frozen=True)
class Growth:
    """A site's nodes in the order in which they were added, and what the first n of them do."""

    site: Site
    nodes: tuple[Node, ...]
    rates: Mapping[float, Sequence[float]]
    """Indirect flip rate on training prompts, by strength; one for each size from 1 on."""

    def smallest(self, strength: float, goal: float) -> int | None:
        """The least size that reaches the goal; None if none does."""
        return next((i + 1 for i, rate in enumerate(self.rates[strength]) if rate >= goal), None)


class PromptStreams(PromptTails):
    """One pass of both models over a batch of prompts, from which every edit on it is measured."""

    @torch.no_grad()
    def __init__(
        self,
        dense: DenseModel,
        student: Student,
        bridges: BridgeSet,
        batch: TaskBatch,
        *,
        source: Source = "student",
    ):
        super().__init__(dense, batch)
        self.presented: dict[str, Tensor] = {}
        if source == "student":
            recorder = Recorder(*(site.read_address for site in bridges.sites))
            student(batch.ids, tap=recorder, logits_to_keep=1)
            self.presented = recorder.activations
        else:
            reader = BridgeReader.of(student, bridges, bridges.sites, {})
            for site, resid in self.resid.items():
                self.presented |= reader.read(site, resid)
        self.dense_rms = {site: bridges.read_scale(resid) for site, resid in self.resid.items()}

    def delta(self, edit: Edit) -> Float[Tensor, "example seq d_dense"]:
        """What the edit, a patch of reads at one site, adds at strength 1."""
        presented = self.presented[edit.site.read_address]
        counterfactual = self.batch.counterfactual(presented)
        return edit.delta(presented, counterfactual, self.dense_rms[edit.site])

    def flip_rate(self, difference: Float[Tensor, " example"]) -> float:
        """Share of the prompts answered right without the edit whose answer is another with it."""
        right = self.unedited > 0
        return (right & (difference < 0)).sum().item() / max(1, int(right.sum()))


def choose_edit(
    streams: PromptStreams, circuit: Circuit, bridges: BridgeSet, config: EditConfig
) -> Edit | None:
    """The smallest edit that reaches the goal on training prompts; None: there is no node to move."""
    return pick_edit(grow_edits(streams, circuit, bridges, config), bridges, config)


def grow_edits(
    streams: PromptStreams, circuit: Circuit, bridges: BridgeSet, config: EditConfig
) -> list[Growth]:
    """Node by node, at the sites where the best-ranked nodes together flip most training prompts."""
    at_sites: list[tuple[float, Site, list[Node]]] = []
    for site in bridges.sites:
        if nodes := _movable(site, circuit, bridges, config):
            ranked = rank_nodes(streams, Edit.from_nodes(nodes, site, bridges), config)[: config.candidates]
            together = _indirect(streams, Edit.from_nodes(ranked[: config.max_size], site, bridges), config)
            at_sites.append((sum(together.values()), site, ranked))
    at_sites.sort(key=lambda scored: -scored[0])
    return [
        _grow(streams, site, ranked, bridges, config) for _, site, ranked in at_sites[: config.sites_tried]
    ]


def pick_edit(growths: Sequence[Growth], bridges: BridgeSet, config: EditConfig) -> Edit | None:
    """The smallest that reaches the goal at the first strength sought, else at the next; else the largest
    of the site where most prompts flip."""
    if not growths:
        return None
    for strength in config.sought:
        reached = [(size, g) for g in growths if (size := g.smallest(strength, config.goal)) is not None]
        if reached:
            size, growth = min(reached, key=lambda found: found[0])
            return Edit.from_nodes(growth.nodes[:size], growth.site, bridges)
    growth = max(growths, key=lambda g: sum(rates[-1] for rates in g.rates.values()))
    return Edit.from_nodes(growth.nodes, growth.site, bridges)


def _movable(site: Site, circuit: Circuit, bridges: BridgeSet, config: EditConfig) -> list[Node]:
    if config.nodes == "student":
        width = bridges[site].decoder.in_features
        return [Node(site.read_address, channel) for channel in range(width)]
    return sorted_nodes([node for node in circuit.nodes if node.address == site.read_address])


@torch.no_grad()
def _indirect(streams: PromptStreams, edit: Edit, config: EditConfig) -> dict[float, float]:
    """Indirect flip rate on the prompts at every strength sought."""
    delta = streams.delta(edit)
    return {s: streams.flip_rate(streams.differences(edit.site, s * delta)[1]) for s in config.sought}


@torch.no_grad()
def _grow(
    streams: PromptStreams, site: Site, ranked: Sequence[Node], bridges: BridgeSet, config: EditConfig
) -> Growth:
    """Add the node that moves the answers furthest, until the goal at the first strength, or the most nodes.

    In the first round every candidate is tried, later those that moved them furthest when last tried.
    """
    strength = config.sought[0]
    chosen: list[Node] = []
    rates: dict[float, list[float]] = {s: [] for s in config.sought}
    left = {node: math.inf for node in ranked}
    right = streams.unedited.sigmoid().mean().item()  # mean probability of the right answer

    def answered(node: Node) -> float:
        delta = streams.delta(Edit.from_nodes([*chosen, node], site, bridges))
        return streams.differences(site, strength * delta)[1].sigmoid().mean().item()

    while left and len(chosen) < config.max_size:
        tried = sorted(left, key=lambda node: -left[node])[: config.tried if chosen else None]
        results = {node: answered(node) for node in tried}
        left |= {node: right - result for node, result in results.items()}
        best = min(tried, key=lambda node: results[node])
        chosen.append(best)
        del left[best]
        right = results[best]
        for s, rate in _indirect(streams, Edit.from_nodes(chosen, site, bridges), config).items():
            rates[s].append(rate)
        if rates[strength][-1] >= config.goal:
            break
    return Growth(site, tuple(chosen), rates)


@torch.enable_grad()
def rank_nodes(streams: PromptStreams, edit: Edit, config: EditConfig) -> list[Node]:
    """Nodes by how far each moves the answer, integrated along the path to all of them moved.

    The gradient of the indirect logit difference at points between no edit and the full one; each
    node's share is its part of the delta times that gradient.
    """
    full = streams.delta(edit)
    presented = streams.presented[edit.site.read_address]
    change = streams.batch.counterfactual(presented) - presented
    change = change[..., [node.channel for node in edit.nodes]] * streams.dense_rms[edit.site]
    effect = torch.zeros(len(edit.nodes), device=full.device)
    for point in range(config.attribution_points):
        delta = ((point + 0.5) / config.attribution_points * full).requires_grad_()
        moved = streams.differences(edit.site, delta)[1].sum()
        (gradient,) = torch.autograd.grad(moved, delta)
        effect += ((gradient @ edit.directions.T) * change).sum((0, 1))
    order = torch.argsort(effect, stable=True).tolist()  # most negative first: towards the flip
    return [edit.nodes[index] for index in order]


@torch.no_grad()
def growth_facts(
    growths: Sequence[Growth],
    streams: PromptStreams,
    circuit: Circuit,
    bridges: BridgeSet,
    config: EditConfig,
) -> dict[str, object]:
    """What every size does on these (held-out) prompts, and what all channels of the site do together.

    `smallest` are the least sizes that reach the goal on training prompts, and what they do here.
    """
    rows = []
    for growth in growths:
        site = growth.site
        sizes = [
            _indirect(streams, Edit.from_nodes(growth.nodes[: i + 1], site, bridges), config)
            for i in range(len(growth.nodes))
        ]
        width = bridges[site].decoder.in_features
        everything = Edit.from_nodes([Node(site.read_address, c) for c in range(width)], site, bridges)
        row = {
            "site": str(site),
            "nodes": [str(node) for node in growth.nodes],
            "circuit": [str(node) for node in growth.nodes if node in circuit.nodes],
            "everything": _indirect(streams, everything, config)[config.sought[0]],
            "flip_rate_indirect": {f"{s:g}": [size[s] for size in sizes] for s in config.sought},
        }
        rows.append(row)
    return {
        "growth": rows,
        "smallest": {f"{s:g}": _smallest(growths, rows, s, config) for s in config.sought},
    }


def _smallest(
    growths: Sequence[Growth], rows: Sequence[Mapping[str, Any]], strength: float, config: EditConfig
) -> dict[str, object]:
    reached = [
        (size, index)
        for index, growth in enumerate(growths)
        if (size := growth.smallest(strength, config.goal)) is not None
    ]
    if not reached:
        return undefined(f"no edit of at most {config.max_size} nodes flips {config.goal:.0%} in training")
    size, index = min(reached)
    rate = rows[index]["flip_rate_indirect"][f"{strength:g}"][size - 1]
    full = rows[index]["everything"]
    return {
        "size": size,
        "site": rows[index]["site"],
        "in_circuit": sum(name in rows[index]["circuit"] for name in rows[index]["nodes"][:size]),
        "flip_rate_indirect": rate,
        "share_of_everything": rate / full if full else undefined("all channels together flip nothing"),
    }


@torch.no_grad()
def measure_edit(
    streams: PromptStreams, edit: Edit, bridges: BridgeSet, config: EditConfig, seed: int
) -> dict[str, object]:
    """Flip rates over strengths: total, indirect, and the two controls by their indirect effect."""
    generator = torch.Generator().manual_seed(seed)
    delta = streams.delta(edit)
    random_nodes = [
        streams.delta(_random_node_edit(edit, bridges, generator)) for _ in range(config.control_draws)
    ]
    random_directions = [_random_direction(delta, generator) for _ in range(config.control_draws)]

    def rates(deltas: Sequence[Tensor], strength: float) -> tuple[float, float]:
        """Mean total and indirect rate; at strength 0 nothing is added, so nothing flips."""
        if strength == 0:
            return 0.0, 0.0
        both = [streams.differences(edit.site, strength * d) for d in deltas]
        total, indirect = ([streams.flip_rate(d[effect]) for d in both] for effect in (0, 1))
        return sum(total) / len(both), sum(indirect) / len(both)

    curves = {
        name: [rates(deltas, strength) for strength in config.strengths]
        for name, deltas in (("edit", [delta]), ("nodes", random_nodes), ("direction", random_directions))
    }
    inside = torch.arange(delta.shape[1], device=delta.device) <= streams.batch.last[:, None]
    norms = (delta.norm(dim=-1) * inside).sum() / inside.sum()
    resid_norms = (bridges.centred(streams.resid[edit.site]).norm(dim=-1) * inside).sum() / inside.sum()
    return {
        "size": len(edit.nodes),
        "strengths": list(config.strengths),
        "flip_rate": [total for total, _ in curves["edit"]],
        "flip_rate_indirect": [indirect for _, indirect in curves["edit"]],
        "control_random_node": [indirect for _, indirect in curves["nodes"]],
        "control_random_direction": [indirect for _, indirect in curves["direction"]],
        "control_draws": config.control_draws,
        "delta_norm_ratio": (norms / resid_norms).item(),
        "num_prompts": len(streams.batch),
        "num_right_before": int((streams.unedited > 0).sum()),
    }


def _random_node_edit(edit: Edit, bridges: BridgeSet, generator: torch.Generator) -> Edit:
    """As many other nodes of the same site, drawn from all its channels."""
    width = bridges[edit.site].decoder.in_features
    taken = {node.channel for node in edit.nodes}
    free = [c for c in torch.randperm(width, generator=generator).tolist() if c not in taken]
    nodes = [Node(edit.site.read_address, channel) for channel in free[: len(edit.nodes)]]
    return Edit.from_nodes(nodes, edit.site, bridges)


def _random_direction(delta: Tensor, generator: torch.Generator) -> Tensor:
    """One random direction, at every token with the norm that the edit has there."""
    direction = torch.randn(delta.shape[-1], generator=generator).to(delta)
    return delta.norm(dim=-1, keepdim=True) * direction / direction.norm()


def sorted_nodes(nodes: Sequence[Node]) -> list[Node]:
    return sorted(nodes, key=lambda node: node.sort_key)
