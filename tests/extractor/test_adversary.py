"""The adversary: identities, and a harmful complement that only a search finds."""

import pytest
import torch

from extractor.adversary import AdversaryConfig, attack, node_index
from extractor.circuit import Circuit, edges_between
from extractor.masks import mean_activations
from extractor.sites import Node
from extractor.student import Student
from extractor.tasks import two_way_loss
from tests.extractor.test_circuits import PLANTED, planted_student, planted_task

PLANTED_NODES = frozenset(map(Node.parse, PLANTED))
QUICK = AdversaryConfig(restored=(1, 3, 0), steps=6, pairs=8, random_pairs=8)


def circuit_of(student: Student, nodes: frozenset[Node]) -> Circuit:
    return Circuit("planted", nodes, edges_between(student, nodes), "sha", {})


def treacherous_student() -> Student:
    """The planted student, with two more neurons that read the circuit's channel 1.

    Neuron 1 undoes what the circuit writes, neuron 2 undoes neuron 1: together they change nothing, and the
    student is right. The mean of both is frozen where the circuit runs alone, and it is right, too.
    """
    student = planted_student()
    mlp = student.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight[1:3] = mlp.up_proj.weight[0]
        mlp.up_proj.bias[1:3] = mlp.up_proj.bias[0]
        mlp.down_proj.weight[:, 1:3] = 0
        mlp.down_proj.weight[2, 1], mlp.down_proj.weight[2, 2] = -12, 12
    return student


def attacked(student: Student, nodes: frozenset[Node], config: AdversaryConfig = QUICK) -> dict:
    means = mean_activations(student, planted_task(64, 0).ids)
    selection, held_out = planted_task(32, 1), planted_task(32, 2)
    return attack(student, circuit_of(student, nodes), selection, held_out, means, config)


def test_a_harmful_node_outside_the_circuit_is_found() -> None:
    found = attacked(treacherous_student(), PLANTED_NODES)
    one = found["curve"][0]
    assert one["most"] == one["restored"] == 1
    assert one["loss"] > 0.5
    assert one["accuracy_by_own_calibration"] <= 0.5
    assert one["random_sets"]["loss_mean"] < 0.2  # which no random set shows
    assert found["nothing_restored"]["loss_by_own_calibration"] < 0.15
    assert found["everything_restored"]["accuracy"] == 1  # nor the whole student
    assert found["everything_restored"]["max_difference_from_student"] <= 1e-5


def test_no_node_harms_a_circuit_that_nothing_else_touches() -> None:
    found = attacked(planted_student(), PLANTED_NODES)
    for point in found["curve"]:
        assert point["loss"] == pytest.approx(found["nothing_restored"]["loss"], abs=0.02)


def test_the_harmful_node_cannot_be_restored_once_the_circuit_holds_it_and_its_antidote() -> None:
    both = PLANTED_NODES | {Node("0.mlp.post_act", 1), Node("0.mlp.post_act", 2)}
    found = attacked(treacherous_student(), both)
    assert found["curve"][0]["loss"] < 0.15


def test_restoring_nothing_to_the_whole_student_is_the_student_exactly() -> None:
    student = planted_student()
    means = mean_activations(student, planted_task(64, 0).ids)
    everything = frozenset(Node(address, c) for address, mean in means.items() for c in range(len(mean)))
    found = attacked(student, everything)
    held_out = planted_task(32, 2)
    loss = two_way_loss(held_out.logit_difference(student(held_out.ids).logits)).item()
    assert found["outside"] == 0
    for point in found["curve"]:
        assert point["restored"] == 0
        assert point["loss"] <= loss + 1e-6
        assert point["loss_by_own_calibration"] == pytest.approx(loss, abs=1e-6)
    assert found["everything_restored"]["loss"] == pytest.approx(loss, abs=1e-6)


def test_more_nodes_are_never_less_harmful_where_they_are_searched() -> None:
    curve = attacked(treacherous_student(), PLANTED_NODES)["curve"]
    losses = [point["search_loss"] for point in curve]
    assert losses == sorted(losses)
    assert all(point["restored"] <= most for point, most in zip(curve, (1, 3, 10**6), strict=True))


def test_the_attack_is_the_same_each_time() -> None:
    first, second = (attacked(treacherous_student(), PLANTED_NODES)["curve"] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a["restored"] == b["restored"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_nodes_are_indexed_in_the_order_of_the_means(student, tokens) -> None:
    means = mean_activations(student, tokens)
    marked = node_index([Node("0.attn.q", 3), Node("1.mlp.resid_delta", 31)], means)
    assert marked.nonzero()[:, 0].tolist() == [32 + 3, len(marked) - 1]
