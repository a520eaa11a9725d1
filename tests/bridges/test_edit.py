"""Coupled training losses and edits: oracles with an exact bridge."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bridges.bridge import BridgeSet
from bridges.choose import edits_to_try, grow_edits
from bridges.coupled import CoupledModel, LossConfig
from bridges.dense import DenseModel
from bridges.edit import Edit, EditLimits, Hashes, add_facts, unmet_limits
from bridges.edit_controls import measure_edit
from bridges.evaluate import measure_energies_
from bridges.live import LiveEdit
from bridges.losses import kl_divergence, log_probs, normalised_mse
from bridges.search import EditConfig
from bridges.streams import PromptStreams
from bridges.warm_start import StudentShape, make_student
from extractor.circuit import Circuit
from extractor.errors import InputError
from extractor.intervention import Condition, clamp, steer
from extractor.rotation import RotationConfig
from extractor.sites import Node, Recorder, Site
from extractor.tasks import TaskBatch

ROTATIONS = {
    "identity": RotationConfig(enabled=False),
    "turned": RotationConfig(stream_steps=30, head_steps=10),
}
CONFIG = EditConfig(max_size=4, strengths=(0.0, 1.0, 2.0), control_draws=2)


@pytest.fixture(params=ROTATIONS.values(), ids=ROTATIONS.keys())
def pair(request: pytest.FixtureRequest, dense: DenseModel, tokens: torch.Tensor):
    student, bridges = make_student(dense, StudentShape(hidden_size=40), request.param)
    measure_energies_(dense, student, bridges, tokens)
    return student, bridges


@pytest.fixture
def prompts() -> TaskBatch:
    """Six pairs that differ in the second token; the answers are two arbitrary tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 97, (6, 8), generator=generator).repeat(2, 1)
    ids[:6, 1], ids[6:, 1] = 11, 12
    answer = torch.cat([torch.full((6,), 21), torch.full((6,), 22)])
    return TaskBatch(ids, torch.full((12,), 7), answer, answer.roll(6))


def test_an_edit_is_the_intervention_seen_through_an_exact_bridge(dense, pair, prompts) -> None:
    """The dense model with the edit answers as the student with the same change of its stream.

    A change of some channels also has a part that the dense stream cannot hold (its mean, and the
    student's extra width); the student gets what is left of it after crossing and coming back.
    """
    student, bridges = pair
    streams = PromptStreams(dense, student, bridges, prompts)
    recorder = Recorder()
    student(prompts.ids, tap=recorder)
    for site in dense.sites:
        nodes = [Node(site.read_address, channel) for channel in (0, 5, 17)]
        edit = Edit.from_nodes(nodes, site, bridges)
        delta = streams.delta(edit)
        presented = recorder[site.read_address]
        change = prompts.counterfactual(presented) - presented
        only = torch.zeros_like(change)
        only[..., [0, 5, 17]] = change[..., [0, 5, 17]]
        stream, bridge = recorder[str(site)], bridges[site]
        only = only * stream.square().mean(-1, keepdim=True).sqrt()
        moved = stream + bridge.encode(bridges.centred(bridge.decode(only)))
        expected = prompts.logit_difference(student(prompts.ids, start=site, resid=moved).logits)
        measured = streams.differences(site, delta)[0]
        torch.testing.assert_close(measured, expected, atol=2e-4, rtol=1e-3)


def test_moving_every_channel_is_moving_the_normed_stream(dense, pair, prompts) -> None:
    """After the norm of the site, all channels at strength 1 read as the counterfactual prompt does."""
    student, bridges = pair
    streams = PromptStreams(dense, student, bridges, prompts)
    site = Site(1, "resid_pre")
    nodes = [Node(site.read_address, channel) for channel in range(40)]
    delta = streams.delta(Edit.from_nodes(nodes, site, bridges))
    resid = bridges.centred(streams.resid[site])
    scale = resid.square().mean(-1, keepdim=True).sqrt()
    normed_after = (resid + delta) / scale
    other = prompts.counterfactual(resid / scale)
    torch.testing.assert_close(normed_after, other, atol=1e-3, rtol=1e-3)


