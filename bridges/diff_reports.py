"""`sparsebridge diff`: what two reports claim and rest on, side by side.

    read_report x 2 -> sections -> walk both trees -> Difference: section, path, A, B, B - A

Lists of named parts (criteria, exclusions, checks) are matched by name, lists of nodes and edges as sets,
settings key by key. When and where a run was made is shown as incidental: the evidence is the same.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bridges.drawing import as_text, finite, reason, signed
from bridges.findings import one_line
from bridges.report_file import read_report, settings_documents
from bridges.report_values import at, verdict

Kind = Literal["changed", "only in A", "only in B"]
DIFFERENT_CODE = 1
NUM_LISTED = 20  # per section, without --all
MAX_TEXT = 60  # characters of a value
NAMES = ("claim", "what", "name", "template", "task", "title")
"""The first of these that every part of a list has, and no two alike, names the parts."""
INCIDENTAL = {
    "models": {"name", "adapter"},
    "inputs and files": {"path", "tokenizer", "adapter"},
    "code and machine": {"date", "finished", "machine", "threads", "accelerator"},
    "settings": {"run", "path", "tokenizer", "adapter"},
    "other": {"run", "replay", "page_code_sha256"},
}
"""Last key of a path, by section: names of places and times. What lies at a place is told by its hash."""


@dataclass(frozen=True)
class Difference:
    """One difference; a value that one report lacks is None there, and `kind` says so."""

    section: str
    path: tuple[str, ...]
    kind: Kind
    a: Any
    b: Any
    change: float | None
    """B - A, of numbers."""
    is_incidental: bool


def diff(a: Path, b: Path, as_json: bool = False, show_all: bool = False) -> int:
    """Print how two reports differ; 0 where their evidence is the same, else 1.

    Raises:
        InputError: one of them cannot be read.
    """
    reports = {"A": (a, read_report(a)), "B": (b, read_report(b))}
    found = compare(reports["A"][1], reports["B"][1])
    is_same = all(difference.is_incidental for difference in found)
    heads = {
        side: {"file": str(path), "verdict": ": ".join(verdict(report))}
        for side, (path, report) in reports.items()
    }
    if as_json:
        record = {"schema_version": 1, **heads, "same": is_same, "differences": [asdict(d) for d in found]}
        sys.stdout.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
    else:
        for side, head in heads.items():
            sys.stdout.write(one_line(f"{side}  {head['file']}  {head['verdict']}"))
        sys.stdout.writelines(map(one_line, _lines(found, None if show_all else NUM_LISTED)))
        count = sum(not difference.is_incidental for difference in found)
        end = "the evidence is the same" if is_same else f"the evidence differs: {count} differences"
        sys.stdout.write(f"{end}; {len(found) - count} of when and where only\n")
    return 0 if is_same else DIFFERENT_CODE


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Every difference of two records, in the order of the sections."""
    parts_a, parts_b = sections(a), sections(b)
    return [d for name in parts_a for d in _walk(name, (), parts_a[name], parts_b[name])]


def sections(report: dict[str, Any]) -> dict[str, Any]:
    """The record by what an auditor asks first; nothing is left out but the digests of its own fields."""
    models = ("dense", "student")
    provenance, method = at(report, "provenance"), at(report, "method")
    own = {"criteria", "circuits", "edits", "desk", "bridges", "mixtures", "accounting", "exclusions"}
    rest = _without(report, own | {*models, "provenance", "method", "integrity"})
    documents = settings_documents(at(method, "config"))
    settings = {str(i): document for i, document in enumerate(documents, 1)}
    return {
        "verdict": dict(zip(("word", "count"), verdict(report), strict=True)),
        "criteria": at(report, "criteria"),
        "models": {name: _without(at(report, name), {"tasks"}) for name in models},
        "inputs and files": {key: at(provenance, key) for key in ("inputs", "artifacts")},
        "code and machine": _without(provenance, {"inputs", "artifacts"}),
        "settings": settings or at(method, "config"),
        "circuits": at(report, "circuits"),
        "edits": at(report, "edits"),
        "desk": at(report, "desk"),
        "behaviour": {name: at(report, name, "tasks") for name in models},
        "bridges": {key: at(report, key) for key in ("bridges", "mixtures")},
        "exclusions": {key: at(report, key) for key in ("accounting", "exclusions")},
        "other": {
            **rest,
            "method": _without(method, {"config"}),
            "page_code_sha256": at(report, "integrity", "page_code_sha256"),
        },
    }


