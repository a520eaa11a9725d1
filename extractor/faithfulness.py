"""Does a circuit hold? Sufficiency, necessity and random controls, on held-out prompts.

With m the mean logit difference (answer minus distractor):

    sufficiency = (m_circuit    - m_floor) / (m_student - m_floor)    all but the circuit frozen
    necessity   = (m_student - m_complement) / (m_student - m_floor)   only the circuit frozen

m_floor is the student with every node frozen at its mean. Each ratio stands beside its plain accuracies.
Random circuits have the same number of nodes at every address.
"""

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from extractor.circuit import Circuit, count_edges, keep_nodes
from extractor.masks import Means
from extractor.sites import Node, Tap, no_tap
from extractor.smallest import calibrate
from extractor.student import Student
from extractor.tasks import TaskBatch, accuracy, two_way_loss

NO_GAP = {"undefined": "the task has no gap: student and floor are equally good"}


@torch.no_grad()
def evaluate_circuit(
    student: Student,
    circuit: Circuit,
    held_out: TaskBatch,
    means: Means,
    *,
    num_random: int,
    seed: int,
) -> dict[str, object]:
    """Every number the report states about a circuit; losses in nats per two-way choice."""

    def difference(tap: Tap) -> Tensor:
        logits = student(held_out.ids, tap=tap, logits_to_keep=held_out.last[:, None]).logits
        return held_out.logit_difference(logits)

    compact = circuit.compact(student, means)
    whole = difference(no_tap)
    alone = held_out.logit_difference(compact(held_out.ids, logits_to_keep=held_out.last[:, None]).logits)
    without = difference(circuit.tap(means, complement=True))
    floor = difference(keep_nodes((), means))
    gap = (whole.mean() - floor.mean()).item()
    defined = abs(gap) > 1e-3
    return {
        "nodes": len(circuit.nodes),
        "edges": len(circuit.edges),
        "nodes_total": sum(len(mean) for mean in means.values()),
        "edges_total": count_edges(student),
        "loss": two_way_loss(circuit.calibration(alone)).item(),
        "loss_uncalibrated": two_way_loss(alone).item(),
        "accuracy": accuracy(circuit.calibration(alone)),
        "accuracy_interval": bootstrap_interval((circuit.calibration(alone) > 0).float(), seed),
        "agreement": ((circuit.calibration(alone) > 0) == (whole > 0)).float().mean().item(),
        "sufficiency": ((alone.mean() - floor.mean()) / gap).item() if defined else NO_GAP,
        "necessity": ((whole.mean() - without.mean()) / gap).item() if defined else NO_GAP,
        "accuracy_without": accuracy(without),
        # A shifted preference can hide what is left, so also with its own best scale and shift.
        "accuracy_without_calibrated": accuracy(calibrate(without)(without)),
        "loss_without": two_way_loss(without).item(),
        "student_accuracy": accuracy(whole),
        "student_loss": two_way_loss(whole).item(),
        "floor_accuracy": accuracy(floor),
        "num_prompts": len(held_out),
        "random_circuits": _random_controls(difference, circuit, means, num_random, seed),
    }


def _random_controls(
    difference: Callable[[Tap], Tensor], circuit: Circuit, means: Means, num_random: int, seed: int
) -> dict[str, object]:
    """The same measurements on random circuits of the same size at every address.

    They are calibrated as the circuit is, even on the held-out prompts themselves, in their favour.
    """
    if num_random == 0:
        return {"count": 0}
    rng = random.Random(seed)
    alone, without = [], []
    for _ in range(num_random):
        nodes = random_nodes(circuit.nodes, means, rng)
        kept = difference(keep_nodes(nodes, means))
        alone.append(calibrate(kept)(kept))
        without.append(difference(keep_nodes(nodes, means, complement=True)))
    accuracies = [accuracy(kept) for kept in alone]
    return {
        "count": num_random,
        "accuracy_mean": sum(accuracies) / num_random,
        "accuracy_max": max(accuracies),
        "loss_min": min(two_way_loss(kept).item() for kept in alone),
        "accuracy_without_mean": sum(map(accuracy, without)) / num_random,
    }


def random_nodes(like: frozenset[Node], means: Means, rng: random.Random) -> list[Node]:
    """As many random nodes at every address as `like` has there."""
    counts = Counter(node.address for node in like)
    return [
        Node(address, channel)
        for address, count in sorted(counts.items())
        for channel in rng.sample(range(len(means[address])), count)
    ]


def bootstrap_interval(
    values: Float[Tensor, " example"], seed: int, num_resamples: int = 2000
) -> list[float]:
    """95 % percentile bootstrap interval of a mean; examples i and i + n are resampled as a pair."""
    pairs = values.reshape(2, -1).mean(0).cpu().numpy()
    rng = np.random.default_rng(seed)
    means = pairs[rng.integers(len(pairs), size=(num_resamples, len(pairs)))].mean(1)
    return [float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))]
