"""Where documents come from: this installation's Python source, files of a folder, rows of a data set.

A source is opened without reading its text (`open_source`), names what it holds (`identity`, for caches),
and then gives its documents in an order that depends on nothing but the seed (`read`).
"""

import hashlib
import importlib.metadata
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from extractor.config import Config
from extractor.errors import InputError

# Distributions of this project's own dependency tree that are mostly readable Python source.
PYTHON_DISTRIBUTIONS = (
    "torch", "transformers", "accelerate", "peft", "datasets", "bitsandbytes", "huggingface_hub",
    "numpy", "networkx", "fsspec", "pydantic", "pytest", "jinja2", "tqdm", "rich", "typer",
    "click", "httpx", "aiohttp", "pandas", "requests", "psutil", "filelock", "packaging",
)  # fmt: skip
# transformers/models is left out: its files copy one another, which would make held-out text easy.
EXCLUDED_PARTS = ("transformers/models/", "site-packages/", "/_vendor/", "idlelib/", "lib2to3/")
# Readers of the `datasets` library for a single local file.
FILE_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}


class TextSource(Config):
    """One source of text: `python`, a folder, a file, or a data set of the hub."""

    shorthand: ClassVar[str] = "path"
    path: str
    """`python`, a folder, a hub id, or a parquet, jsonl, csv or txt file (each line is a document)."""
    pattern: str | None = None
    """Read the files of the folder that match this as one document each; without it `datasets` opens it."""
    name: str | None = None
    """Configuration of a data set."""
    data_files: str | tuple[str, ...] | None = None
    """Files of the folder or data set to read, as `datasets` takes them."""
    split: str = "train"
    """Split of the data set; what of it is held out is decided by `data`."""
    revision: str | None = None
    """Branch or commit of a hub id."""
    text_column: str = "text"
    """Column of a data set that holds the documents."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Share of the tokens, relative to the other sources."""
    streaming: bool = False
    """Read without storing the whole data set first; gives the same documents."""
    repeat: bool = False
    """Start again at its end to keep the share; otherwise the other sources fill up."""


