"""Planted circuits: each is the only one that solves its task, and extraction finds exactly it."""

import functools
from collections.abc import Collection

import pytest
import torch

from extractor.circuit import edges_between, keep_nodes
from extractor.compact import CompactStudent
from extractor.edges import EdgeGates
from extractor.masks import live_channels, mean_activations
from extractor.prune import PruneConfig, extract_circuit
from extractor.refine import RefineConfig
from extractor.sites import Node, Recorder, Tap, no_tap
from extractor.smallest import calibrate
from extractor.tasks import two_way_loss
from tests.extractor.planted import BUILDERS, Planted

CONFIG = PruneConfig(steps=80, pairs_per_step=16, refine=RefineConfig(enabled=True, steps=40))
GOAL = CONFIG.target_loss * CONFIG.selection_frac

every_planted = pytest.mark.parametrize("name", BUILDERS)


class Case:
    """A planted student with its means and held-out prompts, and losses on them."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.planted: Planted = BUILDERS[name]()
        self.student = self.planted.student
        self.means = mean_activations(self.student, self.planted.text())
        self.held_out = self.planted.prompts(24, seed=2)
        self.all_nodes = {Node(a, c) for a, mean in self.means.items() for c in range(len(mean))}

    @torch.no_grad()
    def differences(self, model, tap: Tap = no_tap) -> torch.Tensor:
        prompts = self.held_out
        logits = model(prompts.ids, logits_to_keep=prompts.last[:, None], tap=tap).logits
        return prompts.logit_difference(logits)

    def loss(self, nodes: Collection[Node], closed: Collection[tuple[Node, Node]] = ()) -> float:
        """Calibrated loss of the student as these nodes, without these edges."""
        gates = self._gates(frozenset(nodes))
        is_open = torch.tensor([float(pair not in closed) for pair in gates.pairs])
        logits = gates.logits(is_open, self.held_out.ids, self.held_out.last[:, None])
        difference = self.held_out.logit_difference(logits)
        return two_way_loss(calibrate(difference)(difference)).item()

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _gates(self, nodes: frozenset[Node]) -> EdgeGates:
        return EdgeGates(CompactStudent(self.student, live_channels(nodes), self.means), self.means)


case = functools.cache(Case)


@every_planted
def test_the_planted_circuit_solves_the_task_and_nothing_else_does(name: str) -> None:
    it, planted = case(name), case(name).planted
    assert (it.differences(it.student) > 3).all()
    between = {(edge.source, edge.target) for edge in edges_between(it.student, planted.nodes)}
    assert between == planted.edges | planted.idle
    assert it.loss(planted.nodes) < GOAL / 2
    assert it.loss(planted.nodes, closed=planted.idle) < GOAL / 2
    others = it.differences(it.student, keep_nodes(planted.nodes, it.means, complement=True))
    assert two_way_loss(calibrate(others)(others)) > 0.69


@every_planted
def test_no_planted_node_can_be_spared(name: str) -> None:
    it = case(name)
    for node in it.planted.nodes:
        without = it.differences(it.student, keep_nodes([node], it.means, complement=True))
        assert two_way_loss(calibrate(without)(without)) > CONFIG.target_loss, node
        assert it.loss(it.planted.nodes - {node}, closed=it.planted.idle) > CONFIG.target_loss, node


@every_planted
def test_no_planted_edge_can_be_spared(name: str) -> None:
    it = case(name)
    for edge in it.planted.edges:
        assert it.loss(it.all_nodes, closed={edge}) > CONFIG.target_loss, edge
        assert it.loss(it.planted.nodes, closed={edge, *it.planted.idle}) > CONFIG.target_loss, edge


@every_planted
def test_other_nodes_carry_signal_on_text(name: str) -> None:
    it, text = case(name), case(name).planted.text()
    recorder, others = Recorder(*it.means), keep_nodes(it.planted.nodes, it.means, complement=True)
    with torch.no_grad():
        it.student(text, tap=recorder)
        logits = it.student(text, tap=others).logits
    assert (logits[..., 1] - logits[..., 2]).std() > 1  # of the answers, too
    for address, mean in it.means.items():
        free = [channel for channel in range(len(mean)) if Node(address, channel) not in it.planted.nodes]
        spread = recorder[address][..., free].flatten(0, 1).std(0)
        assert (spread > 0.1).float().mean() > 0.5, address


@pytest.mark.parametrize("name", ["ranked", "outranked"])
def test_planted_ranks_matter(name: str) -> None:
    it = Case(name)
    it.student.set_activation_frac(None)
    assert two_way_loss(it.differences(it.student)) > CONFIG.target_loss


@every_planted
def test_extraction_finds_exactly_the_planted_circuit(name: str) -> None:
    it, planted = case(name), case(name).planted
    train, selection = planted.prompts(64, seed=0), planted.prompts(20, seed=1)
    circuit = extract_circuit(it.student, name, train, selection, it.means, CONFIG, "none")
    assert set(map(str, circuit.nodes)) == set(map(str, planted.nodes))
    found = {f"{edge.source} -> {edge.target}" for edge in circuit.edges}
    assert found == {f"{source} -> {target}" for source, target in planted.edges}
    alone = circuit.calibration(it.differences(circuit.compact(it.student, it.means)))
    assert two_way_loss(alone) <= GOAL
    assert (alone > 0).all()
