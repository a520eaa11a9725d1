"""Circuits as graphs: networkx, comparison, and the residual links that the stream itself makes.

A weight edge joins two nodes within a sublayer. A residual link joins a write to every later read of the same
residual channel; it has no weight of the model's, so it carries 1 and is marked `kind="residual"`.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import networkx as nx

from extractor.sites import Node
from extractor.statistics import undefined

if TYPE_CHECKING:
    from extractor.circuit import Circuit

Name = str | tuple[str, str]  # of a node, or of an edge: source and target


def to_networkx(
    circuit: "Circuit", *, residual_links: bool = True, parallel_residual: bool = False
) -> nx.DiGraph:
    """A directed graph of the circuit's nodes, by name ("0.attn.q:12"), in forward order.

    Nodes have `address`, `channel`, `kind` ("attn.q") and `layer`. Edges have `kind` and `weight`; "weight"
    edges also `weights`, of which there are several where a gate and an up-projection, or the query heads of
    a group, join the same two nodes (`weight` is then the largest by size).

    Args:
        residual_links: add an edge of kind "residual" from every write to every later read of its channel.
        parallel_residual: attention and MLP of a layer read the same stream (GPT-NeoX, GPT-J).
    """
    graph = nx.DiGraph(task=circuit.task, student_sha256=circuit.student_sha256)
    for node in sorted(circuit.nodes, key=lambda n: n.sort_key):
        graph.add_node(
            str(node), address=node.address, channel=node.channel, kind=node.kind, layer=node.layer
        )
    for source, target, weight in circuit.edges:
        ends = str(source), str(target)
        weights = [*graph.edges[ends]["weights"], weight] if graph.has_edge(*ends) else [weight]
        graph.add_edge(*ends, kind="weight", weight=max(weights, key=abs), weights=weights)
    if residual_links:
        for write, read in stream_links(circuit.nodes, parallel_residual=parallel_residual):
            graph.add_edge(str(write), str(read), kind="residual", weight=1.0)
    return graph


def stream_links(nodes: Collection[Node], *, parallel_residual: bool = False) -> list[tuple[Node, Node]]:
    """Every write joined to every later read of its residual channel."""
    reads: dict[int, list[Node]] = defaultdict(list)
    ordered = sorted(nodes, key=lambda n: n.sort_key)
    for node in ordered:
        if node.kind.endswith("act_in"):
            reads[node.channel].append(node)
    return [
        (write, read)
        for write in ordered
        if write.kind.endswith("resid_delta")
        for read in reads[write.channel]
        if _reaches(write, read, parallel_residual)
    ]


def _reaches(write: Node, read: Node, parallel_residual: bool) -> bool:
    if write.layer != read.layer:
        return write.layer < read.layer
    return (write.kind, read.kind) == ("attn.resid_delta", "mlp.act_in") and not parallel_residual


@dataclass(frozen=True)
class Overlap:
    """What two sets of names share, each in forward order."""

    shared: tuple[Name, ...]
    only_here: tuple[Name, ...]
    only_there: tuple[Name, ...]

    @property
    def jaccard(self) -> float | dict[str, str]:
        """Shared by all: 1 for equal sets, 0 for sets apart."""
        total = len(self.shared) + len(self.only_here) + len(self.only_there)
        return len(self.shared) / total if total else undefined("both are empty")

    def to_json(self) -> dict[str, object]:
        return {
            "shared": len(self.shared),
            "jaccard": self.jaccard,
            "only_here": list(self.only_here),
            "only_there": list(self.only_there),
        }


@dataclass(frozen=True)
class Comparison:
    """Two circuits side by side: "here" is the one that compares, "there" the other.

    Names stand for the same thing only in one student: `same_student` says whether the hashes are equal.
    `nodes_at` is by address, `edges_at` by the addresses of both ends.
    """

    tasks: tuple[str, str]
    same_student: bool
    nodes: Overlap
    edges: Overlap
    nodes_at: dict[str, Overlap]
    edges_at: dict[tuple[str, str], Overlap]

    def to_json(self) -> dict[str, object]:
        return {
            "tasks": list(self.tasks),
            "same_student": self.same_student,
            "nodes": self.nodes.to_json(),
            "edges": self.edges.to_json(),
            "nodes_at": {address: overlap.to_json() for address, overlap in self.nodes_at.items()},
            "edges_at": {" -> ".join(ends): overlap.to_json() for ends, overlap in self.edges_at.items()},
        }


def compare(circuit: "Circuit", other: "Circuit") -> Comparison:
    """Shared nodes and edges of two circuits, and those of one alone, in all and by address.

    An edge is its two ends: weights do not count.
    """
    nodes = [circuit.nodes, other.nodes]
    edges = [{(edge.source, edge.target) for edge in one.edges} for one in (circuit, other)]
    addresses = _in_order({node.address: node for node in sorted(nodes[0] | nodes[1], key=str)})
    joins = {
        (source.address, target.address): None
        for source, target in sorted(edges[0] | edges[1], key=_edge_order)
    }
    return Comparison(
        tasks=(circuit.task, other.task),
        same_student=circuit.student_sha256 == other.student_sha256,
        nodes=_node_overlap(*nodes),
        edges=_edge_overlap(*edges),
        nodes_at={
            address: _node_overlap(*({n for n in one if n.address == address} for one in nodes))
            for address in addresses
        },
        edges_at={
            join: _edge_overlap(
                *({(s, t) for s, t in one if (s.address, t.address) == join} for one in edges)
            )
            for join in joins
        },
    )


def _in_order(example_of: dict[str, Node]) -> list[str]:
    return sorted(example_of, key=lambda address: example_of[address].sort_key[:2])


def _edge_order(edge: tuple[Node, Node]) -> tuple:
    return edge[0].sort_key, edge[1].sort_key


def _node_overlap(here: Collection[Node], there: Collection[Node]) -> Overlap:
    def names(nodes: Iterable[Node]) -> tuple[str, ...]:
        return tuple(str(node) for node in sorted(nodes, key=lambda n: n.sort_key))

    here, there = set(here), set(there)
    return Overlap(names(here & there), names(here - there), names(there - here))


def _edge_overlap(here: set[tuple[Node, Node]], there: set[tuple[Node, Node]]) -> Overlap:
    def names(edges: Iterable[tuple[Node, Node]]) -> tuple[tuple[str, str], ...]:
        return tuple((str(source), str(target)) for source, target in sorted(edges, key=_edge_order))

    return Overlap(names(here & there), names(here - there), names(there - here))
