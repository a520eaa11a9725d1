"""recipes/study.py: a folder of YAML files becomes runs, kept figures and one table."""

import json
import runpy
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from bridges.study import study_table
from extractor.config import load_config
from tests.conftest import ROOT
from tests.recipes.test_extract import REACHED
from tests.recipes.test_recipes import EXTRACT, TRAIN, run_in_process

VARIANTS = {
    "sparser": {"sparsity": {"density": 0.03125}},
    "wild": {"optimizer": {"learning_rate": 1e6}, "watch": {"max_ce_ratio": 1.01}},
}


def settings(arguments: list[str]) -> dict:
    """Command-line arguments as a YAML file would hold them."""
    found: dict = {}
    for key, value in zip(arguments[::2], arguments[1::2], strict=True):
        *parents, last = key.removeprefix("--").split(".")
        level = found
        for parent in parents:
            level = level.setdefault(parent, {})
        level[last] = yaml.safe_load(value)
    return found


@pytest.fixture
def study(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    base = settings(["--dense.path", str(tiny_checkpoint), *TRAIN])
    for name, own in (VARIANTS | {"base": base}).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
    return folder


def test_a_study_runs_each_variant_once_and_goes_on_with_more_seeds(study, tmp_path, monkeypatch) -> None:
    arguments = ["--folder", study, "--run", tmp_path / "runs"]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study -->\nold\n<!-- /study -->\nafter\n")
    run_in_process(monkeypatch, "study", *arguments, "--table", page)
    first = json.loads((study / "results.json").read_text())["rows"]
    assert [(row["variant"], row["seed"]) for row in first] == [("base", 0), ("sparser", 0), ("wild", 0)]
    base, sparser, wild = first
    assert sparser["changes"] == {"sparsity.density": 0.03125}
    assert 0 < sparser["nonzeros"] < base["nonzeros"]
    for name in ("kl", "ce", "dense_ce", "switch_kl_mean", "mixture_kl", "nmse_encode", "nmse_decode"):
        assert base[name] > 0, name
    assert base["curves"] == {}
    assert wild["undefined"] == "training diverged"
    table = (tmp_path / "runs" / "study.md").read_text()
    assert page.read_text() == f"before\n<!-- study -->\n{table}<!-- /study -->\nafter\n"
    assert "| `sparser` | `sparsity.density` 0.03125 | 1 |" in table
    assert "1, 1 diverged" in table

    run_in_process(monkeypatch, "study", *arguments, "--variants", "[sparser]", "--seeds", "[0, 1]")
    second = json.loads((study / "results.json").read_text())["rows"]
    assert second[:3] == first
    assert [(row["variant"], row["seed"]) for row in second[3:]] == [("base", 1), ("sparser", 1)]
    assert second[3]["kl"] != base["kl"]


def test_a_run_of_a_study_is_the_run_of_its_written_config(study, tmp_path, monkeypatch) -> None:
    arguments = ["--folder", study, "--run", tmp_path / "runs", "--variants", "[sparser]"]
    run_in_process(monkeypatch, "study", *arguments)
    alone = tmp_path / "alone"
    run_in_process(monkeypatch, "train", "--config", tmp_path / "runs" / "sparser-0.yaml", "--run", alone)
    of_study, of_train = (
        load_file(run / "student" / "model.safetensors") for run in (tmp_path / "runs" / "sparser-0", alone)
    )
    assert all((of_study[key] == of_train[key]).all() for key in of_study)


def test_circuits_are_measured_where_the_study_says_how(study, tmp_path, monkeypatch) -> None:
    extract = settings([*EXTRACT, *REACHED, "--curve", "true"]) | {"tasks": ["with_as"]}
    extract |= {"controls": {"nonsense": 0, "shuffled": False, "other_tasks": False}}
    (study / "extract.yaml").write_text(yaml.safe_dump(extract))
    for name in VARIANTS:
        (study / f"{name}.yaml").unlink()
    run_in_process(monkeypatch, "study", "--folder", study, "--run", tmp_path / "runs")
    (row,) = json.loads((study / "results.json").read_text())["rows"]
    assert set(row["curves"]) == {"with_as"}
    assert "0.15" in row["curves"]["with_as"]
    assert "of 1) |" in (tmp_path / "runs" / "study.md").read_text()


@pytest.mark.parametrize(
    ("name", "content", "arguments", "code", "message"),
    [
        ("wrong", {"sparsity": {"densty": 0.1}}, [], 2, "variant wrong: unknown key 'sparsity.densty'"),
        ("wrong", {"max_steps": -1}, [], 2, "variant wrong: max_steps: got -1"),
        ("wrong", ["sparsity"], [], 2, "wrong.yaml: the top level must be keys and values"),
        ("extract", {"prune": {"stepz": 1}}, [], 2, "unknown key 'prune.stepz'"),
        ("fine", {}, ["--variants", "[absent]"], 2, "variants: there is no absent.yaml in"),
        ("fine", {}, ["--target_loss", "0.2"], 2, "target_loss: got 0.2; allowed are"),
    ],
)
def test_every_variant_is_checked_before_the_first_run(
    name, content, arguments, code, message, study, tmp_path, monkeypatch, capsys
) -> None:
    (study / f"{name}.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as stopped:
        run_in_process(monkeypatch, "study", "--folder", study, "--run", tmp_path / "runs", *arguments)
    assert stopped.value.code == code
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "runs").exists()
    assert not (study / "results.json").exists()


def test_the_shipped_study_is_one_that_can_be_run() -> None:
    recipe = runpy.run_path(str(ROOT / "recipes" / "study.py"))
    config = load_config(recipe["StudyConfig"], ["--config", str(ROOT / "recipes" / "study" / "study.yaml")])
    planned = list(recipe["plan_runs"](config))
    assert len({own.sha256 for own in planned}) == len(planned) >= 60


def test_an_option_that_is_not_set_makes_no_other_run(study) -> None:
    recipe = runpy.run_path(str(ROOT / "recipes" / "study.py"))
    config = load_config(recipe["StudyConfig"], ["--folder", str(study)])
    before = {own.variant: own.sha256 for own in recipe["plan_runs"](config)}
    (study / "sparser.yaml").write_text(
        yaml.safe_dump({"sparsity": {"density": 0.03125, "mlp_density": None}})
    )
    (study / "wild.yaml").write_text(yaml.safe_dump(VARIANTS["wild"] | {"sparsity": {"mlp_density": 1.0}}))
    after = {own.variant: own.sha256 for own in recipe["plan_runs"](config)}
    assert after["base"] == before["base"]
    assert after["sparser"] == before["sparser"]
    assert after["wild"] != before["wild"]


def test_a_folder_without_a_base_is_refused(tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_in_process(monkeypatch, "study", "--folder", tmp_path, "--run", tmp_path / "runs")
    assert stopped.value.code == 3
    assert "has no base.yaml" in capsys.readouterr().err


def test_the_table_compares_runs_of_one_seed_and_tasks_that_both_solve() -> None:
    figures = {"changes": {}, "nonzeros": 10, "switch_kl_mean": 0.1, "switch_kl_max": 0.2}
    base = [
        {"variant": "base", "seed": seed, "kl": kl, "curves": {"a": {"0.15": 8}, "b": {"0.15": None}}}
        | figures
        for seed, kl in ((0, 1.0), (1, 2.0), (2, 3.0))
    ]
    better = [
        {"variant": "better", "seed": seed, "kl": kl, "curves": {"a": {"0.15": 2}, "b": {"0.15": 1}}}
        | figures
        for seed, kl in ((0, 0.5), (1, 1.5), (2, 2.5))
    ]
    lines = study_table(base + better, "base", 0.15).splitlines()
    assert lines[2] == "| `base` |  | 3 | 10 | 2.000 (1.000 to 3.000) |  | 0.1 | 0.2 | 8 (3 of 6) |  |"
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    # every seed is better by 0.5, though the ranges overlap
    assert cells[5] == "-0.500 (-0.500 to -0.500)"
    assert cells[8] == "1.41 (6 of 6)"
    assert cells[9] == "0.25"
