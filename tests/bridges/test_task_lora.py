"""The trained LoRA: PEFT's layer in the real model against the delta that the curves use."""

import pytest
import torch

from bridges.dense import DenseModel
from bridges.steering import half
from bridges.tails import PromptTails
from bridges.task_lora import TaskLora, TaskLoraConfig, train_lora
from extractor.errors import InputError
from extractor.sites import Site
from extractor.tasks import TaskBatch
from tests.families import tiny_model

SITES = ("0.resid_pre", "0.resid_mid", "1.resid_pre", "1.resid_mid")
CONFIG = TaskLoraConfig(steps=25, prompts_per_step=4, learning_rate=0.03)


@pytest.fixture
def tails(dense: DenseModel) -> PromptTails:
    """Eight pairs of several lengths that differ in one token; the answers are what the model says."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 97, (8, 9), generator=generator).repeat(2, 1)
    ids[:8, 4], ids[8:, 4] = 11, 12
    last = torch.tensor([8, 7, 6, 5] * 4)
    logits = dense.run(ids, record=False).logits[torch.arange(16), last]
    top = logits.topk(2).indices
    return PromptTails(dense, TaskBatch(ids, last, top[:, 0], top[:, 1]))


def randomised(lora: TaskLora) -> TaskLora:
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return lora


@torch.no_grad()
@pytest.mark.parametrize("row", ["GPT-2", "OPT", "Llama", "Gemma", "Granite", "GPT-NeoX, Pythia (parallel)"])
def test_installed_it_does_what_its_delta_says_and_at_scale_0_nothing(row: str, tokens) -> None:
    dense = DenseModel(tiny_model(row))
    plain = dense.run(tokens)
    for site in dense.sites:
        lora = randomised(TaskLora(dense, site, rank=3))
        with lora.installed(0.0):
            assert torch.equal(dense.run(tokens, record=False).logits, plain.logits)
        delta = lora.delta(lora.inputs(tokens))
        assert delta.abs().max() > 1e-2
        assert torch.linalg.matrix_rank(delta.flatten(0, 1), rtol=1e-4) <= 3
        with lora.installed(1.7):
            run = dense.run(tokens)
        scale = plain.resid[site].abs().max()
        torch.testing.assert_close(
            run.resid[site], plain.resid[site] + 1.7 * delta, atol=1e-5 * scale, rtol=1e-5
        )
        expected = dense.run_from(site, plain.resid[site] + 1.7 * delta)
        torch.testing.assert_close(run.logits, expected, atol=1e-3, rtol=1e-4)
        assert torch.equal(dense.run(tokens, record=False).logits, plain.logits)


@pytest.mark.parametrize("name", SITES)
def test_training_flips_the_half_that_it_is_trained_on(dense, tails, name: str) -> None:
    site = Site.parse(name)
    for direction in ("clean", "corrupted"):
        lora = train_lora(tails, site, 2, direction, CONFIG)
        mine = half(tails.batch, direction)
        with torch.no_grad(), lora.installed() as model:
            difference = tails.batch.logit_difference(model(tails.batch.ids).logits)
        assert (tails.unedited[mine] > 0).all()
        assert (difference[mine] < 0).float().mean() >= 0.75
        assert lora.losses[-1] < 0.75 * lora.losses[0]


def test_untrained_it_adds_nothing_and_training_depends_on_the_seed_alone(dense, tails) -> None:
    site, state = Site(1, "resid_mid"), torch.random.get_rng_state()
    untrained = train_lora(tails, site, 2, "clean", TaskLoraConfig(steps=0))
    inputs = untrained.inputs(tails.batch.ids)
    assert not untrained.delta(inputs).any()
    deltas = [
        train_lora(tails, site, 2, "clean", TaskLoraConfig(steps=3), seed).delta(inputs) for seed in (5, 5, 6)
    ]
    assert torch.equal(deltas[0], deltas[1])
    assert not torch.allclose(deltas[0], deltas[2], atol=1e-4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in dense.model.parameters())


def test_a_family_whose_writes_pass_a_norm_is_refused() -> None:
    with pytest.raises(InputError, match="passes a norm"):
        TaskLora(DenseModel(tiny_model("OLMo 2")), Site(1, "resid_mid"), rank=2)
