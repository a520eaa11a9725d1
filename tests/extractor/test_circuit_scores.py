"""Scores of orders: MIB's areas at known values, cuts as circuits run, and a planted student's peers."""

import dataclasses
import json
import math

import pytest
import torch

from extractor.attribution import StudentEdges
from extractor.circuit import Calibration, Circuit, edges_between, keep_nodes
from extractor.circuit_scores import (
    SHARES,
    Cuts,
    PeersConfig,
    Ranking,
    Reading,
    cmd,
    compare_peers,
    cpr,
    edge_orders,
    log_area,
    log_distance,
    node_orders,
)
from extractor.masks import mean_activations
from extractor.sites import Node
from extractor.student import Student
from extractor.tasks import TaskBatch
from tests.conftest import tiny_student_config
from tests.extractor.test_compact import some_nodes, student_of

STEP = [0.0] * 9 + [1.0]


@pytest.mark.parametrize(
    ("faithfulness", "expected"),
    [
        ([1.0] * 10, (0.9990, 0.0)),
        (STEP, (0.2500, 0.7490)),
        (list(SHARES), (0.5000, 0.4990)),
        ([2.0] * 9 + [1.0], (1.7480, 0.7490)),
    ],
)
def test_areas_are_those_of_mib(faithfulness: list[float], expected: tuple[float, float]) -> None:
    found = cpr(SHARES, faithfulness), cmd(SHARES, faithfulness)
    assert found == pytest.approx(expected, abs=5.1e-4)
    assert sum(found) >= 0.999 - 1e-9


def test_cpr_and_cmd_of_one_ranking_make_up_the_axis() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        faithfulness = (3 * torch.randn(len(SHARES), generator=generator)).tolist()
        assert cpr(SHARES, faithfulness) + cmd(SHARES, faithfulness) >= 0.999 - 1e-9


def test_every_doubling_counts_alike_on_a_log_axis() -> None:
    assert log_area(SHARES, [1.0] * 10) == pytest.approx(1)
    assert log_distance(SHARES, [1.0] * 10) == pytest.approx(0)
    assert log_area(SHARES, STEP) == pytest.approx(math.log(2) / 2 / math.log(1000))
    assert log_area(SHARES, [math.log(1000 * share) for share in SHARES]) == pytest.approx(math.log(1000) / 2)
    late = [0.0] * 8 + [1.0] * 2
    assert log_distance(SHARES, late) + log_area(SHARES, late) == pytest.approx(1)


# --- rankings --------------------------------------------------------------------------------------------


def test_a_ranking_keeps_the_largest_and_ties_by_index() -> None:
    seen = []

    def read(kept: torch.Tensor) -> Reading:
        seen.append(kept.nonzero()[:, 0].tolist())
        return Reading(1.0, 0.0)

    ranking = Ranking(torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0]), read)
    for size in (0, 2, 4, 4):
        ranking.at(size)
    assert seen == [[], [1, 3], [0, 1, 2, 3]]  # a size is read once


@pytest.mark.parametrize(("needed", "tolerance"), [(1, 0), (7, 0), (437, 8), (1500, 30), (2000, 0)])
def test_the_size_at_a_loss_is_found_between_the_sizes_cut(needed: int, tolerance: int) -> None:
    ranking = Ranking(torch.rand(2000), lambda kept: Reading(0.0 if kept.sum() >= needed else 0.6, 0.0))
    found = ranking.size_at(0.15)
    assert needed <= found <= needed + tolerance


def test_a_loss_that_is_not_reached_has_no_size_and_one_that_always_is_has_zero() -> None:
    assert Ranking(torch.rand(100), lambda kept: Reading(0.5, 0.0)).size_at(0.15) is None
    assert Ranking(torch.rand(100), lambda kept: Reading(0.1, 0.0)).size_at(0.15) == 0


# --- a planted student -----------------------------------------------------------------------------------

PLANTED_NODES = ["0.attn.act_in:0", "0.attn.v:0", "0.attn.resid_delta:1"]
PLANTED_NODES += ["0.mlp.act_in:1", "0.mlp.post_act:0", "0.mlp.resid_delta:2"]
PLANTED_EDGES = [PLANTED_NODES[i : i + 2] for i in (0, 1, 3, 4)]


