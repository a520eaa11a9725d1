"""Edits: circuit nodes moved towards their counterfactual, carried into the dense model.

A node that a circuit reads at a site, "l.attn.act_in:c" or "l.mlp.act_in:c", is channel c of the student's
normed stream there. Its change on a prompt, counterfactual minus presented, becomes a delta of the dense
model's residual stream at that site (Gao et al. 2025, appendix A.4):

    delta[t] = strength * sum over nodes c of (a_cf[t, c] - a[t, c]) * rho * rms_dense[t] * W_dec[:, c]

W_dec is the bridge's decoder and rho the ratio of mean stream RMS, sparse over dense: the node is read
after the norm, the bridge lives before it. After the dense model's own norm this is the paper's delta.

`choose_edit` picks site and nodes on training prompts, by the *indirect* effect: the same delta is taken
out again before the final norm, because a late channel can be nothing but the answer's logit direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from extractor.artifacts import SCHEMA_VERSION, read_json, replace_folder, write_json
from extractor.circuit import Circuit
from extractor.config import Config
from extractor.errors import InputError
from extractor.sites import Node, Recorder, Site
from extractor.student import Student
from extractor.tasks import TaskBatch


class EditConfig(Config):
    """How an edit is chosen and measured."""

    max_size: int = Field(8, ge=1)
    """Most nodes of an edit."""
    candidates: int = Field(16, ge=1)
    """Nodes per site, best ranked first, among which the greedy search chooses."""
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


@dataclass(frozen=True)
class Edit:
    """Nodes at one site and the directions of the dense stream that they decode to."""

    site: Site
    nodes: tuple[Node, ...]
    directions: Float[Tensor, "node d_dense"]  # rho * W_dec, one row per node

    @classmethod
    def from_nodes(cls, nodes: Sequence[Node], site: Site, bridges: BridgeSet) -> "Edit":
        """The nodes' decoder columns, scaled by the RMS ratio.

        Raises:
            InputError: a node that is not read at this site.
        """
        wrong = [str(node) for node in nodes if node.address != site.read_address]
        if wrong:
            raise InputError(f"edit: {wrong[0]} is not read at {site} ({site.read_address})")
        columns = [node.channel for node in nodes]
        rows = bridges[site].decoder.weight.detach()[:, columns].T * bridges.rms_ratio(site)
        return cls(site, tuple(nodes), rows)

    def delta(
        self,
        presented: Float[Tensor, "batch seq d_sparse"],
        counterfactual: Float[Tensor, "batch seq d_sparse"],
        dense_rms: Float[Tensor, "batch seq 1"],
    ) -> Float[Tensor, "batch seq d_dense"]:
        """The change of the dense stream at strength 1.

        `presented` and `counterfactual` are the student's activations at the site's read address.
        """
        columns = [node.channel for node in self.nodes]
        change = (counterfactual - presented)[..., columns]
        return change @ self.directions * dense_rms

    def save(self, folder: Path, facts: dict[str, object]) -> None:
        """`edit.json` and `edit.safetensors`; `facts` names the models and holds the measurements."""
        header = {
            "schema_version": SCHEMA_VERSION,
            "site": str(self.site),
            "nodes": [str(node) for node in self.nodes],
            **facts,
        }

        def write(target: Path) -> None:
            tensors = {"directions": self.directions.cpu().contiguous()}
            save_file(tensors, target / "edit.safetensors", metadata={"format": "pt"})
            write_json(target / "edit.json", header)

        replace_folder(folder, write)

    @classmethod
    def load(cls, folder: Path, dense: DenseModel) -> "Edit":
        """Read an edit made for this dense checkpoint.

        Raises:
            InputError: missing files, or another base checkpoint.
        """
        header = read_json(folder / "edit.json", "edit", "recipes/edit.py")
        if header["dense_sha256"] != dense.sha256:
            raise InputError(
                f"edit '{folder}' was made for a dense checkpoint with weights "
                f"{header['dense_sha256'][:12]}, this one has {dense.sha256[:12]}"
            )
        directions = load_file(folder / "edit.safetensors")["directions"].to(dense.device)
        nodes = tuple(map(Node.parse, header["nodes"]))
        return cls(Site.parse(header["site"]), nodes, directions)


class PromptStreams:
    """One pass of both models over a batch of prompts, from which every edit on it is measured."""

    @torch.no_grad()
    def __init__(self, dense: DenseModel, student: Student, bridges: BridgeSet, batch: TaskBatch):
        self.dense, self.batch = dense, batch
        run = dense.run(batch.ids)
        self.resid = run.resid
        self.unedited = batch.logit_difference(run.logits)
        recorder = Recorder(*(site.read_address for site in bridges.sites))
        student(batch.ids, tap=recorder)
        self.presented = recorder.activations
        self.dense_rms = {site: bridges.read_scale(resid) for site, resid in run.resid.items()}

    def delta(self, edit: Edit) -> Float[Tensor, "example seq d_dense"]:
        presented = self.presented[edit.site.read_address]
        counterfactual = self.batch.counterfactual(presented)
        return edit.delta(presented, counterfactual, self.dense_rms[edit.site])

    def difference(self, site: Site, delta: Tensor, *, indirect: bool) -> Float[Tensor, " example"]:
        """Answer minus distractor of the dense model with `delta` added at `site`."""
        removed = delta if indirect else None
        logits = self.dense.run_from(site, self.resid[site] + delta, removed=removed)
        return self.batch.logit_difference(logits)

    @torch.no_grad()
    def flip_rate(self, site: Site, delta: Tensor, *, indirect: bool) -> float:
        """Share of the prompts answered right without the edit whose answer the edit flips."""
        right = self.unedited > 0
        flipped = right & (self.difference(site, delta, indirect=indirect) < 0)
        return flipped.sum().item() / max(1, int(right.sum()))


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
    for _, everything in at_sites[: config.sites_tried]:
        edit, rates = _grow(streams, everything, bridges, config)
        reached = max(rates) >= config.goal
        score = (reached, -len(edit.nodes) if reached else 0, sum(rates))
        if best is None or score > best[0]:
            best = (score, edit)
    return best[1] if best else None


def _training_rates(streams: PromptStreams, edit: Edit, config: EditConfig) -> list[float]:
    """Indirect flip rates at half and at full strength."""
    delta, top = streams.delta(edit), max(config.strengths)
    return [streams.flip_rate(edit.site, s * delta, indirect=True) for s in (top / 2, top)]


@torch.no_grad()
def _grow(
    streams: PromptStreams, everything: Edit, bridges: BridgeSet, config: EditConfig
) -> tuple[Edit, list[float]]:
    """Add the node that moves the answers furthest, until the goal or the largest size."""
    site, top = everything.site, max(config.strengths)
    left = rank_nodes(streams, everything, config)[: config.candidates]
    chosen: list[Node] = []
    edit, rates = everything, [0.0]
    while left and len(chosen) < config.max_size:

        def answered(node: Node) -> float:
            """Mean probability of the right answer, at full strength and by the indirect effect."""
            delta = streams.delta(Edit.from_nodes([*chosen, node], site, bridges))
            return streams.difference(site, top * delta, indirect=True).sigmoid().mean().item()

        chosen.append(min(left, key=answered))
        left.remove(chosen[-1])
        edit = Edit.from_nodes(chosen, site, bridges)
        rates = _training_rates(streams, edit, config)
        if max(rates) >= config.goal:
            break
    return edit, rates


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
        total = streams.difference(edit.site, delta, indirect=True).sum()
        (gradient,) = torch.autograd.grad(total, delta)
        effect += ((gradient @ edit.directions.T) * change).sum((0, 1))
    order = torch.argsort(effect, stable=True).tolist()  # most negative first: towards the flip
    return [edit.nodes[index] for index in order]


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

    def rates(deltas: Sequence[Tensor], indirect: bool) -> list[float]:
        return [
            sum(streams.flip_rate(edit.site, s * d, indirect=indirect) for d in deltas) / len(deltas)
            for s in config.strengths
        ]

    inside = torch.arange(delta.shape[1], device=delta.device) <= streams.batch.last[:, None]
    norms = (delta.norm(dim=-1) * inside).sum() / inside.sum()
    resid_norms = (bridges.centred(streams.resid[edit.site]).norm(dim=-1) * inside).sum() / inside.sum()
    return {
        "size": len(edit.nodes),
        "strengths": list(config.strengths),
        "flip_rate": rates([delta], indirect=False),
        "flip_rate_indirect": rates([delta], indirect=True),
        "control_random_node": rates(random_nodes, indirect=True),
        "control_random_direction": rates(random_directions, indirect=True),
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
