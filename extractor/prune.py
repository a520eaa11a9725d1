"""Extract a task's circuit: learn a mask, rank its nodes, keep the fewest that reach the target loss.

1. AdamW on tau, for all settings (seeds, coefficients, tasks) over the same frozen weights: task loss +
   size_coef * nodes kept, on training pairs. The task loss is the two-way cross-entropy towards the whole
   student's own answer (`target: student`) or the label (`answer`). A mask can solve a task its student
   cannot, so the student's own behaviour is the default target. Nodes that cannot open again in the steps
   left are folded away: the model shrinks as the circuit does.
2. Rank nodes by tau; search the smallest k whose calibrated loss reaches `target_loss` on selection prompts,
   whose templates and contents the mask was not learned on, and as many training prompts. Held-out prompts
   are never looked at here.
3. Drop what can be spared, and learn the edges between the nodes left (`extractor.refine`).

(Gao et al. 2025, section 2.2 and appendix A.5.)
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from extractor.circuit import Calibration, Circuit, edges_between
from extractor.compact import CompactStudent
from extractor.config import Config
from extractor.gates import learn_gates
from extractor.machine import autocast
from extractor.masks import Bank, GateTap, Means, NodeMasks, tied_queries
from extractor.packed import pack
from extractor.refine import RefineConfig, drop_spare_nodes, find_edges, in_use, needed_without_edges
from extractor.restored import RestoredConfig, RestoredEdges, RestoredSets, restore_at_random
from extractor.sites import Node
from extractor.smallest import Sizes, calibrate_all, smallest_circuit, student_loss
from extractor.student import Student
from extractor.tasks import TaskBatch

COMPACT_EVERY = 5  # steps; folding takes about as long as half a step
MOST_RANKED = 16  # masks whose sensitivity to restored nodes is measured
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
    """Learn all masks in one batch; by default on an accelerator. A CPU gains nothing from it, and each mask
    alone folds away more."""


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


@dataclass(frozen=True)
class Found:
    """The nodes that one setting's mask came to."""

    tau: Float[Tensor, " part"]
    kept: Bool[Tensor, " part"]
    calibration: Calibration
    goal: float | None  # the loss that they reach where sizes are chosen; None: the student does not either


@dataclass(frozen=True)
class Search:
    """All masks of a task."""

    masks: NodeMasks
    settings: Sequence[Setting]
    found: Sequence[Found]
    was_learned: bool = True  # False: the student itself is above the target, so there was nothing to learn

    @property
    def best(self) -> int:
        """The setting with the fewest nodes, of those that reached the smaller goal."""
        return self.ranked[0]

    @property
    def ranked(self) -> list[int]:
        """All settings, best first."""
        return sorted(range(len(self.found)), key=self.merit)

    def best_of(self, seed: int) -> int:
        """The same among the settings of one seed."""
        own = (index for index, setting in enumerate(self.settings) if setting.seed == seed)
        return min(own, key=self.merit)

    def nodes(self, index: int) -> frozenset[Node]:
        """The nodes that one setting came to."""
        return self.masks.nodes(self.masks.of_nodes(self.found[index].kept))

    def merit(self, index: int) -> tuple[float, int]:
        """What ranks settings, the least first: the goal that was reached, and the number of nodes."""
        goal = self.found[index].goal
        return math.inf if goal is None else goal, len(self.nodes(index))


def extract_circuit(
    student: Student,
    task: str,
    train: TaskBatch,
    selection: TaskBatch,
    means: Means,
    config: PruneConfig,
    student_sha256: str,
    *,
    bank: Bank | None = None,
) -> Circuit:
    """The smallest circuit found over the seeds; an empty one, where no mask reaches the target.

    Args:
        means: what closed nodes carry (zeros for zero ablation).
        bank: for resample ablation, what they carry instead while masks are learned.
    """
    search = search_masks(student, task_settings(student, train, selection, config), means, config, bank)
    return finish_circuit(student, task, search, config, student_sha256, bank=bank)


def task_settings(
    student: Student, train: TaskBatch, selection: TaskBatch, config: PruneConfig
) -> list[Setting]:
    """One setting per seed and coefficient.

    Sizes are chosen on the selection prompts and as many training ones: on few templates alone, a circuit
    can do without what the next template needs.
    """
    count = min(len(selection), len(train)) // 2
    selection = selection.join(train.select(torch.arange(count, device=train.ids.device)))
    wanted = wanted_probability(student, train, config.target)
    budget = product(config.seeds, config.size_coefs)
    return [Setting(train, wanted, selection, seed, size_coef) for seed, size_coef in budget]


