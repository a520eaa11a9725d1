"""From a change of the student to a delta of the dense stream at a site.

    read        a node read after the norm, "l.attn.act_in:c" or "l.mlp.act_in:c": its change times column c
                of the decoder, times rho * rms_dense[t] (Gao et al. 2025, appendix A.4). The node is read
                after the norm, the bridge lives before it; rho is the ratio of mean stream RMS, sparse over
                dense, kept with the bridges.
    write       a channel or neuron that is added to the stream: what it writes, decoded at the next site
    difference  what has no coordinate in the stream (q, k, v; writes through AbsTopK or a norm): the student
                runs with the change and without, and the difference of its next stream is decoded

The sparse activation comes from the student run alongside (`student`, as in the paper), or from the
bridge's encoder on the dense model's own stream (`bridge`), which needs no student when it is used.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.reading import BridgeReader
from extractor.errors import InputError
from extractor.intervention import Change, Intervention
from extractor.sites import Node, Site
from extractor.student import Student

Source = Literal["student", "bridge"]
Via = Literal["read", "write", "difference"]
Rms = Literal["token", "mean"]


@dataclass(frozen=True)
class Crossing:
    """One change of nodes of one address, and the directions that it moves at one site."""

    change: Change
    site: Site
    via: Via
    directions: Float[Tensor, "node d_dense"]
    """Decoded, times the RMS ratio for reads; one row per node, per stream channel for `difference`."""
    rms: Literal["token"] | float = 1.0
    """What a read is multiplied by: the dense stream's RMS at its own token, or a fixed number."""
    removes_mean: bool = False

    @property
    def address(self) -> str:
        return self.change.nodes[0].address

    @property
    def is_constant(self) -> bool:
        """The delta is the same vector at every token of every text."""
        change = self.change
        everywhere = change.positions == "all" and change.condition is None
        return change.kind == "steer" and everywhere and self.via != "difference" and self.rms != "token"

    def delta(
        self, moved: Float[Tensor, "batch seq node"], resid: Float[Tensor, "batch seq d_dense"]
    ) -> Float[Tensor, "batch seq d_dense"]:
        """The change of the dense stream `resid` for a change of the nodes."""
        delta = moved.float() @ self.directions
        if self.rms != "token":
            return delta * self.rms
        resid = resid.float()
        centred = resid - resid.mean(-1, keepdim=True) if self.removes_mean else resid
        return delta * centred.square().mean(-1, keepdim=True).sqrt()

    def to(self, device: torch.device) -> "Crossing":
        return replace(self, directions=self.directions.to(device))

    def as_json(self) -> dict[str, Any]:
        return {
            "site": str(self.site),
            "address": self.address,
            "via": self.via,
            "rms": self.rms,
            "removes_mean": self.removes_mean,
        }


def cross(
    intervention: Intervention,
    student: Student,
    bridges: BridgeSet,
    *,
    source: Source = "student",
    rms: Rms = "token",
) -> tuple[Crossing, ...]:
    """Every change at its dense site, in the order of the changes.

    `rms` "mean" takes the site's mean RMS over text for every token, so that a steer is one vector.

    Raises:
        InputError: a node that cannot cross, with the reason.
    """
    return tuple(
        _cross(part, student, bridges, source, rms)
        for change in intervention.changes
        for part in change.by_address()
    )


