"""The dense model behind its sites: record, replace, run from, add; then every family of the table."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, SeedOssConfig

from bridges import families
from bridges.coupled import CoupledModel, LossConfig
from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.evaluate import measure_energies_
from bridges.warm_start import StudentShape, make_student
from extractor.cache_name import CACHE_NAME, cache_of
from extractor.errors import UnsupportedModelError
from extractor.rotation import RotationConfig
from extractor.sites import Node, Recorder, Site
from extractor.sparsity import SparsityConfig, WeightSparsifier
from tests.conftest import tiny_gpt2
from tests.families import TINY, copy_error, tail_error, tiny_model
from tests.families import tokens as family_tokens


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
    right = families.FAMILIES["gpt2"]
    wrong = replace(right, layout=replace(right.layout, mid="ln_1"))
    monkeypatch.setitem(families.FAMILIES, "gpt2", wrong)
    with pytest.raises(
        UnsupportedModelError, match="0.resid_mid by its own recording changes .* by [0-9.e-]+"
    ):
        DenseModel(tiny_gpt2())


def test_only_the_sites_asked_for_are_held(dense: DenseModel, tokens: torch.Tensor) -> None:
    wanted = Site(1, "resid_mid")
    run = dense.run(tokens, record=[wanted])
    assert list(run.resid) == [wanted]
    assert torch.equal(run.resid[wanted], dense.run(tokens).resid[wanted])
    assert dense.run(tokens, record=False).resid == {}


def test_the_self_check_costs_two_short_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt2()
    runs = {"attention": 0, "mlp": 0}
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda *_: runs.update(attention=runs["attention"] + 1))
        block.mlp.register_forward_hook(lambda *_: runs.update(mlp=runs["mlp"] + 1))
    DenseModel(model)
    layers = len(model.transformer.h)
    # The unhooked forward, a recorded one, one of MLPs only, and one last MLP.
    assert runs == {"attention": 2 * layers, "mlp": 3 * layers + 1}


# --- every family --------------------------------------------------------------------------------------

COPIED = [row for row, (model_type, _) in TINY.items() if families.FAMILIES[model_type].copy is not None]


@pytest.fixture(scope="module")
def of_family() -> dict[str, DenseModel]:
    """Made once a row: nothing in these tests changes a dense model."""
    return {}


@pytest.fixture
def family(request: pytest.FixtureRequest, of_family: dict[str, DenseModel]) -> DenseModel:
    if request.param not in of_family:
        of_family[request.param] = DenseModel(tiny_model(request.param))
    return of_family[request.param]


every_family = pytest.mark.parametrize("family", list(TINY), indirect=True)
copied_families = pytest.mark.parametrize("family", COPIED, indirect=True)


def test_every_listed_family_has_a_tiny_model() -> None:
    assert {model_type for model_type, _ in TINY.values()} == set(families.FAMILIES)


@every_family
def test_recordings_and_tails_of_every_family(family: DenseModel) -> None:
    ids = family_tokens()
    plain = family.model(ids, use_cache=False).logits
    assert torch.equal(family.run(ids).logits, plain)
    assert tail_error(family) <= 1e-5
    assert len(family.sites) == (2 if family.is_parallel else 4)


@every_family
def test_a_recording_is_what_the_blocks_pass_on(family: DenseModel) -> None:
    ids = family_tokens()
    hidden = family.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    recorded = family.run(ids).resid[Site(1, "resid_pre")]
    assert torch.equal(recorded, hidden[1])


@every_family
def test_adding_equals_running_from_the_changed_stream_in_every_family(family: DenseModel) -> None:
    ids = family_tokens(9)
    run = family.run(ids)
    for site in family.sites:
        delta = torch.randn(run.resid[site].shape, generator=torch.Generator().manual_seed(3))
        with family.adding(site, delta) as model:
            live = model(ids, use_cache=False).logits
        tail = family.run_from(site, run.resid[site] + delta)
        torch.testing.assert_close(live, tail, atol=1e-4, rtol=1e-4)
        assert (live - run.logits).abs().max() > 0.01


@every_family
def test_generate_under_an_edit_is_the_same_with_and_without_the_cache(family: DenseModel) -> None:
    ids = family_tokens(9)
    site = family.sites[len(family.sites) // 2]
    resid = family.run(ids, record=[site]).resid[site]
    delta = 3 * resid.std() * torch.randn(resid.shape, generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": ids > 0}
    unedited = family.model.generate(ids, **options)
    with family.adding(site, delta) as model:
        cached = model.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert not torch.equal(cached, unedited)


@pytest.mark.parametrize("family", ["GPT-2", "Gemma 3 (text)", "Mistral (sliding window)"], indirect=True)
def test_logits_of_an_edit_are_the_same_with_and_without_the_cache(family: DenseModel) -> None:
    ids = family_tokens(12)
    site = family.sites[1]
    delta = torch.randn(3, 8, family.width, generator=torch.Generator().manual_seed(3))
    for one_delta in (delta, delta[0, 0]):  # on the prompt's positions, and on all
        with family.adding(site, one_delta) as model:
            whole = model(ids, use_cache=False).logits
            cache = cache_of(model(ids[:, :7], use_cache=True))
            options = {CACHE_NAME: cache, "use_cache": True}
            steps = [model(ids[:, i : i + 1], **options).logits for i in range(7, 12)]
        torch.testing.assert_close(torch.cat(steps, 1), whole[:, 7:], atol=1e-4, rtol=1e-4)


@copied_families
def test_the_warm_start_is_exact(family: DenseModel) -> None:
    for wider in (False, True):
        assert abs(copy_error(family, wider=wider)) <= 1e-6


@copied_families
def test_the_warm_start_would_show_a_wrong_gain(family: DenseModel) -> None:
    """The bound above can fail: a norm's gain off by a tenth is far outside it."""
    row = next(row for row in COPIED if TINY[row][0] == family.config.model_type)
    model = tiny_model(row)
    norms = [p for n, p in model.named_parameters() if p.ndim == 1 and n.endswith("weight")]
    if not norms:
        pytest.skip("OLMo's norms have no weights, so there is no gain to forget")
    exact = DenseModel(model)
    student, _ = make_student(exact, StudentShape(), RotationConfig(enabled=False))
    ids = family_tokens()
    for norm in norms:
        with torch.no_grad():
            norm.mul_(1.1)
    moved = exact.run(ids, record=False).logits - student(ids).logits
    assert moved.abs().max() > 1e-2


