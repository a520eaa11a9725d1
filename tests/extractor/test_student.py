"""The student: one forward, its taps, its cache, its files."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from extractor.cache_name import CACHE_NAME, cache_of
from extractor.sites import NODE_KINDS, Node, Recorder, Site, node_addresses
from extractor.student import Student
from tests.conftest import tiny_student_config

OPTIONS = [
    {},
    {"activation_frac": 0.25},
    {"attention_sink": True, "bigram_table": True},
    {"attn_logit_softcapping": 2.0},
]


@pytest.fixture(params=OPTIONS, ids=["plain", "abs_topk", "sink_bigram", "soft_cap"])
def model(request: pytest.FixtureRequest) -> Student:
    student = Student(tiny_student_config(**request.param)).eval()
    for parameter in student.parameters():  # so that sinks, biases and bigrams are not zero
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return student


def test_tail_from_every_site_is_the_whole_forward(model: Student, tokens: torch.Tensor) -> None:
    recorder = Recorder()
    logits = model(tokens, tap=recorder).logits
    for site in model.sites:
        tail = model(tokens, start=site, resid=recorder[str(site)]).logits
        assert torch.equal(tail, logits), site


def test_taps_see_every_address_once_in_order(model: Student, tokens: torch.Tensor) -> None:
    seen: list[str] = []

    def tap(address: str, activation: torch.Tensor) -> torch.Tensor:
        seen.append(address)
        return activation

    logits = model(tokens, tap=tap).logits
    nodes = [address for address in seen if address.partition(".")[2] in NODE_KINDS]
    assert nodes == list(node_addresses(2))
    assert seen[-1] == "final_resid"
    assert torch.equal(logits, model(tokens).logits)


def test_a_tap_changes_what_follows(model: Student, tokens: torch.Tensor) -> None:
    def zero_second_mlp(address: str, activation: torch.Tensor) -> torch.Tensor:
        return activation * 0 if address == "1.mlp.resid_delta" else activation

    recorder = Recorder("1.resid_mid", "final_resid")
    model(tokens, tap=recorder)
    other = Recorder("final_resid")
    model(tokens, tap=lambda a, x: other(a, zero_second_mlp(a, x)))
    assert torch.equal(other["final_resid"], recorder["1.resid_mid"])


def test_generation_with_cache_equals_without(model: Student, tokens: torch.Tensor) -> None:
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(
        model.generate(tokens, **settings), model.generate(tokens, use_cache=False, **settings)
    )


def test_the_cache_has_the_name_of_the_installed_transformers_and_the_old_one(
    model: Student, tokens: torch.Tensor
) -> None:
    whole = model(tokens).logits[:, 7:]
    for name in {CACHE_NAME, "past_key_values"}:
        first = model(tokens[:, :7], use_cache=True)
        assert first[CACHE_NAME] is cache_of(first)
        rest = model(tokens[:, 7:], **{name: cache_of(first)})
        torch.testing.assert_close(rest.logits, whole, atol=1e-5, rtol=1e-5)
        assert cache_of({name: cache_of(rest)}).get_seq_length() == tokens.shape[1]
    assert cache_of({}) is None


def test_generation_runs_through_the_tap(student: Student, tokens: torch.Tensor) -> None:
    mask = torch.ones_like(tokens)
    plain = student.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)

    def push(address: str, activation: torch.Tensor) -> torch.Tensor:
        return activation.flip(-1) if address == "final_resid" else activation

    tapped = student.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, tap=push)
    uncached = student.generate(
        tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, tap=push, use_cache=False
    )
    assert not torch.equal(plain, tapped)
    assert torch.equal(tapped, uncached)


def test_left_padding_changes_nothing(model: Student, tokens: torch.Tensor) -> None:
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(16) >= 4).long().expand(3, 16)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_bf16_weights_and_autocast_run_and_agree(model: Student, tokens: torch.Tensor) -> None:
    exact = model(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = model(tokens).logits
    in_bf16 = model.to(torch.bfloat16)(tokens).logits
    for logits in (under_autocast, in_bf16):
        assert logits.isfinite().all()
        assert (logits - exact).abs().max() > 0  # bf16 really ran
        if model.config.activation_frac is None:  # near-ties in AbsTopK may fall otherwise
            assert (logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_saved_student_loads_with_auto_class_and_keeps_zeros(model: Student, tmp_path, tokens) -> None:
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, Student)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert int((loaded.layers[0].mlp.up_proj.weight == 0).sum()) == 48 * 16


def test_random_start_scales_writes_and_keeps_bigrams_at_zero() -> None:
    student = Student(tiny_student_config(hidden_size=64, bigram_table=True))
    assert student.bigram.weight.abs().max() == 0
    ratio = student.layers[0].mlp.down_proj.weight.std() / student.layers[0].mlp.up_proj.weight.std()
    assert ratio.item() == pytest.approx(0.5, rel=0.1)  # 1 / sqrt(2 * 2 layers)


def test_abs_topk_holds_at_every_node(tokens: torch.Tensor) -> None:
    student = Student(tiny_student_config(activation_frac=0.25)).eval()
    recorder = Recorder(*node_addresses(2))
    student(tokens, tap=recorder)
    for address, activation in recorder.activations.items():
        kept = activation.count_nonzero(dim=-1)
        assert (kept == activation.shape[-1] // 4).all(), address


def test_abs_topk_can_be_changed_and_is_saved(student: Student, tokens: torch.Tensor, tmp_path) -> None:
    before = student(tokens).logits
    student.set_activation_frac(0.25)
    student.save_pretrained(tmp_path)
    sparse = student(tokens).logits
    assert not torch.equal(sparse, before)
    assert torch.equal(Student.from_pretrained(tmp_path)(tokens).logits, sparse)
    student.set_activation_frac(None)
    assert torch.equal(student(tokens).logits, before)


@pytest.mark.parametrize("name", ["0.resid_pre", "11.resid_mid"])
def test_site_names_round_trip(name: str) -> None:
    site = Site.parse(name)
    assert str(site) == name
    assert Site.at(site.index) == site


@pytest.mark.parametrize("name", ["x.resid_pre", "0.resid", "0.resid_mid.1", ""])
def test_wrong_site_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="write it as"):
        Site.parse(name)


def test_node_names_round_trip() -> None:
    assert str(Node.parse("3.mlp.post_act:17")) == "3.mlp.post_act:17"
    with pytest.raises(ValueError, match="write it as"):
        Node.parse("3.mlp.post:17")
