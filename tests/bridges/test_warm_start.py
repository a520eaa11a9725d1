"""The student starts as an exact copy; the bridges start exact with it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from bridges.evaluate import compare_on_text, evaluate_bridges
from bridges.warm_start import StudentShape, make_student
from extractor.errors import InputError, UnsupportedModelError
from extractor.rotation import RotationConfig
from extractor.sites import Recorder
from tests.conftest import tiny_gpt2
from tests.families import tiny_model

TURNED = RotationConfig(stream_steps=40, head_steps=20)
AS_TRAINED = RotationConfig(enabled=False)
WIDER = {"hidden_size": 45, "intermediate_size": 200, "num_attention_heads": 6}


@pytest.mark.parametrize("rotation", [AS_TRAINED, TURNED], ids=["as_trained", "turned"])
@pytest.mark.parametrize("sizes", [{}, WIDER], ids=["equal", "wider"])
@pytest.mark.parametrize("options", [{}, {"bigram_table": True}], ids=["plain", "bigram"])
def test_copy_is_exact(sizes, rotation, options, dense: DenseModel, tokens: torch.Tensor) -> None:
    student, bridges = make_student(dense, StudentShape(**sizes, **options), rotation)
    assert abs(compare_on_text(dense, student, tokens)["kl_dense"]) <= 1e-6
    recorder = Recorder()
    student(tokens, tap=recorder)
    run = dense.run(tokens)
    for site in dense.sites:
        resid = bridges.centred(run.resid[site])
        scale = resid.abs().max()
        assert (bridges[site].encode(resid) - recorder[str(site)]).abs().max() < 1e-4 * scale
        assert (bridges[site].decode(recorder[str(site)]) - resid).abs().max() < 1e-4 * scale


def test_every_single_switch_pass_is_exact_at_the_start(dense: DenseModel, tokens: torch.Tensor) -> None:
    student, bridges = make_student(dense, StudentShape(), TURNED)
    for row in evaluate_bridges(dense, student, bridges, tokens).values():
        assert max(map(abs, row.values())) < 1e-5


def test_random_start_is_not_a_copy(dense: DenseModel, tokens: torch.Tensor) -> None:
    student, _ = make_student(dense, StudentShape(start="random"), AS_TRAINED)
    assert compare_on_text(dense, student, tokens)["kl_dense"] > 0.01


def test_narrower_than_the_dense_model_is_refused(dense: DenseModel) -> None:
    with pytest.raises(InputError, match="hidden_size is 16; the dense model has 32"):
        make_student(dense, StudentShape(hidden_size=16), AS_TRAINED)


def test_heads_that_do_not_fill_a_group_are_refused() -> None:
    dense = DenseModel(tiny_model("Llama"))  # 2 heads share a key and value
    with pytest.raises(InputError, match="num_attention_heads is 5; 2 heads share .* a multiple of 2"):
        make_student(dense, StudentShape(num_attention_heads=5), AS_TRAINED)


@pytest.mark.parametrize(
    "option", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}], ids=str
)
def test_other_attention_scales_are_folded(option: dict, tokens: torch.Tensor) -> None:
    dense = DenseModel(tiny_gpt2(**option))
    student, _ = make_student(dense, StudentShape(), AS_TRAINED)
    assert abs(compare_on_text(dense, student, tokens)["kl_dense"]) <= 1e-6


def test_an_option_the_student_does_not_have_is_refused_by_name() -> None:
    model = tiny_model("Cohere")
    config = type(model.config)(**{**model.config.to_dict(), "use_qk_norm": True})
    dense = DenseModel(AutoModelForCausalLM.from_config(config))
    with pytest.raises(
        UnsupportedModelError, match="'cohere' with LayerNorm on q and k; student.start random"
    ):
        make_student(dense, StudentShape(), AS_TRAINED)


def test_extra_channels_heads_and_neurons_learn(tokens: torch.Tensor, dense: DenseModel) -> None:
    """Read at random and written as zero: gradients reach both; written and read as zero, neither."""
    student, _ = make_student(dense, StudentShape(**WIDER), TURNED)
    student(tokens, labels=tokens).loss.backward()
    layer = student.layers[0]
    assert layer.mlp.down_proj.weight.grad[:, 150:].any()  # what extra neurons write
    assert layer.attn.o_proj.weight.grad[:, 34:].any()  # what extra heads write
    assert layer.mlp.down_proj.weight.grad[33:].any()  # what is written to extra channels
    assert student.embed_tokens.weight.grad[:, 33:].any()


def test_a_narrower_random_student_is_allowed(dense: DenseModel, tokens: torch.Tensor) -> None:
    shape = StudentShape(start="random", hidden_size=16, intermediate_size=20)
    student, bridges = make_student(dense, shape, AS_TRAINED)
    resid = dense.run(tokens).resid[dense.sites[1]]
    assert bridges[dense.sites[1]].encode(resid).shape == (*tokens.shape, 16)
    assert student(tokens).logits.shape[-1] == dense.config.vocab_size


def test_bridges_round_trip(dense: DenseModel, tmp_path) -> None:
    _, bridges = make_student(dense, StudentShape(hidden_size=40), TURNED)
    bridges.dense_energy.copy_(torch.rand(4))
    bridges.save_pretrained(tmp_path / "bridges", dense_sha256="x")
    loaded = BridgeSet.from_pretrained(tmp_path / "bridges")
    assert loaded.sites == bridges.sites
    assert loaded.removes_mean
    for key, value in bridges.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_damaged_bridges_are_refused(dense: DenseModel, tmp_path) -> None:
    _, bridges = make_student(dense, StudentShape(), AS_TRAINED)
    bridges.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "bridges.safetensors").unlink()
    with pytest.raises(InputError, match="whole bridges"):
        BridgeSet.from_pretrained(tmp_path / "b")