@copied_families
def test_one_training_step_of_a_copy(family: DenseModel) -> None:
    student, bridges = make_student(family, StudentShape(), RotationConfig(enabled=False))
    ids = family_tokens()
    measure_energies_(family, student, bridges, ids)
    coupled = CoupledModel(student.train(), bridges, family, LossConfig(hybrid_sites="all"))
    sparsifier = WeightSparsifier(student.sparse_matrices(), SparsityConfig(density=0.25, anneal_frac=0), 1)
    optimizer = torch.optim.AdamW(coupled.parameters(), lr=1e-3)
    losses = coupled(ids, seed=0, step=0)
    # An exact copy with exact bridges: nothing to learn but the text.
    assert abs(losses.kl) < 1e-5
    assert abs(losses.kl_dense_to_sparse) < 1e-5
    assert abs(losses.kl_sparse_to_dense) < 1e-5
    assert losses.nmse < 1e-8
    losses.total.backward()
    untouched = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert not untouched, untouched
    optimizer.step()
    sparsifier.project_(1)
    for matrix in student.sparse_matrices().values():
        assert int(matrix.count_nonzero()) == round(0.25 * matrix.numel())


@copied_families
def test_one_edit_through_the_bridge_is_what_the_student_reads(family: DenseModel) -> None:
    """With exact bridges, an edit of every channel read at a site moves the read to its new value."""
    student, bridges = make_student(family, StudentShape(), RotationConfig(enabled=False))
    ids = family_tokens(9)
    measure_energies_(family, student, bridges, ids)
    site = family.sites[-1]
    recorder = Recorder(site.read_address, str(site))
    student(ids, tap=recorder)
    presented = recorder[site.read_address]
    # Half way to the next prompt's reads, but of the same length, which the norm would take away.
    wanted = 0.5 * (presented + presented.roll(1, 0))
    wanted = wanted * (presented.norm(dim=-1, keepdim=True) / wanted.norm(dim=-1, keepdim=True))
    nodes = [Node(site.read_address, channel) for channel in range(family.width)]
    run = family.run(ids)
    edit = Edit.from_nodes(nodes, site, bridges)
    # The ratio is a mean over text and the student's own here: exact where streams are alike in length.
    delta = edit.delta(presented, wanted, bridges.read_scale(run.resid[site])) / bridges.rms_ratio(site)
    moved = Recorder(site.read_address)
    stream = bridges[site].encode(bridges.centred(run.resid[site] + delta))
    student(ids, start=site, resid=stream, tap=moved)
    torch.testing.assert_close(moved[site.read_address], wanted, atol=1e-3, rtol=1e-3)
    with family.adding(site, delta) as model:
        assert (model(ids, use_cache=False).logits - run.logits).abs().max() > 0.01


