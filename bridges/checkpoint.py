"""From the name of a dense checkpoint to a loaded, trusted model with its tokenizer and facts.

    DenseConfig -> folder (bridges.hub) -> files (bridges.trust) -> weights, tokenizer, adapter (here)

`plain` gives the same function unquantised and with its adapter merged: students are copied from it and
edits are measured on it.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from bridges.adapter import apply_adapter, check_adapter
from bridges.hub import check_blobs, resolve_folder
from bridges.losses import kl_divergence, log_probs
from bridges.trust import DenseConfig, Folder, check_contained, check_folder, check_no_code
from bridges.weights import Mismatch, check_finite, check_keys, stored_tensors
from extractor.artifacts import combine_hashes, file_sha256
from extractor.errors import InputError, UsageError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
                   "sentencepiece.bpe.model", "tekken.json")  # fmt: skip
RANDOM_SEED = 0  # of dense.random_weights; part of their hash


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint in memory, and what manifest and evaluation say about it.

    `sha256` belongs to the function in full precision: weights and adapter, without quantisation.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    sha256: str
    facts: dict[str, Any]


def load_dense(
    config: DenseConfig, device: torch.device | str = "cpu", plain: bool = False
) -> LoadedCheckpoint:
    """Load a checkpoint in fp32, or quantised; nothing of it is trusted before it is checked.

    Raises:
        UsageError: options that exclude each other.
        InputError: a checkpoint, tokenizer or adapter that is refused; the message says why.
        UnsupportedModelError: a family that is not listed.
    """
    if config.adapter and config.quantization != "none" and config.adapter_mode == "merged":
        raise UsageError(
            f"dense.adapter_mode merged cannot be had in {config.quantization} weights (merging rounds "
            "them); use dense.adapter_mode live, or dense.quantization none"
        )
    if config.adapter and config.random_weights:
        raise UsageError("dense.adapter was trained on a checkpoint's own weights, not on random_weights")
    folder = resolve_folder(config)
    files = check_folder(folder, config)
    hashes = {file.name: file_sha256(file) for file in files}
    check_blobs(folder, hashes)
    base_sha256 = _random_sha256(folder) if config.random_weights else combine_hashes(hashes)
    adapter = None
    if config.adapter:
        adapter = check_adapter(Path(config.adapter).expanduser(), folder, base_sha256)
    tokenizer, tokenizer_facts = load_tokenizer(folder, config)
    quantization = "none" if plain else config.quantization
    load = _draw_model if config.random_weights else _load_model
    model = load(folder, files, config, torch.device(device), quantization)
    rows = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(tokenizer, rows, folder.name)
    if adapter:
        model = apply_adapter(model, adapter, merge=plain or config.adapter_mode == "merged")
    if quantization == "none":
        model = model.to(device)
    sha256 = combine_hashes({"base": base_sha256, "adapter": adapter.sha256}) if adapter else base_sha256
    facts = {
        "path": config.path,
        "commit": folder.commit,
        "sha256": sha256,
        "base_sha256": base_sha256,
        "format": "none" if not files else "pickle" if files[0].suffix == ".bin" else "safetensors",
        "random_weights": config.random_weights,
        "remote_code": config.trust_remote_code,
        "quantization": quantization,
        "adapter": str(adapter.path) if adapter else None,
        "adapter_sha256": adapter.sha256 if adapter else None,
        "adapter_mode": ("merged" if plain else config.adapter_mode) if adapter else None,
        "vocab_size": rows,
        **tokenizer_facts,
    }
    return LoadedCheckpoint(model.eval(), tokenizer, folder.name, sha256, facts)


# --- weights ---------------------------------------------------------------------------------------------


def _load_model(
    folder: Folder, files: list[Path], config: DenseConfig, device: torch.device, quantization: str
) -> PreTrainedModel:
    settings: dict[str, Any] = {}
    if quantization != "none":
        settings = {
            "quantization_config": quantization_config(quantization, device),
            "device_map": {"": device},
        }
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder.path,
                dtype=torch.float32,
                use_safetensors=files[0].suffix == ".safetensors",
                local_files_only=True,
                trust_remote_code=config.trust_remote_code,
                ignore_mismatched_sizes=True,  # they are refused below, with both shapes
                output_loading_info=True,
                **settings,
            )
    except Exception as error:  # what a config or a pickle of someone else can raise is anything
        raise InputError(
            f"transformers cannot load '{folder.name}': {type(error).__name__}: {_one_line(error)}"
        ) from error
    if quantization != "none":
        info["mismatched_keys"] |= prepare_quantised_(model, folder.name, quantization)
    check_keys(folder.name, info, model, files)
    check_finite(folder.name, stored_tensors(files, model))
    return model


def _draw_model(
    folder: Folder, files: list[Path], config: DenseConfig, device: torch.device, quantization: str
) -> PreTrainedModel:
    """The architecture with the start weights of its family, the same ones at every call."""
    trust = {"trust_remote_code": config.trust_remote_code}
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        try:
            with quiet():
                own = AutoConfig.from_pretrained(folder.path, local_files_only=True, **trust)
                model = AutoModelForCausalLM.from_config(own, dtype=torch.float32, **trust)
        except Exception as error:  # as above
            raise InputError(
                f"transformers cannot build '{folder.name}' from its config.json: {type(error).__name__}: "
                f"{_one_line(error)}"
            ) from error
    if quantization == "none":
        return model
    with TemporaryDirectory() as written:  # bitsandbytes quantises what is read from files, nothing else
        model.save_pretrained(written)
        shards = sorted(Path(written).glob("*.safetensors"))
        return _load_model(Folder(Path(written), None, folder.name), shards, config, device, quantization)


def _random_sha256(folder: Folder) -> str:
    """Names random weights: by the config and the seed, so that no file's hash is ever taken for it."""
    return combine_hashes(
        {"config.json": file_sha256(folder.path / "config.json"), "random seed": str(RANDOM_SEED)}
    )