def planted_student() -> Student:
    """Token 1 or 2 at the front -> channel 0 -> v 0 -> channel 1 -> neuron 0 -> channel 2 -> token 3, not 4.

    Queries and keys are zero (attention to all alike), channels 0 to 2 belong to the path alone, and on the
    others run weights and activations that are larger, and that the answers do not depend on.
    """
    config = tiny_student_config(
        num_hidden_layers=1, hidden_size=12, intermediate_size=16, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, hidden_act="gelu", initializer_range=0.5,
    )  # fmt: skip
    student = Student(config).eval()
    attn, mlp = student.layers[0].attn, student.layers[0].mlp
    with torch.no_grad():
        for linear in (attn.q_proj, attn.k_proj):
            linear.weight.zero_()
        for table in (student.embed_tokens, student.embed_positions):
            table.weight[:, :3] = 0
        student.embed_tokens.weight[1, 0], student.embed_tokens.weight[2, 0] = 3, -3
        for linear in (attn.v_proj, mlp.up_proj):
            linear.weight[:, :3] = 0
            linear.weight[0] = 0
        for linear in (attn.o_proj, mlp.down_proj):
            linear.weight[:3] = 0
        attn.o_proj.weight[:, [0, 4]] = 0  # v 0, for the two heads of its group
        mlp.down_proj.weight[:, 0] = 0
        attn.v_proj.weight[0, 0], attn.o_proj.weight[1, 0], attn.o_proj.weight[1, 4] = 1, 2, 2
        mlp.up_proj.weight[0, 1], mlp.down_proj.weight[2, 0] = 2, 4
        student.lm_head.weight[3:5] = 0
        student.lm_head.weight[3, 2] = 8
        student.lm_head.bias[3] = -8
    return student


