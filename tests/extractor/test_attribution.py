"""Attribution scores: gradients of gates, exact where the student is linear, complete along a path."""

import pytest
import torch

from extractor import attribution
from extractor.attribution import StudentEdges
from extractor.circuit import keep_nodes
from extractor.compact import CompactStudent
from extractor.edges import EdgeGates
from extractor.masks import ablation_tap, live_channels, mean_activations
from extractor.sites import Node, Recorder, Site
from extractor.student import Student
from extractor.tasks import TaskBatch
from tests.conftest import tiny_student_config
from tests.extractor.test_compact import student_of

STEPS = 4


@pytest.fixture
def prompts() -> TaskBatch:
    return some_prompts()


def some_prompts(pairs: int = 9, width: int = 7) -> TaskBatch:
    """Pairs that differ in the third token and end at different places, more than fit in one pass."""
    generator = torch.Generator().manual_seed(5)
    clean = torch.randint(1, 97, (pairs, width), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] + 5) % 97
    last = torch.randint(3, width, (pairs,), generator=generator).repeat(2)
    answer, distractor = torch.randint(1, 97, (2, pairs), generator=generator)
    ids, answers = torch.cat([clean, corrupted]), torch.cat([answer, distractor])
    return TaskBatch(ids, last, answers, answers.roll(pairs))


def metric(model, prompts: TaskBatch, **kwargs) -> torch.Tensor:
    return prompts.logit_difference(model(prompts.ids, **kwargs).logits).mean()


def every_node(means) -> list[Node]:
    return [Node(address, c) for address, mean in means.items() for c in range(len(mean))]


def by_address(scores: torch.Tensor, means) -> dict[str, torch.Tensor]:
    return dict(zip(means, scores.split([len(mean) for mean in means.values()]), strict=True))


def linear_student() -> Student:
    """No norms before sublayers, no activation function, attention to all tokens alike, and a final norm
    that divides by a constant: every logit is linear in every activation but q and k."""
    config = tiny_student_config(
        pre_norm=False, hidden_act="linear", rms_norm_eps=1e12, num_key_value_heads=2
    )
    student = Student(config).eval()
    with torch.no_grad():
        student.lm_head.weight.mul_(1e6)
        for name, parameter in student.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        for layer in student.layers:
            for linear in (layer.attn.q_proj, layer.attn.k_proj):
                linear.weight.zero_()
                linear.bias.zero_()
    return student


# --- edges -----------------------------------------------------------------------------------------------


EDGE_KINDS = ("grouped queries, rope, gate", "q/k norms and post-norms", "sinks", "parallel sublayers")
EDGE_KINDS += ("AbsTopK with sinks and norms", "bigrams")


@pytest.mark.parametrize("kind", EDGE_KINDS)
def test_eap_is_the_gradient_of_edge_gates(kind: str, tokens, prompts) -> None:
    student = student_of(kind)
    with torch.no_grad():
        for name, weight in student.sparse_matrices().items():
            if name.startswith("layers"):
                weight.mul_(torch.rand_like(weight) < 0.3)
    means = mean_activations(student, tokens)
    edges = StudentEdges(student, means)
    gated = EdgeGates(CompactStudent(student, live_channels(every_node(means)), means), means)
    assert set(edges.pairs) == set(gated.pairs)
    assert len(edges) == len(gated.pairs)
    gates = torch.ones(len(edges), requires_grad=True)
    logits = gated.logits(gates, prompts.ids, prompts.last[:, None])
    (slope,) = torch.autograd.grad(prompts.logit_difference(logits).mean(), gates)
    expected = dict(zip(gated.pairs, slope.tolist(), strict=True))
    scores = attribution.patching_edges(edges, prompts)
    found = torch.tensor([expected[pair] for pair in edges.pairs])
    torch.testing.assert_close(scores, found, atol=2e-5, rtol=1e-4)
    assert scores.abs().max() > 1e-2


