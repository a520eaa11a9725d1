"""The page of a run: made from the record alone, closed to the network, honest about gaps."""

import base64
import copy
import hashlib
import html
import json
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bridges import charts, drawing, report, report_values
from bridges.drawing import circuit_svg
from bridges.integrity import embedded
from bridges.report import render_html, summary_rows, verdict, write_report
from extractor.artifacts import file_sha256, read_json
from extractor.errors import InputError
from tests.bridges.report_record import circuit, edit, record, small_graph

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\x1b[2J\ud800 {{ 7*7 }}"
UNSHOWN = {"clusters", "n", "num_right_before", "cuts", "nonsense", "scatter", "run", "excluded"}
"""Of intervals, counted in the account of prompts, only drawn, or shown as the least of several."""
GROUPS = 23
"""Numbers that are undefined together: few enough that none hides another."""
VOID = {"meta", "link", "br", "img", "hr", "input"}
RATES = ("flip_rate", "flip_rate_indirect", "control_random_node", "control_random_direction")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all numbers, those of graphs aside."""
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path
    for key, part in parts:
        if key != "graph":
            yield from leaves(part, (*path, key))


def without_record(markup: str) -> str:
    """The page that a reader sees: all but the record inside it."""
    block = embedded(markup)
    return markup.replace(block[0], "")


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not nest."""

    def __init__(self, markup: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(markup)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


# --- the page as a file ---------------------------------------------------------------------------


def test_two_renders_are_equal_and_leave_the_record_alone():
    value = record()
    before = copy.deepcopy(value)
    assert render_html(value) == render_html(copy.deepcopy(value))
    assert value == before


def test_page_asks_nothing_of_the_network():
    markup = render_html(record())
    for forbidden in ("http", "src=", "url(", "@import", " style=", "javascript:", "eval(", "fetch("):
        assert forbidden not in markup.replace("http-equiv", "").lower(), forbidden
    page = Page(markup)
    assert {a["href"][:1] for a in page.named("a")} == {"#"}
    assert [a["href"] for a in page.named("link")] == ["data:,"]
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {a["href"][1:] for a in page.named("a")} <= ids


def test_policy_holds_the_hashes_of_style_and_script():
    markup = render_html(record())
    style = re.search(r"<style>(.*?)</style>", markup, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    script = re.findall(r"<script>(.*?)</script>", markup, re.DOTALL)
    assert len(script) == 1
    own = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = Page(markup).named("meta")[1]["content"]
    wanted = f"default-src 'none'; style-src 'sha256-{digest}'; script-src 'sha256-{own}'; img-src data:"
    assert policy.startswith(wanted)


def test_page_is_accessible_in_structure():
    markup = render_html(record())
    page = Page(markup)
    assert page.named("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert len(page.named("caption")) == len(page.named("table")) > 10
    assert all("scope" in attrs for attrs in page.named("th"))
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in page.named("svg"))
    numbered = re.findall(r"<h2[^>]*>(\d+)\.", markup)
    assert numbered == [str(i) for i in range(2, 13)]


def test_colours_keep_their_contrast():
    style = re.search(r"<style>(.*?)</style>", render_html(record()), re.DOTALL)[1]
    schemes = [dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in style.split("@media")[:2]]
    for colours in schemes:
        assert len(colours) == 12
        for ground in ("bg", "panel"):
            for ink in ("fg", "muted", "c0", "c1", "c2", "c3", "ok", "bad"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        assert contrast(colours["grey"], colours["bg"]) >= 3


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_page_of_a_large_run_stays_small():
    value = record(*(f"task{i}" for i in range(20)))
    for i, one in enumerate(value["circuits"].values()):
        one["graph"] = large_graph(seed=i)
    markup = render_html(value)
    Page(markup)
    assert len(markup.encode()) <= 5_000_000


def large_graph(seed: int, num_nodes: int = 400, num_edges: int = 1000) -> dict[str, Any]:
    choose = random.Random(seed)
    places = {(layer, kind) for layer in range(4) for kind in drawing.KINDS}
    rows = {place: choose.sample(range(4096), num_nodes // 32 + 1) for place in sorted(places)}
    nodes = [f"{la}.{kind}:{c}" for (la, kind), row in rows.items() for c in row][:num_nodes]
    joins = [("attn.act_in", f"attn.{x}") for x in "qkv"] + [("attn.v", "attn.resid_delta")]
    joins += [("mlp.act_in", "mlp.post_act"), ("mlp.post_act", "mlp.resid_delta")]
    edges = {}
    while len(edges) < num_edges:
        source, (left, right) = choose.choice(nodes), choose.choice(joins)
        if left in source:
            layer = source.partition(".")[0]
            target = f"{layer}.{right}:{choose.choice(rows[int(layer), right])}"
            if target in nodes:
                edges[source, target] = choose.gauss(0, 1)
    return {"nodes": nodes, "edges": [[*ends, weight] for ends, weight in edges.items()]}


# --- text from outside ----------------------------------------------------------------------------


def hostile_record() -> dict[str, Any]:
    """Every string that is not an address, a status or a target is hostile, and so are the keys."""

    def spoil(value: Any, key: object = None) -> Any:
        if isinstance(value, dict) and key != "graph":
            return {k: spoil(part, k) for k, part in value.items()}
        if isinstance(value, list) and key not in ("graph", "nodes"):
            return [spoil(part) for part in value]
        return HOSTILE + value if isinstance(value, str) and key != "status" else value

    value = spoil(record("quotes" + HOSTILE))
    value["bridges"] = {HOSTILE: value["bridges"]["0.resid_pre"]}
    value["provenance"]["inputs"] = {HOSTILE: HOSTILE}
    value["edits"][HOSTILE] = {"undefined": HOSTILE}
    return value


def test_hostile_text_is_text():
    markup = render_html(hostile_record())
    page = Page(markup)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "iframe", "object", "form"}
    assert page.named("script") == [{"type": "application/json", "id": "report-data"}, {}]
    assert json.loads(embedded(markup)[0]) == report_values.tidy(hostile_record())
    assert {"svg", "table", "details"} <= tags
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert "</script><img src=x onerror=alert(1)>[U+202E][U+001B][2J[U+D800] {{ 7*7 }}" in (
        html.unescape(markup)
    )
    assert all(c.isprintable() or c == "\n" for c in markup)
    markup.encode()  # a lone surrogate would not encode


@pytest.mark.parametrize(
    "character", list("\x00\x7f\x85\u00a0\u00ad\u061c\u200b\u2028\u2066\ufe0f\U000e0041")
)
def test_unseen_characters_are_spelled_out(character: str):
    assert drawing.visible(f"a{character}b") == f"a[U+{ord(character):04X}]b"


def test_seen_characters_are_kept():
    text = "caf\u00e9 \u4e2d\u6587 \u2192 plain <b>"
    assert drawing.visible(text) == text


def test_line_feeds_stay_only_in_blocks():
    markup = render_html(record())
    assert "<pre>\ndef f(x):\n    return [1, 2</pre>" in markup
    assert "<code>][U+000A]</code>" in markup


# --- numbers --------------------------------------------------------------------------------------


def test_complete_record_leaves_no_gap():
    markup = render_html(record())
    assert "not recorded" not in markup
    assert "ndefined:" not in markup
    assert not re.search(r"\b(nan|NaN|inf|None|Undefined)\b", " ".join(Page(markup).text))


def test_every_figure_of_an_edit_is_on_the_page():
    value = record("quotes")
    row = r'<tr><th scope="row">([^<]*)</th>((?:<td>[^<]*</td>){4})</tr>'
    rows = re.findall(row, render_html(value))
    table = {strength: re.findall(r"<td>([^<]*)</td>", cells) for strength, cells in rows}
    one = value["edits"]["quotes"]
    for i, strength in enumerate(one["strengths"]):
        cells = table[f"{strength:g}"]
        assert cells == [f"{100 * one[key][i]:.1f} %" for key in RATES]


def test_curve_has_a_titled_point_for_every_figure():
    one = edit()
    markup = render_html(record("quotes"))
    for key, name in report_values.SERIES:
        for strength, rate in zip(one["strengths"], one[key], strict=True):
            assert f"<title>{name}, strength {strength:g}: {100 * rate:.1f} %</title>" in markup
    curve = charts.strength_curve(one)
    assert [label for _, label in curve.grid] == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    assert [line.points[0][:2] for line in curve.lines] == [(46.0, 192.0)] * 4
    ends = [line.points[-1] for line in curve.lines]
    assert [x for x, _, _ in ends] == [346.0] * 4
    assert [y for _, y, _ in ends] == [round(192 - 180 * one[key][-1], 1) for key in RATES]
    assert len({line.marker for line in curve.lines}) == 4
    styles = re.search(r"<style>(.*?)</style>", markup, re.DOTALL)[1]
    assert len(set(re.findall(r"\.s[123] \{[^}]*dasharray: ([\d ]+)", styles))) == 3


@pytest.mark.parametrize("group", range(GROUPS))
def test_every_number_may_be_undefined(group: int):
    value = record("quotes")
    paths = [path for path in leaves(value) if path[0] != "schema_version"]
    assert len(paths) > 80
    whys = {path: f"why {'/'.join(map(str, path))};" for path in paths[group::GROUPS]}
    for path, why in whys.items():
        value = replaced(value, path, {"undefined": why})
    markup = without_record(render_html(value))
    for path, why in whys.items():
        shown_by_itself = not UNSHOWN & set(path) and path[0] != "desk"
        assert markup.count(why) >= 1 + shown_by_itself, path  # in its own place, and among the undefined


@pytest.mark.parametrize(
    "path",
    [("circuits",), ("edits",), ("bridges",), ("student",), ("dense", "tasks"), ("criteria",)]
    + [("circuits", "quotes"), ("edits", "quotes"), ("circuits", "quotes", "graph")]
    + [("circuits", "quotes", "random_circuits"), ("edits", "quotes", "strengths")]
    + [("edits", "quotes", "flip_rate_indirect"), ("circuits", "quotes", "accuracy_interval")],
)
def test_every_part_may_be_undefined(path: tuple[str, ...]):
    value = replaced(record("quotes", "brackets"), path, {"undefined": "disk was full"})
    page = Page(render_html(value))
    assert "disk was full" in " ".join(page.text)
    assert summary_rows(value)


def test_missing_parts_are_named_as_such():
    value = record("quotes")
    for key in list(value):
        page = Page(render_html({k: v for k, v in value.items() if k != key}))
        assert re.search("not recorded|No|None|not tested|no exclusion", " ".join(page.text))
    Page(render_html({}))
    assert verdict({})[0] == "not tested"


def test_absent_off_target_kl_gives_no_row():
    value = record("quotes")
    del value["edits"]["quotes"]["off_target_kl"]
    markup = render_html(value)
    assert "off-target KL, in the form" not in markup
    assert "not recorded" not in markup


# --- files and summaries --------------------------------------------------------------------------


def test_files_round_trip_without_nan(tmp_path: Path):
    value = record()
    value["student"]["kl_dense"] = float("nan")
    value["edits"]["quotes"]["flip_rate"][2] = float("inf")
    path = write_report(value, tmp_path)
    assert path == tmp_path / "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    text = (tmp_path / "report.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert stored["student"]["kl_dense"] == {"undefined": "measured as no number"}
    assert stored["edits"]["quotes"]["flip_rate"][2] == {"undefined": "measured as infinite"}
    page = path.read_text(encoding="utf-8")
    assert page == render_html(read_json(tmp_path / "report.json", "report", "the recipe"))
    assert file_sha256(tmp_path / "report.json") in page
    assert "undefined: measured as no number" in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)


def test_summary_says_what_the_record_says():
    rows = dict(summary_rows(record("quotes")))
    assert rows["dense model, CE"] == "1.877 nats/token"
    assert rows["student, KL to dense"] == "0.1534 nats/token"
    assert rows["student, nonzeros"] == "131,072 of 1,048,576 weights"
    assert rows["circuit, quotes"] == (
        "12 of 4,096 nodes, 8 of 123,456 edges; loss 0.1432 nats; accuracy 95.6 %; without it 51.2 %"
    )
    assert rows["edit, quotes"] == (
        "1.resid_pre, 2 nodes; best strength 1.5: flips 87.1 % total, 74.2 % indirect; "
        "controls 1.6 % random nodes, 3.1 % random direction"
    )
    page = html.unescape(render_html(record("quotes")))
    assert all(text in page for row in rows.items() for text in row)


@pytest.mark.parametrize(
    ("met", "word"),
    [
        ([True, True], "supported"),
        ([True, False], "partly supported"),
        ([True, {"undefined": "no GPU"}], "partly supported"),
        ([False, False], "not supported"),
        ([{"undefined": "no GPU"}], "not tested"),
        ([], "not tested"),
    ],
)
def test_verdict_counts_criteria(met: list[Any], word: str):
    value = record()
    value["criteria"] = [{"claim": "c", "threshold": "t", "measured": "m", "met": m} for m in met]
    assert verdict(value)[0] == word
    assert verdict(value)[1].startswith(f"{met.count(True)} of {len(met)} criteria")
    assert f"Verdict: {word}." in render_html(value)
    assert verdict(value | {"status": "started"})[0] == "not tested"


# --- pictures of circuits -------------------------------------------------------------------------


def circles(markup: str) -> dict[str, tuple[float, float]]:
    found = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="4"><title>([^<]+)</title>', markup)
    return {address: (float(x), float(y)) for x, y, address in found}


def test_rows_run_bottom_up_in_order_of_the_forward_pass():
    places = circles(circuit_svg(circuit()))
    assert set(places) == set(small_graph()["nodes"])
    order = ["0.attn.act_in:5", "0.attn.v:3", "0.attn.resid_delta:7", "0.mlp.act_in:7"]
    order += ["0.mlp.post_act:40", "0.mlp.resid_delta:12", "1.attn.act_in:7", "1.attn.v:2"]
    heights = [places[address][1] for address in order]
    assert heights == sorted(set(heights), reverse=True)
    q, k, v = (places[a] for a in ("0.attn.q:1", "0.attn.k:4", "0.attn.v:3"))
    assert q[1] == k[1] == v[1]
    assert q[0] < k[0] < v[0]


def test_sweeps_untangle_what_can_be_untangled():
    pairs = [(i, 9 - i) for i in range(10)]
    edges = [[f"0.mlp.act_in:{a}", f"0.mlp.post_act:{b}", 1.0] for a, b in pairs]
    nodes = [end for edge in edges for end in edge[:2]]
    places = circles(circuit_svg({"graph": {"nodes": nodes, "edges": edges}}))
    ends = sorted((places[source][0], places[target][0]) for source, target, _ in edges)
    assert [target for _, target in ends] == sorted(target for _, target in ends)


def test_residual_links_join_writes_to_the_reads_they_reach():
    nodes = ["0.attn.resid_delta:7", "0.mlp.act_in:7", "1.attn.act_in:7", "1.attn.resid_delta:7"]
    nodes += ["1.mlp.resid_delta:7", "2.attn.act_in:7", "2.attn.act_in:8", "0.attn.act_in:7"]
    links = drawing.residual_links(map(drawing._read_node, nodes))
    assert [(a.address, b.address) for a, b in links] == [
        ("0.attn.resid_delta:7", "0.mlp.act_in:7"),
        ("0.attn.resid_delta:7", "1.attn.act_in:7"),
        ("1.attn.resid_delta:7", "2.attn.act_in:7"),
        ("1.mlp.resid_delta:7", "2.attn.act_in:7"),
    ]
    markup = circuit_svg(circuit())
    assert markup.count('class="er"') == 3
    assert "residual channel 7: 0.attn.resid_delta:7 to 0.mlp.act_in:7" in markup


def test_weights_show_as_width_and_sign_as_colour_and_dash():
    markup = circuit_svg(circuit())
    path = r'class="(e[pn])" d="[^"]+" stroke-width="([\d.]+)"><title>([^<]+)<'
    widths = re.findall(path, markup)
    drawn = {title: (kind, float(width)) for kind, width, title in widths}
    assert drawn["0.mlp.act_in:7 to 0.mlp.post_act:40: weight -1.25"] == ("en", 4.0)
    assert drawn["0.attn.v:3 to 0.attn.resid_delta:7: weight +0.9"] == ("ep", 2.9)
    assert "12 of 12 nodes and 8 of 8 edges shown, 100.0 % of total |weight|; 3 residual" in markup
    style = render_html(record())
    assert re.search(r"\.en \{[^}]*dasharray", style)
    assert not re.search(r"\.ep \{[^}]*dasharray", style)


def test_large_circuits_keep_their_strongest_edges():
    graph = large_graph(seed=3, num_edges=3000)
    one = circuit() | {"graph": graph, "nodes": 400, "edges": 3001}
    markup = circuit_svg(one, max_nodes=50, max_edges=60)
    assert markup == circuit_svg(copy.deepcopy(one), max_nodes=50, max_edges=60)
    shown = re.findall(r"<title>(\S+) to (\S+): weight", markup)
    assert len(circles(markup)) <= 50
    assert 0 < len(shown) <= 60
    strongest = max(graph["edges"], key=lambda edge: abs(edge[2]))
    assert tuple(strongest[:2]) in shown
    share = re.search(r"(\d+) of 3000 edges shown, ([\d.]+) % of total", markup)
    weights = {(a, b): abs(w) for a, b, w in graph["edges"]}
    assert int(share[1]) == len(shown)
    assert float(share[2]) == pytest.approx(
        100 * sum(weights[ends] for ends in shown) / sum(weights.values()), abs=0.06
    )
    assert "The record counts 3,001 edges, the graph 3000." in markup


def test_edges_without_a_weight_are_not_drawn_as_if_they_had_one():
    one = circuit()
    one["graph"]["edges"][0][2] = float("nan")
    markup = circuit_svg(one)
    assert "7 of 7 edges shown" in markup
    assert "The record counts 8 edges, the graph 7." in markup


def test_table_twin_names_the_strongest_ends():
    table = dict(drawing.node_rows(circuit()))
    assert list(table)[:3] == ["0.attn.act_in", "0.attn.q/k/v", "0.attn.resid_delta"]
    rows = {address: ends for nodes in table.values() for address, *ends in nodes}
    assert set(rows) == set(small_graph()["nodes"])
    assert rows["0.attn.act_in:12"] == ["residual channel 12", "0.attn.q:1 +0.52 (1 of 2)"]
    assert rows["1.attn.v:2"] == ["1.attn.act_in:12 +0.2 (1 of 2)", "none"]
    kept = drawing.node_rows(circuit(), max_rows=2)
    assert [n[0] for _, nodes in kept for n in nodes] == ["0.mlp.act_in:7", "0.mlp.post_act:40"]


def test_empty_circuit_has_no_picture():
    assert "No picture: no nodes recorded" in circuit_svg({})
    assert "No picture: lost" in circuit_svg({"graph": {"undefined": "lost"}})
    alone = circuit_svg({"graph": {"nodes": ["0.attn.q:1"], "edges": []}})
    assert "1 of 1 nodes and 0 of 0 edges shown; 0 residual links." in alone


@pytest.mark.parametrize("address", ["0.attn.act_in", "0.mlp.q:3", "0.attn.q:-1", "x<b>", 3])
def test_unknown_addresses_are_refused(address: object):
    with pytest.raises(InputError, match="node address"):
        circuit_svg({"graph": {"nodes": [address], "edges": []}})


def test_edges_between_unlisted_nodes_are_refused():
    edges = [["0.attn.act_in:1", "0.attn.q:1", 1.0]]
    with pytest.raises(InputError, match="not listed"):
        circuit_svg({"graph": {"nodes": ["0.attn.q:1"], "edges": edges}})


def test_the_room_names_no_torch():
    for module in (report, drawing):
        assert "torch" not in Path(module.__file__).read_text(encoding="utf-8")


def test_a_verdict_stands_beside_what_it_rests_on() -> None:
    page = render_html(record())
    assert "1 of 2" in page
    assert "seeds searched: 1, at least 10" in page
