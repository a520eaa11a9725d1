"""A checkpoint in memory: weights that fit, tokenizers, quantisation, adapters.

Rows are those of the fault list (evidence.md (c)). Without a subject here: row 13 (parity per family is
in test_dense.py), row 20 (a quantised dense model is never trained), row 21 (bitsandbytes runs on CPUs, as
below).
"""

import json
import os
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bridges.checkpoint import (
    DenseConfig,
    LoadedCheckpoint,
    check_same_tokenizer,
    load_dense,
    prepare_quantised_,
    probe_error,
    vocabulary_hash,
)
from bridges.dense import DenseModel
from extractor.artifacts import fingerprint
from extractor.errors import InputError, UsageError
from tests.conftest import SHIPPED_DENSE, tiny_gpt2


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def load(folder: Path, plain: bool = False, **settings: object) -> LoadedCheckpoint:
    return load_dense(DenseConfig(path=str(folder), **settings), plain=plain)


def refused(folder: Path, message: str, **settings: object) -> None:
    with pytest.raises(InputError, match=message) as error:
        load(folder, **settings)
    assert "\n" not in str(error.value)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 2000, (3, 16), generator=torch.Generator().manual_seed(4))


# --- whole folders ---------------------------------------------------------------------------------------


def test_a_whole_folder_loads_with_its_facts(folder: Path) -> None:
    loaded = load(folder)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.sha256 == fingerprint(folder)
    assert loaded.name == loaded.facts["path"] == str(folder)
    wanted = {
        "commit": None, "format": "safetensors", "quantization": "none", "adapter": None,
        "adapter_mode": None, "remote_code": False, "vocab_size": 2048, "tokenizer_size": 2048,
        "pad_token": "own", "tokenizer": str(folder),
    }  # fmt: skip
    assert wanted.items() <= loaded.facts.items()
    json.dumps(loaded.facts)


def test_dense_model_takes_the_name_as_a_string(folder: Path) -> None:
    dense = DenseModel.from_pretrained(str(folder))
    assert dense.sha256 == fingerprint(folder)
    assert dense.facts["sha256"] == dense.sha256
    assert DenseConfig.model_validate(str(folder)) == DenseConfig(path=str(folder))


def test_bfloat16_weights_are_held_in_float32(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
    edit_json(folder / "config.json", dtype="bfloat16")
    assert {p.dtype for p in load(folder).model.parameters()} == {torch.float32}


def test_row_1_permitted_pickled_weights_give_the_same_model(folder: Path) -> None:
    expected = load(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    loaded = load(folder, allow_pickle=True)
    assert loaded.facts["format"] == "pickle"
    assert loaded.sha256 != expected.sha256
    for name, value in expected.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


class Payload:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_row_1_a_pickle_that_runs_code_is_refused_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload(f"touch {tmp_path}/ran")}, folder / "pytorch_model.bin")
    refused(folder, "cannot load .*: UnpicklingError", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_row_1_pickled_nan_is_found(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = torch.nan
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "1 values of 'transformer.ln_f.bias'", allow_pickle=True)


def test_trusted_code_of_a_folder_runs_and_is_recorded(folder: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = "from transformers import GPT2LMHeadModel\nclass Own(GPT2LMHeadModel):\n    is_own = True\n"
    (folder / "own_code.py").write_text(code)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "own_code.Own"})
    loaded = load(folder, trust_remote_code=True)
    assert loaded.model.is_own
    assert loaded.facts["remote_code"] is True


# --- weights that do not fit -----------------------------------------------------------------------------


def test_row_7_a_flipped_bit_gives_another_fingerprint(folder: Path) -> None:
    before = load(folder).sha256
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert load(folder).sha256 != before


def poison(weights: dict[str, torch.Tensor]) -> None:
    weights["transformer.ln_f.bias"].fill_(torch.nan)
    weights["transformer.wpe.weight"][0, :3] = torch.inf


