"""Evidence: packed prompts are the plain ones, and the measures are what they say on known circuits."""

import dataclasses
import json
import random

import pytest
import torch

from extractor.adversary import AdversaryConfig, spread
from extractor.circuit import Calibration, Circuit, edges_between, keep_nodes
from extractor.closed_edges import close_edges
from extractor.evidence import Bench, EvidenceConfig, agreement, gather_evidence
from extractor.masks import Bank, mean_activations
from extractor.packed import Chunks, PackedPairs, PlainPairs
from extractor.random_circuits import random_nodes, remove_nodes
from extractor.sites import Node
from extractor.student import Student
from extractor.tasks import TaskBatch
from tests.conftest import tiny_student_config
from tests.extractor.test_circuits import PLANTED, planted_student, planted_task
from tests.extractor.test_compact import KINDS, student_of

QUICK = EvidenceConfig(
    random_circuits=10,
    random_pairs=8,
    adversary=AdversaryConfig(restored=(1, 0), steps=3, pairs=4, random_pairs=4),
)


# For tests that look at neither.
LEAST = EvidenceConfig(
    random_circuits=0,
    adversary=AdversaryConfig(restored=(1,), steps=1, pairs=1, random_pairs=1, random_sets=1),
)


def some_prompts(count: int = 6, seed: int = 0) -> TaskBatch:
    """Pairs of unlike length: a shared beginning, one change, sometimes a longer corrupted side."""
    rng = random.Random(seed)
    rows: list[list[list[int]]] = [[], []]
    for index in range(count):
        clean = [rng.randrange(1, 97) for _ in range(rng.randrange(4, 12))]
        place = rng.randrange(len(clean))
        rows[0].append(clean)
        rows[1].append([*clean[:place], *([5, 9] if index % 2 else [7]), *clean[place + 1 :]])
    both = rows[0] + rows[1]
    width = max(map(len, both))
    answer = torch.tensor([rng.randrange(97) for _ in range(count)])
    distractor = (answer + 1) % 97
    return TaskBatch(
        torch.tensor([row + [0] * (width - len(row)) for row in both]),
        torch.tensor([len(row) - 1 for row in both]),
        torch.cat([answer, distractor]),
        torch.cat([distractor, answer]),
        (torch.arange(count) % 3).repeat(2),
    )


def every_node(means) -> frozenset[Node]:
    return frozenset(Node(address, c) for address, mean in means.items() for c in range(len(mean)))


# --- prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_pairs_are_the_plain_prompts(kind: str) -> None:
    student, prompts = student_of(kind), some_prompts()
    means = mean_activations(student, prompts.ids)
    rng = random.Random(0)
    nodes = rng.sample(sorted(every_node(means), key=str), 60)
    for tap in (keep_nodes(nodes, means), keep_nodes(nodes, means, complement=True)):
        chunks = Chunks(prompts, student.config, rows=4)
        logits = student(chunks.prompts.ids, tap=tap, logits_to_keep=chunks.prompts.last[:, None]).logits
        plain = chunks.prompts.logit_difference(logits)
        torch.testing.assert_close(chunks.differences(student, tap)[0], plain, atol=1e-5, rtol=1e-4)
    is_plain = kind == "windows"
    assert all(isinstance(part, PlainPairs if is_plain else PackedPairs) for part in chunks.parts)


def test_a_packed_row_holds_the_shared_beginning_once() -> None:
    prompts = some_prompts()
    packed = PackedPairs(prompts)
    assert int((packed.part != 3).sum()) < int(prompts.last.sum()) + len(prompts)
    half = len(prompts) // 2
    for row in range(half):
        for side, example in enumerate((row, row + half)):
            own = (packed.part[row] == 0) | (packed.part[row] == side + 1)
            assert torch.equal(packed.ids[row][own], prompts.ids[example, : prompts.last[example] + 1])


def test_pairs_are_spread_over_templates() -> None:
    few = spread(some_prompts(12), 3)
    assert sorted(few.cluster[:3].tolist()) == [0, 1, 2]
    assert torch.equal(few.cluster[:3], few.cluster[3:])


@torch.no_grad()
def test_removing_nodes_is_the_complement(student, tokens) -> None:
    means = mean_activations(student, tokens)
    nodes = frozenset(random.Random(1).sample(sorted(every_node(means), key=str), 50))
    removed = student(tokens, tap=remove_nodes(nodes, means)).logits
    torch.testing.assert_close(removed, student(tokens, tap=keep_nodes(nodes, means, complement=True)).logits)


