"""Sparsity: exactly k by magnitude, in weights after every step and in activations at every node.

The one selection rule (`extractor.selection`): the k entries of largest |value|, ties broken by the lowest
index, so the count is exact also in bf16 and among equal values.

`WeightSparsifier` projects every matrix of a student after each optimiser step (Gao et al. 2025,
section 2.1: per matrix, never across matrices; zeroed weights keep their Adam moments and may come
back). Density falls from 1 to its target over a share of the steps (linear or exponential).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from extractor.config import Config
from extractor.errors import InputError
from extractor.machine import whole
from extractor.projection import Projection, project_
from extractor.selection import abs_topk, keep_largest

__all__ = [
    "Score",
    "SparsityConfig",
    "WeightSparsifier",
    "abs_topk",
    "anneal",
    "floor_axis",
    "keep_largest",
    "num_kept",
]


FACTOR_FLOOR = 1e-6  # of a factor's mean: nothing counts for nothing
Score = Literal["magnitude", "input", "curvature"]


class SparsityConfig(Config):
    """Weight sparsity and its schedule."""

    score: Score = "magnitude"
    """By what the largest weights are chosen: |w|, as the paper; |w| times the RMS of its input; or |w| times
    the root of its mean squared gradient (`extractor.scores`)."""
    density: float = Field(0.125, gt=0, le=1)
    """Share of nonzero weights in every matrix at the end; 1.0 leaves the weights as they are."""
    embedding_density: float | None = Field(None, gt=0, le=1)
    """The same for embeddings and unembedding; none: as the other matrices."""
    unembedding_density: float | None = Field(None, gt=0, le=1)
    """The same for the unembedding alone; none: as embeddings. It makes no node and no edge between nodes."""
    attention_density: float | None = Field(None, gt=0, le=1)
    """The same for the matrices of attention; none: `density`."""
    mlp_density: float | None = Field(None, gt=0, le=1)
    """The same for the matrices of the MLPs; none: `density`."""
    bias_density: float = Field(1.0, gt=0, le=1)
    """The same for biases; 1.0 leaves them dense, as the released script does."""
    min_weights_per_neuron: int = Field(0, ge=0)
    """Weights that every neuron, query, key and value keeps coming in, and every neuron and head channel
    going out, whatever their size (the paper's j, appendix A.2: 4); k stays the same."""
    anneal_frac: float = Field(0.5, ge=0, le=1)
    """Share of the steps over which density (and AbsTopK) falls from 1 to its target."""
    anneal_shape: Literal["linear", "exponential"] = "exponential"
    """Linear in density, as the paper, or linear in log density."""
    revive_steps: int = Field(0, ge=0)
    """Every so many steps, give neurons without a weight in or out new ones; 0: never."""


class WeightSparsifier:
    """Holds a student's matrices at exactly k nonzeros.

    On several processes each projects alike: replicated weights are equal, and of sharded ones (FSDP2)
    the whole matrix is gathered, so that the k largest are those of the matrix and not of a shard.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: SparsityConfig,
        num_steps: int,
        starts: Mapping[str, float] | None = None,
    ):
        """Takes the sparse matrices and, for `bias_density`, the biases; other names are left alone.

        `starts` are the densities that a student which is sparse already has; without, all start at 1.

        Raises:
            InputError: a floor of weights per neuron that its matrix has no room for.
        """
        self.config = config
        self.num_steps = num_steps
        self.starts = starts or {}
        self.parameters = {name: p for name, p in parameters.items() if self._target(name, p) is not None}
        if config.min_weights_per_neuron:
            for name, parameter in self.parameters.items():
                self._check_floor(name, parameter)

    def density(self, step: int) -> float:
        """Density asked for after `step` optimiser steps, of what starts densest."""
        start = max((self.starts.get(name, 1.0) for name in self.parameters), default=1.0)
        return anneal(self.config, self.config.density, step, self.num_steps, start)

    def num_kept(self, name: str, step: int) -> int:
        """Nonzeros that a parameter holds after `step` steps."""
        parameter = self.parameters[name]
        target, start = self._target(name, parameter), self.starts.get(name, 1.0)
        return num_kept(parameter.numel(), anneal(self.config, target, step, self.num_steps, start))

    @torch.no_grad()
    def project_(self, step: int, factors: Mapping[str, Tensor] | None = None) -> float:
        """Zero all but the k largest |weights| of every matrix, in place; returns the density.

        Projected again at the same step, weights stay as they are.

        Args:
            factors: of matrices whose |weights| count that many times (`extractor.scores`).
        """
        least, here = self.config.min_weights_per_neuron, []
        for name, parameter in self.parameters.items():
            k = self.num_kept(name, step)
            if k == parameter.numel():
                continue
            axis, weight = floor_axis(name) if least else None, whole(parameter).detach()
            if factors and name in factors:
                _project_scored(Projection(weight, k, axis), whole(factors[name]), least)
            elif isinstance(parameter, DTensor):  # one gathered matrix at a time
                project_([Projection(weight, k, axis)], least)
            else:
                here.append(Projection(weight, k, axis))
            if isinstance(parameter, DTensor):
                parameter.to_local().copy_(_part(weight, parameter))
        project_(here, least)
        return self.density(step)

    def count_nonzeros(self, matrices: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Shape, k and nonzeros of every matrix after the last step.

        Raises:
            AssertionError: one holds more weights than it was trained to.
        """
        counts = {
            name: {
                "shape": list(matrix.shape),
                "k": self.num_kept(name, self.num_steps) if name in self.parameters else matrix.numel(),
                "nonzeros": int(matrix.count_nonzero()),
            }
            for name, matrix in matrices.items()
        }
        for name, count in counts.items():
            if count["nonzeros"] > count["k"]:
                raise AssertionError(f"{name} holds {count}: more weights than it was trained to")
        return counts

    def _target(self, name: str, parameter: Tensor) -> float | None:
        """The density that a parameter ends at; None for what stays dense by its kind."""
        if parameter.ndim == 2 and not name.startswith("bigram"):
            target = self.config.density
            if name.startswith(("embed_", "lm_head")):
                target = self.config.embedding_density or target
            if name.startswith("lm_head"):
                target = self.config.unembedding_density or target
            if "attn." in name:
                target = self.config.attention_density or target
            if "mlp." in name:
                target = self.config.mlp_density or target
        elif name.endswith(".bias"):
            target = self.config.bias_density
        else:
            return None
        return target if target < 1 else None

    def _check_floor(self, name: str, parameter: Tensor) -> None:
        axis, j = floor_axis(name), self.config.min_weights_per_neuron
        if axis is None:
            return
        units, k = parameter.shape[axis], self.num_kept(name, self.num_steps)
        if j * units > k or j > parameter.shape[1 - axis]:
            raise InputError(
                f"sparsity.min_weights_per_neuron {j}: '{name}' has {units} units, which need {j * units} "
                f"weights, and keeps {k} at density {self.config.density}; at most {k // units} fit"
            )


def _project_scored(projection: Projection, factor: Tensor, least: int) -> None:
    """The same by |weights| times a factor; where that is zero, an entry still comes before a zero."""
    smallest = torch.finfo(factor.dtype).tiny / torch.finfo(factor.dtype).eps
    scored = projection.weight * (factor + factor.mean() * FACTOR_FLOOR + smallest)
    project_([projection._replace(weight=scored)], least)
    projection.weight.masked_fill_(scored == 0, 0)


def _part(matrix: Tensor, parameter: DTensor) -> Tensor:
    """This process's part of a matrix that all processes have whole."""
    everywhere = [Replicate()] * parameter.device_mesh.ndim
    replicated = DTensor.from_local(matrix, parameter.device_mesh, everywhere)
    return replicated.redistribute(parameter.device_mesh, parameter.placements).to_local()


def floor_axis(name: str) -> int | None:
    """The axis whose units keep a least number of weights: rows that read, columns that write."""
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight")):
        return 0
    if name.endswith("gate_proj.weight"):
        return 0
    return 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else None


def anneal(config: SparsityConfig, target: float, step: int, num_steps: int, start: float = 1.0) -> float:
    """A share that falls from `start` to `target` over the first `anneal_frac` of the steps.

    One that starts below its target is at its target from the beginning.
    """
    start = max(start, target)
    anneal_steps = config.anneal_frac * num_steps
    progress = 1.0 if anneal_steps == 0 else min(1.0, step / anneal_steps)
    if config.anneal_shape == "linear":
        return start - progress * (start - target)
    return start * math.exp(progress * math.log(target / start))


def num_kept(size: int, density: float) -> int:
    """k for a matrix of `size` weights: rounded to the nearest, never below one."""
    return max(1, round(density * size))
