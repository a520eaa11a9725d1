"""Tasks: pairs that differ in one place, one-token answers, splits that share nothing, alignment, losses."""

import math
from collections import Counter

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from extractor.errors import InputError, UsageError
from extractor.task_specs import PAPER_TASKS, TASKS
from extractor.task_text import TaskSpec
from extractor.task_words import SPLITS, WORDS
from extractor.tasks import (
    Pair,
    TaskBatch,
    accuracy,
    encode_pairs,
    make_pairs,
    task_label,
    task_names,
    two_way_loss,
)

PYTHON_TASKS = (*PAPER_TASKS, "bracket_paren", "if_return", "docstring_argument")
REFUSED_HERE = "zip_range"  # ` zip` is two tokens of the shipped vocabulary
PROSE_TASKS = (
    "indirect_object", "greater_than", "subject_verb_agreement", "gendered_pronoun", "induction",
)  # fmt: skip


@pytest.fixture(scope="module")
def english_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the pools is one token, and a year is two."""
    pools = [" " + word for pool in WORDS.values() for words in pool.values() for word in words]
    text = [*pools, " is", " are", " he", " she", *(str(number) for number in range(10, 100))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\d{1,2}|[^\s\p{L}\d]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture
def tokenizer_for(shipped_tokenizer, english_tokenizer):
    return lambda name: english_tokenizer if name in PROSE_TASKS else shipped_tokenizer


def test_the_tasks_are_the_papers_twenty_and_nine_more() -> None:
    assert task_names()[:20] == PAPER_TASKS
    assert set(task_names()) == {*PYTHON_TASKS, REFUSED_HERE, *PROSE_TASKS}
    assert len(set(task_names())) == 29


@pytest.mark.parametrize("name", [*PYTHON_TASKS, *PROSE_TASKS])
def test_every_split_has_enough_distinct_seeded_pairs_of_every_template(name: str, tokenizer_for) -> None:
    tokenizer = tokenizer_for(name)
    for split, at_least in {"train": 6, "selection": 4, "held_out": 4}.items():
        templates = len(TASKS[name].templates(split))
        assert templates >= at_least
        pairs = make_pairs(name, tokenizer, split=split, count=64, seed=0)
        assert pairs == make_pairs(name, tokenizer, split=split, count=64, seed=0)
        assert pairs != make_pairs(name, tokenizer, split=split, count=64, seed=1)
        assert len({(pair.clean, pair.corrupted) for pair in pairs}) == 64
        of_template = Counter(pair.template for pair in pairs)
        assert set(of_template) == set(range(templates))
        assert min(of_template.values()) >= 64 // templates // 2


@pytest.mark.parametrize("name", [*PYTHON_TASKS, *PROSE_TASKS])
def test_answers_are_the_next_token_and_two_sides_differ_in_one_place(name: str, tokenizer_for) -> None:
    tokenizer = tokenizer_for(name)
    for split in SPLITS:
        pairs = make_pairs(name, tokenizer, split=split, count=12, seed=0)
        batch = encode_pairs(pairs, tokenizer)
        prompts = [pair.clean for pair in pairs] + [pair.corrupted for pair in pairs]
        answers = [pair.answer for pair in pairs] + [pair.distractor for pair in pairs]
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = tokenizer(prompt)["input_ids"]
            assert tokenizer(prompt + answer)["input_ids"] == [*ids, batch.answer[row]]
            assert batch.ids[row, batch.last[row]] == ids[-1]
            assert len(ids) <= 200
        assert torch.equal(batch.answer, batch.distractor.roll(12))
        assert not (batch.answer == batch.distractor).any()
        for pair in pairs:
            clean, corrupted = differing_middle(tokenizer, pair)
            assert clean != corrupted
            assert max(len(clean), len(corrupted)) <= 10  # names of several tokens


# Where one token stands in another's place, an edit can patch every token of the prompt.
SUBSTITUTIONS = (
    "single_double_quote", "set_or_string", "set_or_string_fixedvarname", "bracket_brace", "for_while",
    "else_elif", "while_return_true", "indent_for", "bracket_paren", "if_return", "var_swap",
)  # fmt: skip


@pytest.mark.parametrize("name", SUBSTITUTIONS)
def test_most_contrasts_exchange_equally_many_tokens(name: str, shipped_tokenizer) -> None:
    for split in SPLITS:
        for pair in make_pairs(name, shipped_tokenizer, split=split, count=24, seed=0):
            clean, corrupted = differing_middle(shipped_tokenizer, pair)
            assert len(clean) == len(corrupted) <= 2, pair


def differing_middle(tokenizer, pair: Pair) -> tuple[list[int], list[int]]:
    """What is left of the two prompts' tokens without their shared beginning and end."""
    clean, corrupted = (tokenizer(side)["input_ids"] for side in (pair.clean, pair.corrupted))
    shorter = min(len(clean), len(corrupted))
    start = next((i for i in range(shorter) if clean[i] != corrupted[i]), shorter)
    most = shorter - start
    end = next((i for i in range(most) if clean[-1 - i] != corrupted[-1 - i]), most)
    return clean[start : len(clean) - end], corrupted[start : len(corrupted) - end]


