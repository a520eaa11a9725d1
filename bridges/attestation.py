"""Provenance that other tools can read: an in-toto Statement v1 about a report, and its signature.

    report record + hashes of its files -> statement -> report.intoto.json
    statement + Ed25519 key -> DSSE envelope -> report.intoto.dsse.json -> check_signature

Subjects are the page, the record and every file of the run; materials are what the run was made from.
`PREDICATE_TYPE` is a name, as in-toto asks for one: there need not be a page at that address.
Format: in-toto Attestation Framework, Statement v1; the envelope is that of `bridges.dsse`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bridges.dsse import is_signed, make_envelope, open_envelope
from bridges.report_file import parse_strict, read_report, report_path, settings_documents
from bridges.report_values import at, entries, verdict
from extractor.artifacts import file_sha256, write_json
from extractor.errors import InputError

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://sparsebridge.dev/report/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_SUFFIX, ENVELOPE_SUFFIX = ".intoto.json", ".intoto.dsse.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Outcome:
    """What is known of a report's signature; `state` is `ok` for one of the outcomes alone.

    `unsigned`: there is no envelope. `not checked`: there is one, but no key was given. `signed`: by this
    key, and about the report that lies here. `bad signature`: by another key, changed, or about other
    files. `unknown format`: an envelope or statement of a kind or version that this release does not read.
    """

    outcome: Literal["unsigned", "not checked", "signed", "bad signature", "unknown format"]
    state: Literal["ok", "FAILED", "not checked"]
    text: str
    statement: dict[str, Any] | None = None
    """Of a report that is signed by this key."""


# --- the statement ---------------------------------------------------------------------------------------


def statement(report: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """The in-toto statement about a report.

    Args:
        files: SHA-256 by name, of report.html and report.json.

    Raises:
        InputError: a SHA-256 that is none.
    """
    artifacts = dict(entries(at(report, "provenance", "artifacts")))
    subjects = files | {name: sha256 for name, sha256 in artifacts.items() if name not in files}
    for name, sha256 in subjects.items():
        if not _is_sha256(sha256):
            raise InputError(f"'{name}': {sha256!r} is not a SHA-256 in lower-case hexadecimal digits")
    environment = at(report, "provenance", "environment")
    word, count = verdict(report)
    return {
        "_type": STATEMENT_TYPE,
        "subject": [_resource(name, sha256) for name, sha256 in subjects.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "run": at(report, "run"),
            "status": at(report, "status"),
            "verdict": {"word": word, "count": count},
            "reportSchemaVersion": at(report, "schema_version"),
            "builder": {
                "name": "sparsebridge",
                "versions": at(environment, "versions"),
                "python": at(environment, "python"),
            },
            "code": at(environment, "git"),
            "recipes": at(report, "provenance", "recipes"),
            "hardware": {key: at(environment, key) for key in ("machine", "threads", "accelerator")},
            "seeds": _seeds(at(report, "method")),
            "commands": at(report, "method", "replay"),
            "materials": [_resource(name, sha256) for name, sha256 in _materials(report)],
        },
    }


def write_statement(report: Path) -> Path:
    """Write NAME.intoto.json beside NAME.html and NAME.json; `report` is one of them, or the run folder.

    Raises:
        InputError: no report, or a page and a record that differ.
    """
    files = report_files(report)
    path = _beside(files[0], STATEMENT_SUFFIX)
    write_json(path, _statement_of(files))
    return path


def report_files(report: Path) -> list[Path]:
    """The page and the record of one name, as far as they are there.

    Raises:
        InputError: neither is.
    """
    file = report_path(report)
    pair = [file.with_suffix(suffix) for suffix in (".html", ".json")]
    return [path for path in pair if path.is_file()] or [file]


def _statement_of(files: list[Path]) -> dict[str, Any]:
    records = [read_report(file) for file in files]
    if any(record != records[0] for record in records):
        raise InputError(f"'{files[0]}' and '{files[1]}' are of different reports; run recipes/audit.py")
    return statement(records[0], {file.name: file_sha256(file) for file in files})


def _resource(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}


def _materials(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every input with a hash, once, by where the record names it: `train/dense`, `train/train_text`."""
    seen = set()
    for name, sha256 in _hashes(at(report, "provenance", "inputs")):
        if (name, sha256) not in seen:
            seen.add((name, sha256))
            yield name, sha256