def search_masks(
    student: Student, settings: Sequence[Setting], means: Means, config: PruneConfig, bank: Bank | None = None
) -> Search:
    """Learn every setting's mask, and cut each to its smallest circuit.

    A student that is itself above the target loss has no circuit of the task: nothing is learned then.
    """
    student.requires_grad_(False)
    if config.target == "student" and student_loss(student, settings[0].selection) > config.target_loss:
        masks = NodeMasks(means, [setting.seed for setting in settings], init=-1.0, init_noise=0.0)
        found = [Found(tau, tau > 0, Calibration(), None) for tau in masks.tau]
        return Search(masks, settings, found, was_learned=False)
    masks = learn_masks(student, settings, means, config, bank)
    goal = config.target_loss * config.selection_frac
    found = []
    for tau, setting in zip(masks.tau, settings, strict=True):
        reached = smallest_circuit(student, masks, tau, setting.selection, goal, config.target_loss, bank)
        found.append(Found(tau, *reached))
    return Search(masks, settings, found)


def finish_circuit(
    student: Student,
    task: str,
    search: Search,
    config: PruneConfig,
    student_sha256: str,
    *,
    bank: Bank | None = None,
) -> Circuit:
    """The best mask's circuit: without what it can spare, and with its edges learned.

    Several masks may be refined (`refine.candidates`); the circuit with the fewest edges is kept. With
    `restored`, masks and circuits that mind restored nodes least above its limit come first.
    """
    count = config.refine.candidates if config.refine.enabled else 1
    order = sorted(search.ranked[:MOST_RANKED], key=partial(_merit, student, search, config))
    circuits = [
        _finish(student, task, search, index, config, student_sha256, bank) for index in order[:count]
    ]
    return min(circuits, key=partial(_size, config))


def _merit(student: Student, search: Search, config: PruneConfig, index: int) -> tuple[float, float, int]:
    goal, size = search.merit(index)
    if goal == math.inf or not (config.restored.enabled and config.refine.enabled):
        return goal, 0.0, size
    sets = RestoredSets(student, search.masks, search.settings[index].selection, config.restored)
    loss = sets.loss(search.masks.of_nodes(search.found[index].kept))
    return goal, max(0.0, loss - config.restored.max_loss), size


def _size(config: PruneConfig, circuit: Circuit) -> tuple[float, float, int, int]:
    goal, loss = (circuit.settings[name] for name in ("reached_loss", "restored_loss"))
    excess = 0.0 if loss is None else max(0.0, loss - config.restored.max_loss)
    return math.inf if goal is None else goal, excess, len(circuit.edges), len(circuit.nodes)


def _finish(
    student: Student,
    task: str,
    search: Search,
    index: int,
    config: PruneConfig,
    student_sha256: str,
    bank: Bank | None,
) -> Circuit:
    masks, setting, found = search.masks, search.settings[index], search.found[index]
    kept, calibration = masks.of_nodes(found.kept), found.calibration
    is_refined = config.refine.enabled and found.goal is not None
    if is_refined:
        # More open nodes than the search kept: which of them can go is better seen than ranked.
        restored = None
        if config.restored.enabled:
            restored = RestoredSets(student, masks, setting.selection, config.restored)
        may_go = found.kept | (found.tau > 0)
        kept = drop_spare_nodes(
            student, masks, may_go, found.goal, setting.selection, config.refine, bank, restored
        )
    if found.goal is None:
        kept = torch.zeros_like(kept)  # no circuit; all of the student is not one
        with torch.no_grad():
            nothing = Sizes(student, masks, kept, bank).differences(kept.float()[None], setting.selection)
        (calibration,) = calibrate_all(nothing)
    nodes = masks.nodes(kept)
    edges, restored_loss = edges_between(student, nodes), None
    if is_refined:
        model = CompactStudent(student, masks.live(kept), masks.means)
        pairs, calibration = find_edges(
            model,
            masks.means,
            setting.draw,
            setting.selection,
            found.goal,
            config.refine,
            config.pairs_per_step,
            (restored, kept) if restored else None,
        )
        if restored is not None:
            restored_loss = RestoredEdges(restored, kept, pairs).loss
        needed = needed_without_edges(student, nodes, pairs, masks.means, setting.selection, found.goal)
        nodes, pairs = in_use(nodes, pairs, needed)
        wanted_pairs = set(pairs)
        edges = tuple(edge for edge in edges if (edge.source, edge.target) in wanted_pairs)
    settings = config.model_dump(mode="json") | {
        "reached_loss": found.goal,
        "restored_loss": restored_loss,  # on selection prompts
        "refined": is_refined,
        "seed": setting.seed,
        "size_coef": setting.size_coef,
    }
    return Circuit(
        task, nodes, edges, student_sha256=student_sha256, settings=settings, calibration=calibration
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
    student: Student, settings: Sequence[Setting], means: Means, config: PruneConfig, bank: Bank | None = None
) -> NodeMasks:
    """Optimise every setting's tau; the student's weights get no gradient."""
    tied = tied_queries(student.config, means) if config.tie_queries else None
    seeds = [setting.seed for setting in settings]
    masks = NodeMasks(means, seeds, init=config.init, init_noise=config.init_noise, tied=tied)
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
        return task_loss + self.size_coefs * gates.sum(1)

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
