"""The steering form of an edit: what it adds, and where its gate is open."""

import pytest
import torch

from bridges.choose import PromptStreams
from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.evaluate import measure_energies_
from bridges.steering import Gate, Steering, class_means, half, mean_reading, steering_form, told_apart
from bridges.warm_start import StudentShape, make_student
from extractor.errors import InputError
from extractor.rotation import RotationConfig
from extractor.sites import Node, Site
from extractor.tasks import TaskBatch
from tests.families import tiny_model


def pairs_that_differ_at(place: int) -> TaskBatch:
    """Six pairs of eight tokens; the answers are two arbitrary tokens."""
    ids = torch.randint(20, 97, (6, 8), generator=torch.Generator().manual_seed(3)).repeat(2, 1)
    ids[:6, place], ids[6:, place] = 11, 12
    answer = torch.cat([torch.full((6,), 21), torch.full((6,), 22)])
    return TaskBatch(ids, torch.full((12,), 7), answer, answer.roll(6))


def streams_of(dense: DenseModel, tokens: torch.Tensor, batch: TaskBatch):
    student, bridges = make_student(dense, StudentShape(hidden_size=40), RotationConfig(enabled=False))
    measure_energies_(dense, student, bridges, tokens)
    return student, bridges, PromptStreams(dense, student, bridges, batch)


@pytest.fixture(params=["GPT-2", "Llama"])
def family(request: pytest.FixtureRequest) -> DenseModel:
    return DenseModel(tiny_model(request.param))


@pytest.mark.parametrize("place", [7, 1])
def test_the_vector_is_the_mean_delta_of_the_patch_at_the_mean_rms(family, tokens, place) -> None:
    """Where each prompt's delta is divided by its own RMS, averaged, and given the mean one."""
    batch = pairs_that_differ_at(place)
    student, bridges, streams = streams_of(family, tokens, batch)
    site = Site(0, "resid_pre")  # no attention before it, so only the differing token differs
    edit = Edit.from_nodes([Node("0.attn.act_in", c) for c in (0, 5, 17)], site, bridges)
    by_rms = streams.delta(edit)[:, place] / streams.dense_rms[site][:, place]
    mean_rms = bridges.dense_energy[bridges.sites.index(site)].sqrt()
    for direction in ("clean", "corrupted"):
        steering = steering_form(edit, streams, student, bridges, direction)
        expected = by_rms[half(batch, direction)].mean(0) * mean_rms
        torch.testing.assert_close(steering.vector, expected, atol=1e-5, rtol=1e-4)
        assert steering.vector.norm() > 0.1
    opposite = steering_form(edit, streams, student, bridges, "clean").vector
    torch.testing.assert_close(steering.vector, -opposite, atol=1e-5, rtol=1e-4)


def test_the_gate_of_an_edit_is_open_on_the_prompts_that_it_edits(family, tokens) -> None:
    """Two tokens at one place, seen through the encoder: the gate tells the one from the other."""
    batch = pairs_that_differ_at(1)
    student, bridges, streams = streams_of(family, tokens, batch)
    site = Site(0, "resid_pre")
    edit = Edit.from_nodes([Node("0.attn.act_in", c) for c in range(8)], site, bridges)
    for direction in ("clean", "corrupted"):
        steering = steering_form(edit, streams, student, bridges, direction)
        delta = steering.delta(streams.resid[site], 2.0)
        edited = half(batch, direction)
        torch.testing.assert_close(delta[edited, 1], (2 * steering.vector).expand(6, -1))
        assert not delta[~edited, 1].any()
        # the reading is the student's own read, which an exact bridge tells exactly
        read = streams.presented[site.read_address] @ steering.gate.direction
        torch.testing.assert_close(steering.gate.reading(streams.resid[site]), read, atol=1e-3, rtol=1e-3)


