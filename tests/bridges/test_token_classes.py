"""Classes of tokens: every kind, documents that are cut off or broken, characters of several tokens."""

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from bridges.token_classes import (
    CLASSES,
    class_of_texts,
    classify,
    documents,
    kind_of,
    python_spans,
    token_texts,
)
from extractor.data import DataConfig

PROGRAM = '''# how many
def count(words, limit=10):
    """Two
    lines."""
    if not words[0] and limit >= 1.5e3:
        return {"a": f'b', **words}  # done
'''


def names_of(pieces: list[str], kind: str = "python") -> list[str]:
    return [CLASSES[kind][index] for index in class_of_texts(pieces, kind)]


def spans_of(text: str) -> list[tuple[str, str]]:
    return [(text[start:end], name) for start, end, name in python_spans(text)]


def test_every_class_of_python() -> None:
    found = spans_of(PROGRAM)
    expected = {
        "# how many": "comments", "def": "keywords", "count": "names", "(": "brackets", "=": "operators",
        "10": "numbers", '"""Two\n    lines."""': "strings", "not": "keywords", "]": "brackets",
        "and": "keywords", ">=": "operators", "1.5e3": "numbers", "{": "brackets", '"a"': "strings",
        "**": "operators", "# done": "comments",
    }  # fmt: skip
    assert expected.items() <= dict(found).items()
    assert names_of(["\n    ", " ", "\n"]) == ["indentation"] * 3


def test_a_token_has_the_class_of_its_first_character_that_is_no_space() -> None:
    pieces = ["if", " x", ":", "\n    return", ' "a', " ", ' b"', "):\n", "    ", " $"]
    classes = ["keywords", "names", "operators", "keywords", "strings", "strings", "strings", "brackets"]
    assert names_of(pieces) == [*classes, "indentation", "other"]


@pytest.mark.parametrize("length", range(0, len(PROGRAM), 7))
def test_a_document_that_is_cut_off_keeps_the_classes_of_what_is_there(length: int) -> None:
    """All but the lexical token that the cut goes through, which may be another one now."""
    whole = list(python_spans(PROGRAM))
    inside = [span for span in whole if span[1] < length]
    cut = list(python_spans(PROGRAM[:length]))
    assert cut[: len(inside)] == inside
    broken = [span for span in whole if span[0] < length <= span[1] and span[2] == "strings"]
    if broken and PROGRAM[broken[0][0] :].startswith('"""'):
        assert cut[-1][2] == "strings"


def test_what_follows_a_line_that_is_not_python_is_still_told() -> None:
    text = "if a:\n        b = 1\n    c = 2\nd = 0777 ?\x00 !\nprint 'e' $\nclass F: pass\n"
    found = spans_of(text)
    assert {("b", "names"), ("2", "numbers"), ("class", "keywords"), ("F", "names")} <= set(found)
    assert ("c", "names") in found
    assert all(
        spans_of(broken) is not None for broken in ("", "\n", "'", '"""', ")", "\\", "\f", "\ufeff", "(")
    )


def test_other_text_has_words_numbers_and_punctuation() -> None:
    pieces = ["It", " was", " 19", "84", ",", "\n\n", " über", " 中", "…", "_x"]
    expected = ["words", "words", "numbers", "numbers", "punctuation", "whitespace", "words", "words"]
    assert names_of(pieces, "text") == [*expected, "punctuation", "words"]


def test_texts_of_tokens_are_the_text_of_all(shipped_tokenizer) -> None:
    text = "x = 'naïve 中文 🎉'  # ok\n\n\tdef f(): ...\n . , 's"
    ids = shipped_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_texts(ids, shipped_tokenizer)
    assert len(pieces) == len(ids) > len([piece for piece in pieces if piece])
    assert "".join(pieces) == text
    # a character whose first bytes are missing takes nothing from the rest
    for start in range(len(ids)):
        rest = "".join(token_texts(ids[start:], shipped_tokenizer)).lstrip("\ufffd")
        assert rest
        assert text.endswith(rest)


def test_a_tokenizer_that_drops_the_first_space_keeps_it_here() -> None:
    words = ["\u2581a", "\u2581import", "\u2581x", "</s>"]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="</s>"))
    backend.pre_tokenizer, backend.decoder = Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.decode([2]) == "x"
    assert token_texts([1, 2], tokenizer) == [" import", " x"]


def test_documents_are_classified_by_themselves(shipped_tokenizer) -> None:
    end = shipped_tokenizer.eos_token_id
    texts = ['a = """never closed\n', "return 1\n", "# last"]
    rows = [shipped_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = torch.tensor([*rows[0], end, *rows[1], end, *rows[2]])
    document = documents(ids, end)
    assert document.bincount().tolist() == [len(rows[0]) + 1, len(rows[1]) + 1, len(rows[2])]
    found = classify(ids, shipped_tokenizer, "python")
    assert ((found >= 0) & (found < len(CLASSES["python"]))).all()
    names = [CLASSES["python"][index] for index in found.tolist()]
    assert [name == "end of text" for name in names] == (ids == end).tolist()
    assert names[len(rows[0]) - 1] == "strings"
    assert names[len(rows[0]) + 1] == "keywords"  # the string before is not still open
    assert set(names[-len(rows[2]) :]) == {"comments"}
    some = classify(ids, shipped_tokenizer, "python", torch.tensor([1, 1]))
    assert torch.equal(some, torch.where(document == 1, found, -1))


def test_the_sources_tell_whether_text_is_python() -> None:
    assert kind_of(DataConfig()) == "python"
    assert kind_of(DataConfig(source="folder")) == "python"  # its pattern is **/*.py
    assert kind_of(DataConfig(source="folder", pattern="**/*.txt")) == "text"
    mixed = [{"path": "python"}, {"path": "org/books"}]
    assert kind_of(DataConfig(datasets=mixed)) == "text"
    assert kind_of(DataConfig(held_out="held_out.txt")) == "text"
