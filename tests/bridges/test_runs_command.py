"""`sparsebridge runs`: what a page says of run folders, from a terminal."""

import json
from pathlib import Path

import pytest

from bridges.cli import main
from extractor.circuit import Circuit
from extractor.sites import Node


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """One with a student, a judged circuit, a damaged one and a report; an empty one; one elsewhere."""
    folder = tmp_path / "runs"
    (folder / "mine" / "student").mkdir(parents=True)
    (folder / "mine" / "student" / "config.json").write_text("{}")
    (folder / "mine" / "report.html").write_text("a report")
    nodes = frozenset({Node("0.attn.act_in", 1)})
    evidence = {"nodes": 1, "edges": 0, "loss": 0.125, "verdict": {"word": "partly", "reasons": []}}
    circuit = Circuit("with_as", nodes, (), "sha", {}, evidence=evidence)
    circuit.save(folder / "mine" / "circuits" / "with_as.json")
    (folder / "mine" / "circuits" / "broken.json").write_text("{")
    (folder / "empty").mkdir()
    (tmp_path / "outside").mkdir()
    (folder / "linked").symlink_to(tmp_path / "outside")
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["runs", *words])
    return capsys.readouterr().out


def test_run_folders_are_listed(runs: Path, capsys) -> None:
    lines = [line.split() for line in said(capsys, "--runs", str(runs)).splitlines()]
    assert lines == [
        ["run", "student", "circuits", "edits", "report"],
        ["empty", "no", "0", "0", "-"],
        ["mine", "yes", "2", "0", str(runs / "mine" / "report.html")],
    ]
    found = json.loads(said(capsys, "--runs", str(runs), "--json"))
    assert [own["run"] for own in found] == ["empty", "mine"]


def test_a_runs_circuits_are_listed_with_their_verdicts(runs: Path, capsys) -> None:
    head, broken, with_as = said(capsys, "mine", "--runs", str(runs)).splitlines()
    assert head.split() == ["circuit", "nodes", "edges", "loss", "verdict"]
    assert broken.split()[0] == "broken"
    assert broken.endswith("it is not valid JSON")
    assert with_as.split() == ["with_as", "1", "0", "0.125", "partly"]
    found = json.loads(said(capsys, "mine", "--runs", str(runs), "--json"))
    assert found[1]["verdict"]["word"] == "partly"


@pytest.mark.parametrize("name", ["none", "linked", ".."])
def test_what_is_no_run_folder_is_refused(runs: Path, capsys, name: str) -> None:
    for words, message in (
        (["runs", name, "--runs", str(runs)], f"run '{name}': there is none"),
        (["runs", "--runs", str(runs / "absent")], "no folder of runs at"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 3
        assert message in capsys.readouterr().err
