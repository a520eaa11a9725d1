"""Edits held live: with an exact bridge the dense model does what the student does."""

import pytest
import torch

from bridges.bridge import BridgeSet
from bridges.checkpoint import DenseConfig
from bridges.dense import DenseModel
from bridges.edit import Edit, Hashes
from bridges.evaluate import measure_energies_
from bridges.live import LiveEdit
from bridges.warm_start import StudentShape, make_student
from extractor.cache_name import CACHE_NAME, cache_of
from extractor.errors import InputError
from extractor.intervention import Condition, Intervention, ablate, clamp, patch, steer
from extractor.rotation import RotationConfig
from extractor.sites import Node, Site
from extractor.student import Student
from tests.families import tiny_model
from tests.families import tokens as family_tokens

GENERATE = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 5}
SOURCES = ("student", "bridge")


def exact(dense: DenseModel, ids: torch.Tensor) -> tuple[Student, BridgeSet]:
    student, bridges = make_student(dense, StudentShape(), RotationConfig(enabled=False))
    measure_energies_(dense, student, bridges, ids)
    return student, bridges


@pytest.fixture
def pair(dense, tokens):
    return exact(dense, tokens)


@pytest.fixture(scope="module")
def llama() -> tuple[DenseModel, Student, BridgeSet]:
    dense = DenseModel(tiny_model("Llama"))
    return dense, *exact(dense, family_tokens())


def live_logits(live: LiveEdit, ids: torch.Tensor, **options) -> torch.Tensor:
    with torch.no_grad(), live.applied(**options) as model:
        return model(ids, use_cache=False).logits


def neurons(value: float = 4.0, **where) -> Intervention:
    return clamp([Node("0.mlp.post_act", c) for c in (1, 7, 30)], [value] * 3, **where)


# --- the crossing ------------------------------------------------------------------------------------------

WRITES = ["0.attn.resid_delta", "0.mlp.resid_delta", "1.attn.resid_delta", "0.mlp.post_act"]
INNER = ["0.attn.q", "0.attn.k", "0.attn.v", "1.attn.v"]


