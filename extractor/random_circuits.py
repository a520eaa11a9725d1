"""Controls: circuits of random nodes, as many at every address as the circuit has there."""

import random
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from extractor.circuit import Circuit
from extractor.compact import CompactStudent
from extractor.masks import Means, live_channels
from extractor.packed import Chunks
from extractor.sites import Node, Tap
from extractor.smallest import calibrate
from extractor.statistics import percentile, permutation_p
from extractor.student import Student
from extractor.tasks import accuracy, two_way_loss


def random_nodes(like: frozenset[Node], means: Means, rng: random.Random) -> frozenset[Node]:
    """As many random nodes at every address as `like` has there."""
    counts = Counter(node.address for node in like)
    return frozenset(
        Node(address, channel)
        for address, count in sorted(counts.items())
        for channel in rng.sample(range(len(means[address])), count)
    )


def remove_nodes(nodes: frozenset[Node], means: Means) -> Tap:
    """A tap that freezes these nodes at their means; touches no address that has none of them."""
    live = live_channels(nodes)
    frozen = {a: (channels.to(means[a].device), means[a][channels]) for a, channels in live.items()}

    def tap(address: str, activation: Tensor) -> Tensor:
        if address not in frozen:
            return activation
        channels, values = frozen[address]
        values = values.to(activation.dtype).expand(*activation.shape[:-1], -1)
        return activation.index_copy(-1, channels, values)

    return tap


@torch.no_grad()
def random_controls(
    student: Student,
    circuit: Circuit,
    packed: Chunks,
    means: Means,
    count: int,
    seed: int,
) -> dict[str, Any]:
    """Sufficiency (loss alone, nats) and necessity (fall of the mean logit difference when removed) of
    random circuits and, on the same prompts, of the circuit.

    Random circuits keep all weights between their nodes. They are calibrated on the very prompts they are
    measured on, or as the circuit is, whichever favours them; the circuit keeps its own calibration.
    """
    facts: dict[str, Any] = {"count": count, "num_prompts": len(packed.prompts)}
    if count == 0:
        return facts
    whole = packed.differences(student)[0].mean().item()
    alone = circuit.calibration(packed.differences(circuit.compact(student, means))[0])
    loss = two_way_loss(alone).item()
    drop = whole - packed.differences(student, remove_nodes(circuit.nodes, means))[0].mean().item()
    rng = random.Random(seed)
    measured: dict[frozenset[Node], Control] = {}  # a circuit of all nodes has one random circuit alone
    controls = []
    for _ in range(count):
        nodes = random_nodes(circuit.nodes, means, rng)
        if nodes not in measured:
            measured[nodes] = _measure(student, circuit, nodes, packed, means)
        controls.append(measured[nodes])
    losses, accuracies, withouts, accuracies_without = zip(*controls, strict=True)
    drops = [whole - without for without in withouts]
    return facts | {
        "loss": loss,
        "loss_mean": sum(losses) / count,
        "loss_min": min(losses),
        "accuracy_mean": sum(accuracies) / count,
        "accuracy_max": max(accuracies),
        "sufficiency_percentile": percentile(loss, losses, "less"),
        "sufficiency_p": permutation_p(loss, losses, "less"),
        "drop": drop,
        "drop_mean": sum(drops) / count,
        "drop_max": max(drops),
        "accuracy_without_mean": sum(accuracies_without) / count,
        "accuracy_without_min": min(accuracies_without),
        "necessity_percentile": percentile(drop, drops, "greater"),
        "necessity_p": permutation_p(drop, drops, "greater"),
    }


class Control(NamedTuple):
    """One random circuit: loss and accuracy alone; mean logit difference and accuracy without it."""

    loss: float
    accuracy: float
    without: float
    accuracy_without: float


def _measure(
    student: Student, circuit: Circuit, nodes: frozenset[Node], packed: Chunks, means: Means
) -> Control:
    kept = packed.differences(CompactStudent(student, live_channels(nodes), means))[0]
    choices = [calibration(kept) for calibration in (calibrate(kept), circuit.calibration)]
    without = packed.differences(student, remove_nodes(nodes, means))[0]
    return Control(
        min(two_way_loss(choice).item() for choice in choices),
        max(map(accuracy, choices)),
        without.mean().item(),
        accuracy(without),
    )
