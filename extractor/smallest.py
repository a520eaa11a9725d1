"""The fewest top-ranked nodes that reach a loss, and the calibration of a circuit's logit difference."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from extractor.circuit import Calibration, sides
from extractor.compact import CompactStudent
from extractor.masks import GateTap, NodeMasks
from extractor.student import Student
from extractor.tasks import TaskBatch, two_way_loss

SIZES_PER_PASS = 16
TOKENS_PER_PASS = 65536  # bounds the memory of a pass over many sizes


class Sizes:
    """The calibrated losses of many sets of nodes in one batched forward."""

    def __init__(self, student: Student, masks: NodeMasks, live: Bool[Tensor, " node"]):
        """For sets within `live`: all other nodes are folded away."""
        self.model = CompactStudent(student, masks.live(live), masks.means)
        self.tap = GateTap(masks, live)

    @torch.no_grad()
    def losses(self, kept: Bool[Tensor, "set node"], prompts: TaskBatch) -> list[tuple[float, Calibration]]:
        """Calibrated two-way loss of every set, and its calibration."""
        found = []
        for some in kept.split(max(1, TOKENS_PER_PASS // prompts.ids.numel())):
            ids, last = prompts.ids.repeat(len(some), 1), prompts.last.repeat(len(some))
            logits = self.model(ids, logits_to_keep=last[:, None], tap=self.tap(some.float())).logits
            for own in logits.unflatten(0, (len(some), -1)):
                difference = prompts.logit_difference(own)
                calibration = calibrate(difference)
                found.append((two_way_loss(calibration(difference)).item(), calibration))
        return found


def smallest_circuit(
    student: Student,
    masks: NodeMasks,
    tau: Float[Tensor, " node"],
    prompts: TaskBatch,
    goal: float,
    target_loss: float,
) -> tuple[Bool[Tensor, " node"], Calibration]:
    """The fewest nodes of largest tau (ties by index) whose calibrated loss is at most `goal`.

    A grid of sizes is tried in one pass, then a finer one below the smallest that reached the goal. Where the
    open nodes do not reach it, the goal is `target_loss`; where they do not reach that either, closed nodes
    are added, at last all.
    """
    order = torch.argsort(tau, descending=True, stable=True)
    rank = torch.argsort(order)
    low, high = 0, int((tau > 0).sum()) or 1
    sizes = Sizes(student, masks, rank < high)
    ((loss, calibration),) = sizes.losses((rank < high)[None], prompts)
    goal = goal if loss <= goal else target_loss
    while loss > goal and high < len(order):
        low, high = high, min(2 * high, len(order))
        sizes = Sizes(student, masks, rank < high)
        ((loss, calibration),) = sizes.losses((rank < high)[None], prompts)
    while high - low > 1:
        count = min(SIZES_PER_PASS, high - low - 1)
        grid = torch.tensor([low + (high - low) * (i + 1) // (count + 1) for i in range(count)])
        kept = rank < grid[:, None].to(rank.device)
        for size, (loss, own) in zip(grid.tolist(), sizes.losses(kept, prompts), strict=True):
            if loss <= goal:
                high, calibration = size, own
                break
            low = size
    return rank < high, calibration


def calibrate(difference: Float[Tensor, " example"], prior: float = 0.01) -> Calibration:
    """Scale and shift of a batch's logit difference by L-BFGS (Gao et al. 2025, appendix A.5).

    A weak prior keeps log(scale) and shift near zero, because on prompts that are all right the best
    scale would be infinite.
    """
    with torch.enable_grad():
        difference = difference.detach().double()
        side = sides(difference)
        log_scale = torch.zeros((), dtype=torch.double, requires_grad=True)
        shift = torch.zeros((), dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_scale, shift], max_iter=16, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.softplus(-(log_scale.exp() * difference + shift * side)).mean()
            loss = loss + prior * (log_scale.square() + shift.square())
            loss.backward()
            return loss

        optimizer.step(closure)
    scale = math.exp(log_scale.item())
    return Calibration(scale, shift.item())
