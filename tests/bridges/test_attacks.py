"""Attacks: edits that change no answer, a search by the circuit alone, and what the models make of them."""

import ast
import json

import pytest
import torch

from bridges.attacks import (
    KINDS,
    AttackConfig,
    Insert,
    Prompts,
    Spans,
    apply,
    attack_circuit,
    comment_places,
    place_for,
    random_edits,
    search,
)
from bridges.dense import DenseModel
from bridges.readout import last_differences
from bridges.warm_start import StudentShape, make_student
from extractor.circuit import Circuit, edges_between
from extractor.masks import mean_activations
from extractor.rotation import RotationConfig
from extractor.sites import Node
from extractor.tasks import make_pairs, task_names

CONFIG = AttackConfig(spans=2, span_tokens=8, candidates=3, random_edits=2)
CODE = '''import os


def area(width, height=3):
    """Return
    the area."""
    total = [
        width,
        height,
    ]
    if width and \\
            height:
        return total[0] * total[1]

    return None
'''


@pytest.fixture(scope="module")
def dense(tiny_checkpoint) -> DenseModel:
    return DenseModel.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def student(dense):
    return make_student(dense, StudentShape(), RotationConfig(enabled=False))[0].requires_grad_(False)


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(1, 2000, (8, 32), generator=torch.Generator().manual_seed(2))


