"""`sparsebridge check`: would the recipes take this dense checkpoint? Every fault, and nothing of it runs.

The rules are those of `bridges.trust`, `bridges.weights` and `bridges.checkpoint`, all of them instead of up
to the first that fails. transformers is asked only about a folder without code, and only on the meta
device; tensors are read one at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, is_offline_mode, metadata_load
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from bridges.checkpoint import check_vocabulary, load_tokenizer
from bridges.checkpoint import quiet as quiet
from bridges.doctor import available_memory, check_requirement, requirements
from bridges.families import FAMILIES, check_family
from bridges.findings import Finding, has_problem, print_findings
from bridges.hub import check_blobs, resolve_folder
from bridges.plan import plan
from bridges.skeleton import Skeleton, skeleton
from bridges.trust import (
    DenseConfig,
    Folder,
    check_contained,
    check_folder,
    check_no_code,
    check_safetensors,
    read_json_object,
    weight_files,
)
from bridges.warm_start import StudentShape
from bridges.weights import check_finite, check_keys, stored_tensors
from extractor.artifacts import combine_hashes, file_sha256
from extractor.errors import InputError, MachineError, UnsupportedModelError
from extractor.sparsity import SparsityConfig

REFUSED_CODE = 3
BATCH_SIZE, CONTEXT_LENGTH = 16, 128  # of the memory estimate; the context is cut to the model's positions
MAX_CARD_BYTES = 1_000_000
KEY_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys")


@dataclass
class Examination:
    """Findings in the order they were made; `facts` are what was read on the way."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def step(self, name: str, check: Callable[[], str], *, needs: bool = True) -> bool:
        """Run a check that returns what it found, or raises InputError; a fault is told once.

        Returns:
            Whether it passed. With `needs` False it is not run: something it rests on has failed.
        """
        if not needs:
            self.findings.append(Finding(name, "not checked", "rests on a check that failed"))
            return False
        try:
            self.findings.append(Finding(name, "ok", check()))
        except (InputError, OSError, RecursionError) as error:
            fault = " ".join(str(error).split())
            if all(fault != other.found for other in self.findings):
                self.findings.append(Finding(name, "problem", fault))
            return False
        return True

    def warn(self, name: str, found: str, advice: str = "") -> None:
        self.findings.append(Finding(name, "warning", found, advice))


def check(model: str, revision: str | None = None, as_json: bool = False) -> int:
    """Print every finding about a folder or hub id; 0, or 3 where the recipes would refuse it.

    Raises:
        InputError: there is no such checkpoint.
        MachineError: torch or transformers is older than what this rests on.
    """
    check_floors()
    config = DenseConfig(path=model, revision=revision)
    folder = resolve_folder(config)
    if not folder.path.is_dir():
        check_folder(folder, config)  # says so
    found = examine(folder, config)
    code = REFUSED_CODE if has_problem(found.findings) else 0
    print_findings(found.findings, {**found.facts, "exit_code": code}, as_json)
    return code


def check_floors() -> None:
    """Raises MachineError where the libraries that read checkpoints have holes that are known."""
    for requirement in requirements():
        if requirement.name in ("torch", "transformers", "safetensors"):
            found = check_requirement(requirement)
            if found.state != "ok":
                raise MachineError(f"{found.name}: {found.found}; {found.advice}")


def examine(folder: Folder, config: DenseConfig) -> Examination:
    """Everything about a folder that can be told without making a model of it."""
    found = Examination(facts={"model": config.path, "commit": folder.commit})
    without_weights = config.model_copy(update={"random_weights": True, "allow_unlisted": True})

    def check_config() -> str:
        check_folder(folder, without_weights)
        return f"model_type {_model_type(folder)}"

    contained = found.step("files", lambda: _contained(folder))
    harmless = found.step("code", lambda: _no_code(folder, config), needs=contained)
    described = found.step("config.json", check_config, needs=harmless)
    listed = found.step("family", lambda: _family(folder), needs=described)
    files = check_weights(found, folder, needs=contained)
    empty = check_architecture(found, folder, files, needs=listed)
    has_config = harmless and (folder.path / "config.json").is_file()
    check_tokenizer(found, folder, config, empty, needs=has_config)
    if contained:
        check_licence(found, folder)
    check_memory(found, folder, empty)
    if contained and not has_problem(found.findings):  # the recipes' own last word
        found.step("recipes", lambda: f"{len(check_folder(folder, config))} weight file(s) accepted")
    return found


