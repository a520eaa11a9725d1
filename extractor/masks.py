"""Learned node masks: one gate per node, shared over tokens and prompts.

Forward: a node is kept where tau > 0, else it is frozen at its mean over training text (mean ablation).
Backward: the step's derivative is replaced by that of a sigmoid (Gao et al. 2025, section 2.2, appendix A.5).
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
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


class NodeMasks(nn.Module):
    """One parameter tau in [-1, 1] per node of the student, for several settings (seeds, tasks) at once."""

    def __init__(
        self,
        means: Means,
        seeds: Sequence[int],
        *,
        init: float = 0.5,
        init_noise: float = 0.3,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.means = dict(means)
        self.temperature = temperature
        num_nodes = sum(map(len, self.means.values()))
        noise = [torch.randn(num_nodes, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        device = next(iter(self.means.values())).device
        self.tau = nn.Parameter((init + init_noise * torch.stack(noise)).clamp(-1, 1).to(device))

    def gates(self) -> Float[Tensor, "setting node"]:
        return HeavisideStep.apply(self.tau, self.temperature)

    @torch.no_grad()
    def clamp_(self) -> None:
        self.tau.clamp_(-1, 1)

    def live(self, nodes: Bool[Tensor, " node"]) -> dict[str, Int[Tensor, " _"]]:
        """Channels by address of the nodes marked."""
        return {address: kept.nonzero()[:, 0] for address, kept in self.by_address(nodes).items()}

    def by_address(self, values: Shaped[Tensor, " node"]) -> dict[str, Shaped[Tensor, " _"]]:
        """Values of all nodes, cut up by address."""
        sizes = [len(mean) for mean in self.means.values()]
        return dict(zip(self.means, values.split(sizes), strict=True))

    def nodes(self, kept: Bool[Tensor, " node"]) -> frozenset[Node]:
        """The nodes marked."""
        return frozenset(
            Node(address, c) for address, index in self.live(kept).items() for c in index.tolist()
        )


class GateTap:
    """Gates of several settings over one model; a batch holds the settings' examples one after the other.

    `live` marks the nodes that the model computes (all of a student, the kept ones of a compact model).
    """

    def __init__(self, masks: NodeMasks, live: Bool[Tensor, " node"] | None = None):
        if live is None:
            live = torch.ones_like(masks.tau[0], dtype=torch.bool)
        self.live = live.nonzero()[:, 0]
        self.means = {address: masks.means[address][kept] for address, kept in masks.live(live).items()}

    def __call__(self, gates: Float[Tensor, "setting node"]) -> Tap:
        """The tap that applies these gates."""
        sizes = [len(mean) for mean in self.means.values()]
        by_address = dict(zip(self.means, gates[:, self.live].split(sizes, dim=1), strict=True))

        def tap(address: str, activation: Tensor) -> Tensor:
            if address not in by_address:
                return activation
            gate = by_address[address][:, None, None].to(activation.dtype)
            frozen = self.means[address].to(activation.dtype) * (1 - gate)
            by_setting = activation.unflatten(0, (len(gates), -1))
            return torch.addcmul(frozen, gate, by_setting).flatten(0, 1)

        return tap
