"""Masks, pruning and circuits: identities, a planted circuit found exactly, controls that can fail."""

import json
import math
import random

import pytest
import torch

from extractor.circuit import Calibration, Circuit, count_edges, edges_between, keep_nodes
from extractor.compact import CompactStudent
from extractor.errors import InputError
from extractor.gates import HeavisideStep
from extractor.masks import Bank, GateTap, NodeMasks, mean_activations, tied_queries
from extractor.prune import (
    PruneConfig,
    Setting,
    extract_circuit,
    finish_circuit,
    learn_masks,
    search_masks,
    task_settings,
    wanted_probability,
)
from extractor.sites import Node, Recorder, node_addresses
from extractor.smallest import calibrate, calibrate_all
from extractor.student import Student
from extractor.tasks import TaskBatch, two_way_loss
from tests.conftest import tiny_student_config


@pytest.fixture
def means(student: Student, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return mean_activations(student, tokens)


def test_means_are_means_over_all_positions(student, tokens, means) -> None:
    recorder = Recorder()
    student(tokens, tap=recorder)
    batched = mean_activations(student, tokens, batch=2)
    for address in node_addresses(2):
        expected = recorder[address].mean((0, 1))
        torch.testing.assert_close(means[address], expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(batched[address], expected, atol=1e-6, rtol=1e-5)


def test_all_gates_on_is_the_student_and_all_off_is_constant(student, tokens, means) -> None:
    masks = NodeMasks(means, [0, 1])
    gates = torch.stack([torch.ones_like(masks.tau[0]), torch.zeros_like(masks.tau[0])])
    recorder, tap = Recorder(*node_addresses(2)), GateTap(masks)(gates)
    both = student(tokens.repeat(2, 1), tap=lambda a, x: recorder(a, tap(a, x))).logits
    torch.testing.assert_close(both[: len(tokens)], student(tokens).logits, atol=1e-5, rtol=1e-5)
    for address, activation in recorder.activations.items():
        off = activation[len(tokens) :]
        assert torch.equal(off, means[address].expand_as(off))


def test_step_uses_the_slope_of_the_sigmoid() -> None:
    tau = torch.tensor([-0.5, 0.0, 0.2], requires_grad=True)
    gates = HeavisideStep.apply(tau, 0.5)
    assert gates.tolist() == [0, 0, 1]
    gates.sum().backward()
    sigmoid = torch.sigmoid(tau.detach() / 0.5)
    torch.testing.assert_close(tau.grad, sigmoid * (1 - sigmoid) / 0.5)


def test_circuit_and_complement_split_the_nodes(student, tokens, means) -> None:
    rng = random.Random(0)
    everything = {Node(a, c) for a, mean in means.items() for c in range(len(mean))}
    some = frozenset(rng.sample(sorted(everything, key=str), 100))
    rest = everything - some
    with_complement = student(tokens, tap=keep_nodes(some, means, complement=True)).logits
    torch.testing.assert_close(with_complement, student(tokens, tap=keep_nodes(rest, means)).logits)
    whole = student(tokens, tap=keep_nodes(everything, means)).logits
    torch.testing.assert_close(whole, student(tokens).logits, atol=1e-5, rtol=1e-5)


def test_edges_are_the_nonzero_weights_between_nodes(student) -> None:
    with torch.no_grad():
        student.layers[0].mlp.up_proj.weight[3, 5] = 0
    nodes = [Node("0.mlp.act_in", 5), Node("0.mlp.act_in", 6), Node("0.mlp.post_act", 3), Node("0.attn.v", 1)]
    nodes += [Node("0.attn.resid_delta", 2), Node("1.mlp.post_act", 3)]
    edges = edges_between(student, nodes)
    found = {(str(e.source), str(e.target)): e.weight for e in edges}
    assert found == {
        ("0.attn.v:1", "0.attn.resid_delta:2"): student.layers[0].attn.o_proj.weight[2, 1].item(),
        ("0.mlp.act_in:6", "0.mlp.post_act:3"): student.layers[0].mlp.up_proj.weight[3, 6].item(),
    }
    # per layer: q, k, v, o are 32 x 32; up and down 48 x 32
    assert count_edges(student) == 2 * (4 * 32 * 32 + 2 * 48 * 32) - 1


# --- a planted circuit -----------------------------------------------------------------------------------

PLANTED = {
    "0.attn.act_in:0", "0.attn.v:0", "0.attn.resid_delta:1",
    "0.mlp.act_in:1", "0.mlp.post_act:0", "0.mlp.resid_delta:2",
}  # fmt: skip


def planted_student() -> Student:
    """One layer: token 1 or 2 at the front -> channel 0 -> head 0 -> channel 1 -> neuron 0 -> channel 2.

    Token 3 wins over token 4 if channel 2 is positive. Everything else is noise that the answers do not
    depend on: other channels are read and written, but never channels 0 to 2.
    """
    config = tiny_student_config(num_hidden_layers=1, hidden_size=12, intermediate_size=16, hidden_act="gelu",
                                 num_attention_heads=3, head_dim=4)  # fmt: skip
    student = Student(config).eval()
    attn, mlp = student.layers[0].attn, student.layers[0].mlp
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.3)
        student.embed_tokens.weight[:, :3] = 0
        student.embed_positions.weight[:, :3] = 0
        student.embed_tokens.weight[1, 0], student.embed_tokens.weight[2, 0] = 2, -2
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.up_proj):
            linear.weight[:, :3] = 0  # channels 0 to 2 are read by nothing but the circuit
        for linear in (attn.o_proj, mlp.down_proj):
            linear.weight[:3] = 0  # and written by nothing but the circuit
            linear.bias[:3] = 0
        for linear in (attn.v_proj, mlp.up_proj):  # the circuit's own units read nothing else
            linear.weight[0] = 0
            linear.bias[0] = 0
        attn.o_proj.weight[:, 0] = 0
        mlp.down_proj.weight[:, 0] = 0
        attn.v_proj.weight[0, 0] = 1
        attn.o_proj.weight[1, 0] = 4
        mlp.up_proj.weight[0, 1] = 2
        mlp.down_proj.weight[2, 0] = 4
        student.lm_head.weight[3:5] = 0
        student.lm_head.bias[3:5] = 0
        student.lm_head.weight[3, 2] = 4
        student.lm_head.bias[3] = -4  # a silent neuron means the other answer
    return student


