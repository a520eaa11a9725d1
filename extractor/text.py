"""The text of a run: which sources, in which shares, and on which side of the split.

1. `DataConfig` names one source, or several with their shares.
2. `SplitReader` gives the documents of one split. One `source`: a file is held out by the hash of its name.
   A list of `datasets`: a document is held out by the hash of its text. An own source for held-out text:
   all of that is held out. No text is ever on both sides, or twice on one side.
3. `SplitReader.mix` takes from several sources so that each keeps its share.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator

from extractor.config import Config
from extractor.errors import InputError
from extractor.sources import Document, FileOrigin, RowOrigin, TextSource, is_below, open_source, stamp

Split = Literal["train", "held_out"]
T = TypeVar("T")


class DataConfig(Config):
    """Which text to read and how to cut it."""

    source: str = "python"
    """`python` (this installation's own source files) or a folder of text files."""
    pattern: str = "**/*.py"
    """Which files of a folder are read."""
    datasets: tuple[TextSource, ...] = ()
    """Instead of `source`: a list of {path, pattern, name, data_files, split, revision, text_column, weight,
    streaming, repeat}; weights are shares of the tokens."""
    held_out: TextSource | None = None
    """Own source of the held-out text; training drops whatever stands there too."""
    context_length: int = Field(128, ge=8)
    """Tokens in a block."""
    separate_documents: bool = False
    """Positions start again at every document and attention stays within it."""
    held_out_frac: float = Field(0.03, gt=0, lt=1)
    """Share of documents held out, chosen by the hash of their names (`datasets`: of their text)."""
    max_document_bytes: int = Field(120_000, ge=1)
    """Longer files and rows are left out: mostly generated tables."""

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> "DataConfig":
        if self.datasets and self.source != "python":
            raise ValueError(f"data.datasets replaces data.source; put '{self.source}' into the list")
        return self

    @property
    def sources(self) -> tuple[TextSource, ...]:
        return self.datasets or (TextSource(path=self.source, pattern=self.pattern),)

    @property
    def split_by(self) -> str:
        if self.held_out is not None:
            return "own source"
        return "hash of the text" if self.datasets else "hash of the file name"


def describe_data(config: DataConfig) -> str:
    """One line on what would be read, from the config alone: nothing is opened."""
    total = sum(source.weight for source in config.sources)
    members = ", ".join(_describe_source(s, s.weight / total) for s in config.sources)
    if config.held_out is not None:
        held_out = f"held out: {_describe_source(config.held_out, 1.0)}"
    else:
        held_out = f"{config.held_out_frac:.1%} of the documents held out by the {config.split_by}"
    packing = "kept apart" if config.separate_documents else "joined"
    return f"text: {members}; {held_out}; blocks of {config.context_length} tokens, documents {packing}"


def _describe_source(source: TextSource, share: float) -> str:
    what = source.path if source.path == "python" else f"'{source.path}'"
    detail = [source.name, source.pattern if source.path != "python" else None]
    if source.path != "python" and source.pattern is None:
        detail += [f"split {source.split}", f"column {source.text_column}"]
    detail += ["streaming" if source.streaming else None, "repeated" if source.repeat else None]
    detail += [f"{share:.0%}" if share < 1 else None]
    known = ", ".join(part for part in detail if part)
    return f"{what} ({known})" if known else what


@dataclass(eq=False)
class Member:
    """A source while it is read, and what was taken from it."""

    source: TextSource
    origin: FileOrigin | RowOrigin
    passes: int = 1
    ran_out: bool = False
    left_out: Counter[str] = field(default_factory=Counter)


class SplitReader:
    """The documents of one split.

    Raises:
        InputError: a source is missing, or too small to hold anything out.
    """

    def __init__(self, config: DataConfig, split: Split, seed: int = 0):
        self.config, self.split, self.seed = config, split, seed
        own = config.held_out
        sources = (own,) if own is not None and split == "held_out" else config.sources
        self.members = [Member(s, open_source(s, config.max_document_bytes)) for s in sources]
        self._held_out_origin = None
        if own is not None and split == "train":
            self._held_out_origin = open_source(own, config.max_document_bytes)
        self._held_out_files: list[Document] = []
        if config.split_by == "hash of the file name":
            self._split_files()
        self._last_read: dict[bytes, tuple[Member, int]] = {}  # text -> who gave it, in which pass

    def _split_files(self) -> None:
        origin, frac = self.members[0].origin, self.config.held_out_frac
        held_out = [document for document in origin.documents if document.is_held_out(frac)]
        train = [document for document in origin.documents if not document.is_held_out(frac)]
        if not held_out or not train:
            raise InputError(
                f"data.source: {len(origin.documents)} files are too few for a held-out share of "
                f"{frac}; add files or raise data.held_out_frac"
            )
        origin.documents = held_out if self.split == "held_out" else train
        self._held_out_files = held_out

    def identity(self) -> list[Any]:
        """What the sources hold, by names, sizes, times and commits; reads no text."""
        origins = [member.origin for member in self.members]
        own = [self._held_out_origin.identity()] if self._held_out_origin is not None else []
        files = [[document.name, *stamp(document.path)] for document in self._held_out_files]
        return [*(origin.identity() for origin in origins), own, files]

    @cached_property
    def _held_out_texts(self) -> set[bytes]:
        """Held-out texts that training has to drop; by hash of the text none can be in both splits."""
        if self.split == "held_out" or self.config.split_by == "hash of the text":
            return set()
        if self._held_out_origin is not None:
            return {_key(text) for text in self._held_out_origin.read(self.seed, Counter())}
        return {_key(document.text()) for document in self._held_out_files}

    def _texts(self, member: Member) -> Iterator[str]:
        """One pass over a source: its texts that are of this split and were not given before."""
        this_pass = member.passes
        left_out = member.left_out if this_pass == 1 else Counter()
        for text in member.origin.read(self.seed, left_out):
            key = _key(text)
            reason = self._reason_against(key, member, this_pass)
            if reason:
                left_out[reason] += 1
                continue
            self._last_read[key] = (member, this_pass)
            yield text

    def _reason_against(self, key: bytes, member: Member, this_pass: int) -> str:
        if self.config.split_by == "hash of the text":
            is_held_out = is_below(key, self.config.held_out_frac)
            if is_held_out != (self.split == "held_out"):
                return "other_split"
        if key in self._held_out_texts:
            return "also_held_out"
        is_new = self._last_read.get(key, (member, this_pass - 1)) == (member, this_pass - 1)
        return "" if is_new else "duplicate"

    def mix(
        self, prepare: Callable[[Iterator[str]], Iterable[T]], size: Callable[[T], int]
    ) -> Iterator[tuple[Member, T]]:
        """Prepared documents of all sources, always of the one furthest below its share of the sizes.

        Ends when every source was read through once: what is repeated fills up for the others until then.
        """
        streams = {member: iter(prepare(self._texts(member))) for member in self.members}
        taken = dict.fromkeys(streams, 0)
        while streams and not all(member.ran_out for member in self.members):
            member = min(streams, key=lambda m: taken[m] / m.source.weight)  # the first of equals
            item = next(streams[member], None)
            if item is not None:
                taken[member] += size(item)
                yield member, item
                continue
            member.ran_out = True
            del streams[member]
            if member.source.repeat and taken[member] and self.split == "train":
                member.passes += 1
                streams[member] = iter(prepare(self._texts(member)))


def iter_texts(config: DataConfig, split: Split, seed: int) -> Iterator[str]:
    """Texts of one split in a seeded order, none twice; a mixture keeps its shares in characters.

    Raises:
        InputError: a source is missing, or too small to hold anything out.
    """
    reader = SplitReader(config, split, seed)
    return (text for _, text in reader.mix(lambda texts: texts, len))


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]
