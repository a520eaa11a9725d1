"""Controls: what the same search finds where there is nothing to find.

- nonsense tasks: the task's prompts with answers exchanged at random, per prompt and per class (template);
- a student with shuffled weights: as sparse, with the same values, and no computation in it;
- other tasks: what the circuit does, and what its removal breaks, where it should not matter;
- seeds: which nodes recur when the search starts elsewhere.

Nonsense and shuffled searches have the budget of one seed of the task's own search, are trained towards the
labels (there is no student's answer to follow), and are judged as the task is: on held-out prompts.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from extractor.adversary import spread
from extractor.circuit import Circuit, keep_nodes
from extractor.config import Config
from extractor.errors import UsageError
from extractor.masks import Bank, Means, mean_activations
from extractor.packed import Chunks
from extractor.prices import node_prices
from extractor.prune import PruneConfig, Search, search_masks, task_settings
from extractor.random_circuits import remove_nodes
from extractor.sites import Node, Tap, no_tap
from extractor.smallest import calibrate
from extractor.student import Student
from extractor.task_controls import Nonsense, make_nonsense
from extractor.task_text import Pair
from extractor.tasks import TaskBatch, accuracy, encode_pairs, two_way_loss

KINDS: tuple[Nonsense, ...] = ("prompt", "class")
OTHER_PAIRS = 32  # of every other task, over all its templates
SHARED_BY_MOST, SHARED_BY_FEW = 0.9, 0.1  # of the seeds: a node is core, or noise


class ControlsConfig(Config):
    """Which controls are run; a verdict counts one that was not run as not passed."""

    nonsense: int = Field(2, ge=0)
    """Nonsense tasks made of each task's prompts, of both kinds in turn."""
    shuffled: bool = True
    """The same search on the student with shuffled weights."""
    other_tasks: bool = True
    """The circuit on the other tasks of the run."""


@torch.no_grad()
def shuffle_weights(student: Student, seed: int) -> Student:
    """The student with every matrix's entries in random places: as sparse, and the same values."""
    shuffled = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(seed)
    for weight in shuffled.sparse_matrices().values():
        places = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.copy_(weight.flatten()[places].view_as(weight))
    return shuffled


def nonsense_controls(
    student: Student,
    pairs: Mapping[str, Sequence[Pair]],
    tokenizer,
    means: Means,
    config: PruneConfig,
    count: int,
    *,
    seed: int = 0,
    bank: Bank | None = None,
    prices: Tensor | None = None,
) -> list[dict[str, object]]:
    """What the search finds on nonsense tasks made of a task's prompts (train, selection, held_out)."""
    found = []
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        own_seed = seed + index // len(KINDS)
        try:
            nonsense = {split: make_nonsense(own, kind, own_seed) for split, own in pairs.items()}
        except UsageError as error:
            found.append({"kind": kind, "seed": own_seed, "undefined": str(error)})
            continue
        prompts = {split: encode_pairs(own, tokenizer).to(student.device) for split, own in nonsense.items()}
        outcome = search_outcome(student, prompts, means, config, own_seed, bank, prices)
        found.append({"kind": kind, "seed": own_seed, **outcome})
    return found


def shuffled_control(
    student: Student, prompts: Mapping[str, TaskBatch], text: Tensor, config: PruneConfig, seed: int = 0
) -> dict[str, object]:
    """What the search finds in the student with shuffled weights (always under mean or zero ablation)."""
    shuffled = shuffle_weights(student, seed).requires_grad_(False)
    means = mean_activations(shuffled, text)
    if config.ablation == "zero":
        means = {address: torch.zeros_like(mean) for address, mean in means.items()}
    held_out = prompts["held_out"]
    own = {"student_accuracy": accuracy(differences(shuffled, held_out, no_tap))}
    prices = node_prices(shuffled, text, means, config.general_price)
    return own | search_outcome(shuffled, prompts, means, config, seed, None, prices)