def planted_task(count: int, seed: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(5, 97, (count, 3), generator=generator)
    ids = torch.cat([torch.cat([torch.full((count, 1), first), rest], dim=1) for first in (1, 2)])
    answer = torch.cat([torch.full((count,), 3), torch.full((count,), 4)])
    return TaskBatch(ids, torch.full((2 * count,), 3), answer, answer.roll(count))


@pytest.mark.parametrize("target", ["student", "answer"])
def test_a_planted_circuit_is_recovered_exactly(target: str) -> None:
    student = planted_student()
    train, selection, held_out = (planted_task(64, seed) for seed in range(3))
    whole = held_out.logit_difference(student(held_out.ids).logits)
    assert (whole > 0).all()
    means = mean_activations(student, train.ids)
    config = PruneConfig(target=target, steps=150, pairs_per_step=32)
    circuit = extract_circuit(student, "planted", train, selection, means, config, "none")
    assert {str(node) for node in circuit.nodes} == PLANTED
    assert {(str(e.source), str(e.target)) for e in circuit.edges} == {
        ("0.attn.act_in:0", "0.attn.v:0"),
        ("0.attn.v:0", "0.attn.resid_delta:1"),
        ("0.mlp.act_in:1", "0.mlp.post_act:0"),
        ("0.mlp.post_act:0", "0.mlp.resid_delta:2"),
    }
    model = circuit.compact(student, means)
    calibrated = circuit.calibration(held_out.logit_difference(model(held_out.ids).logits))
    assert (calibrated > 0).all()
    assert two_way_loss(calibrated) <= 0.15


def planted_settings(student: Student, count: int) -> list[Setting]:
    train = planted_task(64, 0)
    wanted = wanted_probability(student, train, "student")
    return [Setting(train, wanted, train, seed, size_coef=2.7e-3 * (1 + seed)) for seed in range(count)]


def test_masks_learned_together_are_those_learned_alone() -> None:
    student = planted_student()
    means = mean_activations(student, planted_task(64, 0).ids)
    config = PruneConfig(steps=60, pairs_per_step=16, together=True)
    settings = planted_settings(student, 3)
    together = learn_masks(student, settings, means, config).tau
    for setting, tau in zip(settings, together, strict=True):
        alone = learn_masks(student, [setting], means, config).tau[0]
        torch.testing.assert_close(alone, tau, atol=1e-3, rtol=0)
        assert torch.equal(alone > 0, tau > 0)
    assert not torch.equal(together[0] > 0, together[1] > 0)


def test_folding_closed_nodes_away_changes_no_gate() -> None:
    student = planted_student()
    means = mean_activations(student, planted_task(64, 0).ids)
    sizes = []
    original = CompactStudent.__init__

    def counted(self, *args) -> None:
        original(self, *args)
        sizes.append(self.num_nodes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompactStudent, "__init__", counted)
        small, whole = (
            learn_masks(
                student,
                planted_settings(student, 2),
                means,
                PruneConfig(steps=100, compact=compact, together=True),
            )
            for compact in (True, False)
        )
    assert len(sizes) >= 2  # it did shrink, more than once
    assert sizes == sorted(sizes, reverse=True)
    assert torch.equal(small.tau > 0, whole.tau > 0)
    could_open = whole.tau > -0.5  # the others stopped where they were folded away
    torch.testing.assert_close(small.tau[could_open], whole.tau[could_open], atol=1e-3, rtol=0)


# --- calibration and statistics --------------------------------------------------------------------------


def test_calibration_cannot_answer_by_itself() -> None:
    """A difference that carries nothing about the side stays at chance, whatever it is fitted to."""
    same_on_both_sides = torch.full((64,), 3.0)
    same_on_both_sides[32:] = -3.0  # the same preference for one token, seen from both sides
    calibration = calibrate(same_on_both_sides)
    assert two_way_loss(calibration(same_on_both_sides)).item() >= math.log(2) - 1e-4


def test_calibration_removes_a_shift_and_a_scale() -> None:
    good = torch.cat([torch.rand(200) + 1, torch.rand(200) + 1])
    skewed = 0.05 * Calibration(1.0, 1.4)(good)
    assert (skewed <= 0).any()
    calibration = calibrate(skewed)
    assert (calibration(skewed) > 0).float().mean() > 0.99
    assert two_way_loss(calibration(skewed)) < 0.3 < two_way_loss(skewed)


@torch.no_grad()
def test_calibrations_of_many_sets_are_those_of_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    sets = torch.randn(12, 64, generator=generator) * torch.logspace(-2, 1.5, 12)[:, None]
    sets[::3] = sets[::3].abs()  # all right: only the prior bounds the scale
    together = calibrate_all(sets)
    for own, calibration in zip(sets, together, strict=True):
        (alone,) = calibrate_all(own[None])
        assert alone == calibration
        assert abs(math.log(alone.scale)) < 6
        best = two_way_loss(alone(own.double())) + 0.01 * (math.log(alone.scale) ** 2 + alone.shift**2)
        for scale, shift in ((1.05, 0.0), (0.95, 0.0), (1.0, 0.05), (1.0, -0.05)):
            near = Calibration(alone.scale * scale, alone.shift + shift)
            prior = 0.01 * (math.log(near.scale) ** 2 + near.shift**2)
            assert two_way_loss(near(own.double())) + prior >= best


# --- other ablations, tied queries ------------------------------------------------------------------------


def test_resampled_nodes_carry_states_of_the_student(student, tokens) -> None:
    recorder = Recorder(*node_addresses(2))
    student(tokens, tap=recorder)
    drawn = Bank(student, tokens, per_block=4).draw(3, 5, seed=1)
    assert torch.equal(drawn["0.attn.q"], Bank(student, tokens, per_block=4).draw(3, 5, seed=1)["0.attn.q"])
    states = {name: recorder[name].flatten(0, 1) for name in ("0.attn.q", "1.mlp.post_act")}
    for row in range(3):
        for column in range(5):
            same = (states["0.attn.q"] - drawn["0.attn.q"][row, column]).abs().amax(1) < 1e-5
            # all nodes of a token are drawn together
            other = states["1.mlp.post_act"][same] - drawn["1.mlp.post_act"][row, column]
            assert (other.abs().amax(1) < 1e-5).any()


def test_a_circuit_under_resampling_is_the_student_where_it_keeps_all_nodes(student, tokens, means) -> None:
    drawn = Bank(student, tokens).draw(*tokens.shape, seed=0)
    everything = [Node(a, c) for a, mean in means.items() for c in range(len(mean))]
    whole = student(tokens, tap=keep_nodes(everything, drawn)).logits
    torch.testing.assert_close(whole, student(tokens).logits, atol=1e-5, rtol=1e-5)
    recorder, tap = Recorder("1.mlp.post_act"), keep_nodes((), drawn)
    student(tokens, tap=lambda address, x: recorder(address, tap(address, x)))
    assert torch.equal(recorder["1.mlp.post_act"], drawn["1.mlp.post_act"])


@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_a_planted_circuit_is_recovered_under_other_ablations(ablation: str) -> None:
    student = planted_student()
    train, selection = planted_task(64, 0), planted_task(64, 1)
    means = mean_activations(student, train.ids)
    config = PruneConfig(steps=150, pairs_per_step=32, ablation=ablation)
    bank = Bank(student, train.ids) if ablation == "resample" else None
    if ablation == "zero":
        means = {address: torch.zeros_like(mean) for address, mean in means.items()}
    circuit = extract_circuit(student, "planted", train, selection, means, config, "none", bank=bank)
    assert {str(node) for node in circuit.nodes} == PLANTED


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_tied_queries_open_and_close_with_their_keys(kv_heads: int) -> None:
    student = Student(tiny_student_config(num_key_value_heads=kv_heads)).eval()
    tokens = torch.randint(5, 97, (4, 6), generator=torch.Generator().manual_seed(0))
    means = mean_activations(student, tokens)
    part = NodeMasks(means, [0], tied=tied_queries(student.config, means)).part_of_node
    first = 0
    of_address = {}
    for address, mean in means.items():
        of_address[address] = part[first : first + len(mean)]
        first += len(mean)
    q, k = of_address["1.attn.q"].unflatten(0, (4, 8)), of_address["1.attn.k"].unflatten(0, (kv_heads, 8))
    for head in range(4):
        assert torch.equal(q[head], k[head // (4 // kv_heads)])
    others = torch.cat([own for address, own in of_address.items() if not address.endswith((".q", ".k"))])
    assert others.unique().numel() == others.numel()
    assert torch.isin(others, q).sum() == 0
    assert part.unique().tolist() == list(range(int(part.max()) + 1))


def test_tied_circuits_keep_queries_and_keys_together() -> None:
    student = planted_student()
    train, selection = planted_task(64, 0), planted_task(64, 1)
    means = mean_activations(student, train.ids)
    config = PruneConfig(steps=150, pairs_per_step=32, tie_queries=True, seeds=(0, 1))
    search = search_masks(student, task_settings(student, train, selection, config), means, config)
    assert search.masks.tau.shape[1] == len(search.masks.part_of_node) - 12  # one part for q and k
    for tau in search.masks.tau:
        nodes = search.masks.nodes(search.masks.of_nodes(tau > 0))
        queries, keys = ({n.channel for n in nodes if n.kind == kind} for kind in ("attn.q", "attn.k"))
        assert queries == keys
    circuit = finish_circuit(student, "planted", search, config, "none")
    assert {str(node) for node in circuit.nodes} == PLANTED


# --- files -----------------------------------------------------------------------------------------------


@pytest.fixture
def circuit(student) -> Circuit:
    nodes = frozenset({Node("0.mlp.act_in", 6), Node("0.mlp.post_act", 3)})
    return Circuit(
        "t", nodes, edges_between(student, nodes), "sha", {"a": 1}, Calibration(2, 0.5), {"loss": 0.1}
    )


def test_circuit_round_trips(circuit: Circuit, tmp_path) -> None:
    circuit.save(tmp_path / "c.json")
    assert Circuit.load(tmp_path / "c.json") == circuit


@pytest.mark.parametrize("share_of_edges", [1, 0.5, 0])
def test_an_export_says_how_far_it_is_from_the_masked_student(
    student, tokens, means, tmp_path, share_of_edges
) -> None:
    nodes = frozenset(
        random.Random(1).sample([Node(a, c) for a, m in means.items() for c in range(len(m))], 60)
    )
    edges = edges_between(student, nodes)
    edges = tuple(random.Random(2).sample(edges, int(share_of_edges * len(edges))))
    circuit = Circuit("t", nodes, edges, "sha", {})
    difference = circuit.export(tmp_path / "t", student, means, tokens)
    facts = json.loads((tmp_path / "t" / "compact.json").read_text())
    assert facts["max_logit_difference"] == difference <= 1e-5
    loaded = CompactStudent.load(tmp_path / "t")
    all_edges = student(tokens, tap=circuit.tap(means)).logits
    with circuit.applied(student, means):
        masked = student(tokens).logits
    torch.testing.assert_close(loaded(tokens).logits, masked, atol=1e-5, rtol=1e-5)
    assert torch.allclose(masked, all_edges, atol=1e-5) == (share_of_edges == 1)


def test_edges_of_grouped_queries_pass_through_every_head_of_the_group(tokens) -> None:
    student = Student(tiny_student_config(num_key_value_heads=2)).eval()  # 4 heads of 8 channels, 2 for k, v
    edges = edges_between(student, [Node("0.attn.v", 9), Node("0.attn.resid_delta", 3)])
    row = student.layers[0].attn.o_proj.weight[3]
    assert [edge.weight for edge in edges] == [row[17].item(), row[25].item()]
    with torch.no_grad():
        row[17] = 0
    assert len(edges_between(student, [Node("0.attn.v", 9), Node("0.attn.resid_delta", 3)])) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "not valid JSON"),
        (lambda text: json.dumps(json.loads(text) | {"schema_version": 99}), "schema version 99"),
        (lambda text: json.dumps(json.loads(text) | {"nodes": ["0.mlp.act_in"]}), "damaged"),
        (lambda text: json.dumps({"schema_version": 1}), "damaged"),
    ],
)
def test_damaged_circuit_files_are_refused(circuit: Circuit, tmp_path, damage, message: str) -> None:
    path = tmp_path / "c.json"
    circuit.save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=message):
        Circuit.load(path)