# --- quantisation ----------------------------------------------------------------------------------------


def quantization_config(kind: str, device: torch.device) -> BitsAndBytesConfig:
    """bitsandbytes settings; the output head stays as it is (transformers' own default)."""
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def prepare_quantised_(model: nn.Module, name: str, kind: str) -> set[Mismatch]:
    """Make a freshly quantised model safe on CPUs.

    Returns:
        The weights whose shape is not their layer's, which transformers does not look for here.

    Raises:
        InputError: the model has no layer that bitsandbytes quantises.
    """
    import bitsandbytes as bnb  # slow to import, and few need it

    # one warning per layer and call about a cast that is meant
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    num_layers, mismatched = 0, set()
    for key, layer in model.named_modules():
        if not isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            continue
        num_layers += 1
        # 4-bit weights are packed and keep their shape aside; a missing one was never quantised
        stored = getattr(layer.weight, "quant_state", None) or layer.weight
        if isinstance(layer, bnb.nn.Linear4bit):
            # with AVX512-BF16 the first forward in eval mode would repack the weights: later gradients
            # are lost and state_dict() is wrong from then on (bitsandbytes 0.50)
            layer.support_avx512bf16_for_cpu = False
        wanted = (layer.out_features, layer.in_features)
        if tuple(stored.shape) != wanted:
            mismatched.add((f"{key}.weight", tuple(stored.shape), wanted))
    if not num_layers:
        raise InputError(
            f"'{name}' has no layer that bitsandbytes quantises to {kind}; use dense.quantization none"
        )
    return mismatched


def probe_error(
    dense_logits: Float[Tensor, "*batch vocab"], plain_logits: Float[Tensor, "*batch vocab"]
) -> dict[str, float]:
    """How far a quantised or adapted model is from the plain one on the same tokens.

    Returns:
        `kl`: KL(plain || loaded) in nats/token; `max_logit`: largest difference of a logit.
    """
    kl = kl_divergence(log_probs(plain_logits), log_probs(dense_logits))
    difference = (dense_logits.float() - plain_logits.float()).abs().max()
    return {"kl": kl.item(), "max_logit": difference.item()}


# --- tokenizer -------------------------------------------------------------------------------------------


def load_tokenizer(folder: Folder, config: DenseConfig) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """The checkpoint's own tokenizer, or the one of `dense.tokenizer` where it has none.

    Raises:
        InputError: neither has one, or both have one and their vocabularies differ.
    """
    other = Path(config.tokenizer).expanduser() if config.tokenizer else None
    if other and not _has_tokenizer(other):
        raise InputError(
            f"dense.tokenizer: no tokenizer in '{other}' (looked for {', '.join(TOKENIZER_FILES)})"
        )
    if other:
        check_contained(other, other.resolve())
        check_no_code(Folder(other, None, str(other)), config)
    if not _has_tokenizer(folder.path):
        if other is None:
            raise InputError(
                f"'{folder.name}' has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); name a folder "
                "that has its tokenizer as dense.tokenizer"
            )
        tokenizer, source = _read_tokenizer(other, config), str(other)
    else:
        tokenizer, source = _read_tokenizer(folder.path, config), folder.name
        if other:
            check_same_tokenizer(tokenizer, folder.name, _read_tokenizer(other, config), str(other))
    pad = "own"
    if tokenizer.pad_token_id is None:
        # Only the tokenizer in memory: the model's config keeps no padding, so no embedding row is masked.
        # Prompts are padded on the right, where a causal model's answers cannot see it.
        pad = "eos" if tokenizer.eos_token_id is not None else "none"
        tokenizer.pad_token = tokenizer.eos_token
    facts = {"tokenizer": source, "tokenizer_size": _vocabulary_size(tokenizer), "pad_token": pad}
    return tokenizer, facts | {"vocabulary_sha256": vocabulary_hash(tokenizer)}


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> None:
    """Raises InputError where a token has no embedding row; unused rows (padding) are fine."""
    size = _vocabulary_size(tokenizer)
    if size > rows:
        raise InputError(
            f"'{name}': the tokenizer has {size} entries, the embedding {rows} rows; this is not the "
            "checkpoint's own tokenizer, or tokens were added without resizing the embedding"
        )


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the sorted vocabulary: which text is which id."""
    entries = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def check_same_tokenizer(
    a: PreTrainedTokenizerBase, a_name: str, b: PreTrainedTokenizerBase, b_name: str
) -> None:
    """Raises InputError, naming both, where two vocabularies differ: the same ids mean other text."""
    if vocabulary_hash(a) != vocabulary_hash(b):
        raise InputError(
            f"the tokenizers of '{a_name}' ({_vocabulary_size(a)} entries) and '{b_name}' "
            f"({_vocabulary_size(b)} entries) have different vocabularies; they must be the same"
        )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _read_tokenizer(folder: Path, config: DenseConfig) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # a damaged file can raise anything, also from Rust
        raise InputError(f"the tokenizer in '{folder}' cannot be read: {_one_line(error)}") from error


def _vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Entries, or the largest id and one, where ids have holes."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or "no message"


@contextmanager
def quiet() -> Iterator[None]:
    """transformers reports on many lines what is refused here in one."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
