"""A user's own task: read, divided, refused in one line that says where and what is allowed."""

import json
import random
from pathlib import Path

import pytest

from extractor.errors import InputError, UsageError
from extractor.task_files import MAX_LINE_BYTES, read_task_file
from extractor.task_words import SPLITS
from extractor.tasks import encode_pairs, make_pairs, refuse_unknown_tasks


def row(index: int, **changes: object) -> dict[str, object]:
    words = {"clean": f"if x{index}", "corrupted": f"while x{index}", "answer": " ==", "distractor": " in"}
    return words | changes


@pytest.fixture
def write(tmp_path: Path):
    def to_file(*lines: dict[str, object] | str, name: str = "mine.jsonl") -> str:
        path = tmp_path / name
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
        return str(path)

    return to_file


def test_lines_become_pairs_that_can_be_encoded(write, shipped_tokenizer) -> None:
    lines = [row(i, split="train", template=i % 3) for i in range(12)]
    name = write(*lines)
    pairs = make_pairs(name, shipped_tokenizer, split="train", count=12, seed=0)
    assert {(p.clean, p.corrupted, p.answer, p.distractor) for p in pairs} == {
        (r["clean"], r["corrupted"], r["answer"], r["distractor"]) for r in lines
    }
    assert {pair.template for pair in pairs} == {0, 1, 2}
    assert all(pair.template == int(pair.clean.removeprefix("if x")) % 3 for pair in pairs)
    assert pairs == make_pairs(name, shipped_tokenizer, split="train", count=12, seed=0)
    assert pairs != make_pairs(name, shipped_tokenizer, split="train", count=12, seed=1)
    assert len(encode_pairs(pairs, shipped_tokenizer)) == 24


def test_lines_without_a_split_are_divided_by_content_whatever_their_order(write) -> None:
    lines = [row(i) for i in range(200)]
    split_of = {line.pair.clean: line.split for line in read_task_file(write(*lines))}
    counts = {split: list(split_of.values()).count(split) for split in SPLITS}
    assert counts["train"] > counts["held_out"] > counts["selection"] > 0
    random.Random(0).shuffle(lines)
    again = {line.pair.clean: line.split for line in read_task_file(write(*lines, name="again.jsonl"))}
    assert again == split_of


def test_a_template_stays_on_one_side_and_lines_without_one_are_their_own(write) -> None:
    named = [row(i, template=f"kind {i % 20}") for i in range(100)]
    sides: dict[int, set[str]] = {}
    for line in read_task_file(write(*named)):
        sides.setdefault(line.pair.template, set()).add(line.split)
    assert len(sides) == 20
    assert all(len(splits) == 1 for splits in sides.values())
    assert len(set.union(*sides.values())) == 3
    alone = read_task_file(write(*(row(i) for i in range(9)), name="alone.jsonl"))
    assert len({line.pair.template for line in alone}) == 9


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    lines = [json.dumps(row(i, clean=f"é {i}"), ensure_ascii=False) for i in range(3)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode() + b"\r\n")
    assert [(line.number, line.pair.clean) for line in read_task_file(str(path))] == [
        (1, "é 0"),
        (3, "é 1"),
        (5, "é 2"),
    ]


