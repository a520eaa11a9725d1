"""First-order scores of nodes and edges: what closing a gate would change, read off gradients.

The metric m is the mean logit difference (answer minus distractor). With g = dm/d(activation), summed over
positions and averaged over examples:

    node: g * (activation - ablated)                  attribution patching (NAP)
    edge: g at the target * weight * (source - source ablated)             EAP (Syed et al. 2023)

Ablated is a node's mean, or its activation on the counterfactual prompt. Along a path g is averaged:

    from the counterfactual's embeddings to the prompt's own     EAP-IG (inputs; Hanna et al. 2024), NAP-IG
    from all gates closed to all open                            integrated gradients; scores sum to
                                                                 m(student) - m(everything ablated)

A positive score helps the answer. Nodes are ordered as in `means`, edges as in `StudentEdges`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from extractor.masks import Means, ablation_tap
from extractor.sites import Node, Recorder, Tap, no_tap
from extractor.student import Student
from extractor.tasks import TaskBatch

PAIRS_PER_PASS = 8  # bounds the memory: every activation of a pass is held

NodeScores = Float[Tensor, " node"]
EdgeScores = Float[Tensor, " edge"]


@dataclass(frozen=True)
class Matrix:
    """The nonzero weights of one matrix of a student, each with the edge that it belongs to."""

    name: str  # of the module, "layers.0.attn.q_proj"
    source: str
    rows: Int[Tensor, " weight"]
    columns: Int[Tensor, " weight"]
    channels: Int[Tensor, " column"]  # of the source, by column
    edge: Int[Tensor, " weight"]


class StudentEdges:
    """Every edge of a student in one vector: the pairs of nodes that nonzero weights join.

    Weights of one pair are one edge (gate and up; query heads of one group), as in `extractor.edges`.
    Ordered by source, then target, both in forward order.
    """

    def __init__(self, student: Student, means: Means):
        self.student, self.means = student, means
        self.nodes = [Node(address, c) for address, mean in means.items() for c in range(len(mean))]
        start = dict(zip(means, np.cumsum([0, *map(len, means.values())]).tolist()[:-1], strict=True))
        parts, keys = [], []
        for name, source, target, channels in _matrices(student):
            rows, columns = student.get_submodule(name).weight.detach().nonzero().T
            parts.append((name, source, rows, columns, channels.to(rows.device)))
            ends = start[source] + channels.to(rows.device)[columns], start[target] + rows
            keys.append(ends[0] * len(self.nodes) + ends[1])
        pairs, edge = torch.cat(keys).unique(return_inverse=True)
        self.source, self.target = pairs // len(self.nodes), pairs % len(self.nodes)
        split = edge.split([len(own) for own in keys])
        self.matrices = [Matrix(*part, own) for part, own in zip(parts, split, strict=True)]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def pairs(self) -> list[tuple[Node, Node]]:
        """Source and target of every edge."""
        ends = zip(self.source.tolist(), self.target.tolist(), strict=True)
        return [(self.nodes[source], self.nodes[target]) for source, target in ends]

    def weight(self, matrix: Matrix) -> Float[Tensor, " weight"]:
        return self._linear(matrix).weight.detach()[matrix.rows, matrix.columns]

    def parameters(self, gates: EdgeScores) -> dict[str, Tensor]:
        """Weights and biases of the student with the edges as far open as their gates.

        What is closed carries its source's mean, in the bias.
        """
        parameters = {}
        for matrix in self.matrices:
            linear, weight = self._linear(matrix), self.weight(matrix)
            open_ = weight * gates[matrix.edge]
            kept = torch.zeros_like(linear.weight).index_put((matrix.rows, matrix.columns), open_)
            carried = (weight - open_) * self.means[matrix.source][matrix.channels[matrix.columns]]
            parameters[f"{matrix.name}.weight"] = kept
            parameters[f"{matrix.name}.bias"] = linear.bias.detach().index_add(0, matrix.rows, carried)
        return parameters

    def _linear(self, matrix: Matrix) -> nn.Linear:
        return self.student.get_submodule(matrix.name)


def _matrices(student: Student) -> Iterator[tuple[str, str, str, Tensor]]:
    """(module, source address, target address, the source's channel of every column)."""
    for index, layer in enumerate(student.layers):
        attn, mlp = layer.attn, layer.mlp
        joins = [(f"attn.{kind}_proj", "attn.act_in", f"attn.{kind}") for kind in "qkv"]
        joins.append(("attn.o_proj", "attn.v", "attn.resid_delta"))
        joins.append(("mlp.up_proj", "mlp.act_in", "mlp.post_act"))
        if mlp.gate_proj is not None:
            joins.append(("mlp.gate_proj", "mlp.act_in", "mlp.post_act"))
        joins.append(("mlp.down_proj", "mlp.post_act", "mlp.resid_delta"))
        for name, source, target in joins:
            channels = torch.arange(layer.get_submodule(name).in_features)
            if name == "attn.o_proj":  # a v channel has a column per query head of its group
                head, within = channels // attn.head_dim, channels % attn.head_dim
                channels = head // attn.group_size * attn.head_dim + within
            yield f"layers.{index}.{name}", f"{index}.{source}", f"{index}.{target}", channels


def patching_nodes(student: Student, prompts: TaskBatch, means: Means) -> NodeScores:
    """Attribution patching towards the means: one forward and backward."""
    return _mean_over(prompts, lambda part: _slope_of_gates(student, part, means, means, 1.0))


def patching_nodes_counterfactual(student: Student, prompts: TaskBatch, means: Means) -> NodeScores:
    """Attribution patching towards each prompt's counterfactual."""

    def scores(part: TaskBatch) -> NodeScores:
        clean = _record(student, part, means)
        other = {address: part.counterfactual(own) for address, own in clean.items()}
        return _slope_of_gates(student, part, means, other, 1.0)

    return _mean_over(prompts, scores)


def input_gradients_nodes(student: Student, prompts: TaskBatch, means: Means, steps: int) -> NodeScores:
    """NAP-IG: attribution patching towards the counterfactual, gradients averaged over the inputs' path."""

    def scores(part: TaskBatch) -> NodeScores:
        clean = _record(student, part, means)
        moved = {address: own - part.counterfactual(own) for address, own in clean.items()}
        gates = {address: torch.zeros_like(mean, requires_grad=True) for address, mean in means.items()}

        def tap(address: str, activation: Tensor) -> Tensor:
            return activation + gates[address] * moved[address] if address in gates else activation

        total = 0
        for share, weight in path_points(steps):
            with _embeddings_between(student, part, share):
                total = total + weight * _slope(_metric(student, part, tap), list(gates.values()))
        return total

    return _mean_over(prompts, scores)


def integrated_gradients_nodes(student: Student, prompts: TaskBatch, means: Means, steps: int) -> NodeScores:
    """Integrated gradients over the gates, from all nodes at their means to the whole student."""

    def scores(part: TaskBatch) -> NodeScores:
        return sum(
            weight * _slope_of_gates(student, part, means, means, share)
            for share, weight in path_points(steps)
        )

    return _mean_over(prompts, scores)


@torch.no_grad()
def deviation_of_nodes(student: Student, prompts: TaskBatch, means: Means) -> NodeScores:
    """Root mean square of every node's distance from its mean, over the prompts' tokens."""

    def scores(part: TaskBatch) -> NodeScores:
        inside = torch.arange(part.ids.shape[1], device=part.ids.device) <= part.last[:, None]
        clean = _record(student, part, means)
        squares = [(clean[address] - mean)[inside].square().mean(0) for address, mean in means.items()]
        return torch.cat(squares)

    return _mean_over(prompts, scores).sqrt()


def patching_edges(edges: StudentEdges, prompts: TaskBatch) -> EdgeScores:
    """EAP towards the sources' means."""

    def from_mean(matrix: Matrix, read: Tensor, part: TaskBatch) -> Tensor:
        return read - edges.means[matrix.source][matrix.channels]

    return _mean_over(prompts, lambda part: _slope_of_edges(edges, part, from_mean, [(1.0, 1.0)]))


def patching_edges_counterfactual(edges: StudentEdges, prompts: TaskBatch) -> EdgeScores:
    """EAP towards the sources' activations on each prompt's counterfactual."""
    return _mean_over(prompts, lambda part: _slope_of_edges(edges, part, _from_counterfactual, [(1.0, 1.0)]))


def input_gradients_edges(edges: StudentEdges, prompts: TaskBatch, steps: int) -> EdgeScores:
    """EAP-IG: EAP towards the counterfactual, gradients averaged over the inputs' path."""
    points = path_points(steps)
    return _mean_over(prompts, lambda part: _slope_of_edges(edges, part, _from_counterfactual, points))


def integrated_gradients_edges(edges: StudentEdges, prompts: TaskBatch, steps: int) -> EdgeScores:
    """Integrated gradients over the gates, from all edges carrying their sources' means to the student."""

    def scores(part: TaskBatch) -> EdgeScores:
        total = 0
        for share, weight in path_points(steps):
            gates = torch.full((len(edges),), share, device=part.ids.device, requires_grad=True)
            value = _metric(edges.student, part, parameters=edges.parameters(gates))
            total = total + weight * _slope(value, [gates])
        return total

    return _mean_over(prompts, scores)


@torch.no_grad()
def magnitude_of_edges(edges: StudentEdges, prompts: TaskBatch) -> EdgeScores:
    """|weight| * the source's root mean square distance from its mean: what reaches the target, unsigned."""
    deviation = deviation_of_nodes(edges.student, prompts, edges.means)
    total = torch.zeros(len(edges), device=deviation.device)
    for matrix in edges.matrices:
        total.index_add_(0, matrix.edge, edges.weight(matrix).abs())
    return total * deviation[edges.source]


def path_points(steps: int) -> list[tuple[float, float]]:
    """(share of the path, weight) by Gauss-Legendre: exact for polynomials of degree 2 * steps - 1."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return list(zip(((points + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


def _mean_over(prompts: TaskBatch, scores: Callable[[TaskBatch], Tensor]) -> Tensor:
    """Scores of all prompts from those of a few pairs at a time."""
    half = len(prompts) // 2
    pairs = torch.arange(half, device=prompts.ids.device).split(PAIRS_PER_PASS)
    return sum(scores(prompts.select(own)) * (len(own) / half) for own in pairs)


def _metric(
    student: Student, prompts: TaskBatch, tap: Tap = no_tap, parameters: Mapping[str, Tensor] | None = None
) -> Float[Tensor, ""]:
    """Mean logit difference, differentiable."""
    kwargs = {"tap": tap, "logits_to_keep": prompts.last[:, None]}
    with torch.enable_grad():
        logits = functional_call(student, dict(parameters or {}), (prompts.ids,), kwargs).logits
        return prompts.logit_difference(logits).mean()


def _slope(value: Tensor, leaves: Sequence[Tensor]) -> Float[Tensor, " leaf"]:
    found = torch.autograd.grad(value, leaves, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def _slope_of_gates(
    student: Student, prompts: TaskBatch, means: Means, ablated: Mapping[str, Tensor], share: float
) -> NodeScores:
    """dm/dgate of every node, with all gates at `share`."""
    gates = {name: torch.full_like(mean, share, requires_grad=True) for name, mean in means.items()}
    return _slope(_metric(student, prompts, ablation_tap(gates, ablated)), list(gates.values()))


def _slope_of_edges(
    edges: StudentEdges,
    prompts: TaskBatch,
    difference: Callable[[Matrix, Tensor, TaskBatch], Tensor],
    points: Sequence[tuple[float, float]],
) -> EdgeScores:
    """g at the target * weight * difference at the source, g averaged over points of the inputs' path."""
    moved, changes = {}, {}

    def record(matrix: Matrix, read: Tensor, written: Tensor) -> None:
        moved[matrix.name] = difference(matrix, read, prompts)

    with torch.no_grad(), _forward_hooks(edges, record):
        edges.student(prompts.ids, logits_to_keep=prompts.last[:, None])
    for matrix in edges.matrices:
        weight = edges.student.get_submodule(matrix.name).weight
        changes[matrix.name] = torch.zeros_like(weight, requires_grad=True)

    def add(matrix: Matrix, read: Tensor, written: Tensor) -> Tensor:
        return written + moved[matrix.name] @ changes[matrix.name].T

    total = torch.zeros(len(edges), device=prompts.ids.device)
    for share, factor in points:
        with _embeddings_between(edges.student, prompts, share), _forward_hooks(edges, add):
            value = _metric(edges.student, prompts)
        slopes = torch.autograd.grad(value, list(changes.values()))
        for matrix, slope in zip(edges.matrices, slopes, strict=True):
            own = slope[matrix.rows, matrix.columns] * edges.weight(matrix)
            total.index_add_(0, matrix.edge, factor * own)
    return total


def _from_counterfactual(matrix: Matrix, read: Tensor, prompts: TaskBatch) -> Tensor:
    """What each prompt's source (for `o_proj`: as attention mixed it) has over its counterfactual's."""
    return read - prompts.counterfactual(read)


@torch.no_grad()
def _record(student: Student, prompts: TaskBatch, means: Means) -> dict[str, Tensor]:
    recorder = Recorder(*means)
    student(prompts.ids, tap=recorder, logits_to_keep=prompts.last[:, None])
    return recorder.activations


@contextmanager
def _embeddings_between(student: Student, prompts: TaskBatch, share: float) -> Iterator[None]:
    """The student reads embeddings between the counterfactual's (0) and the prompts' own (1)."""

    def between(module: nn.Module, inputs: tuple, own: Tensor) -> Tensor:
        other = prompts.counterfactual(own)
        return torch.lerp(other, own, share)

    handle = student.embed_tokens.register_forward_hook(between)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _forward_hooks(
    edges: StudentEdges, hook: Callable[[Matrix, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `hook(matrix, what it reads, what it writes)` at every matrix; its result replaces the write."""
    with ExitStack() as stack:
        for matrix in edges.matrices:
            module = edges.student.get_submodule(matrix.name)
            handle = module.register_forward_hook(
                lambda module, inputs, written, matrix=matrix: hook(matrix, inputs[0], written)
            )
            stack.callback(handle.remove)
        yield
