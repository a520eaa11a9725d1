"""Learning masks: AdamW on tau of every node, over frozen weights, for several settings at once.

The loss is the task loss + size_coef * prices of the nodes kept, on training pairs. The task loss is the
two-way cross-entropy towards the whole student's own answer (`target: student`) or the label (`answer`). A
mask can solve a task its student cannot, so the student's own behaviour is the default target. Nodes that
cannot open again in the steps left are folded away: the model shrinks as the circuit does.

(Gao et al. 2025, section 2.2 and appendix A.5.)
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from extractor.compact import CompactStudent
from extractor.config import Config
from extractor.gates import learn_gates
from extractor.machine import autocast
from extractor.masks import Bank, GateTap, Means, NodeMasks, tied_queries
from extractor.packed import pack
from extractor.refine import RefineConfig
from extractor.restored import RestoredConfig, restore_at_random
from extractor.student import Student
from extractor.tasks import TaskBatch

COMPACT_EVERY = 5  # steps; folding takes about as long as half a step
COMPACT_BELOW = 0.8  # of the nodes computed so far


class PruneConfig(Config):
    """How a circuit is looked for."""

    target: Literal["student", "answer"] = "student"
    """Train the mask towards the whole student's own answers, or towards the labels."""
    ablation: Literal["mean", "zero", "resample"] = "mean"
    """What closed nodes carry: their mean over training text, zero, or their activation at random tokens of
    it. Edges are always learned against constants (the mean, or zero)."""
    tie_queries: bool = False
    """A k channel and the q channels it is multiplied with open and close together."""
    target_loss: float = Field(0.15, gt=0)
    """Two-way loss in nats that the circuit must reach (chance is 0.693)."""
    selection_frac: float = Field(0.4, gt=0, le=1)
    """The search aims at this share of target_loss, so that held-out prompts stay below it."""
    steps: int = Field(150, ge=1)
    pairs_per_step: int = Field(8, ge=1)
    learning_rate: float = Field(0.03, gt=0)
    size_coefs: tuple[float, ...] = (2.7e-3,)
    """Nats of task loss that one node is worth in the mask's loss (k_coef of the paper)."""
    general_price: float = Field(0.0, ge=0)
    """For how many nodes, besides itself, a node counts that text at large needs (as the hundredth of all
    that it needs most): of two that serve the task alike, the circuit gets the one more its own."""
    init: float = Field(0.5, gt=0, le=1)
    """Mean of tau at the start."""
    init_noise: float = Field(0.3, ge=0)
    """Spread of tau at the start. Wide, so that nodes are tried one after the other: with tau alike,
    all gates close in the same step, and a path through closed gates has no gradient to open them."""
    temperature: float = Field(1.0, gt=0)
    """Of the sigmoid whose slope stands in for the step's."""
    train_pairs: int = Field(192, ge=8)
    selection_pairs: int = Field(64, ge=8)
    """Pairs of other templates and contents, on which (and on as many training pairs) size, edges and
    calibration are chosen."""
    seeds: tuple[int, ...] = (0,)
    """One mask per seed and coefficient: this is the search's whole budget (the paper's: 256 runs). The
    smallest circuit that reaches the target is kept."""
    refine: RefineConfig = RefineConfig()
    """Edges are learned, and what can be spared is dropped."""
    restored: RestoredConfig = RestoredConfig()
    """Circuits hold while random closed nodes work again."""
    compact: bool = True
    """Fold nodes away that cannot open again; changes the speed alone."""
    together: bool | None = None
    """Learn all masks in one batch; by default on an accelerator. A CPU gains little from it, and each mask
    alone needs less memory."""


@dataclass(frozen=True)
class Setting:
    """One mask to learn: its prompts, what it is trained towards, and its start."""

    train: TaskBatch
    wanted: Float[Tensor, " example"]  # probability of the answer, on the training prompts
    selection: TaskBatch
    seed: int
    size_coef: float

    def draw(self, step: int, count: int) -> tuple[TaskBatch, Float[Tensor, " example"]]:
        """This step's prompts."""
        half = len(self.train) // 2
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        pairs = torch.randperm(half, generator=generator)[:count].to(self.wanted.device)
        return self.train.select(pairs), self.wanted[torch.cat([pairs, pairs + half])]


