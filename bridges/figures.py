"""The paper's figures of one run, drawn from what its recipes wrote (Gao et al. 2025).

    steering.svg        strength of each edit against answers flipped, with its controls (Fig. 9)
    orders.svg          loss against edges kept: the learned circuit's order and other orders (Fig. 31)
    inverse.svg         what is left of the student without each circuit, and without random ones (Fig. 32)
    token_losses.svg    the loss of every token in the dense model and in the student (Fig. 33)

Circuit size against task loss, sparse and dense (Fig. 2), is drawn by recipes/extract.py, capability against
circuit size (Fig. 3) by recipes/study.py: they are of several models. A figure whose numbers a run does not
have is not drawn. The numbers are in the same files; `orders.md` has those that no other table shows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bridges.plots import can_draw, draw
from bridges.report_values import SERIES
from bridges.tables import at, markdown, number
from extractor.artifacts import read_json, write_text
from extractor.circuit import Circuit
from extractor.size_curve import geometric_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 5  # panels beside one another
STYLES = ("o-", "s-", "^--", "D:")  # of SERIES


def write_figures(run: Path) -> list[Path]:
    """Every figure that the run has the numbers for, in `figures/`; what was written.

    Without matplotlib none is, as one line says.

    Raises:
        InputError: a file of the run that is damaged.
    """
    folder = run / "figures"
    if not can_draw(folder):
        return []
    circuits = map(Circuit.load, sorted((run / "circuits").glob("*.json")))
    evidence = {circuit.task: circuit.evidence for circuit in circuits}
    edits = [
        read_json(path, "edit", "recipes/edit.py") for path in sorted((run / "edits").glob("*/edit.json"))
    ]
    comparison = run / "compare.json"
    compared = read_json(comparison, "comparison", "recipes/compare.py") if comparison.is_file() else {}
    drawings = (
        (folder / "steering.svg", draw_steering, edits),
        (folder / "orders.svg", draw_orders, evidence),
        (folder / "inverse.svg", draw_inverse, evidence),
        (folder / "token_losses.svg", draw_token_losses, compared),
    )
    written = [path for path, onto, values in drawings if draw(path, onto, values)]
    if table := orders_table(evidence):
        write_text(folder / "orders.md", table)
        written.append(folder / "orders.md")
    return written


def draw_steering(figure: "Figure", edits: Sequence[Mapping[str, Any]]) -> bool:
    """A panel per edit: answers flipped on held-out prompts, by the total and the indirect effect."""
    if not edits:
        return False
    columns = min(COLUMNS, len(edits))
    rows = -(-len(edits) // columns)
    figure.set_size_inches(2.4 * columns, 2.1 * rows + 0.5)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel, edit in zip(panels, edits, strict=False):
        for (key, name), style in zip(SERIES, STYLES, strict=True):
            panel.plot(edit["strengths"], edit[key], style, markersize=3, linewidth=1, label=name)
        panel.set_title(f"{edit['task']}\n{edit['size']} at {edit['site']}", fontsize=7)
    for panel in list(panels)[len(edits) :]:
        panel.set_axis_off()
    first = figure.axes[0]
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    figure.supxlabel("strength", fontsize=9)
    figure.supylabel("answers flipped", fontsize=9)
    return True


def draw_inverse(figure: "Figure", evidence: Mapping[str, Mapping[str, Any]]) -> bool:
    """Held-out accuracy without each circuit (at its mean over training text, calibrated anew), and without
    random circuits of its size."""
    series = {
        "the whole student": ("student_accuracy",),
        "without random circuits of that size": ("random_circuits", "accuracy_without_mean"),
        "without the circuit": ("accuracy_without_calibrated",),
    }
    found = [own for own in evidence.values() if at(own, "nodes") and at(own, *series["without the circuit"])]
    if not found:
        return False
    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    axes.axhline(0.5, color="0.6", linewidth=1, label="chance")
    for (name, keys), marker in zip(series.items(), "s^o", strict=True):
        points = [(own["nodes"], accuracy) for own in found if (accuracy := at(own, *keys)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker, markersize=5, label=name)
    axes.set(xscale="log", xlabel="nodes of the circuit, one of each task", ylabel="held-out accuracy")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return True


def draw_token_losses(figure: "Figure", compared: Mapping[str, Any]) -> bool:
    """Some tokens of held-out text, evenly spread; the correlation is over all that were scored."""
    scatter = at(compared, "text", "scatter")
    if not scatter or not scatter["points"]:
        return False
    figure.set_size_inches(4.5, 4.2)
    axes = figure.subplots()
    x, y, _ = zip(*scatter["points"], strict=True)
    axes.plot(x, y, ".", markersize=3, alpha=0.5)
    axes.axline((0, 0), slope=1, color="0.6", linewidth=1)
    pearson = at(compared, "text", "models", scatter["y"], "overall", "loss_correlation", "pearson")
    axes.set_title(f"r = {number(pearson)} over {scatter['of']:,} tokens", fontsize=9)
    axes.set(xlabel=f"loss in the {scatter['x']} model, nats", ylabel=f"loss in the {scatter['y']}, nats")
    return True


def draw_frontier(figure: "Figure", points: Mapping[str, Sequence[tuple[float, float]]]) -> bool:
    """How far a student is from its dense model against how large its circuits are: KL and edges by name,
    a point for each seed."""
    if not any(points.values()):
        return False
    figure.set_size_inches(7, 5)
    axes = figure.subplots()
    for name, own in points.items():
        if own:
            (line,) = axes.plot(*zip(*own, strict=True), "o", markersize=4)
            axes.annotate(
                name, own[0], fontsize=7, color=line.get_color(), xytext=(4, 3), textcoords="offset points"
            )
    axes.set(xlabel="KL(dense, student), nats/token", ylabel="edges (geometric mean over tasks)")
    axes.set(xscale="log", yscale="log")
    return True


def draw_orders(figure: "Figure", evidence: Mapping[str, Mapping[str, Any]]) -> bool:
    """Geometric mean over tasks of the held-out loss, where each order keeps a share of all edges."""
    orders = _orders(evidence)
    if not orders:
        return False
    figure.set_size_inches(6.5, 4.2)
    axes = figure.subplots()
    for name, tasks in orders.items():
        curves = [own["curves"]["signed"] for own in tasks.values()]
        sizes = np.array([curve["sizes"] for curve in curves])
        losses = np.array([curve["losses"] for curve in curves])
        lines = [np.exp(np.log(values).mean(0)) for values in (sizes.clip(1), losses.clip(1e-6))]
        axes.plot(*lines, marker="o", markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="edges kept", ylabel="held-out loss, nats")
    axes.set_title(f"geometric means over {len(next(iter(orders.values())))} tasks", fontsize=9)
    axes.legend(fontsize=8)
    return True


def orders_table(evidence: Mapping[str, Mapping[str, Any]]) -> str:
    """Edges that each order needs for the target loss, and its loss at the learned circuit's size; empty
    where no order was scored (`recipes/extract.py --peers.enabled true`)."""
    orders = _orders(evidence)
    rows = []
    for name, tasks in orders.items():
        found = [own["size_at_loss"] for own in tasks.values() if not isinstance(own["size_at_loss"], dict)]
        losses = [own["loss_at_size"] for own in tasks.values()]
        mean = f"{geometric_mean(found):,.0f}" if found else "-"
        rows.append([name, mean, f"{len(found)} of {len(tasks)}", number(float(np.mean(losses)))])
    target = next((own["peers"]["target_loss"] for own in evidence.values() if "peers" in own), None)
    columns = [
        "order of edges", f"edges at a loss of {target}", "tasks that reach it",
        "mean loss at the learned circuit's size",
    ]  # fmt: skip
    return markdown(columns, rows) if rows else ""


def _orders(evidence: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """By order of edges and task; orders that every task has."""
    scored = {task: at(own, "peers", "edges", "methods") for task, own in evidence.items()}
    scored = {task: methods for task, methods in scored.items() if methods}
    names = [name for name in next(iter(scored.values()), {}) if all(name in own for own in scored.values())]
    return {name: {task: own[name] for task, own in scored.items()} for name in names}
