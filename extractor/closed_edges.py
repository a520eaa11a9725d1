"""A circuit's edges on the whole student: the weights between its nodes that it does without are closed.

A closed weight carries its source's mean, in the bias, as in `extractor.edges`; here on the student's own
matrices, so that nodes outside the circuit can be ablated otherwise, or restored.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.func import functional_call

from extractor.circuit import Circuit
from extractor.edges import matrices
from extractor.masks import Means, live_channels
from extractor.packed import Run
from extractor.sites import Node
from extractor.student import Student


def close_edges(student: Student, circuit: Circuit, means: Means) -> Run:
    """The student with the circuit's closed weights moved into biases; itself, where none is closed."""
    replaced = closed_parameters(student, circuit, means)
    if not replaced:
        return student

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(student, replaced, args, kwargs)

    return run


@torch.no_grad()
def closed_parameters(student: Student, circuit: Circuit, means: Means) -> dict[str, Tensor]:
    """Weights and biases, by name, of the matrices in which a weight is closed."""
    live = live_channels(circuit.nodes)
    kept = {(edge.source, edge.target) for edge in circuit.edges}
    replaced = {}
    for path, source, target in matrices(student):
        if source not in live or target not in live:
            continue
        linear = student.get_submodule(path)
        channels, columns = _columns(student, source, live[source])
        rows = live[target]
        is_open = _is_open(kept, source, channels, target, rows)
        block = (rows[:, None].to(linear.weight.device), columns.to(linear.weight.device))
        closed = linear.weight[block].masked_fill(is_open.to(linear.weight.device), 0)
        if closed.any():
            weight, bias = linear.weight.clone(), linear.bias.clone()
            weight[block] -= closed
            bias[rows] += closed @ means[source][channels].to(closed)
            replaced |= {f"{path}.weight": weight, f"{path}.bias": bias}
    return replaced


def _columns(student: Student, source: str, live: Tensor) -> tuple[Int[Tensor, " column"], Tensor]:
    """The kept channel that each column stands for, and the column: one per query head for a v channel."""
    if not source.endswith("attn.v"):
        return live, live
    attn = student.layers[int(source.partition(".")[0])].attn
    member = torch.arange(attn.group_size)
    head, channel = live // attn.head_dim, live % attn.head_dim
    columns = ((head[:, None] * attn.group_size + member) * attn.head_dim + channel[:, None]).flatten()
    return live.repeat_interleave(attn.group_size), columns


def _is_open(
    kept: set[tuple[Node, Node]], source: str, channels: Tensor, target: str, rows: Tensor
) -> Bool[Tensor, "row column"]:
    sources = [Node(source, channel) for channel in channels.tolist()]
    targets = [Node(target, channel) for channel in rows.tolist()]
    return torch.tensor([[(a, b) in kept for a in sources] for b in targets]).reshape(len(rows), -1)
