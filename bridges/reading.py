"""What the student would read where the dense model is: the bridge's encoder on the dense stream.

With the tensors of a `BridgeReader` an edit runs without the student. A read is the encoded stream after
the student's norm and AbsTopK; a neuron is computed from the read before its MLP. What attention mixes over
positions has no such short way.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers.activations import ACT2FN

from bridges.bridge import BridgeSet
from extractor.selection import abs_topk
from extractor.sites import Site
from extractor.student import Student


@dataclass(frozen=True)
class ReadSettings:
    """The constants of a read."""

    removes_mean: bool
    encoder_frac: float | None
    activation_frac: float | None
    eps: float | None
    """Of the student's norm; None: it reads the stream as it is."""
    hidden_act: str
    intermediate_size: int


class BridgeReader:
    """Activations of the student at some addresses, from the dense stream alone."""

    def __init__(self, settings: ReadSettings, tensors: dict[str, Tensor]):
        self.settings, self.tensors = settings, tensors

    @classmethod
    def of(
        cls, student: Student, bridges: BridgeSet, sites: Collection[Site], neurons: dict[int, list[int]]
    ) -> "BridgeReader":
        """Reads at these sites, and these neurons by layer."""
        config, tensors = student.config, {}
        for site in sites:
            tensors[f"{site}.encoder.weight"] = bridges[site].encoder.weight
            tensors[f"{site}.encoder.bias"] = bridges[site].encoder.bias
        for layer, channels in neurons.items():
            mlp, rows = student.layers[layer].mlp, torch.tensor(channels)
            tensors[f"{layer}.neurons"] = rows
            for name in ("up", "gate"):
                if (linear := getattr(mlp, f"{name}_proj")) is not None:
                    tensors[f"{layer}.{name}.weight"] = linear.weight[rows]
                    tensors[f"{layer}.{name}.bias"] = linear.bias[rows]
        settings = ReadSettings(
            removes_mean=bridges.removes_mean,
            encoder_frac=bridges.encoder_frac,
            activation_frac=config.activation_frac,
            eps=config.rms_norm_eps if config.pre_norm else None,
            hidden_act=config.hidden_act,
            intermediate_size=config.intermediate_size,
        )
        return cls(settings, {name: tensor.detach().clone() for name, tensor in tensors.items()})

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the dense stream has to be read."""
        suffix = ".encoder.weight"
        found = (Site.parse(name.removesuffix(suffix)) for name in self.tensors if name.endswith(suffix))
        return tuple(sorted(found, key=lambda site: site.index))

    def to(self, device: torch.device) -> "BridgeReader":
        return BridgeReader(self.settings, {name: t.to(device) for name, t in self.tensors.items()})

    def settings_json(self) -> dict[str, object]:
        return asdict(self.settings)

    def read(
        self, site: Site, resid: Float[Tensor, "batch seq d_dense"]
    ) -> dict[str, Float[Tensor, "batch seq _"]]:
        """Activations by address that can be told at a site; neurons that nobody asked for are zero."""
        settings, tensors = self.settings, self.tensors
        resid = resid.float()
        centred = resid - resid.mean(-1, keepdim=True) if settings.removes_mean else resid
        encoded = F.linear(centred, tensors[f"{site}.encoder.weight"], tensors[f"{site}.encoder.bias"])
        stream = abs_topk(encoded, settings.encoder_frac)
        normed = stream if settings.eps is None else F.rms_norm(stream, stream.shape[-1:], eps=settings.eps)
        found = {site.read_address: abs_topk(normed, settings.activation_frac)}
        if site.stream == "resid_mid" and f"{site.layer}.neurons" in tensors:
            found[f"{site.layer}.mlp.post_act"] = self._neurons(site.layer, found[site.read_address])
        return found

    def _neurons(self, layer: int, act_in: Tensor) -> Float[Tensor, "batch seq neuron"]:
        def project(name: str) -> Tensor:
            return F.linear(
                act_in, self.tensors[f"{layer}.{name}.weight"], self.tensors[f"{layer}.{name}.bias"]
            )

        act, up = ACT2FN[self.settings.hidden_act], project("up")
        values = act(project("gate")) * up if f"{layer}.gate.weight" in self.tensors else act(up)
        everything = values.new_zeros(*values.shape[:-1], self.settings.intermediate_size)
        everything[..., self.tensors[f"{layer}.neurons"]] = values
        return everything
