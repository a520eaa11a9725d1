"""`sparsebridge diff`, and the reading of a record from .json, .html and run folders."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridges.cli import main
from bridges.diff_reports import INCIDENTAL, compare
from bridges.integrity import BLOCK_ID
from bridges.report import write_report
from bridges.report_file import read_report
from extractor.errors import InputError
from tests.bridges.report_record import record


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads(json.dumps(record("plural", "quote")))  # a copy


def write(folder: Path, name: str, report: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report))
    return path


def run(capsys, *arguments: object) -> tuple[int, str]:
    try:
        main(["diff", *map(str, arguments)])
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, capsys.readouterr().out


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where every number, text, yes or no of a record stands."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not parts:
        yield path
    for key, part in parts:
        yield from leaves(part, (*path, key))


def replaced(report: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(report)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value(inner[path[-1]]) if callable(value) else value
    return changed


def another(value: Any) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "another" if not isinstance(value, list | dict) else ["another"]


# --- comparing -------------------------------------------------------------------------------------------


def test_a_record_and_its_page_and_its_folder_are_the_same_evidence(tmp_path: Path, report, capsys) -> None:
    page = write_report(report, tmp_path)
    for a, b in ((page, tmp_path / "report.json"), (tmp_path, page), (tmp_path, tmp_path)):
        code, text = run(capsys, a, b)
        assert code == 0
        assert text.endswith("the evidence is the same; 0 of when and where only\n")
    page.rename(tmp_path / "alone.html")
    assert run(capsys, tmp_path / "alone.html", tmp_path)[0] == 0


def test_no_leaf_can_change_unseen(report) -> None:
    """Every value of the record, one after the other."""
    del report["method"]["config"]  # a text of many lines, below
    for parts in (report["circuits"], report["edits"], report["desk"]):
        del parts["quote"]
    kinds = {tuple(key for key in path if not isinstance(key, int)): path for path in leaves(report)}
    unseen = []
    for path in kinds.values():
        if path == ("schema_version",):
            continue
        part = {path[0]: report[path[0]]}
        found = compare(part, replaced(part, path, another))
        names = {str(key) for key in path if not isinstance(key, int)}
        # by the path, or by the name that a part of a list has
        if not any(names & {str(p) for p in d.path} or d.section in path for d in found):
            unseen.append(path)
    assert unseen == []


def test_numbers_stand_side_by_side_with_their_difference(tmp_path: Path, report, capsys) -> None:
    old = report["circuits"]["plural"]["loss"]
    other = replaced(report, ("circuits", "plural", "loss"), old + 0.25)
    a, b = write(tmp_path, "a", report), write(tmp_path, "b", other)
    code, text = run(capsys, a, b, "--json")
    told = json.loads(text)
    assert (code, told["same"]) == (1, False)
    (found,) = told["differences"]
    assert (found["section"], found["path"], found["kind"]) == ("circuits", ["plural", "loss"], "changed")
    assert (found["a"], found["b"]) == (old, old + 0.25)
    assert found["change"] == pytest.approx(0.25, abs=1e-12)
    assert told["A"]["file"] == str(a)
    line = next(line for line in run(capsys, a, b)[1].splitlines() if "plural.loss" in line)
    assert f"{old:.4g} -> {old + 0.25:.4g}" in line
    assert "(+0.25)" in line


def test_numbers_that_look_alike_are_written_in_full(tmp_path: Path, report, capsys) -> None:
    path = ("circuits", "plural", "loss")
    a = write(tmp_path, "a", replaced(report, path, 0.123456789))
    b = write(tmp_path, "b", replaced(report, path, 0.123456788))
    assert "0.123456789 -> 0.123456788" in run(capsys, a, b)[1]


def test_parts_of_lists_are_matched_by_name_and_nodes_as_sets(report) -> None:
    other = copy.deepcopy(report)
    other["criteria"].reverse()
    assert compare(report, other) == []
    other["criteria"][0]["met"] = not other["criteria"][0]["met"]
    claim = other["criteria"][0]["claim"]
    assert ("criteria", (claim, "met")) in [(d.section, d.path) for d in compare(report, other)]
    other = copy.deepcopy(report)
    gone = other["circuits"]["plural"]["graph"]["nodes"].pop(0)
    other["circuits"]["plural"]["graph"]["nodes"].append("1.mlp.post_act:3")
    found = {d.kind: d for d in compare(report, other)}
    assert found["only in A"].a == [gone]
    assert found["only in B"].b == ["1.mlp.post_act:3"]


def test_what_only_one_has_is_told_once(report) -> None:
    other = copy.deepcopy(report)
    lost = other["edits"].pop("quote")
    (found,) = compare(report, other)
    assert (found.section, found.path, found.kind, found.a) == ("edits", ("quote",), "only in A", lost)
    (found,) = compare(other, report)
    assert (found.kind, found.b) == ("only in B", lost)


def test_values_of_other_kinds_differ(report) -> None:
    path = ("circuits", "plural", "loss")
    for a, b in ((1, True), (0, False), (0.5, {"undefined": "no gap"}), (1.0, "1.0"), (0.5, None)):
        assert len(compare(replaced(report, path, a), replaced(report, path, b))) == 1
    why = [replaced(report, path, {"undefined": reason}) for reason in ("no gap", "one seed")]
    assert len(compare(*why)) == 1
    assert compare(replaced(report, path, 1), replaced(report, path, 1.0)) == []


def test_the_verdict_is_told_first(tmp_path: Path, report, capsys) -> None:
    for criterion in report["criteria"]:
        criterion["met"] = True
    other = replaced(report, ("criteria", 0, "met"), False)
    a, b = write(tmp_path, "a", report), write(tmp_path, "b", other)
    lines = run(capsys, a, b)[1].splitlines()
    assert "supported: " in lines[0]
    assert "partly supported: " in lines[1]
    assert lines[3].startswith("verdict")


def test_settings_are_compared_key_by_key_in_both_configs(report) -> None:
    """config.yaml and the audit's own config stand one after the other."""
    text = "run: x\nloss:\n  ce: 0.2\nseed: 0\nrun: x\nseed: 1\nthresholds:\n  edits: 3\n"
    report["method"]["config"] = text
    changed = text.replace("edits: 3", "edits: 2").replace("ce: 0.2", "ce: 1")
    other = replaced(report, ("method", "config"), changed)
    assert {(d.section, d.path, d.a, d.b) for d in compare(report, other)} == {
        ("settings", ("1", "loss", "ce"), 0.2, 1),
        ("settings", ("2", "thresholds", "edits"), 3, 2),
    }
    other = replaced(report, ("method", "config"), text.replace("run: x", "run: y"))
    assert all(d.is_incidental for d in compare(report, other))
    broken = replaced(report, ("method", "config"), "a: [")
    assert [d.section for d in compare(report, broken)] == ["settings"]


