"""Learned node masks: one gate per node, shared over tokens and prompts.

Forward: a node is kept where tau > 0, else it is frozen at its mean over training text (mean ablation).
Backward: the step's derivative is replaced by that of a sigmoid (Gao et al. 2025, section 2.2, appendix A.5).
"""

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from extractor.sites import Node, Recorder, Tap, node_addresses
from extractor.student import Student

Means = Mapping[str, Float[Tensor, " _"]]
Live = Mapping[str, Int[Tensor, " _"]]  # some channels of every address, ascending


@torch.no_grad()
def mean_activations(student: Student, blocks: Tensor, batch: int = 16) -> dict[str, Tensor]:
    """Mean of every node over all positions of some text, by address."""
    addresses = node_addresses(student.config.num_hidden_layers)
    sums: dict[str, Tensor] = {}
    for ids in blocks.to(student.device).split(batch):
        recorder = Recorder(*addresses)
        student(ids, tap=recorder)
        for address in addresses:
            total = recorder[address].float().sum((0, 1))
            sums[address] = sums[address] + total if address in sums else total
    return {address: total / blocks.numel() for address, total in sums.items()}


def live_channels(nodes: Collection[Node]) -> dict[str, Int[Tensor, " _"]]:
    """Kept channels by address, ascending."""
    by_address: dict[str, set[int]] = defaultdict(set)
    for node in nodes:
        by_address[node.address].add(node.channel)
    return {address: torch.tensor(sorted(channels)) for address, channels in by_address.items()}


def ablation_tap(gates: Means, means: Means) -> Tap:
    """A tap that keeps a node as far as its gate is open and freezes the rest of it at its mean."""

    def tap(address: str, activation: Tensor) -> Tensor:
        if address not in gates:
            return activation
        gate = gates[address]
        return torch.addcmul(means[address] * (1 - gate), gate, activation)

    return tap


class HeavisideStep(torch.autograd.Function):
    """1 where tau > 0, with the gradient of sigmoid(tau / temperature)."""

    @staticmethod
    def forward(ctx, tau: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.temperature = temperature
        return (tau > 0).to(tau.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (tau,) = ctx.saved_tensors
        gate = torch.sigmoid(tau / ctx.temperature)
        return gradient * gate * (1 - gate) / ctx.temperature, None


class NodeMask(nn.Module):
    """One parameter tau in [-1, 1] per node of the student."""

    def __init__(
        self,
        means: Means,
        *,
        init: float = 0.5,
        init_noise: float = 0.3,
        temperature: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        self.means = dict(means)
        self.temperature = temperature
        num_nodes = sum(len(mean) for mean in self.means.values())
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_nodes, generator=generator)
        device = next(iter(self.means.values())).device
        self.tau = nn.Parameter((init + init_noise * noise).clamp(-1, 1).to(device))

    def gates(self) -> Float[Tensor, " node"]:
        return HeavisideStep.apply(self.tau, self.temperature)

    def tap(self, gates: Float[Tensor, " node"]) -> Tap:
        """The student with these gates: kept nodes as they are, the others at their mean."""
        return ablation_tap(self.by_address(gates), self.means)

    def by_address(self, gates: Float[Tensor, " node"]) -> dict[str, Float[Tensor, " channel"]]:
        """Gates of all nodes, cut up by address."""
        sizes = [len(mean) for mean in self.means.values()]
        return dict(zip(self.means, gates.split(sizes), strict=True))

    @torch.no_grad()
    def clamp_(self) -> None:
        self.tau.clamp_(-1, 1)

    def ranking(self) -> Tensor:
        """Nodes (as flat indices) from the largest tau to the smallest; ties by index."""
        return torch.argsort(self.tau.detach(), descending=True, stable=True)

    def top(self, order: Tensor, k: int) -> Float[Tensor, " node"]:
        """Gates that keep the first k nodes of an order."""
        gates = torch.zeros_like(self.tau)
        gates[order[:k]] = 1
        return gates

    def nodes(self, gates: Float[Tensor, " node"]) -> frozenset[Node]:
        """The nodes that gates keep."""
        kept = set()
        for address, gate in self.by_address(gates).items():
            channels = gate.nonzero()[:, 0].tolist()
            kept.update(Node(address, channel) for channel in channels)
        return frozenset(kept)
