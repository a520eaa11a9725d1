"""Circuits that hold while random closed nodes work: identities, and a node that only such a search keeps."""

import pytest
import torch

from extractor.adversary import node_index
from extractor.circuit import Calibration
from extractor.masks import NodeMasks, mean_activations
from extractor.prune import (
    FRESH_SETS,
    Found,
    PruneConfig,
    Search,
    extract_circuit,
    finish_circuit,
    task_settings,
)
from extractor.refine import RefineConfig
from extractor.restored import RestoredConfig, RestoredEdges, RestoredSets, restore_at_random
from extractor.sites import Node
from extractor.student import Student
from tests.extractor.test_adversary import PLANTED_NODES, treacherous_student
from tests.extractor.test_circuits import planted_student, planted_task

NEURON, GUARD = Node.parse("0.mlp.post_act:0"), Node.parse("0.mlp.post_act:2")  # alike; 1 undoes one of them
CONFIG = PruneConfig(steps=80, pairs_per_step=16, refine=RefineConfig(enabled=True, steps=40))
RESTORED = RestoredConfig(enabled=True, pairs_per_step=16, sets=8, pairs=16)


def found_nodes(student: Student, restored: RestoredConfig) -> frozenset[Node]:
    means = mean_activations(student, planted_task(64, 0).ids)
    config = CONFIG.model_copy(update={"restored": restored})
    return extract_circuit(student, "t", planted_task(64, 0), planted_task(32, 1), means, config, "sha").nodes


def test_a_search_with_restored_nodes_keeps_what_guards_the_circuit() -> None:
    assert len(found_nodes(treacherous_student(), RestoredConfig()) & {NEURON, GUARD}) == 1
    assert found_nodes(treacherous_student(), RESTORED) == PLANTED_NODES | {GUARD}


def test_of_two_masks_the_one_that_minds_restored_nodes_less_is_refined_though_it_is_larger() -> None:
    student = treacherous_student().requires_grad_(False)
    train, selection = planted_task(64, 0), planted_task(32, 1)
    means = mean_activations(student, train.ids)
    masks = NodeMasks(means, [0, 1])
    for restored, expected in ((RestoredConfig(), False), (RESTORED, True)):
        config = CONFIG.model_copy(update={"restored": restored, "seeds": (0, 1)})
        settings = task_settings(student, train, selection, config)
        found = []
        for nodes in (PLANTED_NODES, PLANTED_NODES | {GUARD}):
            kept = node_index(nodes, means)
            found.append(Found(torch.where(kept, 1.0, -1.0), kept, Calibration(), 0.06))
        circuit = finish_circuit(student, "t", Search(masks, settings, found), config, "sha")
        assert (circuit.settings["seed"] == 1) == expected
        assert (GUARD in circuit.nodes) == expected
        assert (circuit.settings["restored_loss"] is not None) == expected


def test_what_restored_nodes_do_to_a_circuit_is_told_of_sets_that_the_search_has_not_seen() -> None:
    student = treacherous_student().requires_grad_(False)
    train, selection = planted_task(64, 0), planted_task(32, 1)
    means = mean_activations(student, train.ids)
    config = CONFIG.model_copy(update={"restored": RESTORED})
    (setting,) = settings = task_settings(student, train, selection, config)
    masks, kept = NodeMasks(means, [0]), node_index(PLANTED_NODES, means)
    search = Search(masks, settings, [Found(torch.where(kept, 1.0, -1.0), kept, Calibration(), 0.06)])
    circuit = finish_circuit(student, "t", search, config, "sha")
    seen = RestoredSets(student, masks, setting.selection, RESTORED)
    fresh = RESTORED.model_copy(update={"sets": FRESH_SETS})
    unseen = RestoredSets(student, masks, setting.selection, fresh, seed=1)
    assert not any(torch.equal(a, b) for a in seen.sets for b in unseen.sets)
    pairs = [(edge.source, edge.target) for edge in circuit.edges]
    found = RestoredEdges(unseen, node_index(circuit.nodes, means), pairs).loss
    assert circuit.settings["restored_loss"] == pytest.approx(found)
    assert found != pytest.approx(RestoredEdges(seen, node_index(circuit.nodes, means), pairs).loss)


def test_where_nothing_touches_the_circuit_the_same_is_found() -> None:
    assert found_nodes(planted_student(), RESTORED) == PLANTED_NODES


def test_open_gates_stay_open_and_any_share_is_restored() -> None:
    gates = torch.zeros(2, 1000)
    gates[0, ::2] = 1
    restored = restore_at_random(gates, 50, seed=0).unflatten(0, (2, 50))
    assert (restored[0, :, ::2] == 1).all()
    shares = restored[1].mean(1)
    assert shares.min() < 0.1
    assert shares.max() > 0.9
    torch.testing.assert_close(restore_at_random(gates, 50, seed=0).unflatten(0, (2, 50)), restored)


def test_the_whole_student_minds_no_restored_node() -> None:
    student = treacherous_student()
    means = mean_activations(student, planted_task(64, 0).ids)
    masks = NodeMasks(means, [0])
    sets = RestoredSets(student, masks, planted_task(32, 1), RESTORED)
    everything = torch.ones_like(masks.part_of_node, dtype=torch.bool)
    assert sets.loss(everything) < 0.01
    assert not sets.gradient(everything)[sets.sets.all(0)].any()


def test_opening_the_node_of_the_steepest_slope_helps_a_circuit_that_restored_nodes_harm() -> None:
    student = treacherous_student()
    means = mean_activations(student, planted_task(64, 0).ids)
    masks = NodeMasks(means, [0])
    sets = RestoredSets(student, masks, planted_task(32, 1), RESTORED)
    kept = node_index(PLANTED_NODES, means)
    harmed = sets.loss(kept)
    assert sets.limit(kept) == harmed > RESTORED.max_loss
    steepest = int(sets.gradient(kept).argmin())
    assert node_index([GUARD], means)[steepest]
    kept[steepest] = True
    assert sets.loss(kept) < 0.01
    assert sets.limit(kept) == RESTORED.max_loss
