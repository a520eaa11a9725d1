"""The fewest top-ranked nodes that reach a loss, and the calibration of a circuit's logit difference."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from extractor.circuit import Calibration, sides
from extractor.compact import CompactStudent
from extractor.masks import GateTap, NodeMasks
from extractor.student import Student
from extractor.tasks import TaskBatch, two_way_loss

SIZES_PER_PASS = 16
TOKENS_PER_PASS = 65536  # bounds the memory of a pass over many sizes


class Sizes:
    """The losses of the first k nodes of a ranking, many k in one batched forward."""

    def __init__(self, student: Student, masks: NodeMasks, order: Int[Tensor, " node"], most: int):
        live = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:most], True)
        self.model = CompactStudent(student, masks.live(live), masks.means)
        self.tap, self.order = GateTap(masks, live), order

    @torch.no_grad()
    def losses(self, sizes: list[int], prompts: TaskBatch) -> list[tuple[float, Calibration]]:
        """Calibrated two-way loss at each size."""
        found = []
        at_once = max(1, TOKENS_PER_PASS // prompts.ids.numel())
        for start in range(0, len(sizes), at_once):
            some = sizes[start : start + at_once]
            gates = torch.zeros(len(some), len(self.order), device=self.order.device)
            for gate, size in zip(gates, some, strict=True):
                gate[self.order[:size]] = 1
            ids, last = prompts.ids.repeat(len(some), 1), prompts.last.repeat(len(some))
            logits = self.model(ids, logits_to_keep=last[:, None], tap=self.tap(gates)).logits
            for kept in logits.unflatten(0, (len(some), -1)):
                difference = prompts.logit_difference(kept)
                calibration = calibrate(difference)
                found.append((two_way_loss(calibration(difference)).item(), calibration))
        return found


def smallest_circuit(
    student: Student,
    masks: NodeMasks,
    tau: Float[Tensor, " node"],
    prompts: TaskBatch,
    goal: float,
) -> tuple[Bool[Tensor, " node"], Calibration]:
    """The fewest nodes of largest tau (ties by index) whose calibrated loss is at most `goal`.

    A grid of sizes is tried in one pass, then a finer one below the smallest that reached the goal. Where the
    open nodes do not reach it, closed ones are added, at last all.
    """
    order = torch.argsort(tau, descending=True, stable=True)
    low, high = 0, int((tau > 0).sum()) or 1
    sizes = Sizes(student, masks, order, high)
    ((loss, calibration),) = sizes.losses([high], prompts)
    while loss > goal and high < len(order):
        low, high = high, min(2 * high, len(order))
        sizes = Sizes(student, masks, order, high)
        ((loss, calibration),) = sizes.losses([high], prompts)
    while high - low > 1:
        count = min(SIZES_PER_PASS, high - low - 1)
        grid = [low + (high - low) * (i + 1) // (count + 1) for i in range(count)]
        for size, (loss, own) in zip(grid, sizes.losses(grid, prompts), strict=True):
            if loss <= goal:
                high, calibration = size, own
                break
            low = size
    kept = torch.zeros_like(tau, dtype=torch.bool).index_fill(0, order[:high], True)
    return kept, calibration


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
