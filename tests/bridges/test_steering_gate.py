"""Gates on a planted task, and which strength and cut are chosen."""

import math

import pytest
import torch

from bridges.off_target import HeldOutText, steered
from bridges.steering import DIRECTIONS, Gate, Steering, flip_rate, half, told_apart
from bridges.steering_gate import GateConfig, Trial, choose, fit_steering
from bridges.tails import PromptTails
from extractor.sites import Site
from extractor.tasks import TaskBatch

SITE = Site(0, "resid_pre")
CONFIG = GateConfig()
STRENGTHS = (0.5, 1.0, 2.0, 8.0)


def planted(dense) -> tuple[PromptTails, torch.Tensor]:
    """One of two tokens, each with a direction of its own, and the vector from the one to the other.

    A prompt's answer is what the model says after it, its distractor what it says after its partner.
    """
    ids = torch.randint(20, 97, (8, 6), generator=torch.Generator().manual_seed(3)).repeat(2, 1)
    ids[:8, 4], ids[8:, 4] = 11, 12
    last = torch.full((16,), 5)
    with torch.no_grad():
        embedding = dense.model.get_input_embeddings().weight
        embedding[11, 3] += 4.0
        embedding[12, 7] += 4.0
        logits = dense.run(ids, record=False).logits[:, 5].log_softmax(-1)
    answer = (logits - logits.roll(8, 0)).argmax(-1)
    tails = PromptTails(dense, TaskBatch(ids, last, answer, answer.roll(8)))
    return tails, (embedding[12] - embedding[11]).detach()


def text(dense, seed: int = 5) -> HeldOutText:
    """Blocks in which neither token is."""
    return HeldOutText(dense, torch.randint(20, 97, (12, 24), generator=torch.Generator().manual_seed(seed)))


def fit(tails: PromptTails, vector: torch.Tensor, seen: HeldOutText | None, direction="clean") -> Trial:
    acts = told_apart(tails.batch, tails.resid[SITE])
    return fit_steering(vector, SITE, acts, tails, seen, direction, STRENGTHS, CONFIG)


@torch.no_grad()
def test_a_gate_fires_where_the_task_is_and_nowhere_else(dense) -> None:
    """Exactly: open on every edited token and on no other, so that KL on other text is 0 to the bit."""
    tails, vector = planted(dense)
    for direction, sign in zip(DIRECTIONS, (1, -1), strict=True):
        trial = fit(tails, sign * vector, text(dense), direction)
        gate, edited = trial.steering.gate, half(tails.batch, direction)
        is_open = gate.open(tails.resid[SITE])
        assert torch.equal(is_open, edited[:, None] & (torch.arange(6) == 4))
        assert (trial.kl, trial.share_of_tokens) == (0, 0)
        unseen = text(dense, seed=6).effect(trial.steering, trial.strength)
        assert (unseen.kl, unseen.loss_change, unseen.share_of_tokens) == (0, 0, 0)
        rates = [flip_rate(tails, d, direction) for d in steered(tails, trial.steering, trial.strength)]
        assert rates == [trial.flip_rate, trial.flip_rate_indirect]
        assert trial.flip_rate > 0


@torch.no_grad()
def test_a_gate_that_sees_text_fires_on_less_of_it(dense) -> None:
    tails, vector = planted(dense)
    other = text(dense, seed=6)
    blind, seeing = (fit(tails, vector, seen) for seen in (None, text(dense)))
    shares = [other.effect(trial.steering, 1.0).share_of_tokens for trial in (blind, seeing)]
    assert shares[0] > 0.05
    assert shares[1] == 0
    assert "undefined" in blind.as_json()["train"]["kl"]


def test_where_no_prompt_is_answered_right_nothing_flips(dense) -> None:
    tails, vector = planted(dense)
    own = tails.batch
    tails = PromptTails(dense, TaskBatch(own.ids, own.last, own.distractor, own.answer))
    tails.unedited.clamp_(max=-1.0)
    trial = fit(tails, vector, text(dense))
    assert (trial.flip_rate, trial.flip_rate_indirect, trial.moved) == (0, 0, 0)


def test_text_that_the_edit_cannot_be_told_from_costs_kl(dense) -> None:
    """Where text is full of the edited token the gate cannot be both open and within the budget."""
    tails, vector = planted(dense)
    ids = torch.randint(20, 97, (12, 24), generator=torch.Generator().manual_seed(5))
    ids[:, ::2] = 11
    trial = fit(tails, 4 * vector, HeldOutText(dense, ids))
    assert trial.kl > CONFIG.kl_budget
    assert trial.share_of_tokens > 0.3
    assert trial.strength == min(STRENGTHS)  # it is given up there


def trial(strength: float, cut: float, rate: float, kl: float, moved: float = -1.0) -> Trial:
    return Trial(
        Steering(SITE, torch.ones(2), Gate(torch.ones(2), cut)), strength, cut, rate, rate, moved, kl, 0
    )


def test_the_least_strength_within_the_budget_that_reaches_the_goal_is_chosen() -> None:
    trials = [trial(1, 0.5, 0.7, 0.001), trial(2, 0.3, 0.9, 0.02), trial(2, 0.5, 0.85, 0.009)]
    assert choose([*trials, trial(4, 0.5, 1.0, 0.001)], CONFIG) is trials[2]


def test_below_the_goal_the_most_flips_within_the_budget_are_chosen() -> None:
    trials = [trial(1, 0.5, 0.3, 0.001), trial(2, 0.3, 0.7, 0.02), trial(2, 0.5, 0.5, 0.009)]
    assert choose(trials, CONFIG) is trials[2]
    still = [trial(1, 0.5, 0.0, 0.0, moved=-0.1), trial(2, 0.5, 0.0, 0.001, moved=-0.2)]
    assert choose(still, CONFIG) is still[1]


def test_a_gate_that_is_all_but_shut_is_not_chosen_for_its_kl() -> None:
    trials = [trial(1, 0.3, 1.0, 0.4), trial(1, 0.5, 0.95, 0.2), trial(1, 0.9, 0.1, 0.0)]
    assert choose(trials, CONFIG) is trials[1]
    assert choose([trial(1, 0.3, 1.0, math.inf), trials[1]], CONFIG) is trials[1]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_trial_is_json(strength) -> None:
    found = trial(strength, 0.5, 0.5, math.inf).as_json()
    assert "undefined" in found["train"]["kl"]
    assert (found["strength"], found["cut"], found["threshold"]) == (strength, 0.5, 0.5)
