"""A compact circuit is the masked student, exactly, for every kind of student; and so is its file."""

import json
import random

import pytest
import torch

from extractor.circuit import keep_nodes
from extractor.compact import CompactStudent, node_widths
from extractor.errors import InputError
from extractor.masks import ablation_tap, live_channels, mean_activations
from extractor.sites import Node, node_addresses
from extractor.student import Student
from tests.conftest import tiny_student_config

ROPE = {"position_embedding_type": "rope", "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}

KINDS = {
    "learned positions": {},
    "grouped queries, rope, gate": ROPE | {"num_key_value_heads": 2, "gated_mlp": True},
    "q/k norms and post-norms": ROPE | {"qk_norm": "head", "post_norm": True, "pre_norm": False},
    "q/k norms over the width": {"qk_norm": "full"},
    "sinks": {"attention_sink": True, "num_key_value_heads": 2},
    "soft caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "parallel sublayers": ROPE | {"parallel_residual": True},
    "windows": ROPE | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "AbsTopK": {"activation_frac": 0.25},
    "AbsTopK with sinks and norms": {"activation_frac": 0.5, "attention_sink": True, "qk_norm": "head"},
    "bigrams": {"bigram_table": True},
}


def student_of(kind: str) -> Student:
    torch.manual_seed(0)
    student = Student(tiny_student_config(**KINDS[kind])).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.ndim == 1 or name.startswith("bigram"):  # biases, gains and sinks count too
                parameter.add_(0.3 * torch.randn_like(parameter))
    return student


def some_nodes(means: dict[str, torch.Tensor], share: float, seed: int = 0) -> list[Node]:
    rng = random.Random(seed)
    return [Node(a, c) for a, mean in means.items() for c in range(len(mean)) if rng.random() < share]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_compact_is_the_masked_student(kind: str, share: float, tokens: torch.Tensor) -> None:
    student = student_of(kind)
    means = mean_activations(student, tokens)
    nodes = some_nodes(means, share)
    compact = CompactStudent(student, live_channels(nodes), means)
    assert compact.num_nodes == len(nodes)
    masked = student(tokens, tap=keep_nodes(nodes, means)).logits
    torch.testing.assert_close(compact(tokens).logits, masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_within_a_compact_model_are_gates_of_the_student(kind: str, tokens: torch.Tensor) -> None:
    student = student_of(kind)
    means = mean_activations(student, tokens)
    live = live_channels(some_nodes(means, 0.5))
    fewer = [node for node in some_nodes(means, 0.5) if random.Random(str(node)).random() < 0.5]
    compact = CompactStudent(student, live, means)
    gates = {address: torch.zeros_like(mean) for address, mean in means.items()}
    for node in fewer:
        gates[node.address][node.channel] = 1
    own_gates = {address: gate[compact.live[address]] for address, gate in gates.items()}
    own_means = {address: mean[compact.live[address]] for address, mean in means.items()}
    inside = compact(tokens, tap=ablation_tap(own_gates, own_means)).logits
    expected = student(tokens, tap=keep_nodes(fewer, means)).logits
    torch.testing.assert_close(inside, expected, atol=1e-5, rtol=1e-5)


def test_widths_are_those_of_the_activations(tokens: torch.Tensor) -> None:
    student = student_of("grouped queries, rope, gate")
    widths = {address: len(mean) for address, mean in mean_activations(student, tokens).items()}
    assert node_widths(student.config) == widths


def test_only_some_positions(tokens: torch.Tensor) -> None:
    student = student_of("bigrams")
    means = mean_activations(student, tokens)
    compact = CompactStudent(student, live_channels(some_nodes(means, 0.3)), means)
    every = compact(tokens).logits
    where = torch.arange(len(tokens))[:, None] % tokens.shape[1]
    for model, whole in ((compact, every), (student, student(tokens).logits)):
        torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, whole[:, -2:])
        chosen = model(tokens, logits_to_keep=where).logits
        torch.testing.assert_close(chosen, whole.take_along_dim(where[..., None], 1))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_without_the_student(kind: str, tokens: torch.Tensor, tmp_path) -> None:
    student = student_of(kind)
    means = mean_activations(student, tokens)
    compact = CompactStudent(student, live_channels(some_nodes(means, 0.3)), means)
    compact.save(tmp_path / "compact", {"task": "none"})
    loaded = CompactStudent.load(tmp_path / "compact")
    torch.testing.assert_close(loaded(tokens).logits, compact(tokens).logits, atol=1e-6, rtol=1e-6)
    facts = json.loads((tmp_path / "compact" / "compact.json").read_text())
    assert facts["schema_version"] == 1
    assert facts["task"] == "none"
    assert set(facts["nodes"]) == set(node_addresses(2))


def test_a_damaged_file_is_refused(student: Student, tokens: torch.Tensor, tmp_path) -> None:
    means = mean_activations(student, tokens)
    folder = tmp_path / "compact"
    CompactStudent(student, live_channels(some_nodes(means, 0.3)), means).save(folder, {})
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="is damaged"):
        CompactStudent.load(folder)
    with pytest.raises(InputError, match="compact circuit"):
        CompactStudent.load(tmp_path / "nothing")
