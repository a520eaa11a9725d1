"""Exactly k, ties by index, on weights and activations."""

import math

import pytest
import torch

from extractor.errors import InputError
from extractor.neurons import dead_neurons, revive_
from extractor.sparsity import (
    SparsityConfig,
    WeightSparsifier,
    abs_topk,
    floor_axis,
    keep_largest,
    num_kept,
)
from extractor.student import Student
from tests.conftest import tiny_student_config


def oracle(values: torch.Tensor, k: int) -> torch.Tensor:
    """Sort by (-|value|, index) in plain Python."""
    mask = torch.zeros_like(values, dtype=torch.bool)
    for row, target in zip(
        values.reshape(-1, values.shape[-1]), mask.view(-1, values.shape[-1]), strict=True
    ):
        order = sorted(range(len(row)), key=lambda i: (-abs(row[i].item()), i))
        target[order[:k]] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 7, 31, 32])
def test_mask_equals_the_sorted_oracle(dtype: torch.dtype, k: int) -> None:
    values = torch.randn(50, 32).to(dtype)
    values[::2] = values[::2].round()  # many ties
    assert torch.equal(keep_largest(values, k), oracle(values, k))


def test_all_equal_keeps_the_lowest_indices() -> None:
    mask = keep_largest(torch.ones(2, 9), 4)
    assert mask.tolist() == [[True] * 4 + [False] * 5] * 2


@pytest.mark.parametrize("k", [0, 6])
def test_impossible_k_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and"):
        keep_largest(torch.ones(5), k)


def test_abs_topk_passes_gradient_through_kept_entries_only() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    out = abs_topk(x, 0.25)
    out.sum().backward()
    assert torch.equal(x.grad, keep_largest(x, 4).float())
    assert torch.equal(out, x * keep_largest(x, 4))


@pytest.mark.parametrize("frac", [None, 1.0])
def test_abs_topk_off_is_the_same_tensor(frac: float | None) -> None:
    x = torch.randn(3)
    assert abs_topk(x, frac) is x


def test_projection_keeps_exactly_k_in_every_matrix() -> None:
    matrices = {"a": torch.nn.Parameter(torch.randn(13, 7)), "b": torch.nn.Parameter(torch.randn(64, 3))}
    before = {name: matrix.detach().clone() for name, matrix in matrices.items()}
    sparsifier = WeightSparsifier(matrices, SparsityConfig(density=0.1, anneal_frac=0.5), num_steps=10)
    assert sparsifier.num_kept("a", 10) == num_kept(91, 0.1)
    for step in range(1, 11):
        density = sparsifier.project_(step)
        for name, matrix in matrices.items():
            assert matrix.count_nonzero() == num_kept(matrix.numel(), density)
            kept = matrix != 0
            assert torch.equal(matrix[kept], before[name][kept])
    assert density == pytest.approx(0.1)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5 * (1 + 1 / 16)), ("exponential", 0.25)])
def test_density_schedule(shape: str, middle: float) -> None:
    config = SparsityConfig(density=1 / 16, anneal_frac=0.5, anneal_shape=shape)
    sparsifier = WeightSparsifier({}, config, num_steps=100)
    assert sparsifier.density(0) == 1
    assert math.isclose(sparsifier.density(25), middle)
    assert math.isclose(sparsifier.density(50), 1 / 16)
    assert math.isclose(sparsifier.density(100), 1 / 16)


@pytest.mark.parametrize("shape", ["linear", "exponential"])
def test_density_falls_from_that_of_a_sparse_start(shape: str) -> None:
    matrices = {name: torch.nn.Parameter(torch.randn(16, 16)) for name in ("sparse", "sparser", "sparsest")}
    starts = {"sparse": 0.5, "sparser": 0.25, "sparsest": 1 / 64}
    config = SparsityConfig(density=1 / 16, anneal_frac=0.5, anneal_shape=shape)
    sparsifier = WeightSparsifier(matrices, config, 20, starts)
    kept = {name: [sparsifier.num_kept(name, step) for step in range(21)] for name in matrices}
    assert [kept["sparse"][0], kept["sparser"][0]] == [128, 64]
    assert all(counts == sorted(counts, reverse=True) and counts[-1] == 16 for counts in kept.values())
    assert kept["sparsest"] == [16] * 21  # below its target: never asked for more
    assert sparsifier.density(0) == 0.5


