"""What is accepted as a dense checkpoint, judged from its name and files alone.

    name the user typed -> resolve_folder -> Folder -> check_folder -> its weight files

Nothing here loads a weight or lets transformers look at the folder: what could run code, lead outside the
folder or be half a download is refused before.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from safetensors import SafetensorError, safe_open

from bridges.families import check_family
from extractor.config import Config
from extractor.errors import InputError, UsageError

COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit

# Keys with which a config.json makes transformers fetch or run something (CVE-2026-4372, CVE-2026-5241).
CODE_KEYS = {
    "trust_remote_code", "attn_implementation", "_attn_implementation", "experts_implementation",
    "_experts_implementation", "transformers_weights", "fusion_config", "distributed_config",
}  # fmt: skip
HARMLESS_VALUES = (None, False, "eager", "sdpa")
# Private keys with text in them that real checkpoints ship; private numbers and booleans do no harm.
PRIVATE_TEXT = {"_name_or_path", "_commit_hash", "_class_name", "_diffusers_version"}


class DenseConfig(Config):
    """The dense checkpoint: what is loaded, and what it may do."""

    shorthand: ClassVar[str] = "path"
    path: str = "recipes/python/dense"
    """A Hugging Face model folder, or a hub id `org/name`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit that was found is recorded."""
    tokenizer: str | None = None
    """A folder to take the tokenizer from, for a checkpoint that has none."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """bitsandbytes, for training against the model. Student and edits use the unquantised weights."""
    placement: Literal["replicate", "shard"] = "replicate"
    """Whole on every process, or spread over all of them (FSDP2) while a student is trained."""
    adapter: str | None = None
    """A PEFT LoRA adapter folder on top of the checkpoint."""
    adapter_mode: Literal["merged", "live"] = "merged"
    """`merged` into the weights, or `live` beside them; the function is the same."""
    allow_pickle: bool = False
    """Also read pytorch_model.bin, through torch's weights_only loader."""
    trust_remote_code: bool = False
    """Run the checkpoint's own Python code. A hub id then needs a full commit as revision."""
    allow_unlisted: bool = False
    """Try a model family that is not listed; it still has to pass the self-check."""
    random_weights: bool = False
    """Take config.json alone and draw the weights from a fixed seed: for dry runs and benchmarks."""


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder on this machine: where, of which hub commit (if any), and under what name."""

    path: Path
    commit: str | None
    name: str

    @property
    def base_name(self) -> str:
        """The last component of the name: what an adapter calls its base."""
        return self.name.rpartition("/")[2] if self.commit else self.path.resolve().name

    @property
    def root(self) -> Path:
        """What no file may lead out of: the folder, or the hub cache's folder of this model."""
        real = self.path.resolve()
        return real.parent.parent if self.commit else real


def check_folder(folder: Folder, config: DenseConfig) -> list[Path]:
    """Refuse what can be refused from the files alone; returns the weight files that will be read.

    With `random_weights` none are, and none need be there.

    Raises:
        InputError: no such folder, code of its own, files that lead outside, pickled, damaged or
            missing weights.
        UnsupportedModelError: a family that is not listed, without `allow_unlisted`.
    """
    check_contained(folder.path, folder.root)
    if not (folder.path / "config.json").is_file():
        raise InputError(
            f"dense checkpoint: no config.json in '{folder.path}'; give a Hugging Face model folder, "
            "or a hub id like 'org/name'"
        )
    if (folder.path / "adapter_config.json").exists():
        raise InputError(
            f"'{folder.path}' holds an adapter (adapter_config.json); give it as dense.adapter, and its "
            "base as dense.path"
        )
    values = read_json_object(folder.path / "config.json")
    check_no_code(folder, config)
    if "quantization_config" in values:
        raise InputError(
            f"'{folder.path}' is quantised already (quantization_config), and a student is copied from "
            "unquantised weights; give the unquantised checkpoint, and dense.quantization 8bit or 4bit"
        )
    check_family(str(values.get("model_type")), config.allow_unlisted)
    files = [] if config.random_weights else weight_files(folder.path, config.allow_pickle)
    for file in files:
        if file.suffix == ".safetensors":
            check_safetensors(file)
    return files


# --- code ------------------------------------------------------------------------------------------------


def check_no_code(folder: Folder, config: DenseConfig) -> None:
    """Refuse configs that ask transformers to fetch or run code.

    Raises:
        InputError: such a key, or custom code that is not trusted, not pinned or not in the folder.
    """
    for name in ("config.json", "tokenizer_config.json"):
        file = folder.path / name
        if not file.is_file():
            continue
        values = read_json_object(file)
        for key, value in _entries(values):
            if _can_run_code(key, value):
                raise InputError(
                    f"'{file}' sets '{key}' to {value!r}, with which transformers can fetch or run code; "
                    "that is refused: remove the key if you trust the checkpoint without it"
                )
        if "auto_map" in values:
            _check_custom_code(file, values["auto_map"], config)


