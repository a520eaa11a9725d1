"""The steering form of an edit: what it adds, and where its gate is open."""

import numpy as np
import pytest
import torch

from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.evaluate import measure_energies_
from bridges.off_target import HeldOutText
from bridges.steering import (
    Gate,
    Steering,
    acts_at,
    class_means,
    discriminant,
    half,
    mean_vector,
    told_apart,
)
from bridges.streams import PromptStreams
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


def half_way(edit: Edit, streams: PromptStreams, student, bridges, direction: str) -> Steering:
    """The steering form of an edit, its gate cut half way."""
    vector = mean_vector(edit, streams, student, bridges, direction)
    told = discriminant(streams, edit.site, acts_at(edit, streams), direction)
    return Steering(edit.site, vector, told.gate())


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
        vector = mean_vector(edit, streams, student, bridges, direction)
        expected = by_rms[half(batch, direction)].mean(0) * mean_rms
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)
        assert vector.norm() > 0.1
        assert torch.equal(half_way(edit, streams, student, bridges, direction).vector, vector)
    opposite = mean_vector(edit, streams, student, bridges, "clean")
    torch.testing.assert_close(vector, -opposite, atol=1e-5, rtol=1e-4)


def test_the_gate_of_an_edit_is_open_on_the_prompts_that_it_edits(family, tokens) -> None:
    """Two tokens at one place: the gate tells the one from the other."""
    batch = pairs_that_differ_at(1)
    student, bridges, streams = streams_of(family, tokens, batch)
    site = Site(0, "resid_pre")
    edit = Edit.from_nodes([Node("0.attn.act_in", c) for c in range(8)], site, bridges)
    for direction in ("clean", "corrupted"):
        steering = half_way(edit, streams, student, bridges, direction)
        delta = steering.delta(streams.resid[site], 2.0)
        edited = half(batch, direction)
        torch.testing.assert_close(delta[edited, 1], (2 * steering.vector).expand(6, -1))
        assert not delta[~edited, 1].any()


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


def test_a_discriminant_is_fishers_and_its_cuts_lie_between_the_means(family, tokens) -> None:
    batch = pairs_that_differ_at(7)
    _, bridges, streams = streams_of(family, tokens, batch)
    site = Site(1, "resid_mid")
    resid = streams.resid[site].double()
    centred = resid - resid.mean(-1, keepdim=True) if family.removes_mean else resid
    inside, other = centred[6:, 7], centred[:6, 7]  # the direction "corrupted" edits the second half
    text = HeldOutText(family, tokens).resid(site)
    seen = text.double() - text.double().mean(-1, keepdim=True) if family.removes_mean else text.double()
    groups = [inside, other, seen.flatten(0, 1)]
    within = sum(np.cov(group.numpy(), rowvar=False, bias=True) for group in groups) / 3
    difference = inside.mean(0) - (other.mean(0) + groups[2].mean(0)) / 2
    along = np.linalg.solve(
        within + 0.1 * np.trace(within) / len(within) * np.eye(len(within)), difference.numpy()
    )
    at = told_apart(batch, streams.resid[site])
    found = discriminant(streams, site, at, "corrupted", text)
    assert found.direction.numpy() == pytest.approx(along / np.linalg.norm(along), abs=1e-4)
    assert found.high == pytest.approx((inside @ found.direction.double()).mean().item(), rel=1e-4)
    outside = [(group @ found.direction.double()).mean().item() for group in groups[1:]]
    assert found.low == pytest.approx(sum(outside) / 2, rel=1e-4, abs=1e-5)
    assert found.gate(0.0).threshold == found.low < found.gate().threshold < found.gate(1.0).threshold
    shares = [found.gate(cut).open(text).float().mean().item() for cut in (-9.0, 0.0, 0.5, 1.0, 9.0)]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (1, 0)


def test_a_gate_reads_the_stream_as_the_model_does() -> None:
    resid = torch.tensor([[[0.0, 9.0], [0.4, 9.0], [0.6, 9.0], [1.0, 9.0]]])
    along = torch.tensor([1.0, 0.0])
    assert Gate(along, 0.5).open(resid).tolist() == [[False, False, True, True]]
    centred = Gate(along, -4.25, removes_mean=True)
    assert centred.open(resid + 100.0).tolist() == centred.open(resid).tolist() == [[False] * 2 + [True] * 2]


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
        half_way(edit, streams, student, bridges, "clean")