def search_outcome(
    student: Student,
    prompts: Mapping[str, TaskBatch],
    means: Means,
    config: PruneConfig,
    seed: int,
    bank: Bank | None,
    prices: Tensor | None = None,
) -> dict[str, object]:
    """One seed's search towards the labels: how well what it finds does on its own prompts, and held out.

    Where no circuit reaches the target, what is measured is the mask itself: the nodes it left open.
    """
    config = config.model_copy(
        update={"target": "answer", "seeds": (seed,), "size_coefs": config.size_coefs[:1]}
    )
    settings = task_settings(student, prompts["train"], prompts["selection"], config)
    search = search_masks(student, settings, means, config, bank, prices)
    found = search.found[0]
    is_found = found.goal is not None
    kept = found.kept if is_found else found.tau > 0
    nodes = search.masks.nodes(search.masks.of_nodes(kept))
    tap = keep_nodes(nodes, means)
    calibration = calibrate(differences(student, prompts["selection"], tap))
    losses = {
        split: two_way_loss(calibration(differences(student, own, tap))).item()
        for split, own in prompts.items()
    }
    held_out = calibration(differences(student, prompts["held_out"], tap))
    return {
        "nodes": len(nodes),
        "reached_target": is_found,
        "train_loss": losses["train"],
        "selection_loss": losses["selection"],
        "loss": losses["held_out"],
        "accuracy": accuracy(held_out),
    }


@torch.no_grad()
def other_task_controls(
    student: Student, circuit: Circuit, others: Mapping[str, TaskBatch], means: Means
) -> dict[str, dict[str, float]]:
    """The circuit alone, and the student without it, on other tasks' held-out prompts.

    Alone it is calibrated anew on those very prompts, in its favour.
    """
    found = {}
    model = circuit.compact(student, means)
    for task, held_out in others.items():
        chunks = Chunks(spread(held_out, OTHER_PAIRS), student.config)
        (whole,), (alone,) = chunks.differences(student), chunks.differences(model)
        (without,) = chunks.differences(student, remove_nodes(circuit.nodes, means))
        found[task] = {
            "student_accuracy": accuracy(whole),
            "accuracy_alone": accuracy(calibrate(alone)(alone)),
            "accuracy_without": accuracy(without),
            "accuracy_without_calibrated": accuracy(calibrate(without)(without)),
            "num_prompts": len(whole),
        }
    return found


def seed_controls(search: Search, circuit: Circuit) -> dict[str, object]:
    """How far the circuit's nodes recur in the masks of the other seeds, before what they can spare goes."""
    seeds = sorted({setting.seed for setting in search.settings})
    sets = {seed: search.nodes(search.best_of(seed)) for seed in seeds}
    others = [nodes for seed, nodes in sets.items() if seed != circuit.settings["seed"]]
    shares = {node: sum(node in nodes for nodes in others) / max(1, len(others)) for node in circuit.nodes}
    outcome: dict[str, object] = {"count": len(seeds), "sizes": [len(nodes) for nodes in sets.values()]}
    if not others or not shares:
        reason = "one seed alone" if not others else "an empty circuit"
        return outcome | {"recurrence": {"undefined": reason}}
    return outcome | {
        "recurrence": sum(shares.values()) / len(shares),
        "core": _names(shares, lambda share: share >= SHARED_BY_MOST),
        "noise": _names(shares, lambda share: share <= SHARED_BY_FEW),
        "jaccard": _mean_jaccard(list(sets.values())),
    }


def _names(shares: Mapping[Node, float], is_wanted) -> list[str]:
    wanted = (node for node, share in shares.items() if is_wanted(share))
    return [str(node) for node in sorted(wanted, key=lambda node: node.sort_key)]


def _mean_jaccard(sets: Sequence[frozenset[Node]]) -> float:
    pairs = [(a, b) for index, a in enumerate(sets) for b in sets[:index]]
    return sum(len(a & b) / max(1, len(a | b)) for a, b in pairs) / len(pairs)


@torch.no_grad()
def differences(student: Student, prompts: TaskBatch, tap: Tap) -> Tensor:
    """Logit differences under a tap: clean prompts (shortest first), then corrupted ones."""
    return Chunks(prompts, student.config).differences(student, tap)[0]
