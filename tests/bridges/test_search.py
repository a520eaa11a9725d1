"""The search for few nodes where the best set is known: what must move together, be dropped, be exchanged."""

import math
from collections.abc import Callable, Collection, Sequence

import pytest
import torch

from bridges.choose import (
    Growth,
    edits_to_try,
    grow_edits,
    growth_facts,
    later_facts,
    unmet_in_training,
)
from bridges.dense import DenseModel
from bridges.evaluate import measure_energies_
from bridges.search import EditConfig, Outcome, SiteSearch, grow, swap
from bridges.steering_gate import GateConfig
from bridges.streams import PromptStreams
from bridges.warm_start import StudentShape, make_student
from extractor.circuit import Circuit
from extractor.errors import UsageError
from extractor.rotation import RotationConfig
from extractor.sites import Node, Site
from extractor.tasks import TaskBatch

AT_MLP = Site(0, "resid_mid")
CONFIG = EditConfig(max_size=4, nodes="student", swapped=2)


class Toy(SiteSearch):
    """A search whose loss is stated; what is promising is what lowers it most by itself."""

    def __init__(self, loss: Callable[[set[int]], float], size: int):
        self.loss, self.nodes = loss, range(size)
        self.along_path = self.promising([], size)

    def measure(self, chosen: Collection[int]) -> Outcome:
        loss = self.loss(set(chosen))
        return Outcome(loss, 1.0 if loss <= 0 else 0.0)

    def promising(self, chosen: Sequence[int], count: int) -> list[int]:
        left = [index for index in self.nodes if index not in chosen]
        return sorted(left, key=lambda index: self.loss({*chosen, index}))[:count]


def test_a_node_that_the_others_made_superfluous_is_dropped() -> None:
    def loss(chosen: set[int]) -> float:
        return 0.0 if {1, 2} <= chosen else 2.0 - 0.6 * (0 in chosen) - 0.5 * len(chosen & {1, 2})

    assert grow(Toy(loss, 5), 3, CONFIG.model_copy(update={"swapped": 0}))[-1] == [1, 2]


def test_a_node_is_exchanged_for_a_better_one() -> None:
    def loss(chosen: set[int]) -> float:
        return 0.0 if {1, 2} <= chosen else 3.0 - 1.0 * (0 in chosen) - 0.5 * len(chosen & {1, 2, 3})

    toy = Toy(loss, 5)
    assert set(swap(toy, [0, 1], CONFIG)) == {1, 2}
    assert swap(toy, [0, 1], CONFIG.model_copy(update={"swapped": 0})) == [0, 1]
    assert [set(chosen) for chosen in grow(toy, 2, CONFIG)] == [{0}, {1, 2}]


def test_exchanges_end_where_nothing_improves() -> None:
    toy = Toy(lambda chosen: 9.0 - len(chosen & {3, 4}), 6)
    assert set(swap(toy, [0, 1], CONFIG)) == {3, 4}
    assert [len(chosen) for chosen in grow(toy, 4, CONFIG)] == [1, 2, 3, 4]


@pytest.fixture
def two_together(dense: DenseModel, tokens: torch.Tensor):
    """The answer turns when channels 5 and 9 both move; channels 0 to 3 each move it a little, for nothing.

    It hangs on the sign of the sum of channels 5, 7 and 9, in a step: two neurons of which one is taken off.
    """
    up = torch.zeros(32)
    up[[5, 7, 9]] = 4.0
    up[:4] = 0.8
    with torch.no_grad():
        for block in dense.model.transformer.h:
            for part in (block.attn.c_proj, block.mlp.c_proj, block.mlp.c_fc):
                part.weight.zero_()
                part.bias.zero_()
        dense.model.transformer.h[0].ln_2.weight.fill_(1.0)
        dense.model.transformer.h[0].ln_2.bias.zero_()
        dense.model.transformer.wpe.weight.zero_()
        dense.model.transformer.wte.weight[11] = up
        dense.model.transformer.wte.weight[12] = -up
        mlp = dense.model.transformer.h[0].mlp
        turn = 20 * (dense.model.lm_head.weight[21] - dense.model.lm_head.weight[22])
        mlp.c_fc.weight[[5, 7, 9], :2] = 1.0
        mlp.c_fc.bias[:2] = torch.tensor([1.5, -1.5])
        mlp.c_fc.weight[:4, 2:4] = torch.tensor([1.0, -1.0])
        mlp.c_proj.weight[:4] = torch.tensor([[1.0], [-1.0], [0.1], [-0.1]]) * turn
        mlp.c_proj.bias.copy_(-1.5 * turn)
    student, bridges = make_student(dense, StudentShape(), RotationConfig(enabled=False))
    measure_energies_(dense, student, bridges, tokens)
    ids = torch.tensor([[11]] * 4 + [[12]] * 4)
    answer = torch.tensor([21] * 4 + [22] * 4)
    batch = TaskBatch(ids, torch.zeros(8).long(), answer, answer.roll(4))
    return PromptStreams(dense, student, bridges, batch), bridges


