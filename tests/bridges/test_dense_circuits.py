"""The dense model's own circuits: the views are the model, and all models are measured alike."""

import pytest
import torch

from bridges.dense import DenseModel
from bridges.dense_circuits import (
    compare_circuits,
    comparison_table,
    dense_views,
    draw_comparison,
    geometric_means,
)
from bridges.plots import draw
from extractor.prune import PruneConfig
from extractor.rotation import RotationConfig
from extractor.sites import no_tap
from extractor.tasks import TaskBatch

TURNED = RotationConfig(stream_steps=40, head_steps=20, enabled=False)  # the view turns all the same


def prompts(seed: int, answers: tuple[int, int]) -> TaskBatch:
    """Eight pairs that differ in the first token, with two arbitrary answers."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 97, (8, 5), generator=generator).repeat(2, 1)
    ids[:8, 0], ids[8:, 0] = 1, 2
    answer = torch.tensor(answers).repeat_interleave(8)
    return TaskBatch(ids, torch.full((16,), 4), answer, answer.roll(8))


def test_both_views_are_the_dense_model(dense: DenseModel, tokens: torch.Tensor) -> None:
    views = dense_views(dense, TURNED)
    logits = torch.log_softmax(dense.run(tokens).logits, -1)
    for view in views.values():
        own = torch.log_softmax(view(tokens, tap=no_tap).logits, -1)
        torch.testing.assert_close(own, logits, atol=1e-4, rtol=1e-4)
    own, turned = (view.layers[0].mlp.up_proj.weight for view in views.values())
    assert turned.abs().sum() < own.abs().sum()
    assert not torch.allclose(own, turned)


def test_models_are_compared_on_the_same_tasks(dense: DenseModel, tokens: torch.Tensor, tmp_path) -> None:
    views = dense_views(dense, TURNED)
    tasks = {
        name: {split: prompts(seed, answers) for seed, split in enumerate(("train", "selection", "held_out"))}
        for name, answers in (("first", (11, 12)), ("second", (21, 22)))
    }
    config = PruneConfig(steps=12, pairs_per_step=4, target="answer")
    comparison = compare_circuits(views, tasks, tokens, config)
    assert {*comparison["models"]["dense, rotated"]["tasks"]} == {"first", "second"}
    table = comparison_table(comparison)
    assert table.count("\n") == 2 + len(comparison["means"])
    assert not draw(tmp_path / "sizes.svg", draw_comparison, comparison)
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_do_a_task_has_no_sizes_on_it(dense: DenseModel, tokens: torch.Tensor) -> None:
    """Nothing was learned on it, and what was not learned must not be cut in some order all the same."""
    views = dense_views(dense, TURNED)
    own = {split: prompts(seed, (11, 12)) for seed, split in enumerate(("train", "selection", "held_out"))}
    comparison = compare_circuits(views, {"arbitrary": own}, tokens, PruneConfig(steps=1))
    for model in comparison["models"].values():
        assert all("stays above" in row["undefined"] for row in model["tasks"]["arbitrary"])
    assert all("undefined" in row["edges"] for row in comparison["means"])


def test_the_table_says_how_many_times_fewer_edges_the_student_needs() -> None:
    rows = [
        {
            "target_loss": 0.15,
            "tasks": ["a", "b"],
            "edges": {"own": 3000.0, "turned": 400.0, "student": 30.0},
        },
        {"target_loss": 0.05, "tasks": [], "edges": {"undefined": "no task"}},
    ]
    models = {"own": {}, "turned": {}, "student": {}}
    lines = comparison_table({"models": models, "means": rows}).splitlines()
    assert lines[0] == "| target loss, nats | tasks | own | turned | student | own / student |"
    assert lines[2:] == ["| 0.15 | 2 | 3,000 | 400 | 30 | 100 |", "| 0.05 | 0 | - | - | - | - |"]


def test_the_plot_has_a_line_per_model(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    rows = [{"target_loss": loss, "edges": {"a": 10 / loss, "b": 1 / loss}} for loss in (0.5, 0.15)]
    assert draw(tmp_path / "sizes.svg", draw_comparison, {"models": {"a": {}, "b": {}}, "means": rows})
    assert "<svg" in (tmp_path / "sizes.svg").read_text()


def test_means_are_over_tasks_that_every_model_reaches() -> None:
    def curve(*edges: int | None) -> list[dict[str, object]]:
        return [
            {"edges": e} if e is not None else {"undefined": "not reached"} for e in (*edges, *[None] * 6)
        ]

    found = {
        "a": {"tasks": {"x": curve(100, 200), "y": curve(1, None)}},
        "b": {"tasks": {"x": curve(10, 20), "y": curve(1000, 5)}},
    }
    rows = geometric_means(found)
    assert rows[0]["tasks"] == ["x", "y"]
    assert rows[0]["edges"]["a"] == pytest.approx(10)
    assert rows[0]["edges"]["b"] == pytest.approx(100)
    assert rows[1]["tasks"] == ["x"]
    assert rows[1]["edges"] == {"a": pytest.approx(200), "b": pytest.approx(20)}
    assert "undefined" in rows[2]["edges"]
