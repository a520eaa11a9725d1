"""Answers under a delta: the short way from a cache against the model's own forward, in every family."""

import pytest
import torch

from bridges.dense import DenseModel
from bridges.tails import PromptTails
from extractor.tasks import TaskBatch
from tests.families import TINY, tiny_model


def pairs_of_prompts(
    lengths: tuple[int, ...] = (20, 17, 14), places: tuple[int, ...] = (18, 9, 13)
) -> TaskBatch:
    """Pairs of several lengths that part at several places, right-padded with other tokens."""
    n = len(lengths)
    ids = torch.randint(3, 90, (n, 20), generator=torch.Generator().manual_seed(4)).repeat(2, 1)
    for i, (length, place) in enumerate(zip(lengths, places, strict=True)):
        ids[i, place], ids[n + i, place] = 91, 92
        ids[n + i, length:] = 1
    last = torch.tensor([length - 1 for length in lengths]).repeat(2)
    answer = torch.arange(5, 5 + n)
    return TaskBatch(ids, last, torch.cat([answer, answer + 20]), torch.cat([answer + 20, answer]))


def late_delta(tails: PromptTails, width: int) -> torch.Tensor:
    delta = torch.randn(*tails.batch.ids.shape, width, generator=torch.Generator().manual_seed(5))
    return delta * (torch.arange(delta.shape[1]) >= tails.start[:, None])[..., None]


SLIDING = {"Mistral (sliding window)", "Gemma 2", "Gemma 3 (text)", "OLMo 3", "StarCoder2", "gpt-oss",
           "GPT-Neo"}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("row", TINY)
def test_both_ways_give_the_models_own_answers(row) -> None:
    dense, batch = DenseModel(tiny_model(row)), pairs_of_prompts()
    tails = PromptTails(dense, batch)
    assert (tails.prefix is None) == (row in SLIDING)
    delta = late_delta(tails, dense.width)
    # Products of other shapes: on some CPUs their last bits differ.
    unedited = batch.logit_difference(dense.run(batch.ids).logits)
    torch.testing.assert_close(tails.unedited, unedited, atol=1e-4, rtol=1e-5)
    for site in dense.sites:
        found = [tails.differences(site, delta)]
        prefix, tails.prefix = tails.prefix, None
        found.append(tails.differences(site, delta))
        tails.prefix = prefix
        for indirect in (False, True):
            removed = delta if indirect else None
            logits = dense.run_from(site, tails.resid[site] + delta, removed=removed)
            expected = batch.logit_difference(logits)
            for both in found:
                torch.testing.assert_close(both[indirect], expected, atol=2e-3, rtol=1e-3)
        assert (expected - tails.unedited).abs().max() > 0.01


@torch.no_grad()
def test_a_delta_before_the_difference_takes_the_long_way(dense) -> None:
    tails = PromptTails(dense, pairs_of_prompts())
    site = dense.sites[1]
    everywhere = torch.randn(6, 20, dense.width, generator=torch.Generator().manual_seed(5))
    expected = tails.batch.logit_difference(dense.run_from(site, tails.resid[site] + everywhere))
    torch.testing.assert_close(tails.differences(site, everywhere)[0], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(tails.differences(site, late_delta(tails, dense.width))[0], expected, atol=1e-3)


@torch.no_grad()
def test_hooks_are_gone_afterwards(dense) -> None:
    batch = pairs_of_prompts()
    before = dense.model(batch.ids).logits
    tails = PromptTails(dense, batch)
    tails.differences(dense.sites[0], late_delta(tails, dense.width))
    assert torch.equal(dense.model(batch.ids).logits, before)


def test_gradients_pass_the_short_way(dense) -> None:
    tails = PromptTails(dense, pairs_of_prompts())
    site = dense.sites[1]
    gradients = []
    prefix = tails.prefix
    for kept in (prefix, None):
        tails.prefix = kept
        delta = late_delta(tails, dense.width).requires_grad_()
        (gradient,) = torch.autograd.grad(tails.differences(site, delta)[1].sum(), delta)
        gradients.append(gradient * (torch.arange(20) >= tails.start[:, None])[..., None])
    assert prefix is not None
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)
    assert gradients[0].abs().max() > 1e-3