def test_strength_zero_flips_nothing_and_lists_match(dense, pair, prompts) -> None:
    student, bridges = pair
    streams = PromptStreams(dense, student, bridges, prompts)
    edit = Edit.from_nodes([Node("0.attn.act_in", 3)], Site(0, "resid_pre"), bridges)
    found = measure_edit(streams, edit, bridges, CONFIG, seed=0)
    for key in ("flip_rate", "flip_rate_indirect", "control_random_node", "control_random_direction"):
        assert len(found[key]) == 3
        assert found[key][0] == 0
    assert found["size"] == 1
    assert found["num_prompts"] == 12


def test_chosen_nodes_are_the_circuits_and_no_more_than_allowed(dense, pair, prompts) -> None:
    student, bridges = pair
    streams = PromptStreams(dense, student, bridges, prompts)
    nodes = frozenset(Node("0.attn.act_in", channel) for channel in range(40))
    circuit = Circuit("t", nodes, (), "sha", {})
    edit = edits_to_try(grow_edits(streams, circuit, bridges, CONFIG), CONFIG)[0].edit(bridges)
    assert set(edit.nodes) < nodes
    assert len(edit.nodes) <= 4
    assert edit.site == Site(0, "resid_pre")
    empty = Circuit("t", frozenset(), (), "sha", {})
    assert edits_to_try(grow_edits(streams, empty, bridges, CONFIG), CONFIG) == []


def test_nodes_of_another_site_are_refused(pair) -> None:
    _, bridges = pair
    with pytest.raises(InputError, match="is not read at 1.resid_mid"):
        Edit.from_nodes([Node("0.attn.act_in", 3)], Site(1, "resid_mid"), bridges)


@pytest.mark.parametrize("source", ["student", "bridge"])
def test_edit_round_trips_and_refuses_another_base(dense, pair, tokens, tmp_path, source) -> None:
    """What is loaded adds the same deltas, whatever the edit is made of."""
    student, bridges = pair
    condition = Condition(Node("0.attn.act_in", 7), ">", 0.1)
    intervention = (
        clamp([Node("1.mlp.act_in", 3), Node("0.attn.act_in", 9)], [2.0, -1.0], positions="last")
        + steer([Node("0.mlp.resid_delta", 2)], [0.7], condition=condition, strength=1.5)
        + clamp([Node("0.mlp.post_act", 5)], [3.0])
    )
    hashes = Hashes(dense_sha256=dense.sha256, student_sha256="s", bridges_sha256="b")
    edit = Edit.from_intervention(intervention, student, bridges, source=source, hashes=hashes)
    edit.save(tmp_path / "e", {"task": "t"})
    loaded = Edit.load(tmp_path / "e", dense)
    assert (loaded.intervention, loaded.sites, loaded.hashes) == (intervention, edit.sites, hashes)
    assert [str(site) for site in loaded.sites] == ["0.resid_pre", "1.resid_pre", "1.resid_mid"]
    assert torch.equal(loaded.directions, edit.directions)
    logits = []
    for one in (edit, loaded):
        with torch.no_grad(), LiveEdit(one, dense, student).applied() as model:
            logits.append(model(tokens, use_cache=False).logits)
    assert torch.equal(*logits)
    header = json.loads((tmp_path / "e" / "edit.json").read_text())
    assert (header["schema_version"], header["source"], header["task"]) == (1, source, "t")
    dense.sha256 = "another"
    with pytest.raises(InputError, match="another"):
        Edit.load(tmp_path / "e", dense)


def test_a_patch_at_one_site_keeps_the_names_that_reports_read(dense, pair, tmp_path) -> None:
    _, bridges = pair
    nodes = [Node("1.mlp.act_in", 3), Node("1.mlp.act_in", 9)]
    edit = Edit.from_nodes(nodes, Site(1, "resid_mid"), bridges)
    replace(edit, hashes=Hashes(dense.sha256)).save(tmp_path / "e")
    header = json.loads((tmp_path / "e" / "edit.json").read_text())
    assert (header["site"], header["nodes"]) == ("1.resid_mid", ["1.mlp.act_in:3", "1.mlp.act_in:9"])
    loaded = Edit.load(tmp_path / "e", dense)
    assert (loaded.site, loaded.nodes) == (edit.site, edit.nodes)
    assert torch.equal(loaded.directions, edit.directions)