@pytest.mark.parametrize("family", [row for row in TINY if row not in COPIED], indirect=True)
def test_families_without_a_copy_get_a_random_student(family: DenseModel) -> None:
    with pytest.raises(UnsupportedModelError, match="no exact copy .* student.start random"):
        make_student(family, StudentShape(), RotationConfig())
    student, bridges = make_student(family, StudentShape(start="random"), RotationConfig())
    assert bridges.sites == family.sites == student.sites
    ids = family_tokens()
    losses = CoupledModel(student.train(), bridges, family, LossConfig())(ids, seed=0, step=0)
    losses.total.backward()
    assert losses.total.isfinite()
    assert student.layers[0].attn.q_proj.weight.grad.any()


@pytest.mark.parametrize("family", COPIED[::4], indirect=True)
def test_a_saved_copy_is_the_same_student(family: DenseModel, tmp_path) -> None:
    student, _ = make_student(family, StudentShape(), RotationConfig(enabled=False))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = family_tokens()
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = loaded.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, loaded.generate(ids, use_cache=False, **options))


# --- families that are not listed ------------------------------------------------------------------------


def unlisted() -> torch.nn.Module:
    config = SeedOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_an_unlisted_family_is_refused_with_the_list() -> None:
    with pytest.raises(UnsupportedModelError, match="'seed_oss' is not supported; supported: .*gpt2.*llama"):
        DenseModel(unlisted())


def test_an_unlisted_family_of_the_standard_shape_may_be_tried() -> None:
    dense = DenseModel(unlisted(), allow_unlisted=True)
    assert tail_error(dense) <= 1e-5
    with pytest.raises(UnsupportedModelError, match="an unlisted family is not copied"):
        make_student(dense, StudentShape(), RotationConfig())


def test_an_unlisted_family_of_another_shape_is_refused() -> None:
    """Bloom adds the residual inside its attention: the guess fits its names, the self-check does not."""
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match="changes what follows|standard shape"):
        DenseModel(model, allow_unlisted=True)


def test_families_that_leak_between_packed_documents_are_found() -> None:
    """OPT and gpt-oss do not pass position ids to their masks (nor did Falcon, up to transformers 5.23)."""
    DenseModel(tiny_model("Llama")).check_documents_apart()
    for row in ("OPT", "gpt-oss"):
        with pytest.raises(UnsupportedModelError, match="a packed document sees the one before it"):
            DenseModel(tiny_model(row)).check_documents_apart()
