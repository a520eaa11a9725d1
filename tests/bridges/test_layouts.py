"""Pictures of circuits by size: a bus, rows, blocks, or a table alone; nothing left out unsaid."""

import re

import pytest

from bridges.layouts import BLOCKS, BUS, ROWS, block_rows, circuit_figure
from tests.bridges.report_record import small_graph
from tests.bridges.test_report import circles, large_graph

BOX = re.compile(r'<rect class="nd" x="([\d.]+)" y="([\d.]+)" width="34" height="18" rx="3"><title>([^<]+)<')


def test_a_small_circuit_is_a_bus() -> None:
    graph = small_graph()
    markup = circuit_figure({"graph": graph})
    dots = circles(markup)
    boxes = {address: (float(x) + 17, float(y) + 9) for x, y, address in BOX.findall(markup)}
    assert dots.keys() | boxes.keys() == set(graph["nodes"])
    assert {address.split(".")[2].split(":")[0] for address in dots} == {"act_in", "resid_delta"}
    on_channel_7 = {x for address, (x, _) in dots.items() if address.endswith(":7")}
    assert len(on_channel_7) == 1  # one vertical line
    for source, target, _ in graph["edges"]:  # bottom-up: reads, boxes, writes
        places = dots | boxes
        assert places[source][1] > places[target][1]
    assert "12 of 12 nodes and 8 of 8 edges shown, 100.0 % of total |weight|." in markup
    assert markup == circuit_figure({"graph": small_graph()})


def test_boxes_of_a_band_do_not_cover_one_another() -> None:
    edges = [["0.mlp.act_in:3", f"0.mlp.post_act:{i}", 1.0] for i in range(20)]
    nodes = sorted({end for edge in edges for end in edge[:2]})
    places = sorted(
        float(x) for x, _, _ in BOX.findall(circuit_figure({"graph": {"nodes": nodes, "edges": edges}}))
    )
    assert len(places) == 20
    assert min(b - a for a, b in zip(places, places[1:], strict=False)) >= 34


@pytest.mark.parametrize(
    ("num_nodes", "kind"), [(BUS - 8, "bus"), (ROWS - 60, "rows"), (BLOCKS - 600, "blocks")]
)
def test_the_layout_follows_from_the_size(num_nodes: int, kind: str) -> None:
    graph = large_graph(seed=1, num_nodes=num_nodes, num_edges=6)
    markup = circuit_figure({"graph": graph})
    is_bus, is_blocks = bool(BOX.search(markup)), 'width="130"' in markup
    assert (is_bus, is_blocks) == (kind == "bus", kind == "blocks")
    if kind == "blocks":
        assert f"{num_nodes} nodes and 6 edges in" in markup
    else:
        assert f"{num_nodes} of {num_nodes} nodes" in markup


def test_blocks_count_every_weight() -> None:
    graph = large_graph(seed=2)
    rows = block_rows({"graph": graph})
    assert sum(int(row[4]) for row in rows) == len(graph["edges"])
    total = sum(abs(weight) for *_, weight in graph["edges"])
    assert sum(float(row[5].replace(",", "")) for row in rows) == pytest.approx(total, rel=1e-3)
    assert [float(row[5]) for row in rows] == sorted((float(row[5]) for row in rows), reverse=True)


def test_a_circuit_too_large_for_a_picture_says_so() -> None:
    nodes = [f"0.mlp.post_act:{i}" for i in range(BLOCKS + 1)]
    assert "No picture: 1,001 nodes" in circuit_figure({"graph": {"nodes": nodes, "edges": []}})
