"""Text -> fixed-length token blocks, tokenised once into a file.

1. `load_blocks` tokenises the documents of one split, joins them with the end-of-text token and cuts blocks
   of the context length. They lie in `tokens/<hash>` below the cache and are read by memory map, so the next
   run, the next process and a resumed run have the same blocks without reading text.
2. `TokenBlocks.batch` gives the batch of a step as a pure function of (seed, step, rank).
3. `TokenBlocks.positions` starts again at every document, where documents are kept apart.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from extractor.artifacts import SCHEMA_VERSION, file_sha256, read_json, replace_folder, write_json
from extractor.errors import InputError
from extractor.text import DataConfig, Split, SplitReader

ALGORITHM = 1  # raise it when the same text would give other blocks
SPREAD = 32  # times as much text as a sample takes
DOCUMENTS_AT_ONCE = 64  # a fast tokenizer spreads them over the cores


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of `context_length` tokens; `digest` is the hash of the text they came from."""

    blocks: np.ndarray  # (num_blocks, context_length), int32; a memory map where it comes from a file
    digest: str
    end_of_text: int | None = None
    """The token after every document, if documents are to be kept apart."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Where the blocks come from and what was left out; plain JSON."""

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

    def sample(self, count: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"] | None]:
        """`count` blocks (all, if there are fewer), evenly spread: neighbours are mostly of one document."""
        count = min(count, len(self.blocks))
        chosen = np.arange(count) * len(self.blocks) // max(count, 1)
        blocks = torch.from_numpy(self.blocks[chosen].astype(np.int64))
        return blocks, self.positions(blocks)

    def positions(self, input_ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"] | None:
        """Positions that start at 0 in every block and after every end of text; None: documents are joined.

        transformers keeps documents apart by these alone, but only without an attention mask and a cache.
        """
        if self.end_of_text is None:
            return None
        index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        is_start = torch.zeros_like(input_ids, dtype=torch.bool)
        is_start[:, 1:] = input_ids[:, :-1] == self.end_of_text
        return index - torch.where(is_start, index, 0).cummax(dim=1).values

    def apart_from(self, other: "TokenBlocks") -> "TokenBlocks":
        """These blocks but for those that stand in `other` too; `facts` counts them.

        Raises:
            InputError: none is left.
        """
        suspects = np.flatnonzero(np.isin(_block_hashes(other.blocks), _block_hashes(self.blocks)))
        shared = {other.blocks[index].tobytes() for index in suspects}
        keep = np.array([block.tobytes() not in shared for block in self.blocks], dtype=bool)
        if not keep.any():
            raise InputError(f"data: all {len(keep)} held-out blocks are training blocks too")
        blocks = self.blocks if keep.all() else self.blocks[keep]
        return replace(
            self, blocks=blocks, facts=self.facts | {"blocks_also_in_training": int((~keep).sum())}
        )

    def summary(self) -> str:
        """The facts in one line, for a log."""
        members = "; ".join(_describe_member(member) for member in self.facts.get("sources", ()))
        also = self.facts.get("blocks_also_in_training", 0)
        dropped = f"; {also} blocks left out that are training blocks too" if also else ""
        split = self.facts.get("split", "")
        return f"{split} text: {len(self):,} blocks, {self.num_tokens:,} tokens: {members}{dropped}".strip()

    def _block_at(self, position: int, seed: int) -> int:
        epoch, offset = divmod(position, len(self.blocks))
        return int(_permutation(len(self.blocks), seed, epoch)[offset])


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _block_hashes(blocks: np.ndarray) -> np.ndarray:
    """A 64-bit number per block, in pieces, so that a memory map never has to fit into memory."""
    factors = np.random.default_rng(0).integers(1, 2**63, size=blocks.shape[1], dtype=np.uint64)
    pieces = [
        blocks[start : start + 4096].astype(np.uint64) @ factors for start in range(0, len(blocks), 4096)
    ]
    return np.concatenate(pieces)


def _describe_member(member: dict[str, Any]) -> str:
    left_out = ", ".join(
        f"{count} {reason.replace('_', ' ')}" for reason, count in member["left_out"].items()
    )
    return (
        f"{member['source']} {member['documents']:,} documents, {member['share']:.1%} of the tokens"
        + (f", {member['passes']} passes" if member["passes"] > 1 else "")
        + (", ran out" if member["ran_out"] and member["passes"] == 1 else "")
        + (f" (left out: {left_out})" if left_out else "")
    )


# --- tokenise once -----------------------------------------------------------------------------------------


def load_blocks(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    *,
    max_tokens: int,
    seed: int = 0,
    max_context: int | None = None,
    apart_from: TokenBlocks | None = None,
) -> TokenBlocks:
    """Blocks of the first `max_tokens` tokens of one split, from the cache where they were cut before.

    Of several processes the first to ask tokenises and the others wait for its file: not at a barrier of
    torch, which gives up after ten or thirty minutes.

    Args:
        max_context: positions that the model has, if it has a limit.
        apart_from: the training blocks, none of which shall be among these.

    Raises:
        InputError: a source is missing or not readable, the text is shorter than one block, blocks are
            longer than the model's context, or the tokenizer has no end-of-text token.
    """
    if max_context is not None and config.context_length > max_context:
        raise InputError(
            f"data.context_length {config.context_length} is longer than the model's {max_context} positions"
        )
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token to put between documents")
    reader = SplitReader(config, split, seed)
    key = _cache_key(reader, tokenizer, max_tokens)
    folder = cache_root() / "tokens" / key
    blocks = _cached_blocks(folder, reader, tokenizer, max_tokens)
    if config.separate_documents:
        blocks = replace(blocks, end_of_text=tokenizer.eos_token_id)
    return blocks if apart_from is None else blocks.apart_from(apart_from)


def load_spread(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, split: Split, count: int
) -> TokenBlocks:
    """Text to take `sample(count)` from: many times as much, so that the sample is of many documents."""
    return load_blocks(config, tokenizer, split, max_tokens=SPREAD * count * config.context_length)


def cache_root() -> Path:
    """$SPARSEBRIDGE_CACHE, else ~/.cache/sparsebridge."""
    return Path(os.environ.get("SPARSEBRIDGE_CACHE") or os.path.expanduser("~/.cache/sparsebridge"))


def _cache_key(reader: SplitReader, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    settings = reader.config.model_dump(mode="json", exclude={"separate_documents"})
    identity = [ALGORITHM, settings, reader.split, reader.seed, max_tokens, reader.identity()]
    text = json.dumps([*identity, tokenizer_sha256(tokenizer)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """The hash of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    for set_by_calls in ("truncation", "padding"):
        state.pop(set_by_calls, None)
    return hashlib.sha256(json.dumps([state, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()


def _cached_blocks(
    folder: Path, reader: SplitReader, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> TokenBlocks:
    def write(target: Path) -> None:
        try:
            _write_tokens(target, reader, tokenizer, max_tokens)
        except BaseException:  # also an interrupt: gigabytes of half a text are of no use to anyone
            shutil.rmtree(target, ignore_errors=True)
            raise

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".lock-{folder.name}")):
            found = _read_tokens(folder)
            if found is None:
                replace_folder(folder, write)
                found = _read_tokens(folder)
    except OSError as error:
        warnings.warn(f"tokens are not cached: '{folder.parent}' ({error})", stacklevel=3)
        found = None
    if found is None:
        # The map outlives its file's name; a reader that was begun is not begun again.
        with tempfile.TemporaryDirectory() as temporary:
            reader = SplitReader(reader.config, reader.split, reader.seed)
            write(Path(temporary))
            found = _read_tokens(Path(temporary))
    return found


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the lock of a process that was killed is gone with it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_tokens(folder: Path) -> TokenBlocks | None:
    """The blocks that were written; None: there are none, or they are damaged."""
    if not folder.is_dir():
        return None
    try:
        facts = read_json(folder / "facts.json", "facts", "load_blocks")
        is_whole = file_sha256(folder / "tokens.bin") == facts["tokens_sha256"]
        shape = (facts["blocks"], facts["context_length"])
        if is_whole:
            blocks = np.memmap(folder / "tokens.bin", dtype="<i4", mode="r", shape=shape)
            return TokenBlocks(blocks, facts["text_sha256"], facts=facts)
    except (InputError, OSError, KeyError, TypeError, ValueError):
        pass
    warnings.warn(f"cached tokens in '{folder}' are damaged and are made again", stacklevel=2)
    return None


def _write_tokens(
    folder: Path, reader: SplitReader, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    context_length, text_hash = reader.config.context_length, hashlib.sha256()
    documents: Counter[int] = Counter()
    tokens: Counter[int] = Counter()

    def tokenise(texts: Iterator[str]) -> Iterator[np.ndarray]:
        while batch := list(islice(texts, DOCUMENTS_AT_ONCE)):
            for text in batch:
                text_hash.update(text.encode())
            for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                yield np.asarray([*ids, tokenizer.eos_token_id], dtype="<i4")

    count = 0
    with (folder / "tokens.bin").open("wb") as file:
        for member, ids in reader.mix(tokenise, len):
            ids = ids[: max_tokens - count]
            file.write(ids.tobytes())
            count += len(ids)
            documents[reader.members.index(member)] += 1
            tokens[reader.members.index(member)] += len(ids)
            if count >= max_tokens:
                break
        num_blocks = count // context_length
        file.truncate(num_blocks * context_length * 4)
        file.flush()
        os.fsync(file.fileno())
    facts = {
        "schema_version": SCHEMA_VERSION,
        "split": reader.split,
        "split_by": reader.config.split_by,
        "context_length": context_length,
        "blocks": num_blocks,
        "tokens": num_blocks * context_length,
        "documents": documents.total(),
        "text_sha256": text_hash.hexdigest(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "tokens_sha256": file_sha256(folder / "tokens.bin"),
        "sources": [
            {
                "source": member.source.path,
                "weight": member.source.weight,
                "documents": documents[index],
                "tokens": tokens[index],
                "share": tokens[index] / max(1, count),
                "passes": member.passes,
                "ran_out": member.ran_out,
                "left_out": {reason: n for reason, n in member.left_out.items() if n},
            }
            for index, member in enumerate(reader.members)
        ],
    }
    if num_blocks == 0:
        members = "; ".join(_describe_member(member) for member in facts["sources"])
        raise InputError(
            f"data: {count} {reader.split} tokens are fewer than one block of {context_length} ({members})"
        )
    write_json(folder / "facts.json", facts)
