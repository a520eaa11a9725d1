"""Interventions: strengths, positions and conditions, in a forward and while generating."""

import json

import pytest
import torch

from extractor.cache_name import CACHE_NAME, cache_of
from extractor.errors import InputError, UsageError
from extractor.intervention import Change, Condition, Intervention, ablate, clamp, patch, steer
from extractor.masks import mean_activations
from extractor.sites import NODE_KINDS, Node, Recorder, compose
from extractor.student import Student
from extractor.tasks import TaskBatch
from tests.conftest import tiny_student_config

NODES = [Node("0.attn.act_in", 3), Node("0.mlp.post_act", 11), Node("1.attn.v", 5)]
GENERATE = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}


def recorded(student: Student, ids: torch.Tensor, tap=None, **options) -> tuple[Recorder, torch.Tensor]:
    recorder = Recorder()
    logits = student(ids, tap=recorder if tap is None else compose(tap, recorder), **options).logits
    return recorder, logits.detach()


def counterfactual(student: Student, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return recorded(student, ids.roll(1, 0))[0].activations


@pytest.mark.parametrize("kind", ["ablate", "clamp", "steer", "patch"])
def test_strength_moves_a_node_on_a_line_from_itself_to_the_new_value(student, tokens, kind) -> None:
    """In every node kind: exactly itself at 0, exactly the target at 1, linear between and beyond."""
    means = mean_activations(student, tokens)
    other = counterfactual(student, tokens)
    for address in [f"1.{kind}" for kind in NODE_KINDS]:
        node = Node(address, 2)
        make = {
            "ablate": lambda node=node, **w: ablate([node], means, **w),
            "clamp": lambda node=node, **w: clamp([node], [1.5], **w),
            "steer": lambda node=node, **w: steer([node], [1.5], **w),
            "patch": lambda node=node, **w: patch([node], **w),
        }[kind]
        plain, logits = recorded(student, tokens)
        old = plain[address]
        full = {
            "ablate": means[address][2].expand_as(old[..., 2]),
            "clamp": torch.full_like(old[..., 2], 1.5),
            "steer": old[..., 2] + 1.5,
            "patch": other[address][..., 2],
        }[kind]
        for strength in (0.0, 0.25, 1.0, 1.75, -0.5):
            seen, moved = recorded(student, tokens, make(strength=strength).tap(counterfactual=other))
            expected = old[..., 2] + strength * (full - old[..., 2])
            torch.testing.assert_close(seen[address][..., 2], expected, atol=1e-6, rtol=1e-6)
            untouched = [c for c in range(old.shape[-1]) if c != 2]
            assert torch.equal(seen[address][..., untouched], old[..., untouched])
            if strength == 0:
                assert torch.equal(moved, logits)
            if strength == 1:
                assert torch.equal(seen[address][..., 2], full)


def test_positions_and_conditions_choose_where(student, tokens) -> None:
    condition = Condition(Node("0.attn.act_in", 7), ">", 0.1)
    last = torch.tensor([11, 4, 8])
    plain, _ = recorded(student, tokens)
    holds = plain["0.attn.act_in"][..., 7] > 0.1
    assert 0 < holds.sum() < holds.numel()
    column = torch.arange(12)[None]
    where = {
        ("all", None): torch.ones_like(holds),
        ("last", None): column == last[:, None],
        ("from_last", None): column >= last[:, None],
        ("all", condition): holds,
        ("last", condition): holds & (column == last[:, None]),
    }
    node = Node("0.mlp.act_in", 3)
    for (positions, when), expected in where.items():
        edit = clamp([node], [9.0], positions=positions, condition=when)
        seen, _ = recorded(student, tokens, edit.tap(last=last))
        assert torch.equal(seen[node.address][..., 3] == 9.0, expected), (positions, when)


def test_a_condition_reads_its_node_before_any_change(student, tokens) -> None:
    node = Node("0.mlp.act_in", 3)
    plain, _ = recorded(student, tokens)
    holds = plain[node.address][..., 3] > 0
    both = clamp([node], [-5.0]) + clamp([node], [5.0], condition=Condition(node, ">", 0.0))
    seen, _ = recorded(student, tokens, both.tap())
    assert torch.equal(seen[node.address][..., 3] == 5.0, holds)
    assert torch.equal(seen[node.address][..., 3] == -5.0, ~holds)


def test_composed_interventions_apply_in_order_and_scale_together(student, tokens) -> None:
    node = Node("1.mlp.post_act", 4)
    plain, _ = recorded(student, tokens)
    old = plain[node.address][..., 4]
    seen, _ = recorded(student, tokens, (clamp([node], [2.0]) + steer([node], [0.5])).tap())
    assert torch.equal(seen[node.address][..., 4], torch.full_like(old, 2.5))
    half = (steer([node], [0.5]) + steer([node], [1.5], strength=3.0)).scaled(0.5)
    seen, _ = recorded(student, tokens, half.tap())
    torch.testing.assert_close(seen[node.address][..., 4], old + 0.25 + 2.25)
    # two taps one after the other are the composed one
    one, two = steer(NODES, [1.0, 2.0, 3.0]), ablate(NODES[:1])
    _, together = recorded(student, tokens, (one + two).tap())
    _, chained = recorded(student, tokens, compose(one.tap(), two.tap()))
    assert torch.equal(together, chained)


def test_a_patch_of_everything_is_the_counterfactual_prompt(student, tokens) -> None:
    nodes = [Node("0.attn.act_in", c) for c in range(32)] + [Node("0.mlp.act_in", c) for c in range(32)]
    nodes += [Node(f"{layer}.{kind}.resid_delta", c) for layer in (0, 1) for kind in ("attn", "mlp")
              for c in range(32)]  # fmt: skip
    pairs = torch.cat([tokens, tokens])
    pairs[:3, 5], pairs[3:, 5] = 11, 12
    batch = TaskBatch(pairs, torch.full((6,), 11), torch.zeros(6).long(), torch.ones(6).long())
    plain, logits = recorded(student, pairs)
    other = {address: batch.counterfactual(a) for address, a in plain.activations.items()}
    _, patched = recorded(student, pairs, patch(nodes).tap(counterfactual=other))
    # every write after the embedding is the partner's; where the tokens agree so does the embedding
    agree = [position for position in range(12) if position != 5]
    torch.testing.assert_close(patched[:, agree], logits.roll(3, 0)[:, agree], atol=1e-5, rtol=1e-5)
    assert (patched - logits).abs().max() > 0.01


# --- while generating --------------------------------------------------------------------------------------


def every_intervention() -> dict[str, Intervention]:
    condition = Condition(Node("0.attn.act_in", 7), ">", 0.1)
    loud = [8.0, -8.0, 8.0]
    return {
        "all": steer(NODES, loud),
        "last": clamp(NODES, loud, positions="last"),
        "from_last": steer(NODES, loud, positions="from_last"),
        "condition": steer(NODES[1:], loud[1:], condition=condition),
        "patch": patch([Node("0.mlp.act_in", c) for c in range(32)]),
    }


@pytest.mark.parametrize("name", every_intervention())
def test_generation_is_the_same_with_and_without_the_cache(student, tokens, name) -> None:
    edit = every_intervention()[name]
    options = GENERATE | {"attention_mask": torch.ones_like(tokens)}
    unedited = student.generate(tokens, **options)
    with edit.applied(student, counterfactual=counterfactual(student, tokens)):
        cached = student.generate(tokens, use_cache=True, **options)
        assert torch.equal(cached, student.generate(tokens, use_cache=False, **options))
    assert not torch.equal(cached, unedited)
    assert torch.equal(student.generate(tokens, **options), unedited)  # and it is gone afterwards


@pytest.mark.parametrize("name", every_intervention())
def test_cached_steps_give_the_logits_of_the_whole_prompt(student, tokens, name) -> None:
    edit, other = every_intervention()[name], counterfactual(student, tokens)
    prompt = 7
    last = torch.full((3,), prompt - 1)
    other = {address: value[:, :prompt] for address, value in other.items()}
    with torch.no_grad():
        whole = student(tokens, tap=edit.tap(last=last, counterfactual=other)).logits
        with edit.applied(student, counterfactual=other):
            first = student(tokens[:, :prompt], use_cache=True)
            steps = [first.logits]
            for i in range(prompt, 12):
                cache = {CACHE_NAME: cache_of(first)}
                steps.append(student(tokens[:, i : i + 1], **cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["all", "last", "from_last", "condition"])
def test_left_padding_changes_no_prompt(student, tokens, name) -> None:
    """A padded batch generates, row by row, what each prompt generates alone."""
    edit, short = every_intervention()[name], 7
    padded = tokens[:2].clone()
    padded[0, : 12 - short] = 0
    mask = torch.ones_like(padded)
    mask[0, : 12 - short] = 0
    with edit.applied(student):
        batch = student.generate(padded, attention_mask=mask, **GENERATE)
        one = tokens[:1, 12 - short :]
        alone = student.generate(one, attention_mask=torch.ones_like(one), **GENERATE)
    assert torch.equal(batch[:1, 12:], alone[:, short:])


def test_right_padding_edits_each_prompts_own_last_token(student, tokens) -> None:
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    node = Node("0.mlp.act_in", 3)
    recorder = Recorder()
    with clamp([node], [9.0], positions="last").applied(student):
        student(tokens, attention_mask=mask, tap=recorder)
    assert (recorder[node.address][..., 3] == 9.0).nonzero().tolist() == [[0, 4], [1, 11], [2, 11]]


def test_several_returned_sequences_each_follow_their_prompt(student, tokens) -> None:
    other = counterfactual(student, tokens)
    options = GENERATE | {"attention_mask": torch.ones_like(tokens), "do_sample": True, "top_k": 1}
    with every_intervention()["patch"].applied(student, counterfactual=other):
        one = student.generate(tokens, **options)
        two = student.generate(tokens, num_return_sequences=2, **options)
    assert torch.equal(two, one.repeat_interleave(2, 0))


def test_sparse_activations_are_changed_after_they_were_chosen() -> None:
    student = Student(tiny_student_config(activation_frac=0.25)).eval()
    ids = torch.arange(1, 9)[None]
    node = Node("0.mlp.post_act", 1)
    plain, _ = recorded(student, ids)
    seen, _ = recorded(student, ids, clamp([node], [3.0]).tap())
    assert (seen[node.address][..., 1] == 3.0).all()
    others = [c for c in range(48) if c != 1]
    assert torch.equal(seen[node.address][..., others], plain[node.address][..., others])


# --- files -------------------------------------------------------------------------------------------------


def test_json_round_trip_and_students(tmp_path) -> None:
    condition = Condition(Node("0.attn.act_in", 7), "<=", -0.25)
    edit = clamp(NODES, [1.0, 2.0, 0.1], positions="last", condition=None) + patch(NODES, strength=1.5)
    edit = (edit + steer(NODES[2:], [0.3], condition=condition)).of_student("abc")
    edit.save(tmp_path / "edit.json")
    assert json.loads((tmp_path / "edit.json").read_text())["schema_version"] == 1
    assert Intervention.load(tmp_path / "edit.json", "abc") == edit
    with pytest.raises(InputError, match="belongs to a student with weights abc, this one has def"):
        Intervention.load(tmp_path / "edit.json", "def")
    with pytest.raises(InputError, match="two students"):
        edit + steer(NODES, [1.0] * 3).of_student("def")
    assert (edit + steer(NODES, [1.0] * 3)).student_sha256 == "abc"


@pytest.mark.parametrize(
    "damage",
    [{"kind": "explode"}, {"nodes": ["0.attn.q"]}, {"values": [1.0]}, {"positions": "first"},
     {"condition": {"node": "0.attn.q:1"}}, {"nodes": 3},
     {"condition": {"node": "0.attn.act_in:1", "comparison": "=", "threshold": 0.0}}],
)  # fmt: skip
def test_damaged_files_are_refused_in_one_line(tmp_path, damage) -> None:
    value = {"schema_version": 1, **clamp(NODES, [1.0, 2.0, 3.0]).as_json()}
    value["changes"][0] |= damage
    (tmp_path / "edit.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="edit.json' is damaged: "):
        Intervention.load(tmp_path / "edit.json")


def test_changes_that_make_no_sense_are_refused(student, tokens) -> None:
    node = NODES[0]
    for make, message in (
        (lambda: clamp([], []), "at least one node"),
        (lambda: clamp([node, node], [1.0, 2.0]), "each once"),
        (lambda: clamp([node], []), "0 values; it takes one value for each of 1 nodes"),
        (lambda: Change("patch", (node,), (1.0,)), "it takes no value"),
        (lambda: steer([node], [float("nan")]), "finite"),
        (lambda: steer([node], [1.0], condition=Condition(NODES[2], ">", 0.0)), "is computed after"),
        (lambda: patch([node]).tap(), "give the counterfactual"),
        (lambda: student(tokens, tap=patch([node]).tap(counterfactual={"x": tokens[..., None].float()})),
         "no activations at 0.attn.act_in"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            make()
