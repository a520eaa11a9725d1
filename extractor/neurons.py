"""Dead neurons: counted, and given new weights where that is asked for.

A neuron is dead when it has lost every weight in or every weight out (Gao et al. 2025, section 5: many are).
With both gone no gradient reaches it and it never comes back; with one gone it may.
"""

import numpy as np
import torch
from torch import Tensor, nn

from extractor.machine import whole
from extractor.student import Student


@torch.no_grad()
def dead_neurons(student: Student) -> list[Tensor]:
    """Per layer, which MLP neurons have no weight in or no weight out: bool, (intermediate_size,)."""
    dead = []
    for layer in student.layers:
        # A gated neuron needs its up-weights; its gate may do with its bias.
        reads, writes = whole(layer.mlp.up_proj.weight).any(1), whole(layer.mlp.down_proj.weight).any(0)
        dead.append(~reads | ~writes)
    return dead


@torch.no_grad()
def revive_(student: Student, *, seed: int, step: int, weights: int = 4) -> int:
    """Give every dead neuron `weights` new weights in and out; returns how many there were.

    Each new weight is as large as its matrix's mean kept one, so it outlasts the next projections and has
    to earn its place; where and with which sign is a function of (seed, step), alike on every process.
    """
    random = np.random.default_rng([seed, step])
    count = 0
    for layer, dead in zip(student.layers, dead_neurons(student), strict=True):
        for neuron in dead.nonzero()[:, 0].tolist():
            count += 1
            for linear in _linears(layer.mlp):
                _plant(linear.weight[neuron], linear.weight, weights, random)
            _plant(layer.mlp.down_proj.weight[:, neuron], layer.mlp.down_proj.weight, weights, random)
    return count


def _linears(mlp: nn.Module) -> list[nn.Linear]:
    return [mlp.up_proj] if mlp.gate_proj is None else [mlp.up_proj, mlp.gate_proj]


def _plant(row: Tensor, matrix: Tensor, weights: int, random: np.random.Generator) -> None:
    if row.any():
        return
    size = matrix[matrix != 0].abs().mean()
    where = torch.from_numpy(random.choice(len(row), min(weights, len(row)), replace=False)).to(row.device)
    signs = torch.from_numpy(random.choice([-1.0, 1.0], len(where))).to(row)
    row[where] = size * signs
