"""Intervals that hold what they say, and p-values by hand."""

import math

import pytest
import torch

from extractor.statistics import holm, mean_interval, percentile, permutation_p, ratio_interval


def clustered(num_clusters: int, each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values around 0 whose clusters differ as much as their examples do."""
    generator = torch.Generator().manual_seed(seed)
    of_cluster = torch.randn(num_clusters, 1, generator=generator)
    values = (of_cluster + torch.randn(num_clusters, each, generator=generator)).flatten()
    return values, torch.arange(num_clusters).repeat_interleave(each)


def coverage(num_clusters: int, *, respects_clusters: bool) -> float:
    """Share of 120 samples whose interval holds the true mean, 0."""
    held = 0
    for seed in range(120):
        values, cluster = clustered(num_clusters, 16, seed)
        own = cluster if respects_clusters else torch.arange(len(values))
        found = mean_interval(values, own, seed=seed)
        held += found["low"] <= 0 <= found["high"]
    return held / 120


@pytest.mark.parametrize("num_clusters", [4, 20])
def test_intervals_hold_the_mean_as_often_as_they_say(num_clusters: int) -> None:
    assert coverage(num_clusters, respects_clusters=True) >= 0.88


def test_intervals_that_ignore_clusters_are_far_too_narrow() -> None:
    assert coverage(4, respects_clusters=False) < 0.6


def test_examples_of_one_cluster_are_no_further_evidence() -> None:
    values, cluster = clustered(12, 4, 0)
    once = mean_interval(values, cluster)
    often = mean_interval(values.repeat(8), cluster.repeat(8))
    assert once["method"] == often["method"] == "BCa"
    for key in ("value", "low", "high"):
        assert often[key] == pytest.approx(once[key], abs=1e-6)
    assert (once["clusters"], once["n"], often["n"]) == (12, 48, 384)


def test_bootstrap_depends_on_nothing_but_its_seed() -> None:
    values, cluster = clustered(12, 4, 1)
    shuffle = torch.randperm(48)
    assert mean_interval(values, cluster, seed=3) == mean_interval(values, cluster, seed=3)
    moved = mean_interval(values[shuffle], cluster[shuffle], seed=3)
    assert moved["low"] == pytest.approx(mean_interval(values, cluster, seed=3)["low"], abs=1e-6)


def test_few_clusters_give_students_t_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, standard error sqrt(14 / 3) / 2
    found = mean_interval(values, torch.arange(4))
    reach = 3.182446 * math.sqrt(14 / 3) / 2
    assert found["value"] == 3
    assert (found["low"], found["high"]) == pytest.approx((3 - reach, 3 + reach), abs=1e-5)
    assert "4 are too few" in found["method"]
    assert mean_interval(values, torch.arange(4), bounds=(0.0, 5.0))["low"] == 0


def test_a_ratio_is_that_of_the_means() -> None:
    top, bottom = torch.tensor([1.0, 3.0, 2.0, 2.0]), torch.tensor([2.0, 6.0, 5.0, 3.0])
    found = ratio_interval(top, bottom, torch.arange(4))
    assert found["value"] == pytest.approx(0.5)
    assert found["low"] < 0.5 < found["high"]
    exact = ratio_interval(bottom / 2, bottom, torch.arange(4))  # the same in every cluster
    assert exact["low"] == exact["high"] == pytest.approx(0.5)


@pytest.mark.parametrize("num_clusters", [3, 30])
def test_constant_data_says_that_bca_is_undefined(num_clusters: int) -> None:
    found = mean_interval(torch.ones(60), torch.arange(60) % num_clusters)
    assert (found["low"], found["high"]) == (1, 1)
    assert found["method"].startswith("percentile")


def test_what_has_no_value_says_why() -> None:
    one = mean_interval(torch.tensor([1.0, 2.0]), torch.tensor([7, 7]))
    assert one["value"] == 1.5
    assert "one cluster" in one["low"]["undefined"]
    assert "denominator" in ratio_interval(torch.ones(4), torch.zeros(4), torch.arange(4))["undefined"]
    assert "finite" in mean_interval(torch.tensor([1.0, math.nan]), torch.arange(2))["undefined"]
    assert "no examples" in mean_interval(torch.zeros(0), torch.zeros(0).long())["undefined"]


def test_permutation_p_counts_ties_against_the_circuit() -> None:
    controls = [float(i) for i in range(100)]
    assert permutation_p(-1.0, controls, "less") == 1 / 101
    assert permutation_p(0.0, controls, "less") == 2 / 101
    assert permutation_p(100.0, controls, "greater") == 1 / 101
    assert permutation_p(-1.0, controls, "greater") == 1
    assert permutation_p(5.0, [5.0 - 1e-8] * 9, "greater") == 1  # the same but for rounding
    assert "undefined" in permutation_p(0.0, [], "less")


def test_percentile_halves_ties() -> None:
    assert percentile(2.0, [1.0, 2.0, 3.0, 4.0], "greater") == 37.5
    assert percentile(2.0, [1.0, 2.0, 3.0, 4.0], "less") == 62.5
    assert percentile(5.0, [1.0, 2.0], "greater") == 100


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    reason = {"undefined": "no random controls were measured"}
    assert holm({"a": 0.02, "b": reason}) == {"a": 0.04, "b": reason}
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
