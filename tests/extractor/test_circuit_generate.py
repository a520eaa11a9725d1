"""`generate` with a circuit in place: the cache, batches and padding change nothing."""

import random
from dataclasses import replace

import pytest
import torch

from extractor.circuit import Circuit, edges_between
from extractor.masks import Means, mean_activations
from extractor.sites import Node, Recorder, Tap
from extractor.student import Student
from tests.conftest import tiny_student_config

NEW_TOKENS = 5
OPTIONS = [
    {},
    {"activation_frac": 0.5},
    {"position_embedding_type": "rope", "num_key_value_heads": 2},
    {"attention_sink": True, "bigram_table": True},
    {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5},
]


@pytest.fixture(params=OPTIONS, ids=["plain", "abs_topk", "rope_grouped", "sink_bigram", "sliding"])
def model(request: pytest.FixtureRequest) -> Student:
    student = Student(tiny_student_config(**request.param)).eval()
    for parameter in student.parameters():  # so that sinks, biases and bigrams are not zero
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    student.generation_config.eos_token_id = None
    return student


@pytest.fixture
def means(model: Student, tokens: torch.Tensor) -> Means:
    return mean_activations(model, tokens)


@pytest.fixture
def circuit(model: Student, means: Means) -> Circuit:
    """A circuit of half of all nodes."""
    every = [Node(address, c) for address, mean in means.items() for c in range(len(mean))]
    nodes = frozenset(random.Random(0).sample(every, len(every) // 2))
    return Circuit("t", nodes, edges_between(model, nodes), "sha", {})


@pytest.fixture
def tap(circuit: Circuit, means: Means) -> Tap:
    return circuit.tap(means)


def greedy_by_hand(model: Student, prompt: torch.Tensor, tap: Tap) -> list[int]:
    """The most likely token again and again, by whole forwards of one prompt."""
    ids = prompt[None]
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            best = model(ids, tap=tap).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_with_a_circuit_is_greedy_decoding(
    model: Student, tokens: torch.Tensor, tap: Tap, use_cache: bool
) -> None:
    made = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        tap=tap,
    )
    assert torch.equal(made[:, : tokens.shape[1]], tokens)
    expected = [greedy_by_hand(model, prompt, tap) for prompt in tokens]
    assert made[:, tokens.shape[1] :].tolist() == expected
    without = [greedy_by_hand(model, prompt, lambda _, activation: activation) for prompt in tokens]
    assert without != expected  # the circuit does make a difference


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_circuit_with_learned_edges_generates_what_its_compact_model_says(
    model: Student, tokens: torch.Tensor, circuit: Circuit, means: Means, use_cache: bool
) -> None:
    edges = tuple(random.Random(1).sample(circuit.edges, len(circuit.edges) // 2))
    circuit = replace(circuit, edges=edges)
    compact, before, seen = circuit.compact(model, means), model(tokens).logits, Recorder("1.attn.act_in")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": use_cache}
    with circuit.applied(model, means) as applied:
        logits = applied(tokens, tap=seen).logits
        made = applied.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    torch.testing.assert_close(logits, compact(tokens).logits, atol=1e-4, rtol=1e-4)
    kept = [node.channel for node in circuit.nodes if node.address == "1.attn.act_in"]
    varies = seen["1.attn.act_in"].flatten(0, 1).std(0) > 1e-6
    assert set(varies.nonzero()[:, 0].tolist()) <= set(kept)  # the caller's tap sees the circuit
    for row in range(len(tokens)):
        ids = tokens[row : row + 1]
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, compact(ids).logits[:, -1].argmax(-1)[:, None]], 1)
        assert made[row].tolist() == ids[0].tolist()
    assert torch.equal(model(tokens).logits, before)  # and it is gone afterwards


@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padding_of_a_batch_changes_nothing(
    model: Student, tokens: torch.Tensor, tap: Tap, use_cache: bool
) -> None:
    lengths = [12, 9, 5]
    mask = torch.stack([(torch.arange(12) >= 12 - length).long() for length in lengths])
    made = model.generate(
        tokens * mask,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        tap=tap,
    )
    expected = [
        greedy_by_hand(model, prompt[-length:], tap) for prompt, length in zip(tokens, lengths, strict=True)
    ]
    assert made[:, 12:].tolist() == expected