def _hashes(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        name = str(key).removesuffix("sha256").removesuffix("_")
        if _is_sha256(part):
            yield "/".join((*path, name) if name else path), part
        else:
            yield from _hashes(part, (*path, str(key)))


def _seeds(method: Any) -> dict[str, list[int]]:
    """Every key of the settings that names a seed, by recipe, with the values it has."""
    found: dict[str, list[int]] = {}
    settings = at(method, "settings")
    # Reports of earlier versions hold the settings as text alone.
    own = [settings] if isinstance(settings, dict) else settings_documents(at(method, "config"))
    for key, value in (leaf for document in own for leaf in _leaves(document)):
        if key.rpartition(".")[2] in ("seed", "seeds"):
            values = found.setdefault(key, [])
            values += [seed for seed in (value if isinstance(value, list) else [value]) if seed not in values]
    return found


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


# --- the signature ---------------------------------------------------------------------------------------


def sign(report: Path, key: Path) -> Path:
    """Sign the statement about a report; returns the envelope NAME.intoto.dsse.json beside it.

    Raises:
        InputError: no report, a page and a record that differ, or no Ed25519 private key in PEM.
        MachineError: the package `cryptography` is missing.
    """
    files = report_files(report)
    payload = json.dumps(_statement_of(files), sort_keys=True, separators=(",", ":"), allow_nan=False)
    path = _beside(files[0], ENVELOPE_SUFFIX)
    write_json(path, make_envelope(PAYLOAD_TYPE, payload.encode(), key))
    return path


def envelope_path(report: Path) -> Path:
    """Where a report's signature lies."""
    return _beside(report_files(report)[0], ENVELOPE_SUFFIX)


def check_signature(envelope: Path, public_key: Path | None) -> Outcome:
    """Is the report beside this envelope signed by this key?

    The report is NAME.html and NAME.json beside NAME.intoto.dsse.json: every one of them that is there must
    be among the subjects with its hash, and one must be there. Files of the run are not looked at; the
    record has their hashes.

    Raises:
        InputError: no Ed25519 public key in PEM.
        MachineError: the package `cryptography` is missing.
    """
    if not envelope.is_file():
        if public_key is None:
            return Outcome("unsigned", "not checked", f"unsigned: no '{envelope.name}' beside the report")
        return Outcome("unsigned", "FAILED", f"unsigned, but a key was given: no '{envelope.name}'")
    try:
        payload, signatures = open_envelope(envelope, PAYLOAD_TYPE)
    except ValueError as error:
        return Outcome("unknown format", "FAILED", f"'{envelope.name}': {error}")
    if public_key is None:
        return Outcome("not checked", "not checked", "signed, but no key was given to check it with (--key)")
    if not is_signed(PAYLOAD_TYPE, payload, signatures, public_key):
        return Outcome(
            "bad signature", "FAILED", f"not signed by the key in '{public_key}', or changed since then"
        )
    try:
        told = _open_statement(payload)
    except ValueError as error:
        return Outcome("unknown format", "FAILED", f"signed by this key, but {error}")
    if fault := _other_report(told, envelope):
        return Outcome("bad signature", "FAILED", f"signed by this key, but {fault}")
    return Outcome("signed", "ok", f"signed by the key in '{public_key}'", told)


def _open_statement(payload: bytes) -> dict[str, Any]:
    """The statement that was signed. Raises ValueError for another kind or version."""
    told = parse_strict(payload.decode("utf-8"))
    if not isinstance(told, dict) or told.get("_type") != STATEMENT_TYPE:
        raise ValueError(f"what is signed is not of type {STATEMENT_TYPE}")
    if told.get("predicateType") != PREDICATE_TYPE:
        raise ValueError(f"what is signed has not the predicate {PREDICATE_TYPE}")
    if not isinstance(told.get("subject"), list):
        raise ValueError("what is signed has no subjects")
    return told


def _other_report(told: dict[str, Any], envelope: Path) -> str:
    """Why the statement is not about the report beside its envelope; empty where it is."""
    subjects = {str(at(subject, "name")): at(subject, "digest", "sha256") for subject in told["subject"]}
    name = envelope.name.removesuffix(ENVELOPE_SUFFIX)
    files = [envelope.with_name(f"{name}{suffix}") for suffix in (".html", ".json")]
    files = [file for file in files if file.is_file()]
    if not files:
        return f"there is no '{name}.html' or '{name}.json' beside it"
    changed = [file.name for file in files if subjects.get(file.name) != file_sha256(file)]
    return (
        f"{' and '.join(changed)} {'is' if len(changed) == 1 else 'are'} not what was signed"
        if changed
        else ""
    )


def _beside(report: Path, suffix: str) -> Path:
    return report.with_name(f"{report.stem}{suffix}")


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
