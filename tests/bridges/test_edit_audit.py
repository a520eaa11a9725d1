"""What an edit did: log-odds, steering forms, and the student's prediction against the dense model."""

import json

import numpy as np
import pytest
import torch

from bridges.audit import EditAuditConfig, audit_edit, audit_steering, log_odds, share_of_all
from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.evaluate import measure_energies_
from bridges.off_target import HeldOutText, steered
from bridges.prediction import (
    PredictionConfig,
    StudentEffects,
    correlation_interval,
    draw_nodes,
    node_pool,
    prediction,
)
from bridges.steering import acts_at, flip_rate, mean_vector
from bridges.steering_gate import fit_steering, steering_again
from bridges.streams import PromptStreams
from bridges.tails import PromptTails
from bridges.warm_start import StudentShape, make_student
from extractor.circuit import Circuit
from extractor.intervention import patch
from extractor.rotation import RotationConfig
from extractor.sites import Node, Site
from extractor.tasks import TaskBatch
from tests.bridges.test_steering import half_way
from tests.families import tiny_model

CONFIG = PredictionConfig(nodes=9, sets=4, strengths=(0.5, 2.0), pairs=5)


def make_pairs(seed: int = 3) -> TaskBatch:
    """Six pairs of several lengths that differ in the fifth token, in three templates."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 97, (6, 10), generator=generator).repeat(2, 1)
    ids[:6, 4], ids[6:, 4] = 11, 12
    last = torch.tensor([9, 8, 7, 9, 6, 4]).repeat(2)
    answer = torch.cat([torch.full((6,), 21), torch.full((6,), 22)])
    return TaskBatch(ids, last, answer, answer.roll(6), torch.tensor([0, 0, 1, 1, 2, 2]).repeat(2))


def setup(dense: DenseModel, tokens: torch.Tensor, turned: bool = False):
    rotation = RotationConfig(enabled=turned, stream_steps=20, head_steps=5)
    student, bridges = make_student(dense, StudentShape(), rotation)
    measure_energies_(dense, student, bridges, tokens)
    return student, bridges, PromptStreams(dense, student, bridges, make_pairs())


def circuit_of(sites, channels) -> Circuit:
    return Circuit("t", frozenset(Node(s.read_address, c) for s in sites for c in channels), (), "sha", {})


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("row", ["Llama", "Qwen2", "GPT-NeoX, Pythia (parallel)"])
def test_an_exact_copy_predicts_the_dense_model_exactly(row, turned, tokens) -> None:
    """Its stream is the dense stream in another frame, so moving a channel is moving its direction.

    GPT-NeoX takes the mean of the stream away, which a channel has a part in: there it is close only.
    """
    dense = DenseModel(tiny_model(row))
    student, bridges, streams = setup(dense, tokens, turned)
    circuit = circuit_of(dense.sites, (0, 5, 17, 20, 30))
    found = prediction(streams, circuit.nodes, student, bridges, CONFIG, seed=1)
    assert found["num_points"] == len(found["points"]) == (9 + 4) * 2
    points = torch.tensor([[p["stream"], p["measured"], p["tap"]] for p in found["points"]])
    assert points[:, 1].abs().max() > 0.1
    pearson = found["stream"]["pearson"]
    if dense.removes_mean:
        assert pearson["value"] > 0.95
        return
    torch.testing.assert_close(points[:, 0], points[:, 1], atol=1e-4, rtol=1e-4)
    for name in ("pearson", "slope"):
        assert found["stream"][name]["value"] == pytest.approx(1, abs=1e-4)
        assert found["stream"][name]["low"] == pytest.approx(1, abs=1e-3)
    assert pearson["clusters"] == 13
    assert (points[:, 2] - points[:, 1]).abs().max() > 1e-2  # the tap moves one sublayer's read only


@torch.no_grad()
def test_effects_of_the_student_are_those_of_the_intervention_on_it(dense, tokens) -> None:
    student, bridges, streams = setup(dense, tokens)
    batch = streams.batch
    effects = StudentEffects(student, bridges, batch)
    for site in dense.sites:
        nodes = [Node(site.read_address, c) for c in (2, 9)]
        counterfactual = {a: batch.counterfactual(x) for a, x in effects.recorder.activations.items()}
        intervention = patch(nodes, strength=1.5)
        with intervention.applied(student, last=batch.last, counterfactual=counterfactual):
            edited = batch.logit_difference(student(batch.ids).logits)
        expected = edited - batch.logit_difference(student(batch.ids).logits)
        torch.testing.assert_close(effects.tap(site, nodes, 1.5), expected, atol=1e-4, rtol=1e-3)
        assert expected.abs().max() > 1e-3
        assert effects.stream(site, nodes, 0.0).abs().max() < 1e-5


def test_what_is_predicted_is_drawn_from_the_circuit_and_bounded(dense, tokens) -> None:
    _, bridges, _ = setup(dense, tokens)
    circuit = circuit_of(dense.sites[:3], (1, 2, 3, 4))
    drawn = draw_nodes(circuit.nodes, bridges, CONFIG, seed=0)
    assert len(drawn) == 13
    assert len({(site, frozenset(nodes)) for site, nodes in drawn}) == 13
    for site, nodes in drawn:
        assert set(nodes) <= circuit.nodes
        assert {node.address for node in nodes} == {site.read_address}
    assert {site for site, nodes in drawn if len(nodes) > 1} == set(dense.sites[:3])
    few = draw_nodes(circuit_of(dense.sites[:1], (1, 2)).nodes, bridges, CONFIG, seed=0)
    assert sorted(len(nodes) for _, nodes in few) == [1, 1, 2]
    alone = draw_nodes(circuit_of(dense.sites[:2], (1,)).nodes, bridges, CONFIG, seed=0)
    assert [len(nodes) for _, nodes in alone] == [1, 1]


def test_a_circuit_that_reads_nothing_predicts_nothing(dense, tokens) -> None:
    student, bridges, streams = setup(dense, tokens)
    circuit = Circuit("t", frozenset([Node("0.mlp.post_act", 3)]), (), "sha", {})
    assert "undefined" in prediction(streams, circuit.nodes, student, bridges, CONFIG)


def test_predictions_of_an_empty_circuit_are_drawn_at_the_edit_s_site(dense, tokens) -> None:
    _, bridges, streams = setup(dense, tokens)
    edit = Edit.from_nodes([Node("1.attn.act_in", c) for c in (30, 2)], Site(1, "resid_pre"), bridges)
    empty = Circuit("t", frozenset(), (), "sha", {})
    nodes, name = node_pool(edit, empty, streams, bridges)
    assert nodes[:2] == list(edit.nodes)
    assert {node.address for node in nodes} == {"1.attn.act_in"}
    assert len(set(nodes)) == len(nodes) == 32
    assert "32 channels at 1.resid_pre" in name
    own = circuit_of(dense.sites[:1], (1, 2))
    assert node_pool(edit, own, streams, bridges) == (list(own.nodes), "the circuit")


def test_the_share_is_of_the_indirect_effect_of_all_channels(dense, tokens) -> None:
    _, bridges, streams = setup(dense, tokens)
    site = Site(1, "resid_pre")
    moved = {}
    for name, channels in (("all", range(32)), ("some", (3, 8))):
        edit = Edit.from_nodes([Node("1.attn.act_in", c) for c in channels], site, bridges)
        with torch.no_grad():
            effects = {s: streams.differences(site, s * streams.delta(edit)) for s in (1.0, 2.0)}
        moved[name] = [(indirect - streams.unedited).mean().item() for _, indirect in effects.values()]
        found = share_of_all(edit, streams, bridges, effects)
        expected = [own / whole for own, whole in zip(moved[name], moved["all"], strict=True)]
        assert list(found) == ["1", "2"]
        assert [row["value"] for row in found.values()] == pytest.approx(expected, rel=1e-3)
    assert expected != pytest.approx([1.0, 1.0], rel=0.1)


def test_correlations_and_their_intervals() -> None:
    x, cluster = np.arange(12.0), [i // 2 for i in range(12)]
    for of_ranks in (False, True):
        assert correlation_interval(x, -2 * x, cluster, of_ranks=of_ranks)["value"] == pytest.approx(-1)
    assert correlation_interval(x, x**3, cluster, of_ranks=True)["value"] == pytest.approx(1)
    assert correlation_interval(x, x**3, cluster)["value"] < 0.95
    assert "undefined" in correlation_interval(x, np.ones(12), cluster)
    assert "undefined" in correlation_interval(x, x**3, [0] * 6 + [1] * 6)["low"]
    noise = np.random.default_rng(0).standard_normal((2, 60))
    found = correlation_interval(noise[0], noise[0] + noise[1], range(60))
    assert found["low"] < found["value"] < found["high"]
    # Fisher's interval for r over 60 independent points
    reach = np.tanh(np.arctanh(found["value"]) + np.array([-1.96, 1.96]) / np.sqrt(57))
    assert [found["low"], found["high"]] == pytest.approx(reach, abs=0.1)


def test_slope_of_log_odds_is_least_squares_through_the_unedited_point(dense) -> None:
    tails = PromptTails(dense, make_pairs())
    generator = torch.Generator().manual_seed(0)
    changes = {s: torch.randn(2, 12, generator=generator) for s in (0.0, 0.5, 2.0)}
    effects = {s: tuple(tails.unedited + change) for s, change in changes.items()}
    chosen = torch.arange(12) < 6
    found = log_odds(tails, effects, examples=chosen)
    for index, name in enumerate(("total", "indirect")):
        means = [changes[s][index, :6].mean().item() for s in (0.0, 0.5, 2.0)]
        assert [row["value"] for row in found[name]] == pytest.approx(means, abs=1e-5)
        fit = np.linalg.lstsq(np.array([[0.0], [0.5], [2.0]]), np.array(means), rcond=None)[0].item()
        assert found[f"slope_{name}"]["value"] == pytest.approx(fit, abs=1e-5)
        assert found[f"slope_{name}"]["clusters"] == 3
    assert "undefined" in log_odds(tails, {0.0: effects[0.0]})["slope_total"]


def test_a_steering_is_measured_on_the_half_that_it_edits(dense, tokens) -> None:
    student, bridges, streams = setup(dense, tokens)
    site = Site(1, "resid_pre")
    edit = Edit.from_nodes([Node("1.attn.act_in", c) for c in range(8)], site, bridges)
    text = HeldOutText(dense, tokens)
    for direction, half in (("clean", slice(0, 6)), ("corrupted", slice(6, 12))):
        steering = half_way(edit, streams, student, bridges, direction)
        found = audit_steering(steering, streams, direction, text, {"other": streams}, (0.0, 3.0))
        total, indirect = steered(streams, steering, 3.0)
        right = streams.unedited[half] > 0
        for name, difference in (("flip_rate", total), ("flip_rate_indirect", indirect)):
            flipped = (right & (difference[half] < 0)).sum() / right.sum().clamp(min=1)
            assert found["strengths"][1][name] == pytest.approx(flipped.item())
            assert found["strengths"][0][name] == 0
        change = (total - streams.unedited)[half].mean().item()
        assert found["log_odds"]["total"][1]["value"] == pytest.approx(change, abs=1e-5)
        assert found["log_odds"]["total"][0]["value"] == 0
        assert found["strengths"][0]["text"]["kl"] == 0


def test_the_whole_audit_is_json(dense, tokens) -> None:
    student, bridges, streams = setup(dense, tokens)
    site = Site(1, "resid_pre")
    edit = Edit.from_nodes([Node("1.attn.act_in", c) for c in (3, 8)], site, bridges)
    parts = (edit, circuit_of(dense.sites, (3, 8)), streams, streams, student, bridges)
    text, others = HeldOutText(dense, tokens), {"other": PromptTails(dense, make_pairs(4))}
    config = EditAuditConfig(steering_strengths=(0.5,), prediction=CONFIG)
    train_text = HeldOutText(dense, tokens.flip(0, 1))
    found = audit_edit(*parts, text, others, config, train_text=train_text, strengths=(1.0, 2.0))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.keys() == {
        "log_odds", "share_of_all_channels", "off_target_kl", "steering_direction", "steering_form",
        "steering", "prediction", "predictions_drawn_from",
    }  # fmt: skip
    form = found["steering_form"]
    main = found["steering"][form["direction"]]["gated"]
    assert form["strength"] == main["gate"]["strength"] in (1.0, 2.0)
    assert [row["strength"] for row in main["strengths"]] == [0.5, form["strength"]]
    trial = fit_steering(
        mean_vector(edit, streams, student, bridges, form["direction"]),
        *(site, acts_at(edit, streams), streams, train_text, form["direction"], (1.0, 2.0), config.gate),
    )
    assert main["gate"] == trial.as_json()
    assert found["off_target_kl"] == form["kl"] == text.effect(trial.steering, trial.strength).kl
    assert form["train_text_blocks"] == len(tokens)
    again = steering_again(edit, streams, student, bridges, train_text, form)  # as recipes/compare.py does
    assert text.effect(again, form["strength"]).kl == form["kl"]
    total, indirect = steered(streams, trial.steering, trial.strength)
    assert form["flip_rate"] == flip_rate(streams, total, form["direction"])
    assert form["flip_rate_indirect"] == flip_rate(streams, indirect, form["direction"])
    assert main["strengths"][1]["other_tasks"].keys() == {"other"}
    assert found["prediction"]["num_prompts"] == 10
    same = TaskBatch(streams.batch.ids[:6].repeat(2, 1), *list(vars(streams.batch).values())[1:])
    still = PromptStreams(dense, student, bridges, same)
    parts = (edit, parts[1], still, still, student, bridges)
    found = audit_edit(*parts, text, others, config, strengths=(0.0,))
    assert "undefined" in found["off_target_kl"]
    assert "undefined" in found["steering"]
    assert "undefined" in found["steering_form"]
    assert "undefined" in found["prediction"]["tap"]["pearson"]