def test_strength_and_gate_decide_what_is_added() -> None:
    resid = torch.randn(2, 5, 8)
    steering = Steering(Site(1, "resid_mid"), torch.randn(8))
    everywhere = steering.delta(resid, 1.5)
    assert torch.equal(everywhere, (1.5 * steering.vector).expand(2, 5, 8))
    assert not steering.delta(resid, 0.0).any()
    always = Steering(steering.site, steering.vector, Gate(torch.ones(8), -1e9))
    assert torch.equal(always.delta(resid, 1.5), everywhere)
    assert not Steering(steering.site, steering.vector, Gate(torch.ones(8), 1e9)).delta(resid).any()
    assert torch.equal(steering.scaled(1.5).delta(resid), everywhere)
    assert always.ungated() == steering


def test_a_gate_opens_nearer_to_the_mean_of_what_is_edited() -> None:
    resid = torch.tensor([[[0.0, 9.0], [0.4, 9.0], [0.6, 9.0], [1.0, 9.0]]])
    steering = Steering(Site(0, "resid_pre"), torch.tensor([0.0, 1.0]))
    along = torch.tensor([1.0, 0.0])
    assert steering.gated(along, low=0.0, high=1.0).gate.open(resid).tolist() == [[False, False, True, True]]
    assert steering.gated(along, low=1.0, high=0.0).gate.open(resid).tolist() == [[True, True, False, False]]
    tight = steering.gated(along, 0.0, 1.0, least=0.8).gate
    assert tight.open(resid).tolist() == [[False, False, False, True]]
    assert steering.gated(along, 0.0, 1.0, least=0.2).gate.threshold == 0.5
    assert steering.gated(along, 1.0, 0.0, least=0.2).gate.open(resid).tolist() == [[True, *[False] * 3]]
    shifted = resid + 100.0
    centred = steering.gated(along, -4.5, -4.0, removes_mean=True).gate
    assert centred.open(shifted).tolist() == centred.open(resid).tolist() == [[False, False, True, True]]


def test_mean_readings_are_those_of_the_two_halves(dense, tokens) -> None:
    batch = pairs_that_differ_at(7)
    _, bridges, streams = streams_of(dense, tokens, batch)
    site, along = Site(1, "resid_mid"), torch.randn(32)
    centred = bridges.centred(streams.resid[site])[:, 7] @ along
    for sign in (1, -1):
        low, high, least = mean_reading(streams, site, sign * along, "corrupted")
        assert low == pytest.approx(sign * centred[:6].mean().item(), rel=1e-4)
        assert high == pytest.approx(sign * centred[6:].mean().item(), rel=1e-4)
        steering = Steering(site, along).gated(sign * along, low, high, least, removes_mean=True)
        assert steering.gate.open(streams.resid[site])[6:, 7].sum() >= 5


def test_prompts_are_told_apart_at_their_end_or_where_they_differ(dense) -> None:
    batch = pairs_that_differ_at(3)
    activation = torch.zeros(12, 8, 2)
    activation[:6, 3:5] = 1.0
    activation[:6, 7] = 0.3  # what attention leaves of it at the end
    assert torch.equal(told_apart(batch, activation)[0], torch.tensor([0, 0, 0, 0.5, 0.5, 0, 0, 0.0]))
    edited, other = class_means(batch, activation, "clean")
    assert (edited.tolist(), other.tolist()) == ([1, 1], [0, 0])
    activation[:6, 7] = 2.0
    assert torch.equal(told_apart(batch, activation)[0], torch.tensor([0, 0, 0, 0, 0, 0, 0, 1.0]))
    assert class_means(batch, activation, "corrupted")[1].tolist() == [2, 2]


def test_nodes_that_no_pair_moves_have_no_steering_form(dense, tokens) -> None:
    batch = pairs_that_differ_at(1)
    same = TaskBatch(batch.ids[:6].repeat(2, 1), batch.last, batch.answer, batch.distractor)
    student, bridges, streams = streams_of(dense, tokens, same)
    edit = Edit.from_nodes([Node("0.attn.act_in", 3)], Site(0, "resid_pre"), bridges)
    with pytest.raises(InputError, match="are the same on both prompts"):
        steering_form(edit, streams, student, bridges, "clean")