def rename(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if ".mlp." in name]:
        weights[name.replace(".mlp.", ".ffn.")] = weights.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison, r"3 values of 'transformer.wpe.weight'.* NaN or infinite \(2 tensors in all\)"),
        (poison, "32 values of 'transformer.ln_f.bias'"),
        (lambda w: w.pop("transformer.ln_f.bias"), r"1 missing keys: transformer.ln_f.bias \(32,\)"),
        (rename, r"8 missing keys: (transformer[^;]*; ){5}these weights"),
        (lambda w: w.update(extra=torch.ones(2)), r"1 unexpected keys: extra \(2,\)"),
        (
            lambda w: w.update({"transformer.ln_f.bias": torch.ones(31)}),
            r"shapes that differ: transformer.ln_f.bias \(31,\) in the file, \(32,\) by the config",
        ),
    ],
    ids=["row 8 inf", "row 8 nan", "row 9", "row 9 many", "row 10", "row 11"],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, change, message: str) -> None:
    edit_weights(folder, change)
    refused(folder, message)


def test_row_11_a_config_of_another_size_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", n_embd=64)
    refused(folder, "28 shapes that differ: .* in the file")


def test_row_11_a_config_that_transformers_refuses_is_one_line(folder: Path) -> None:
    edit_json(folder / "config.json", n_head=5)
    refused(folder, "transformers cannot load")