def test_two_nodes_that_only_act_together_are_found(two_together) -> None:
    streams, bridges = two_together
    nodes = [Node("0.mlp.act_in", channel) for channel in range(12) if channel != 7]
    search = SiteSearch(streams, nodes, AT_MLP, bridges)

    def loss(*channels: int) -> float:
        return search.measure([nodes.index(Node("0.mlp.act_in", channel)) for channel in channels]).loss

    assert (streams.unedited > 0).all()
    assert loss(0) < loss() < loss(5)  # alone it moves the answer the wrong way
    assert loss(0, 1) < loss(0, 5)
    assert search.measure([0, 1, 2, 3]).rate == 0
    assert {5, 9}.isdisjoint(
        nodes[index].channel for index in search.promising([], 4)[::2]
    )  # by effect alone
    circuit = Circuit("t", frozenset(nodes), (), "sha", {})
    config = EditConfig(max_size=2, candidates=2)
    edit = edits_to_try(grow_edits(streams, circuit, bridges, config), config)[0].edit(bridges)
    assert set(edit.nodes) == {Node("0.mlp.act_in", 5), Node("0.mlp.act_in", 9)}


def test_the_first_order_effects_are_derivatives_of_what_is_measured(two_together) -> None:
    streams, bridges = two_together
    nodes = [Node("0.mlp.act_in", channel) for channel in range(12)]
    search = SiteSearch(streams, nodes, AT_MLP, bridges, 0.7)
    beside, step = search.delta([5]), 1e-2
    effects = search._effects(beside)
    for index in (0, 7, 9):
        with torch.no_grad():
            ends = [
                search._objective(streams.differences(AT_MLP, beside + share * search.delta([index]))[1])
                for share in (step, -step)
            ]
        assert effects[index].item() == pytest.approx((ends[0] - ends[1]).item() / (2 * step), abs=2e-3)


def test_only_the_sites_that_are_named_and_the_later_ones(two_together) -> None:
    streams, bridges = two_together
    nothing = Circuit("t", frozenset(), (), "sha", {})
    config = CONFIG.model_copy(update={"sites": ("0.resid_pre",), "sites_tried": 4, "later_max_size": 3})
    growths = grow_edits(streams, nothing, bridges, config)
    assert {str(growth.site) for growth in growths} == {"0.resid_pre"}
    assert "undefined" in later_facts(growths, streams, bridges, config, 0)
    config = config.model_copy(update={"sites": ()})
    growths = grow_edits(streams, nothing, bridges, config)
    later = later_facts(growths, streams, bridges, config, 0)
    assert later["site"] != "0.resid_pre"
    assert later["size"] == len(later["nodes"]) <= 3
    assert later["strength"] == 1
    assert 0 <= later["flip_rate_indirect"] <= 1
    with pytest.raises(UsageError, match=r"no bridge at '0.resid_end'; there are 0.resid_pre, 0.resid_mid"):
        grow_edits(streams, nothing, bridges, config.model_copy(update={"sites": ("0.resid_end",)}))


def test_every_strength_has_its_smallest_and_its_best(two_together) -> None:
    streams, bridges = two_together
    nodes = frozenset(Node("0.mlp.act_in", channel) for channel in range(4))  # which turn nothing
    circuit = Circuit("t", nodes, (), "sha", {})
    growths = grow_edits(streams, circuit, bridges, CONFIG.model_copy(update={"nodes": "circuit"}))
    assert [growth.strength for growth in growths] == [1.0, 2.0]
    facts = growth_facts(growths, streams, circuit, bridges, CONFIG)
    assert "undefined" in facts["smallest"]["1"]
    assert list(facts["all_channels"]) == [str(site) for site in bridges.sites]
    assert facts["best"]["1"]["reached"] is False
    assert set(facts["best"]["1"]["flip_rate_indirect"]) == {"1", "2"}
    for row in facts["growth"]:
        (rates,) = row["flip_rate_indirect"].values()
        assert len(rates) == len(row["sets"]) == len(row["nodes"])


def test_edits_are_tried_by_strength_then_goal_then_size() -> None:
    def growth(site: Site, at_one: list[float], at_two: list[float]) -> Growth:
        nodes = [Node(site.read_address, channel) for channel in range(len(at_one))]
        sets = tuple(tuple(nodes[: size + 1]) for size in range(len(nodes)))
        return Growth(site, 1.0, sets, {1.0: at_one, 2.0: at_two})

    first, later = Site(0, "resid_pre"), Site(1, "resid_mid")
    growths = [growth(first, [0.5, 0.95], [0.96, 1.0]), growth(later, [0.2, 0.8, 0.92], [0.3, 0.85, 0.95])]
    tried = edits_to_try(growths, EditConfig(goal=0.9, enough=0.8))
    assert [(one.growth.site, one.size, one.strength, one.reached) for one in tried] == [
        (first, 2, 1.0, True),
        (later, 3, 1.0, True),
        (later, 2, 1.0, False),  # enough; at strength 2 the same two nodes are not tried again
        (first, 1, 2.0, True),
    ]
    assert edits_to_try([growth(first, [0.1], [0.2])], EditConfig())[0].size == 1  # what flips most
    assert edits_to_try([], EditConfig()) == []


def test_what_speaks_against_an_edit_is_ordered() -> None:
    def unmet(kl: float, push: float, flips: float) -> tuple[float, float, bool]:
        return unmet_in_training(kl, push, flips, EditConfig(control_limit=0.05), GateConfig(kl_budget=0.01))

    good = unmet(0.009, 0.05, 0.8)
    assert not any(good)
    assert unmet(0.019, 0.0, 0.8) == unmet(0.011, 0.05, 0.8)  # one budget more, and a push within its limit
    in_order = [
        good,
        unmet(0.0, 0.0, 0.1),  # a shut gate
        unmet(0.0, 0.06, 0.8),
        unmet(0.0, 0.2, 0.8),
        unmet(0.011, 0.0, 0.8),
        unmet(0.021, 0.0, 0.8),
        unmet(math.inf, 0.0, 0.8),
    ]
    assert in_order == sorted(in_order)
    assert len(set(in_order)) == len(in_order)
