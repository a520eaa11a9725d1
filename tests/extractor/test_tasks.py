"""Tasks: pairs from the right pools, one-token answers, counterfactual alignment, losses."""

import math

import pytest
import torch

from extractor.errors import InputError, UsageError
from extractor.task_specs import HELD_OUT, PREAMBLES, SLOTS, TASKS
from extractor.tasks import TaskBatch, accuracy, encode_pairs, make_pairs, task_names, two_way_loss


def usable_tasks(tokenizer) -> list[str]:
    usable = []
    for name in task_names():
        try:
            make_pairs(name, tokenizer, split="train", count=4, seed=0)
            usable.append(name)
        except InputError:
            pass
    return usable


def test_at_least_twelve_tasks_fit_the_shipped_tokenizer(shipped_tokenizer) -> None:
    assert len(usable_tasks(shipped_tokenizer)) >= 12


@pytest.mark.parametrize("name", ["single_double_quote", "if_equals", "var_swap"])
def test_pairs_are_distinct_seeded_and_disjoint_across_splits(name: str, shipped_tokenizer) -> None:
    train = make_pairs(name, shipped_tokenizer, split="train", count=60, seed=0)
    assert train == make_pairs(name, shipped_tokenizer, split="train", count=60, seed=0)
    assert train != make_pairs(name, shipped_tokenizer, split="train", count=60, seed=1)
    held_out = make_pairs(name, shipped_tokenizer, split="held_out", count=60, seed=0)
    assert len({pair.clean for pair in train}) == 60
    assert not {pair.clean for pair in train} & {pair.clean for pair in held_out}


def test_every_answer_is_the_next_token_of_its_prompt(shipped_tokenizer) -> None:
    for name in usable_tasks(shipped_tokenizer):
        pairs = make_pairs(name, shipped_tokenizer, split="held_out", count=10, seed=0)
        batch = encode_pairs(pairs, shipped_tokenizer)
        prompts = [pair.clean for pair in pairs] + [pair.corrupted for pair in pairs]
        for row, prompt in enumerate(prompts):
            ids = shipped_tokenizer(prompt)["input_ids"]
            text = prompt + shipped_tokenizer.decode(batch.answer[row])
            assert shipped_tokenizer(text)["input_ids"] == [*ids, batch.answer[row]]
            assert batch.ids[row, batch.last[row]] == ids[-1]
        assert torch.equal(batch.answer, batch.distractor.roll(10))


def test_templates_and_contents_of_the_splits_are_disjoint() -> None:
    for pool in (*SLOTS.values(), PREAMBLES, *TASKS.values()):
        middle = list(pool).index(HELD_OUT)
        assert middle > 0
        assert middle < len(pool) - 1
        assert not set(pool[:middle]) & set(pool[middle + 1 :])


def test_unknown_task_names_the_nearest(shipped_tokenizer) -> None:
    with pytest.raises(UsageError, match="did you mean 'with_as'"):
        make_pairs("with_is", shipped_tokenizer, split="train", count=4, seed=0)


def test_an_answer_of_several_tokens_is_refused_by_name(shipped_tokenizer, monkeypatch) -> None:
    template = ("    {x}", "    {y}", " incomprehensible", " =")
    monkeypatch.setitem(TASKS, "odd", (template, HELD_OUT, template))
    with pytest.raises(InputError, match="task 'odd'.*' incomprehensible' is not one token"):
        make_pairs("odd", shipped_tokenizer, split="train", count=4, seed=0)


def test_loss_and_accuracy_of_known_differences() -> None:
    assert two_way_loss(torch.zeros(4)).item() == pytest.approx(math.log(2))
    assert two_way_loss(torch.tensor([100.0, 100.0])).item() == pytest.approx(0)
    assert accuracy(torch.tensor([1.0, -1.0, 2.0, 0.0])) == 0.5


def batch_of(*rows: list[int]) -> TaskBatch:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    nothing = torch.zeros(len(rows), dtype=torch.long)
    return TaskBatch(ids, torch.tensor([len(row) - 1 for row in rows]), nothing, nothing)


def aligned(batch: TaskBatch) -> list[list[int | None]]:
    """For each token, the counterfactual token that stands for it; None where it keeps its own."""
    activation = torch.arange(batch.ids.numel()).reshape(*batch.ids.shape, 1).float()
    moved = batch.counterfactual(activation)[..., 0].long()
    table = []
    for row in range(len(batch)):
        cells: list[int | None] = []
        for position in range(int(batch.last[row]) + 1):
            source = int(moved[row, position])
            own = source == row * batch.ids.shape[1] + position
            cells.append(None if own else int(batch.ids.flatten()[source]))
        table.append(cells)
    return table


def test_a_substituted_token_is_aligned_in_place() -> None:
    assert aligned(batch_of([5, 6, 7, 8], [5, 9, 7, 8])) == [[5, 9, 7, 8], [5, 6, 7, 8]]


def test_an_inserted_token_keeps_its_own_activation() -> None:
    table = aligned(batch_of([5, 6, 7, 8], [5, 7, 8]))
    assert table == [[5, None, 7, 8], [5, 7, 8]]


def test_select_keeps_both_sides_of_a_pair() -> None:
    batch = batch_of([1, 2, 3, 4], [5, 6], [7, 8, 9, 9], [3, 3])
    chosen = batch.select(torch.tensor([1]))
    assert chosen.ids.tolist() == [[5, 6], [3, 3]]
    assert chosen.last.tolist() == [1, 1]


def test_logit_difference_reads_the_last_real_token() -> None:
    batch = TaskBatch(
        torch.zeros(2, 3, dtype=torch.long), torch.tensor([2, 0]), torch.tensor([1, 2]), torch.tensor([2, 1])
    )
    logits = torch.arange(24.0).reshape(2, 3, 4) ** 2
    expected = [logits[0, 2, 1] - logits[0, 2, 2], logits[1, 0, 2] - logits[1, 0, 1]]
    assert batch.logit_difference(logits).tolist() == expected