def test_tied_and_ignored_keys_are_no_mistake(folder: Path) -> None:
    """As openai-community/gpt2 is stored: no prefix, no lm_head, the old causal masks."""
    expected = load(folder).model.state_dict()

    def as_released(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        for layer in range(2):
            weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()

    edit_weights(folder, as_released)
    loaded = load(folder).model.state_dict()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    assert torch.equal(loaded["lm_head.weight"], loaded["transformer.wte.weight"])


def test_an_untied_head_has_to_be_there(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=False)
    refused(folder, r"1 missing keys: lm_head.weight \(2048, 32\)")


# --- tokenizers ------------------------------------------------------------------------------------------


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def test_row_14_more_tokens_than_rows_are_refused_with_both_numbers(folder: Path, shipped_tokenizer) -> None:
    tiny_gpt2(vocab_size=2000, n_positions=64).save_pretrained(folder)
    refused(folder, "the tokenizer has 2048 entries, the embedding 2000 rows")


def test_row_14_an_added_token_without_a_row_is_refused(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    refused(folder, "the tokenizer has 2049 entries, the embedding 2048 rows")


def test_row_14_a_padded_vocabulary_is_recorded(tiny_llama_checkpoint: Path) -> None:
    facts = load(tiny_llama_checkpoint).facts
    assert (facts["vocab_size"], facts["tokenizer_size"]) == (2064, 2048)


def test_row_14_a_missing_pad_token_is_eos_in_memory_only(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    edit_json(folder / "config.json", pad_token_id=None)
    loaded = load(folder)
    assert loaded.facts["pad_token"] == "eos"
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    assert loaded.model.config.pad_token_id is None  # else an embedding row would count as padding
    assert "pad_token" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_a_checkpoint_without_tokenizer_takes_a_named_one(folder: Path) -> None:
    remove_tokenizer(folder)
    refused(folder, "has no tokenizer .*; name a folder that has its tokenizer as dense.tokenizer")
    refused(folder, "dense.tokenizer: no tokenizer in", tokenizer=str(folder.parent))
    loaded = load(folder, tokenizer=str(SHIPPED_DENSE))
    assert loaded.facts["tokenizer"] == str(SHIPPED_DENSE)
    assert loaded.tokenizer("def f():").input_ids


def test_two_tokenizers_must_be_the_same(folder: Path, tmp_path: Path) -> None:
    assert load(folder, tokenizer=str(SHIPPED_DENSE)).facts["tokenizer"] == str(folder)
    other = AutoTokenizer.from_pretrained(folder)
    other.add_tokens(["zzqq"])
    other.save_pretrained(tmp_path / "other")
    refused(folder, r"copy' \(2048 entries\) and '.*other' \(2049", tokenizer=str(tmp_path / "other"))


def test_a_named_tokenizer_cannot_bring_code(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(SHIPPED_DENSE, tmp_path / "other")
    edit_json(other / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    refused(folder, "asks to run its own code", tokenizer=str(other))


def test_a_damaged_tokenizer_is_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    refused(folder, "the tokenizer in .* cannot be read")


def test_vocabularies_are_compared_by_text_and_id(shipped_tokenizer) -> None:
    other = AutoTokenizer.from_pretrained(SHIPPED_DENSE)
    check_same_tokenizer(shipped_tokenizer, "one", other, "two")
    other.add_tokens(["zzqq"])
    assert vocabulary_hash(other) != vocabulary_hash(shipped_tokenizer)
    with pytest.raises(InputError, match="'one' .2048 entries. and 'two' .2049 entries."):
        check_same_tokenizer(shipped_tokenizer, "one", other, "two")


# --- quantisation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_row_21_quantised_models_run_on_cpus_near_the_plain_one(
    request, tmp_path, shipped_tokenizer, tiny_llama_checkpoint, ids, family: str, kind: str
) -> None:
    checkpoint = tiny_llama_checkpoint
    if family == "gpt2":  # its Conv1D layers are quantised, too; widths that bitsandbytes has kernels for
        checkpoint = tmp_path / "gpt2"
        tiny_gpt2(vocab_size=2048, n_positions=64, n_embd=64).save_pretrained(checkpoint)
        shipped_tokenizer.save_pretrained(checkpoint)
    plain, loaded = load(checkpoint, plain=True, quantization=kind), load(checkpoint, quantization=kind)
    layers = [
        name
        for name, module in loaded.model.named_modules()
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    ]
    assert len(layers) == (14 if family == "llama" else 8)
    assert not any("lm_head" in name for name in layers)
    assert (plain.facts["quantization"], loaded.facts["quantization"]) == ("none", kind)
    assert plain.sha256 == loaded.sha256
    with torch.no_grad():
        error = probe_error(loaded.model(ids).logits, plain.model(ids).logits)
    assert 1e-7 < error["kl"] < (0.02 if kind == "8bit" else 0.6)
    assert error["max_logit"] > 1e-3


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_evaluating_a_quantised_model_changes_nothing_and_gradients_flow(
    tiny_llama_checkpoint: Path, ids: torch.Tensor, kind: str
) -> None:
    """bitsandbytes 0.50 repacks 4-bit weights in the first no-grad forward on AVX512-BF16 machines."""
    model = load(tiny_llama_checkpoint, quantization=kind).model.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items() if torch.is_tensor(value)}
    with torch.no_grad():
        first = model(ids).logits
    for key, value in model.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(before[key], value), key
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    second = model(inputs_embeds=embedded).logits
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    second.sum().backward()
    assert embedded.grad.abs().sum() > 0
    if kind == "4bit":
        layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_weights_that_do_not_fit_are_refused_quantised_too(
    tiny_llama_checkpoint: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for change, message in (
        (lambda w: w[name].fill_(torch.nan), f"8192 values of '{name}'"),
        (lambda w: w.update({name: torch.ones(64, 64)}), f"{name} .64, 64. in the file"),
        (lambda w: w.pop(name), f"1 missing keys: {name}"),
    ):
        copy = shutil.copytree(tiny_llama_checkpoint, tmp_path / message[:4].strip("'"))
        edit_weights(copy, change)
        for kind in ("8bit", "4bit"):
            refused(copy, message, quantization=kind)


def test_a_model_in_which_nothing_was_quantised_is_refused() -> None:
    with pytest.raises(InputError, match="'tiny' has no layer that bitsandbytes quantises to 4bit"):
        prepare_quantised_(tiny_gpt2(), "tiny", "4bit")


def test_probe_error_is_kl_and_largest_difference() -> None:
    plain = torch.tensor([[0.5, 0.25, 0.25]]).log()
    loaded = torch.tensor([[0.25, 0.5, 0.25]]).log()
    error = probe_error(loaded, plain)
    assert error["kl"] == pytest.approx(0.5 * torch.log(torch.tensor(2.0)).item() * 0.5, rel=1e-5)
    assert error["max_logit"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert probe_error(plain, plain) == {"kl": 0, "max_logit": 0}


# --- adapters --------------------------------------------------------------------------------------------


def make_adapter(base: Path, folder: Path, targets: list[str], **changes: object) -> Path:
    model = load(base).model
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", **changes)
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    return make_adapter(folder, tmp_path / "adapter", ["c_attn", "c_fc"], fan_in_fan_out=True)


def logits(loaded: LoadedCheckpoint, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(ids).logits


def test_merged_and_live_adapters_are_the_same_function(folder: Path, adapter: Path, ids) -> None:
    base, merged = load(folder), load(folder, adapter=str(adapter))
    live = load(folder, adapter=str(adapter), adapter_mode="live")
    scale = logits(merged, ids).abs().max()
    assert (logits(merged, ids) - logits(base, ids)).abs().max() > 0.01 * scale
    assert (logits(merged, ids) - logits(live, ids)).abs().max() <= 1e-5 * scale
    assert type(live.model) is type(base.model)
    assert live.model.get_submodule("transformer.h.0.attn")
    assert any("lora_A" in name for name, _ in live.model.named_parameters())
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    assert merged.sha256 == live.sha256 != base.sha256
    assert live.facts["base_sha256"] == base.sha256
    assert (merged.facts["adapter_mode"], live.facts["adapter_mode"]) == ("merged", "live")
    plain = load(folder, plain=True, adapter=str(adapter), adapter_mode="live")
    assert torch.equal(logits(plain, ids), logits(merged, ids))


def test_a_live_adapter_passes_the_self_check(folder: Path, adapter: Path) -> None:
    config = DenseConfig(path=str(folder), adapter=str(adapter), adapter_mode="live")
    assert len(DenseModel.from_pretrained(config).sites) == 4


def test_a_live_adapter_on_quantised_weights(tiny_llama_checkpoint: Path, tmp_path: Path, ids) -> None:
    path = make_adapter(tiny_llama_checkpoint, tmp_path / "adapter", ["q_proj", "up_proj"])
    settings = {"adapter": str(path), "quantization": "8bit"}
    loaded = load(tiny_llama_checkpoint, adapter_mode="live", **settings)
    plain = load(tiny_llama_checkpoint, plain=True, adapter_mode="live", **settings)
    assert probe_error(logits(loaded, ids), logits(plain, ids))["kl"] < 0.02
    assert not isinstance(plain.model.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)
    with pytest.raises(UsageError, match="adapter_mode merged cannot be had in 8bit weights"):
        load(tiny_llama_checkpoint, **settings)


def test_row_22_an_adapter_of_another_base_is_refused_naming_both(folder: Path, adapter: Path) -> None:
    settings = adapter / "adapter_config.json"
    edit_json(settings, base_model_name_or_path="org/other-model")
    refused(folder, f"made for 'org/other-model', the checkpoint is '{folder}'", adapter=str(adapter))
    edit_json(settings, base_model_name_or_path=None)
    refused(folder, "made for 'an unnamed base'", adapter=str(adapter))
    edit_json(settings, base_sha256=load(folder).sha256)
    assert load(folder, adapter=str(adapter)).facts["adapter"] == str(adapter)
    edit_json(settings, base_model_name_or_path=str(folder), base_sha256="0" * 64)
    refused(folder, "made for a base with weights 000000000000", adapter=str(adapter))


def cut(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def pickled(adapter: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


def edit_adapter(adapter: Path, change) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, adapter / "adapter_model.safetensors")


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no adapter_config.json in"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors in"),
        (pickled, r"no adapter_model.safetensors in .* \(adapter_model.bin is pickled, and refused\)"),
        (cut, "its header needs"),
        (lambda a: edit_json(a / "adapter_config.json", peft_type="IA3"), "of type 'IA3'; LORA is supported"),
        (lambda a: edit_json(a / "adapter_config.json", megatron_config={"a": 1}), "sets megatron_config"),
        (lambda a: edit_json(a / "adapter_config.json", r=8), "does not fit the checkpoint: .*size mismatch"),
        (
            lambda a: edit_json(a / "adapter_config.json", target_modules=["zz"]),
            "does not fit the checkpoint",
        ),
        (lambda a: edit_adapter(a, lambda w: w.pop(FIRST)), "does not fit: 1 tensors that it lacks"),
        (
            lambda a: edit_adapter(a, lambda w: w.update({FIRST.replace("h.0", "h.7"): w[FIRST].clone()})),
            "1 tensors that it has no place for",
        ),
        (lambda a: edit_adapter(a, lambda w: w[FIRST].fill_(torch.nan)), "are NaN or infinite"),
        (lambda a: (a / "x.json").symlink_to("/etc/hostname"), "outside of"),
    ],
)
@pytest.mark.parametrize("mode", ["merged", "live"])
def test_row_22_adapters_that_do_not_fit_are_refused(
    folder: Path, adapter: Path, damage, message: str, mode: str
) -> None:
    damage(adapter)
    refused(folder, message, adapter=str(adapter), adapter_mode=mode)
