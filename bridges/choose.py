"""Which nodes of a circuit make the smallest edit, and what it does beside its controls.

`choose_edit` picks site and nodes on training prompts, by the *indirect* effect: the same delta is taken
out again before the final norm, because a late channel can be nothing but the answer's logit direction.
Everything here is a patch: nodes at one site move to their values on the counterfactual prompt.
"""

import math
from collections.abc import Sequence

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
from extractor.sites import Node, Recorder
from extractor.student import Student
from extractor.tasks import TaskBatch


class EditConfig(Config):
    """How an edit is chosen and measured."""

    max_size: int = Field(8, ge=1)
    """Most nodes of an edit."""
    candidates: int = Field(16, ge=1)
    """Nodes per site, best ranked first, among which the greedy search chooses."""
    tried: int = Field(5, ge=1)
    """Of these, how many are tried in each round after the first."""
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)
    """Strengths measured on held-out prompts; 1 is the counterfactual's own value."""
    goal: float = Field(0.97, gt=0, le=1)
    """Indirect flip rate on training prompts, at half or full strength, that ends the search."""
    sites_tried: int = Field(2, ge=1)
    """Sites at which nodes are searched for, most promising first."""
    control_draws: int = Field(2, ge=1)
    """Random node sets and random directions, whose flip rates are averaged."""
    attribution_points: int = Field(3, ge=1)
    """Steps of the path integral that ranks nodes."""


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
    """The smallest edit that reaches the goal on training prompts by its indirect effect.

    Sites are tried in the order of what all the circuit's nodes there can do together; at each, nodes
    are added greedily until the goal or the largest size is reached. None: the circuit reads nothing.
    """
    at_sites: list[tuple[float, Edit]] = []
    for site in bridges.sites:
        nodes = [node for node in circuit.nodes if node.address == site.read_address]
        if nodes:
            everything = Edit.from_nodes(sorted_nodes(nodes), site, bridges)
            at_sites.append((sum(_training_rates(streams, everything, config)), everything))
    at_sites.sort(key=lambda scored: -scored[0])
    best: tuple[tuple[bool, int, float], Edit] | None = None
    most = config.max_size
    for _, everything in at_sites[: config.sites_tried]:
        edit = _grow(streams, everything, bridges, config, most)
        rates = _training_rates(streams, edit, config)
        reached = max(rates) >= config.goal
        score = (reached, -len(edit.nodes) if reached else 0, sum(rates))
        if best is None or score > best[0]:
            best = (score, edit)
        if reached:
            most = min(most, len(edit.nodes))  # a larger one cannot win
    return best[1] if best else None


@torch.no_grad()
def _training_rates(streams: PromptStreams, edit: Edit, config: EditConfig) -> list[float]:
    """Indirect flip rates at half and at full strength."""
    delta, top = streams.delta(edit), max(config.strengths)
    return [streams.flip_rate(streams.differences(edit.site, s * delta)[1]) for s in (top / 2, top)]


@torch.no_grad()
def _grow(
    streams: PromptStreams, everything: Edit, bridges: BridgeSet, config: EditConfig, most: int
) -> Edit:
    """Add the node that moves the answers furthest, until the goal or `most` nodes.

    In the first round every candidate is tried, later those that moved them furthest when last tried.
    """
    site, top = everything.site, max(config.strengths)
    chosen: list[Node] = []
    left = {node: math.inf for node in rank_nodes(streams, everything, config)[: config.candidates]}
    right = streams.unedited.sigmoid().mean().item()  # mean probability of the right answer

    def try_out(node: Node) -> Float[Tensor, " example"]:
        delta = streams.delta(Edit.from_nodes([*chosen, node], site, bridges))
        return streams.differences(site, top * delta)[1]

    while left and len(chosen) < most:
        tried = sorted(left, key=lambda node: -left[node])[: config.tried if chosen else None]
        results = {node: try_out(node) for node in tried}
        answered = {node: difference.sigmoid().mean().item() for node, difference in results.items()}
        left |= {node: right - answered[node] for node in tried}
        best = min(tried, key=lambda node: answered[node])
        chosen.append(best)
        del left[best]
        right = answered[best]
        if streams.flip_rate(results[best]) >= config.goal:
            break
    return Edit.from_nodes(chosen, site, bridges)


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
