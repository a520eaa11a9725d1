"""Nonsense tasks: labels that follow neither the contrast nor anything else that is held out."""

import json
from collections import Counter

import pytest

from extractor.errors import UsageError
from extractor.task_controls import make_nonsense
from extractor.task_text import Pair
from extractor.tasks import encode_pairs, make_pairs, refuse_unknown_tasks, task_label


def some_pairs(*templates: int) -> list[Pair]:
    return [Pair(f"clean {i}", f"corrupted {i}", " a", " b", t) for i, t in enumerate(templates)]


def swapped(before: list[Pair], after: list[Pair]) -> list[bool]:
    """Which pairs' labels were exchanged; everything else must be as it was."""
    found = []
    for old, new in zip(before, after, strict=True):
        assert (new.clean, new.corrupted, new.template) == (old.clean, old.corrupted, old.template)
        assert {new.answer, new.distractor} == {old.answer, old.distractor}
        found.append(new.answer == old.distractor)
    return found


@pytest.mark.parametrize("kind", ["prompt", "class"])
def test_half_of_the_labels_are_exchanged_by_the_seed_alone(kind: str) -> None:
    pairs = some_pairs(*(i % 6 for i in range(48)))
    found = swapped(pairs, make_nonsense(pairs, kind, seed=0))
    assert sum(found) == 24
    assert found == swapped(pairs, make_nonsense(pairs, kind, seed=0))
    draws = {tuple(swapped(pairs, make_nonsense(pairs, kind, seed=seed))) for seed in range(8)}
    assert len(draws) > 4


def test_per_prompt_every_template_is_half_exchanged() -> None:
    pairs = some_pairs(*(i % 6 for i in range(48)))
    found = swapped(pairs, make_nonsense(pairs, "prompt", seed=3))
    assert Counter(pair.template for pair, is_swapped in zip(pairs, found, strict=True) if is_swapped) == {
        template: 4 for template in range(6)
    }


def test_per_class_a_template_is_exchanged_whole_or_not_at_all() -> None:
    pairs = some_pairs(*(i % 6 for i in range(48)))
    found = swapped(pairs, make_nonsense(pairs, "class", seed=3))
    whole = {(pair.template, is_swapped) for pair, is_swapped in zip(pairs, found, strict=True)}
    assert len(whole) == 6
    assert sum(is_swapped for _, is_swapped in whole) == 3


def test_pairs_that_are_each_their_own_template_are_balanced_too() -> None:
    pairs = some_pairs(*range(31))
    for kind in ("prompt", "class"):
        assert sum(swapped(pairs, make_nonsense(pairs, kind, seed=0))) == 15


def test_each_pair_is_exchanged_as_often_as_not() -> None:
    pairs = some_pairs(*(i % 6 for i in range(24)))
    for kind in ("prompt", "class"):
        draws = [swapped(pairs, make_nonsense(pairs, kind, seed=seed)) for seed in range(200)]
        for often in map(sum, zip(*draws, strict=True)):
            assert 65 < often < 135


def test_what_cannot_be_halved_is_refused() -> None:
    with pytest.raises(UsageError, match="kind 'class' needs at least two templates"):
        make_nonsense(some_pairs(0, 0, 0), "class", seed=0)
    with pytest.raises(UsageError, match="kind 'prompt' needs at least two pairs"):
        make_nonsense(some_pairs(0), "prompt", seed=0)


def test_nonsense_is_encoded_with_its_labels(shipped_tokenizer) -> None:
    pairs = make_pairs("if_equals", shipped_tokenizer, split="train", count=24, seed=0)
    real = encode_pairs(pairs, shipped_tokenizer)
    nonsense = encode_pairs(make_nonsense(pairs, "prompt", seed=0), shipped_tokenizer)
    assert (nonsense.ids == real.ids).all()
    assert (nonsense.answer[:24] == real.answer[:24]).sum() == 12
    assert (nonsense.answer == nonsense.distractor.roll(24)).all()


# --- random answers --------------------------------------------------------------------------------------


def test_a_nonsense_task_keeps_prompts_and_gives_each_side_one_random_token(shipped_tokenizer) -> None:
    answers = {}
    for task in ("with_as", "if_equals", "class_init"):
        for split in ("train", "selection", "held_out"):
            options = {"split": split, "count": 16, "seed": 0}
            pairs = make_pairs(task, shipped_tokenizer, **options)
            nonsense = make_pairs(f"nonsense/{task}", shipped_tokenizer, **options)
            for old, new in zip(pairs, nonsense, strict=True):
                assert (new.clean, new.corrupted, new.template) == (old.clean, old.corrupted, old.template)
            answers.setdefault(task, set()).update((pair.answer, pair.distractor) for pair in nonsense)
            batch = encode_pairs(nonsense, shipped_tokenizer)
            assert len(batch.answer[:16].unique()) == len(batch.answer[16:].unique()) == 1
            assert not (batch.answer == batch.distractor).any()
    assert all(len(pair) == 1 for pair in answers.values())  # the same in every split
    assert len(set.union(*answers.values())) == 3  # and others for every task


def test_a_nonsense_task_may_be_of_a_users_own_prompts_and_names_are_checked(
    tmp_path, shipped_tokenizer
) -> None:
    sides = {"corrupted": "[", "clean": "("}
    lines = [
        {"answer": ")", "distractor": "]", "template": f"t{i % 6}"}
        | {side: f"x{i} = y{i}{bracket}a" for side, bracket in sides.items()}
        for i in range(60)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    name = f"nonsense/{path}"
    refuse_unknown_tasks([name, str(path)])
    assert task_label(name) == "nonsense-own"
    pairs = make_pairs(name, shipped_tokenizer, split="train", count=4, seed=0)
    assert {(pair.answer, pair.distractor) for pair in pairs}.isdisjoint({(")", "]"), ("]", ")")})
    with pytest.raises(UsageError, match="unknown task 'with_az'; did you mean 'with_as'"):
        refuse_unknown_tasks(["nonsense/with_az"])
    with pytest.raises(UsageError, match="unknown task"):
        refuse_unknown_tasks(["nonsense/nonsense/with_as"])