@pytest.mark.parametrize("kind", ["ablate", "clamp", "steer", "patch"])
@pytest.mark.parametrize("address", WRITES + INNER)
def test_writes_and_what_has_no_coordinate_act_as_in_the_student(llama, address, kind) -> None:
    """Through an exact bridge the edited dense model has the logits of the student under the tap.

    A Llama, because a LayerNorm model's stream cannot hold the mean of what a node writes.
    """
    (dense, student, bridges), tokens = llama, family_tokens(9)
    nodes = [Node(address, c) for c in (2, 5, 11)]
    intervention = {
        "ablate": lambda: ablate(nodes),
        "clamp": lambda: clamp(nodes, [4.0, -4.0, 4.0]),
        "steer": lambda: steer(nodes, [4.0, -4.0, 4.0]),
        "patch": lambda: patch(nodes),
    }[kind]().scaled(1.3)
    live = LiveEdit(Edit.from_intervention(intervention, student, bridges), dense, student)
    other = {a: x.roll(1, 0) for a, x in live.read(tokens).items()}
    with torch.no_grad():
        plain = student(tokens).logits
        expected = student(tokens, tap=intervention.tap(counterfactual=other)).logits
    edited = live_logits(live, tokens, counterfactual=other)
    torch.testing.assert_close(edited, expected, atol=2e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.02


def every_readable() -> dict[str, Intervention]:
    read, late = Node("0.attn.act_in", 3), Node("1.mlp.act_in", 9)
    condition = Condition(Node("0.attn.act_in", 7), ">", 0.1)
    return {
        "reads": clamp([read, late], [2.0, -2.0]),
        "conditional": steer([late], [3.0], condition=condition),
        "last": clamp([late], [5.0], positions="last"),
        "neurons": neurons(),
        "conditional on a neuron": steer(
            [Node("0.mlp.resid_delta", 3)], [3.0], condition=Condition(Node("0.mlp.post_act", 4), ">", 0.0)
        ),
        "patch": patch([read, Node("0.mlp.act_in", 4), Node("0.mlp.post_act", 3)]),
        "composed": clamp([late], [2.0]) + steer([late], [0.5]) + ablate([Node("1.attn.act_in", 2)]),
    }


@pytest.mark.parametrize("name", every_readable())
def test_the_bridge_tells_what_the_student_would(dense, pair, tokens, name) -> None:
    """With an exact bridge both sources add the same deltas, at the first site of the edit."""
    student, bridges = pair
    intervention = every_readable()[name]
    deltas = {}
    for source in SOURCES:
        edit = Edit.from_intervention(intervention, student, bridges, source=source)
        live = LiveEdit(edit, dense, student if source == "student" else None)
        other = {a: x.roll(1, 0) for a, x in live.read(tokens).items()}
        live_logits(live, tokens, counterfactual=other)
        deltas[source] = dict(live.deltas)
    first = edit.sites[0]  # later sites differ: there the bridge reads the stream as the edit has left it
    torch.testing.assert_close(deltas["bridge"][first], deltas["student"][first], atol=1e-4, rtol=1e-4)
    assert deltas["student"][first].abs().max() > 0.05


def test_a_clamped_read_is_read_as_clamped(dense, pair, tokens) -> None:
    """The bridge reads the clamped value back, after the norm of the stream before the edit."""
    student, bridges = pair
    site, node = Site(1, "resid_mid"), Node("1.mlp.act_in", 9)
    edit = Edit.from_intervention(clamp([node], [2.5]), student, bridges, source="bridge")
    live = LiveEdit(edit, dense)
    live_logits(live, tokens)
    resid = dense.run(tokens).resid[site]
    scale = bridges.rms_ratio(site) * bridges.read_scale(resid)
    moved = bridges.centred(resid) + live.deltas[site]
    torch.testing.assert_close(moved[..., 9:10] / scale, torch.full_like(scale, 2.5), atol=1e-3, rtol=1e-3)


def test_live_patch_is_the_delta_that_is_measured(dense, pair, tokens) -> None:
    student, bridges = pair
    site = Site(0, "resid_mid")
    edit = Edit.from_nodes([Node(site.read_address, c) for c in (0, 5, 17)], site, bridges)
    live = LiveEdit(edit, dense, student)
    presented = live.read(tokens)[site.read_address]
    other = presented.roll(1, 0)
    resid = dense.run(tokens).resid[site]
    delta = 1.5 * edit.delta(presented, other, bridges.read_scale(resid))
    for indirect in (False, True):
        removed = delta if indirect else None
        expected = dense.run_from(site, resid + delta, removed=removed)
        options = {"strength": 1.5, "counterfactual": {site.read_address: other}, "indirect": indirect}
        torch.testing.assert_close(live_logits(live, tokens, **options), expected, atol=1e-4, rtol=1e-4)


def test_strength_zero_is_the_model_and_hooks_are_gone(dense, pair, tokens) -> None:
    student, bridges = pair
    plain = dense.model(tokens).logits
    for source in SOURCES:
        edit = Edit.from_intervention(neurons() + every_readable()["reads"], student, bridges, source=source)
        live = LiveEdit(edit, dense, student)
        assert torch.equal(live_logits(live, tokens, strength=0.0), plain)
        assert not torch.equal(live_logits(live, tokens), plain)
        assert torch.equal(dense.model(tokens).logits, plain)


def test_a_mean_rms_makes_a_steer_one_vector(dense, pair, tokens) -> None:
    student, bridges = pair
    intervention = steer([Node("1.attn.act_in", 3)], [2.0])
    for rms, is_constant in (("token", False), ("mean", True)):
        edit = Edit.from_intervention(intervention, student, bridges, source="bridge", rms=rms)
        assert edit.is_constant is is_constant
        live = LiveEdit(edit, dense)
        live_logits(live, tokens)
        delta = live.deltas[Site(1, "resid_pre")]
        assert torch.equal(delta, delta[:1, :1].expand_as(delta)) is is_constant
    mean = dense.run(tokens).resid[Site(1, "resid_pre")]
    energy = bridges.centred(mean).square().mean().sqrt()
    torch.testing.assert_close(delta[0, 0, 3], 2.0 * energy, atol=1e-4, rtol=1e-4)


def test_what_cannot_cross_is_refused_with_the_reason(dense, pair, tokens) -> None:
    student, bridges = pair
    late = Node("1.mlp.resid_delta", 3)
    for nodes, source, message in (
        ([late], "student", "1.mlp.resid_delta:3 writes after the last site"),
        ([Node("0.attn.v", 1)], "bridge", "attention mixes it over positions.*source student"),
        ([Node("0.attn.resid_delta", 1)], "bridge", "attention or a whole MLP computes it"),
        ([Node("0.mlp.post_act", 4000)], "student", "no node 0.mlp.post_act:4000"),
        ([Node("7.attn.act_in", 1)], "student", "no node 7.attn.act_in:1"),
    ):
        with pytest.raises(InputError, match=message):
            Edit.from_intervention(ablate(nodes), student, bridges, source=source)
    edit = Edit.from_intervention(neurons(), student, bridges)
    with pytest.raises(InputError, match="give the student"):
        LiveEdit(edit, dense)
    named = Edit.from_intervention(neurons(), student, bridges, hashes=Hashes("another"))
    with pytest.raises(InputError, match="made for a dense checkpoint with weights another"):
        LiveEdit(named, dense, student)


def test_sparse_neurons_cross_by_their_difference(dense, tokens) -> None:
    student, bridges = exact(dense, tokens)
    student.set_activation_frac(0.25)
    with pytest.raises(InputError, match="its write passes AbsTopK or a norm"):
        Edit.from_intervention(neurons(), student, bridges, source="bridge")
    edit = Edit.from_intervention(neurons(), student, bridges)
    assert [crossing.via for crossing in edit.crossings] == ["difference"]
    live = LiveEdit(edit, dense, student)
    assert not torch.equal(live_logits(live, tokens), dense.model(tokens).logits)


# --- generation and padding --------------------------------------------------------------------------------

FAMILIES = ["GPT-2", "Llama", "GPT-NeoX, Pythia (parallel)", "OPT", "Gemma 3 (text)", "OLMo 2",
            "Mistral (sliding window)"]  # fmt: skip


@pytest.fixture(scope="module")
def of_family() -> dict[str, tuple[DenseModel, Student, BridgeSet]]:
    return {}


@pytest.fixture
def family(request, of_family):
    if request.param not in of_family:
        dense = DenseModel(tiny_model(request.param))
        of_family[request.param] = (dense, *exact(dense, family_tokens()))
    return of_family[request.param]


def edits_of(student: Student, bridges: BridgeSet) -> dict[str, Edit]:
    loud = {"reads": steer([Node("1.attn.act_in", 3)], [6.0]) + clamp([Node("1.attn.act_in", 4)], [6.0])}
    loud["from_last"] = steer([Node("1.attn.act_in", 3)], [9.0], positions="from_last")
    edits = {
        f"{name}, {source}": Edit.from_intervention(intervention, student, bridges, source=source)
        for name, intervention in loud.items()
        for source in SOURCES
    }
    edits["values"] = Edit.from_intervention(steer([Node("0.attn.v", 3)], [20.0]), student, bridges)
    edits["neurons"] = Edit.from_intervention(neurons(20.0), student, bridges)
    return edits


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_generation_is_the_same_with_and_without_the_cache_and_with_left_padding(family) -> None:
    dense, student, bridges = family
    ids, short = family_tokens(9), 6
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, : 9 - short], mask[0, : 9 - short] = 0, 0
    one = ids[:1, 9 - short :]
    for name, edit in edits_of(student, bridges).items():
        live = LiveEdit(edit, dense, student)
        with torch.no_grad(), live.applied() as model:
            cached = model.generate(padded, attention_mask=mask, use_cache=True, **GENERATE)
            whole = model.generate(padded, attention_mask=mask, use_cache=False, **GENERATE)
            alone = model.generate(one, attention_mask=torch.ones_like(one), **GENERATE)
            cache = model(ids[:, :6], use_cache=True)
            steps = [cache.logits]
            for i in range(6, 9):
                steps.append(model(ids[:, i : i + 1], **{CACHE_NAME: cache_of(cache)}).logits)
        assert torch.equal(cached, whole), name
        assert torch.equal(cached[:1, 9:], alone[:, short:]), name
        expected = live_logits(live, ids, last=torch.full((3,), 5))
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=2e-4, rtol=1e-3, msg=name)
        assert (expected - dense.model(ids, use_cache=False).logits).abs().max() > 0.02, name