def test_when_and_where_are_no_other_evidence(tmp_path: Path, report, capsys) -> None:
    other = replaced(report, ("run",), "another/folder")
    code, text = run(capsys, write(tmp_path, "a", report), write(tmp_path, "b", other))
    assert code == 0
    assert "another/folder (when or where)" in text
    assert text.endswith("the evidence is the same; 1 of when and where only\n")
    assert not INCIDENTAL.keys() & {"verdict", "criteria", "circuits", "edits", "behaviour", "bridges"}


def test_long_lists_are_cut_unless_all_is_asked_for(tmp_path: Path, report, capsys) -> None:
    curve = [i / 100 for i in range(100)]
    a = write(tmp_path, "a", replaced(report, ("edits", "plural", "strengths"), curve))
    b = write(tmp_path, "b", replaced(report, ("edits", "plural", "strengths"), [2.0] * 100))
    short, whole = run(capsys, a, b)[1], run(capsys, a, b, "--all")[1]
    assert "... and 80 more (--all)" in short
    assert len(whole.splitlines()) == len(short.splitlines()) + 79
    assert "more (--all)" not in whole


def test_hostile_text_stays_on_its_line(tmp_path: Path, report, capsys) -> None:
    hostile = "</script>\x1b[2J\u202e\r\n\u2028" + "x" * 1_000_000
    report["circuits"][hostile] = report["circuits"].pop("plural")
    other = replaced(report, ("circuits", hostile, "loss"), 9)
    other["exclusions"].append({"what": hostile, "why": hostile})
    code, text = run(capsys, write(tmp_path, "a", report), write(tmp_path, "b", other))
    assert code == 1
    assert all(line.isprintable() and len(line) < 1000 for line in text.split("\n"))