# --- folder and config -----------------------------------------------------------------------------------


def _contained(folder: Folder) -> str:
    check_contained(folder.path, folder.root)
    where = f"commit {folder.commit}" if folder.commit else "a folder here"
    return f"'{folder.path}', {where}; no file leads out of it"


def _no_code(folder: Folder, config: DenseConfig) -> str:
    check_no_code(folder, config)
    return "nothing in config.json or tokenizer_config.json that runs or fetches code"


def _model_type(folder: Folder) -> str:
    return str(read_json_object(folder.path / "config.json").get("model_type"))


def _family(folder: Folder) -> str:
    check_family(_model_type(folder))
    reason = FAMILIES[_model_type(folder)].no_copy
    start = f"the student starts random ({reason})" if reason else "the student can be a copy"
    return f"{_model_type(folder)} is supported; {start}"


# --- weights ---------------------------------------------------------------------------------------------


def check_weights(found: Examination, folder: Folder, *, needs: bool) -> list[Path]:
    """Format, SHA-256 and finite values; returns the files, if all of them are whole."""
    files: list[Path] = []

    def find_files() -> str:
        files.extend(weight_files(folder.path, allow_pickle=False))
        return f"safetensors: {', '.join(file.name for file in files[:5])}{' ...' if len(files) > 5 else ''}"

    if not found.step("format", find_files, needs=needs):
        return []
    hashes: dict[str, str] = {}

    def hash_file(file: Path) -> str:
        check_safetensors(file)
        hashes[file.name] = file_sha256(file)
        check_blobs(folder, {file.name: hashes[file.name]})
        return f"SHA-256 {hashes[file.name]}, {file.stat().st_size:,} bytes"

    # a list, so that no damaged file hides the next one
    whole = all([found.step(f"file {file.name}", lambda file=file: hash_file(file)) for file in files])
    if whole:
        found.facts |= {"sha256": combine_hashes(hashes), "files": hashes}
    tensors: list[dict[str, Any]] = []
    found.step("values", lambda: _finite(folder, files, tensors), needs=whole)
    found.facts["tensors"] = tensors
    twice = [name for name, count in Counter(t["name"] for t in tensors).items() if count > 1]
    if twice:
        line = f"{len(twice)} tensors are in two files, as {twice[0]!r}; which one is read is not defined"
        found.warn("names", line, "save the checkpoint again")
    return files if whole else []


def _finite(folder: Folder, files: list[Path], tensors: list[dict[str, Any]]) -> str:
    check_finite(folder.name, _listed(stored_tensors(files), tensors))
    total = sum(tensor["bytes"] for tensor in tensors)
    kinds = Counter(tensor["dtype"] for tensor in tensors)
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(kinds.items()))
    return f"{len(tensors)} tensors ({dtypes}), {total:,} bytes, all finite"


