"""Extract a task's circuit: learn a mask, rank its nodes, keep the fewest that reach the target loss.

1. Learn masks, one per seed and coefficient, on training pairs (`extractor.mask_learning`).
2. Rank nodes by tau; search the smallest k whose calibrated loss reaches `target_loss` on selection prompts,
   whose templates and contents the mask was not learned on, and as many training prompts. Held-out prompts
   are never looked at here.
3. Drop what can be spared, and learn the edges between the nodes left (`extractor.refine`).

(Gao et al. 2025, section 2.2 and appendix A.5.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from extractor.circuit import Calibration, Circuit, edges_between
from extractor.compact import CompactStudent
from extractor.machine import autocast
from extractor.mask_learning import PruneConfig, Setting, learn_masks
from extractor.masks import Bank, Means, NodeMasks
from extractor.refine import drop_spare_nodes, find_edges, in_use, needed_without_edges
from extractor.restored import RestoredEdges, RestoredSets
from extractor.sites import Node
from extractor.smallest import Sizes, calibrate_all, smallest_circuit, student_loss
from extractor.student import Student
from extractor.tasks import TaskBatch

MOST_RANKED = 16  # masks whose sensitivity to restored nodes is measured
FRESH_SETS = 8  # of every size, on which refined circuits are compared


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
    prices: Float[Tensor, " node"] | None = None,
) -> Circuit:
    """The smallest circuit found over the seeds; an empty one, where no mask reaches the target.

    Args:
        means: what closed nodes carry (zeros for zero ablation).
        bank: for resample ablation, what they carry instead while masks are learned.
        prices: what nodes cost (`extractor.prices`); one each, unless given.
    """
    settings = task_settings(student, train, selection, config)
    search = search_masks(student, settings, means, config, bank, prices)
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
    student: Student,
    settings: Sequence[Setting],
    means: Means,
    config: PruneConfig,
    bank: Bank | None = None,
    prices: Float[Tensor, " node"] | None = None,
) -> Search:
    """Learn every setting's mask, and cut each to its smallest circuit.

    A student that is itself above the target loss has no circuit of the task: nothing is learned then.
    """
    student.requires_grad_(False)
    if config.target == "student" and student_loss(student, settings[0].selection) > config.target_loss:
        masks = NodeMasks(means, [setting.seed for setting in settings], init=-1.0, init_noise=0.0)
        found = [Found(tau, tau > 0, Calibration(), None) for tau in masks.tau]
        return Search(masks, settings, found, was_learned=False)
    masks = learn_masks(student, settings, means, config, bank, prices)
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
            # Of sets that the search has not seen: it drops what these few happen not to need.
            fresh = config.restored.model_copy(update={"sets": FRESH_SETS})
            unseen = RestoredSets(student, masks, setting.selection, fresh, seed=1)
            restored_loss = RestoredEdges(unseen, kept, pairs).loss
        needed = needed_without_edges(student, nodes, pairs, masks.means, setting.selection, found.goal)
        nodes, pairs = in_use(nodes, pairs, needed)
        wanted_pairs = set(pairs)
        edges = tuple(edge for edge in edges if (edge.source, edge.target) in wanted_pairs)
    settings = config.model_dump(mode="json") | {
        "reached_loss": found.goal,
        "restored_loss": restored_loss,  # on selection prompts, fresh sets
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