def test_records_of_odd_shape_are_compared_and_not_a_traceback() -> None:
    base = {"schema_version": 1}
    odd = {"dense": 3, "student": [1], "circuits": "none", "method": [], "provenance": None}
    found = compare(base, base | odd | {"criteria": {"a": 1}})
    assert {"models", "circuits", "criteria"} <= {d.section for d in found}


# --- reading ---------------------------------------------------------------------------------------------


def page(block: str, attributes: str = f'type="application/json" id="{BLOCK_ID}"') -> str:
    return f"<!doctype html><title>x</title><body><p>a &lt; b<script {attributes}>{block}</script></body>"


def test_a_page_holds_its_record_whatever_is_in_it(tmp_path: Path, report) -> None:
    hostile = "</script><!-- <script> ]]> &lt; &amp; \u2028 \U0001f600 \\u003c \ud7ff"
    report["circuits"][hostile] = report["circuits"].pop("plural")
    written = write_report(report, tmp_path)
    assert read_report(written) == read_report(tmp_path / "report.json") == read_report(tmp_path)
    assert hostile in read_report(written)["circuits"]
    escaped = json.dumps({"schema_version": 1, "run": hostile}).replace("<", "\\u003c")
    (tmp_path / "own.html").write_text(page(escaped))
    assert read_report(tmp_path / "own.html")["run"] == hostile


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", "{", "is not valid JSON"),
        ("r.json", "", "is not valid JSON"),
        ("r.json", "[]", "must hold keys and values, not list"),
        ("r.json", "{}", "has no schema version"),
        ("r.json", '{"schema_version": true}', "has no schema version"),
        ("r.json", '{"schema_version": "1"}', "has no schema version"),
        ("r.json", '{"schema_version": 999}', "written by a newer sparsebridge"),
        ("r.json", '{"schema_version": 1, "a": NaN}', "NaN is not JSON"),
        ("r.json", '{"schema_version": 1, "a": -Infinity}', "-Infinity is not JSON"),
        ("r.json", '{"schema_version": 1, "a": {"b": 1, "b": 2}}', "the key 'b' is there twice"),
        ("r.json", "[" * 100_000, "nested too deeply"),
        ("r.json", b'{"schema_version": 1, "a": "\xff"}', r"not UTF-8 text \(byte 28\)"),
        ("r.html", "<p>nothing</p>", "holds no records"),
        ("r.html", page('{"schema_version": 1}', 'type="application/json" id="other"'), "holds no records"),
        ("r.html", page('{"schema_version": 1}', f'id="{BLOCK_ID}"'), "holds no records"),
        ("r.html", f"<!-- {page('{}')} -->", "holds no records"),
        ("r.html", page('{"schema_version": 1}') * 2, "holds 2 records"),
        ("r.html", page('{"schema_version": 1, }'), "is not valid JSON"),
        ("r.html", page('{"schema_version": 999}'), "newer sparsebridge"),
        ("r.txt", "{}", "neither .json nor .html"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, name: str, content, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        read_report(path)
    assert "\n" not in str(error.value)


def test_a_path_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no report.json or report.html in .*; recipes/audit.py writes them"):
        read_report(tmp_path)
    with pytest.raises(InputError, match="no report at"):
        read_report(tmp_path / "absent.html")
