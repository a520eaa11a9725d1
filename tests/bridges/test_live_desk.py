"""The live desk on a small run folder: identities, agreement with the recorded desk, the files it leaves."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from bridges.cli import main
from bridges.dense import DenseModel
from bridges.desk import Desk
from bridges.edit import Edit, EditLimits
from bridges.evaluate import measure_energies_
from bridges.live import LiveEdit
from bridges.service.desk_prompt import CASES
from bridges.service.desk_request import DeskRequest
from bridges.service.live_desk import LiveDesk
from bridges.warm_start import StudentShape, make_student
from extractor.errors import InputError, UsageError
from extractor.intervention import Intervention, ablate, clamp, patch, steer
from extractor.rotation import RotationConfig
from extractor.sites import Node, Recorder, Site
from extractor.tasks import Pair, encode_pairs
from tests.families import tiny_model
from tests.families import tokens as family_tokens
from tests.live_run import ADDRESSES, LAST_WRITE, OF_EDIT, READS, TASKS, make_live_run


@pytest.fixture(scope="module")
def run(tiny_checkpoint, shipped_tokenizer, tmp_path_factory) -> Path:
    return make_live_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_checkpoint, shipped_tokenizer)


@pytest.fixture(scope="module")
def desk(run) -> LiveDesk:
    return LiveDesk.of_run(run)


def request_of(desk: LiveDesk, **changes: Any) -> DeskRequest:
    example = desk.models.circuits["with_as"].evidence["example"]
    settings = {"task": "with_as", "nodes": READS, "prompt": example["clean"], "strength": 4.0}
    if changes.get("kind", "patch") == "patch":
        settings["counterfactual"] = example["corrupted"]
    return DeskRequest(**(settings | changes))


# --- activations that are given ----------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["Llama", "GPT-2", "GPT-NeoX, Pythia (parallel)", "Mistral (sliding window)"])
def test_given_activations_are_those_of_the_student_run_alongside(row) -> None:
    dense, ids = DenseModel(tiny_model(row)), family_tokens(9)
    student, bridges = make_student(dense, StudentShape(), RotationConfig(enabled=False))
    measure_energies_(dense, student, bridges, ids)
    early, late, inner = (Node(a, 3) for a in ("0.attn.act_in", "1.attn.act_in", "0.attn.v"))
    plain = clamp([early], [4.0]) + patch([late], strength=1.5) + steer([late], [2.0], positions="last")
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    student.register_forward_pre_hook(count)
    for intervention, expected_runs in ((plain, 0), (plain + ablate([inner]), 1)):
        live = LiveEdit(Edit.from_intervention(intervention, student, bridges), dense, student)
        recorder = Recorder()
        with torch.no_grad():
            student(ids, tap=recorder)
            other = {address: value.roll(1, 0) for address, value in recorder.activations.items()}
            with live.applied(counterfactual=other) as model:
                expected = model(ids, use_cache=False).logits
            runs = 0
            with live.applied(counterfactual=other, presented=recorder.activations) as model:
                given = model(ids, use_cache=False).logits
        assert torch.equal(given, expected)
        assert runs == expected_runs
        assert (given - dense.model(ids).logits).abs().max() > 0.01


def test_given_activations_are_for_one_forward_of_these_prompts(dense, tokens) -> None:
    student, bridges = make_student(dense, StudentShape(), RotationConfig(enabled=False))
    change = clamp([Node("1.attn.act_in", 3)], [4.0])
    live = LiveEdit(Edit.from_intervention(change, student, bridges), dense, student)
    presented = live.read(tokens)
    with live.applied(presented=presented) as model:
        for ids in (tokens[:, :5], tokens[:1]):
            with pytest.raises(UsageError, match="not of the whole prompts of this forward"):
                model(ids)
        for cached in (True, False):
            with pytest.raises(UsageError, match="leave them out where tokens are generated"):
                model.generate(tokens, max_new_tokens=3, use_cache=cached, do_sample=False)
    one = tokens[:, :1]  # its second token has the shape of the first
    with live.applied(presented=live.read(one)) as model, pytest.raises(UsageError, match="whole prompts"):
        model.generate(one, max_new_tokens=3, do_sample=False)
    with (
        live.applied(presented={}) as model,
        pytest.raises(UsageError, match="no activations at 1.attn.act_in"),
    ):
        model(tokens)


# --- identities --------------------------------------------------------------------------------------------

KINDS = [{"kind": "patch"}, {"kind": "mean"}, {"kind": "zero"}, {"kind": "steer", "value": 5.0}]


def is_unchanged(found: dict[str, Any]) -> bool:
    both = [found[model] for model in ("student", "dense")]
    return all(own["before"] == own["after"] and own["kl"] == 0 and not own["changed"] for own in both)


@pytest.mark.parametrize("change", KINDS, ids=lambda change: change["kind"])
@pytest.mark.parametrize("address", ADDRESSES)
def test_strength_zero_changes_nothing_and_another_does(desk, change, address) -> None:
    nodes = [f"{address}:3", f"{address}:9"]
    found = desk.intervene(request_of(desk, nodes=nodes, **change | {"strength": 0.0}))
    assert is_unchanged(found)
    found = desk.intervene(request_of(desk, nodes=nodes, **change | {"strength": 9.0}))
    assert not is_unchanged(found)
    assert min(found[model]["kl"] for model in ("student", "dense")) > 1e-9
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_prompt_that_is_its_own_counterfactual_changes_nothing(desk, address) -> None:
    prompt = request_of(desk).prompt
    changes = {"nodes": [f"{address}:3"], "counterfactual": prompt, "strength": 2.0}
    found = desk.intervene(request_of(desk, **changes, continuation=4))
    assert is_unchanged(found)
    for model in ("student", "dense"):
        assert found[model]["continuation"]["before"] == found[model]["continuation"]["after"]


@pytest.mark.parametrize("change", KINDS, ids=lambda change: change["kind"])
@pytest.mark.parametrize("task", ["with_as", "longer"])
def test_it_answers_as_the_recorded_desk_does(desk, change, task) -> None:
    """Which runs both prompts of a pair as one padded batch, and the student alongside."""
    models, circuit = desk.models, desk.models.circuits[task]
    pair = Pair(**circuit.evidence["example"], template=0)
    batch = encode_pairs([pair], models.tokenizer)
    recorded = Desk(models.dense, models.student, models.bridges, batch, circuit)
    for nodes, positions in (
        (READS, "all"),
        (["0.mlp.post_act:9"], "last"),
        (["0.attn.v:3", "1.attn.act_in:9"], "from_last"),
    ):
        parsed, where = [Node.parse(name) for name in nodes], {"strength": 6.0, "positions": positions}
        intervention = {
            "patch": patch(parsed, **where),
            "mean": ablate(parsed, models.means, **where),
            "zero": ablate(parsed, **where),
            "steer": steer(parsed, [5.0] * len(parsed), **where),
        }[change["kind"]]
        expected = {"student": recorded.in_student(intervention), "dense": recorded.in_dense(intervention)}
        for row, (prompt, other) in enumerate([(pair.clean, pair.corrupted), (pair.corrupted, pair.clean)]):
            texts = {"task": task, "prompt": prompt, "counterfactual": other}
            found = desk.intervene(request_of(desk, nodes=nodes, **change, **texts, **where))
            for model, (difference, top) in expected.items():
                unedited = recorded.unedited[model][0][row].item()
                assert found[model]["difference"]["before"] == pytest.approx(unedited, abs=2e-3)
                assert found[model]["difference"]["after"] == pytest.approx(difference[row].item(), abs=2e-3)
                most_likely = max(found[model]["after"], key=lambda token: token["probability"])
                assert most_likely["id"] == top[row].item()


def test_distributions_stand_side_by_side(desk) -> None:
    found = desk.intervene(request_of(desk, kind="steer", value=9.0, top=3))["dense"]
    with torch.no_grad():
        ids = desk.models.tokenizer(request_of(desk).prompt, return_tensors="pt", add_special_tokens=False)
        chances = desk.models.dense.model(ids["input_ids"]).logits[0, -1].double().softmax(-1)
    assert [row["id"] for row in found["before"]] == [row["id"] for row in found["after"]]
    assert {*chances.topk(3).indices.tolist()} <= {row["id"] for row in found["before"]}
    assert 3 <= len(found["before"]) <= 6
    for row in found["before"]:
        assert row["probability"] == pytest.approx(chances[row["id"]].item(), rel=1e-4)
        assert row["text"] == desk.models.tokenizer.decode([row["id"]])


def test_a_continuation_is_what_the_edited_models_generate(desk) -> None:
    request = request_of(desk, kind="steer", value=9.0, positions="from_last", continuation=5)
    found, models = desk.intervene(request), desk.models
    ids = models.tokenizer(request.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    nodes = [Node.parse(name) for name in READS]
    change = steer(nodes, [9.0, 9.0], positions="from_last", strength=4.0)
    edit = Edit.from_intervention(change, models.student, models.bridges)
    live = LiveEdit(edit, models.dense, models.student)
    for name, context in {"student": change.applied(models.student), "dense": live.applied()}.items():
        grown = ids
        with torch.no_grad(), context as model:
            for _ in range(5):
                grown = torch.cat([grown, model(grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert found[name]["continuation"]["after"] == models.tokenizer.decode(grown[0, ids.shape[1] :])
        assert found[name]["continuation"]["before"] != found[name]["continuation"]["after"]


# --- what is kept, and what is refused ---------------------------------------------------------------------


def test_an_intervention_takes_one_forward_of_each_model_and_the_cache_is_bounded(run) -> None:
    desk = LiveDesk.of_run(run)
    counts = {"student": 0, "dense": 0}
    for name, model in (("student", desk.models.student), ("dense", desk.models.dense.model)):
        model.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    desk.intervene(request_of(desk))
    assert counts == {"student": 3, "dense": 2}  # both prompts in the student, and the change in both models
    desk.intervene(request_of(desk, strength=1.0))
    assert counts == {"student": 4, "dense": 3}
    prompts = [f"with open(a{number}) as" for number in range(CASES + 1)]
    for prompt in [*prompts[:CASES], prompts[0], prompts[-1]]:
        desk.intervene(request_of(desk, kind="zero", prompt=prompt))
    for prompt, kept in ((prompts[-1], True), (prompts[0], True), (prompts[1], False)):
        counts["dense"] = 0
        desk.intervene(request_of(desk, kind="zero", prompt=prompt))
        assert counts["dense"] == (1 if kept else 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "nonsense"}, "no circuit of 'nonsense'"),
        ({"nodes": ["0.mlp.act_in:4"]}, "0.mlp.act_in:4 is no node of the circuit of 'with_as'"),
        ({"nodes": ["0.mlp.act_in"]}, "write it as <layer>.<kind>:<channel>"),
        ({"nodes": READS * 2}, "each once"),
        ({"counterfactual": None}, "a patch takes the nodes' values from another prompt"),
        ({"kind": "steer"}, "value: steer takes one"),
        ({"kind": "zero", "value": 1.0}, "value: steer takes one"),
        ({"prompt": "a b c", "counterfactual": "a b"}, "it has 2 tokens, the prompt 3; give one of as many"),
        ({"prompt": "with " * 200}, "the models read 1 to 128"),
        ({"prompt": "a " * 80, "counterfactual": "b " * 80, "continuation": 64}, "64 new tokens are"),
    ],
)
def test_mistakes_are_told_in_one_line(desk, changes, message) -> None:
    with pytest.raises((UsageError, InputError), match=message) as told:
        desk.intervene(request_of(desk, **changes))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"strength": math.nan}, {"strength": 101.0}, {"kind": "steer", "value": math.inf}, {"nodes": []},
        {"nodes": ["0.mlp.act_in:3"] * 65}, {"prompt": ""}, {"prompt": "a" * 4001}, {"top": 0},
        {"continuation": 65}, {"kind": "ablate"}, {"prompt": "\ud800"}, {"positions": "first"},
        {"path": "config.yaml"},
    ],
)  # fmt: skip
def test_requests_are_bounded(desk, changes) -> None:
    with pytest.raises(ValidationError):
        request_of(desk, **changes)


def test_a_node_that_cannot_be_carried_over_is_still_shown_in_the_student(desk) -> None:
    found = desk.intervene(request_of(desk, nodes=[str(LAST_WRITE)], kind="zero", off_target=True))
    assert found["student"]["kl"] > 0
    assert "writes after the last site" in found["dense"]["undefined"]
    assert found["off_target"] == found["dense"]
    with pytest.raises(InputError, match="writes after the last site"):
        desk.export(request_of(desk, nodes=[str(LAST_WRITE)], kind="zero"), "late")


def test_tasks_begin_with_the_edits_nodes(desk) -> None:
    other, _, own = desk.tasks()
    assert [task["task"] for task in desk.tasks()] == sorted(TASKS)
    assert own["nodes"][:3] == [OF_EDIT, READS[1], READS[0]]
    assert len(own["nodes"]) == len(set(own["nodes"])) == 2 * len(ADDRESSES) + 2
    assert own["edit"] == {"nodes": [OF_EDIT], "strength": 2.0, "refusals": []}
    assert other["edit"] is None
    assert own["of_nodes"] == len(own["nodes"])
    assert own["verdict"] == "supported"
    assert set(own["example"]) == {"clean", "corrupted", "answer", "distractor"}
    assert desk.intervene(request_of(desk, nodes=[OF_EDIT]))["dense"]["kl"] > 0
    found = desk.intervene(request_of(desk, prompt="an own prompt", counterfactual="an own prompt"))
    assert "none of the task's" in found["dense"]["difference"]["undefined"]


def test_of_a_huge_circuit_the_nodes_that_matter_are_offered_and_any_may_be_asked(desk, monkeypatch) -> None:
    monkeypatch.setattr("bridges.service.live_desk.SHOWN_NODES", 3)
    own = desk.tasks()[-1]
    assert own["nodes"] == [OF_EDIT, READS[1], READS[0]]
    assert own["of_nodes"] == 2 * len(ADDRESSES) + 2
    assert desk.intervene(request_of(desk, nodes=["0.attn.v:3"]))["dense"]["kl"] > 0


def test_a_run_that_changed_is_not_current_and_one_that_is_not_whole_is_refused(run, desk, tmp_path) -> None:
    assert desk.is_current
    path = run / "evaluation.json"
    text, times = path.read_text(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_text(text + " ")
    assert not desk.is_current
    path.write_text(text)
    os.utime(path, ns=times)
    assert desk.is_current
    with pytest.raises(InputError, match="no run in"):
        LiveDesk.of_run(tmp_path)
    for damage in ("dense: [", "dense: {path: x}\n", "dense: {paths: x}\ndata: {}\n", ""):
        (tmp_path / "config.yaml").write_text(damage)
        with pytest.raises(InputError, match="is damaged") as told:
            LiveDesk.of_run(tmp_path)
        assert "\n" not in str(told.value)


# --- off target --------------------------------------------------------------------------------------------


def test_the_effect_on_text_is_zero_without_an_edit_and_grows_with_it(desk) -> None:
    for change in KINDS:
        effects = [
            desk.intervene(request_of(desk, **change | {"strength": strength}, off_target=True))["off_target"]
            for strength in (0.0, 1.0, 8.0)
        ]
        values = [effect["kl"]["value"] for effect in effects]
        assert values[0] == 0.0
        assert effects[0]["share_of_tokens"] == 0.0
        assert values[1] < values[2]
        assert effects[2]["share_of_tokens"] > 0
        assert effects[2]["kl"]["low"] <= values[2] <= effects[2]["kl"]["high"]
    assert "gated steering" in desk.intervene(request_of(desk, off_target=True))["off_target"]["form"]


def test_what_has_no_meaning_on_text_is_undefined(desk) -> None:
    several = ["0.mlp.act_in:3", "1.attn.act_in:3"]
    for changes, why in (
        ({"positions": "last"}, "positions 'last'"),
        ({"nodes": several}, "counterfactual, which text has not"),
        ({"nodes": ["0.mlp.post_act:3"]}, "counterfactual, which text has not"),
    ):
        found = desk.intervene(request_of(desk, off_target=True, **changes))
        assert why in found["off_target"]["undefined"]


# --- files -------------------------------------------------------------------------------------------------


def test_a_saved_setting_is_the_intervention_that_was_shown(desk, run) -> None:
    for change in KINDS:
        path = desk.save(request_of(desk, **change), f"my-{change['kind']}")
        assert path == run / "interventions" / f"my-{change['kind']}.json"
        loaded = Intervention.load(path, desk.models.hashes.student_sha256)
        assert loaded == desk._change(request_of(desk, **change))[1]
        with pytest.raises(InputError, match="is taken"):
            desk.save(request_of(desk), f"my-{change['kind']}")
    (change,) = Intervention.load(run / "interventions" / "my-mean.json").changes
    assert change.values == tuple(desk.models.means["0.mlp.act_in"][[3, 9]].tolist())
    for name in ("", "..", "a/b", "A", "-a", "a" * 65, "a.json", "a\n"):
        for keep in (desk.save, desk.export):
            with pytest.raises(UsageError, match="name"):
                keep(request_of(desk), name)
    assert desk.is_current


def test_an_exported_adapter_moves_the_dense_models_answer(desk, run, tiny_checkpoint) -> None:
    request = request_of(desk, kind="steer", value=9.0, nodes=["0.mlp.post_act:3", "0.mlp.post_act:9"])
    with pytest.raises(InputError, match="adapter 'moved' is refused: off-target KL .* force true"):
        desk.export(request, "moved")
    assert not (run / "adapters").exists()
    facts = desk.export(request, "moved", force=True)
    assert facts["name"] == "moved"
    assert facts["kind"] == "constant"
    assert len(facts["forced"]) == 1
    json.dumps(facts, allow_nan=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, str(run / "adapters" / "moved")).eval()
    ids = desk.models.tokenizer(request.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        chances = model(ids).logits[0, -1].double().softmax(-1)
    shown = desk.intervene(request)["dense"]
    assert shown["changed"]
    for row in shown["after"]:
        assert chances[row["id"]].item() == pytest.approx(row["probability"], rel=1e-3, abs=1e-6)
    with pytest.raises(InputError, match="is taken"):
        desk.export(request, "moved", force=True)


def test_an_edit_within_its_limits_is_exported_without_force(desk, run) -> None:
    with pytest.raises(InputError, match="misses .* of what the edit adds at 0.resid_mid, the limit is 50%"):
        desk.export(request_of(desk, strength=0.05), "small")
    assert not (run / "adapters" / "small").exists()
    desk.edits["with_as"]["limits"]["adapter_missed"] = 1.0
    facts = desk.export(request_of(desk, strength=0.05), "small")
    assert facts["kind"] == "fitted"
    assert facts["forced"] == []
    assert -1e-6 <= facts["off_target"]["kl"]["value"] <= EditLimits().off_target_kl  # but for rounding
    assert facts["fitting_error"][str(Site(0, "resid_mid"))] < 1
    with pytest.raises(InputError, match="off-target KL undefined"):
        desk.export(request_of(desk, strength=0.05, positions="last"), "only-last")


# --- from a terminal ---------------------------------------------------------------------------------------


def test_what_the_page_does_a_command_does(desk, run, capsys, monkeypatch) -> None:
    monkeypatch.setattr("bridges.service.desk_command.loaded", lambda folder: desk)
    monkeypatch.setattr(
        desk, "export", lambda request, name, *, force: exported.append((request, name, force))
    )
    exported: list[tuple] = []

    def said(*words: str) -> str:
        main(["desk", str(run), *words])
        return capsys.readouterr().out

    assert f"with_as: supported, {2 * len(ADDRESSES) + 2} nodes, edit: {OF_EDIT} at strength 2" in said()
    found = json.loads(said("--task", "with_as", "--json"))
    assert found == json.loads(json.dumps(desk.intervene(request_of(desk, nodes=[OF_EDIT], strength=2.0))))
    words = ["--task", "with_as", "--kind", "zero", "--nodes", *READS, "--strength", "4"]
    text = said(*words, "--off_target", "--continuation", "3", "--save", "typed")
    assert text.startswith('student: "')
    assert "other text: KL " in text
    assert "goes on after: " in text
    assert text.endswith("kept: interventions/typed.json\n")
    loaded = Intervention.load(run / "interventions" / "typed.json", desk.models.hashes.student_sha256)
    assert loaded == desk._change(request_of(desk, kind="zero"))[1]
    assert "kept: adapters/typed" in said(*words, "--export", "typed", "--force")
    assert exported == [(request_of(desk, kind="zero"), "typed", True)]
    wrong = [
        (["--task", "none"], 3),
        (["--task", "with_as", "--strength", "1e9"], 2),
        ([*words, "--nodes", "x"], 2),
    ]
    for bad, code in wrong:
        with pytest.raises(SystemExit) as told:
            said(*bad)
        assert told.value.code == code
        assert capsys.readouterr().err.count("\n") == 1
