"""Which kind of token a token of text is: keyword, name, string, ... in Python; word, number, ... elsewhere.

A token's class is that of its first character that is not a space: a line break with `return` is a keyword,
`):` with a line break a bracket. A token of spaces alone is indentation, or part of the string it stands in.
Classes of characters come from Python's own `tokenize` and `keyword` (soft keywords such as `match` count as
names), run on a whole document from its beginning. Where it stops, at a document that is cut off or is not
quite Python, it starts again at the next line.
"""

import itertools
import keyword
import token
import tokenize
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from extractor.data import DataConfig

Kind = Literal["python", "text"]
CLASSES: dict[Kind, tuple[str, ...]] = {
    "python": (
        "keywords", "names", "strings", "numbers", "brackets", "operators", "indentation", "comments",
        "end of text", "other",
    ),
    "text": ("words", "numbers", "punctuation", "whitespace", "end of text"),
}  # fmt: skip
UNKNOWN = "\ufffd"  # what a part of a character decodes to
LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens of one byte
BRACKETS = frozenset("()[]{}")
# f-strings and t-strings are tokens of their own from Python 3.12 and 3.14 on; what stands in braces is code.
STRING_PARTS = frozenset(
    getattr(token, f"{kind}STRING_{part}")
    for kind in "FT"
    for part in ("START", "MIDDLE", "END")
    if hasattr(token, f"{kind}STRING_{part}")
)


def kind_of(data: DataConfig) -> Kind:
    """Python where all that is read are Python files; by the names of the sources, not by what they hold."""
    sources = (data.held_out,) if data.held_out is not None else data.sources
    is_python = all(s.path == "python" or (s.pattern or "").endswith((".py", ".pyi")) for s in sources)
    return "python" if is_python else "text"


def documents(ids: Int[Tensor, " token"], end_of_text: int) -> Int[Tensor, " token"]:
    """The number of each token's document; an end of text belongs to the document that it ends."""
    is_end = (ids == end_of_text).long()
    return is_end.cumsum(0) - is_end


def classify(
    ids: Int[Tensor, " token"],
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    wanted: Int[Tensor, " wanted"] | None = None,
) -> Int[Tensor, " token"]:
    """The class of every token of some documents, as an index into `CLASSES[kind]`.

    Args:
        ids: documents one after the other, each but the last with its end of text.
        wanted: numbers of the documents that are looked at; the others' tokens get -1.
    """
    document = documents(ids, tokenizer.eos_token_id)
    found = torch.full_like(ids, -1)
    chosen = document.unique() if wanted is None else wanted.unique()
    starts = torch.searchsorted(document, chosen)
    ends = torch.searchsorted(document, chosen, right=True)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        own = ids[start:end].tolist()
        body = own[:-1] if own and own[-1] == tokenizer.eos_token_id else own
        classes = class_of_texts(token_texts(body, tokenizer), kind)
        classes += [CLASSES[kind].index("end of text")] * (len(own) - len(body))
        found[start:end] = torch.tensor(classes, dtype=found.dtype)
    return found


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token, so that joined they are the text of all.

    Of tokens that are parts of one character the first has its text and the others none.
    """
    unique = sorted(set(ids))
    # Behind another token: sentencepiece drops the space before the first.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    texts = dict(zip(unique, _decoded([[*anchor, index] for index in unique], tokenizer), strict=True))
    skipped = len(_decoded([anchor], tokenizer)[0])
    pieces = [texts[index][skipped:] for index in ids]
    place = 0
    while place < len(ids):
        if UNKNOWN in pieces[place]:
            place = _join_parts(pieces, place, ids, tokenizer)
        place += 1
    return pieces


def _join_parts(pieces: list[str], place: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Find the fewest tokens from here on that are whole characters; returns the place of the last."""
    for end in range(place + 1, min(place + LONGEST_CHARACTER, len(ids)) + 1):
        (text,) = _decoded([list(ids[place:end])], tokenizer)
        if UNKNOWN not in text:
            pieces[place:end] = [text, *[""] * (end - place - 1)]
            return end - 1
    return place  # not a character: it stays unknown


def _decoded(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def class_of_texts(pieces: Sequence[str], kind: Kind) -> list[int]:
    """The class of every piece of a document, which they make up when joined."""
    text = "".join(pieces)
    classes = (_python_classes if kind == "python" else _text_classes)(text)
    found, start = [], 0
    for piece in pieces:
        spaces = len(piece) - len(piece.lstrip())
        place = start + (spaces if spaces < len(piece) else 0)
        if not piece:  # a further part of the character before
            place = start - 1
        found.append(classes[place])
        start += len(piece)
    return found


def _text_classes(text: str) -> bytearray:
    """By character."""

    def name(character: str) -> str:
        if character.isspace():
            return "whitespace"
        if character.isdigit():
            return "numbers"
        return "words" if character.isalpha() or character == "_" else "punctuation"

    names = CLASSES["text"]
    of_character = {character: names.index(name(character)) for character in set(text)}
    return bytearray(of_character[character] for character in text)


def _python_classes(text: str) -> bytearray:
    """By character; what no lexical token covers is indentation, if it is a space, or other."""
    names = CLASSES["python"]
    space, other = names.index("indentation"), names.index("other")
    classes = bytearray(space if character.isspace() else other for character in text)
    for start, end, name in python_spans(text):
        classes[start:end] = bytes([names.index(name)]) * (end - start)
    return classes


def python_spans(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and class of every lexical token that can be told; `text` need not be valid Python."""
    lines = text.split("\n")
    lines = [line + "\n" for line in lines[:-1]] + lines[-1:]
    starts = [0, *itertools.accumulate(map(len, lines))]  # of every line, and of the end
    first = 0
    while first < len(lines):
        last_end = starts[first]
        try:
            for found in tokenize.generate_tokens(iter(lines[first:]).__next__):
                start, end = (
                    min(starts[min(first + row - 1, len(lines))] + column, len(text))
                    for row, column in (found.start, found.end)
                )
                if (name := _lexical_class(found)) and end > start:
                    yield start, end, name
                    last_end = end
            return
        except IndentationError as error:  # the same line is sound as a first line
            first += max(1, (error.lineno or 0) - 1)
        except tokenize.TokenError as error:
            message, (row, _) = error.args
            if "multi-line string" in message or "triple-quoted" in message:
                yield last_end, len(text), "strings"
                return
            first += max(1, row)
        except (SyntaxError, ValueError) as error:  # zero bytes among others
            first += max(1, getattr(error, "lineno", None) or 1)


def _lexical_class(found: tokenize.TokenInfo) -> str | None:
    """None: a line break or the like, which is no token of its own here."""
    if found.type == token.NAME:
        return "keywords" if keyword.iskeyword(found.string) else "names"
    if found.type == token.STRING or found.type in STRING_PARTS:
        return "strings"
    if found.type == token.OP:
        return "brackets" if found.string in BRACKETS else "operators"
    return {token.NUMBER: "numbers", token.COMMENT: "comments"}.get(found.type)