def test_unknown_task_names_the_nearest(shipped_tokenizer) -> None:
    with pytest.raises(UsageError, match="did you mean 'with_as'"):
        make_pairs("with_is", shipped_tokenizer, split="train", count=4, seed=0)


def odd_task(ending: str, answer: str) -> TaskSpec:
    template = (f"<<$x|$y>>{ending}",)
    return TaskSpec(answer, " =", train=template, selection=template, held_out=template)


@pytest.mark.parametrize(
    ("ending", "answer", "problem"),
    [
        ("", " incomprehensible", "' incomprehensible' is not one token but"),
        ("", " =", "answer and distractor are both ' ='"),
        (" retur", "n", "'n' does not stay one token after the prompt"),
    ],
)
def test_a_task_the_tokenizer_cannot_ask_is_refused_by_name(
    ending: str, answer: str, problem: str, shipped_tokenizer, monkeypatch
) -> None:
    monkeypatch.setitem(TASKS, "odd", odd_task(ending, answer))
    with pytest.raises(
        InputError, match=f"task 'odd': 0 of 4 train pairs could be made .*{problem}"
    ) as caught:
        make_pairs("odd", shipped_tokenizer, split="train", count=4, seed=0)
    assert "\n" not in str(caught.value)


def test_a_task_is_refused_by_a_vocabulary_without_its_words(shipped_tokenizer) -> None:
    with pytest.raises(InputError, match="task 'zip_range'.*' zip' is not one token"):
        make_pairs("zip_range", shipped_tokenizer, split="held_out", count=4, seed=0)
    with pytest.raises(InputError, match="task 'gendered_pronoun'.*' she' is not one token"):
        make_pairs("gendered_pronoun", shipped_tokenizer, split="held_out", count=4, seed=0)


def test_prompts_are_no_longer_than_the_model_reads(shipped_tokenizer) -> None:
    pairs = make_pairs("with_as", shipped_tokenizer, split="train", count=16, seed=0, max_tokens=70)
    assert encode_pairs(pairs, shipped_tokenizer).ids.shape[1] <= 70
    with pytest.raises(InputError, match="task 'with_as': 0 of 4 train .*tokens, the model reads 20"):
        make_pairs("with_as", shipped_tokenizer, split="train", count=4, seed=0, max_tokens=20)


def test_a_word_longer_than_one_token_is_asked_by_its_first(shipped_tokenizer) -> None:
    """` enumerate` is three tokens of the shipped vocabulary; what follows is predicted from the first."""
    pairs = make_pairs("enumerate_range", shipped_tokenizer, split="train", count=6, seed=0)
    first = shipped_tokenizer(" enumerate")["input_ids"][0]
    assert encode_pairs(pairs, shipped_tokenizer).answer[:6].tolist() == [first] * 6
    assert {pair.answer for pair in pairs} == {shipped_tokenizer.decode([first])}


