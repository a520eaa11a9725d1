"""Monitors: AUROC by its definition, the same scores however the model runs, and whose checkpoint it is."""

import math

import pytest
import torch

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from bridges.evaluate import measure_energies_
from bridges.monitor import Monitor, MonitorConfig, MonitorHashes, conformal_threshold
from bridges.monitor_quality import measure_monitor, preceded_by_text
from bridges.readout import auroc, auroc_influence, difference_of_means, last_streams, logistic_probe
from bridges.warm_start import StudentShape, make_student
from extractor.cache_name import CACHE_NAME, cache_of
from extractor.circuit import Circuit
from extractor.errors import InputError
from extractor.rotation import RotationConfig
from extractor.sites import Node, Recorder
from extractor.student import Student
from extractor.tasks import TaskBatch
from tests.conftest import tiny_gpt2
from tests.families import tiny_model

CONFIG = MonitorConfig(false_alarm_rate=0.2)
GENERATE = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 5}


def pairs(seed: int = 4, count: int = 12) -> TaskBatch:
    """Pairs that differ in their last token; lengths differ by one."""
    ids = torch.randint(3, 90, (count, 14), generator=torch.Generator().manual_seed(seed)).repeat(2, 1)
    last = torch.tensor([12 + i % 2 for i in range(count)]).repeat(2)
    ids[torch.arange(2 * count), last] = torch.tensor([91, 92]).repeat_interleave(count)
    answer = torch.full((count,), 5)
    cluster = (torch.arange(count) // 3).repeat(2)
    return TaskBatch(ids, last, torch.cat([answer, answer + 1]), torch.cat([answer + 1, answer]), cluster)


def circuit(*nodes: str) -> Circuit:
    return Circuit("brackets", frozenset(map(Node.parse, nodes)), (), "none", {})


WHOLE = circuit(*(f"1.{kind}:{c}" for kind in ("attn.act_in", "mlp.act_in") for c in range(16)))


def exact(dense: DenseModel) -> tuple[Student, BridgeSet]:
    student, bridges = make_student(dense, StudentShape(), RotationConfig(enabled=False))
    measure_energies_(dense, student, bridges, pairs().ids)
    return student, bridges


@pytest.fixture
def monitor(dense) -> Monitor:
    return Monitor.fit(dense, *exact(dense), WHOLE, pairs(), pairs(5), CONFIG)


# --- AUROC -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000])
def test_auroc_is_the_share_of_pairs_in_the_right_order(levels) -> None:
    scores = torch.randint(levels, (40,), generator=torch.Generator().manual_seed(levels)).float()
    clean, corrupted = scores.chunk(2)
    by_pairs = [(a > b) + 0.5 * (a == b) for a in clean.tolist() for b in corrupted.tolist()]
    assert auroc(scores) == pytest.approx(sum(by_pairs) / len(by_pairs), abs=1e-12)
    assert auroc_influence(scores).mean().item() == pytest.approx(auroc(scores), abs=1e-12)
    assert auroc(torch.cat([corrupted, clean])) == pytest.approx(1 - auroc(scores), abs=1e-12)


def test_the_variance_of_the_influence_is_delongs() -> None:
    """The variance of the AUROC of unpaired prompts (DeLong 1988), from its placement values."""
    scores = torch.randn(60, generator=torch.Generator().manual_seed(1))
    clean, corrupted = scores.chunk(2)
    above = (clean[:, None] > corrupted).double()
    v10, v01 = above.mean(1), above.mean(0)
    covariance = ((v10 - v10.mean()) * (v01 - v01.mean())).sum() / 29  # prompt i is paired with i + n
    delong = (v10.var() + v01.var() + 2 * covariance) / 30
    assert (auroc_influence(scores).var() / 30).item() == pytest.approx(delong.item(), rel=1e-9)


# --- linear probes -----------------------------------------------------------------------------------------


def test_the_probe_is_at_the_minimum_of_its_loss() -> None:
    streams = torch.randn(30, 6, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 7)
    streams[:15, 2] += 1.0
    direction = logistic_probe(streams, 0.7).direction
    inputs = streams.double()
    deviation = inputs.std(0, correction=0)
    inputs = (inputs - inputs.mean(0)) / deviation
    weights, bias = (direction * deviation).requires_grad_(), torch.zeros((), dtype=torch.double)
    side = torch.cat([torch.ones(15), -torch.ones(15)])
    for _ in range(200):  # the bias is free: Newton finds it for these weights
        p = torch.sigmoid(inputs @ weights.detach() + bias)
        bias = bias - (p - (side + 1) / 2).sum() / (p * (1 - p)).sum()
    loss = torch.nn.functional.softplus(-side * (inputs @ weights + bias)).sum()
    (loss + 0.35 * weights.square().sum()).backward()
    assert weights.grad.abs().max() < 1e-3
    assert weights.detach().norm() > 0.1


def test_a_constant_channel_says_nothing_to_a_probe() -> None:
    streams = torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
    streams[:, 1] = 7.0
    assert logistic_probe(streams, 1.0).direction[1] == 0
    assert difference_of_means(streams).direction[1] == 0


# --- the monitor -------------------------------------------------------------------------------------------


def test_it_reads_what_the_student_reads(dense, monitor) -> None:
    """Through an exact bridge, at every token."""
    student, _ = exact(dense)
    ids = pairs(7).ids
    recorder = Recorder(monitor.site.read_address)
    with torch.no_grad():
        student(ids, tap=recorder)
    reads = recorder[monitor.site.read_address][..., [node.channel for node in monitor.nodes]]
    torch.testing.assert_close(monitor.score(ids), reads @ monitor.weights, atol=1e-3, rtol=1e-3)


def test_it_tells_unseen_prompts_apart(monitor) -> None:
    assert auroc(monitor.of_prompts(pairs())) > 0.95
    assert auroc(monitor.of_prompts(pairs(11))) > 0.9
    batch = pairs(11)
    rows = torch.arange(len(batch))
    at_last = monitor.score(batch.ids)[rows, batch.last]
    torch.testing.assert_close(monitor.of_prompts(batch), at_last, atol=1e-4, rtol=1e-4)


def test_nothing_but_the_sides_gives_the_sign(dense) -> None:
    """Sides exchanged, the same nodes have the other sign."""
    parts, batch = exact(dense), pairs()
    half = torch.arange(len(batch)).roll(len(batch) // 2)
    swapped = TaskBatch(*(getattr(batch, name)[half] for name in batch.__dataclass_fields__))
    one, other = (Monitor.fit(dense, *parts, WHOLE, b, b, CONFIG) for b in (batch, swapped))
    assert one.nodes == other.nodes
    torch.testing.assert_close(one.weights, -other.weights)


def test_written_channels_are_read_at_the_next_site(dense) -> None:
    monitor = Monitor.fit(dense, *exact(dense), circuit("0.attn.resid_delta:3"), pairs(), pairs(5), CONFIG)
    assert [str(node) for node in monitor.nodes] == ["0.mlp.act_in:3"]
    assert str(monitor.site) == "0.resid_mid"


def test_a_circuit_without_residual_channels_is_refused(dense) -> None:
    with pytest.raises(InputError, match="no residual channel"):
        Monitor.fit(dense, *exact(dense), circuit("0.attn.q:1"), pairs(), pairs(5), CONFIG)


@pytest.mark.parametrize("row", ["GPT-2", "Llama", "OPT", "GPT-NeoX, Pythia (parallel)"])
def test_under_generate_it_scores_as_on_the_whole_sequence(row) -> None:
    dense = DenseModel(tiny_model(row))
    monitor = Monitor.fit(dense, *exact(dense), WHOLE, pairs(), pairs(5), CONFIG)
    prompt = pairs(7).ids[:3]
    found = {}
    for use_cache in (True, False):
        with monitor.watching() as watch:
            text = dense.model.generate(prompt, use_cache=use_cache, **GENERATE)
        found[use_cache] = watch.scores
    whole = monitor.score(text)
    assert found[True].shape == (3, text.shape[1] - 1)  # the last token is not read
    for scores in found.values():
        torch.testing.assert_close(scores, whole[:, :-1], atol=1e-3, rtol=1e-3)


def test_watching_changes_nothing_and_leaves_no_hook(dense, monitor) -> None:
    ids = pairs(7).ids
    before = dense.model(ids).logits
    with monitor.watching():
        assert torch.equal(dense.model(ids).logits, before)
    assert not dense.model._forward_pre_hooks
    assert not any(module._forward_pre_hooks for module in dense.model.modules())


def test_padding_raises_no_alarm(dense, monitor) -> None:
    ids, mask = pairs(7).ids[:2], torch.ones(2, 14, dtype=torch.long)
    ids, mask = ids.clone(), mask.clone()
    mask[0, :4] = 0
    with monitor.watching() as watch:
        dense.model.generate(ids, attention_mask=mask, **GENERATE)
    padding = torch.zeros_like(watch.alarms)
    padding[0, :4] = True
    assert not watch.alarms[padding].any()
    assert torch.equal(watch.alarms[~padding], (watch.scores > monitor.threshold)[~padding])


def test_a_cache_from_before_is_refused(dense, monitor) -> None:
    ids = pairs(7).ids
    cache = cache_of(dense.model(ids[:, :6], use_cache=True))
    with pytest.raises(InputError, match="before the prompt"), monitor.watching():
        dense.model(ids[:, 6:], **{CACHE_NAME: cache})


# --- the threshold -----------------------------------------------------------------------------------------


def test_the_false_alarm_rate_holds_for_the_next_prompt() -> None:
    """Over random splits: the share of further prompts above the threshold is the stated rate."""
    draw = torch.Generator().manual_seed(0)
    alarms = []
    for _ in range(4000):
        scores = torch.rand(40, generator=draw)
        threshold = conformal_threshold(scores[:38], 0.1)
        alarms.append(float(scores[39] > threshold))
    assert sum(alarms) / len(alarms) == pytest.approx(0.1, abs=0.015)


def test_the_threshold_of_sides_apart_is_half_way() -> None:
    scores = torch.cat([torch.arange(100.0, 119), torch.arange(19.0)])
    assert conformal_threshold(scores, 0.05) == (18 + 100) / 2
    assert conformal_threshold(scores, 0.5) == (9 + 109) / 2
    assert conformal_threshold(-scores, 0.05) == 0  # clean ones are below: no nearer to them


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25])
def test_too_few_prompts_for_a_rate_are_refused(rate) -> None:
    least = math.ceil(1 / rate - 1 - 1e-9)
    conformal_threshold(torch.rand(2 * least), rate)
    with pytest.raises(InputError, match=f"at least {least} calibration pairs"):
        conformal_threshold(torch.rand(2 * least - 2), rate)


