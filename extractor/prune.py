"""Extract a task's circuit: learn a mask, rank its nodes, keep the fewest that reach the target loss.

1. AdamW on tau: task loss + size_coef * nodes kept, on training pairs. The task loss is the two-way
   cross-entropy towards the whole student's own answer (`target: student`) or the label (`answer`).
   A mask can solve a task its student cannot, so the student's own behaviour is the default target.
2. Rank nodes by tau; bisect the smallest k whose calibrated loss reaches `target_loss` on further
   training pairs that the mask was not learned on. Held-out prompts are never looked at here.

(Gao et al. 2025, section 2.2 and appendix A.5.)
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from extractor.circuit import Calibration, Circuit, edges_between, sides
from extractor.config import Config
from extractor.machine import autocast
from extractor.masks import Means, NodeMask
from extractor.student import Student
from extractor.tasks import TaskBatch, two_way_loss


class PruneConfig(Config):
    """How a circuit is looked for."""

    target: Literal["student", "answer"] = "student"
    """Train the mask towards the whole student's own answers, or towards the labels."""
    target_loss: float = Field(0.15, gt=0)
    """Two-way loss in nats that the circuit must reach (chance is 0.693)."""
    selection_frac: float = Field(0.4, gt=0, le=1)
    """The search aims at this share of target_loss, so that held-out prompts stay below it."""
    steps: int = Field(150, ge=1)
    pairs_per_step: int = Field(16, ge=1)
    learning_rate: float = Field(0.03, gt=0)
    size_coef: float = Field(2.7e-3, ge=0)
    """Nats of task loss that one node is worth in the mask's loss (k_coef of the paper)."""
    init: float = Field(0.5, gt=0, le=1)
    """Mean of tau at the start."""
    init_noise: float = Field(0.3, ge=0)
    """Spread of tau at the start. Wide, so that nodes are tried one after the other: with tau alike,
    all gates close in the same step, and a path through closed gates has no gradient to open them."""
    temperature: float = Field(1.0, gt=0)
    """Of the sigmoid whose slope stands in for the step's."""
    train_pairs: int = Field(192, ge=8)
    selection_pairs: int = Field(64, ge=8)
    """Further training pairs for the size and the calibration."""
    seeds: tuple[int, ...] = (0,)
    """One mask per seed; the smallest circuit that reaches the target is kept."""


def extract_circuit(
    student: Student,
    task: str,
    train: TaskBatch,
    selection: TaskBatch,
    means: Means,
    config: PruneConfig,
    student_sha256: str,
) -> Circuit:
    """The smallest circuit found over the seeds; all nodes, where no mask reaches the target."""
    best_gates, best_calibration, mask = None, Calibration(), None
    for seed in config.seeds:
        mask = learn_mask(student, train, means, config, seed)
        gates, calibration = smallest_mask(student, mask, selection, config)
        if best_gates is None or gates.sum() < best_gates.sum():
            best_gates, best_calibration = gates, calibration
    nodes = mask.nodes(best_gates)
    return Circuit(
        task=task,
        nodes=nodes,
        edges=edges_between(student, nodes),
        student_sha256=student_sha256,
        settings=config.model_dump(mode="json") | {"ablation": "mean"},
        calibration=best_calibration,
    )


def learn_mask(student: Student, train: TaskBatch, means: Means, config: PruneConfig, seed: int) -> NodeMask:
    """Optimise tau on training pairs; student weights get no gradient."""
    student.requires_grad_(False)
    mask = NodeMask(
        means, init=config.init, init_noise=config.init_noise, temperature=config.temperature, seed=seed
    )
    optimizer = torch.optim.AdamW(
        mask.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    wanted = _wanted(student, train, config)
    generator = torch.Generator().manual_seed(seed)
    num_pairs = len(train) // 2
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        pairs = torch.randperm(num_pairs, generator=generator)[: config.pairs_per_step]
        batch = train.select(pairs.to(train.ids.device))
        gates = mask.gates()
        with autocast(student.device):
            logits = student(batch.ids, tap=mask.tap(gates)).logits
        examples = torch.cat([pairs, pairs + num_pairs]).to(wanted.device)
        difference = batch.logit_difference(logits)
        loss = F.binary_cross_entropy_with_logits(difference, wanted[examples])
        loss = loss + config.size_coef * gates.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mask.parameters(), 1.0)
        optimizer.step()
        mask.clamp_()
    return mask


@torch.no_grad()
def _wanted(student: Student, batch: TaskBatch, config: PruneConfig) -> Float[Tensor, " example"]:
    """The probability of the answer that the circuit is trained towards."""
    if config.target == "answer":
        return torch.ones(len(batch), device=batch.ids.device)
    return torch.sigmoid(batch.logit_difference(student(batch.ids).logits))


@torch.no_grad()
def smallest_mask(
    student: Student, mask: NodeMask, selection: TaskBatch, config: PruneConfig
) -> tuple[Float[Tensor, " node"], Calibration]:
    """Bisect the fewest top-ranked nodes whose calibrated loss reaches the target."""
    order = mask.ranking()
    goal = config.target_loss * config.selection_frac

    def attempt(k: int) -> tuple[float, Calibration]:
        logits = student(selection.ids, tap=mask.tap(mask.top(order, k))).logits
        difference = selection.logit_difference(logits)
        calibration = calibrate(difference)
        return two_way_loss(calibration(difference)).item(), calibration

    low, high = 0, int((mask.tau > 0).sum()) or 1
    loss, calibration = attempt(high)
    while loss > goal and high < len(order):  # the mask alone does not reach it: allow more
        low, high = high, min(2 * high, len(order))
        loss, calibration = attempt(high)
    while high - low > 1:
        middle = (low + high) // 2
        middle_loss, middle_calibration = attempt(middle)
        if middle_loss <= goal:
            high, calibration = middle, middle_calibration
        else:
            low = middle
    return mask.top(order, high), calibration


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
