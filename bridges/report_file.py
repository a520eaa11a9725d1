"""A report's record from where it lies: report.json, the page report.html, or the run folder with both."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from bridges.integrity import BLOCK_ID
from extractor.artifacts import SCHEMA_VERSION
from extractor.errors import InputError

MAX_BYTES = 256 * 2**20  # a report has some megabytes


def read_report(path: Path) -> dict[str, Any]:
    """The record of a report; of a run folder that of its report.json, else of its report.html.

    Raises:
        InputError: no such file, no record in it, damaged JSON, or another schema version.
    """
    file = report_path(path)
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"report '{file}' has {size:,} bytes, at most {MAX_BYTES:,} are read")
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"report '{file}' cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"report '{file}' is not UTF-8 text (byte {error.start}); it is damaged") from None
    return parse_record(text if file.suffix == ".json" else _embedded(text, file), f"report '{file}'")


def report_path(path: Path) -> Path:
    """The file that a path means: itself, or in a run folder the record before the page.

    Raises:
        InputError: no report there, or a file that is neither .json nor .html.
    """
    if path.is_dir():
        found = next(
            (path / name for name in ("report.json", "report.html") if (path / name).is_file()), None
        )
        if found is None:
            raise InputError(f"no report.json or report.html in '{path}'; recipes/audit.py writes them")
        return found
    if not path.is_file():
        raise InputError(f"no report at '{path}'; give report.html, report.json, or a run folder")
    if path.suffix not in (".json", ".html"):
        raise InputError(f"'{path}' is neither .json nor .html; give a report or a run folder")
    return path


def parse_record(text: str, what: str) -> dict[str, Any]:
    """A record from its JSON.

    Raises:
        InputError: not JSON, or a record of another schema version.
    """
    try:
        record = parse_strict(text)
    except ValueError as error:
        raise InputError(f"{what} is not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"{what} must hold keys and values, not {type(record).__name__}")
    version = record.get("schema_version")
    if type(version) is not int or version < 1:
        raise InputError(f"{what} has no schema version ({version!r}); it is not a report of sparsebridge")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{what} has schema version {version}, this release reads up to {SCHEMA_VERSION}; it was written "
            "by a newer sparsebridge: pip install --upgrade sparsebridge"
        )
    return record


def parse_strict(text: str) -> Any:
    """JSON that every reader reads alike. Raises ValueError also for a key there twice and for NaN."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def settings_documents(config: Any) -> list[dict[str, Any]]:
    """The configs of a record, which stand one after the other: a key that comes again begins the next."""
    if not isinstance(config, str):
        return []
    documents: list[list[str]] = [[]]
    seen: set[str] = set()
    for line in config.splitlines():
        key = line.partition(":")[0]
        if line[:1].isalpha() and ":" in line:
            if key in seen:
                documents.append([])
                seen.clear()
            seen.add(key)
        documents[-1].append(line)
    try:
        values = [yaml.safe_load("\n".join(lines)) for lines in documents]
    except (yaml.YAMLError, RecursionError):
        return []
    return [value for value in values if isinstance(value, dict)]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} is there twice")
        values[key] = value
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _embedded(page: str, file: Path) -> str:
    parser = _BlockParser()
    parser.feed(page)
    parser.close()
    if len(parser.blocks) != 1:
        count = "no" if not parser.blocks else str(len(parser.blocks))
        raise InputError(
            f'\'{file}\' holds {count} records (<script type="application/json" id="{BLOCK_ID}">), a report '
            "holds one; it is damaged, or no page of recipes/audit.py"
        )
    return parser.blocks[0]


class _BlockParser(HTMLParser):
    """Collects the text of every script that says it is the record."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.blocks: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._inside = tag == "script" and values.get("id") == BLOCK_ID
        if self._inside and values.get("type") == "application/json":
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside and self.blocks:
            self.blocks[-1] += data
