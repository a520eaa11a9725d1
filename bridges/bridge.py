"""Bridges: maps between the dense and the sparse residual stream, one per site.

encode: dense -> sparse, linear and (optionally) AbsTopK; decode: sparse -> dense, linear
(Gao et al. 2025, section 2.3 and appendix A.3). Where the dense model's norms remove the mean of the
stream, the bridge looks at the centred stream: the mean carries nothing there.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from extractor.artifacts import SCHEMA_VERSION, read_json, replace_folder, write_json
from extractor.errors import InputError
from extractor.sites import Site
from extractor.sparsity import abs_topk


class Bridge(nn.Module):
    """Encoder and decoder of one site."""

    def __init__(self, d_dense: int, d_sparse: int, encoder_frac: float | None = None):
        super().__init__()
        self.encoder = nn.Linear(d_dense, d_sparse)
        self.decoder = nn.Linear(d_sparse, d_dense)
        self.encoder_frac = encoder_frac

    def encode(self, resid: Float[Tensor, "*batch d_dense"]) -> Float[Tensor, "*batch d_sparse"]:
        """Centred dense stream -> sparse stream."""
        return abs_topk(self.encoder(resid), self.encoder_frac)

    def decode(self, resid: Float[Tensor, "*batch d_sparse"]) -> Float[Tensor, "*batch d_dense"]:
        """Sparse stream -> centred dense stream."""
        return self.decoder(resid)


class BridgeSet(nn.Module):
    """The bridges of every site, and the constants that belong to them."""

    def __init__(
        self,
        sites: Iterable[Site],
        d_dense: int,
        d_sparse: int,
        *,
        removes_mean: bool,
        reads_are_normed: bool = True,
        encoder_frac: float | None = None,
    ):
        super().__init__()
        self.sites = tuple(sites)
        self.removes_mean = removes_mean
        # OLMo 2 and 3 read the stream as it is, so an edit of a read needs no RMS there.
        self.reads_are_normed = reads_are_normed
        self.encoder_frac = encoder_frac
        # "." is not allowed in module names.
        self.bridges = nn.ModuleDict(
            {_key(site): Bridge(d_dense, d_sparse, encoder_frac) for site in self.sites}
        )
        # Mean square of the centred dense stream per site: the denominator of NMSE, and of the RMS
        # ratio for edits. Estimated once on training text, so it is the same on every process.
        self.register_buffer("dense_energy", torch.ones(len(self.sites)))
        self.register_buffer("sparse_energy", torch.ones(len(self.sites)))

    @classmethod
    def from_frame(
        cls,
        frame: Float[Tensor, "d_dense d_sparse"],
        sites: Iterable[Site],
        *,
        removes_mean: bool,
        reads_are_normed: bool = True,
    ) -> "BridgeSet":
        """Every encoder is `frame`, every decoder its transpose, no biases."""
        d_dense, d_sparse = frame.shape
        options = {"removes_mean": removes_mean, "reads_are_normed": reads_are_normed}
        bridges = cls(sites, d_dense, d_sparse, **options)
        with torch.no_grad():
            for site in bridges.sites:
                bridges[site].encoder.weight.copy_(frame.T)
                bridges[site].decoder.weight.copy_(frame)
                bridges[site].encoder.bias.zero_()
                bridges[site].decoder.bias.zero_()
        return bridges

    def like(self) -> "BridgeSet":
        """Untrained bridges of the same sites and widths."""
        first = next(iter(self.bridges.values()))
        widths = first.encoder.in_features, first.encoder.out_features
        return BridgeSet(
            self.sites,
            *widths,
            removes_mean=self.removes_mean,
            reads_are_normed=self.reads_are_normed,
            encoder_frac=self.encoder_frac,
        )

    def __getitem__(self, site: Site) -> Bridge:
        return self.bridges[_key(site)]

    def centred(self, resid: Float[Tensor, "*batch d_dense"]) -> Float[Tensor, "*batch d_dense"]:
        """The part of a dense stream that the dense model reads."""
        return resid - resid.mean(-1, keepdim=True) if self.removes_mean else resid

    def rms_ratio(self, site: Site) -> float:
        """Mean RMS of the sparse stream over the dense one's at a site; 1 where reads are not normed."""
        if not self.reads_are_normed:
            return 1.0
        index = self.sites.index(site)
        return (self.sparse_energy[index] / self.dense_energy[index]).sqrt().item()

    def read_scale(self, resid: Float[Tensor, "*batch d_dense"]) -> Float[Tensor, "*batch 1"]:
        """What a read of 1 is in the dense stream: its RMS at each position, or 1 without a norm."""
        rms = self.centred(resid).square().mean(-1, keepdim=True).sqrt()
        return rms if self.reads_are_normed else torch.ones_like(rms)

    def save_pretrained(self, folder: Path, dtype: torch.dtype = torch.float32, **facts: object) -> None:
        """`bridges.json` and `bridges.safetensors`, the maps in `dtype`; `facts` name both models."""
        first = next(iter(self.bridges.values()))
        header = {
            "schema_version": SCHEMA_VERSION,
            "sites": [str(site) for site in self.sites],
            "d_dense": first.encoder.in_features,
            "d_sparse": first.encoder.out_features,
            "removes_mean": self.removes_mean,
            "reads_are_normed": self.reads_are_normed,
            "encoder_frac": self.encoder_frac,
            **facts,
        }
        tensors = {name: buffer.cpu() for name, buffer in self.named_buffers()}
        tensors |= {name: p.detach().to("cpu", dtype).contiguous() for name, p in self.named_parameters()}

        def write(target: Path) -> None:
            save_file(tensors, target / "bridges.safetensors", metadata={"format": "pt"})
            write_json(target / "bridges.json", header)

        replace_folder(folder, write)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "BridgeSet":
        """Load a folder written by `save_pretrained`.

        Raises:
            InputError: missing or damaged files.
        """
        header = read_json(folder / "bridges.json", "bridges", "recipes/train.py")
        bridges = cls(
            [Site.parse(name) for name in header["sites"]],
            header["d_dense"],
            header["d_sparse"],
            removes_mean=header["removes_mean"],
            reads_are_normed=header["reads_are_normed"],
            encoder_frac=header["encoder_frac"],
        )
        try:
            bridges.load_state_dict(load_file(folder / "bridges.safetensors"))
        except (OSError, RuntimeError) as error:
            raise InputError(f"'{folder}' does not hold whole bridges ({error})") from None
        return bridges.eval()


def _key(site: Site) -> str:
    return f"{site.layer}_{site.stream}"
