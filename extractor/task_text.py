"""A pair of prompts from a template, its surroundings and a split's words.

1. A template is a piece of code (or prose) that ends where the choice is made. `<<one|other>>` is its
   contrast: what the clean prompt says, and the corrupted one instead. Nothing else ever differs.
2. It goes into surroundings of the right kind (`extractor/task_contexts.py`), indented like the place.
3. Slots (`$x`) are filled, the same on both sides, with words of the split (`extractor/task_words.py`).

An answer is filled likewise. Three forms mean something: a line break stands for itself and the
indentation, without the last space, which belongs to the next word; `$end` is what follows the last line of
a function; a word that ends in `~` stands for its first token.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Template as Slotted

from extractor.task_contexts import CLASSES, FUNCTIONS, METHODS, MODULES, PROSE
from extractor.task_words import SLOTS, WORDS, TaskSplit

CONTRAST = re.compile(r"<<(.*?)\|(.*?)>>", re.DOTALL)
PLACE = re.compile(r"^( *).*<here>", re.MULTILINE)


@dataclass(frozen=True)
class Pair:
    """Two prompts and the next token of each."""

    clean: str
    corrupted: str
    answer: str
    distractor: str
    template: int  # unique within the task and the split


@dataclass(frozen=True)
class TaskSpec:
    """A task as data: its two answers and, for each split, templates of its own."""

    answer: str
    distractor: str
    train: tuple[str, ...]
    selection: tuple[str, ...]
    held_out: tuple[str, ...]
    prose: bool = False

    def templates(self, split: TaskSplit) -> tuple[str, ...]:
        return getattr(self, split)


def write_pair(spec: TaskSpec, split: TaskSplit, template: int, rng: random.Random) -> Pair:
    """One pair of a template, with surroundings and words drawn from the split's own."""
    text = spec.templates(split)[template]
    surroundings, after_function = _surroundings(text, spec.prose, split, rng)
    indent = PLACE.search(surroundings)[1]
    prompt = surroundings.replace("<here>", _indented(text, indent))
    answers = [_indented(answer, indent) for answer in (spec.answer, spec.distractor)]
    fill = _words("".join([prompt, *answers]), split, rng) | {"end": after_function}
    clean, corrupted, answer, distractor = (
        Slotted(part).substitute(fill)
        for part in (CONTRAST.sub(r"\1", prompt), CONTRAST.sub(r"\2", prompt), *answers)
    )
    return Pair(clean, corrupted, _token_text(answer), _token_text(distractor), template)


def _surroundings(text: str, prose: bool, split: TaskSplit, rng: random.Random) -> tuple[str, str]:
    """Surroundings that a template fits into, and what comes after a function there."""
    in_class = "self" in text or (not text.startswith("def") and rng.random() < 0.5)
    if prose:
        return rng.choice(PROSE[split]) + "<here>", ""
    if text.startswith("def"):
        place = "    <here>" if in_class else "<here>"
    else:
        place = rng.choice((METHODS if in_class else FUNCTIONS)[split])
    before = rng.choice((CLASSES if in_class else MODULES)[split])
    return before + place, "\n\n    " if in_class else "\n\n"


def _indented(text: str, indent: str) -> str:
    return re.sub(r"\n(?!\n)", "\n" + indent, text)  # empty lines stay empty


def _words(text: str, split: TaskSplit, rng: random.Random) -> Mapping[str, str]:
    """A word of the split for every slot of the text, no word twice."""
    pools = {slot: WORDS[SLOTS[slot]][split] for slot in Slotted(text).get_identifiers() if slot != "end"}
    fill: dict[str, str] = {}
    for slot in sorted(pools, key=lambda slot: (len(pools[slot]), slot)):  # small pools must not run out
        fill[slot] = rng.choice([word for word in pools[slot] if word not in fill.values()])
    return fill


def _token_text(answer: str) -> str:
    """After a line break, the last space of the indentation belongs to the next word's token."""
    return answer[:-1] if answer.startswith("\n") and answer.endswith(" ") else answer