def test_a_saved_edit_moves_the_stream_as_the_chosen_one(dense, pair, prompts, tmp_path) -> None:
    """Nodes are chosen in any order, crossings hold them in the model's: each must keep its own direction."""
    student, bridges = pair
    streams, site = PromptStreams(dense, student, bridges, prompts), Site(1, "resid_mid")
    chosen = Edit.from_nodes([Node(site.read_address, channel) for channel in (17, 0, 5)], site, bridges)
    crossed = Edit.from_intervention(chosen.intervention, student, bridges, hashes=Hashes(dense.sha256))
    crossed.save(tmp_path / "e")
    delta = streams.delta(chosen)
    assert delta.norm() > 0.1
    for edit in (crossed, Edit.load(tmp_path / "e", dense)):
        assert set(edit.nodes) == set(chosen.nodes)
        torch.testing.assert_close(streams.delta(edit), delta, atol=1e-6, rtol=1e-5)


def test_an_edit_that_misses_a_limit_is_refused_and_says_so_when_forced(dense, pair, tmp_path) -> None:
    student, bridges = pair
    node = Node("1.mlp.act_in", 3)
    hashes = Hashes(dense.sha256)
    edit = Edit.from_intervention(steer([node], [1.0]), student, bridges, hashes=hashes)
    limits = EditLimits(bridge_nmse=0.3, bridge_kl=0.2, off_target_kl=0.02)
    good = {"nmse_decode": 0.29, "nmse_encode": 0.31, "kl_sparse_to_dense": 0.2}
    facts = {"1.resid_mid": good}
    assert unmet_limits(edit, limits, facts, 0.02) == ()
    by_bridge = Edit.from_intervention(steer([node], [1.0]), student, bridges, source="bridge")
    assert "nmse_encode 0.31, the limit is 0.3" in unmet_limits(by_bridge, limits, facts)[0]
    for bad, kl, message in (
        ({"1.resid_mid": good | {"nmse_decode": 0.4}}, None, "nmse_decode 0.4, the limit is 0.3"),
        ({"1.resid_mid": good | {"kl_sparse_to_dense": math.nan}}, None, "kl_sparse_to_dense nan"),
        ({"0.resid_mid": good}, None, "the bridge at 1.resid_mid was not evaluated"),
        (facts, 0.03, "off-target KL 0.03 nats/token, the limit is 0.02"),
        (facts, math.nan, "off-target KL nan"),
    ):
        assert message in unmet_limits(edit, limits, bad, kl)[0]
    replace(edit, refusals=unmet_limits(edit, limits, facts, 0.03)).save(tmp_path / "e")
    with pytest.raises(InputError, match="is refused: off-target KL 0.03 .* force true"):
        Edit.load(tmp_path / "e", dense)
    assert Edit.load(tmp_path / "e", dense, force=True).refusals[0].startswith("off-target KL 0.03")


def test_damaged_edits_are_refused_in_one_line(dense, pair, tmp_path) -> None:
    _, bridges = pair
    edit = replace(Edit.from_nodes([Node("0.attn.act_in", 3)], Site(0, "resid_pre"), bridges))
    path = tmp_path / "e" / "edit.json"
    for damage in ({"crossings": []}, {"reader": 3}, {"intervention": {}}, {"refusals": None}):
        replace(edit, hashes=Hashes(dense.sha256)).save(path.parent)
        add_facts(path.parent, damage)
        with pytest.raises(InputError, match="damaged"):
            Edit.load(path.parent, dense)
    old = {"schema_version": 1, "dense_sha256": dense.sha256, "site": "0.resid_pre"}
    path.write_text(json.dumps(old))
    with pytest.raises(InputError, match="make it again"):
        Edit.load(path.parent, dense)


def test_the_bridge_as_source_measures_the_same_edit(dense, pair, prompts) -> None:
    """With an exact bridge both sources see the same activations, so they move the answers alike."""
    student, bridges = pair
    edit = Edit.from_nodes([Node("0.mlp.act_in", c) for c in (3, 8)], Site(0, "resid_mid"), bridges)
    found = []
    for source in ("student", "bridge"):
        streams = PromptStreams(dense, student, bridges, prompts, source=source)
        found.append(streams.differences(edit.site, streams.delta(edit)))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


