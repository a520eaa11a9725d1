"""Size against loss: cuts of a mask's order, counted and measured as circuits are."""

import math

import pytest

from extractor.circuit import edges_between
from extractor.masks import mean_activations
from extractor.prune import PruneConfig, search_masks, task_settings
from extractor.size_curve import count_kept_edges, geometric_mean, size_at, size_curve
from tests.extractor.test_circuits import PLANTED, planted_student, planted_task


@pytest.fixture(scope="module")
def searched():
    student = planted_student()
    train, selection = planted_task(64, 0), planted_task(64, 1)
    means = mean_activations(student, train.ids)
    config = PruneConfig(pairs_per_step=32, seeds=(0, 1))
    return student, search_masks(student, task_settings(student, train, selection, config), means, config)


def test_the_curve_falls_to_the_planted_circuit(searched) -> None:
    student, search = searched
    curve = size_curve(student, search, planted_task(64, 2))
    by_target = {row["target_loss"]: row for row in curve["targets"]}
    assert by_target[0.15]["nodes"] == len(PLANTED)
    assert by_target[0.15]["edges"] == 4
    assert by_target[0.5]["edges"] <= by_target[0.15]["edges"]
    smaller = [cut for cut in curve["cuts"] if cut["nodes"] < len(PLANTED)]
    assert all(cut["loss"] > 0.15 for cut in smaller)


def test_edges_are_counted_as_they_are_listed(searched) -> None:
    student, search = searched
    for index in range(2):
        kept = search.masks.of_nodes(search.found[index].tau > -0.9)
        listed = edges_between(student, search.masks.nodes(kept))
        assert count_kept_edges(student, search.masks, kept) == len(listed)


def test_a_target_that_no_cut_reaches_has_no_size() -> None:
    cuts = [{"nodes": 3, "edges": 2, "loss": 0.4}, {"nodes": 9, "edges": 7, "loss": 0.2}]
    assert size_at(cuts, 0.5) == {"target_loss": 0.5, "nodes": 3, "edges": 2}
    assert size_at(cuts, 0.3)["edges"] == 7
    assert "undefined" in size_at(cuts, 0.1)


def test_the_mean_of_sizes_is_geometric() -> None:
    assert math.isclose(geometric_mean([10, 1000]), 100)
    assert math.isclose(geometric_mean([0, 100]), 10)
