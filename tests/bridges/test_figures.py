"""The paper's figures of a run, from the numbers in its files."""

import importlib.util
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from bridges.cli import main
from bridges.figures import (
    draw_frontier,
    draw_inverse,
    draw_orders,
    draw_steering,
    draw_token_losses,
    orders_table,
    write_figures,
)
from bridges.plots import draw
from bridges.study import frontier


def lines(figure: Figure, axes: int = 0) -> dict[str, list[tuple[float, float]]]:
    """Points of every line by its label."""
    return {line.get_label(): list(map(tuple, line.get_xydata())) for line in figure.axes[axes].lines}


def order(size: int | None, losses: list[float]) -> dict:
    curve = {"sizes": [1, 10, 100], "losses": losses}
    at_loss = {"undefined": "no size reaches the target loss"} if size is None else size
    return {"curves": {"signed": curve}, "size_at_loss": at_loss, "loss_at_size": losses[1]}


def scored(**orders: dict) -> dict:
    return {"peers": {"target_loss": 0.15, "edges": {"methods": orders}}}


EVIDENCE = {
    "a": scored(learned=order(4, [0.7, 0.1, 0.01]), random=order(None, [0.7, 0.7, 0.7])),
    "b": scored(learned=order(9, [0.7, 0.4, 0.0]), random=order(100, [0.7, 0.5, 0.1])),
    "not scored": {},
}


def test_orders_are_geometric_means_over_the_tasks_that_were_scored() -> None:
    figure = Figure()
    assert draw_orders(figure, EVIDENCE)
    learned = lines(figure)["learned"]
    assert learned[1] == pytest.approx((10, 0.2))  # of 0.1 and 0.4
    assert learned[2][1] == pytest.approx((0.01 * 1e-6) ** 0.5)  # no loss at all is drawn as 1e-6
    rows = orders_table(EVIDENCE).splitlines()
    assert rows[0].startswith("| order of edges | edges at a loss of 0.15 |")
    assert rows[2:] == ["| learned | 6 | 2 of 2 | 0.25 |", "| random | 100 | 1 of 2 | 0.6 |"]
    assert not draw_orders(Figure(), {"not scored": {}})
    assert orders_table({"not scored": {}}) == ""


def test_an_edit_has_a_panel_with_its_controls() -> None:
    rates = ("flip_rate", "flip_rate_indirect", "control_random_node", "control_random_direction")
    edit = {"task": "quotes", "size": 2, "site": "0.resid_mid", "strengths": [0, 1]}
    edit |= {key: [0.0, 0.1 * i] for i, key in enumerate(rates, 1)}
    figure = Figure()
    assert draw_steering(figure, [edit] * 6)
    assert len(figure.axes) == 10  # two rows of five, four of them empty
    assert [points[1][1] for points in lines(figure, 5).values()] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert not draw_steering(Figure(), [])


def test_without_its_circuit_a_student_is_beside_one_without_random_circuits() -> None:
    found = {"nodes": 30, "student_accuracy": 1.0, "accuracy_without_calibrated": 0.5}
    found |= {"random_circuits": {"accuracy_without_mean": 0.9}}
    figure = Figure()
    assert draw_inverse(figure, {"a": found, "none found": {"nodes": 0}})
    drawn = lines(figure)
    assert drawn["without the circuit"] == [(30, 0.5)]
    assert drawn["without random circuits of that size"] == [(30, 0.9)]
    assert not draw_inverse(Figure(), {"none found": {"nodes": 0}})


def test_token_losses_carry_the_correlation_of_all_tokens() -> None:
    correlation = {"loss_correlation": {"pearson": {"value": 0.934, "low": 0.9, "high": 0.95}}}
    scatter = {"x": "dense", "y": "student", "of": 4000, "points": [[1.0, 1.5, 0], [2.0, 2.5, 1]]}
    figure = Figure()
    text = {"scatter": scatter, "models": {"student": {"overall": correlation}}}
    assert draw_token_losses(figure, {"text": text})
    assert figure.axes[0].get_title() == "r = 0.934 over 4,000 tokens"
    assert (1.0, 1.5) in next(iter(lines(figure).values()))
    assert not draw_token_losses(Figure(), {})


def test_the_frontier_has_every_run_whose_tasks_all_reach_the_loss() -> None:
    rows = [
        {"variant": "base", "kl": 0.5, "curves": {"a": {"0.15": 4}, "b": {"0.15": 9}}},
        {"variant": "base", "kl": 0.6, "curves": {"a": {"0.15": 4}, "b": {"0.15": None}}},
        {"variant": "wild", "undefined": "training diverged"},
    ]
    points = frontier(rows, 0.15)
    assert points == {"base": [(0.5, pytest.approx(6))]}
    assert draw_frontier(Figure(), points)
    assert not draw_frontier(Figure(), {})


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert draw(tmp_path / name / "orders.svg", draw_orders, EVIDENCE)
    one, two = ((tmp_path / name / "orders.svg").read_bytes() for name in ("one", "two"))
    assert one == two
    assert not re.search(rb"<dc:date>", one)


def test_a_run_without_numbers_has_no_figures(tmp_path: Path, capsys) -> None:
    assert write_figures(tmp_path) == []
    assert not list(tmp_path.iterdir())
    main(["figures", str(tmp_path)])
    assert capsys.readouterr().out == "nothing was drawn\n"


def test_no_folder_no_figures(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["figures", str(tmp_path / "absent")])
    assert ended.value.code == 3
    assert "is no folder" in capsys.readouterr().err


def test_without_matplotlib_one_line_says_so(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert write_figures(tmp_path) == []
    assert not draw(tmp_path / "orders.svg", draw_orders, EVIDENCE)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("pip install 'sparsebridge[plot]'" in line for line in lines)
    assert not list(tmp_path.iterdir())
