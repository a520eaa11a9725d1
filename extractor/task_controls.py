"""Tasks that mean nothing, for controls: what a mask can "find" where there is nothing to find.

`make_nonsense` keeps a task's prompts and exchanges answers and distractors at random. What the label
follows is then no longer the change between the two sides, so there is no rule that a circuit could hold; a
mask that still reaches a low loss has memorised prompts or templates, and fails on held-out ones.

`random_answers` keeps the rule and takes its meaning away: one random token is to follow every clean prompt,
another every corrupted one. No student was trained to say so, but pruning alone can teach it, on held-out
prompts too (Drori 2026: with some thirty nodes). What tells is that the student does not do the task.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from extractor.errors import InputError, UsageError
from extractor.task_text import Pair
from extractor.task_tokens import tokens_of

Nonsense = Literal["prompt", "class"]


def make_nonsense(pairs: Sequence[Pair], kind: Nonsense, seed: int) -> list[Pair]:
    """The same prompts in the same order, with half of the labels exchanged.

    `prompt`: within every template, half of the pairs, drawn at random. To solve it is to know every prompt.
    `class`: all pairs of half of the templates. To solve it is to know every template, and to turn the rule
    of the contrast round in some.

    Either way the label says nothing about the side: of all clean prompts, half are answered by what
    would be right on the corrupted side. (Odd numbers leave one pair or template over, which is kept.)

    Raises:
        UsageError: too few pairs or templates to exchange half of them.
    """
    rng = random.Random(f"nonsense/{kind}/{seed}")
    of_template: dict[int, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        of_template[pair.template].append(index)
    if kind == "class":
        swapped = {index for template in _half(sorted(of_template), rng) for index in of_template[template]}
    else:
        swapped = _half_of_each(of_template, rng)
    if not swapped:
        needed = "templates" if kind == "class" else "pairs"
        raise UsageError(f"a nonsense task of kind '{kind}' needs at least two {needed}")
    return [_exchanged(pair) if index in swapped else pair for index, pair in enumerate(pairs)]


def random_answers(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, seed: str) -> list[Pair]:
    """The same prompts; one random token answers every clean prompt, another every corrupted one.

    The tokens are words of the tokenizer, and the same for the same seed, whatever the pairs.

    Raises:
        InputError: the tokenizer has no two such tokens.
    """
    order = random.Random(f"nonsense/{seed}").sample(range(len(tokenizer)), len(tokenizer))
    answers = []
    for token in order:
        text = tokenizer.decode([token])
        if text.strip().isalpha() and tokens_of([text], tokenizer) == [[token]]:
            answers.append(text)
        if len(answers) == 2:
            return [replace(pair, answer=answers[0], distractor=answers[1]) for pair in pairs]
    raise InputError("a nonsense task needs two tokens that are words, and the tokenizer has none")


def _half_of_each(of_template: dict[int, list[int]], rng: random.Random) -> set[int]:
    """Half of every template's pairs; what is left over of odd numbers is halved once more."""
    swapped: set[int] = set()
    left_over = []
    for template in sorted(of_template):
        indices = rng.sample(of_template[template], len(of_template[template]))
        if len(indices) % 2:
            left_over.append(indices.pop())
        swapped.update(indices[::2])
    return swapped | set(_half(left_over, rng))


def _half(items: Sequence[int], rng: random.Random) -> list[int]:
    return rng.sample(items, len(items) // 2)


def _exchanged(pair: Pair) -> Pair:
    return replace(pair, answer=pair.distractor, distractor=pair.answer)