def learn_masks(
    student: Student,
    settings: Sequence[Setting],
    means: Means,
    config: PruneConfig,
    bank: Bank | None = None,
    prices: Float[Tensor, " node"] | None = None,
) -> NodeMasks:
    """Optimise every setting's tau; the student's weights get no gradient."""
    tied = tied_queries(student.config, means) if config.tie_queries else None
    seeds = [setting.seed for setting in settings]
    masks = NodeMasks(means, seeds, init=config.init, init_noise=config.init_noise, tied=tied, prices=prices)
    together = config.together if config.together is not None else student.device.type != "cpu"
    at_once = len(settings) if together else 1
    for first in range(0, len(settings), at_once):
        some = slice(first, first + at_once)
        objective = MaskObjective(student, settings[some], masks, config, bank)
        learn_gates(
            masks.tau[some],
            objective,
            steps=config.steps,
            learning_rate=config.learning_rate,
            temperature=config.temperature,
        )
    return masks


class MaskObjective:
    """Task loss + size of every setting's circuit; folds nodes away that are closed for good."""

    def __init__(
        self,
        student: Student,
        settings: Sequence[Setting],
        masks: NodeMasks,
        config: PruneConfig,
        bank: Bank | None,
    ):
        self.student, self.settings, self.masks = student, settings, masks
        self.config, self.bank = config, bank
        self.size_coefs = torch.tensor([setting.size_coef for setting in settings], device=masks.tau.device)
        self.model, self.tap = student, GateTap(masks)
        self.num_live = len(masks.part_of_node)

    def __call__(self, step: int, gates: Tensor, may_open: Tensor) -> Float[Tensor, " setting"]:
        if self.config.compact and self.bank is None and step % COMPACT_EVERY == 0:
            self._fold(self.masks.of_nodes(may_open.any(0)))
        gates = self.masks.of_nodes(gates)
        batch, wanted = draw_all(self.settings, step, self.config.pairs_per_step)
        packed = pack(batch, self.student.config)
        drawn = self.bank.draw(*packed.shape, seed=step) if self.bank is not None else None
        # Folded matrices are too small to gain from bf16.
        with autocast(self.student.device) if self.model is self.student else nullcontext():
            (difference,) = packed.differences(self.model, self.tap(gates, drawn))
        task_loss = self._by_setting(difference, wanted)
        if self.config.restored.enabled:
            task_loss = (task_loss + self._restored(step, gates)) / 2
        return task_loss + self.size_coefs * (gates * self.masks.prices).sum(1)

    def _restored(self, step: int, gates: Tensor) -> Float[Tensor, " setting"]:
        """Task loss of the circuits while random closed nodes work, on some of the step's pairs."""
        count = min(self.config.restored.pairs_per_step, self.config.pairs_per_step)
        batch, wanted = draw_all(self.settings, step, count)
        packed = pack(batch, self.student.config)
        drawn = self.bank.draw(*packed.shape, seed=step) if self.bank is not None else None
        tap = GateTap(self.masks)(restore_at_random(gates, count, seed=step), drawn)
        with autocast(self.student.device):
            (difference,) = packed.differences(self.student, tap)
        return self._by_setting(difference, wanted)

    def _by_setting(self, difference: Tensor, wanted: Tensor) -> Float[Tensor, " setting"]:
        loss = F.binary_cross_entropy_with_logits(difference, wanted, reduction="none")
        return loss.unflatten(0, (2, len(self.settings), -1)).mean((0, 2))

    def _fold(self, live: Bool[Tensor, " node"]) -> None:
        if int(live.sum()) < COMPACT_BELOW * self.num_live:
            self.model = CompactStudent(self.student, self.masks.live(live), self.masks.means)
            self.tap, self.num_live = GateTap(self.masks, live), int(live.sum())


def draw_all(
    settings: Sequence[Setting], step: int, count: int
) -> tuple[TaskBatch, Float[Tensor, " example"]]:
    """The settings' pairs of a step, one setting after the other, and what is wanted of them."""
    batches, wanted = zip(*(setting.draw(step, count) for setting in settings), strict=True)
    batch = reduce(TaskBatch.join, batches)
    return batch, torch.stack(wanted).unflatten(1, (2, -1)).transpose(0, 1).flatten()