def test_greedy_choice_finds_the_one_node_that_carries_the_answer(dense, tokens) -> None:
    """A dense model whose answer hangs on channel 5 before MLP 0, and a circuit with twelve nodes there."""
    with torch.no_grad():
        for block in dense.model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        first = dense.model.transformer.h[0]
        first.mlp.c_fc.weight[:, 0] = 0
        first.mlp.c_fc.weight[5, 0] = 3  # neuron 0 reads channel 5
        first.mlp.c_proj.weight[0] = dense.model.lm_head.weight[21] - dense.model.lm_head.weight[22]
        dense.model.transformer.wte.weight[11, 5] = 3  # and token 11 has it, token 12 not
        dense.model.transformer.wte.weight[12, 5] = -3
    student, bridges = make_student(dense, StudentShape(), ROTATIONS["identity"])
    measure_energies_(dense, student, bridges, tokens)
    ids = torch.tensor([[11]] * 4 + [[12]] * 4)
    answer = torch.tensor([21] * 4 + [22] * 4)
    streams = PromptStreams(
        dense, student, bridges, TaskBatch(ids, torch.zeros(8).long(), answer, answer.roll(4))
    )
    nodes = frozenset(Node("0.mlp.act_in", channel) for channel in range(12))
    growths = grow_edits(streams, Circuit("t", nodes, (), "sha", {}), bridges, CONFIG)
    edit = edits_to_try(growths, CONFIG)[0].edit(bridges)
    assert edit.nodes[0] == Node("0.mlp.act_in", 5)


# --- losses of the coupled model ---------------------------------------------------------------------------


def test_all_losses_of_an_exact_copy_vanish(dense, pair, tokens) -> None:
    coupled = CoupledModel(*pair, dense, LossConfig())
    losses = coupled(tokens, seed=0, step=0)
    for name in ("kl", "nmse", "kl_dense_to_sparse", "kl_sparse_to_dense"):
        assert abs(getattr(losses, name).item()) < 1e-5, name
    expected = torch.nn.functional.cross_entropy(
        dense.model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert losses.ce.item() == pytest.approx(expected.item(), abs=1e-5)


def test_sampled_hybrid_terms_average_to_all_of_them(dense, pair, tokens) -> None:
    student, bridges = pair
    with torch.no_grad():
        for parameter in (*student.parameters(), *bridges.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    every = CoupledModel(student, bridges, dense, LossConfig(hybrid_sites="all"))(tokens, seed=0, step=0)
    sampled = CoupledModel(student, bridges, dense, LossConfig())
    draws = [sampled(tokens, seed=0, step=step) for step in range(200)]
    for name in ("kl_dense_to_sparse", "kl_sparse_to_dense"):
        values = torch.stack([getattr(draw, name) for draw in draws])
        error = 4 * values.std() / len(draws) ** 0.5
        assert abs(values.mean() - getattr(every, name)) <= error
        assert values.std() > 0


def test_dense_model_is_not_part_of_the_coupled_model(dense, pair, tokens) -> None:
    coupled = CoupledModel(*pair, dense, LossConfig())
    names = [name for name, _ in coupled.named_parameters()]
    assert all(name.startswith(("student.", "bridges.")) for name in names)
    coupled(tokens, seed=0, step=0).total.backward()
    assert all(parameter.grad is None for parameter in dense.model.parameters())
    assert all(parameter.grad is not None for parameter in coupled.parameters())


def test_coupled_model_trains_every_option(dense, tokens) -> None:
    shape = StudentShape(activation_frac=0.5, attention_sink=True, bigram_table=True)
    student, bridges = make_student(dense, shape, ROTATIONS["turned"])
    student.set_activation_frac(0.5)
    coupled = CoupledModel(student, bridges, dense, LossConfig())
    coupled(tokens, seed=0, step=1).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in coupled.parameters())


def test_kl_and_nmse_by_hand() -> None:
    reference = torch.tensor([[[0.5, 0.5]]]).log()
    logits = torch.tensor([[[0.25, 0.75]]]).log()
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert kl_divergence(reference, log_probs(logits)).item() == pytest.approx(expected.item())
    assert kl_divergence(log_probs(logits), log_probs(logits)).item() == pytest.approx(0)
    assert normalised_mse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), 4.0).item() == 0.5


def test_rms_ratio_of_a_widened_copy(pair) -> None:
    _, bridges = pair
    assert isinstance(bridges, BridgeSet)
    for site in bridges.sites:
        assert bridges.rms_ratio(site) == pytest.approx((32 / 40) ** 0.5, rel=1e-4)