# --- files -------------------------------------------------------------------------------------------------


def test_a_loaded_monitor_scores_the_same(monitor, dense, tmp_path) -> None:
    hashes = MonitorHashes(dense.sha256, "b" * 64, "c" * 64, "d" * 64)
    monitor = Monitor(**{**vars(monitor), "hashes": hashes})
    monitor.save(tmp_path / "monitor", {"note": 1})
    again = Monitor.load(tmp_path / "monitor", dense)
    assert (again.nodes, again.threshold, again.hashes) == (monitor.nodes, monitor.threshold, hashes)
    assert torch.equal(again.score(pairs().ids), monitor.score(pairs().ids))


def test_another_checkpoint_and_damage_are_refused(monitor, dense, tmp_path) -> None:
    monitor.save(tmp_path / "monitor", {})
    with pytest.raises(InputError, match="another|made for"):
        Monitor.load(tmp_path / "monitor", DenseModel(tiny_gpt2(), sha256="e" * 64))
    (tmp_path / "monitor" / "monitor.safetensors").write_bytes(b"none")
    with pytest.raises(InputError, match="damaged"):
        Monitor.load(tmp_path / "monitor", dense)


# --- how good it is ----------------------------------------------------------------------------------------


def test_its_measure(monitor, dense, tokens) -> None:
    held_out = pairs(11)
    found = measure_monitor(monitor, pairs(), {"held_out": held_out}, tokens, CONFIG)
    own = found["prompts"]["held_out"]
    scores = monitor.of_prompts(held_out)
    assert own["auroc"]["value"] == pytest.approx(auroc(scores))
    assert own["false_alarm_rate"]["value"] == pytest.approx(
        (scores[12:] > monitor.threshold).float().mean().item()
    )
    probe = logistic_probe(last_streams(dense, pairs(), [monitor.site])[monitor.site], CONFIG.probe_ridge)
    theirs = auroc(probe(last_streams(dense, held_out, [monitor.site])[monitor.site]))
    assert own["logistic_probe"]["auroc"]["value"] == pytest.approx(theirs)
    assert own["logistic_probe"]["monitor_minus_probe"]["value"] == pytest.approx(auroc(scores) - theirs)
    alarms = (monitor.score(tokens) > monitor.threshold).float().mean().item()
    assert found["share_of_text_tokens_with_alarm"] == pytest.approx(alarms)


def test_its_cost_is_that_of_the_encoder(monitor, tokens) -> None:
    cost = measure_monitor(monitor, pairs(), {}, tokens, CONFIG)["cost"]
    nodes = len(monitor.nodes)
    assert cost["monitor_flop"] in (2 * 32 * 32, 2 * 32 * 32 + 2 * nodes)
    # matrix products of two blocks, of attention over 14 tokens, and of the head
    assert cost["dense_flop"] == 2 * (2 * 12 * 32 * 32 + 97 * 32) + 2 * 2 * 2 * 14 * 32


def test_text_before_a_pair_is_the_same_on_both_sides(tokens) -> None:
    batch, half = pairs(), 12
    shifted = preceded_by_text(batch, tokens, 5, 0)
    assert torch.equal(shifted.ids[:, 6:], batch.ids)
    assert torch.equal(shifted.last, batch.last + 6)
    assert torch.equal(shifted.ids[:half, :6], shifted.ids[half:, :6])
    assert (shifted.ids[:, 5] == 0).all()
    spans = {tuple(row) for row in tokens.unfold(1, 5, 5).flatten(0, 1).tolist()}
    assert {tuple(row) for row in shifted.ids[:, :5].tolist()} <= spans