def test_random_circuits_match_the_size_at_every_address(student, tokens) -> None:
    means = mean_activations(student, tokens)
    nodes = frozenset({Node("0.attn.q", 1), Node("0.attn.q", 2), Node("1.mlp.post_act", 0)})
    drawn = random_nodes(nodes, means, random.Random(0))
    assert sorted(node.address for node in drawn) == ["0.attn.q", "0.attn.q", "1.mlp.post_act"]


# --- closed edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_closed_edges_on_the_student_are_those_of_the_compact_model(kind: str) -> None:
    student, prompts = student_of(kind), some_prompts()
    means = mean_activations(student, prompts.ids)
    rng = random.Random(2)
    nodes = frozenset(rng.sample(sorted(every_node(means), key=str), 150))
    edges = edges_between(student, nodes)
    pairs = sorted({(edge.source, edge.target) for edge in edges}, key=str)
    open_ = set(rng.sample(pairs, len(pairs) // 2))
    circuit = Circuit(
        "t", nodes, tuple(e for e in edges if (e.source, e.target) in open_), "sha", {}, Calibration()
    )
    run = close_edges(student, nodes, circuit.pairs, means)
    assert run is not student
    logits = run(prompts.ids, tap=circuit.tap(means)).logits
    compact = circuit.compact(student, means)(prompts.ids).logits
    torch.testing.assert_close(logits, compact, atol=1e-4, rtol=1e-4)
    assert close_edges(student, nodes, pairs, means) is student


# --- measures --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """The student with a planted circuit; means, bank, selection and held-out prompts, in 8 templates."""
    torch.manual_seed(0)
    student = planted_student()
    text = planted_task(64, 0).ids
    selection, held_out = (
        dataclasses.replace(planted_task(24, seed), cluster=(torch.arange(24) % 8).repeat(2))
        for seed in (1, 2)
    )
    return student, mean_activations(student, text), Bank(student, text), selection, held_out


def circuit_of(student: Student, nodes: frozenset[Node], **changes) -> Circuit:
    return Circuit("planted", nodes, edges_between(student, nodes), "sha", {}, **changes)


def measure(planted, nodes: frozenset[Node], config: EvidenceConfig = QUICK, **changes) -> dict:
    student, means, bank, selection, held_out = planted
    circuit = circuit_of(student, nodes, **changes)
    found = gather_evidence(student, circuit, selection, held_out, means, bank, config)
    return json.loads(json.dumps(found, allow_nan=False))


PLANTED_NODES = frozenset(map(Node.parse, PLANTED))


def test_the_planted_circuit_is_sufficient_necessary_and_no_accident(planted) -> None:
    found = measure(planted, PLANTED_NODES)
    for ablation in ("mean", "resample", "zero"):
        assert found["ablations"][ablation]["necessity"]["value"] == pytest.approx(1, abs=0.1), ablation
        assert found["ablations"][ablation]["accuracy_without_calibrated"] <= 0.75
    assert found["sufficiency"] == pytest.approx(1, abs=0.05)
    assert found["accuracy"] == found["student_accuracy"] == 1
    assert found["against_student"]["correlation"] > 0.99
    assert found["random_circuits"]["count"] == 10
    controls = found["random_circuits"]
    assert controls["sufficiency_p"] == 1 / 11
    assert controls["sufficiency_percentile"] == 100
    # Of 12 channels a random circuit often hits one of the planted, and then breaks as much.
    assert controls["necessity_p"] < 0.5
    assert controls["drop_mean"] < 0.6 * controls["drop"]
    assert [row["n"] for row in found["templates"]] == [6] * 8
    assert found["adversary"]["nothing_restored"]["loss_by_own_calibration"] == pytest.approx(found["loss"])


def test_all_nodes_are_the_student_and_no_evidence_against_random_circuits(planted) -> None:
    found = measure(planted, every_node(planted[1]))
    assert found["sufficiency"] == pytest.approx(1, abs=1e-5)
    assert found["necessity"] == pytest.approx(1, abs=1e-5)
    assert found["loss"] == pytest.approx(found["student_loss"], abs=1e-6)
    assert found["against_student"]["sign"]["value"] == 1
    assert found["against_student"]["mean_gap"] == pytest.approx(0, abs=1e-5)
    assert found["against_student"]["r2"] == pytest.approx(1, abs=1e-5)
    assert found["against_student"]["kl_two_way"]["value"] == pytest.approx(0, abs=1e-6)
    # Every random circuit of this size is the same one.
    assert found["random_circuits"]["sufficiency_p"] == found["random_circuits"]["necessity_p"] == 1


def test_an_empty_circuit_is_at_chance(planted) -> None:
    found = measure(planted, frozenset())
    assert found["accuracy"] == 0.5
    assert found["loss"] >= 0.69
    assert found["sufficiency"] == pytest.approx(0, abs=1e-6)
    assert found["necessity"] == pytest.approx(0, abs=1e-6)
    assert found["random_circuits"]["sufficiency_p"] == found["random_circuits"]["necessity_p"] == 1
    for ablation in ("mean", "resample", "zero"):
        assert found["ablations"][ablation]["sufficiency"]["value"] == pytest.approx(0, abs=1e-5)


def test_a_calibration_is_the_circuits_own(planted) -> None:
    plain = measure(planted, PLANTED_NODES, LEAST)
    scaled = measure(planted, PLANTED_NODES, LEAST, calibration=Calibration(0.1, 0.0))
    assert scaled["loss_uncalibrated"] == plain["loss"]
    assert scaled["loss"] > plain["loss"]
    assert scaled["sufficiency"] == plain["sufficiency"]  # of uncalibrated differences
    assert scaled["against_student"]["correlation"] == pytest.approx(plain["against_student"]["correlation"])


def test_a_student_without_the_task_has_no_shares(planted) -> None:
    student, means, bank, selection, held_out = planted
    blind = planted_student()
    with torch.no_grad():
        blind.lm_head.weight[3:5] = 0
        blind.lm_head.bias[3:5] = 0
    found = gather_evidence(blind, circuit_of(blind, PLANTED_NODES), selection, held_out, means, bank, LEAST)
    assert "undefined" in found["sufficiency"]
    assert "undefined" in found["necessity"]
    assert "undefined" in found["loss_recovered"]
    assert "undefined" in found["against_student"]["correlation"]
    assert found["student_accuracy"] == 0
    json.dumps(found, allow_nan=False)


def test_agreement_is_with_the_student_not_with_the_label(planted) -> None:
    """A student at chance, and a circuit that knows the answers."""
    prompts = planted[4]
    torch.manual_seed(0)
    whole, alone = 2 * torch.randn(len(prompts)), torch.full((len(prompts),), 4.0)
    found = agreement(circuit_of(planted[0], PLANTED_NODES), prompts, whole, alone, whole, seed=0)
    assert found["sign"]["value"] < 0.75
    assert found["correlation"] < 0.5
    assert found["loss_difference"]["high"] < -0.1  # surely better than the student it is cut from
    same = agreement(circuit_of(planted[0], PLANTED_NODES), prompts, whole, whole, whole, seed=0)
    assert same["sign"]["value"] == 1
    assert same["loss_difference"]["high"] == same["loss_difference"]["low"] == 0


@torch.no_grad()
def test_a_circuit_with_edges_is_measured_with_its_edges(planted) -> None:
    student, means, bank, _, held_out = planted
    circuit = circuit_of(student, PLANTED_NODES)
    needed = [edge for edge in circuit.edges if str(edge.source) != "0.mlp.post_act:0"]
    assert len(needed) < len(circuit.edges)
    cut = dataclasses.replace(circuit, edges=tuple(needed))
    for ablation in ("mean", "resample"):
        bench = Bench(student, cut, held_out, means, bank, seed=0)
        assert bench.alone(ablation).mean().abs() < 0.2 < bench.whole().mean(), ablation
        bench = Bench(student, circuit, held_out, means, bank, seed=0)
        assert bench.alone(ablation).mean() > 0.2, ablation


@torch.no_grad()
def test_resample_ablation_of_everything_forgets_the_prompt(student) -> None:
    prompts = some_prompts()
    bank = Bank(student, prompts.ids)
    means = mean_activations(student, prompts.ids)
    bench = Bench(student, circuit_of(student, every_node(means)), prompts, means, bank, seed=0)
    torch.testing.assert_close(bench.alone("resample"), bench.whole(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bench.without("resample"), bench.floor("resample"), atol=1e-5, rtol=1e-5)
    assert not torch.equal(bench.floor("resample"), bench.floor("mean"))
    again = Bench(student, circuit_of(student, frozenset()), prompts, means, bank, seed=0)
    torch.testing.assert_close(again.alone("resample"), bench.floor("resample"))
    tap = keep_nodes((), means)
    plain = Chunks(prompts, tiny_student_config()).differences(student, tap)[0]
    torch.testing.assert_close(bench.floor("mean"), plain, atol=1e-5, rtol=1e-5)


def test_evidence_of_a_zero_ablation_circuit_is_under_zero_ablation(planted) -> None:
    student, means, bank, selection, held_out = planted
    circuit = dataclasses.replace(circuit_of(student, PLANTED_NODES), settings={"ablation": "zero"})
    found = gather_evidence(student, circuit, selection, held_out, means, bank, LEAST)
    assert found["ablation"] == "zero"
    assert found["sufficiency"] == found["ablations"]["zero"]["sufficiency"]["value"]
    assert found["loss"] == pytest.approx(found["ablations"]["zero"]["loss"])