# --- walking both records --------------------------------------------------------------------------------


def _walk(section: str, path: tuple[str, ...], a: Any, b: Any) -> Iterator[Difference]:
    if _same(a, b):
        return
    parts_a, parts_b = _parts(a), _parts(b)
    if a is None or b is None:
        yield _difference(section, path, "only in B" if a is None else "only in A", a, b)
    elif parts_a is not None and parts_b is not None:
        for key in dict.fromkeys([*parts_a, *parts_b]):
            yield from _walk(section, (*path, key), parts_a.get(key), parts_b.get(key))
    elif isinstance(a, list) and isinstance(b, list):
        texts_a, texts_b = ({_text(item): item for item in own} for own in (a, b))
        only_a = [item for text, item in texts_a.items() if text not in texts_b]
        only_b = [item for text, item in texts_b.items() if text not in texts_a]
        if only_a:
            yield _difference(section, path, "only in A", only_a, None)
        if only_b:
            yield _difference(section, path, "only in B", None, only_b)
        if not only_a and not only_b:
            how = f"{len(b)} entries in another order or number"
            yield _difference(section, path, "changed", f"{len(a)} entries", how)
    else:
        yield _difference(section, path, "changed", a, b)


def _difference(section: str, path: tuple[str, ...], kind: Kind, a: Any, b: Any) -> Difference:
    x, y = finite(a), finite(b)
    change = None if x is None or y is None else y - x
    is_incidental = bool(path) and path[-1] in INCIDENTAL.get(section, ())
    return Difference(section, path, kind, a, b, change, is_incidental)


def _parts(value: Any) -> dict[str, Any] | None:
    """The named parts of a value, or None where it is to be compared as a whole."""
    if isinstance(value, dict):
        return None if reason(value) is not None else value
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, dict) for item in value):
        for key in NAMES:
            names = [item.get(key) for item in value]
            if all(isinstance(name, str | int) for name in names) and len(set(map(str, names))) == len(names):
                return dict(zip(map(str, names), value, strict=True))
        return {str(i): item for i, item in enumerate(value)}
    if all(finite(item) is not None or isinstance(item, dict) for item in value):  # a curve
        return {str(i): item for i, item in enumerate(value)}
    return None


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 is 1.0, and true is not 1."""
    if a != b or isinstance(a, bool) != isinstance(b, bool):
        return False
    if _text(a) == _text(b):
        return True
    if isinstance(a, dict):
        return all(_same(a[key], b[key]) for key in a)
    return not isinstance(a, list) or all(map(_same, a, b))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _without(value: Any, keys: set[str]) -> Any:
    if not isinstance(value, dict) or reason(value) is not None:
        return value
    return {key: part for key, part in value.items() if key not in keys}


# --- text ------------------------------------------------------------------------------------------------


def _lines(found: list[Difference], most: int | None) -> Iterator[str]:
    """One block per section: verdict words first, what is incidental last."""
    for section in dict.fromkeys(difference.section for difference in found):
        own = [difference for difference in found if difference.section == section]
        own.sort(key=lambda d: (d.is_incidental, d.path[-1:] != ("word",)))
        yield ""
        yield f"{section}: {len(own)}"
        for difference in own[:most]:
            yield f"  {_line(difference)}"
        if most is not None and len(own) > most:
            yield f"  ... and {len(own) - most} more (--all)"


def _line(difference: Difference) -> str:
    name = ".".join(map(_cut, difference.path)) or difference.section
    mark = " (when or where)" if difference.is_incidental else ""
    if difference.kind != "changed":
        value = difference.a if difference.kind == "only in A" else difference.b
        return f"{name}  {difference.kind}: {_short(value)}{mark}"
    a, b = _short(difference.a), _short(difference.b)
    if a == b:  # the first digits are alike
        a, b = _cut(json.dumps(difference.a)), _cut(json.dumps(difference.b))
    change = "" if difference.change is None else f"  ({signed(difference.change)})"
    return f"{name}  {a} -> {b}{change}{mark}"


def _short(value: Any) -> str:
    if isinstance(value, dict) and reason(value) is None:
        return f"{len(value)} values"
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} entries: {_cut(as_text(value))}"
    return _cut(as_text(value))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