REFUSED = {
    "empty": ((), "has no lines"),
    "blank": (("", "  "), "has no lines"),
    "not JSON": ((row(0), "{clean: 1}"), "line 2: not JSON"),
    "not an object": (("[1, 2]",), "line 1: must be a JSON object with clean, corrupted, answer, distractor"),
    "nested too deep": (("[" * 50_000,), "line 1: not "),
    "missing key": (({"clean": "a", "corrupted": "b", "answer": " c"},), "line 1: 'distractor' is missing"),
    "misspelt key": ((row(0, splits="train"),), "line 1: unknown field 'splits'; allowed: clean, corrupted"),
    "a key twice": (('{"clean": "a", "clean": "b"}',), "line 1: a field is given twice"),
    "not a string": ((row(0, answer=3),), "line 1: 'answer' must be a text that is not empty, not 3"),
    "empty string": ((row(0, clean=""),), "line 1: 'clean' must be a text that is not empty"),
    "half a character": ((row(0, clean="\ud800"),), "line 1: 'clean' holds half a surrogate pair"),
    "same prompts": ((row(0, corrupted="if x0"),), "line 1: 'clean' and 'corrupted' are the same"),
    "same answers": ((row(0, distractor=" =="),), "line 1: 'answer' and 'distractor' are the same"),
    "unknown split": ((row(0, split="test"),), "'split' must be one of train, selection, held_out, not \"te"),
    "split of no type": ((row(0, split=["train"]),), "'split' must be one of train, selection, held_out"),
    "template of no type": ((row(0, template=1.5),), "'template' must be a whole number or a text, not 1.5"),
    "template true": ((row(0, template=True),), "'template' must be a whole number or a text, not true"),
    "duplicate": ((row(0), row(1), row(0)), "line 3: repeats line 1"),
    "leak": (
        (row(0, split="train"), row(0, split="held_out", corrupted="for x0")),
        "line 2: 'clean' (held_out) stands in line 1 too (train)",
    ),
    "endless line": ((row(0), "x" * (MAX_LINE_BYTES + 1)), f"line 2: longer than {MAX_LINE_BYTES} bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_said_in_one_line(case: str, write) -> None:
    lines, message = REFUSED[case]
    name = write(*lines)
    with pytest.raises(InputError) as caught:
        refuse_unknown_tasks([name])
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"task file '{name}'")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(name) + 300


def test_what_is_no_readable_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing.jsonl' cannot be read: No such file"):
        refuse_unknown_tasks([str(tmp_path / "missing.jsonl")])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match=r"folder.jsonl' cannot be read: Is a directory"):
        refuse_unknown_tasks([str(tmp_path / "folder.jsonl")])
    (tmp_path / "latin.jsonl").write_bytes('{"clean": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match="line 1: not UTF-8 text"):
        refuse_unknown_tasks([str(tmp_path / "latin.jsonl")])


def test_any_token_may_be_an_answer(write, shipped_tokenizer) -> None:
    """`~` marks first tokens in our own templates; in a file it is a tilde."""
    name = write(row(0, split="train", answer="~", distractor="$"))
    (pair,) = make_pairs(name, shipped_tokenizer, split="train", count=1, seed=0)
    assert (pair.answer, pair.distractor) == ("~", "$")


@pytest.mark.parametrize("field", ["answer", "distractor"])
def test_an_answer_of_several_tokens_names_its_line(field: str, write, shipped_tokenizer) -> None:
    bad = row(1, split="train") | {field: " incomprehensible"}
    name = write(row(0, split="train"), bad)
    with pytest.raises(InputError, match="line 2: the answer ' incomprehensible' is not one token"):
        make_pairs(name, shipped_tokenizer, split="train", count=1, seed=0)


def test_a_prompt_longer_than_the_model_reads_names_its_line(write, shipped_tokenizer) -> None:
    name = write(row(0, split="train"), row(1, split="train", clean="x = 1\n" * 20))
    with pytest.raises(InputError, match="line 2: a prompt has [0-9]+ tokens, the model reads 16"):
        make_pairs(name, shipped_tokenizer, split="train", count=1, seed=0, max_tokens=16)


def test_too_few_pairs_says_how_many_there_are(write, shipped_tokenizer) -> None:
    name = write(*(row(i, split="held_out") for i in range(5)))
    with pytest.raises(InputError, match="64 held_out pairs asked for, it has 5"):
        make_pairs(name, shipped_tokenizer, split="held_out", count=64, seed=0)
    with pytest.raises(InputError, match="1 train pairs asked for, it has 0"):
        make_pairs(name, shipped_tokenizer, split="train", count=1, seed=0)


def test_two_tasks_of_one_name_would_overwrite_each_other(write, tmp_path: Path) -> None:
    first = write(row(0))
    (tmp_path / "other").mkdir()
    second = write(row(0), name="other/mine.jsonl")
    with pytest.raises(UsageError, match="two tasks are called 'mine'"):
        refuse_unknown_tasks([first, second])
    with pytest.raises(UsageError, match="two tasks are called 'with_as'"):
        refuse_unknown_tasks([write(row(0), name="with_as.jsonl")])
    refuse_unknown_tasks([first, first, "with_as"])
