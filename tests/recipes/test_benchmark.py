"""The benchmark runs, and its selections are exact; no time is asserted."""

import json
from pathlib import Path

import pytest

from recipes.benchmark import GOALS, BenchmarkConfig, main

STEPS, BRIDGED = "sparse step / dense step, fp32, plain", "bridged step / dense step, fp32, plain"


@pytest.mark.parametrize(
    ("rows", "measured"),
    [
        (["steps", "masks"], [STEPS]),
        pytest.param(["steps", "bridged", "products", "masks"], [STEPS, BRIDGED], marks=pytest.mark.slow),
    ],
)
def test_a_small_benchmark_writes_its_table(
    rows: list[str], measured: list[str], tmp_path: Path, capsys
) -> None:
    shape = {
        "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 97, "context_length": 16, "batch_size": 2,
        "density": 0.25,
    }  # fmt: skip
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    config = BenchmarkConfig.model_validate(
        {
            "out": tmp_path / "out", "shape": shape, "rounds": 1, "run": tmp_path, "rows": rows,
            "table": readme,
        }
    )  # fmt: skip
    main(config)
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert report["schema_version"] == 1
    assert report["exactness"]["selections"] > 100
    assert report["exactness"]["equal"] == report["exactness"]["selections"]
    for name, row in report["ratios"].items():
        assert row["low"] <= row["median"] <= row["high"], name
        assert row["goal"] == GOALS.get(name)
    assert set(measured) <= report["ratios"].keys()
    printed = capsys.readouterr().out
    assert "masks: not measured, no student in" in printed
    assert all(name in printed for name in report["ratios"])
    table = readme.read_text()
    assert table.startswith("before\n")
    assert table.endswith("after\n")
    assert "old" not in table
    for name, row in report["ratios"].items():
        assert f"| {name} | {row['median']:.3g} | {row['low']:.3g} to {row['high']:.3g} |" in table
