"""The image of a circuit taken out of the dense stream: nothing, everything, and random subspaces like it."""

import json
import math

import pytest
import torch

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from bridges.evaluate import measure_energies_
from bridges.image import (
    Image,
    ImageConfig,
    channels_read,
    image_of,
    measure_image,
    random_image,
    removed,
    span,
    stream_moments,
)
from bridges.readout import last_differences
from bridges.warm_start import StudentShape, make_student
from extractor.circuit import Circuit
from extractor.rotation import RotationConfig
from extractor.sites import Node, Site
from extractor.tasks import TaskBatch, accuracy
from tests.families import tiny_model

FAMILIES = ["GPT-2", "Llama", "OPT", "GPT-NeoX, Pythia (parallel)", "Gemma 2"]


def text(seed: int = 3, blocks: int = 40) -> torch.Tensor:
    return torch.randint(3, 90, (blocks, 16), generator=torch.Generator().manual_seed(seed))


def pairs(seed: int = 4, count: int = 6) -> TaskBatch:
    ids = torch.randint(3, 90, (count, 10), generator=torch.Generator().manual_seed(seed)).repeat(2, 1)
    last = torch.tensor([8 + i % 2 for i in range(count)]).repeat(2)
    ids[torch.arange(2 * count), last] = torch.tensor([91, 92]).repeat_interleave(count)
    answer = torch.arange(5, 5 + count)
    return TaskBatch(ids, last, torch.cat([answer, answer + 20]), torch.cat([answer + 20, answer]))


def circuit_of(nodes: dict[str, range]) -> Circuit:
    chosen = frozenset(Node(address, c) for address, channels in nodes.items() for c in channels)
    return Circuit("task", chosen, (), "none", {})


def bridges_of(dense: DenseModel) -> BridgeSet:
    student, bridges = make_student(dense, StudentShape(), RotationConfig(enabled=True))
    measure_energies_(dense, student, bridges, text())
    return bridges


@pytest.fixture(scope="module")
def llama() -> DenseModel:
    return DenseModel(tiny_model("Llama"))


@pytest.fixture(scope="module")
def moments(llama):
    return stream_moments(llama, text(), text(5))


@pytest.fixture(scope="module")
def bridges(llama) -> BridgeSet:
    return bridges_of(llama)


SMALL = circuit_of({"0.mlp.act_in": range(3), "1.attn.act_in": range(2, 7), "1.attn.k": range(4)})


# --- taken out ---------------------------------------------------------------------------------------------


def test_an_empty_image_changes_nothing(llama, moments) -> None:
    ids = pairs().ids
    plain = llama.model(ids).logits
    nothing = {site: Image(torch.zeros(0, 32), moments[site].mean) for site in llama.sites}
    for images in ({}, nothing):
        with removed(llama, images) as model:
            assert torch.equal(model(ids).logits, plain)
    assert torch.equal(llama.model(ids).logits, plain)  # no hook is left


@torch.no_grad()
@pytest.mark.parametrize("row", FAMILIES)
def test_the_whole_space_leaves_the_mean_alone(row) -> None:
    """At any site, the model goes on from the mean: every prompt of a length has the same logits."""
    dense, ids = DenseModel(tiny_model(row)), pairs().ids
    for site, own in stream_moments(dense, text(), text(5)).items():
        assert len(own.components) == 32 - dense.removes_mean
        with removed(dense, {site: Image(own.components.float(), own.mean)}) as model:
            logits = model(ids).logits
        expected = dense.run_from(site, own.mean.expand(*ids.shape, -1).contiguous())
        torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
        assert (logits - dense.run(ids).logits).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("row", FAMILIES)
