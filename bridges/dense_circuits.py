"""The dense model's own circuits, by the same search: what sparsity is worth (Gao et al. 2025, figure 2).

The dense model is put into a student's form without a loss: as it is ("own basis"), and with its free bases
turned ("rotated", `extractor.rotation`); neither is trained. All models get the same prompts, the same search
(seeds and coefficients) and the same measure: the fewest edges at a held-out loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from bridges.dense import DenseModel
from bridges.tables import markdown
from bridges.warm_start import StudentShape, make_student
from extractor.circuit import count_edges
from extractor.masks import Bank, mean_activations
from extractor.prices import node_prices
from extractor.prune import PruneConfig, search_masks, task_settings
from extractor.rotation import RotationConfig
from extractor.size_curve import TARGET_LOSSES, geometric_mean, size_curve
from extractor.student import Student
from extractor.tasks import TaskBatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Prompts = Mapping[str, TaskBatch]  # by split


def dense_views(dense: DenseModel, rotation: RotationConfig) -> dict[str, Student]:
    """The dense model in a student's form: exact, at density 1."""
    as_it_is = rotation.model_copy(update={"enabled": False})
    turned = rotation.model_copy(update={"enabled": True})
    return {
        "dense, own basis": make_student(dense, StudentShape(), as_it_is)[0],
        "dense, rotated": make_student(dense, StudentShape(), turned)[0],
    }


def compare_circuits(
    models: Mapping[str, Student],
    prompts: Mapping[str, Prompts],
    text: Tensor,
    config: PruneConfig,
    process: int = 0,
    num_processes: int = 1,
) -> dict[str, object]:
    """Size against loss for every model and task, and geometric means of edges over the tasks.

    Args:
        prompts: by task, then split (train, selection, held_out).
        text: blocks over which nodes' means are taken.
        process, num_processes: models and tasks are shared out; every process returns all of it.
    """
    works = [(name, task) for name in models for task in prompts][process::num_processes]
    own: list[tuple[str, str, list[dict[str, object]]]] = []
    bar = tqdm(total=len(works), desc="compare", disable=process != 0)
    for name, model in models.items():
        tasks = {task: prompts[task] for its, task in works if its == name}
        for task, curve in zip(tasks, _size_curves(model, tasks, text, config), strict=True):
            own.append((name, task, curve))
            bar.update()
    curves = {(name, task): curve for name, task, curve in gather_object(own)}
    found = {
        name: {"edges_total": count_edges(model), "tasks": {task: curves[name, task] for task in prompts}}
        for name, model in models.items()
    }
    return {"models": found, "means": geometric_means(found)}


def _size_curves(
    model: Student, tasks: Mapping[str, Prompts], text: Tensor, config: PruneConfig
) -> Iterator[list[dict[str, object]]]:
    """One model's size against loss, task by task."""
    model.requires_grad_(False).to(text.device)
    means = mean_activations(model, text)
    if config.ablation == "zero":
        means = {address: torch.zeros_like(mean) for address, mean in means.items()}
    bank = Bank(model, text) if config.ablation == "resample" else None
    prices = node_prices(model, text, means, config.general_price)
    for own in tasks.values():
        settings = task_settings(model, own["train"], own["selection"], config)
        search = search_masks(model, settings, means, config, bank, prices)
        yield size_curve(model, search, own["held_out"], bank)["targets"]


def geometric_means(found: Mapping[str, Mapping[str, object]]) -> list[dict[str, object]]:
    """Per target loss: every model's geometric mean of edges, over the tasks on which all models reach it."""
    rows = []
    for index, target in enumerate(TARGET_LOSSES):
        at_target = {
            name: {task: curve[index].get("edges") for task, curve in model["tasks"].items()}
            for name, model in found.items()
        }
        every = next(iter(at_target.values()))
        tasks = [task for task in every if all(edges[task] is not None for edges in at_target.values())]
        row: dict[str, object] = {"target_loss": target, "tasks": tasks}
        if tasks:
            row["edges"] = {
                name: geometric_mean([edges[task] for task in tasks]) for name, edges in at_target.items()
            }
        else:
            row["edges"] = {"undefined": "there is no task on which all models reach this loss"}
        rows.append(row)
    return rows


def comparison_table(comparison: Mapping[str, object]) -> str:
    """The geometric means as a Markdown table, a row per target loss, and how often the last model's (the
    student's) edges go into the first one's (the dense model's own)."""
    names = list(comparison["models"])
    columns = ["target loss, nats", "tasks", *names, f"{names[0]} / {names[-1]}"]
    rows = []
    for row in comparison["means"]:
        edges = row["edges"]
        is_known = "undefined" not in edges
        sizes = [f"{edges[name]:,.0f}" if is_known else "-" for name in names]
        ratio = f"{edges[names[0]] / edges[names[-1]]:.0f}" if is_known else "-"
        rows.append([str(row["target_loss"]), str(len(row["tasks"])), *sizes, ratio])
    return markdown(columns, rows)


def draw_comparison(figure: "Figure", comparison: Mapping[str, object]) -> bool:
    """Edges against target loss, one line per model (geometric mean over the tasks that all reach)."""
    if not any(_points(comparison["means"], name) for name in comparison["models"]):
        return False
    figure.set_size_inches(6, 4)
    axes = figure.subplots()
    for name in comparison["models"]:
        points = _points(comparison["means"], name)
        axes.plot([edges for edges, _ in points], [loss for _, loss in points], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="edges (geometric mean over tasks)")
    axes.set_ylabel("task loss, nats")
    axes.legend()
    return True


def _points(rows: Sequence[Mapping[str, object]], name: str) -> list[tuple[float, float]]:
    defined = (row for row in rows if "undefined" not in row["edges"])
    return [(row["edges"][name], row["target_loss"]) for row in defined]