def _listed(
    stored: Iterable[tuple[str, Tensor]], tensors: list[dict[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    for name, value in stored:
        dtype = str(value.dtype).removeprefix("torch.")
        tensors.append({"name": name, "shape": list(value.shape), "dtype": dtype, "bytes": value.nbytes})
        yield name, value


def check_architecture(
    found: Examination, folder: Folder, files: list[Path], *, needs: bool
) -> Skeleton | None:
    """The tensors against those that the config describes, on the meta device; returns the empty model."""
    empty: list[Skeleton] = []

    def build() -> str:
        empty.append(skeleton(folder.path))
        own = empty[0]
        return f"{len(own.blocks)} blocks, width {own.width}, {own.model.num_parameters():,} parameters"

    built = found.step("architecture", build, needs=needs)
    if not built or not files:
        found.step("tensors", str, needs=False)
        return empty[0] if empty else None
    info: dict[str, Any] = {}
    if not found.step("loading", lambda: _ask_transformers(folder, info)):
        return empty[0]
    for kind in KEY_FAULTS:  # one at a time, so that each is named
        alone = {other: info[other] if other == kind else set() for other in KEY_FAULTS}

        def compare(alone: dict[str, Any] = alone, kind: str = kind) -> str:
            check_keys(folder.name, alone, empty[0].model, files)
            return "none"

        found.step(kind.replace("_", " "), compare)
    return empty[0]


def _ask_transformers(folder: Folder, info: dict[str, Any]) -> str:
    """Which tensor goes where, by transformers' own renaming rules; no value is read into a model."""
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with quiet():
            _, told = AutoModelForCausalLM.from_pretrained(
                folder.path,
                dtype=torch.float32,
                device_map="meta",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # what a config or an index of someone else can raise is anything
        line = " ".join(str(error).split())[:300]
        raise InputError(
            f"transformers cannot load '{folder.name}': {type(error).__name__}: {line}"
        ) from error
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
    info.update(told)
    return "transformers finds a place for the files' tensors"


# --- tokenizer, licence, memory --------------------------------------------------------------------------


def check_tokenizer(
    found: Examination, folder: Folder, config: DenseConfig, empty: Skeleton | None, *, needs: bool
) -> None:
    facts: dict[str, Any] = {}

    def load() -> str:
        tokenizer, told = load_tokenizer(folder, config)
        facts.update(told)
        if empty is None:
            return f"{told['tokenizer_size']:,} entries"
        rows = empty.model.get_input_embeddings().weight.shape[0]
        check_vocabulary(tokenizer, rows, folder.name)
        return f"{told['tokenizer_size']:,} entries for {rows:,} embedding rows"

    if found.step("tokenizer", load, needs=needs) and facts["pad_token"] != "own":
        what = "the end token pads" if facts["pad_token"] == "eos" else "nothing pads"
        found.warn("padding", f"no padding token: {what}; prompts are padded on the right, behind the answer")


def check_licence(found: Examination, folder: Folder) -> None:
    """What the model card's metadata says; a card is text of its author, not a proof."""
    try:
        card = folder.path / "README.md"
        if not card.is_file() and folder.commit:
            card = Path(
                hf_hub_download(
                    folder.name, "README.md", revision=folder.commit, local_files_only=is_offline_mode()
                )
            )
        if not card.is_file():
            raise InputError("no model card (README.md)")
        if card.stat().st_size > MAX_CARD_BYTES:
            raise InputError(f"the model card is larger than {MAX_CARD_BYTES:,} bytes")
        stated = (metadata_load(card) or {}).get("license")
    except Exception as error:  # text of someone else, or no network
        found.warn("licence", f"cannot be told: {' '.join(str(error).split())[:200]}", "ask the author")
        return
    names = [name for name in (stated if isinstance(stated, list) else [stated]) if isinstance(name, str)]
    found.facts["licence"] = names
    if names:
        found.findings.append(Finding("licence", "ok", f"{', '.join(names)[:200]}, by the model card"))
    else:
        found.warn("licence", "the model card states none", "ask the author before you publish a student")


def check_memory(found: Examination, folder: Folder, empty: Skeleton | None) -> None:
    """What distilling it needs at the least: a student of its own shape, on one process."""
    if empty is None:
        found.step("memory", str, needs=False)
        return
    start, needed, context = "copy", 0, 0
    try:
        context = min(CONTEXT_LENGTH, getattr(empty.config, "max_position_embeddings", CONTEXT_LENGTH))
        try:
            needed = _peak_bytes(folder, start, context)
        except UnsupportedModelError as error:
            start = "random"
            found.warn("exact copy", str(error), "student.start random")
            needed = _peak_bytes(folder, start, context)
    except Exception as error:  # a config of someone else can hold any width
        found.warn("memory", f"cannot be estimated: {' '.join(str(error).split())[:200]}")
        return
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_memory()
    found.facts["memory_bytes"] = needed
    line = (
        f"a student of its shape (start {start}) takes about {needed / 2**30:,.2f} GiB per process "
        f"(estimate, {BATCH_SIZE} x {context} tokens); {free / 2**30:,.1f} GiB are free here"
    )
    if needed > free:
        found.warn("memory", line, "a smaller batch, dense.quantization 4bit, or another machine")
    else:
        found.findings.append(Finding("memory", "ok", line))


def _peak_bytes(folder: Folder, start: str, context: int) -> int:
    needed = plan(
        folder.path,
        StudentShape(start=start),
        sparsity=SparsityConfig(),
        batch_size=BATCH_SIZE,
        context_length=context,
    )
    return needed.peak_bytes