def test_a_removed_image_is_a_delta_at_its_site(row) -> None:
    dense, ids = DenseModel(tiny_model(row)), pairs().ids
    moments, resid = stream_moments(dense, text(), text(5)), dense.run(ids).resid
    for site in dense.sites:
        image = Image(moments[site].components[[1, 4, 9]].float(), moments[site].mean)
        delta = image.delta(resid[site])
        with dense.adding(site, delta) as model:
            expected = model(ids, use_cache=False).logits
        with removed(dense, {site: image}):
            run = dense.run(ids)
        torch.testing.assert_close(run.logits, expected, atol=1e-4, rtol=1e-4)
        part = run.resid[site] @ image.basis.T  # what is left there is the mean's
        torch.testing.assert_close(part, (image.mean @ image.basis.T).expand_as(part), atol=1e-4, rtol=1e-4)
        assert delta.abs().max() > 0.01


@torch.no_grad()
def test_all_sites_are_removed_in_one_forward(llama, bridges, moments) -> None:
    """A later site removes its image from the stream as the earlier one has left it."""
    ids, images = pairs().ids, image_of(SMALL, bridges, moments)
    first, second = images
    with removed(llama, {first: images[first]}):
        run = llama.run(ids)
    expected = llama.run_from(second, run.resid[second] + images[second].delta(run.resid[second]))
    with removed(llama, images) as model:
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


# --- images ------------------------------------------------------------------------------------------------


def test_the_image_spans_the_decoded_reads(bridges, moments) -> None:
    images = image_of(SMALL, bridges, moments)
    assert list(images) == [Site(0, "resid_mid"), Site(1, "resid_pre")]
    for site, channels in channels_read(SMALL, bridges.sites).items():
        basis = images[site].basis
        columns = bridges[site].decoder.weight[:, channels].T
        assert basis.shape == (len(channels), 32)
        torch.testing.assert_close(columns @ basis.T @ basis, columns, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=1e-5)


def test_directions_that_repeat_span_no_more() -> None:
    rows = torch.randn(3, 8)
    assert span(torch.cat([rows, 2 * rows[:1], rows[1:2] - rows[2:]])).shape == (3, 8)


def test_an_image_of_a_layernorm_model_is_centred(dense) -> None:
    moments = stream_moments(dense, text(), text(5))
    for image in image_of(SMALL, bridges_of(dense), moments).values():
        assert image.basis.sum(-1).abs().max() < 1e-5


def test_the_moments_are_those_of_the_stream(llama, moments) -> None:
    for site, resid in llama.run(text(5)).resid.items():
        stream = resid.flatten(0, 1)
        for basis in (torch.eye(32)[:4], span(torch.randn(7, 32))):
            part = (stream @ basis.T).var(0, correction=0).sum() / stream.var(0, correction=0).sum()
            assert moments[site].share(basis) == pytest.approx(part.item(), abs=1e-5)
        mean = llama.run(text()).resid[site].mean((0, 1))
        torch.testing.assert_close(moments[site].mean, mean, atol=1e-5, rtol=1e-4)


# --- random subspaces --------------------------------------------------------------------------------------


def test_random_subspaces_have_the_images_dimension_and_energy(bridges, moments) -> None:
    images, channels = image_of(SMALL, bridges, moments), channels_read(SMALL, bridges.sites)
    drawn = [random_image(images, channels, moments, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    for site, image in images.items():
        one, again, other = (found[site].basis for found in drawn)
        assert torch.equal(one, again)
        assert (one @ other.T).square().sum() < 0.9 * len(one)
        for basis in (one, other):
            assert basis.shape == image.basis.shape
            torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=1e-5)
            assert moments[site].share(basis) == pytest.approx(moments[site].share(image.basis), abs=2e-4)


def test_a_channel_read_at_two_sites_has_the_same_vector(bridges, moments) -> None:
    """Without a tilt, at equal moments, one channel's random subspace is one and the same."""
    site, other = Site(0, "resid_mid"), Site(1, "resid_pre")
    same = {site: moments[site], other: moments[site]}
    images = {s: Image(torch.eye(32)[:1], moments[site].mean) for s in same}
    drawn = random_image(images, {site: [5], other: [5]}, same, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[site].basis, drawn[other].basis)
    drawn = random_image(images, {site: [5], other: [6]}, same, torch.Generator().manual_seed(0))
    assert (drawn[site].basis @ drawn[other].basis.T).abs() < 0.9


def test_the_extremes_of_energy_are_reached(moments) -> None:
    """Any share that a subspace of this dimension can hold, but for the outermost."""
    site = Site(1, "resid_mid")
    variances = moments[site].variances
    for rows in (moments[site].components[:4], moments[site].components[-4:]):
        mixed = span(rows.float() + 0.3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(1)))
        images, channels = {site: Image(mixed, moments[site].mean)}, {site: range(4)}
        drawn = random_image(images, channels, moments, torch.Generator().manual_seed(0))
        assert moments[site].share(drawn[site].basis) == pytest.approx(moments[site].share(mixed), abs=2e-4)
    assert (variances[:4].sum() / variances.sum()).item() > 2 * 4 / 32