def prompts_of(tokenizer, place="comment", most_tokens=128, task="bracket_paren") -> Prompts:
    pairs = make_pairs(task, tokenizer, split="held_out", count=6, seed=0, max_tokens=100)
    return Prompts(pairs, tokenizer, place, most_tokens, torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(shipped_tokenizer) -> Prompts:
    return prompts_of(shipped_tokenizer)


def margins(dense: DenseModel):
    return lambda batch: last_differences(dense, batch)


# --- edits -------------------------------------------------------------------------------------------------


def test_a_comment_changes_no_program() -> None:
    places = comment_places(CODE)
    for place in places:
        edited = apply(CODE, [Insert(place, "    # ( [ { ''' \"\n")])
        assert ast.dump(ast.parse(edited)) == ast.dump(ast.parse(CODE))
    inside = {CODE.index(line) for line in ("    the area", "        width", "    ]", "            height:")}
    assert not inside & set(places)
    assert {0, CODE.index("def"), CODE.index("    total"), CODE.index("    if"), len(CODE)} <= set(places)


def test_the_first_insert_stands_nearest() -> None:
    edits = [Insert(3, "1"), Insert(0, "2"), Insert(3, "3")]
    assert apply("abcdef", edits) == "2abc31def"
    assert apply("abcdef", []) == "abcdef"


def test_a_comment_is_one_line_indented_like_the_next(prompts) -> None:
    generator = torch.Generator().manual_seed(0)
    for example, text in enumerate(prompts.texts):
        for _ in range(5):
            insert = prompts.insert(example, " a\n  b\r\n c", generator)
            assert insert.text.strip(" ") == "# a b c\n"
            following = text[insert.place :]
            assert len(insert.text) - len(insert.text.lstrip()) == len(following) - len(following.lstrip(" "))


def test_a_document_ends_before_the_prompt(shipped_tokenizer) -> None:
    prompts = prompts_of(shipped_tokenizer, "document")
    generator = torch.Generator().manual_seed(0)
    edits = [[prompts.insert(i, " an (open", generator)] for i in range(len(prompts))]
    batch, fits = prompts.edited(edits)
    assert all(fits)
    added = batch.last - prompts.batch.last
    for i, row in enumerate(batch.ids.tolist()):
        own = prompts.batch.ids[i, : prompts.batch.last[i] + 1].tolist()
        assert row[added[i] : batch.last[i] + 1] == own
        assert row[added[i] - 1] == shipped_tokenizer.eos_token_id


def test_no_edit_is_the_batch_itself(prompts) -> None:
    batch, fits = prompts.edited([[]] * len(prompts))
    assert all(fits)
    for name in batch.__dataclass_fields__:
        assert torch.equal(getattr(batch, name), getattr(prompts.batch, name))


def test_what_does_not_fit_stays_as_it_is(shipped_tokenizer) -> None:
    longest = int(prompts_of(shipped_tokenizer).batch.last.max()) + 1
    prompts = prompts_of(shipped_tokenizer, most_tokens=longest)
    edits = [[Insert(0, "# some words\n" * (1 + 20 * (i % 2)))] for i in range(len(prompts))]
    batch, fits = prompts.edited(edits)
    assert int(batch.last.max()) < longest
    assert any(fits)
    assert not any(fits[1::2])
    same = batch.last == prompts.batch.last
    assert same.tolist() == [not fit for fit in fits]
    broken, fits = prompts.edited([[Insert(len(text), "(")] for text in prompts.texts])
    assert not any(fits)  # another last token is another prompt
    assert torch.equal(broken.ids, prompts.batch.ids)


def test_distractors_come_from_the_other_side_of_other_pairs(prompts, text) -> None:
    spans = Spans.of("distractor", prompts, text, 8)
    half = len(prompts) // 2
    for example, rows in enumerate(spans.allowed):
        assert len(rows) == half - 1
        assert all((row < half) != (example < half) and row % half != example % half for row in rows)
        for row in rows:
            assert prompts.texts[row].endswith(spans.texts[row])


def test_dilution_is_text_of_the_same_number_of_tokens(prompts, text, shipped_tokenizer) -> None:
    spans = Spans.of("dilution", prompts, text, 8)
    assert len(spans.texts) == text.numel() // 8
    assert spans.texts[1] == shipped_tokenizer.decode(text[0, 8:16])


def test_only_python_takes_comments() -> None:
    assert {task for task in task_names() if place_for(task) == "document"} >= {"indirect_object"}
    assert place_for("bracket_paren") == "comment"
    assert place_for("folder/own.jsonl") == "document"


# --- the search --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_lowers_the_margins(dense, prompts, text, kind) -> None:
    """Every edit it keeps does; more budget never does worse."""
    answers, spans = margins(dense), Spans.of(kind, prompts, text, 8)
    last = answers(prompts.batch)
    for rounds in (1, 2):
        found = search(answers, prompts, spans, CONFIG.model_copy(update={"spans": rounds}))
        now = answers(prompts.edited(found)[0])
        assert (now <= last + 1e-4).all()
        assert (now < last - 1e-3).any()
        assert max(map(len, found)) <= rounds
        last = now


def test_the_same_seed_gives_the_same_edits(dense, prompts, text) -> None:
    answers, spans = margins(dense), Spans.of("distractor", prompts, text, 8)
    one, again, other = (
        search(answers, prompts, spans, CONFIG.model_copy(update={"seed": seed})) for seed in (0, 0, 1)
    )
    assert one == again
    assert one != other


def test_random_edits_are_as_many(dense, prompts, text) -> None:
    spans = Spans.of("distractor", prompts, text, 8)
    found = search(margins(dense), prompts, spans, CONFIG)
    drawn = random_edits(found, prompts, spans, torch.Generator().manual_seed(0))
    assert [len(own) for own in drawn] == [len(own) for own in found]
    assert drawn != found
    assert all(prompts.edited(drawn)[1])


# --- what the models make of them --------------------------------------------------------------------------


def attack(student, dense, prompts, text, config, nodes=None, task="bracket_paren"):
    means = mean_activations(student, text)
    every = [Node(address, c) for address, mean in means.items() for c in range(len(mean))]
    chosen = frozenset(every if nodes is None else every[::nodes])
    circuit = Circuit(task, chosen, edges_between(student, chosen), "none", {})
    return attack_circuit(circuit, student, dense, means, prompts, text, config)


def test_a_perfect_explanation_predicts_everything(student, dense, prompts, text) -> None:
    """The circuit is the whole student, the student the dense model: all three say the same."""
    found = attack(student, dense, prompts, text, CONFIG)
    json.dumps(found, allow_nan=False)
    for kind in KINDS:
        models = found[kind]["models"]
        assert models["circuit"]["found"]["value"] > 0
        for name in ("student", "dense"):
            for figure in ("found", "random", "found_minus_random"):
                assert models[name][figure]["value"] == pytest.approx(models["circuit"][figure]["value"])
        prediction = found[kind]["prediction"]
        assert prediction["dense_fails_where_predicted"]["value"] == 1
        assert prediction["dense_fails_elsewhere"]["value"] == 0
        assert prediction["correlation_of_margin_changes"] == pytest.approx(1, abs=1e-3)


def test_without_a_budget_nothing_changes(student, dense, prompts, text) -> None:
    found = attack(student, dense, prompts, text, CONFIG.model_copy(update={"spans": 0}), nodes=3)
    for kind in KINDS:
        assert found[kind]["spans_mean"] == found[kind]["tokens_added_mean"] == 0
        assert found[kind]["examples"] == []
        for name in ("circuit", "student", "dense"):
            facts = found[kind]["models"][name]
            assert facts["found"]["value"] == facts["random"]["value"] == 0
            for figure in ("margin_found", "margin_random"):
                assert facts[figure] == pytest.approx(facts["margin_before"], rel=1e-6)


def test_the_examples_are_the_edits(student, dense, prompts, text) -> None:
    found = attack(student, dense, prompts, text, CONFIG, nodes=2)
    shown = [example for kind in KINDS for example in found[kind]["examples"]]
    assert shown
    for example in shown:
        kept = [line for line in example["edited"].split("\n") if line in example["prompt"].split("\n")]
        assert "\n".join(kept) == example["prompt"]
        assert example["margin_before"]["dense"] > 0
