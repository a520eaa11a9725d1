"""A record that tells where it was changed: a digest per field, one of the page, the record inside it.

    fields   JSON pointer (RFC 6901) -> SHA-256 of that part's canonical JSON, down to three levels of names
    page     SHA-256 of the page with this digest itself set to zeros
    block    the record as it stands in the page: JSON, every field on a line of its own, no `<`, `>` or `&`

Digests find damage and careless changes. Whoever changes the record on purpose can compute them again: only
a signature (`bridges.attestation`) or a hash kept elsewhere tells that.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

DEPTH = 3
BLOCK_ID = "report-data"
_DIGEST = re.compile(r'(<meta name="page-sha256" content=")([^"]*)(">)')
_BLOCK = re.compile(rf'<script type="application/json" id="{BLOCK_ID}">\n(.*?)</script>', re.DOTALL)
_KEY = re.compile(r'( *)"((?:[^"\\]|\\.)*)": ')
_ESCAPED = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def seal(report: dict[str, Any], page_code: str) -> dict[str, Any]:
    """The record with its digests; `page_code`: the hash of what draws the page."""
    own = {key: value for key, value in report.items() if key != "integrity"}
    return own | {"integrity": {"page_code_sha256": page_code, "fields": field_digests(own)}}


def field_digests(report: dict[str, Any]) -> dict[str, str]:
    return {
        pointer: hashlib.sha256(_canonical(part).encode()).hexdigest() for pointer, part in _parts(report)
    }


def changed_fields(report: dict[str, Any]) -> list[str]:
    """JSON pointers of the fields that are not as they were sealed: changed, lost, or new."""
    own = {key: value for key, value in report.items() if key != "integrity"}
    integrity = report.get("integrity")
    sealed = integrity.get("fields") if isinstance(integrity, dict) else None
    if not isinstance(sealed, dict):
        return ["/integrity/fields"]
    return _differing(field_digests(own), sealed)


def differing_fields(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """JSON pointers of the fields in which two records differ."""
    return _differing(field_digests(one), field_digests(other))


def data_block(report: dict[str, Any]) -> str:
    """The record for the page's `<script type="application/json">`."""
    return _lines(report, 0).translate(_ESCAPED) + "\n"


def embedded(page: str) -> tuple[str, int] | None:
    """The record's text in a page, and where it begins; None where there is not exactly one."""
    found = list(_BLOCK.finditer(page))
    return (found[0][1], found[0].start(1)) if len(found) == 1 else None


def pointer_at(text: str, position: int) -> str:
    """The field that a position of a record's text lies in, by its lines alone, whether it parses or not."""
    line_end = text.find("\n", position)
    path: list[str] = []
    for line in text[: len(text) if line_end < 0 else line_end].split("\n"):
        if match := _KEY.match(line):
            path = [*path[: max(0, len(match[1]) - 1)], match[2]]
    return _pointer(path) or "/"


def with_page_digest(page: str) -> str:
    """The page with its digest in its place."""
    return _DIGEST.sub(rf"\g<1>{page_digest(page)}\g<3>", page)


def page_digest(page: str) -> str:
    blank = _DIGEST.sub(rf"\g<1>{'0' * 64}\g<3>", page)
    return hashlib.sha256(blank.encode("utf-8", "surrogateescape")).hexdigest()


def stated_page_digest(page: str) -> str | None:
    """What the page says of itself."""
    found = _DIGEST.search(page)
    return found[2] if found else None


def _differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _is_branch(value: Any, depth: int) -> bool:
    return depth < DEPTH and isinstance(value, dict) and bool(value) and "undefined" not in value


def _parts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if _is_branch(value, len(path)):
        for key, part in value.items():
            yield from _parts(part, (*path, key))
    else:
        yield _pointer(path), value


def _pointer(path: Any) -> str:
    return "".join(f"/{name.replace('~', '~0').replace('/', '~1')}" for name in path)


def _lines(value: Any, depth: int) -> str:
    if not _is_branch(value, depth):
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    indent = " " * (depth + 1)
    inner = ",\n".join(f"{indent}{json.dumps(key)}: {_lines(part, depth + 1)}" for key, part in value.items())
    return f"{{\n{inner}\n{' ' * depth}}}"
