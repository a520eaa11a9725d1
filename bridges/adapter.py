"""A PEFT LoRA adapter on top of the dense checkpoint, merged into its weights or live beside them."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers import PreTrainedModel

from bridges.trust import Folder, check_contained, check_safetensors, read_json_object
from bridges.weights import check_finite, stored_tensors
from extractor.artifacts import file_sha256
from extractor.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder and the hash of its weights."""

    path: Path
    sha256: str


def check_adapter(path: Path, base: Folder, base_sha256: str) -> Adapter:
    """Refuse an adapter from its files alone, before its base is loaded.

    Raises:
        InputError: missing, pickled or damaged files, not a plain LoRA, or made for another base.
    """
    check_contained(path, path.resolve())
    if not (path / "adapter_config.json").is_file():
        raise InputError(f"dense.adapter: no adapter_config.json in '{path}'; give a PEFT adapter folder")
    values = read_json_object(path / "adapter_config.json")
    _check_kind(path, values)
    if not (path / WEIGHTS).is_file():
        pickled = (
            " (adapter_model.bin is pickled, and refused)" if (path / "adapter_model.bin").exists() else ""
        )
        raise InputError(f"dense.adapter: no {WEIGHTS} in '{path}'{pickled}; save it again with PEFT")
    check_safetensors(path / WEIGHTS)
    check_finite(str(path), stored_tensors([path / WEIGHTS]))
    _check_base(path, values, base, base_sha256)
    return Adapter(path, file_sha256(path / WEIGHTS))


def apply_adapter(model: PreTrainedModel, adapter: Adapter, *, merge: bool) -> PreTrainedModel:
    """The model with the adapter; its modules keep their names, also where LoRA layers stay.

    Raises:
        InputError: the adapter names modules that the model has not, or its shapes do not fit.
    """
    from peft import PeftModel  # slow to import (it brings bitsandbytes), and few need it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about keys; what matters of it is refused below
            wrapped = PeftModel.from_pretrained(model, str(adapter.path), torch_device="cpu")
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"adapter '{adapter.path}' does not fit the checkpoint: {reason}") from error
    _check_keys(adapter, wrapped)
    if merge:
        return _merged(adapter, wrapped)
    return wrapped.get_base_model().eval()


def _merged(adapter: Adapter, wrapped: "PeftModel") -> PreTrainedModel:
    try:
        return wrapped.merge_and_unload(safe_merge=True).eval()
    except ValueError as error:
        raise InputError(f"adapter '{adapter.path}' cannot be merged: {error}") from error


def _check_kind(path: Path, values: dict[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise InputError(
            f"dense.adapter: '{path}' is of type {values.get('peft_type')!r}; LORA is supported (PEFT's "
            "merge_and_unload turns other types into a checkpoint)"
        )
    # the first acts only after certain tokens, the second makes PEFT import a module named in the file
    for key in ("alora_invocation_tokens", "megatron_config"):
        if values.get(key):
            raise InputError(f"dense.adapter: '{path}' sets {key}, which is not supported")


def _check_base(path: Path, values: dict[str, Any], base: Folder, base_sha256: str) -> None:
    """The base is known by its hash where the adapter holds one, else by the last part of its name."""
    if recorded := values.get("base_sha256"):
        if recorded != base_sha256:
            raise InputError(
                f"adapter '{path}' was made for a base with weights {str(recorded)[:12]}, '{base.name}' has "
                f"{base_sha256[:12]}"
            )
        return
    wanted = str(values.get("base_model_name_or_path") or "")
    if Path(wanted).name != base.base_name:
        raise InputError(
            f"adapter '{path}' was made for '{wanted or 'an unnamed base'}', the checkpoint is "
            f"'{base.name}'; "
            f'if they are the same weights, add "base_sha256": "{base_sha256}" to its adapter_config.json'
        )


def _check_keys(adapter: Adapter, wrapped: "PeftModel") -> None:
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(wrapped))
    with safe_open(adapter.path / WEIGHTS, "pt") as file:
        given = set(file.keys())
    for problem, names in (("lacks", expected - given), ("has no place for", given - expected)):
        if names:
            raise InputError(
                f"adapter '{adapter.path}' does not fit: {len(names)} tensors that it {problem}: "
                f"{sorted(names)[:5]}"
            )
