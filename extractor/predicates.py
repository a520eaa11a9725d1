"""What holds at each token of a text: the properties that a node's label may name.

All are read off the text alone, from the block's own beginning (a model sees no more) and as it stands once
the token has been read. Strings, comments and brackets follow Python; in prose, quotes and brackets do the
same and an apostrophe within a word opens nothing.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

LINE_STARTS = {"def", "class", "import", "from", "if", "elif", "else", "for", "while", "return", "raise",
               "with", "try", "except", "assert", "@", ">>>"}  # fmt: skip
LINE_START = re.compile(r"\w+|@|>>>")
STRING_PREFIXES = {"", "r", "b", "f", "u", "rb", "br", "rf", "fr"}
CLOSES = {")": "(", "]": "[", "}": "{"}
MARKS = "\"'()[]{}.,:=#_\\\n"
BRACKETS = {"(": "round", "[": "square", "{": "curly"}
WORD_BEFORE = re.compile(r"\w*\Z")

Predicates = dict[str, Bool[Tensor, "block seq"]]


class Reading(NamedTuple):
    """Where in the text one is after a character."""

    quote: str = ""  # the quotation mark(s) of the open string
    brackets: str = ""  # open brackets, outermost first
    in_comment: bool = False


def scan(text: str) -> list[Reading]:
    """The reading after every character."""
    readings: list[Reading] = []
    now = Reading()
    while (place := len(readings)) < len(text):
        now, width = _step(text, place, now)
        readings += [now] * width
    return readings[: len(text)]


def _step(text: str, place: int, now: Reading) -> tuple[Reading, int]:
    """The next reading, and how many characters were read."""
    char = text[place]
    if now.quote:
        if char == "\\":
            return now, 2
        if text.startswith(now.quote, place):
            return now._replace(quote=""), len(now.quote)
        ends_with_line = char == "\n" and len(now.quote) == 1
        return (now._replace(quote="") if ends_with_line else now), 1
    if now.in_comment or char == "#":
        return now._replace(in_comment=char != "\n"), 1
    if char in "\"'":
        word = WORD_BEFORE.search(text[max(0, place - 3) : place])[0].lower()
        if word not in STRING_PREFIXES:
            return now, 1
        quote = char * 3 if text.startswith(char * 3, place) else char
        return now._replace(quote=quote), len(quote)
    if char in BRACKETS:
        return now._replace(brackets=now.brackets + char), 1
    if char in CLOSES and now.brackets.endswith(CLOSES[char]):
        return now._replace(brackets=now.brackets[:-1]), 1
    return now, 1


def text_predicates(
    ids: Int[Tensor, "block seq"], tokenizer: PreTrainedTokenizerBase, min_count: int = 10
) -> Predicates:
    """Every property by its phrase, as completes "high ..."; tokens by name if they occur `min_count` times.

    Properties that never or always hold are left out.
    """
    pieces = {token: _piece(token, tokenizer) for token in ids.unique().tolist()}
    places: dict[str, list[int]] = defaultdict(list)  # phrase -> where it holds, counted over all blocks
    for place, phrases in enumerate(chain.from_iterable(_phrases(block, pieces) for block in ids.tolist())):
        for phrase in phrases:
            places[phrase].append(place)
    predicates = {
        phrase: torch.zeros(ids.numel(), dtype=torch.bool).index_fill_(0, torch.tensor(at), True).view_as(ids)
        for phrase, at in places.items()
    }
    predicates |= _by_token(ids, pieces, min_count)
    return {phrase: holds for phrase, holds in predicates.items() if 0 < holds.sum() < holds.numel()}


def _piece(token: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token's text; None ends the text."""
    return None if token == tokenizer.eos_token_id else tokenizer.decode([token])


