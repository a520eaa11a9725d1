"""Ink for the report: text made visible, numbers made text, and a circuit's picture as SVG.

1. `visible` is the one place where text from outside becomes text on the page; HTML escaping
   itself is left to markupsafe.
2. `number`, `percent`, `signed` write numbers; what is not a finite number becomes its reason.
3. `circuit_svg` draws one row per (layer, kind of node), bottom-up. The order inside a row comes
   from barycentre sweeps, never from forces or chance: the same circuit gives the same bytes.
   `node_rows` is the same circuit as a table.

Pictures carry classes and presentation attributes only: the page's content security policy allows
neither scripts nor style attributes.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Undefined
from markupsafe import Markup

from extractor.errors import InputError

NOT_RECORDED = "not recorded"
KINDS = (
    "attn.act_in",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.resid_delta",
    "mlp.act_in",
    "mlp.post_act",
    "mlp.resid_delta",
)
_ROW_OF_KIND = (0, 1, 1, 1, 2, 3, 4, 5)
_ADDRESS = re.compile(rf"(\d{{1,6}})\.({'|'.join(map(re.escape, KINDS))}):(\d{{1,9}})", re.ASCII)
# Printable to Unicode, yet nothing is seen: fillers, joiners, selectors, the braille blank.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
LABEL_WIDTH, ROW_HEIGHT, _SLOT, _MIN_WIDTH, _NAME_SLOT = 116, 56, 16, 420, 30
_SWEEPS = 8


# --- text and numbers -----------------------------------------------------------------------------


def visible(value: object) -> str:
    """Text with every control, bidi, blank and unassigned character spelled as `[U+202E]`."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() and not _BLANK.match(c) else f"[U+{ord(c):04X}]" for c in text)


def reason(value: object) -> str | None:
    """Why a value is undefined, or None where it is not an `{"undefined": reason}`."""
    if isinstance(value, dict) and isinstance(value.get("undefined"), str):
        return visible(value["undefined"])
    return None


def finite(value: object) -> float | None:
    """The value as a float where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def as_text(value: object) -> str:
    """Any value of the report as one line of text; undefined values give their reason."""
    if (why := reason(value)) is not None:
        return f"undefined: {why}"
    if value is None or isinstance(value, Undefined):
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(as_text(item) for item in value) or "none"
    return visible(value)


def number(value: object, unit: str = "") -> str:
    """A count in full or a measure to four digits, with its unit; anything else as text."""
    measure = finite(value)
    if measure is None:
        return "undefined: not a finite number" if isinstance(value, float) else as_text(value)
    if isinstance(value, int):
        shown = f"{value:,d}"
    else:  # adding 0.0 turns -0.0 into 0
        shown = f"{measure:,.0f}" if abs(measure) >= 10_000 else f"{measure + 0.0:.4g}"
    return f"{shown} {unit}".rstrip()


def percent(value: object) -> str:
    """A share as a percentage to one decimal; anything else as text."""
    share = finite(value)
    return number(value) if share is None else f"{100 * share:.1f} %"


def signed(value: object) -> str:
    """A weight or a difference with its sign; anything else as text."""
    measure = finite(value)
    return number(value) if measure is None else f"{measure + 0.0:+.3g}"


# --- circuits -------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Node:
    """One node of a circuit, ordered as the forward pass runs."""

    layer: int
    kind_index: int
    channel: int

    @property
    def kind(self) -> str:
        """Sublayer and kind, e.g. `attn.act_in`."""
        return KINDS[self.kind_index]

    @property
    def address(self) -> str:
        """The full address, e.g. `0.attn.act_in:12`."""
        return f"{self.layer}.{self.kind}:{self.channel}"

    @property
    def row(self) -> tuple[int, int]:
        """The row of the picture; q, k and v of a layer share one."""
        return self.layer, _ROW_OF_KIND[self.kind_index]


Edge = tuple[Node, Node, float]
Link = tuple[Node, Node]


def circuit_svg(
    circuit: dict[str, Any], max_nodes: int = 120, max_edges: int = 300, name: str = "this circuit"
) -> Markup:
    """A task's circuit as a figure: the strongest edges, residual links, and what is left out."""
    all_nodes, all_edges = read_graph(circuit)
    if not all_nodes:
        why = reason(circuit) or reason(circuit.get("graph")) or "no nodes recorded"
        return Markup('<p class="note">No picture: {}</p>').format(why)
    nodes, edges = _strongest(all_nodes, all_edges, max_nodes, max_edges)
    links = residual_links(nodes)
    rows = _ordered_rows(nodes, [*links, *((source, target) for source, target, _ in edges)])
    width = LABEL_WIDTH + max(_MIN_WIDTH, *(_SLOT * _num_slots(row) for row in rows.values()))
    height = ROW_HEIGHT * len(rows)
    places = _places(rows, width - LABEL_WIDTH)
    lines = _link_marks(links, places) + edge_marks(edges, places)
    marks = Markup("\n").join(lines + _node_marks(rows, places, width))
    caption = circuit_caption(circuit, (nodes, all_nodes), (edges, all_edges), len(links))
    return figure(name, caption, width, height, marks)


