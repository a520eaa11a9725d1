"""The layout for a circuit's size: `circuit_figure` draws it so that it can be read.

    up to 40 nodes     bus: residual channels are vertical lines, heads' channels and neurons are boxes
                       between them, reads enter from below and writes leave above, as the network computes
    up to 200          rows of nodes (`drawing.circuit_svg`)
    up to 1000         blocks: all nodes of one kind in one layer are one box, with a table of what joins them
    more               that table alone

Positions follow from the circuit; the same circuit gives the same bytes. Every picture has a table beside it.
"""

from collections import defaultdict
from typing import Any

from markupsafe import Markup

from bridges.drawing import (
    LABEL_WIDTH,
    ROW_HEIGHT,
    Edge,
    Node,
    circuit_caption,
    circuit_svg,
    edge_marks,
    figure,
    number,
    read_graph,
    row_name,
)
from extractor.circuit import Circuit
from extractor.errors import InputError

BUS, ROWS, BLOCKS = 40, 200, 1000
_FILE_STYLE = """
svg { color: #1a1a1a; background: #fff; }
path { fill: none; } text { fill: currentColor; font: 11px sans-serif; }
.ep { stroke: #0b62a8; } .en { stroke: #b3440a; stroke-dasharray: 6 3; }
.er { stroke: #888; stroke-width: .8; stroke-dasharray: 1.5 3; }
.nd { fill: #fff; stroke: currentColor; stroke-width: 1.5; } .rl { fill: #555; } .nl { font-size: 9px; }
"""
_SLOT, _BAND, _BOX_WIDTH, _BOX_HEIGHT = 38, 132, 34, 18
Place = tuple[float, float]


def circuit_figure(circuit: dict[str, Any], name: str = "this circuit") -> Markup:
    """A task's circuit in the layout for its size."""
    nodes, edges = read_graph(circuit)
    channels = {node.channel for node in nodes if is_on_stream(node)}
    if channels and len(nodes) <= BUS:
        return bus_figure(circuit, nodes, edges, name)
    if len(nodes) <= ROWS:
        return circuit_svg(circuit, max_nodes=ROWS, name=name)
    if len(nodes) <= BLOCKS:
        return block_figure(nodes, edges, name)
    note = '<p class="note">No picture: {} nodes cannot be read as one; the table has its blocks.</p>'
    return Markup(note).format(number(len(nodes)))


def circuit_picture(circuit: Circuit) -> str:
    """The picture as an SVG file of its own.

    Raises:
        InputError: the circuit is empty.
    """
    if not circuit.nodes:
        raise InputError(f"circuit '{circuit.task}' has no nodes; there is nothing to draw")
    edges = [(str(edge.source), str(edge.target), edge.weight) for edge in circuit.edges]
    graph = {"nodes": [str(node) for node in circuit.nodes], "edges": edges}
    drawn = str(circuit_figure({"graph": graph}))
    svg = drawn[drawn.index("<svg") : drawn.index("</svg>")]
    head, _, marks = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">\n<style>{_FILE_STYLE}</style>{marks}</svg>\n'


def is_on_stream(node: Node) -> bool:
    """Whether a node is a channel of the residual stream, read or written."""
    return node.kind.endswith(("act_in", "resid_delta"))


# --- up to 40 nodes: the bus ----------------------------------------------------------------------