def _by_token(ids: Tensor, pieces: dict[int, str | None], min_count: int) -> Predicates:
    """On, and after: each frequent token; any token that has a certain character."""
    found = {}
    before = torch.full_like(ids, -1)
    before[:, 1:] = ids[:, :-1]
    groups = {f"a token with {mark!r}": [t for t, piece in pieces.items() if mark in (piece or "")]
              for mark in MARKS}  # fmt: skip
    for token, count in Counter(ids.flatten().tolist()).items():
        if count >= min_count:
            name = "end of text" if pieces[token] is None else repr(pieces[token])
            groups[f"the token {name}"] = [token]
    for name, tokens in groups.items():
        members = torch.tensor(tokens, dtype=ids.dtype)
        found[f"on {name}"], found[f"after {name}"] = torch.isin(ids, members), torch.isin(before, members)
    return found


def _phrases(block: Sequence[int], pieces: dict[int, str | None]) -> list[list[str]]:
    """The phrases that hold at each token of a block; every document in it is read on its own."""
    phrases: list[list[str]] = []
    document: list[str] = []
    for token in [*block, None]:
        piece = None if token is None else pieces[token]
        if piece is not None:
            document.append(piece)
            continue
        phrases += _phrases_of_document(document)
        phrases += [[]] if token is not None else []
        document = []
    phrases[0].append("at the first position")
    return phrases


def _phrases_of_document(pieces: list[str]) -> list[list[str]]:
    text = "".join(pieces)
    readings = [Reading(), *scan(text)]
    seen: set[str] = set()
    found, end, opened = [], 0, ""
    for piece in pieces:
        before, end = readings[end], end + len(piece)
        now = readings[end]
        line = text[text.rfind("\n", 0, end) + 1 : end]
        phrases = _place_in_string(before, now, opened) + _place_in_brackets(before, now)
        phrases += _place_in_line(line, piece) + _form(piece)
        phrases += ["on a token that came before in the text"] if piece in seen else []
        opened = now.quote if not before.quote else ""
        seen.add(piece)
        found.append(phrases)
    return found


def _place_in_string(before: Reading, now: Reading, just_opened: str) -> list[str]:
    kinds = {'"': "double", "'": "single"}
    phrases = ["inside a comment"] if now.in_comment else []
    if now.quote:
        kind = kinds[now.quote[0]]
        phrases += ["inside quotes", f"inside {kind} quotes"]
        phrases += ["inside triple quotes"] if len(now.quote) == 3 else []
        phrases += ["on an opening quote", f"on an opening {kind} quote"] if not before.quote else []
    if before.quote and not now.quote:
        phrases += ["on a closing quote", f"on a closing {kinds[before.quote[0]]} quote"]
    if just_opened:
        phrases += [f"right after an opening {kinds[just_opened[0]]} quote"]
    return phrases


def _place_in_brackets(before: Reading, now: Reading) -> list[str]:
    phrases = []
    if now.brackets:
        phrases += ["inside brackets", f"inside {BRACKETS[now.brackets[-1]]} brackets"]
    if len(now.brackets) > 1:
        phrases += ["inside two or more brackets"]
    if len(now.brackets) > len(before.brackets):
        phrases += ["on an opening bracket"]
    if len(now.brackets) < len(before.brackets):
        phrases += ["on a closing bracket"]
    return phrases


def _place_in_line(line: str, piece: str) -> list[str]:
    """`line`: the text from the last line break to this token's end."""
    if not line.strip(" \t"):
        return ["on a line break"] if not line else ["in the indentation"]
    phrases = ["in an indented line"] if line[0] in " \t" else ["in a line without indentation"]
    words = line.strip(" \t")
    phrases += ["on the first word of a line"] if len(words) <= len(piece.strip(" \t")) else []
    start = LINE_START.match(words)
    known = start is not None and start[0] in LINE_STARTS
    return phrases + ([f"in a line that starts with {start[0]!r}"] if known else [])


def _form(piece: str) -> list[str]:
    word = piece.strip()
    if not word:
        return ["on white space"]
    if word.isdigit():
        return ["on a number"]
    if not any(char.isalnum() or char == "_" for char in word):
        return ["on punctuation"]
    phrases = ["on a word after a space"] if piece[0] == " " else ["on a word or part of one without a space"]
    return phrases + (["on a capital letter first"] if word[0].isupper() else [])
