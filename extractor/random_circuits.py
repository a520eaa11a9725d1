"""Controls: circuits of random nodes, as many at every address as the circuit has there."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from extractor.circuit import Circuit
from extractor.compact import CompactStudent
from extractor.masks import Means, live_channels
from extractor.packed import Chunks
from extractor.sites import Node, Tap
from extractor.smallest import calibrate
from extractor.statistics import percentile, permutation_p, undefined
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
    removed: int,
    seed: int,
) -> dict[str, Any]:
    """Sufficiency (loss alone, nats) and necessity (fall of the mean logit difference when removed) of
    random circuits and, on the same prompts, of the circuit.

    Only the first `removed` of the `count` circuits are measured for necessity: alone a circuit is a small
    model, without it the whole student runs. Random circuits keep all weights between their nodes. They are
    calibrated on the very prompts they are measured on, or as the circuit is, whichever favours them; the
    circuit keeps its own calibration.
    """
    removed = min(count, removed)
    facts: dict[str, Any] = {"count": count, "count_removed": removed, "num_prompts": len(packed.prompts)}
    if count == 0:
        return facts
    whole = packed.differences(student)[0].mean().item()
    alone = circuit.calibration(packed.differences(circuit.compact(student, means))[0])
    loss = two_way_loss(alone).item()
    drop = whole - packed.differences(student, remove_nodes(circuit.nodes, means))[0].mean().item()
    rng = random.Random(seed)
    drawn = [random_nodes(circuit.nodes, means, rng) for _ in range(count)]
    # a circuit of all nodes has one random circuit alone
    kept = {nodes: _measure_alone(student, circuit, nodes, packed, means) for nodes in set(drawn)}
    losses, accuracies = zip(*(kept[nodes] for nodes in drawn), strict=True)
    left = {nodes: _measure_without(student, nodes, packed, means) for nodes in set(drawn[:removed])}
    drops = [whole - left[nodes].difference for nodes in drawn[:removed]]
    accuracies_without = [left[nodes].accuracy for nodes in drawn[:removed]]
    return facts | {
        "loss": loss,
        "loss_mean": sum(losses) / count,
        "loss_min": min(losses),
        "accuracy_mean": sum(accuracies) / count,
        "accuracy_max": max(accuracies),
        "sufficiency_percentile": percentile(loss, losses, "less"),
        "sufficiency_p": permutation_p(loss, losses, "less"),
        "drop": drop,
        "necessity_percentile": percentile(drop, drops, "greater"),
        "necessity_p": permutation_p(drop, drops, "greater"),
        **_summary("drop", drops, "max"),
        **_summary("accuracy_without", accuracies_without, "min"),
    }


def _summary(name: str, values: Sequence[float], end: Literal["min", "max"]) -> dict[str, Any]:
    """Mean and one end; undefined where nothing was measured."""
    if not values:
        return {f"{name}_{key}": undefined("no random circuits were removed") for key in ("mean", end)}
    extreme = max(values) if end == "max" else min(values)
    return {f"{name}_mean": sum(values) / len(values), f"{name}_{end}": extreme}


class Alone(NamedTuple):
    """A random circuit alone."""

    loss: float
    accuracy: float


class Without(NamedTuple):
    """The student without a random circuit: mean logit difference, accuracy."""

    difference: float
    accuracy: float


def _measure_alone(
    student: Student, circuit: Circuit, nodes: frozenset[Node], packed: Chunks, means: Means
) -> Alone:
    kept = packed.differences(CompactStudent(student, live_channels(nodes), means))[0]
    choices = [calibration(kept) for calibration in (calibrate(kept), circuit.calibration)]
    return Alone(min(two_way_loss(choice).item() for choice in choices), max(map(accuracy, choices)))


def _measure_without(student: Student, nodes: frozenset[Node], packed: Chunks, means: Means) -> Without:
    without = packed.differences(student, remove_nodes(nodes, means))[0]
    return Without(without.mean().item(), accuracy(without))
