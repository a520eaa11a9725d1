"""recipes/extract.py with everything it can write, on a tiny student; and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from extractor.circuit import Circuit
from extractor.compact import CompactStudent
from tests.recipes.test_recipes import EXTRACT, TRAIN, run_in_process

# About chance: some nodes will do.
REACHED = ["--prune.target_loss", "1.7", "--prune.selection_frac", "0.407"]
ALL = [
    *EXTRACT, "--curve", "true", "--describe", "true", "--describe_blocks", "4", "--export", "true",
    "--peers.enabled", "true", "--peers.pairs", "4", "--peers.path_steps", "2", "--prune.seeds", "[0, 1]",
    "--prune.refine.enabled", "true", "--prune.refine.steps", "5", *REACHED,
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("extract") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch, "train", *TRAIN, "--run", run, "--dense.path", tiny_checkpoint)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_everything_that_can_be_asked_for_is_written(run: Path, tmp_path, monkeypatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- circuits -->\nold\n<!-- /circuits -->\nafter\n")
    run_in_process(monkeypatch, "extract", *ALL, "--run", run, "--table", page)
    thresholds = json.loads((run / "thresholds.json").read_text())
    assert thresholds["seeds"] == 10
    table = (run / "circuits.md").read_text()
    assert page.read_text() == f"before\n<!-- circuits -->\n{table}<!-- /circuits -->\nafter\n"
    for task in ("with_as", "bracket_paren"):
        assert f"| `{task}` |" in table
        circuit = Circuit.load(run / "circuits" / f"{task}.json")
        found = circuit.evidence
        # A student of random weights does no task: nothing here may be called supported.
        assert found["verdict"]["word"] == "not supported"
        assert found["controls"]["seeds"]["count"] == 2
        assert {control["kind"] for control in found["controls"]["nonsense"]} == {"prompt"}
        assert set(found["controls"]["other_tasks"]) == {"with_as", "bracket_paren"} - {task}
        assert [row["target_loss"] for row in found["size_curve"]["targets"]][0] == 0.5
        assert set(found["peers"]) >= {"nodes", "edges"}
        folder = run / "circuits" / task
        nodes = json.loads((folder / "nodes.json").read_text())["nodes"]
        assert {entry["node"] for entry in nodes} == set(map(str, circuit.nodes))
        assert json.loads((folder / "neuronpedia.json").read_text())["nodes"]
        assert CompactStudent.load(folder / "model").num_nodes == len(circuit.nodes)
    manifest = json.loads((run / "manifest.json").read_text())["extract"]["outputs"]
    assert "thresholds.json" in manifest
    assert any(name.endswith("nodes.json") for name in manifest)


def test_a_circuit_is_not_looked_for_twice(run: Path, monkeypatch, capsys) -> None:
    run_in_process(monkeypatch, "extract", *EXTRACT, "--run", run)
    path = run / "circuits" / "with_as.json"
    first = path.stat().st_mtime_ns, path.read_bytes()
    (run / "circuits" / "bracket_paren.json").unlink()
    capsys.readouterr()
    run_in_process(monkeypatch, "extract", *EXTRACT, "--run", run)
    printed = capsys.readouterr()
    assert "with_as: done before" in printed.out + printed.err
    assert (path.stat().st_mtime_ns, path.read_bytes()) == first
    assert "| `bracket_paren` |" in (run / "circuits.md").read_text()
    run_in_process(monkeypatch, "extract", *EXTRACT, "--run", run, "--seed", "1")
    assert path.stat().st_mtime_ns != first[0]


def test_thresholds_cannot_be_moved_after_a_run(run: Path, monkeypatch, capsys) -> None:
    (run / "thresholds.json").write_text('{"schema_version": 1, "max_loss": 0.1}')
    with pytest.raises(SystemExit) as ended:
        run_in_process(monkeypatch, "extract", *EXTRACT, "--run", run)
    assert ended.value.code == 3
    assert "thresholds" in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "circuits").exists()


COMPARE = ["--compare_dense", "true", "--rotation.stream_steps", "20", "--rotation.head_steps", "10"]


@pytest.mark.parametrize("compare", [[], pytest.param(COMPARE, marks=pytest.mark.slow)], ids=["", "dense"])
def test_two_processes_find_what_one_finds(
    compare: list[str], run: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch, forks
) -> None:
    """Tasks, and the dense model's searches, are shared out: the same circuits, sizes and tables."""
    other = shutil.copytree(run, tmp_path / "two")
    arguments = [*EXTRACT, *REACHED, *compare, "--curve", "true"]
    arguments += ["--dense.path", str(tiny_checkpoint)] if compare else []
    run_in_process(monkeypatch, "extract", *arguments, "--run", run)
    assert forks.run("recipes.extract", [*arguments, "--run", other], processes=2) == 0
    for task in ("with_as", "bracket_paren"):
        one, two = (Circuit.load(folder / "circuits" / f"{task}.json") for folder in (run, other))
        assert one.nodes, task
        assert one == two, task  # nodes, edges, and every figure of the evidence
    for name in ("circuits.md", *(["circuits-dense.md", "circuits-dense.json"] if compare else [])):
        assert (run / name).read_text() == (other / name).read_text()


def test_the_dense_model_is_compared_by_the_same_search(
    run: Path, tiny_checkpoint: Path, monkeypatch
) -> None:
    run_in_process(monkeypatch, "extract", *EXTRACT, *COMPARE, "--dense.path", tiny_checkpoint, "--run", run)
    comparison = json.loads((run / "circuits-dense.json").read_text())
    assert list(comparison["models"]) == ["dense, own basis", "dense, rotated", "student"]
    for model in comparison["models"].values():
        assert set(model["tasks"]) == {"with_as", "bracket_paren"}
    assert (run / "circuits-dense.md").read_text().startswith("| target loss, nats |")
    assert not (run / "circuits-dense.svg").exists()  # random weights reach no target: nothing to draw
