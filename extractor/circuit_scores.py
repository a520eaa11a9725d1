"""Circuit finders on one student, scored alike: any order of nodes or of edges, beside the learned circuit.

An order is cut at several sizes; a cut is run on held-out prompts with everything else at its mean:

    faithfulness f = (m_cut - m_floor) / (m_student - m_floor)     m: mean logit difference
    loss           two-way cross-entropy, scale and shift fitted on training prompts, for all alike

CPR is the area under f, CMD that of |1 - f|, over the share of nodes or edges kept, from 0.001 to 1 (MIB,
Mueller et al. 2025: in the signed order for CPR, in that of absolute scores for CMD). Cuts of 50 to 100 %
make half of both, and CPR pays for overshoot; so there are also the means of f and |1 - f| over log(share),
the size at a loss and the loss at the learned circuit's size.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from extractor import attribution
from extractor.attribution import StudentEdges
from extractor.circuit import Circuit
from extractor.compact import CompactStudent
from extractor.config import Config
from extractor.masks import Live, Means
from extractor.smallest import calibrate
from extractor.student import Student
from extractor.tasks import TaskBatch, two_way_loss

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's
SIZE_TOLERANCE = 0.02  # of a size at a loss, relative
MIN_GAP = 1e-3  # between student and floor, in logits; below it faithfulness says nothing

Undefined = dict[str, str]
NO_GAP: Undefined = {"undefined": "the task has no gap: student and floor are equally good"}
NOT_REACHED: Undefined = {"undefined": "no size reaches the target loss"}


class PeersConfig(Config):
    """Other ways to rank nodes and edges, scored as the learned circuit is."""

    enabled: bool = False
    """Takes minutes per task."""
    pairs: int = Field(32, ge=1)
    """Training pairs that scores are taken on and cuts are calibrated on."""
    path_steps: int = Field(8, ge=1)
    """Points on the path of integrated gradients and EAP-IG."""
    seed: int = 0
    """Of the random order."""


class Reading(NamedTuple):
    """What a model does on held-out prompts."""

    loss: float  # calibrated, nats
    logit_difference: float  # mean, not calibrated


def compare_peers(
    student: Student,
    train: TaskBatch,
    held_out: TaskBatch,
    means: Means,
    learned: Circuit,
    config: PeersConfig,
    *,
    target_loss: float,
    tau: Float[Tensor, " node"] | None = None,
) -> dict[str, object]:
    """Every method's numbers over nodes and over edges, as JSON.

    `learned` is the circuit as it runs, with nodes that none of its edges touches (constants that need not be
    their means); in an order of edges, its own too, a cut has the nodes at the ends of its edges alone.

    Args:
        tau: the learned mask's, in the order of `means`. With it the learned order is cut at all sizes too:
            the circuit first, then by tau (edges: by the smaller tau of their ends).
    """
    count = min(config.pairs, len(train) // 2)
    train = train.select(torch.arange(count, device=train.ids.device))
    edges = StudentEdges(student, means)
    node_scores, edge_scores = node_orders(student, train, means, config), edge_orders(edges, train, config)
    in_nodes, in_edges = marks(learned, edges)
    if tau is not None:
        height = tau - tau.min()
        lower = torch.minimum(height[edges.source], height[edges.target])
        node_scores["learned"] = height + in_nodes * (height.max() + 1)
        edge_scores["learned"] = lower + in_edges * (height.max() + 1)
    cuts = Cuts(edges, train, held_out)
    alone = {"nodes": cuts.nodes(in_nodes), "edges": cuts.read(learned.compact(student, means))}
    found: dict[str, object] = {
        "metric": "logit difference",
        "ablation": "mean",
        "num_prompts": len(held_out),
        "num_scored_prompts": len(train),
        "target_loss": target_loss,
        "shares": list(SHARES),
        "student": cuts.whole._asdict(),
        "floor": cuts.floor._asdict(),
    }
    for unit, read, marked, all_scores in (
        ("nodes", cuts.nodes, in_nodes, node_scores),
        ("edges", cuts.edges, in_edges, edge_scores),
    ):
        size = int(marked.sum())
        found[unit] = {
            "total": len(marked),
            "learned": {
                "size": size,
                "loss": alone[unit].loss,
                "faithfulness": cuts.faithfulness([alone[unit]])[0] if cuts.has_gap else NO_GAP,
            },
            "methods": {
                name: score_method(scores, read, cuts, size, target_loss)
                for name, scores in all_scores.items()
            },
        }
    return found


def node_orders(
    student: Student, prompts: TaskBatch, means: Means, config: PeersConfig
) -> dict[str, Float[Tensor, " node"]]:
    """Scores of all nodes by method."""
    generator = torch.Generator().manual_seed(config.seed)
    steps = config.path_steps
    magnitude = attribution.deviation_of_nodes(student, prompts, means)
    return {
        "nap_mean": attribution.patching_nodes(student, prompts, means),
        "nap_counterfactual": attribution.patching_nodes_counterfactual(student, prompts, means),
        "nap_ig_counterfactual": attribution.input_gradients_nodes(student, prompts, means, steps),
        "gate_ig_mean": attribution.integrated_gradients_nodes(student, prompts, means, steps),
        "magnitude": magnitude,
        "random": torch.rand(len(magnitude), generator=generator).to(magnitude.device),
    }


def edge_orders(
    edges: StudentEdges, prompts: TaskBatch, config: PeersConfig
) -> dict[str, Float[Tensor, " edge"]]:
    """Scores of all edges by method."""
    generator = torch.Generator().manual_seed(config.seed)
    steps = config.path_steps
    magnitude = attribution.magnitude_of_edges(edges, prompts)
    return {
        "eap_mean": attribution.patching_edges(edges, prompts),
        "eap_counterfactual": attribution.patching_edges_counterfactual(edges, prompts),
        "eap_ig_counterfactual": attribution.input_gradients_edges(edges, prompts, steps),
        "gate_ig_mean": attribution.integrated_gradients_edges(edges, prompts, steps),
        "magnitude": magnitude,
        "random": torch.rand(len(magnitude), generator=generator).to(magnitude.device),
    }


class Cuts:
    """Reads sets of nodes and of edges on held-out prompts; the rest is at its mean."""

    def __init__(self, edges: StudentEdges, train: TaskBatch, held_out: TaskBatch):
        self.graph, self.train, self.held_out = edges, train, held_out
        student = edges.student
        shared = (student.embed_tokens, student.embed_positions, student.lm_head, student.bigram)
        self._closed = copy.deepcopy(student, {id(module): module for module in shared})
        self.whole = self.read(student)
        self.floor = self.read(CompactStudent(student, {}, edges.means))

    @property
    def has_gap(self) -> bool:
        return abs(self.whole.logit_difference - self.floor.logit_difference) > MIN_GAP

    @torch.no_grad()
    def read(self, model: nn.Module) -> Reading:
        train, held_out = (
            prompts.logit_difference(model(prompts.ids, logits_to_keep=prompts.last[:, None]).logits)
            for prompts in (self.train, self.held_out)
        )
        loss = two_way_loss(calibrate(train)(held_out))
        return Reading(loss.item(), held_out.mean().item())

    def nodes(self, kept: Bool[Tensor, " node"]) -> Reading:
        if kept.all():
            return self.whole
        return self.read(CompactStudent(self.graph.student, self._live(kept), self.graph.means))

    @torch.no_grad()
    def edges(self, kept: Bool[Tensor, " edge"]) -> Reading:
        """These edges and the nodes at their ends, as `Circuit.compact` would run them."""
        if kept.all() or not kept.any():
            return self.whole if len(kept) and kept.all() else self.floor
        ends = torch.zeros(len(self.graph.nodes), dtype=torch.bool, device=kept.device)
        ends[self.graph.source[kept]] = True
        ends[self.graph.target[kept]] = True
        # An edge at a frozen node is for the compact model to fold, or to rank against.
        gates = (kept | ~(ends[self.graph.source] & ends[self.graph.target])).float()
        for name, value in self.graph.parameters(gates).items():
            self._closed.get_parameter(name).copy_(value)
        return self.read(CompactStudent(self._closed, self._live(ends), self.graph.means))

    def faithfulness(self, readings: Sequence[Reading]) -> list[float]:
        floor = self.floor.logit_difference
        gap = self.whole.logit_difference - floor
        return [(reading.logit_difference - floor) / gap for reading in readings]

    def _live(self, kept: Bool[Tensor, " node"]) -> Live:
        sizes = [len(mean) for mean in self.graph.means.values()]
        parts = zip(self.graph.means, kept.cpu().split(sizes), strict=True)
        return {address: own.nonzero()[:, 0] for address, own in parts}


class Ranking:
    """One order, cut at sizes; every size is read once."""

    def __init__(self, scores: Float[Tensor, " part"], read: Callable[[Bool[Tensor, " part"]], Reading]):
        """Largest score first; ties by index."""
        self._rank = torch.argsort(torch.argsort(scores, descending=True, stable=True))
        self._read = read
        self._known: dict[int, Reading] = {}
        self.sizes = [int(share * len(scores)) for share in SHARES]  # rounded as MIB does

    def at(self, size: int) -> Reading:
        if size not in self._known:
            self._known[size] = self._read(self._rank < size)
        return self._known[size]

    def size_at(self, loss: float) -> int | None:
        """The smallest size known that reaches the loss, brought down to where the size before it fails.

        Losses need not fall with size: between two sizes read, one crossing is found, to within 2 %.
        """
        for size in (0, *self.sizes):
            self.at(size)
        known = sorted(self._known)
        reached = [index for index, size in enumerate(known) if self.at(size).loss <= loss]
        if not reached:
            return None
        high = known[reached[0]]
        low = known[reached[0] - 1] if reached[0] else high
        while high - low > max(1, SIZE_TOLERANCE * high):
            middle = (low + high) // 2
            low, high = (low, middle) if self.at(middle).loss <= loss else (middle, high)
        return high


def score_method(
    scores: Float[Tensor, " part"],
    read: Callable[[Bool[Tensor, " part"]], Reading],
    cuts: Cuts,
    size: int,
    target_loss: float,
) -> dict[str, object]:
    """One method's curves and areas; its size at the loss and its loss at the size are its better order's."""
    signed = Ranking(scores, read)
    absolute = signed if (scores >= 0).all() else Ranking(scores.abs(), read)
    curves, faithfulness = {}, {}
    for name, ranking in (("signed", signed), ("absolute", absolute)):
        readings = [ranking.at(cut) for cut in ranking.sizes]
        faithfulness[name] = cuts.faithfulness(readings) if cuts.has_gap else None
        curves[name] = {
            "sizes": ranking.sizes,
            "losses": [reading.loss for reading in readings],
            "faithfulness": faithfulness[name] or NO_GAP,
        }
    loss_at_size = min(ranking.at(size).loss for ranking in (signed, absolute))
    found = [at for ranking in (signed, absolute) if (at := ranking.size_at(target_loss)) is not None]
    return {
        "cpr": cpr(SHARES, faithfulness["signed"]) if cuts.has_gap else NO_GAP,
        "cmd": cmd(SHARES, faithfulness["absolute"]) if cuts.has_gap else NO_GAP,
        "log_area": log_area(SHARES, faithfulness["signed"]) if cuts.has_gap else NO_GAP,
        "log_distance": log_distance(SHARES, faithfulness["absolute"]) if cuts.has_gap else NO_GAP,
        "size_at_loss": min(found) if found else NOT_REACHED,
        "loss_at_size": loss_at_size,
        "curves": curves,
    }


def cpr(shares: Sequence[float], faithfulness: Sequence[float]) -> float:
    """MIB's circuit performance ratio: area under f over the share kept; higher is better, unbounded."""
    return float(np.trapezoid(faithfulness, shares))


