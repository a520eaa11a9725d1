"""A report tells when it was changed, and where: every byte of it, and every file it speaks of."""

import json
import random
import re
from pathlib import Path

import pytest

from bridges.integrity import changed_fields, data_block, embedded, pointer_at
from bridges.report import write_report
from bridges.report_schema import json_schema, schema_faults
from bridges.verify import Check, check_report, place_in, verify
from extractor.artifacts import file_sha256
from extractor.errors import InputError
from tests.bridges.report_record import record
from tests.conftest import ROOT

FLIPS = pytest.mark.parametrize("flips", [40, pytest.param(200, marks=pytest.mark.slow)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a report and the two files it names."""
    value = record("quotes")
    files = {"student/model.safetensors": b"weights", "circuits/quotes.json": b"{}"}
    for name, content in files.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        value["provenance"]["artifacts"][name] = file_sha256(path)
    write_report(value, tmp_path / "run")
    return tmp_path / "run"


def failures(run: Path) -> list[Check]:
    return [check for check in check_report(run) if check.state == "FAILED"]


def test_an_untouched_report_passes(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert verify(run / "report.html") == 0
    shown = capsys.readouterr().out
    assert "0 failed, 1 not checked" in shown  # the signature
    assert "the page is what its record gives, byte by byte" in shown
    assert verify(run) == verify(run / "report.json") == 0


@FLIPS
def test_flipped_bytes_are_found_and_named(flips: int, run: Path) -> None:
    """One bit of one random byte at a time, anywhere in the page."""
    page = run / "report.html"
    whole, choose = page.read_bytes(), random.Random(0)
    for _ in range(flips):
        position = choose.randrange(len(whole))
        changed = bytearray(whole)
        changed[position] ^= 1 << choose.randrange(8)
        page.write_bytes(changed)
        found = failures(run)
        assert any(check.what == "page" for check in found), position
        named = [check for check in found if check.what in ("record", "figures", "schema")]
        assert named, (position, whole[position - 40 : position + 40])
        assert all(check.found for check in named)
    page.write_bytes(whole)
    assert not failures(run)


def test_a_changed_figure_is_named_by_its_field(run: Path) -> None:
    page = run / "report.html"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace('"loss":0.0812', '"loss":0.0712', 1), encoding="utf-8")
    found = " ".join(map(str, failures(run)))
    assert "/dense/tasks/quotes is not as it was sealed" in found
    assert "/dense/tasks/quotes" in found.split("report.json")[1]  # the file beside it is another

    page.write_text(text.replace("<td>95.6 %</td>", "<td>99.6 %</td>", 1), encoding="utf-8")
    (one,) = [check for check in failures(run) if check.what == "figures"]
    assert "quotes" in one.found
    assert "95.6" in one.found
    assert "99.6" in one.found


@pytest.mark.parametrize("name", ["student/model.safetensors", "circuits/quotes.json"])
def test_a_changed_artefact_is_named(run: Path, name: str) -> None:
    path = run / name
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    assert [check.what for check in failures(run)] == [f"file {name}"]
    assert verify(run) == 6
    path.unlink()  # lost is not changed
    assert not failures(run)
    assert any(check.state == "not checked" and name in check.what for check in check_report(run))


def test_files_are_looked_for_where_they_are_said_to_be(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone" / "report.html"
    alone.parent.mkdir()
    alone.write_bytes((run / "report.html").read_bytes())
    skipped = [check.what for check in check_report(alone) if check.state == "not checked"]
    assert "file student/model.safetensors" in skipped
    assert "report.json" in skipped
    beside = [check for check in check_report(alone, artifacts=run) if check.what.startswith("file")]
    assert [check.state for check in beside] == ["ok", "ok"]


def test_a_path_that_leaves_the_folder_is_not_read(run: Path) -> None:
    value = record("quotes")
    value["provenance"]["artifacts"] = {"../outside": "0" * 64}
    (run.parent / "outside").write_text("secret")
    write_report(value, run)
    assert "its path leaves the folder" in str(failures(run)[0])


@FLIPS
def test_the_record_file_may_be_damaged_anywhere(flips: int, run: Path) -> None:
    path = run / "report.json"
    whole, choose = path.read_bytes(), random.Random(1)
    for _ in range(flips // 4):
        position = choose.randrange(len(whole))
        changed = bytearray(whole)
        changed[position] ^= 1 << choose.randrange(8)
        if bytes(changed).strip() == whole.strip():
            continue
        path.write_bytes(changed)
        is_same = _parsed(changed) == json.loads(whole)  # white space between values says nothing
        assert bool(failures(run)) != is_same, position
    path.write_bytes(whole)


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("sound", "unsound", "why"),
    [('"ce":1.8765', '"ce":NaN', "NaN is not JSON"), ('"ce":1.8765', '"ce":1.5,"ce":1.8765', "there twice")],
)
def test_what_readers_may_read_in_two_ways_fails(run: Path, sound: str, unsound: str, why: str) -> None:
    """The last of two keys alone would still fit its digest."""
    path = run / "report.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()), separators=(",", ":")).replace(sound, unsound, 1)
    )
    assert why in " ".join(str(check) for check in check_report(path))
    assert verify(path) == 6


def test_another_version_is_refused_by_name(run: Path) -> None:
    value = json.loads((run / "report.json").read_text())
    value["schema_version"] = 99
    (run / "report.json").write_text(json.dumps(value))
    found = [str(check) for check in check_report(run / "report.json")]
    assert any("schema version 99, this release reads 1" in line for line in found)


def test_a_page_of_other_code_is_not_called_wrong(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridges.verify.page_code", lambda: "0" * 64)
    states = {check.what: check.state for check in check_report(run)}
    assert states["figures"] == "not checked"
    assert states["page"] == "ok"


def test_no_report_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        list(check_report(tmp_path / "report.html"))


# --- digests, places, schema ----------------------------------------------------------------------


def test_every_change_of_the_record_changes_a_digest(run: Path) -> None:
    sealed = json.loads((run / "report.json").read_text())
    assert changed_fields(sealed) == []
    sealed["circuits"]["quotes"]["verdict"]["word"] = "supported"
    sealed["new"] = 1
    del sealed["edits"]["quotes"]["size"]
    assert changed_fields(sealed) == ["/circuits/quotes/verdict", "/edits/quotes/size", "/new"]


def test_a_place_in_a_record_is_named_whether_it_parses_or_not() -> None:
    text = data_block({"a/b": {"c": {"d": {"e": 1}}}, "f": [1, 2], "g": {"undefined": "why"}})
    assert pointer_at(text, text.index('"e"')) == "/a~1b/c/d"
    broken = text.replace("[1, 2]", "[1 2").replace("[1,2]", "[1 2")
    assert pointer_at(broken, broken.index("[1")) == "/f"
    assert pointer_at(text, text.index("why")) == "/g"


def test_a_place_in_the_page_is_named(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    row = re.search(r'<th scope="row">faithful</th><td>', page)
    assert place_in(page, row.end()) == "criteria / caption / faithful"
    assert place_in(page, page.index("color-scheme")) == "style"
    block = embedded(page)
    assert place_in(page, block[1] + block[0].index('"criteria"')) == "report-data /criteria"


def test_the_committed_schema_is_that_of_the_code() -> None:
    path = ROOT / "bridges" / "templates" / "report.schema.json"
    assert json.loads(path.read_text()) == json_schema()


def test_reports_fit_the_schema_for_other_tools(run: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="another reader of JSON Schema; in the test extra")
    value = json.loads((run / "report.json").read_text())
    jsonschema.Draft202012Validator(json_schema()).validate(value)
    value["dense"]["ce"] = "NaN"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json_schema()).validate(value)


def test_schema_faults_name_their_place(run: Path) -> None:
    value = json.loads((run / "report.json").read_text())
    assert schema_faults(value) == []
    value["edits"]["quotes"]["flip_rate"][1] = 1.5
    value["criteria"][0]["met"] = "yes"
    del value["provenance"]["date"]
    value["circuits"]["quotes"] = {"undefined": "no time"}  # that is allowed
    found = schema_faults(value)
    assert any(fault.startswith("/edits/quotes/flip_rate/1") for fault in found)
    assert any(fault.startswith("/criteria/0/met") for fault in found)
    assert any(fault.startswith("/provenance/date") for fault in found)
    assert not any(fault.startswith("/circuits") for fault in found)
