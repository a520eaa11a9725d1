"""Closed edges carry means: against a student whose weights and biases are changed by hand."""

import copy
import random

import pytest
import torch

from extractor.circuit import Circuit, edges_between, keep_nodes
from extractor.compact import CompactStudent
from extractor.edges import EdgeGates
from extractor.masks import live_channels, mean_activations
from extractor.refine import drop_spare, in_use, open_enough
from extractor.sites import Node
from tests.extractor.test_compact import KINDS, some_nodes, student_of

ENDS = {
    "q_proj": ("attn.act_in", "attn.q"),
    "k_proj": ("attn.act_in", "attn.k"),
    "v_proj": ("attn.act_in", "attn.v"),
    "o_proj": ("attn.v", "attn.resid_delta"),
    "up_proj": ("mlp.act_in", "mlp.post_act"),
    "gate_proj": ("mlp.act_in", "mlp.post_act"),
    "down_proj": ("mlp.post_act", "mlp.resid_delta"),
}


def with_closed(student, closed: set[tuple[Node, Node]], means):
    """The student with these edges moved into biases, weight by weight."""
    changed = copy.deepcopy(student)
    for index, layer in enumerate(changed.layers):
        for name, module in [*layer.attn.named_children(), *layer.mlp.named_children()]:
            if name not in ENDS or module is None:
                continue
            read, written = ENDS[name]
            for row in range(module.out_features):
                for column in range(module.in_features):
                    channel = column
                    if name == "o_proj":  # a v channel serves every query head of its group
                        head, within = divmod(column, layer.attn.head_dim)
                        channel = head // layer.attn.group_size * layer.attn.head_dim + within
                    source = Node(f"{index}.{read}", channel)
                    if (source, Node(f"{index}.{written}", row)) in closed:
                        with torch.no_grad():
                            module.bias[row] += module.weight[row, column] * means[source.address][channel]
                            module.weight[row, column] = 0
    return changed


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_edge_is_a_weight_in_the_bias(kind: str, tokens) -> None:
    student = student_of(kind)
    means = mean_activations(student, tokens)
    nodes = some_nodes(means, 0.25)
    gates = EdgeGates(CompactStudent(student, live_channels(nodes), means), means)
    rng = random.Random(0)
    kept = [pair for pair in gates.pairs if rng.random() < 0.5]
    expected = with_closed(student, set(gates.pairs) - set(kept), means)
    logits, tap = gates.close_(kept)(tokens).logits, keep_nodes(nodes, means)
    torch.testing.assert_close(logits, expected(tokens, tap=tap).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, student(tokens, tap=tap).logits, atol=1e-3)


def test_edges_of_a_compact_model_are_those_between_its_nodes(student, tokens) -> None:
    means = mean_activations(student, tokens)
    nodes = some_nodes(means, 0.25)
    gates = EdgeGates(CompactStudent(student, live_channels(nodes), means), means)
    assert set(gates.pairs) == {(edge.source, edge.target) for edge in edges_between(student, nodes)}


def test_a_circuit_runs_with_its_own_edges_only(student, tokens, tmp_path) -> None:
    means = mean_activations(student, tokens)
    nodes = frozenset(some_nodes(means, 0.25))
    edges = edges_between(student, nodes)
    some, others = edges[::2], edges[1::2]
    circuit = Circuit("t", nodes, some, "sha", {})
    expected = with_closed(student, {(edge.source, edge.target) for edge in others}, means)
    logits = expected(tokens, tap=keep_nodes(nodes, means)).logits
    torch.testing.assert_close(circuit.compact(student, means)(tokens).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slopes_help", [True, False])
def test_what_can_be_spared_is_dropped(slopes_help: bool) -> None:
    """Exactly what is needed is left, also where the first-order effects point the wrong way."""
    needed = torch.zeros(50, dtype=torch.bool).index_fill(0, torch.tensor([3, 4, 30, 49]), True)
    calls = []

    def losses_of(sets: torch.Tensor) -> list[float]:
        calls.append(len(sets))
        return (needed & ~sets).sum(1).float().tolist()

    def gradient_of(kept: torch.Tensor) -> torch.Tensor:
        return -(needed if slopes_help else ~needed).float()

    everything = torch.ones(50, dtype=torch.bool)

    def dropped(goal: float) -> torch.Tensor:
        return drop_spare(
            everything, losses_of, gradient_of, goal, lambda kept: losses_of(kept[None])[0] <= goal, 100
        )

    assert torch.equal(dropped(0.5), needed)
    assert sum(calls) < (50 if slopes_help else 150)
    one_spared = dropped(1.0)
    assert one_spared.sum() == 3
    assert not (one_spared & ~needed).any()


@pytest.mark.parametrize("tries", [1, 40, 10_000])
def test_what_was_dropped_too_much_is_put_back_within_its_budget(tries: int) -> None:
    """What is asked of a circuit in the end holds, whatever the budget; a spent one leaves more parts."""
    asked, too_much = [], torch.arange(400) % 4 == 0

    def holds(kept: torch.Tensor) -> bool:
        asked.append(kept)
        return not bool((too_much & ~kept).any())

    everything = torch.ones(400, dtype=torch.bool)
    kept = drop_spare(
        everything, lambda sets: [0.0] * len(sets), lambda kept: torch.zeros(400), 1.0, holds, tries
    )
    assert holds(kept)
    assert len(asked) <= tries + 1
    if tries == 10_000:
        assert torch.equal(kept, too_much)
        assert len(asked) < 600  # by bisection of the whole order each time it would be 830
    else:
        assert kept.sum() > 100


@pytest.mark.parametrize(("needed", "expected"), [(0, 2), (3, 4), (5, 8), (9, 10)])
def test_what_does_not_hold_is_opened_in_the_order_learned(needed: int, expected: int) -> None:
    tau = torch.linspace(0.15, -0.75, 10)  # two are open
    kept = open_enough(tau, lambda parts: bool(parts[needed]))
    assert torch.equal(kept, torch.arange(10) < expected)


def test_nodes_that_lead_nowhere_go_with_what_led_to_them() -> None:
    read, value, write = Node("0.attn.act_in", 1), Node("0.attn.v", 0), Node("0.attn.resid_delta", 2)
    query, idle, idle_read = Node("0.attn.q", 0), Node("0.mlp.post_act", 5), Node("0.mlp.act_in", 5)
    edges = [(read, value), (value, write), (idle_read, idle)]
    nodes, kept = in_use(frozenset({read, value, write, query, idle, idle_read}), edges)
    assert nodes == {read, value, write, query}
    assert kept == edges[:2]