def test_embeddings_and_biases_have_their_own_densities() -> None:
    student = Student(tiny_student_config())
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter)
    shared = {"density": 0.1, "embedding_density": 0.5, "bias_density": 0.25, "anneal_frac": 0}
    parameters = dict(student.named_parameters())
    both = WeightSparsifier(parameters, SparsityConfig(**shared), 1)
    assert both.num_kept("lm_head.weight", 1) == num_kept(97 * 32, 0.5)
    WeightSparsifier(parameters, SparsityConfig(**shared, unembedding_density=0.75), 1).project_(1)
    assert student.embed_tokens.weight.count_nonzero() == num_kept(97 * 32, 0.5)
    assert student.lm_head.weight.count_nonzero() == num_kept(97 * 32, 0.75)
    layer = student.layers[0]
    assert layer.mlp.up_proj.weight.count_nonzero() == num_kept(48 * 32, 0.1)
    assert layer.mlp.up_proj.bias.count_nonzero() == 12
    assert student.lm_head.bias.count_nonzero() == num_kept(97, 0.25)


def test_attention_and_mlps_have_their_own_densities() -> None:
    student = Student(tiny_student_config())
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter)
    config = SparsityConfig(density=0.1, attention_density=0.5, mlp_density=1.0, anneal_frac=0)
    WeightSparsifier(dict(student.named_parameters()), config, 1).project_(1)
    for layer in student.layers:
        for matrix in (layer.attn.q_proj.weight, layer.attn.o_proj.weight):
            assert matrix.count_nonzero() == num_kept(matrix.numel(), 0.5)
        assert (layer.mlp.up_proj.weight != 0).all()
    assert student.embed_tokens.weight.count_nonzero() == num_kept(97 * 32, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_neuron_keeps_its_floor_and_the_count_is_the_same(dtype: torch.dtype) -> None:
    up = torch.nn.Parameter(torch.randn(40, 16).to(dtype))
    down = torch.nn.Parameter(torch.randn(16, 40).to(dtype))
    up.data[7] *= 1e-3  # would lose all its weights
    down.data[:, 9] = 0.5  # ties
    before = {"mlp.up_proj.weight": up.detach().clone(), "mlp.down_proj.weight": down.detach().clone()}
    config = SparsityConfig(density=0.2, min_weights_per_neuron=2, anneal_frac=0)
    parameters = {"mlp.up_proj.weight": up, "mlp.down_proj.weight": down}
    WeightSparsifier(parameters, config, 1).project_(1)
    for name, matrix in parameters.items():
        assert matrix.count_nonzero() == 128
        assert torch.equal(matrix != 0, floor_oracle(before[name], 128, 2, floor_axis(name)))
    assert (up != 0).sum(1).min() >= 2
    assert (down != 0).sum(0).min() >= 2


def floor_oracle(weight: torch.Tensor, k: int, least: int, axis: int) -> torch.Tensor:
    """The paper's rule in plain Python: each unit's own first, then by size, ties by index."""
    rows, columns = weight.shape
    size = {(r, c): abs(weight[r, c].item()) for r in range(rows) for c in range(columns)}
    kept = set()
    for unit in range(weight.shape[axis]):
        own = sorted((place for place in size if place[axis] == unit), key=lambda p: (-size[p], p))
        kept |= set(own[:least])
    rest = sorted((place for place in size if place not in kept), key=lambda p: (-size[p], p))
    kept |= set(rest[: k - len(kept)])
    return torch.tensor([[(r, c) in kept for c in range(columns)] for r in range(rows)])


def test_a_floor_without_room_is_refused_with_the_arithmetic() -> None:
    parameters = {"0.mlp.up_proj.weight": torch.nn.Parameter(torch.randn(64, 16))}
    config = SparsityConfig(density=1 / 16, min_weights_per_neuron=4)
    with pytest.raises(InputError, match="64 units, which need 256 weights, and keeps 64 .* at most 1 fit"):
        WeightSparsifier(parameters, config, 10)


def test_dead_neurons_are_counted_and_revived() -> None:
    student = Student(tiny_student_config(gated_mlp=True))
    mlp = student.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight[3] = 0
        mlp.down_proj.weight[:, 5] = 0
    assert [int(dead.sum()) for dead in dead_neurons(student)] == [0, 2]
    other = Student(tiny_student_config(gated_mlp=True))
    other.load_state_dict(student.state_dict())
    assert revive_(student, weights=2, seed=0, step=7) == revive_(other, weights=2, seed=0, step=7) == 2
    assert sum(int(dead.sum()) for dead in dead_neurons(student)) == 0
    assert mlp.up_proj.weight[3].count_nonzero() == 2
    assert torch.equal(mlp.up_proj.weight, other.layers[1].mlp.up_proj.weight)