def cmd(shares: Sequence[float], faithfulness: Sequence[float]) -> float:
    """MIB's circuit-model distance: area of |1 - f| over the share kept; 0 is best."""
    return float(np.trapezoid(np.abs(1 - np.asarray(faithfulness)), shares))


def log_area(shares: Sequence[float], faithfulness: Sequence[float]) -> float:
    """Mean of f over log(share): every doubling of the size counts alike."""
    return float(np.trapezoid(faithfulness, np.log(shares)) / np.log(shares[-1] / shares[0]))


def log_distance(shares: Sequence[float], faithfulness: Sequence[float]) -> float:
    """Mean of |1 - f| over log(share)."""
    return log_area(shares, np.abs(1 - np.asarray(faithfulness)).tolist())


def marks(circuit: Circuit, edges: StudentEdges) -> tuple[Bool[Tensor, " node"], Bool[Tensor, " edge"]]:
    """Which of all nodes and edges are a circuit's; its weights between one pair are one edge."""
    joined = {(edge.source, edge.target) for edge in circuit.edges}
    device = edges.source.device
    nodes = torch.tensor([node in circuit.nodes for node in edges.nodes], device=device)
    index = {node: i for i, node in enumerate(edges.nodes)}
    codes = [index[source] * len(edges.nodes) + index[target] for source, target in joined]
    codes = torch.tensor(codes, dtype=torch.long, device=device)
    return nodes, torch.isin(edges.source * len(edges.nodes) + edges.target, codes)
