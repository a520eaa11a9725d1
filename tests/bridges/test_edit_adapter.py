"""Edits as adapters and merged checkpoints: what other people load is what was held live."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM

from bridges.bridge import BridgeSet
from bridges.checkpoint import DenseConfig
from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.edit_adapter import export_adapter, export_merged
from bridges.evaluate import measure_energies_
from bridges.fresh import compare_exports
from bridges.live import LiveEdit
from bridges.low_rank import Prompts, fit, record, writer_before
from bridges.warm_start import StudentShape, make_student
from extractor.errors import InputError
from extractor.intervention import Condition, Intervention, clamp, patch, steer
from extractor.rotation import RotationConfig
from extractor.sites import Node, Site
from extractor.student import Student
from extractor.tasks import TaskBatch
from tests.families import TINY, tiny_model
from tests.families import tokens as family_tokens

CONSTANT = {
    "first site": steer([Node("0.attn.act_in", 3), Node("0.attn.act_in", 9)], [4.0, -3.0]),
    "middle": steer([Node("0.mlp.act_in", 3)], [4.0]),
    "later": steer([Node("1.attn.act_in", 3)], [4.0]),
    "a write": steer([Node("0.mlp.resid_delta", 3), Node("0.mlp.post_act", 5)], [4.0, 8.0]),
    "two sites": steer([Node("0.mlp.act_in", 3), Node("1.mlp.act_in", 5)], [4.0, -4.0]),
}


def ids_of(seed: int, rows: int = 6, high: int = 90) -> torch.Tensor:
    return torch.randint(1, high, (rows, 16), generator=torch.Generator().manual_seed(seed))


Loaded = tuple[DenseModel, Student, BridgeSet]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def loaded(request, tiny_checkpoint, tiny_llama_checkpoint) -> Loaded:
    """GPT-2 has Conv1D layers, biases and a tied head; Llama plain ones and no bias."""
    path = tiny_checkpoint if request.param == "gpt2" else tiny_llama_checkpoint
    dense = DenseModel.from_pretrained(DenseConfig(path=str(path)))
    student, bridges = make_student(dense, StudentShape(), RotationConfig(enabled=False))
    measure_energies_(dense, student, bridges, ids_of(1))
    return dense, student, bridges


def live_edit(loaded: Loaded, intervention: Intervention, **options) -> LiveEdit:
    dense, student, bridges = loaded
    edit = Edit.from_intervention(intervention, student, bridges, **({"source": "bridge"} | options))
    return LiveEdit(edit, dense, student)


def live_logits(live: LiveEdit, ids: torch.Tensor, **options) -> torch.Tensor:
    with torch.no_grad(), live.applied(**options) as model:
        return model(ids, use_cache=False).logits


def base_of(live: LiveEdit) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(live.dense.facts["path"], dtype=torch.float32).eval()


def with_adapter(live: LiveEdit, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base_of(live), str(folder)).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_edit_is_exact_as_adapter_at_every_strength_and_merged(loaded, tmp_path, name) -> None:
    live, ids = live_edit(loaded, CONSTANT[name], rms="mean"), ids_of(2)
    facts = export_adapter(live, tmp_path / "a", fit_on=[], held_out=[Prompts(ids_of(3))])
    assert facts["kind"] == "constant"
    assert all(error < 1e-10 for error in facts["fitting_error"].values())
    base = base_of(live)
    plain = base(ids).logits
    model = with_adapter(live, tmp_path / "a")
    scale = plain.abs().max()
    for strength in (1.0, 0.5, -2.0):
        with rescale_adapter_scale(model, strength):
            got = model(ids).logits
        expected = live_logits(live, ids, strength=strength)
        assert (got - expected).abs().max() <= 1e-5 * scale
        assert (expected - plain).abs().max() > 0.01 * scale
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    if live.dense.config.model_type == "gpt2":  # generate() and its cache are PEFT's own
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        with live.applied() as held:
            expected = held.generate(ids, **options)
        assert torch.equal(model.generate(input_ids=ids, **options), expected)
    export_merged(live, tmp_path / "a", tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert (merged(ids).logits - live_logits(live, ids)).abs().max() <= 1e-5 * scale


def test_a_fresh_process_sees_the_live_edit(tiny_checkpoint, tmp_path) -> None:
    """The one test that starts a process: it takes seconds to import PEFT."""
    dense = DenseModel.from_pretrained(DenseConfig(path=str(tiny_checkpoint)))
    student, bridges = make_student(dense, StudentShape(), RotationConfig(enabled=False))
    measure_energies_(dense, student, bridges, ids_of(1))
    live = live_edit((dense, student, bridges), CONSTANT["middle"], rms="mean")
    held_out, folder = Prompts(ids_of(2), last=torch.tensor([15, 3, 8, 15, 9, 1])), tmp_path / "a"
    export_adapter(live, folder, fit_on=[], held_out=[held_out])
    export_merged(live, folder, tmp_path / "m")
    found = compare_exports(live, folder, held_out, merged=tmp_path / "m")
    assert found["base_when_disabled"] is True
    assert found["compared_on_tokens"] == 57
    for name in ("max_logit_difference", "max_logit_difference_half", "max_logit_difference_merged"):
        assert found[name] <= 1e-5 * found["max_logit"]
    assert found["max_logit_difference_float64"] <= 1e-12  # what is left is fp32's rounding
    assert {p.dtype for p in dense.model.parameters()} == {torch.float32}
    base = dense.facts["path"]
    dense.facts["path"] = str(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded by transformers and PEFT: "):
        compare_exports(live, folder, held_out)
    dense.facts["path"] = base


# --- fitted ------------------------------------------------------------------------------------------------


def test_an_edit_that_is_linear_in_the_modules_input_is_fitted_exactly(loaded) -> None:
    """Deltas that are a low-rank map of the inputs are found again, up to rounding."""
    dense = loaded[0]
    for site in dense.sites:
        writer = writer_before(dense, site)
        live = live_edit(loaded, clamp([Node(site.read_address, 3)], [1.0]))
        x, _ = record(live, {site: writer}, [Prompts(ids_of(seed, 24)) for seed in range(3)])[site]
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(size, 2, generator=generator) for size in (writer.in_features, dense.width))
        shift = torch.randn(dense.width, generator=generator) if writer.has_bias else 0.0
        y = (a[x] if writer.is_embedding else x @ a) @ b.T + shift
        part = fit(writer, x, y, rank=2 + writer.is_embedding, bias=writer.has_bias)
        assert len(part.a) <= 3
        assert (part(x) - y).square().sum() <= 1e-6 * y.square().sum()
        worse = fit(writer, x, y, rank=1, bias=writer.has_bias)
        assert len(worse.a) == 1
        assert (worse(x) - y).square().sum() > 1e-3 * y.square().sum()


def test_a_conditional_edit_becomes_a_low_rank_update_with_its_error_stated(loaded, tmp_path) -> None:
    node = Node("1.attn.act_in", 3)
    condition = Condition(Node("0.attn.act_in", 7), ">", 0.3)
    live = live_edit(loaded, steer([node], [6.0], condition=condition))
    fit_on, held_out = [Prompts(ids_of(seed, 24)) for seed in range(8)], Prompts(ids_of(99))
    facts = export_adapter(live, tmp_path / "a", fit_on=fit_on, held_out=[held_out])
    assert facts["kind"] == "fitted"
    assert facts["sites"]["1.resid_pre"]["rank"] == 1
    error = facts["fitting_error"]["1.resid_pre"]
    assert 0.01 < error < 0.9  # better than nothing (1), and not exact
    ids = held_out.ids
    with torch.no_grad():
        model = with_adapter(live, tmp_path / "a")
        got = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
        expected = live_logits(live, ids)
        assert torch.equal(plain, base_of(live)(ids).logits)
        assert (got - expected).square().sum() < (plain - expected).square().sum()
        export_merged(live, tmp_path / "a", tmp_path / "m")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
        torch.testing.assert_close(merged(ids).logits, got, atol=1e-4, rtol=1e-4)
    written = json.loads((tmp_path / "a" / "edit.json").read_text())
    assert written["fitting_error"] == facts["fitting_error"]
    assert Intervention.from_json(written["intervention"]) == live.edit.intervention


def test_a_patch_before_the_first_attention_becomes_a_table_of_tokens(loaded, tmp_path) -> None:
    """Two tokens that stand for each other: the adapter turns each into the other, and text stays."""
    ids = torch.randint(40, 90, (8, 10), generator=torch.Generator().manual_seed(5)).repeat(2, 1)
    ids[:8, 4], ids[8:, 4] = 11, 12
    some = torch.zeros(16, dtype=torch.long)
    batch = TaskBatch(ids, some + 9, some + 1, some + 2)
    live = live_edit(loaded, patch([Node("0.attn.act_in", c) for c in (3, 5, 9)]))
    prompts = Prompts.of_task(batch, live)
    text = Prompts(ids_of(7, 24) + 20)  # neither of the two is in it
    facts = export_adapter(live, tmp_path / "a", fit_on=[prompts, text], held_out=[prompts])
    # what the positional embedding adds differs from the token's mean
    assert facts["fitting_error"]["0.resid_pre"] < 0.1
    with torch.no_grad():
        model = with_adapter(live, tmp_path / "a")
        got, expected = model(ids).logits, live_logits(live, ids, counterfactual=prompts.counterfactual)
        with model.disable_adapter():
            plain = model(ids).logits
            assert torch.equal(model(text.ids).logits, base_of(live)(text.ids).logits)
        assert (got - expected).square().sum() < 0.1 * (plain - expected).square().sum()


# --- families and refusals ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("row", TINY)
def test_every_family_has_a_module_before_each_site_or_is_refused_with_the_reason(row) -> None:
    dense = DenseModel(tiny_model(row))
    spec, ids = dense.family.copy, family_tokens(6)
    delta = torch.randn(dense.width, generator=torch.Generator().manual_seed(0))
    for site in dense.sites:
        if spec is None:
            with pytest.raises(InputError, match="no adapter for"):
                writer_before(dense, site)
            continue
        passes_norm = spec.attn_post_norm if site.stream == "resid_mid" else spec.mlp_post_norm
        if passes_norm and site.index:
            with pytest.raises(InputError, match="passes a norm before the stream"):
                writer_before(dense, site)
            continue
        writer = writer_before(dense, site)
        scale = float(getattr(writer.module, "embed_scale", 1.0))
        hook = writer.module.register_forward_hook(
            lambda m, a, out, w=writer, s=scale: out + s * delta / w.gain
        )
        moved = dense.run(ids, record=False).logits
        hook.remove()
        with dense.adding(site, delta) as model:
            expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(moved, expected, atol=1e-3, rtol=1e-3)


def test_what_an_adapter_cannot_hold_is_refused(loaded, tmp_path, dense, tokens) -> None:
    both = CONSTANT["first site"] + CONSTANT["middle"]
    with pytest.raises(InputError, match="one adapter for 0.resid_pre, one for the rest"):
        export_adapter(
            live_edit(loaded, both, rms="mean"), tmp_path / "a", fit_on=[], held_out=[Prompts(ids_of(2))]
        )
    student, bridges = make_student(dense, StudentShape(), RotationConfig(enabled=False))
    edit = Edit.from_intervention(CONSTANT["middle"], student, bridges, source="bridge", rms="mean")
    with pytest.raises(InputError, match="belongs to a checkpoint as it is stored"):
        export_adapter(LiveEdit(edit, dense), tmp_path / "a", fit_on=[], held_out=[Prompts(tokens)])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_the_adapter_sits_on_a_quantised_base(tiny_llama_checkpoint, tmp_path, kind) -> None:
    dense = DenseModel.from_pretrained(DenseConfig(path=str(tiny_llama_checkpoint)))
    student, bridges = make_student(dense, StudentShape(), RotationConfig(enabled=False))
    measure_energies_(dense, student, bridges, ids_of(1))
    live = live_edit((dense, student, bridges), CONSTANT["middle"], rms="mean")
    export_adapter(live, tmp_path / "a", fit_on=[], held_out=[Prompts(ids_of(3))])
    held = DenseModel.from_pretrained(DenseConfig(path=str(tiny_llama_checkpoint), quantization=kind))
    ids = ids_of(2)
    expected = live_logits(LiveEdit(live.edit, held), ids)
    with torch.no_grad():
        plain = held.model(ids).logits
        model = PeftModel.from_pretrained(held.model, str(tmp_path / "a")).eval()
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, plain)


def test_sites_of_the_parallel_families_are_written_by_the_block_before(tmp_path) -> None:
    dense = DenseModel(tiny_model("GPT-NeoX, Pythia (parallel)"))
    assert writer_before(dense, Site(1, "resid_pre")).name == "gpt_neox.layers.0.mlp.dense_4h_to_h"
