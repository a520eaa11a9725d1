"""Text -> fixed-length token blocks, split into training and held-out documents.

1. `find_documents` lists source files: of this Python installation (`source: python`) or of a folder.
2. A document is held out by the hash of its name, so the split is the same for every recipe and run;
   a document whose text was already seen is dropped, so no text is on both sides.
3. `load_blocks` tokenises documents in a seeded order, joins them with the end-of-text token and
   cuts blocks of the context length.
4. `TokenBlocks.batch` gives the batch of a step as a pure function of (seed, step, rank).
"""

import hashlib
import importlib.metadata
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from extractor.config import Config
from extractor.errors import InputError

Split = Literal["train", "held_out"]

# Distributions of this project's own dependency tree that are mostly readable Python source.
PYTHON_DISTRIBUTIONS = (
    "torch", "transformers", "accelerate", "peft", "datasets", "bitsandbytes", "huggingface_hub",
    "numpy", "networkx", "fsspec", "pydantic", "pytest", "jinja2", "tqdm", "rich", "typer",
    "click", "httpx", "aiohttp", "pandas", "requests", "psutil", "filelock", "packaging",
)  # fmt: skip
# transformers/models is left out: its files copy one another, which would make held-out text easy.
EXCLUDED_PARTS = ("transformers/models/", "site-packages/", "/_vendor/", "idlelib/", "lib2to3/")


class DataConfig(Config):
    """Which text to read and how to cut it."""

    source: str = "python"
    """`python` (this installation's own source files) or a folder of text files."""
    pattern: str = "**/*.py"
    """Which files of a folder are read."""
    context_length: int = Field(128, ge=8)
    """Tokens in a block."""
    held_out_frac: float = Field(0.03, gt=0, lt=1)
    """Share of documents held out, chosen by the hash of their names."""
    max_document_bytes: int = Field(120_000, ge=1)
    """Longer files are left out: mostly generated tables."""


@dataclass(frozen=True)
class Document:
    """A source file: its name (stable across installations) and where it lies."""

    name: str
    path: Path

    def is_held_out(self, held_out_frac: float) -> bool:
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < held_out_frac


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of `context_length` tokens; `digest` is the hash of the text they came from."""

    blocks: np.ndarray  # (num_blocks, context_length), int32
    digest: str

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def num_tokens(self) -> int:
        return int(self.blocks.size)

    def batch(
        self, *, step: int, size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> Int[Tensor, "batch seq"]:
        """The blocks of one step on one rank; every epoch is its own permutation."""
        first = (step * num_ranks + rank) * size
        indices = [self._block_at(position, seed) for position in range(first, first + size)]
        return torch.from_numpy(self.blocks[indices].astype(np.int64))

    def first(self, count: int) -> Int[Tensor, "batch seq"]:
        """The first `count` blocks (all, if there are fewer)."""
        return torch.from_numpy(self.blocks[:count].astype(np.int64))

    def _block_at(self, position: int, seed: int) -> int:
        epoch, offset = divmod(position, len(self.blocks))
        return int(_permutation(len(self.blocks), seed, epoch)[offset])


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def find_documents(config: DataConfig) -> list[Document]:
    """Every document of the source, sorted by name.

    Raises:
        InputError: the folder does not exist or holds no file of the pattern.
    """
    if config.source == "python":
        documents = _python_documents()
    else:
        root = Path(config.source)
        if not root.is_dir():
            raise InputError(
                f"data.source: '{root}' is not a folder; give a folder of text files or 'python'"
            )
        paths = (path for path in root.glob(config.pattern) if path.is_file())
        documents = [Document(path.relative_to(root).as_posix(), path) for path in paths]
    kept = [d for d in documents if 0 < d.path.stat().st_size <= config.max_document_bytes]
    if not kept:
        raise InputError(f"data.source: no file matching {config.pattern!r} in '{config.source}'")
    return sorted(kept, key=lambda document: document.name)


def _python_documents() -> list[Document]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    documents = [
        Document(f"stdlib/{path.relative_to(stdlib).as_posix()}", path) for path in stdlib.rglob("*.py")
    ]
    for distribution in PYTHON_DISTRIBUTIONS:
        try:
            files = importlib.metadata.files(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        documents += [
            Document(file.as_posix(), Path(str(file.locate())))
            for file in files
            if file.suffix == ".py" and ".." not in file.parts
        ]
    return [
        document
        for document in documents
        if not any(part in document.name for part in EXCLUDED_PARTS) and document.path.is_file()
    ]


def iter_texts(config: DataConfig, split: Split, seed: int):
    """Texts of one split in a seeded order, exact duplicates (of either split) dropped.

    A text that stands in both splits is held out only: held-out names are visited first.
    """
    documents = find_documents(config)
    documents.sort(key=lambda document: not document.is_held_out(config.held_out_frac))
    num_held_out = sum(document.is_held_out(config.held_out_frac) for document in documents)
    held_out, train = documents[:num_held_out], documents[num_held_out:]
    if not held_out or not train:
        raise InputError(
            f"data.source: {len(documents)} files are too few for a held-out share of "
            f"{config.held_out_frac}; add files or raise data.held_out_frac"
        )
    seen: set[bytes] = set()
    if split == "train":
        seen.update(hashlib.sha256(d.path.read_bytes()).digest() for d in held_out)
    chosen = held_out if split == "held_out" else train
    for index in np.random.default_rng(seed).permutation(len(chosen)):
        content = chosen[index].path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            continue
        seen.add(digest)
        yield content.decode("utf-8", errors="replace")


def load_blocks(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    *,
    max_tokens: int,
    seed: int = 0,
) -> TokenBlocks:
    """Tokenise documents in a seeded order until `max_tokens`, and cut them into blocks.

    Raises:
        InputError: fewer tokens than one block.
    """
    pieces: list[np.ndarray] = []
    count = 0
    text_hash = hashlib.sha256()
    batch: list[str] = []

    def flush() -> None:
        nonlocal count
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32))
            count += len(ids) + 1
        batch.clear()

    for text in iter_texts(config, split, seed):
        text_hash.update(text.encode())
        batch.append(text)
        if len(batch) == 64:
            flush()
        if count >= max_tokens:
            break
    if batch and count < max_tokens:
        flush()
    tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    num_blocks = min(count, max_tokens) // config.context_length
    if num_blocks == 0:
        raise InputError(f"data: {count} {split} tokens are fewer than one block of {config.context_length}")
    blocks = tokens[: num_blocks * config.context_length].reshape(num_blocks, -1)
    return TokenBlocks(blocks, text_hash.hexdigest())