def test_an_edge_of_several_weights_has_the_sum_of_their_scores(tokens, prompts) -> None:
    """A v channel serves every query head of its group; gate and up join the same two nodes."""
    student = student_of("grouped queries, rope, gate")
    means = mean_activations(student, tokens)
    edges = StudentEdges(student, means)
    scores = dict(zip(edges.pairs, attribution.patching_edges(edges, prompts).tolist(), strict=True))

    def slope(names: list[str], rows: list[int], columns: list[int], mean: torch.Tensor) -> float:
        """Of the metric, along moving these weights out of the biases."""
        weights = [student.get_submodule(name).weight for name in names]
        biases = [student.get_submodule(name).bias for name in names]
        found = torch.autograd.grad(metric(student, prompts), weights + biases)
        total = 0.0
        for weight, of_weight, of_bias in zip(weights, found, found[len(names) :], strict=False):
            for row, column in zip(rows, columns, strict=True):
                total += (weight[row, column] * (of_weight[row, column] - of_bias[row] * mean)).item()
        return total

    shared = slope(["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"], [7], [5], means["0.mlp.act_in"][5])
    assert scores[Node("0.mlp.act_in", 5), Node("0.mlp.post_act", 7)] == pytest.approx(shared, abs=1e-5)
    # v channel 8 + 3 belongs to the second group: query heads 2 and 3 of 8 channels each
    grouped = slope(["layers.1.attn.o_proj"], [4, 4], [2 * 8 + 3, 3 * 8 + 3], means["1.attn.v"][11])
    assert scores[Node("1.attn.v", 11), Node("1.attn.resid_delta", 4)] == pytest.approx(grouped, abs=1e-5)


@pytest.mark.parametrize("kind", ["learned positions", "grouped queries, rope, gate"])
def test_integrated_gradients_are_complete(kind: str, tokens) -> None:
    """Scores sum to what ablating everything costs; this student is far from linear along the path."""
    student, prompts = student_of(kind), some_prompts(pairs=4)
    means = mean_activations(student, tokens)
    edges = StudentEdges(student, means)
    whole, floor = metric(student, prompts), metric(student, prompts, tap=keep_nodes((), means))
    nodes = attribution.integrated_gradients_nodes(student, prompts, means, 32).sum()
    torch.testing.assert_close(nodes, whole - floor, atol=1e-3, rtol=0.01)
    parameters = edges.parameters(torch.zeros(len(edges)))
    closed = torch.func.functional_call(student, parameters, (prompts.ids,)).logits
    gap = whole - prompts.logit_difference(closed).mean()
    found = attribution.integrated_gradients_edges(edges, prompts, 32).sum()
    torch.testing.assert_close(found, gap, atol=1e-3, rtol=0.01)
    assert abs(whole - floor) > 0.1
    assert abs(gap) > 0.1


# --- where first order is exact --------------------------------------------------------------------------


def test_scores_of_a_linear_student_sum_to_the_change(tokens, prompts) -> None:
    """Nodes of one address, ablated together, change the metric by the sum of their scores."""
    student = linear_student()
    means = mean_activations(student, tokens)
    clean = Recorder(*means)
    whole = metric(student, prompts, tap=clean)
    other = {address: prompts.counterfactual(clean[address]) for address in means}
    for ablated, scores in (
        (means, attribution.patching_nodes(student, prompts, means)),
        (other, attribution.patching_nodes_counterfactual(student, prompts, means)),
        (other, attribution.input_gradients_nodes(student, prompts, means, STEPS)),
    ):
        for address, own in by_address(scores, means).items():
            closed = {address: torch.zeros_like(means[address])}
            change = whole - metric(student, prompts, tap=ablation_tap(closed, ablated))
            torch.testing.assert_close(own.sum(), change, atol=2e-5, rtol=1e-4)
    assert abs(attribution.patching_nodes(student, prompts, means).sum()) > 0.1


