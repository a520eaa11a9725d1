"""Sparsity: exactly k by magnitude, in weights after every step and in activations at every node.

`keep_largest` is the one selection rule: the k entries of largest |value| along the last axis, ties
broken by the lowest index, so the count is exact also in bf16 and among equal values.

`WeightSparsifier` projects every matrix of a student after each optimiser step (Gao et al. 2025,
section 2.1: per matrix, never across matrices; zeroed weights keep their Adam moments and may come
back). Density falls from 1 to its target over a share of the steps (linear or exponential).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from extractor.config import Config


class SparsityConfig(Config):
    """Weight sparsity and its schedule."""

    density: float = Field(0.125, gt=0, le=1)
    """Share of nonzero weights in every matrix at the end; 1.0 leaves the weights as they are."""
    anneal_frac: float = Field(0.5, ge=0, le=1)
    """Share of the steps over which density (and AbsTopK) falls from 1 to its target."""
    anneal_shape: Literal["linear", "exponential"] = "exponential"
    """Linear in density, as the paper, or linear in log density."""


def keep_largest(values: Float[Tensor, "*batch n"], k: int) -> Bool[Tensor, "*batch n"]:
    """Mask of the k largest |values| along the last axis; ties go to the lowest index."""
    size = values.shape[-1]
    if not 0 < k <= size:
        raise ValueError(f"k is {k}; it must lie between 1 and the axis length {size}")
    if k == size:
        return torch.ones_like(values, dtype=torch.bool)
    magnitude = values.detach().abs()
    threshold = _kth_largest(magnitude, k)
    keep = magnitude > threshold
    missing = k - keep.sum(-1, keepdim=True)
    tied = magnitude == threshold
    if bool((tied.sum(-1, keepdim=True) == missing).all()):
        return keep | tied
    return keep | (tied & (tied.cumsum(-1) <= missing))


def _kth_largest(magnitude: Tensor, k: int) -> Tensor:
    """The k-th largest along the last axis, kept as an axis of length 1."""
    if magnitude.device.type == "cpu":
        # numpy's vectorised quickselect is 10 to 20 times faster than torch.topk on a CPU.
        position = magnitude.shape[-1] - k
        array = np.partition(magnitude.float().numpy(), position, axis=-1)
        return torch.from_numpy(array[..., position : position + 1].copy()).to(magnitude.dtype)
    return torch.topk(magnitude, k, dim=-1).values[..., -1:]


def abs_topk(x: Float[Tensor, "*batch n"], frac: float | None) -> Float[Tensor, "*batch n"]:
    """Keep the int(frac * n) entries of largest |x|, zero the rest; None or 1 leaves x as it is.

    The gradient passes through kept entries only (Gao et al. 2025, appendix A.1).
    """
    if frac is None or frac >= 1:
        return x
    return x * keep_largest(x, max(1, int(frac * x.shape[-1])))


@dataclass(frozen=True)
class WeightSparsifier:
    """Holds a student's matrices at exactly k nonzeros."""

    matrices: dict[str, nn.Parameter]
    config: SparsityConfig
    num_steps: int

    def density(self, step: int) -> float:
        """Density asked for after `step` optimiser steps."""
        return anneal(self.config, self.config.density, step, self.num_steps)

    @torch.no_grad()
    def project_(self, step: int) -> float:
        """Zero all but the k largest |weights| of every matrix, in place; returns the density."""
        density = self.density(step)
        if density < 1:
            for parameter in self.matrices.values():
                flat = parameter.view(-1)
                flat.mul_(keep_largest(flat, num_kept(parameter.numel(), density)))
        return density


def anneal(config: SparsityConfig, target: float, step: int, num_steps: int) -> float:
    """A share that falls from 1 to `target` over the first `anneal_frac` of the steps."""
    anneal_steps = config.anneal_frac * num_steps
    progress = 1.0 if anneal_steps == 0 else min(1.0, step / anneal_steps)
    if config.anneal_shape == "linear":
        return 1 - progress * (1 - target)
    return math.exp(progress * math.log(target))


def num_kept(size: int, density: float) -> int:
    """k for a matrix of `size` weights: rounded to the nearest, never below one."""
    return max(1, round(density * size))