def reader_for(
    intervention: Intervention, student: Student, bridges: BridgeSet, crossings: Iterable[Crossing]
) -> BridgeReader:
    """What the source `bridge` needs: the encoders of the sites that are read, and the neurons.

    Raises:
        InputError: a node, or a condition's, that only the student can tell.
    """
    read: list[Node] = [c.condition.node for c in intervention.changes if c.condition is not None]
    read += [node for c in crossings if c.change.kind != "steer" for node in c.change.nodes]
    sites, neurons = set(), {}
    for node in read:
        site = node.site_before()
        if node.kind == "mlp.post_act" and student.config.activation_frac is None:
            neurons.setdefault(node.layer, set()).add(node.channel)
        elif not node.kind.endswith("act_in"):
            why = (
                "AbsTopK compares it with every other neuron"
                if node.kind == "mlp.post_act"
                else "attention or a whole MLP computes it"
            )
            raise InputError(f"{node} cannot be read from the dense stream ({why}); use source student")
        if site not in bridges.sites:
            raise InputError(
                f"{node} is read at {site}, where the dense model has no site; use source student"
            )
        sites.add(site)
    for c in crossings:
        if c.via == "difference":
            raise InputError(f"{c.change.nodes[0]} has no coordinate in the stream; use source student")
    return BridgeReader.of(student, bridges, sites, {k: sorted(v) for k, v in neurons.items()})


def _cross(change: Change, student: Student, bridges: BridgeSet, source: Source, rms: Rms) -> Crossing:
    node = change.nodes[0]
    if max(n.channel for n in change.nodes) >= _width(node, student) or node.layer >= len(student.layers):
        raise InputError(f"edit: the student has no node {max(change.nodes, key=lambda n: n.channel)}")
    kind = node.kind.partition(".")[2]
    if kind == "act_in":
        return _cross_read(change, bridges, rms)
    site = _site_after(node, student)
    if site not in bridges.sites:
        raise InputError(f"edit: {node} writes after the last site, where no bridge is")
    decoder = bridges[site].decoder.weight.detach()
    is_plain = student.config.activation_frac is None and not student.config.post_norm
    channels = [n.channel for n in change.nodes]
    if kind == "resid_delta":
        return Crossing(change, site, "write", decoder[:, channels].T.contiguous())
    if kind == "post_act" and is_plain:
        writes = student.layers[node.layer].mlp.down_proj.weight.detach()[:, channels]
        return Crossing(change, site, "write", (decoder @ writes).T.contiguous())
    if source == "bridge":
        why = (
            "attention mixes it over positions"
            if kind != "post_act"
            else "its write passes AbsTopK or a norm"
        )
        raise InputError(f"edit: {node} has no coordinate in the stream ({why}); use source student")
    return Crossing(change, site, "difference", decoder.T.contiguous())


def _cross_read(change: Change, bridges: BridgeSet, rms: Rms) -> Crossing:
    node = change.nodes[0]
    site = node.site_before()
    if site not in bridges.sites:
        raise InputError(
            f"edit: {node} reads the stream that attention reads, too (parallel residual); "
            f"no edit of the stream moves it alone, use {node.layer}.attn.act_in"
        )
    directions = read_directions([n.channel for n in change.nodes], site, bridges)
    scale: Literal["token"] | float = "token"
    if not bridges.reads_are_normed:
        scale = 1.0
    elif rms == "mean":
        scale = bridges.dense_energy[bridges.sites.index(site)].sqrt().item()
    return Crossing(change, site, "read", directions, scale, bridges.removes_mean)


def read_directions(channels: list[int], site: Site, bridges: BridgeSet) -> Float[Tensor, "node d_dense"]:
    """The channels' decoder columns, scaled by the RMS ratio."""
    return bridges[site].decoder.weight.detach()[:, channels].T * bridges.rms_ratio(site)


def _site_after(node: Node, student: Student) -> Site:
    """The first site whose stream holds what this node writes."""
    if node.kind.startswith("attn") and not student.config.parallel_residual:
        return Site(node.layer, "resid_mid")
    return Site(node.layer + 1, "resid_pre")


def _width(node: Node, student: Student) -> int:
    config = student.config
    heads = {
        "q": config.num_attention_heads,
        "k": config.num_key_value_heads,
        "v": config.num_key_value_heads,
    }
    name = node.kind.partition(".")[2]
    if name in heads:
        return heads[name] * config.head_dim
    return config.intermediate_size if name == "post_act" else config.hidden_size
