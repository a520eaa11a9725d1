"""`sparsebridge verify`: is a report as it was written, and are the files it speaks of the ones lying here?

    page          the digest that the page states of itself
    record        every field's digest (bridges.integrity), the schema
    figures       the page drawn again from its own record, byte by byte
    files         SHA-256 of every artefact named in the record; one that is not here is "not checked"
    report.json   the record in the page and the file beside it are the same
    signature     as bridges.attestation tells

Each check is printed; whatever failed names its field. None of this needs a model or a network.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bridges.attestation import check_signature, envelope_path
from bridges.integrity import (
    changed_fields,
    differing_fields,
    embedded,
    page_digest,
    pointer_at,
    stated_page_digest,
)
from bridges.report import page_code, render_html
from bridges.report_file import parse_strict
from bridges.report_schema import schema_faults
from bridges.report_values import at, entries
from extractor.artifacts import SCHEMA_VERSION, file_sha256
from extractor.errors import InputError

State = Literal["ok", "FAILED", "not checked"]
FAILED_CODE = 6
CONTEXT = 40


@dataclass(frozen=True)
class Check:
    """One check: what, how it went, and what was found."""

    state: State
    what: str
    found: str = ""

    def __str__(self) -> str:
        return f"{self.state:<11}  {self.what}{': ' if self.found else ''}{self.found}"


def verify(report: Path, artifacts: Path | None = None, key: Path | None = None) -> int:
    """Print every check of a report (.html, .json, or its run folder); 0, or 6 where one failed."""
    checks = list(check_report(report, artifacts, key))
    failed = sum(check.state == "FAILED" for check in checks)
    skipped = sum(check.state == "not checked" for check in checks)
    for check in checks:
        sys.stdout.write(f"{check}\n")
    sys.stdout.write(f"{len(checks) - failed - skipped} ok, {failed} failed, {skipped} not checked\n")
    return FAILED_CODE if failed else 0


def check_report(report: Path, artifacts: Path | None = None, key: Path | None = None) -> Iterator[Check]:
    """Raises InputError where there is no such report."""
    path = report / "report.html" if report.is_dir() else report
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise InputError(f"report '{path}' cannot be read: {error.strerror}") from None
    is_page = path.suffix != ".json"
    record = None
    if is_page:
        yield page_check(text)
        block = embedded(text)
        if block is None:
            yield Check("FAILED", "record", "the element report-data is missing, damaged or there twice")
        else:
            record = yield from record_checks(block[0])
    else:
        record = yield from record_checks(text)
    if record is not None:
        if is_page:
            yield figures_check(text, record)
            yield beside_check(path.parent / "report.json", record)
        yield from artifact_checks(record, artifacts or path.parent)
    yield signature_check(path, key)


def page_check(page: str) -> Check:
    stated, found = stated_page_digest(page), page_digest(page)
    if stated is None:
        return Check("FAILED", "page", "its digest (page-sha256) is missing")
    if stated != found:
        return Check("FAILED", "page", f"states SHA-256 {stated[:16]}, is {found[:16]}")
    return Check("ok", "page", f"SHA-256 {found[:16]}")


def record_checks(text: str) -> Iterator[Check]:
    """Checks of the record's text; returns the record, or None where it cannot be read."""
    try:
        record = parse_strict(text)
    except ValueError as error:
        place = pointer_at(text, getattr(error, "pos", 0))
        yield Check("FAILED", "record", f"not JSON at or near {place} ({error})")
        return None
    version = at(record, "schema_version")
    if version != SCHEMA_VERSION:
        why = f"schema version {version!r}, this release reads {SCHEMA_VERSION}"
        yield Check("FAILED", "record", f"/schema_version: {why}")
        return None
    changed = changed_fields(record)
    for pointer in changed:
        yield Check("FAILED", "record", f"{pointer} is not as it was sealed")
    if not changed:
        yield Check("ok", "record", f"{len(record['integrity']['fields'])} fields as they were sealed")
    faults = schema_faults(record)
    for fault in faults:
        yield Check("FAILED", "schema", fault)
    if not faults:
        yield Check("ok", "schema", f"version {version}")
    return record


def figures_check(page: str, record: dict[str, Any]) -> Check:
    """Every figure and word of the page against a page drawn anew."""
    if at(record, "integrity", "page_code_sha256") != page_code():
        version = at(record, "provenance", "environment", "versions", "sparsebridge")
        return Check(
            "not checked", "figures", f"drawn by other code (sparsebridge {version}); install that version"
        )
    try:
        drawn = render_html(record)
    except Exception as error:  # a record that was changed may hold anything
        return Check("FAILED", "figures", f"the record cannot be drawn: {error!r}"[:200])
    if drawn == page:
        return Check("ok", "figures", "the page is what its record gives, byte by byte")
    at_byte = next(
        (i for i, (a, b) in enumerate(zip(drawn, page, strict=False)) if a != b), min(map(len, (drawn, page)))
    )
    wanted, found = (text[max(0, at_byte - CONTEXT // 2) : at_byte + CONTEXT // 2] for text in (drawn, page))
    return Check("FAILED", "figures", f"in {place_in(drawn, at_byte)}: expected {wanted!r}, found {found!r}")


def place_in(page: str, position: int) -> str:
    """The part of a page that a position lies in: a field of its record, or the nearest heading or id."""
    block = embedded(page)
    if block and block[1] <= position < block[1] + len(block[0]):
        return f"report-data {pointer_at(block[0], position - block[1])}"
    ids = list(
        re.finditer(r'\bid="([^"]+)"|<(style|title|caption|script|footer|meta)\b', page[: position + 1])
    )
    row = re.findall(r'<th scope="row">([^<]*)</th>', page[: position + 1].rpartition("<tr>")[2])
    name = (ids[-1][1] or ids[-1][2]) if ids else "the head"
    section = next((match[1] for match in reversed(ids) if match[1]), name)
    return " / ".join(dict.fromkeys([section, name, *row[:1]]))


def beside_check(path: Path, record: dict[str, Any]) -> Check:
    if not path.is_file():
        return Check("not checked", "report.json", "not beside the page")
    try:
        other = parse_strict(text := path.read_bytes().decode("utf-8", "surrogateescape"))
    except ValueError as error:
        place = pointer_at(text, getattr(error, "pos", 0))
        return Check("FAILED", "report.json", f"not JSON at or near {place} ({error})")
    if other != record:
        names = differing_fields(record, other) if isinstance(other, dict) else []
        which = ", ".join(names) or "no record at all"
        return Check("FAILED", "report.json", f"is not the record in the page: {which}")
    return Check("ok", "report.json", "is the record in the page")


def artifact_checks(record: dict[str, Any], folder: Path) -> Iterator[Check]:
    """Every file named in the record against the one in this folder."""
    artifacts = entries(at(record, "provenance", "artifacts"))
    if not artifacts:
        yield Check("not checked", "files", "the record names none")
    root = folder.resolve()
    for name, sha256 in artifacts:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            yield Check("FAILED", f"file {name}", "its path leaves the folder")
        elif not path.is_file():
            yield Check("not checked", f"file {name}", "not here")
        elif (found := file_sha256(path)) != sha256:
            yield Check("FAILED", f"file {name}", f"recorded SHA-256 {str(sha256)[:16]}, is {found[:16]}")
        else:
            yield Check("ok", f"file {name}", f"SHA-256 {found[:16]}")


def signature_check(path: Path, key: Path | None) -> Check:
    """The DSSE envelope beside the report, if any."""
    outcome = check_signature(envelope_path(path), key)
    return Check(outcome.state, "signature", outcome.text)
