"""Controls: a search that finds nothing where there is nothing, and says what recurs where there is."""

import random

import pytest
import torch

from extractor.circuit import Circuit, edges_between
from extractor.controls import (
    other_task_controls,
    search_outcome,
    seed_controls,
    shuffle_weights,
    shuffled_control,
)
from extractor.evidence import gather_evidence
from extractor.masks import Bank, mean_activations
from extractor.prune import PruneConfig, extract_circuit, finish_circuit, search_masks, task_settings
from extractor.sites import Node
from extractor.tasks import TaskBatch
from extractor.verdict import Thresholds, judge
from tests.extractor.test_circuits import PLANTED, planted_student, planted_task
from tests.extractor.test_verdict import QUICK, good_controls

CONFIG = PruneConfig(steps=60, pairs_per_step=16)
SPLITS = {"train": 0, "selection": 1, "held_out": 2}


def exchanged(prompts: TaskBatch, seed: int) -> TaskBatch:
    """The same prompts, with the answers of half of the pairs exchanged."""
    half = len(prompts) // 2
    swapped = torch.zeros(half, dtype=torch.bool)
    swapped[random.Random(seed).sample(range(half), half // 2)] = True
    both = swapped.repeat(2)
    answer = torch.where(both, prompts.distractor, prompts.answer)
    distractor = torch.where(both, prompts.answer, prompts.distractor)
    return TaskBatch(prompts.ids, prompts.last, answer, distractor, prompts.cluster)


@pytest.fixture(scope="module")
def planted():
    student = planted_student().requires_grad_(False)
    prompts = {split: planted_task(64, seed) for split, seed in SPLITS.items()}
    return student, prompts, mean_activations(student, prompts["train"].ids)


def test_the_search_finds_the_planted_task(planted) -> None:
    student, prompts, means = planted
    outcome = search_outcome(student, prompts, means, PruneConfig(pairs_per_step=32), 0, None)
    assert outcome["reached_target"]
    assert outcome["nodes"] == len(PLANTED)
    assert outcome["loss"] < 0.15


def verdict_of(planted, prompts: dict[str, TaskBatch], config: PruneConfig) -> str:
    """Of a whole extraction towards the labels, with controls that all went well."""
    student, own, means = planted
    circuit = extract_circuit(student, "t", prompts["train"], prompts["selection"], means, config, "none")
    bank = Bank(student, own["train"].ids)
    evidence = gather_evidence(
        student, circuit, prompts["selection"], prompts["held_out"], means, bank, QUICK
    )
    # Of 12 channels a random circuit often hits one of the planted, and then breaks as much.
    return judge(evidence, good_controls(), Thresholds(random_circuits=10, max_p=0.4)).word


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_nonsense_tasks_are_never_supported(count: int, planted) -> None:
    """While the true task, extracted and judged the same way, is."""
    prompts = planted[1]
    config = PruneConfig(pairs_per_step=32, target="answer")
    assert verdict_of(planted, prompts, config) == "supported"
    short = config.model_copy(update={"steps": 30})
    for seed in range(count):
        nonsense = {split: exchanged(own, 3 * seed + SPLITS[split]) for split, own in prompts.items()}
        assert verdict_of(planted, nonsense, short) == "not supported"


def test_shuffled_weights_are_the_same_weights() -> None:
    student = planted_student()
    with torch.no_grad():
        student.layers[0].mlp.up_proj.weight[5] = 0
    shuffled = shuffle_weights(student, 0)
    for name, weight in student.sparse_matrices().items():
        other = shuffled.sparse_matrices()[name]
        assert torch.equal(weight.flatten().sort().values, other.flatten().sort().values)
        assert not torch.equal(weight, other)


def test_nothing_is_found_in_shuffled_weights(planted) -> None:
    student, prompts, _ = planted
    outcome = shuffled_control(student, prompts, prompts["train"].ids, CONFIG)
    assert not outcome["reached_target"]
    assert outcome["loss"] > 0.3


def test_nodes_recur_over_seeds(planted) -> None:
    student, prompts, means = planted
    config = PruneConfig(pairs_per_step=32, seeds=(0, 1, 2))
    search = search_masks(
        student, task_settings(student, prompts["train"], prompts["selection"], config), means, config
    )
    circuit = finish_circuit(student, "planted", search, config, "none")
    found = seed_controls(search, circuit)
    assert found["count"] == 3
    assert found["sizes"] == [len(search.nodes(search.best_of(seed))) for seed in (0, 1, 2)]
    others = [search.nodes(search.best_of(s)) for s in (0, 1, 2) if s != search.settings[search.best].seed]
    shares = [sum(node in nodes for nodes in others) / 2 for node in circuit.nodes]
    assert found["recurrence"] == pytest.approx(sum(shares) / len(shares))
    alone = search_masks(student, search.settings[:1], means, config.model_copy(update={"seeds": (0,)}))
    assert "undefined" in seed_controls(alone, circuit)["recurrence"]


def test_a_circuit_is_measured_on_other_tasks(planted) -> None:
    """On its own task the circuit is enough and needed; on one it has no part in, neither."""
    student, prompts, means = planted
    nodes = frozenset(map(Node.parse, PLANTED))
    circuit = Circuit("planted", nodes, edges_between(student, nodes), "none", {})
    own = prompts["held_out"]
    unrelated = exchanged(own, 0)
    found = other_task_controls(student, circuit, {"own": own, "unrelated": unrelated}, means)
    assert found["own"]["accuracy_alone"] == 1
    assert found["own"]["accuracy_without"] == 0.5
    assert found["unrelated"]["student_accuracy"] == pytest.approx(0.5, abs=0.15)
