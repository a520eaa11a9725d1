"""Edges learned directly: which weights between a circuit's nodes the task needs.

An edge joins two kept nodes within a sublayer. A closed edge carries its source's mean instead of the source:

    target += w * source   ->   target += w * mean(source)

so it is a weight moved into the bias, and a circuit of edges is a compact model with fewer weights. Learned
as nodes are (a gate per edge, step forward, slope of a sigmoid backward), on the compact model of the nodes
found first. Gao et al. 2025 learn nodes alone and count edges; learned edges are what they would have wanted.

Weights that join the same two nodes (gate and up; query heads of one group) open and close together.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from extractor.compact import CompactStudent
from extractor.masks import Means
from extractor.sites import Node
from extractor.student import Student

ALWAYS_OPEN = -1  # a zero weight, or one of a row that is only computed to be ranked against


@dataclass(frozen=True)
class Join:
    """One matrix of a compact model between kept nodes."""

    name: str  # of the module, "layers.0.attn.q_proj"
    source_means: Float[Tensor, " column"]
    edge: Int[Tensor, "row column"]  # which edge each weight belongs to, or ALWAYS_OPEN


class EdgeGates:
    """The edges of a compact model, and that model with some of them closed."""

    def __init__(self, model: CompactStudent, means: Means):
        self.model = model
        self._index: dict[tuple[Node, Node], int] = {}  # source and target -> edge
        self.joins = [self._join(name, source, target, means) for name, source, target in matrices(model)]

    def _join(self, name: str, source: str, target: str, means: Means) -> Join:
        module = self.model.get_submodule(name)
        columns, rows = self.model.matrix_channels(name, source, target)
        live = {end: set(self.model.live[end].tolist()) for end in (source, target)}
        edge = torch.full(module.weight.shape, ALWAYS_OPEN, device=module.weight.device)
        for row, column in module.weight.nonzero().tolist():
            pair = Node(source, columns[column]), Node(target, rows[row])
            if pair[0].channel in live[source] and pair[1].channel in live[target]:
                edge[row, column] = self._index.setdefault(pair, len(self._index))
        return Join(name, means[source].to(edge.device)[columns], edge)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def pairs(self) -> list[tuple[Node, Node]]:
        """Source and target of every edge, in forward order."""
        return list(self._index)

    def weights(self, gates: Float[Tensor, " edge"]) -> dict[str, Tensor]:
        """Weights and biases with the edges as far open as their gates; closed ones are in the bias."""
        padded = torch.cat([gates, gates.new_ones(1)])
        parameters = {}
        for join in self.joins:
            module = self.model.get_submodule(join.name)
            kept = module.weight * padded[join.edge]
            parameters[f"{join.name}.weight"] = kept
            parameters[f"{join.name}.bias"] = module.bias + (module.weight - kept) @ join.source_means
        return parameters

    def run(self, gates: Float[Tensor, " edge"]) -> Callable[..., Any]:
        """The model with the edges as far open as their gates; called as a student is."""
        parameters = self.weights(gates)
        return lambda *args, **kwargs: functional_call(self.model, parameters, args, kwargs)

    def logits(self, gates: Float[Tensor, " edge"], ids: Tensor, logits_to_keep: Tensor) -> Tensor:
        return self.run(gates)(ids, logits_to_keep=logits_to_keep).logits

    @torch.no_grad()
    def close_(self, kept: Collection[tuple[Node, Node]]) -> CompactStudent:
        """The model with only these edges left, in place."""
        wanted = set(kept)
        gates = torch.tensor([float(pair in wanted) for pair in self._index], device=self.model.device)
        for name, value in self.weights(gates).items():
            self.model.get_parameter(name).copy_(value)
        return self.model


def matrices(model: CompactStudent | Student) -> list[tuple[str, str, str]]:
    """(module, source address, target address) of every matrix that holds edges."""
    found = []
    for index, layer in enumerate(model.layers):
        joins = [("attn.q_proj", "attn.act_in", "attn.q"), ("attn.k_proj", "attn.act_in", "attn.k")]
        joins += [("attn.v_proj", "attn.act_in", "attn.v"), ("attn.o_proj", "attn.v", "attn.resid_delta")]
        joins.append(("mlp.up_proj", "mlp.act_in", "mlp.post_act"))
        if layer.mlp.gate_proj is not None:
            joins.append(("mlp.gate_proj", "mlp.act_in", "mlp.post_act"))
        joins.append(("mlp.down_proj", "mlp.post_act", "mlp.resid_delta"))
        for name, source, target in joins:
            found.append((f"layers.{index}.{name}", f"{index}.{source}", f"{index}.{target}"))
    return found