def bus_figure(circuit: dict[str, Any], nodes: list[Node], edges: list[Edge], name: str) -> Markup:
    """Channels as vertical lines, everything else as boxes between them."""
    columns = _columns(nodes)
    bands = sorted({(node.layer, node.kind.startswith("mlp")) for node in nodes})
    height = _BAND * len(bands) + 40
    places = {
        node: (columns[node.channel], _bus_height(node, bands, height))
        for node in nodes
        if is_on_stream(node)
    }
    right = max(columns.values()) + _SLOT
    for band in bands:
        inner = [n for n in nodes if not is_on_stream(n) and (n.layer, n.kind.startswith("mlp")) == band]
        places |= _boxes(inner, edges, places, _bus_height(inner[0], bands, height) if inner else 0)
    width = max([right, *(x + _SLOT for x, _ in places.values())])
    marks = [*_band_marks(bands, height, width), *_bus_marks(nodes, columns, places, height)]
    marks += edge_marks(edges, places)
    marks += [_box(node, places[node]) for node in nodes if not is_on_stream(node)]
    marks += [_dot(node, places[node]) for node in nodes if is_on_stream(node)]
    caption = circuit_caption(circuit, (nodes, nodes), (edges, edges), 0)
    return figure(name, caption.replace("; 0 residual links", ""), width, height, Markup("\n").join(marks))


def _columns(nodes: list[Node]) -> dict[int, float]:
    """Where each residual channel stands: in the order in which the forward pass first meets it."""
    first = dict.fromkeys(node.channel for node in nodes if is_on_stream(node))
    return {channel: LABEL_WIDTH + _SLOT * (i + 0.5) for i, channel in enumerate(first)}


def _bus_height(node: Node, bands: list[tuple[int, bool]], height: float) -> float:
    """Bottom-up: reads, then boxes, then writes of each band."""
    bottom = height - 40 - _BAND * bands.index((node.layer, node.kind.startswith("mlp")))
    if node.kind.endswith("act_in"):
        return bottom - 14
    return bottom - (_BAND - 22 if node.kind.endswith("resid_delta") else _BAND / 2)


def _boxes(
    inner: list[Node], edges: list[Edge], places: dict[Node, Place], height: float
) -> dict[Node, Place]:
    """Boxes near the channels they are joined to, none over another."""
    joined: dict[Node, list[float]] = defaultdict(list)
    for source, target, _ in edges:
        for box, end in ((source, target), (target, source)):
            if end in places:
                joined[box].append(places[end][0])
    centre = {node: sum(xs) / len(xs) if (xs := joined[node]) else LABEL_WIDTH for node in inner}
    placed: dict[Node, Place] = {}
    left = float(LABEL_WIDTH)
    for node in sorted(inner, key=lambda node: (centre[node], node)):
        x = round(max(left + _BOX_WIDTH / 2, centre[node]), 1)
        placed[node] = (x, height)
        left = x + _BOX_WIDTH / 2 + 4
    return placed


def _band_marks(bands: list[tuple[int, bool]], height: float, width: float) -> list[Markup]:
    """A line and a name for every sublayer."""
    shape = Markup('<path class="gl" d="M4 {}H{}"/><text class="rl" x="4" y="{}">{}</text>')
    marks = []
    for i, (layer, is_mlp) in enumerate(bands):
        bottom = height - 40 - _BAND * i
        name = f"{layer}.{'mlp' if is_mlp else 'attn'}"
        marks.append(shape.format(bottom, round(width, 1), bottom - _BAND / 2 + 4, name))
    return marks


def _bus_marks(
    nodes: list[Node], columns: dict[int, float], places: dict[Node, Place], height: float
) -> list[Markup]:
    """A residual channel as a line from its first node to its last, with its number below."""
    line = Markup('<path class="er" d="M{} {}V{}"><title>residual channel {}</title></path>')
    label = Markup('<text class="nl" x="{}" y="{}" text-anchor="middle">{}</text>')
    marks: list[Markup] = []
    for channel, x in columns.items():
        heights = [places[node][1] for node in nodes if is_on_stream(node) and node.channel == channel]
        marks.append(line.format(x, max(heights), min(heights), channel))
        marks.append(label.format(x, height - 22, channel))
    return marks


def _box(node: Node, place: Place) -> Markup:
    x, y = place
    letter = node.kind[-1] if node.kind.startswith("attn") else "n"
    shape = (
        '<rect class="nd" x="{}" y="{}" width="{}" height="{}" rx="3"><title>{}</title></rect>'
        '<text class="nl" x="{}" y="{}" text-anchor="middle">{}{}</text>'
    )
    corner = round(x - _BOX_WIDTH / 2, 1), round(y - _BOX_HEIGHT / 2, 1)
    text = x, round(y + 3, 1), letter, node.channel
    return Markup(shape).format(*corner, _BOX_WIDTH, _BOX_HEIGHT, node.address, *text)


