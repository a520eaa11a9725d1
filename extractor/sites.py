"""Addresses inside a model, and the one callback that looks at or changes an activation.

Site: the residual stream as one sublayer reads it, where a bridge sits: "3.resid_pre" (before
attention 3), "3.resid_mid" (before MLP 3). Two per layer (Gao et al. 2025, section 2.3).

Node: one maskable channel of the student, "3.mlp.post_act:17". Kinds and names are those of the
released sparse models (openai/circuit_sparsity); reads come after the norm, writes just before the
residual add (Gao et al. 2025, appendix A.5).

Tap: `(address, activation) -> activation`, called by the student's forward at every address.
Recording, masking, ablating and patching are all taps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from extractor.errors import UsageError

Stream = Literal["resid_pre", "resid_mid"]
STREAMS: tuple[Stream, ...] = ("resid_pre", "resid_mid")

# In the order of the forward pass within a layer.
NODE_KINDS = (
    "attn.act_in",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.resid_delta",
    "mlp.act_in",
    "mlp.post_act",
    "mlp.resid_delta",
)

Tap = Callable[[str, Float[Tensor, "batch seq channel"]], Float[Tensor, "batch seq channel"]]


@dataclass(frozen=True, order=True)
class Site:
    """The residual stream before attention (`resid_pre`) or before the MLP (`resid_mid`)."""

    layer: int
    stream: Stream

    def __str__(self) -> str:
        return f"{self.layer}.{self.stream}"

    @property
    def index(self) -> int:
        """Sublayers that ran before this site."""
        return 2 * self.layer + STREAMS.index(self.stream)

    @property
    def read_address(self) -> str:
        """Where the student reads this site after the norm."""
        return f"{self.layer}.{'attn' if self.stream == 'resid_pre' else 'mlp'}.act_in"

    @classmethod
    def parse(cls, name: str) -> "Site":
        layer, _, stream = name.partition(".")
        if not layer.isdecimal() or stream not in STREAMS:
            raise UsageError(f"site {name!r}: write it as <layer>.resid_pre or <layer>.resid_mid")
        return cls(int(layer), stream)

    @classmethod
    def at(cls, index: int) -> "Site":
        return cls(index // 2, STREAMS[index % 2])


@dataclass(frozen=True)
class Node:
    """One channel at one address of the student."""

    address: str
    channel: int

    def __str__(self) -> str:
        return f"{self.address}:{self.channel}"

    @property
    def layer(self) -> int:
        return int(self.address.partition(".")[0])

    @property
    def kind(self) -> str:
        return self.address.partition(".")[2]

    def site_before(self, *, parallel: bool = False) -> "Site":
        """The last site that nothing of its sublayer has changed; parallel sublayers share one."""
        is_mid = self.kind.startswith("mlp") and not parallel
        return Site(self.layer, "resid_mid" if is_mid else "resid_pre")

    @property
    def sort_key(self) -> tuple[int, int, int]:
        return (self.layer, NODE_KINDS.index(self.kind), self.channel)

    @classmethod
    def parse(cls, name: str) -> "Node":
        address, _, channel = name.partition(":")
        layer, _, kind = address.partition(".")
        if not (layer.isdecimal() and channel.isdecimal() and kind in NODE_KINDS):
            raise UsageError(f"node {name!r}: write it as <layer>.<kind>:<channel>")
        return cls(address, int(channel))


def sites(num_layers: int, *, parallel: bool = False) -> tuple[Site, ...]:
    """Every site in forward order; parallel sublayers read one stream, so there is no `resid_mid`."""
    everything = (Site.at(index) for index in range(2 * num_layers))
    return tuple(site for site in everything if not parallel or site.stream == "resid_pre")


def node_addresses(num_layers: int) -> tuple[str, ...]:
    """Every address that holds nodes, in forward order."""
    return tuple(f"{layer}.{kind}" for layer in range(num_layers) for kind in NODE_KINDS)


def no_tap(address: str, activation: Tensor) -> Tensor:
    """The tap that does nothing."""
    return activation


def compose(*taps: Tap) -> Tap:
    """One tap that applies several, left to right."""

    def tap(address: str, activation: Tensor) -> Tensor:
        for inner in taps:
            activation = inner(address, activation)
        return activation

    return tap


class Recorder:
    """A tap that remembers the activations at the addresses asked for (all, if none are named)."""

    def __init__(self, *addresses: str):
        self.wanted = frozenset(addresses)
        self.activations: dict[str, Tensor] = {}

    def __call__(self, address: str, activation: Tensor) -> Tensor:
        if not self.wanted or address in self.wanted:
            self.activations[address] = activation
        return activation

    def __getitem__(self, address: str) -> Tensor:
        return self.activations[address]
