"""The dense model behind its sites: record, replace, run from, add."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridges import dense as dense_module
from bridges.dense import DenseModel
from extractor.errors import InputError, UnsupportedModelError
from extractor.sites import Site
from tests.conftest import tiny_gpt2


def test_recording_leaves_the_logits(dense: DenseModel, tokens: torch.Tensor) -> None:
    assert torch.equal(dense.run(tokens).logits, dense.model(tokens).logits)


def test_recordings_are_hugging_face_hidden_states(dense: DenseModel, tokens: torch.Tensor) -> None:
    hidden = dense.model(tokens, output_hidden_states=True).hidden_states
    run = dense.run(tokens)
    for layer in range(2):
        assert torch.equal(run.resid[Site(layer, "resid_pre")], hidden[layer])


def test_replacing_a_site_by_itself_is_bit_identical(dense: DenseModel, tokens: torch.Tensor) -> None:
    run = dense.run(tokens)
    for site in dense.sites:
        assert torch.equal(dense.run_from(site, run.resid[site]), run.logits), site


def test_hooks_are_gone_afterwards(dense: DenseModel, tokens: torch.Tensor) -> None:
    before = dense.model(tokens).logits
    run = dense.run(tokens)
    with pytest.raises(RuntimeError):
        dense.run_from(Site(1, "resid_mid"), run.resid[Site(1, "resid_mid")][..., :5])
    with dense.adding(Site(0, "resid_mid"), torch.ones_like(run.resid[Site(0, "resid_mid")])):
        pass
    assert torch.equal(dense.model(tokens).logits, before)


def test_adding_equals_running_from_the_changed_stream(dense: DenseModel, tokens: torch.Tensor) -> None:
    run = dense.run(tokens)
    for site in dense.sites:
        delta = torch.randn_like(run.resid[site])
        for indirect in (False, True):
            with dense.adding(site, delta, indirect=indirect) as model:
                live = model(tokens, use_cache=False).logits
            removed = delta if indirect else None
            tail = dense.run_from(site, run.resid[site] + delta, removed=removed)
            torch.testing.assert_close(live, tail, atol=1e-5, rtol=1e-5)


def test_indirect_effect_of_a_delta_that_nothing_reads_is_nothing(tokens: torch.Tensor) -> None:
    model = tiny_gpt2()
    with torch.no_grad():  # the last MLP writes nothing, so a late delta only reaches the logits
        model.transformer.h[1].mlp.c_proj.weight.zero_()
    dense = DenseModel(model)
    run = dense.run(tokens)
    site = Site(1, "resid_mid")
    delta = torch.randn_like(run.resid[site])
    total = dense.run_from(site, run.resid[site] + delta)
    indirect = dense.run_from(site, run.resid[site] + delta, removed=delta)
    assert (total - run.logits).abs().max() > 0.1
    torch.testing.assert_close(indirect, run.logits, atol=1e-4, rtol=1e-4)


def test_gradient_reaches_the_stream_but_no_weight(dense: DenseModel, tokens: torch.Tensor) -> None:
    resid = dense.run(tokens).resid[Site(1, "resid_pre")].clone().requires_grad_()
    dense.run_from(Site(1, "resid_pre"), resid).sum().backward()
    assert resid.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in dense.model.parameters())


def test_a_family_that_does_not_fit_fails_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dense_module.Family("transformer.h", "attn", "ln_1", "transformer.ln_f", removes_mean=True)
    monkeypatch.setitem(dense_module.FAMILIES, "gpt2", wrong)
    with pytest.raises(UnsupportedModelError, match="0.resid_mid by its own recording"):
        DenseModel(tiny_gpt2())


# --- folders -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def edit_config(folder, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_folder_loads(folder) -> None:
    dense = DenseModel.from_pretrained(folder)
    assert len(dense.sites) == 4
    assert len(dense.sha256) == 64


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: edit_config(f, model_type="bert"), "'bert' is not supported; supported: gpt2"),
        (lambda f: edit_config(f, auto_map={"AutoModel": "x.Y"}), "its own code"),
        (lambda f: (f / "model.safetensors").unlink(), "no .safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 100), "damaged"),
        (lambda f: edit_weights(f, lambda w: w.pop("transformer.ln_f.bias")), "missing keys"),
        (lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(2))), "unexpected keys"),
        (lambda f: edit_weights(f, lambda w: w["transformer.ln_f.bias"].fill_(torch.nan)), "32 values"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        DenseModel.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_truncated_weights_are_refused(folder) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(InputError, match="damaged"):
        DenseModel.from_pretrained(folder)
