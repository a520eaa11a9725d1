"""Exactly k, ties by index, on weights and activations."""

import math

import pytest
import torch

from extractor.sparsity import SparsityConfig, WeightSparsifier, abs_topk, keep_largest, num_kept


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