def test_a_cache_that_the_student_has_not_read_is_refused(dense, pair, tokens) -> None:
    student, bridges = pair
    live = LiveEdit(Edit.from_intervention(neurons(), student, bridges), dense, student)
    cache = cache_of(dense.model(tokens, use_cache=True))
    with live.applied() as model, pytest.raises(InputError, match="has not read the tokens"):
        model(tokens[:, :1], **{CACHE_NAME: cache})


# --- quantised models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_quantised_model_gets_the_same_delta_and_keeps_its_weights(tiny_llama_checkpoint, kind) -> None:
    ids = torch.arange(1, 13).view(2, 6)
    plain = DenseModel.from_pretrained(DenseConfig(path=str(tiny_llama_checkpoint)))
    student, bridges = exact(plain, ids)
    dense = DenseModel.from_pretrained(
        DenseConfig(path=str(tiny_llama_checkpoint), quantization=kind), device="cpu"
    )
    site, intervention = Site(1, "resid_pre"), steer([Node("1.attn.act_in", 3)], [8.0])
    before = {k: v.clone() for k, v in dense.model.state_dict().items() if torch.is_tensor(v)}
    for source in SOURCES:
        edit = Edit.from_intervention(intervention, student, bridges, source=source)
        live = LiveEdit(edit, dense, student)
        edited = live_logits(live, ids)
        with torch.no_grad(), dense.adding(site, live.deltas[site]) as model:
            torch.testing.assert_close(edited, model(ids, use_cache=False).logits)
        scale = bridges.rms_ratio(site) * bridges.read_scale(dense.run(ids).resid[site])
        torch.testing.assert_close(live.deltas[site][..., 3:4], 8.0 * scale, atol=1e-3, rtol=1e-3)
        with live.applied() as model:
            options = GENERATE | {"attention_mask": torch.ones_like(ids)}
            cached = model.generate(ids, **options)
            assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    for key, value in dense.model.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(before[key], value), key