def test_years_of_greater_than_stand_on_the_side_that_the_prompt_says(english_tokenizer) -> None:
    for split in SPLITS:
        for pair in make_pairs("greater_than", english_tokenizer, split=split, count=24, seed=0):
            year = int(pair.clean.rsplit(" ", 1)[1] + "00")
            first = next(int(y) for y in map(lambda w: w.strip(".,;:"), pair.clean.split()) if y.isdigit())
            assert int(pair.distractor) < first - year < int(pair.answer)


def test_a_users_task_is_called_by_its_files_stem() -> None:
    assert task_label("with_as") == "with_as"
    assert task_label("data/my tasks/colours.jsonl") == "colours"


def test_loss_and_accuracy_of_known_differences() -> None:
    assert two_way_loss(torch.zeros(4)).item() == pytest.approx(math.log(2))
    assert two_way_loss(torch.tensor([100.0, 100.0])).item() == pytest.approx(0)
    assert accuracy(torch.tensor([1.0, -1.0, 2.0, 0.0])) == 0.5


def batch_of(*rows: list[int]) -> TaskBatch:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    nothing = torch.zeros(len(rows), dtype=torch.long)
    return TaskBatch(ids, torch.tensor([len(row) - 1 for row in rows]), nothing, nothing)


def aligned(batch: TaskBatch) -> list[list[int]]:
    """For each token, the counterfactual token that stands for it."""
    activation = batch.ids[..., None].float()
    moved = batch.counterfactual(activation)[..., 0].long().tolist()
    return [row[: int(last) + 1] for row, last in zip(moved, batch.last, strict=True)]


def test_a_substituted_token_is_aligned_in_place() -> None:
    assert aligned(batch_of([5, 6, 7, 8], [5, 9, 7, 8])) == [[5, 9, 7, 8], [5, 6, 7, 8]]


def test_a_token_put_in_takes_the_place_of_the_one_before_it_and_back() -> None:
    batch = batch_of([4, 5, 6, 7, 8], [4, 5, 7, 8])
    assert aligned(batch) == [[4, 5, 5, 7, 8], [4, 6, 7, 8]]
    assert batch.aligned_from().tolist() == [2, 1]


def test_a_longer_replacement_is_aligned_by_its_end() -> None:
    assert aligned(batch_of([3, 4, 5, 1, 7], [3, 4, 5, 6, 8, 9, 7])) == [
        [3, 6, 8, 9, 7],
        [3, 4, 5, 4, 5, 1, 7],
    ]


def test_alignment_ends_at_the_beginning() -> None:
    assert aligned(batch_of([1, 7], [2, 3, 4, 5, 7])) == [[5, 7], [1, 1, 1, 1, 7]]


def test_a_prompt_that_ends_sooner_is_aligned_by_its_end() -> None:
    batch = batch_of([1, 2, 3, 4], [1, 2, 3])
    assert aligned(batch) == [[1, 2, 3, 3], [1, 2, 4]]
    assert batch.aligned_from().tolist() == [3, 2]


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


def test_joined_batches_keep_their_pairs_and_clusters_apart() -> None:
    def batch(width: int, first: int) -> TaskBatch:
        ids = torch.arange(first, first + 4 * width).reshape(4, width)
        answer = torch.tensor([1, 2, 3, 4])
        return TaskBatch(ids, torch.full((4,), width - 1), answer, answer.roll(2), torch.tensor([0, 1, 0, 1]))

    left, right = batch(3, 0), batch(5, 100)
    both = left.join(right)
    assert both.cluster.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    for pair, (own, place) in enumerate([(left, 0), (left, 1), (right, 0), (right, 1)]):
        one = both.select(torch.tensor([pair]))
        alone = own.select(torch.tensor([place]))
        assert torch.equal(one.ids, alone.ids)
        assert torch.equal(one.answer, alone.answer)
        assert torch.equal(one.distractor, alone.distractor)