def planted_task(count: int, seed: int) -> TaskBatch:
    rest = torch.randint(5, 97, (count, 3), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([torch.cat([torch.full((count, 1), first), rest], dim=1) for first in (1, 2)])
    answer = torch.cat([torch.full((count,), 3), torch.full((count,), 4)])
    return TaskBatch(ids, torch.full((2 * count,), 3), answer, answer.roll(count))


def planted_circuit(student: Student, nodes: list[str] = PLANTED_NODES) -> Circuit:
    kept = frozenset(map(Node.parse, nodes))
    return Circuit("planted", kept, edges_between(student, kept), "none", {}, Calibration())


def test_attributions_put_the_planted_nodes_and_edges_first() -> None:
    student, train = planted_student(), planted_task(32, 0)
    means = mean_activations(student, train.ids)
    edges = StudentEdges(student, means)
    names = list(map(str, edges.nodes))
    for method, scores in node_orders(student, train, means, PeersConfig()).items():
        first = {names[i] for i in scores.argsort(descending=True)[: len(PLANTED_NODES)]}
        assert (first == set(PLANTED_NODES)) is (method not in ("magnitude", "random")), method
    pairs = [[str(source), str(target)] for source, target in edges.pairs]
    for method, scores in edge_orders(edges, train, PeersConfig()).items():
        first = sorted(pairs[i] for i in scores.argsort(descending=True)[: len(PLANTED_EDGES)])
        assert (first == sorted(PLANTED_EDGES)) is (method not in ("magnitude", "random")), method


def test_peers_of_a_planted_student() -> None:
    student, train, held_out = planted_student(), planted_task(32, 0), planted_task(32, 1)
    means = mean_activations(student, train.ids)
    circuit = planted_circuit(student)
    tau = torch.full((sum(map(len, means.values())),), -1.0)
    found = compare_peers(
        student,
        train,
        held_out,
        means,
        circuit,
        PeersConfig(pairs=16, path_steps=5),
        target_loss=0.15,
        tau=tau,
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["num_scored_prompts"] == 32
    assert found["num_prompts"] == 64
    assert found["floor"]["logit_difference"] == pytest.approx(0, abs=1e-5)
    for unit, size in (("nodes", 6), ("edges", 4)):
        methods = found[unit]["methods"]
        assert found[unit]["learned"]["size"] == size
        assert found[unit]["learned"]["faithfulness"] == pytest.approx(1, abs=0.05)
        assert found[unit]["learned"]["loss"] < 0.15
        for name, own in methods.items():
            curve = own["curves"]["absolute"]
            assert curve["faithfulness"][-1] == pytest.approx(1, abs=1e-4)
            assert curve["sizes"][-1] == found[unit]["total"]
            assert cpr(SHARES, own["curves"]["signed"]["faithfulness"]) == own["cpr"]
            assert cmd(SHARES, curve["faithfulness"]) == own["cmd"]
            if name in ("magnitude", "random"):
                assert own["size_at_loss"] > size
                assert own["loss_at_size"] > 0.5
            else:
                assert own["size_at_loss"] <= size
                assert own["loss_at_size"] == pytest.approx(found[unit]["learned"]["loss"], abs=1e-4)
                assert own["log_area"] > methods["random"]["log_area"] + 0.1
                assert own["log_distance"] < methods["random"]["log_distance"] - 0.1


def test_an_empty_circuit_in_a_student_without_edges() -> None:
    student, prompts = planted_student(), planted_task(4, 0)
    means = mean_activations(student, prompts.ids)
    edges = StudentEdges(student, means)
    cuts = Cuts(edges, prompts, prompts)
    for read, count in ((cuts.nodes, len(edges.nodes)), (cuts.edges, len(edges))):
        assert read(torch.zeros(count, dtype=torch.bool)) == cuts.floor
        assert read(torch.ones(count, dtype=torch.bool)) == cuts.whole
    with torch.no_grad():
        for name, weight in student.sparse_matrices().items():
            if name.startswith("layers"):
                weight.zero_()
    means = mean_activations(student, prompts.ids)
    config = PeersConfig(path_steps=2)
    found = compare_peers(
        student, prompts, prompts, means, planted_circuit(student, []), config, target_loss=0.15
    )
    json.dumps(found, allow_nan=False)
    assert found["edges"]["total"] == 0
    for unit in ("nodes", "edges"):
        assert found[unit]["learned"]["size"] == 0
        assert found[unit]["learned"]["loss"] == found["floor"]["loss"]
        for own in found[unit]["methods"].values():
            assert own["loss_at_size"] == found["floor"]["loss"]
            assert "no gap" in own["cpr"]["undefined"]
            assert "no size" in own["size_at_loss"]["undefined"]


def test_the_learned_circuit_is_read_as_it_runs() -> None:
    """Its own nodes count, also those that no edge touches."""
    student, prompts = planted_student(), planted_task(4, 0)
    means = mean_activations(student, prompts.ids)
    nodes = [*PLANTED_NODES, *map(str, some_nodes(means, 0.3))]
    circuit = planted_circuit(student, nodes)
    circuit = dataclasses.replace(circuit, edges=circuit.edges[::2])
    config = PeersConfig(path_steps=2)
    found = compare_peers(student, prompts, prompts, means, circuit, config, target_loss=0.15)
    own = prompts.logit_difference(circuit.compact(student, means)(prompts.ids).logits).mean().item()
    floor, whole = found["floor"]["logit_difference"], found["student"]["logit_difference"]
    assert found["edges"]["learned"]["faithfulness"] == pytest.approx(
        (own - floor) / (whole - floor), abs=1e-4
    )
    assert found["edges"]["learned"]["size"] == len({(e.source, e.target) for e in circuit.edges})
    assert found["nodes"]["learned"]["size"] == len(circuit.nodes)
    for unit in ("nodes", "edges"):
        assert "learned" not in found[unit]["methods"]  # no tau, no order


CUT_KINDS = ("grouped queries, rope, gate", "q/k norms and post-norms", "sinks", "parallel sublayers")
CUT_KINDS += ("AbsTopK with sinks and norms",)


@pytest.mark.parametrize("kind", CUT_KINDS)
def test_cuts_are_circuits(kind: str, tokens) -> None:
    """A cut runs as the circuit of the same nodes or edges would."""
    student = student_of(kind)
    means = mean_activations(student, tokens)
    answer = torch.tensor([3, 4, 5, 6])
    prompts = TaskBatch(tokens[[0, 1, 2, 0]], torch.full((4,), 11), answer, answer.roll(2))
    edges = StudentEdges(student, means)
    cuts = Cuts(edges, prompts, prompts)

    def difference(model, **kwargs) -> float:
        return prompts.logit_difference(model(prompts.ids, **kwargs).logits).mean().item()

    nodes = set(some_nodes(means, 0.2))
    found = cuts.nodes(torch.tensor([node in nodes for node in edges.nodes])).logit_difference
    assert found == pytest.approx(difference(student, tap=keep_nodes(nodes, means)), abs=1e-4)
    assert cuts.whole.logit_difference == pytest.approx(difference(student), abs=1e-4)

    among = edges_between(student, some_nodes(means, 0.1))[::2]
    pairs = {(edge.source, edge.target) for edge in among}
    weights = tuple(e for e in edges_between(student, nodes_of(pairs)) if (e.source, e.target) in pairs)
    circuit = Circuit("t", nodes_of(pairs), weights, "none", {})
    kept = torch.tensor([pair in pairs for pair in edges.pairs])
    for _ in range(2):  # the second time after another cut
        found = cuts.edges(kept).logit_difference
        assert found == pytest.approx(difference(circuit.compact(student, means)), abs=1e-4)
        assert cuts.edges(~kept).logit_difference != pytest.approx(found, abs=1e-3)


def nodes_of(pairs: set[tuple[Node, Node]]) -> frozenset[Node]:
    return frozenset(node for pair in pairs for node in pair)
