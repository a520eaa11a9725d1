"""A circuit's edges on the whole student: the weights between its nodes that it does without are closed.

A closed weight carries its source's mean, in the bias, as in `extractor.edges`; here on the student's own
matrices, so that nodes outside the circuit can be ablated otherwise, or restored.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from extractor.compact import CompactStudent
from extractor.edges import matrices
from extractor.masks import Means, live_channels
from extractor.packed import Run
from extractor.sites import Node
from extractor.student import Student

Pairs = Collection[tuple[Node, Node]]
CLOSED = -1  # a weight that belongs to no edge


def close_edges(student: Student, nodes: Collection[Node], pairs: Pairs, means: Means) -> Run:
    """The student with all weights between these nodes but those of `pairs` (source, target) moved into
    biases; itself, where none is closed."""
    edges = StudentEdges(student, nodes, pairs, means)
    everything = torch.ones(len(pairs), device=student.device)
    return edges.run(everything) if edges.parameters(everything) else student


@dataclass(frozen=True)
class Block:
    """The weights of one matrix that lie between kept nodes."""

    name: str  # of the module, "layers.0.attn.q_proj"
    rows: Int[Tensor, " row"]
    columns: Int[Tensor, " column"]
    edge: Int[Tensor, "row column"]  # which edge each weight belongs to, or CLOSED
    source_means: Float[Tensor, " column"]


class StudentEdges:
    """Some edges between a circuit's nodes, each as far open as its gate; weights of no edge are closed.

    What `extractor.edges.EdgeGates` is to the compact model, on the whole student.
    """

    @torch.no_grad()
    def __init__(self, student: Student, nodes: Collection[Node], pairs: Pairs, means: Means):
        self.student, self.means = student, means
        index = {pair: number for number, pair in enumerate(pairs)}
        live = live_channels(nodes)
        self.blocks = []
        for name, source, target in matrices(student):
            if source not in live or target not in live:
                continue
            channels, columns = _columns(student, source, live[source])
            rows = live[target]
            edge = _edges_of(index, source, channels, target, rows)
            places = (part.to(student.device) for part in (rows, columns, edge))
            self.blocks.append(Block(name, *places, means[source][channels.to(means[source].device)]))

    def parameters(self, gates: Float[Tensor, " edge"]) -> dict[str, Tensor]:
        """Weights and biases, by name, of the matrices in which a weight is closed, if only in part."""
        padded = torch.cat([gates, gates.new_zeros(1)])
        replaced = {}
        for block in self.blocks:
            linear = self.student.get_submodule(block.name)
            places = (block.rows[:, None], block.columns)
            closed = linear.weight[places] * (1 - padded[block.edge])
            if closed.requires_grad or closed.any():
                replaced |= {
                    f"{block.name}.weight": linear.weight.index_put(places, -closed, accumulate=True),
                    f"{block.name}.bias": linear.bias.index_add(
                        0, block.rows, closed @ block.source_means.to(closed)
                    ),
                }
        return replaced

    def run(self, gates: Float[Tensor, " edge"]) -> Run:
        """The student with the edges as far open as their gates; called as a student is."""
        replaced = self.parameters(gates)

        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.student, replaced, args, kwargs)

        return run

    @contextmanager
    def applied(self, gates: Float[Tensor, " edge"]) -> Iterator[Student]:
        """The student itself with the edges as far open as their gates, whoever calls it."""
        with torch.no_grad():
            replaced = self.parameters(gates)
        own = {name: self.student.get_parameter(name).data for name in replaced}
        try:
            for name, value in replaced.items():
                self.student.get_parameter(name).data = value
            yield self.student
        finally:
            for name, value in own.items():
                self.student.get_parameter(name).data = value

    @torch.no_grad()
    def compact(self, gates: Float[Tensor, " edge"], live: Mapping[str, Tensor]) -> CompactStudent:
        """The same student with only these channels computed, exactly."""
        with self.applied(gates) as student:
            return CompactStudent(student, live, self.means)


def _columns(student: Student, source: str, live: Tensor) -> tuple[Int[Tensor, " column"], Tensor]:
    """The kept channel that each column stands for, and the column: one per query head for a v channel."""
    if not source.endswith("attn.v"):
        return live, live
    attn = student.layers[int(source.partition(".")[0])].attn
    member = torch.arange(attn.group_size)
    head, channel = live // attn.head_dim, live % attn.head_dim
    columns = ((head[:, None] * attn.group_size + member) * attn.head_dim + channel[:, None]).flatten()
    return live.repeat_interleave(attn.group_size), columns


def _edges_of(
    index: dict[tuple[Node, Node], int], source: str, channels: Tensor, target: str, rows: Tensor
) -> Int[Tensor, "row column"]:
    sources = [Node(source, channel) for channel in channels.tolist()]
    targets = [Node(target, channel) for channel in rows.tolist()]
    found = [[index.get((a, b), CLOSED) for a in sources] for b in targets]
    return torch.tensor(found, dtype=torch.long).reshape(len(rows), -1)