def test_integrated_gradients_of_a_linear_student_are_exact(tokens, prompts) -> None:
    """A path through two layers has up to 12 gates, so slopes have degree 11: 6 points leave no error."""
    student = linear_student()
    means = mean_activations(student, tokens)
    gap = metric(student, prompts) - metric(student, prompts, tap=keep_nodes((), means))
    found = attribution.integrated_gradients_nodes(student, prompts, means, 6).sum()
    torch.testing.assert_close(found, gap, atol=1e-5, rtol=1e-4)


def test_gradients_are_alike_along_the_path_of_a_linear_student(tokens, prompts) -> None:
    student = linear_student()
    edges = StudentEdges(student, mean_activations(student, tokens))
    along, here = (
        attribution.input_gradients_edges(edges, prompts, STEPS),
        attribution.patching_edges_counterfactual(edges, prompts),
    )
    torch.testing.assert_close(along, here, atol=1e-5, rtol=1e-4)
    assert here.abs().max() > 1e-3


# --- the counterfactual and the path of inputs -----------------------------------------------------------


def test_nothing_differs_where_the_counterfactual_is_the_prompt(student, tokens, prompts) -> None:
    same = TaskBatch(
        prompts.ids[: len(prompts) // 2].repeat(2, 1), prompts.last, prompts.answer, prompts.distractor
    )
    means = mean_activations(student, tokens)
    edges = StudentEdges(student, means)
    assert not attribution.patching_nodes_counterfactual(student, same, means).any()
    assert not attribution.patching_edges_counterfactual(edges, same).any()
    assert attribution.patching_edges(edges, same).any()


def test_gradients_are_taken_between_the_counterfactual_and_the_prompt(student, tokens, prompts) -> None:
    """One step is the middle of the path, which the student can also be started from."""
    means = mean_activations(student, tokens)
    clean = Recorder(*means)
    student(prompts.ids, tap=clean)
    own = student.embed_tokens(prompts.ids)
    middle = (own + prompts.counterfactual(own)) / 2 + student.embed_positions.weight[: own.shape[1]]
    leaves = {name: torch.zeros_like(clean[name], requires_grad=True) for name in means}

    def add(address: str, activation: torch.Tensor) -> torch.Tensor:
        return activation + leaves[address] if address in leaves else activation

    value = metric(student, prompts, tap=add, start=Site(0, "resid_pre"), resid=middle)
    slopes = torch.autograd.grad(value, list(leaves.values()))
    expected = [
        (slope * (clean[address] - prompts.counterfactual(clean[address]))).sum((0, 1))
        for address, slope in zip(means, slopes, strict=True)
    ]
    found = attribution.input_gradients_nodes(student, prompts, means, 1)
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert not student.embed_tokens._forward_hooks


def test_magnitudes_leave_signs_and_padding_out(student, tokens, prompts) -> None:
    means = mean_activations(student, tokens)
    edges = StudentEdges(student, means)
    clean = Recorder(*means)
    student(prompts.ids, tap=clean)
    address = "0.mlp.act_in"
    inside = torch.arange(prompts.ids.shape[1]) <= prompts.last[:, None]
    deviation = (clean[address][..., 5][inside] - means[address][5]).square().mean().sqrt()
    index = edges.pairs.index((Node(address, 5), Node("0.mlp.post_act", 3)))
    weight = student.layers[0].mlp.up_proj.weight[3, 5].abs()
    found = attribution.magnitude_of_edges(edges, prompts)
    torch.testing.assert_close(found[index], weight * deviation, atol=1e-5, rtol=0.05)
    assert (found >= 0).all()
    padded = prompts.ids.clone()
    padded[~inside] = 1
    other = TaskBatch(padded, prompts.last, prompts.answer, prompts.distractor)
    torch.testing.assert_close(attribution.magnitude_of_edges(edges, other), found)
    torch.testing.assert_close(
        attribution.patching_edges(edges, other), attribution.patching_edges(edges, prompts)
    )
