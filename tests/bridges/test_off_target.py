"""Off-target effects against the model's own forward under hooks."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bridges import off_target
from bridges.dense import DenseModel
from bridges.off_target import HeldOutText, nearby, other_tasks, steered
from bridges.steering import Gate, Steering
from bridges.tails import PromptTails
from extractor.sites import Site
from extractor.tasks import TaskBatch
from tests.families import tiny_model

SITES = [Site(0, "resid_pre"), Site(1, "resid_mid")]


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(1, 97, (7, 24), generator=torch.Generator().manual_seed(5))


def some_steering(dense: DenseModel, blocks: torch.Tensor, site: Site) -> Steering:
    """A vector that moves the logits, gated to about a tenth of the tokens."""
    generator = torch.Generator().manual_seed(6)
    vector, along = torch.randn(2, dense.width, generator=generator)
    reading = dense.run(blocks).resid[site] @ along
    return Steering(site, vector, Gate(along, reading.quantile(0.9).item()))


@torch.no_grad()
@pytest.mark.parametrize("row", ["GPT-2", "Llama", "GPT-NeoX, Pythia (parallel)"])
def test_kl_and_loss_are_those_of_the_model_under_the_hook(row, blocks) -> None:
    dense = DenseModel(tiny_model(row))
    text = HeldOutText(dense, blocks, batch_size=3)
    plain = dense.model(blocks).logits
    for site in [site for site in SITES if site in dense.sites]:
        gated = some_steering(dense, blocks, site)
        for steering in (gated, gated.ungated()):
            delta = steering.delta(dense.run(blocks).resid[site], 0.7)
            with dense.adding(site, delta) as model:
                logits = model(blocks, use_cache=False).logits
            kl = F.kl_div(logits.log_softmax(-1), plain.log_softmax(-1), log_target=True, reduction="none")
            kl, found = kl.sum(-1), text.effect(steering, 0.7)
            loss = [
                F.cross_entropy(x[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()) for x in (plain, logits)
            ]
            assert found.kl == pytest.approx(kl.mean().item(), rel=1e-3)
            assert found.kl > 1e-3
            torch.testing.assert_close(found.kl_by_block, kl.mean(1), atol=1e-5, rtol=1e-3)
            assert found.loss_change == pytest.approx((loss[1] - loss[0]).item(), abs=1e-5)
            assert found.perplexity_before == pytest.approx(loss[0].exp().item(), rel=1e-5)
            assert found.perplexity_after == pytest.approx(loss[1].exp().item(), rel=1e-5)
            near = [[bool(d[max(0, t - 8) : t + 1].any()) for t in range(24)] for d in delta]
            assert found.kl_near == pytest.approx(kl[torch.tensor(near)].mean().item(), rel=1e-3)
            assert found.share_of_tokens == pytest.approx(delta.any(-1).float().mean().item())
        assert text.effect(gated).share_of_tokens < 0.5


def test_strength_zero_changes_nothing_exactly(dense, blocks) -> None:
    text, tails = HeldOutText(dense, blocks), PromptTails(dense, prompts())
    for site in SITES:
        steering = some_steering(dense, blocks, site)
        for form in (steering, steering.ungated()):
            found = text.effect(form, 0.0)
            assert (found.kl, found.loss_change, found.share_of_tokens) == (0, 0, 0)
            assert found.perplexity_after == found.perplexity_before
            assert "undefined" in found.kl_near
            row = other_tasks({"t": tails}, form, 0.0)["t"]
            assert row["accuracy_after"] == row["accuracy_before"]
            assert row["change"]["value"] == 0


def test_a_reference_that_is_run_again_is_the_same_stream(dense, blocks, monkeypatch) -> None:
    """A vector too small for float32 leaves KL 0 although every block is run; so does forgetting nothing."""
    steering = some_steering(dense, blocks, SITES[1]).ungated()
    kept = HeldOutText(dense, blocks)
    assert kept.effect(steering, 1e-30).kl == pytest.approx(0, abs=1e-9)
    monkeypatch.setattr(off_target, "KEPT_VALUES", 0)
    again = HeldOutText(dense, blocks, batch_size=2)
    assert again.effect(steering).kl == pytest.approx(kept.effect(steering).kl, rel=1e-4)


def test_halves_of_a_text_are_texts_of_their_own(dense, blocks, monkeypatch) -> None:
    positions = torch.arange(24).expand(7, -1)
    for kept_values in (off_target.KEPT_VALUES, 0):
        monkeypatch.setattr(off_target, "KEPT_VALUES", kept_values)
        for at in (None, positions):
            halves = HeldOutText(dense, blocks, at, batch_size=3).halves
            for half, rows in zip(halves, (blocks[::2], blocks[1::2]), strict=True):
                own = HeldOutText(dense, rows, None if at is None else at[: len(rows)])
                for site in SITES:
                    steering = some_steering(dense, blocks, site)
                    assert half.effect(steering).kl == pytest.approx(own.effect(steering).kl, rel=1e-4)
                assert half.loss == pytest.approx(own.loss, rel=1e-5)


def test_a_gate_that_is_always_open_is_everywhere(dense, blocks) -> None:
    text, tails = HeldOutText(dense, blocks), PromptTails(dense, prompts())
    for site in SITES:
        everywhere = some_steering(dense, blocks, site).ungated()
        always = replace(everywhere, gate=Gate(torch.ones(dense.width), -math.inf))
        one, other = text.effect(always), text.effect(everywhere)
        assert one.as_json() == other.as_json()
        assert one.share_of_tokens == 1
        assert one.kl == one.kl_near > 0
        assert torch.equal(steered(tails, always)[0], steered(tails, everywhere)[0])


@torch.no_grad()
def test_other_tasks_answer_as_the_model_under_the_hook(dense, blocks) -> None:
    batch = prompts()
    tails = PromptTails(dense, batch)
    steering = some_steering(dense, blocks, SITES[1]).ungated()
    with dense.adding(steering.site, 20 * steering.vector) as model:
        after = batch.logit_difference(model(batch.ids, use_cache=False).logits)
    before = batch.logit_difference(dense.model(batch.ids).logits)
    row = other_tasks({"t": tails}, steering, 20.0)["t"]
    assert row["accuracy_before"] == (before > 0).float().mean().item()
    assert row["accuracy_after"] == (after > 0).float().mean().item() != row["accuracy_before"]
    assert row["change"]["value"] == pytest.approx(row["accuracy_after"] - row["accuracy_before"])
    torch.testing.assert_close(steered(tails, steering, 20.0)[0], after, atol=1e-3, rtol=1e-3)


def test_near_is_in_the_same_block_and_after() -> None:
    touched = torch.zeros(2, 12, dtype=torch.bool)
    touched[0, 2] = touched[0, 11] = True
    near = nearby(touched)
    assert near[0].tolist() == [False] * 2 + [True] * 10
    assert not near[1].any()


def test_a_steering_that_breaks_the_model_is_undefined_not_a_nan(dense, blocks) -> None:
    steering = some_steering(dense, blocks, SITES[0]).ungated().scaled(math.inf)
    found = HeldOutText(dense, blocks).effect(steering).as_json()
    assert "undefined" in found["kl"]
    assert "undefined" in found["kl_interval"]


def prompts() -> TaskBatch:
    """Pairs of several lengths; answers that the untrained model gets right about half of the time."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 97, (8, 10), generator=generator).repeat(2, 1)
    ids[:8, 4], ids[8:, 4] = 11, 12
    last = torch.tensor([9, 8, 7, 9, 9, 6, 9, 5]).repeat(2)
    answer = torch.randint(1, 48, (8,), generator=generator)
    return TaskBatch(ids, last, torch.cat([answer, answer + 48]), torch.cat([answer + 48, answer]))