def test_from_the_whole_space_nothing_is_left_to_draw(bridges, moments) -> None:
    whole = circuit_of({"1.mlp.act_in": range(32)})
    images, channels = image_of(whole, bridges, moments), channels_read(whole, bridges.sites)
    assert random_image(images, channels, moments, torch.Generator()) is None


# --- what the model loses ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("row", FAMILIES)
def test_answers_of_the_last_positions_are_the_models_own(row) -> None:
    dense, batch = DenseModel(tiny_model(row)), pairs()
    expected = batch.logit_difference(dense.run(batch.ids).logits)
    torch.testing.assert_close(last_differences(dense, batch), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def found(llama, bridges, moments):
    prompts = {"task": pairs(), "other": pairs(8)}
    config = ImageConfig(random_subspaces=5, pairs=6, other_pairs=6)
    return measure_image(llama, bridges, SMALL, prompts, moments, text(9, 4), config)


def test_the_loss_of_the_task_is_measured(llama, bridges, moments, found) -> None:
    json.dumps(found, allow_nan=False)
    batch = pairs()
    before = last_differences(llama, batch)
    with removed(llama, image_of(SMALL, bridges, moments)):
        after, other = last_differences(llama, batch), last_differences(llama, pairs(8))
    assert found["accuracy_before"] == accuracy(before)
    assert found["accuracy"]["value"] == pytest.approx(accuracy(after))
    assert found["logit_difference"] == pytest.approx(after.mean().item(), rel=1e-4)
    assert found["margin_left"]["value"] == pytest.approx((after.mean() / before.mean()).item(), rel=1e-3)
    assert found["others"]["other"]["accuracy"] == accuracy(other)
    assert found["text_loss"] != found["text_loss_before"]


def test_the_p_value_counts_random_subspaces(found) -> None:
    controls = found["random_subspaces"]
    assert controls["count"] == 5
    assert (controls["p"] * 6) == pytest.approx(round(controls["p"] * 6))
    assert (controls["p"] == 1 / 6) == (found["logit_difference"] < controls["logit_difference_min"])
    assert 0 < controls["overlap_mean"] < 0.9


def test_what_cannot_be_measured_says_why(llama, bridges, moments) -> None:
    prompts, config = {"task": pairs()}, ImageConfig(random_subspaces=2)
    none = measure_image(llama, bridges, circuit_of({"0.attn.q": range(3)}), prompts, moments, text(), config)
    assert "reads no residual channel" in none["undefined"]
    whole = circuit_of({"1.mlp.act_in": range(32)})
    found = measure_image(llama, bridges, whole, prompts, moments, text(9, 2), config)
    assert "undefined" in found["random_subspaces"]
    assert "undefined" in found["selectivity"]
    assert math.isclose(found["sites"]["1.resid_mid"]["share_of_variance"], 1, rel_tol=1e-5)
    assert abs(found["logit_difference"]) < 1e-3  # sides of a pair answer alike, so the mean is nothing