def _check_custom_code(file: Path, auto_map: Any, config: DenseConfig) -> None:
    if not config.trust_remote_code:
        raise InputError(
            f"'{file}' asks to run its own code (auto_map); that is refused unless you have read it and set "
            "dense.trust_remote_code true"
        )
    # "other/model--module.Class" is code of another model, at whatever commit that has today
    if "--" in json.dumps(auto_map):
        raise InputError(
            f"'{file}' takes its code from another model (auto_map {auto_map!r}), which no revision pins; "
            "copy that code into the folder"
        )


def check_pinned(config: DenseConfig) -> None:
    """Raises UsageError where code of a hub model is trusted at a revision that can move."""
    if config.trust_remote_code and not COMMIT.fullmatch(config.revision or ""):
        raise UsageError(
            f"dense.trust_remote_code runs code of '{config.path}': dense.revision is {config.revision!r}, "
            "it must be the full 40-digit commit that you have read"
        )


def _entries(values: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value, at any depth."""
    if isinstance(values, dict):
        yield from values.items()
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from _entries(value)


def _can_run_code(key: str, value: Any) -> bool:
    if key.endswith("_internal") or key.startswith("__"):
        return True
    if key in CODE_KEYS:
        return value not in HARMLESS_VALUES
    is_private = key.startswith("_") and key not in PRIVATE_TEXT
    # kernel sizes are numbers; a kernel that is fetched has a name
    return (is_private or "kernel" in key.lower()) and _has_text(value)


def _has_text(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value)
    return isinstance(value, str) or (isinstance(value, list) and any(map(_has_text, value)))


# --- files -----------------------------------------------------------------------------------------------


def check_contained(folder: Path, root: Path) -> None:
    """Refuse links that lead out of `root` and anything that is neither a file nor a folder.

    Raises:
        InputError: naming the first such entry. Hidden folders (.git) are not read, and not looked at.
    """
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            path = Path(parent, name)
            real = Path(os.path.realpath(path))
            if not real.is_relative_to(root):
                raise InputError(f"'{path}' leads to '{real}', outside of '{root}'; that is refused")
            mode = real.stat().st_mode if real.exists() else 0
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise InputError(f"'{path}' is not a regular file, or leads to none; that is refused")


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files that transformers will read, safetensors before pickled ones.

    Raises:
        InputError: none, only pickled ones without `allow_pickle`, or an index that names a missing file.
    """
    if list(folder.glob("shard-?????-model-*.safetensors")):
        raise InputError(
            f"'{folder}' is a distributed checkpoint (shard-*); save it with save_pretrained on one process"
        )
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if not (folder / single).is_file() and not index.is_file():
            continue
        if single.endswith(".bin") and not allow_pickle:
            found = single if (folder / single).is_file() else index.name
            raise InputError(
                f"'{folder}' has no .safetensors weights, only pickled ones ('{found}'), which can run code; "
                "save it again as safetensors, or set dense.allow_pickle true"
            )
        return [folder / single] if (folder / single).is_file() else _shards(index)
    raise InputError(
        f"'{folder}' has no .safetensors weights (model.safetensors or model.safetensors.index.json); "
        "if the model has pytorch_model.bin only, dense.allow_pickle true reads that"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    if not weight_map or not is_map:
        raise InputError(f"'{index}' has no weight_map from tensors to files; download it again")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or Path(name).suffix != suffix:
            raise InputError(f"'{index}' names '{name}', which is no {suffix} file in its own folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(f"'{index}' names {len(missing)} missing files: {missing[:5]}; download them")
    return [index.parent / name for name in names]


def check_safetensors(file: Path) -> None:
    """Refuse a truncated or damaged file from its header.

    Raises:
        InputError: truncated (with both sizes), or refused by the reference parser.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= min(size, MAX_HEADER_BYTES) else b""
    needed = 8 + length + _data_bytes(file, header)
    if size < needed and length <= MAX_HEADER_BYTES:
        raise InputError(f"'{file}' is {size} bytes, its header needs {needed}; download it again")
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{file}' is damaged ({error}); download it again") from None


def _data_bytes(file: Path, header: bytes) -> int:
    """Where a header says that its last tensor ends; 0 where the parser will refuse the header."""
    try:
        entries = json.loads(header, object_pairs_hook=_without_duplicates)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return max(ends, default=0)
    except InputError as error:
        raise InputError(f"'{file}' is damaged ({error}); download it again") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # the parser keeps the last of two tensors of one name, other readers the first
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: not JSON, or something else than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"'{path}' must hold keys and values, not {type(values).__name__}")
    return values
