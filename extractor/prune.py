"""Extract a task's circuit: learn a mask, rank its nodes, keep the fewest that reach the target loss.

1. AdamW on tau, for all settings (seeds, tasks) at once over the same frozen weights: task loss + size_coef *
   nodes kept, on training pairs. The task loss is the two-way cross-entropy towards the whole student's own
   answer (`target: student`) or the label (`answer`). A mask can solve a task its student cannot, so the
   student's own behaviour is the default target. Nodes that cannot open again in the steps left are folded
   away: the model shrinks as the circuit does.
2. Rank nodes by tau; search the smallest k whose calibrated loss reaches `target_loss` on selection prompts,
   whose templates and contents the mask was not learned on. Held-out prompts are never looked at here.
3. Learn the edges between these nodes, and drop what can be spared (`extractor.refine`).

(Gao et al. 2025, section 2.2 and appendix A.5.)
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from extractor.circuit import Circuit, edges_between
from extractor.compact import CompactStudent
from extractor.config import Config
from extractor.machine import autocast
from extractor.masks import GateTap, Means, NodeMasks
from extractor.refine import RefineConfig, drop_spare_nodes, find_edges, in_use
from extractor.smallest import smallest_circuit
from extractor.student import Student
from extractor.tasks import TaskBatch

BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
COMPACT_EVERY = 5  # steps; folding takes about as long as half a step
COMPACT_BELOW = 0.8  # of the nodes computed so far


class PruneConfig(Config):
    """How a circuit is looked for."""

    target: Literal["student", "answer"] = "student"
    """Train the mask towards the whole student's own answers, or towards the labels."""
    target_loss: float = Field(0.15, gt=0)
    """Two-way loss in nats that the circuit must reach (chance is 0.693)."""
    selection_frac: float = Field(0.4, gt=0, le=1)
    """The search aims at this share of target_loss, so that held-out prompts stay below it."""
    steps: int = Field(150, ge=1)
    pairs_per_step: int = Field(8, ge=1)
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
    """Pairs of other templates and contents, on which size, edges and calibration are chosen."""
    seeds: tuple[int, ...] = (0,)
    """One mask per seed, learned together; the smallest circuit that reaches the target is kept."""
    refine: RefineConfig = RefineConfig()
    """Edges are learned, and what can be spared is dropped."""
    compact: bool = True
    """Fold nodes away that cannot open again; changes the speed alone."""


@dataclass(frozen=True)
class Setting:
    """One mask to learn: its prompts, what it is trained towards, and its start."""

    train: TaskBatch
    wanted: Float[Tensor, " example"]  # probability of the answer
    seed: int
    size_coef: float

    def draw(self, step: int, count: int) -> tuple[TaskBatch, Float[Tensor, " example"]]:
        """This step's prompts."""
        half = len(self.train) // 2
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        pairs = torch.randperm(half, generator=generator)[:count].to(self.wanted.device)
        return self.train.select(pairs), self.wanted[torch.cat([pairs, pairs + half])]


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
    student.requires_grad_(False)
    wanted = wanted_probability(student, train, config.target)
    settings = [Setting(train, wanted, seed, config.size_coef) for seed in config.seeds]
    masks = learn_masks(student, settings, means, config)
    goal = config.target_loss * config.selection_frac
    found = [
        (tau, *smallest_circuit(student, masks, tau, selection, goal, config.target_loss))
        for tau in masks.tau.detach()
    ]
    tau, kept, calibration = min(found, key=lambda candidate: int(candidate[1].sum()))
    if config.refine.enabled:
        kept = drop_spare_nodes(student, masks, tau, kept, selection, goal)
    nodes = masks.nodes(kept)
    edges = edges_between(student, nodes)
    if config.refine.enabled:
        model = CompactStudent(student, masks.live(kept), means)
        pairs, calibration = find_edges(
            model, means, train, wanted, selection, goal, config.refine, config.pairs_per_step
        )
        nodes, pairs = in_use(nodes, pairs)
        wanted_pairs = set(pairs)
        edges = tuple(edge for edge in edges if (edge.source, edge.target) in wanted_pairs)
    return Circuit(
        task=task,
        nodes=nodes,
        edges=edges,
        student_sha256=student_sha256,
        settings=config.model_dump(mode="json") | {"ablation": "mean"},
        calibration=calibration,
    )


