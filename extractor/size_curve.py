"""Circuit size against task loss (Gao et al. 2025, figure 2): how small a circuit is at every target loss.

Each mask's order of nodes is cut at sizes in equal ratios. A cut is calibrated on selection prompts and
measured on held-out ones; the size at a target is that of the smallest cut of any mask that reaches it.
Edges are all nonzero weights between the nodes of a cut, as in the paper.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from extractor.circuit import weight_joins
from extractor.masks import Bank, NodeMasks
from extractor.prune import Search
from extractor.smallest import Sizes, calibrate_all
from extractor.student import Student
from extractor.tasks import TaskBatch, two_way_loss

TARGET_LOSSES = (0.5, 0.35, 0.15, 0.05, 0.035, 0.015, 0.0035, 0.0015)  # nats: those of the paper's figure
RATIO = 1.25  # between neighbouring sizes
GOOD_ENOUGH = min(TARGET_LOSSES)
MASKS = 3  # the best ones are cut; others seldom give the smallest circuit at any loss


def size_curve(
    student: Student, search: Search, held_out: TaskBatch, bank: Bank | None = None
) -> dict[str, object]:
    """The best masks' cuts (nodes, edges, held-out loss), and nodes and edges at each target loss; none where
    no mask was learned."""
    if not search.was_learned:
        reason = "the model itself stays above the loss that masks are cut for"
        return {"cuts": [], "targets": [{"target_loss": t, "undefined": reason} for t in TARGET_LOSSES]}
    cuts = []
    for index in search.ranked[:MASKS]:
        selection, tau = search.settings[index].selection, search.found[index].tau
        cuts += mask_cuts(student, search.masks, tau, selection, held_out, bank)
    return {"cuts": cuts, "targets": [size_at(cuts, target) for target in TARGET_LOSSES]}


def mask_cuts(
    student: Student,
    masks: NodeMasks,
    tau: Tensor,
    selection: TaskBatch,
    held_out: TaskBatch,
    bank: Bank | None = None,
) -> list[dict[str, float]]:
    """One mask's order, cut at sizes in equal ratios up to the first that is good enough for every target."""
    rank = torch.argsort(torch.argsort(tau, descending=True, stable=True))
    cuts: list[dict[str, float]] = []
    for size in _sizes(len(tau)):
        kept = masks.of_nodes(rank < size)
        sizes = Sizes(student, masks, kept, bank)
        with torch.no_grad():
            (calibration,) = calibrate_all(sizes.differences(kept.float()[None], selection))
            (difference,) = sizes.differences(kept.float()[None], held_out)
        loss = two_way_loss(calibration(difference)).item()
        cuts.append({"nodes": int(kept.sum()), "edges": count_kept_edges(student, masks, kept), "loss": loss})
        if loss <= GOOD_ENOUGH:
            break
    return cuts


def size_at(cuts: Sequence[Mapping[str, float]], target: float) -> dict[str, object]:
    """The smallest cut that reaches a loss."""
    reached = [cut for cut in cuts if cut["loss"] <= target]
    if not reached:
        return {"target_loss": target, "undefined": "no size reaches it on held-out prompts"}
    best = min(reached, key=lambda cut: cut["edges"])
    return {"target_loss": target, "nodes": best["nodes"], "edges": best["edges"]}


def geometric_mean(values: Sequence[float]) -> float:
    """Of circuit sizes over tasks; an empty circuit counts as one edge, or the mean would be zero."""
    return math.exp(sum(math.log(max(value, 1)) for value in values) / len(values))


def count_kept_edges(student: Student, masks: NodeMasks, kept: Bool[Tensor, " node"]) -> int:
    """Nonzero weights between kept nodes."""
    marked = masks.by_address(kept)
    return sum(
        int(weight[marked[target]][:, marked[source]].count_nonzero())
        for source, target, weight in weight_joins(student)
    )


def _sizes(most: int) -> list[int]:
    sizes, size = [], 1.0
    while size < most:
        sizes.append(round(size))
        size = max(size * RATIO, size + 1)
    return [*sizes, most]
