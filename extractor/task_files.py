"""A user's own task: a file of JSON lines, no code.

Each line is one pair:

    {"clean": "The keys", "corrupted": "The key", "answer": " are", "distractor": " is"}

`answer` and `distractor` are the next tokens of `clean` and `corrupted`. Optional: `split` (train, selection
or held_out) and `template` (a whole number or a text: pairs of one kind, which bootstrap intervals keep
together). Lines without a split are divided by the hash of their template, or else of their prompts: the
same file gives the same splits on every machine.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from extractor.errors import InputError
from extractor.task_text import Pair
from extractor.task_tokens import check_answers
from extractor.task_words import SPLITS, TaskSplit

SUFFIX = ".jsonl"
TEXTS = ("clean", "corrupted", "answer", "distractor")
FIELDS = (*TEXTS, "split", "template")
MAX_LINE_BYTES = 100_000  # far beyond any prompt that a model of this project reads
SHARES: dict[TaskSplit, float] = {"train": 0.6, "selection": 0.15, "held_out": 0.25}


@dataclass(frozen=True)
class TaskLine:
    """A pair of a file, where it stands and on which side of the split it is."""

    number: int
    split: TaskSplit
    pair: Pair


def is_task_file(name: str) -> bool:
    return name.endswith(SUFFIX)


def pairs_of_file(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: TaskSplit,
    count: int,
    seed: int,
    max_tokens: int | None,
) -> list[Pair]:
    """Pairs of one split of a file, in an order that the seed decides.

    Raises:
        InputError: the file is refused, a line cannot be asked in this tokenizer, or it has too few pairs.
    """
    lines = [line for line in read_task_file(name) if line.split == split]
    checked = check_answers([line.pair for line in lines], tokenizer, max_tokens)
    for line, (_, problem) in zip(lines, checked, strict=True):
        if problem:
            raise InputError(f"task file '{name}', line {line.number}: {problem}")
    if len(lines) < count:
        raise InputError(f"task file '{name}': {count} {split} pairs asked for, it has {len(lines)}")
    return random.Random(f"{split}/{seed}").sample([line.pair for line in lines], count)


def read_task_file(name: str) -> list[TaskLine]:
    """Every pair of a file.

    Raises:
        InputError: the file, the line and the field that is wrong, and what is allowed.
    """
    lines: list[TaskLine] = []
    templates: dict[str, int] = {}
    for number, raw in _raw_lines(name):
        try:
            lines.append(_task_line(number, raw, templates))
        except ValueError as error:
            raise InputError(f"task file '{name}', line {number}: {error}") from None
    if not lines:
        raise InputError(f"task file '{name}' has no lines; one JSON object with {', '.join(TEXTS)} per line")
    _refuse_repeats(name, lines)
    return lines


def _raw_lines(name: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; a byte order mark and either line ending are allowed."""
    try:
        with Path(name).open("rb") as file:
            number = 0
            # never more than one line's limit in memory, whatever the file is
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(
                        f"task file '{name}', line {number}: longer than {MAX_LINE_BYTES} bytes; "
                        "put one pair on a line"
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(f"task file '{name}' cannot be read: {error.strerror}") from None


def _task_line(number: int, raw: bytes, templates: dict[str, int]) -> TaskLine:
    """One line, checked; ValueError says what is wrong with it."""
    row = _json_object(raw)
    if unknown := sorted(row.keys() - set(FIELDS)):
        raise ValueError(f"unknown field '{unknown[0]}'; allowed: {', '.join(FIELDS)}")
    for field in TEXTS:
        if field not in row:
            raise ValueError(f"'{field}' is missing; needed: {', '.join(TEXTS)}")
        if not isinstance(row[field], str) or not row[field]:
            raise ValueError(f"'{field}' must be a text that is not empty, not {_shown(row[field])}")
        if not _is_unicode(row[field]):
            raise ValueError(f"'{field}' holds half a surrogate pair, which is no character")
    if row["clean"] == row["corrupted"]:
        raise ValueError("'clean' and 'corrupted' are the same; they must differ in one place")
    if row["answer"] == row["distractor"]:
        raise ValueError("'answer' and 'distractor' are the same; they must be two tokens")
    kind = _kind(row)
    template = templates.setdefault(kind, len(templates))
    pair = Pair(**{field: row[field] for field in TEXTS}, template=template)
    return TaskLine(number, _split(row, kind), pair)


def _json_object(raw: bytes) -> dict[str, object]:
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not a flat JSON object") from None
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object with {', '.join(TEXTS)}, not {_shown(row)}")
    return row


def _without_repeats(items: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(items)
    if len(row) < len(items):
        raise ValueError("a field is given twice")
    return row


def _kind(row: dict[str, object]) -> str:
    """What identifies a line's template: the one given, or its own content."""
    if "template" not in row:
        return json.dumps([row["clean"], row["corrupted"]])
    template = row["template"]
    if isinstance(template, bool) or not isinstance(template, int | str):
        raise ValueError(f"'template' must be a whole number or a text, not {_shown(template)}")
    return json.dumps(template)


def _split(row: dict[str, object], kind: str) -> TaskSplit:
    if "split" not in row:
        return split_of(kind)
    if row["split"] not in SPLITS:
        raise ValueError(f"'split' must be one of {', '.join(SPLITS)}, not {_shown(row['split'])}")
    return row["split"]


def split_of(kind: str) -> TaskSplit:
    """The split of a template or content, by its hash."""
    place = int.from_bytes(hashlib.sha256(kind.encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split
    return "held_out"


def _refuse_repeats(name: str, lines: list[TaskLine]) -> None:
    """No pair twice, and no prompt on two sides of the split: held-out prompts must be unseen ones."""
    pairs: dict[tuple[str, str], int] = {}
    prompts: dict[str, TaskLine] = {}
    for line in lines:
        key = (line.pair.clean, line.pair.corrupted)
        if key in pairs:
            raise InputError(f"task file '{name}', line {line.number}: repeats line {pairs[key]}")
        pairs[key] = line.number
        for field in ("clean", "corrupted"):
            first = prompts.setdefault(getattr(line.pair, field), line)
            if first.split != line.split:
                raise InputError(
                    f"task file '{name}', line {line.number}: '{field}' ({line.split}) stands in line "
                    f"{first.number} too ({first.split}); give both the same 'split' or 'template'"
                )


def _is_unicode(text: str) -> bool:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