@dataclass(frozen=True)
class Document:
    """A file: its name (stable across installations) and where it lies."""

    name: str
    path: Path

    def is_held_out(self, held_out_frac: float) -> bool:
        return is_below(hashlib.sha256(self.name.encode()).digest(), held_out_frac)

    def text(self) -> str:
        """What the file holds; bytes that are not UTF-8 become U+FFFD.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            return self.path.read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            raise InputError(f"data: '{self.path}' cannot be read ({error.strerror})") from None


class FileOrigin:
    """Files, one document each, read in a seeded order.

    Raises:
        InputError: the folder does not exist or holds no file that is read.
    """

    def __init__(self, source: TextSource, max_document_bytes: int):
        found = _python_documents() if source.path == "python" else _folder_documents(source)
        sizes = {document: document.path.stat().st_size for document in found}
        self.documents = sorted(
            (document for document, size in sizes.items() if 0 < size <= max_document_bytes),
            key=lambda document: document.name,
        )
        self.listed_out = Counter(
            empty=sum(size == 0 for size in sizes.values()),
            too_long=sum(size > max_document_bytes for size in sizes.values()),
        )
        if not found:
            raise InputError(f"data.source: no file matching {source.pattern!r} in '{source.path}'")
        if not self.documents:
            raise InputError(
                f"data.source: all {len(found)} files in '{source.path}' are empty or longer than "
                f"data.max_document_bytes ({max_document_bytes})"
            )

    def identity(self) -> list[Any]:
        """Changes whenever a file comes, goes or is written."""
        return [[document.name, *stamp(document.path)] for document in self.documents]

    def read(self, seed: int, left_out: Counter[str]) -> Iterator[str]:
        left_out.update(self.listed_out)
        for index in np.random.default_rng(seed).permutation(len(self.documents)):
            yield self.documents[index].text()


def _folder_documents(source: TextSource) -> list[Document]:
    root = Path(source.path)
    if not root.is_dir():
        raise InputError(f"data.source: '{root}' is not a folder; give a folder of text files or 'python'")
    paths = (path for path in root.glob(source.pattern or "**/*") if path.is_file())
    return [Document(path.relative_to(root).as_posix(), path) for path in paths]


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


class RowOrigin:
    """Rows of a data set, one document each, in the order of the data set.

    Raises:
        InputError: `datasets` does not find or does not read it; a row has no text in the column.
    """

    def __init__(self, source: TextSource, max_document_bytes: int):
        self.source = source
        self.max_document_bytes = max_document_bytes
        self.is_pinned = (
            re.fullmatch("[0-9a-f]{40}", source.revision or "") and not Path(source.path).exists()
        )
        if not self.is_pinned:
            self.builder  # noqa: B018  (refuse now what is not there)

    @cached_property
    def builder(self) -> Any:
        with _refused(self.source):
            return self._open()

    def _open(self) -> Any:
        from datasets import load_dataset_builder  # takes a second to import, and most runs read files

        source, path = self.source, Path(self.source.path)
        if path.is_file():
            kind = next((FILE_READERS[s] for s in path.suffixes if s in FILE_READERS), None)
            if kind is None:
                raise InputError(f"data: '{path}' is none of {', '.join(FILE_READERS)}")
            lenient = {"encoding_errors": "replace"} if kind == "text" else {}  # as files of a folder
            return load_dataset_builder(kind, data_files=str(path), **lenient)
        if source.path.startswith((".", "/", "~")) and not path.exists():
            raise InputError(f"data: there is no file or folder '{path}'")
        files = list(source.data_files) if isinstance(source.data_files, tuple) else source.data_files
        return load_dataset_builder(source.path, source.name, data_files=files, revision=source.revision)

    def identity(self) -> list[Any]:
        """Changes whenever the data set does: commits of the hub, sizes and times of local files."""
        if self.is_pinned:  # needs no network, so a run that was killed goes on without
            return [self.source.path, self.source.revision]
        files = self.builder.config.data_files or {}
        listed = files.get(self.source.split) or [file for of_split in files.values() for file in of_split]
        metadata = [m for of_split in files.values() for m in of_split.origin_metadata]
        stamps = [[str(f), *(stamp(Path(f)) if Path(f).is_file() else ())] for f in listed]
        return [self.builder.cache_dir if not files else "", stamps, sorted(map(str, metadata))]

    def read(self, seed: int, left_out: Counter[str]) -> Iterator[str]:
        del seed  # a stream has one order; batches are drawn in a seeded one
        column = self.source.text_column
        for row in self._rows():
            if column not in row:
                raise InputError(
                    f"data: '{self.source.path}' has no column '{column}'; its columns: {', '.join(row)}"
                )
            text = row[column]
            if not text and (text is None or isinstance(text, str)):
                left_out["empty"] += 1
            elif not isinstance(text, str):
                kind = type(text).__name__
                raise InputError(f"data: column '{column}' of '{self.source.path}' holds {kind}, not text")
            elif len(text.encode()) > self.max_document_bytes:
                left_out["too_long"] += 1
            else:
                yield text

    def _rows(self) -> Iterator[dict[str, Any]]:
        with _refused(self.source):
            if self.source.streaming:
                rows = iter(self.builder.as_streaming_dataset(split=self.source.split))
            else:
                self.builder.download_and_prepare()
                rows = iter(self.builder.as_dataset(split=self.source.split))
        while True:
            with _refused(self.source):
                row = next(rows, None)
            if row is None:
                return
            yield row


@contextmanager
def _refused(source: TextSource) -> Iterator[None]:
    """Turn what `datasets` and its readers raise into one line."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except InputError:
        raise
    except StopIteration:  # the JSON reader's answer to an empty file
        raise InputError(f"data: '{source.path}' (split {source.split}) is empty") from None
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        if "scripts are no longer supported" in reason:
            reason += "; only Parquet, JSON lines, CSV and text are read, no code of a data set is run"
        raise InputError(f"data: '{source.path}' (split {source.split}) is not read: {reason}") from None


def open_source(source: TextSource, max_document_bytes: int) -> FileOrigin | RowOrigin:
    """Find the documents of a source without reading their text.

    Raises:
        InputError: there is no such source, or none of its files is read.
    """
    is_files = source.path == "python" or source.pattern is not None
    return (FileOrigin if is_files else RowOrigin)(source, max_document_bytes)


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def is_below(digest: bytes, share: float) -> bool:
    """Whether a hash falls into the first `share` of all hashes."""
    return int.from_bytes(digest[:8], "big") / 2**64 < share
