"""Train, selection and held-out prompts share no template, no word and no surroundings, for every task."""

import re
from itertools import combinations

import pytest

from extractor.task_contexts import CLASSES, FUNCTIONS, METHODS, MODULES, PROSE
from extractor.task_specs import TASKS
from extractor.task_text import CONTRAST
from extractor.task_words import SLOTS, SPLITS, WORDS
from extractor.tasks import make_pairs

PAIRS_OF_SPLITS = list(combinations(SPLITS, 2))


def shape(template: str) -> str:
    """A template without its words: what is left when slots of any name count as the same."""
    return re.sub(r"\s+", " ", re.sub(r"\$\{?\w+\}?", "$", template)).strip()


@pytest.mark.parametrize("name", TASKS)
def test_no_template_is_in_two_splits_or_twice_in_one(name: str) -> None:
    spec = TASKS[name]
    shapes = {split: [shape(template) for template in spec.templates(split)] for split in SPLITS}
    for one, other in PAIRS_OF_SPLITS:
        assert not set(shapes[one]) & set(shapes[other])
    for split in SPLITS:
        assert len(set(spec.templates(split))) == len(spec.templates(split))
    assert all(len(shapes[split]) >= least for split, least in zip(SPLITS, (6, 4, 4), strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_a_template_has_one_contrast_and_no_unknown_slot(name: str) -> None:
    spec = TASKS[name]
    for split in SPLITS:
        for template in spec.templates(split):
            assert len(CONTRAST.findall(template)) == 1
            assert set(re.findall(r"\$\{?([a-zA-Z]+)", template)) <= set(SLOTS)


def test_no_word_is_in_two_splits() -> None:
    words = {split: {word for pool in WORDS.values() for word in pool[split]} for split in SPLITS}
    for one, other in PAIRS_OF_SPLITS:
        assert not words[one] & words[other]
    assert set(SLOTS.values()) == set(WORDS)


@pytest.mark.parametrize("surroundings", [MODULES, CLASSES, FUNCTIONS, METHODS, PROSE])
def test_no_surroundings_are_in_two_splits(surroundings: dict) -> None:
    for one, other in PAIRS_OF_SPLITS:
        assert not set(map(shape, surroundings[one])) & set(map(shape, surroundings[other]))


def test_no_prompt_is_in_two_splits(shipped_tokenizer) -> None:
    for name in ("single_double_quote", "var_swap", "final_kwarg", "while_return_true"):
        prompts = {}
        for split in SPLITS:
            pairs = make_pairs(name, shipped_tokenizer, split=split, count=128, seed=0)
            prompts[split] = {side for pair in pairs for side in (pair.clean, pair.corrupted)}
        for one, other in PAIRS_OF_SPLITS:
            assert not prompts[one] & prompts[other]