@torch.no_grad()
def wanted_probability(
    student: Student, prompts: TaskBatch, target: Literal["student", "answer"]
) -> Float[Tensor, " example"]:
    """The probability of the answer that a mask is trained towards."""
    if target == "answer":
        return torch.ones(len(prompts), device=prompts.ids.device)
    with autocast(student.device):
        logits = student(prompts.ids, logits_to_keep=prompts.last[:, None]).logits
    return torch.sigmoid(prompts.logit_difference(logits))


def learn_masks(
    student: Student, settings: Sequence[Setting], means: Means, config: PruneConfig
) -> NodeMasks:
    """Optimise every setting's tau; the student's weights get no gradient.

    The settings do not touch each other: learned together or one by one, they end alike.
    """
    seeds = [setting.seed for setting in settings]
    masks = NodeMasks(
        means, seeds, init=config.init, init_noise=config.init_noise, temperature=config.temperature
    )
    optimizer = torch.optim.AdamW([masks.tau], lr=config.learning_rate, betas=BETAS, weight_decay=0.0)
    size_coefs = torch.tensor([setting.size_coef for setting in settings], device=masks.tau.device)
    model, tap, num_live = student, GateTap(masks), masks.tau.shape[1]
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        may_open = can_open(masks.tau.detach(), step, config)
        live = may_open.any(0)
        if config.compact and step % COMPACT_EVERY == 0 and int(live.sum()) < COMPACT_BELOW * num_live:
            model, tap = CompactStudent(student, masks.live(live), means), GateTap(masks, live)
            num_live = int(live.sum())
        batch, wanted = draw_all(settings, step, config.pairs_per_step)
        gates = masks.gates()
        # Folded matrices are too small to gain from bf16.
        with autocast(student.device) if model is student else nullcontext():
            logits = model(batch.ids, tap=tap(gates), logits_to_keep=batch.last[:, None]).logits
        difference = batch.logit_difference(logits)
        task_loss = F.binary_cross_entropy_with_logits(difference, wanted, reduction="none")
        loss = task_loss.unflatten(0, (len(settings), -1)).mean(1) + size_coefs * gates.sum(1)
        optimizer.zero_grad()
        loss.sum().backward()
        gradient = masks.tau.grad.mul_(may_open)
        gradient.mul_((MAX_GRAD_NORM / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1))
        optimizer.step()
        masks.clamp_()
    return masks


def can_open(
    tau: Float[Tensor, "setting node"], step: int, config: PruneConfig
) -> Bool[Tensor, "setting node"]:
    """Nodes that are open, or that the steps left could open.

    Adam moves by at most `reach` times the rate (Cauchy-Schwarz on its two moments), and the rate falls to
    zero, so the others are closed for good: leaving them out changes no gate.
    """
    beta1, beta2 = BETAS
    reach = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    rates = sum(1 - later / config.steps for later in range(step, config.steps))
    return tau + max(reach, 1.0) * config.learning_rate * rates > 0


def draw_all(
    settings: Sequence[Setting], step: int, count: int
) -> tuple[TaskBatch, Float[Tensor, " example"]]:
    """The settings' prompts of a step, one after the other, padded to the longest."""
    batches, wanted = zip(*(setting.draw(step, count) for setting in settings), strict=True)
    width = max(batch.ids.shape[1] for batch in batches)
    ids = [F.pad(batch.ids, (0, width - batch.ids.shape[1])) for batch in batches]
    rest = (torch.cat([getattr(b, name) for b in batches]) for name in ("last", "answer", "distractor"))
    return TaskBatch(torch.cat(ids), *rest), torch.cat(wanted)