def _dot(node: Node, place: Place) -> Markup:
    shape = '<circle class="nd" cx="{}" cy="{}" r="4"><title>{}</title></circle>'
    return Markup(shape).format(*place, node.address)


# --- more than 200: blocks ------------------------------------------------------------------------

Block = tuple[int, int]
"""Layer and kind of nodes; its first node stands for its name."""


def block_rows(circuit: dict[str, Any]) -> list[list[str]]:
    """Which blocks are joined: from, its nodes, to, its nodes, weights, sum of |weight|, the largest."""
    nodes, edges = read_graph(circuit)
    members = _members(nodes)
    rows = []
    for (source, target), weights in sorted(_joins(edges).items(), key=lambda item: (-sum(item[1]), item[0])):
        ends = (_block_name(source, members), _block_name(target, members))
        sizes = (number(len(members[source])), number(len(members[target])))
        shown = number(len(weights)), number(sum(weights)), number(max(weights))
        rows.append([ends[0], sizes[0], ends[1], sizes[1], *shown])
    return rows


def block_figure(nodes: list[Node], edges: list[Edge], name: str) -> Markup:
    """One box per block, rows bottom-up; a line is as thick as the |weight| it stands for."""
    members, joins = _members(nodes), _joins(edges)
    rows: dict[tuple[int, int], list[Block]] = defaultdict(list)
    for block, own in sorted(members.items()):
        rows[own[0].row].append(block)
    keys, slot = sorted(rows), 150
    width = LABEL_WIDTH + slot * max(map(len, rows.values()))
    height = ROW_HEIGHT * len(keys)
    places = {
        block: (LABEL_WIDTH + slot * (j + 0.5), ROW_HEIGHT * (len(keys) - i - 0.5))
        for i, key in enumerate(keys)
        for j, block in enumerate(rows[key])
    }
    peak = max((sum(weights) for weights in joins.values()), default=1.0) or 1.0
    line = Markup('<path class="ep" d="M{} {}L{} {}" stroke-width="{}"><title>{} to {}: {}</title></path>')
    box = Markup(
        '<rect class="nd" x="{}" y="{}" width="130" height="22" rx="3"/>'
        '<text class="nl" x="{}" y="{}" text-anchor="middle">{}: {} nodes</text>'
    )
    marks = []
    for (source, target), weights in joins.items():
        thickness = round(max(0.5, 6 * sum(weights) / peak), 1)
        told = f"{number(len(weights))} weights, sum of |weight| {number(sum(weights))}"
        ends = _block_name(source, members), _block_name(target, members)
        marks.append(line.format(*places[source], *places[target], thickness, *ends, told))
    for block, (x, y) in places.items():
        marks.append(box.format(x - 65, y - 11, x, y + 3, _block_name(block, members), len(members[block])))
    caption = (
        f"{number(len(nodes))} nodes and {number(len(edges))} edges in {len(members)} blocks, all shown."
    )
    return figure(name, caption, width, height, Markup("\n").join(marks))


def _members(nodes: list[Node]) -> dict[Block, list[Node]]:
    members: dict[Block, list[Node]] = defaultdict(list)
    for node in nodes:
        members[node.layer, node.kind_index].append(node)
    return members


def _joins(edges: list[Edge]) -> dict[tuple[Block, Block], list[float]]:
    """|weight| of every edge, by the blocks of its ends."""
    joins: dict[tuple[Block, Block], list[float]] = defaultdict(list)
    for source, target, weight in edges:
        ends = (source.layer, source.kind_index), (target.layer, target.kind_index)
        joins[ends].append(abs(weight))
    return joins


def _block_name(block: Block, members: dict[Block, list[Node]]) -> str:
    return row_name(members[block])
