"""Run folders: files that are whole or invisible, and a manifest that says what they rest on.

A run is a folder: config.yaml manifest.json metrics.jsonl student/ bridges/ circuits/ edits/ report.*
Every file is written to a temporary name in the same folder and renamed, so a reader never sees half of
one. `manifest.json` holds, per recipe, the SHA-256 of inputs and outputs, versions, git commit and seed.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from extractor.errors import InputError, MachineError

SCHEMA_VERSION = 1
REPORTED_DISTRIBUTIONS = ("sparsebridge", "torch", "transformers", "accelerate", "numpy")


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON without NaN or infinity (they are not JSON)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=True) + "\n")


def read_json(path: Path, what: str, made_by: str) -> Any:
    """Read a JSON artefact of an earlier recipe.

    Raises:
        InputError: the file is missing, is not JSON, or has another schema version.
    """
    if not path.is_file():
        raise InputError(f"no {what} at '{path}'; {made_by} writes it")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{what} '{path}' is not valid JSON ({error})") from None
    if isinstance(value, dict) and value.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise InputError(
            f"{what} '{path}' has schema version {value['schema_version']}; "
            f"this release reads {SCHEMA_VERSION}"
        )
    return value


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling folder, then put it in the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write(temporary)
    remove_folder(path)
    os.replace(temporary, path)


def remove_folder(path: Path) -> None:
    """Take a folder away at once, if it is there: a kill must not leave half of it under its name."""
    if not path.exists():
        return
    gone = path.with_name(f".tmp-gone-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def claim_run_folder(run: Path, config: str, *, is_writer: bool) -> None:
    """Write `config.yaml`, so that the folder belongs to this config; `is_writer` on one process only.

    Raises:
        InputError: the folder belongs to another config.
        MachineError: it cannot be written.
    """
    path = run / "config.yaml"
    if path.is_file() and path.read_text(encoding="utf-8") != config:
        raise InputError(
            f"run folder '{run}' holds a run with another config; give another folder, or remove it"
        )
    if is_writer:
        for torn in run.glob(".tmp-*"):  # what a kill left half-written or half-removed
            shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
        try:
            write_text(path, config)
        except OSError as error:
            raise MachineError(f"run folder '{run}' cannot be written ({error.strerror})") from error


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def fingerprint(folder: Path) -> str:
    """One hash for the weights in a folder: over the names and hashes of its safetensors files."""
    return combine_hashes({path.name: file_sha256(path) for path in folder.glob("*.safetensors")})


def combine_hashes(hashes: dict[str, str]) -> str:
    """One hash over names and hashes, in the order of the names."""
    digest = hashlib.sha256()
    for name, sha256 in sorted(hashes.items()):
        digest.update(f"{name}:{sha256}\n".encode())
    return digest.hexdigest()


def update_manifest(
    run_dir: Path, recipe: str, *, inputs: dict[str, Any], outputs: Iterable[Path], **facts: Any
) -> None:
    """Add or replace one recipe's entry in `manifest.json`."""
    path = run_dir / "manifest.json"
    manifest = json.loads(path.read_text()) if path.is_file() else {"schema_version": SCHEMA_VERSION}
    hashes: dict[str, str] = {}
    for output in outputs:
        name = output.relative_to(run_dir).as_posix()
        if output.is_dir():
            hashes |= {f"{name}/{inner}": sha for inner, sha in folder_hashes(output).items()}
        else:
            hashes[name] = file_sha256(output)
    manifest[recipe] = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "inputs": inputs,
        "outputs": hashes,
        **facts,
    }
    write_json(path, manifest)


def text_sha256(value: Any) -> str:
    """Of a JSON-able value, in one canonical spelling."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def source_sha256() -> str:
    """Of the code that circuits are found and measured with."""
    folder = Path(__file__).resolve().parent
    return combine_hashes({path.name: file_sha256(path) for path in sorted(folder.glob("*.py"))})


def environment() -> dict[str, Any]:
    """Versions, code revision and hardware that a result rests on."""
    import torch  # takes seconds; who only reads files needs none

    versions = {}
    for name in REPORTED_DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "git": _git_revision(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _git_revision() -> dict[str, Any]:
    here = Path(__file__).resolve().parent
    try:
        commit, status = (
            subprocess.run(
                ["git", *command], cwd=here, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": True}
    return {"commit": commit, "dirty": bool(status)}
