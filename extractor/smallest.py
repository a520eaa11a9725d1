"""The fewest top-ranked nodes that reach a loss, and the calibration of a circuit's logit difference."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from extractor.circuit import Calibration, sides
from extractor.compact import CompactStudent
from extractor.masks import Bank, GateTap, NodeMasks
from extractor.packed import Chunks, join
from extractor.student import Student
from extractor.tasks import TaskBatch, two_way_loss

SETS_PER_SEARCH = 16
TOKENS_PER_PASS = 65536  # bounds the memory of a pass over many sets
NEWTON_STEPS = 20


class Sizes:
    """The calibrated losses of many sets of nodes in batched forwards."""

    def __init__(
        self, student: Student, masks: NodeMasks, live: Bool[Tensor, " node"], bank: Bank | None = None
    ):
        """For sets within `live`: all other nodes are folded away. With a bank (resample ablation) none are:
        what they carry is no constant."""
        self.bank = bank
        if bank is None:
            self.model = CompactStudent(student, masks.live(live), masks.means)
            self.tap = GateTap(masks, live)
        else:
            self.model, self.tap = student, GateTap(masks)

    def differences(
        self, gates: Float[Tensor, "set node"], prompts: TaskBatch
    ) -> Float[Tensor, "set example"]:
        """Logit differences under every set's gates: clean prompts (shortest first), then corrupted ones."""
        chunks = Chunks(prompts, self.model.config)
        tokens = sum(math.prod(part.shape) for part in chunks.parts)
        found = []
        for some in gates.split(max(1, TOKENS_PER_PASS // tokens)):
            parts = []
            for index, part in enumerate(chunks.parts):
                drawn = self.bank.draw(*part.shape, seed=index).repeat(len(some)) if self.bank else None
                parts.append(part.differences(self.model, self.tap(some, drawn), times=len(some)))
            found.append(join(parts))
        return torch.cat(found)

    @torch.no_grad()
    def losses(self, kept: Bool[Tensor, "set node"], prompts: TaskBatch) -> list[tuple[float, Calibration]]:
        """Calibrated two-way loss of every set, and its calibration."""
        return calibrated_losses(self.differences(kept.float(), prompts))

    def gradient(self, kept: Bool[Tensor, " node"], prompts: TaskBatch) -> Float[Tensor, " node"]:
        """Slope of the calibrated loss along every node's gate."""
        gates = kept.float()[None].requires_grad_()
        return gate_gradient(gates, self.differences(gates, prompts))[0]


def gate_gradient(gates: Tensor, differences: Float[Tensor, "set example"]) -> Tensor:
    """Slope of the calibrated losses along the gates; the calibration is at its optimum, so it has none."""
    loss = sum(
        two_way_loss(calibration(own))
        for own, calibration in zip(differences, calibrate_all(differences), strict=True)
    )
    (gradient,) = torch.autograd.grad(loss, gates)
    return gradient


def smallest_circuit(
    student: Student,
    masks: NodeMasks,
    tau: Float[Tensor, " part"],
    prompts: TaskBatch,
    goal: float,
    target_loss: float,
    bank: Bank | None = None,
) -> tuple[Bool[Tensor, " part"], Calibration, float | None]:
    """The fewest parts of largest tau (ties by index) whose calibrated loss is at most the goal.

    A grid of sizes is tried in one pass, then a finer one below the smallest that reached the goal. Where the
    open parts do not reach it, the goal is `target_loss`; where they do not reach that either, closed ones
    are added, at last all. The goal that was reached is returned last; None where the student itself is above
    it: then all parts are kept.
    """
    order = torch.argsort(tau, descending=True, stable=True)
    rank = torch.argsort(order)

    def measure(kept: Tensor) -> list[tuple[float, Calibration]]:
        return sizes.losses(masks.of_nodes(kept), prompts)

    low, high = 0, int((tau > 0).sum()) or 1
    sizes = Sizes(student, masks, masks.of_nodes(rank < high), bank)
    ((loss, calibration),) = measure((rank < high)[None])
    goal = goal if loss <= goal else target_loss
    if loss > goal:
        everything = Sizes(student, masks, masks.of_nodes(rank < len(order)), bank)
        ((whole, own),) = everything.losses(masks.of_nodes(rank < len(order))[None], prompts)
        if whole > goal:  # the student itself does not do the task
            return rank < len(order), own, None
    while loss > goal and high < len(order):
        low, high = high, min(2 * high, len(order))
        sizes = Sizes(student, masks, masks.of_nodes(rank < high), bank)
        ((loss, calibration),) = measure((rank < high)[None])
    while high - low > 1:
        count = min(SETS_PER_SEARCH, high - low - 1)
        grid = torch.tensor([low + (high - low) * (i + 1) // (count + 1) for i in range(count)])
        kept = rank < grid[:, None].to(rank.device)
        for size, (loss, own) in zip(grid.tolist(), measure(kept), strict=True):
            if loss <= goal:
                high, calibration = size, own
                break
            low = size
    return rank < high, calibration, goal


def calibrated_losses(differences: Float[Tensor, "set example"]) -> list[tuple[float, Calibration]]:
    """Two-way loss of every set under its own best calibration, and that calibration."""
    found = zip(differences, calibrate_all(differences), strict=True)
    return [(two_way_loss(calibration(own)).item(), calibration) for own, calibration in found]


@torch.no_grad()
def student_loss(student: Student, prompts: TaskBatch) -> float:
    """Calibrated two-way loss of the whole student."""
    (difference,) = Chunks(prompts, student.config).differences(student)
    return calibrated_losses(difference[None])[0][0]


def calibrate(difference: Float[Tensor, " example"]) -> Calibration:
    """Scale and shift of one batch's logit difference."""
    return calibrate_all(difference[None])[0]


@torch.no_grad()
def calibrate_all(differences: Float[Tensor, "set example"], prior: float = 0.01) -> Sequence[Calibration]:
    """Scale and shift of the logit difference, each set's by itself (Gao et al. 2025, appendix A.5).

    A weak prior keeps log(scale) and shift near zero, because on prompts that are all right the best
    scale would be infinite. The paper takes 16 L-BFGS steps; two parameters are a matter of Gauss-Newton
    steps, for all sets at once.
    """
    difference = differences.detach().double()
    side = sides(difference[0])
    parameters = difference.new_zeros(len(difference), 2)  # log(scale), shift
    identity = torch.eye(2, dtype=difference.dtype, device=difference.device)
    objective = _calibration_objective(parameters, difference, side, prior)
    reach = difference.new_ones(len(difference), 1)  # of a step; smaller after one that made things worse
    for _ in range(NEWTON_STEPS):
        scaled = parameters[:, :1].exp() * difference
        wrong = torch.sigmoid(-(scaled + parameters[:, 1:] * side))
        slopes = torch.stack([scaled, side.expand_as(scaled)], dim=-1)
        gradient = 2 * prior * parameters - (wrong[..., None] * slopes).mean(1)
        curvature = torch.einsum("se,sei,sej->sij", wrong * (1 - wrong), slopes, slopes) / len(side)
        step = torch.linalg.solve(curvature + 2 * prior * identity, gradient).clamp(-2, 2)
        trial = parameters - reach * step
        of_trial = _calibration_objective(trial, difference, side, prior)
        is_better = (of_trial <= objective)[:, None]
        parameters = torch.where(is_better, trial, parameters)
        objective = torch.where(is_better[:, 0], of_trial, objective)
        reach = torch.where(is_better, (2 * reach).clamp(max=1), reach / 4)
    log_scale, shift = parameters.unbind(1)
    return [Calibration(*pair) for pair in torch.stack([log_scale.exp(), shift], dim=1).tolist()]


def _calibration_objective(
    parameters: Float[Tensor, "set 2"],
    difference: Float[Tensor, "set example"],
    side: Float[Tensor, " example"],
    prior: float,
) -> Float[Tensor, " set"]:
    calibrated = parameters[:, :1].exp() * difference + parameters[:, 1:] * side
    return F.softplus(-calibrated).mean(1) + prior * parameters.square().sum(1)