def figure(name: str, caption: str, width: float, height: float, marks: Markup) -> Markup:
    """An SVG with its caption, in a region that scrolls by itself."""
    return Markup(
        '<figure><div class="scroll" tabindex="0" role="region" aria-label="Picture of {}">\n'
        '<svg class="circuit" role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">\n'
        "{}\n</svg></div>\n<figcaption>{}</figcaption></figure>"
    ).format(visible(name), caption, width, height, width, height, marks, caption)


def node_rows(circuit: dict[str, Any], max_rows: int = 400) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The table twin of a picture: per row, (node, strongest weight in, strongest weight out)."""
    nodes, edges = read_graph(circuit)
    into: dict[Node, list[tuple[Node, float]]] = defaultdict(list)
    out: dict[Node, list[tuple[Node, float]]] = defaultdict(list)
    for source, target, weight in edges:
        into[target].append((source, weight))
        out[source].append((target, weight))

    def importance(node: Node) -> tuple[float, Node]:
        return -sum(abs(weight) for _, weight in into[node] + out[node]), node

    table: dict[tuple[int, int], list[Node]] = defaultdict(list)
    for node in sorted(sorted(nodes, key=importance)[:max_rows]):
        table[node.row].append(node)
    return [
        (row_name(row), [(n.address, _ends(n, into[n], 0), _ends(n, out[n], 1)) for n in row])
        for row in table.values()
    ]


def residual_links(nodes: Iterable[Node]) -> list[Link]:
    """Writes joined to the reads they reach through their residual channel.

    A write is joined to every read up to the next write of its channel, or, where there is none
    before that, to the first one after. So every read hangs on its latest write.
    """
    writes: dict[int, list[Node]] = defaultdict(list)
    reads: dict[int, list[Node]] = defaultdict(list)
    for node in sorted(nodes):
        if node.kind.endswith("resid_delta"):
            writes[node.channel].append(node)
        elif node.kind.endswith("act_in"):
            reads[node.channel].append(node)
    links: list[Link] = []
    for channel, channel_writes in sorted(writes.items()):
        for write, following in zip(channel_writes, [*channel_writes[1:], None], strict=True):
            later = [read for read in reads[channel] if read.row > write.row]
            near = [read for read in later if following is None or read.row < following.row]
            links += [(write, read) for read in near or later[:1]]
    return links


def _read_node(address: object) -> Node:
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is None:
        raise InputError(f"report: '{visible(address)}' is no node address; expected e.g. '0.attn.act_in:12'")
    return Node(int(match[1]), KINDS.index(match[2]), int(match[3]))


def read_graph(circuit: dict[str, Any]) -> tuple[list[Node], list[Edge]]:
    graph = circuit.get("graph")
    if not isinstance(graph, dict) or reason(graph) is not None:
        return [], []
    nodes = {_read_node(address) for address in graph["nodes"]}
    edges: list[Edge] = []
    for source, target, weight in graph["edges"]:
        ends = _read_node(source), _read_node(target)
        if not nodes.issuperset(ends):
            raise InputError(f"report: edge '{source}' -> '{target}' has an end that is not listed")
        if (known := finite(weight)) is not None:  # the caption tells the others' number
            edges.append((*ends, known))
    return sorted(nodes), edges


def _strongest(
    nodes: Sequence[Node], edges: Sequence[Edge], max_nodes: int, max_edges: int
) -> tuple[list[Node], list[Edge]]:
    """Edges by falling |weight| while their ends fit; then nodes without an edge."""
    chosen = set(nodes) if len(nodes) <= max_nodes else set[Node]()
    kept: list[Edge] = []
    for edge in sorted(edges, key=lambda edge: (-abs(edge[2]), edge[0], edge[1])):
        added = {edge[0], edge[1]} - chosen
        if len(kept) < max_edges and len(chosen) + len(added) <= max_nodes:
            chosen |= added
            kept.append(edge)
    rest = [node for node in nodes if node not in chosen]
    return sorted(chosen) + rest[: max_nodes - len(chosen)], kept


def _ordered_rows(nodes: Iterable[Node], links: Iterable[Link]) -> dict[tuple[int, int], list[Node]]:
    """Rows from the first to the last, each in the order the barycentre sweeps end with."""
    rows: dict[tuple[int, int], list[Node]] = defaultdict(list)
    for node in sorted(nodes):
        rows[node.row].append(node)
    below: dict[Node, list[Node]] = defaultdict(list)
    above: dict[Node, list[Node]] = defaultdict(list)
    for source, target in links:
        below[target].append(source)
        above[source].append(target)
    place = {n: (i + 0.5) / len(row) for row in rows.values() for i, n in enumerate(row)}

    def centre(node: Node, neighbours: dict[Node, list[Node]]) -> float:
        near = neighbours[node]
        return round(sum(place[n] for n in near) / len(near), 6) if near else place[node]

    for sweep in range(_SWEEPS):
        neighbours = above if sweep % 2 else below
        for key in sorted(rows, reverse=bool(sweep % 2)):
            centres = {node: centre(node, neighbours) for node in rows[key]}
            # The kind comes first: q, k and v stay groups of their shared row.
            rows[key].sort(key=lambda n: (n.kind_index, centres[n], n.channel))
            place |= {n: (i + 0.5) / len(rows[key]) for i, n in enumerate(rows[key])}
    return {key: rows[key] for key in sorted(rows)}


def _num_slots(row: Sequence[Node]) -> int:
    """Places a row takes: its nodes and one gap between groups."""
    return len(row) + len({node.kind_index for node in row}) - 1


def _places(rows: dict[tuple[int, int], list[Node]], width: float) -> dict[Node, tuple[float, float]]:
    places: dict[Node, tuple[float, float]] = {}
    for i, row in enumerate(rows.values()):
        y = ROW_HEIGHT * (len(rows) - i - 0.5)
        kinds = sorted({node.kind_index for node in row})
        for j, node in enumerate(row):
            slot = j + kinds.index(node.kind_index) + 0.5
            places[node] = round(LABEL_WIDTH + slot * width / _num_slots(row), 1), round(y, 1)
    return places


def _line(link: Link, places: dict[Node, tuple[float, float]]) -> str:
    (x1, y1), (x2, y2) = places[link[0]], places[link[1]]
    return f"M{x1} {y1}L{x2} {y2}"


def _link_marks(links: Iterable[Link], places: dict[Node, tuple[float, float]]) -> list[Markup]:
    shape = Markup('<path class="er" d="{}"><title>residual channel {}: {} to {}</title></path>')
    return [
        shape.format(_line(link, places), link[0].channel, link[0].address, link[1].address) for link in links
    ]


def edge_marks(edges: Sequence[Edge], places: dict[Node, tuple[float, float]]) -> list[Markup]:
    shape = Markup('<path class="{}" d="{}" stroke-width="{}"><title>{} to {}: weight {}</title></path>')
    peak = max((abs(weight) for *_, weight in edges), default=0.0) or 1.0
    marks: list[Markup] = []
    for source, target, weight in reversed(edges):  # strongest last, so that it lies on top
        kind = "en" if weight < 0 else "ep"
        thickness = round(max(0.4, 4 * abs(weight) / peak), 1)
        line = _line((source, target), places)
        ends = source.address, target.address
        marks.append(shape.format(kind, line, thickness, *ends, signed(weight)))
    return marks


def _node_marks(
    rows: dict[tuple[int, int], list[Node]], places: dict[Node, tuple[float, float]], width: float
) -> list[Markup]:
    label = Markup('<text class="rl" x="4" y="{}">{}</text>')
    circle = Markup('<circle class="nd" cx="{}" cy="{}" r="4"><title>{}</title></circle>')
    name = Markup('<text class="nl" x="{}" y="{}" text-anchor="middle">{}</text>')
    marks: list[Markup] = []
    for row in rows.values():
        marks.append(label.format(places[row[0]][1] + 4, row_name(row)))
        named = (width - LABEL_WIDTH) / _num_slots(row) >= _NAME_SLOT
        for node in row:
            x, y = places[node]
            marks.append(circle.format(x, y, node.address))
            if named:
                letter = node.kind[-1] if node.kind_index in (1, 2, 3) else ""
                marks.append(name.format(x, y + 15, f"{letter}{node.channel}"))
    return marks


def row_name(row: Sequence[Node]) -> str:
    kinds = dict.fromkeys(node.kind.partition(".")[2] for node in row)
    return f"{row[0].layer}.{row[0].kind.partition('.')[0]}.{'/'.join(kinds)}"


def _ends(node: Node, ends: list[tuple[Node, float]], side: int) -> str:
    """The strongest edge on one side of a node, or the residual channel that stands in for it."""
    if node.kind.endswith(("act_in", "resid_delta")[side]):
        return f"residual channel {node.channel}"
    if not ends:
        return "none"
    other, weight = min(ends, key=lambda end: (-abs(end[1]), end[0]))
    return f"{other.address} {signed(weight)} (1 of {len(ends)})"


def circuit_caption(
    circuit: dict[str, Any],
    nodes: tuple[Sequence[Node], Sequence[Node]],
    edges: tuple[Sequence[Edge], Sequence[Edge]],
    num_links: int,
) -> str:
    shown, total = (sum(abs(weight) for *_, weight in some) for some in edges)
    share = f", {percent(shown / total)} of total |weight|" if total else ""
    text = (
        f"{len(nodes[0])} of {len(nodes[1])} nodes and {len(edges[0])} of {len(edges[1])} edges "
        f"shown{share}; {num_links} residual links."
    )
    for key, carried in (("nodes", len(nodes[1])), ("edges", len(edges[1]))):
        if finite(circuit.get(key)) not in (None, carried):
            text += f" The record counts {number(circuit[key])} {key}, the graph {carried}."
    return text
