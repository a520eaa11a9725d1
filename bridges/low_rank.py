"""The low-rank update of one module that is nearest to an edit's deltas at a site.

A delta at a site is a change of what the module before it writes to the stream: the output projection of
attention or MLP, the embedding before the first site. What depends on the text is fitted as a map of that
module's input, in closed form: ridge regression, then its main directions (reduced-rank regression).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bridges.dense import DenseModel
from bridges.hooks import hooked
from bridges.live import LiveEdit
from extractor.errors import InputError
from extractor.intervention import Counterfactual
from extractor.sites import Site
from extractor.tasks import TaskBatch

RIDGES = (1e-6, 1e-4, 1e-2, 1.0, 100.0)  # of the mean energy of an input channel


@dataclass(frozen=True)
class Writer:
    """The module that writes to the stream before a site."""

    name: str
    module: nn.Module
    gain: float
    """What one unit of the adapter's output is in the stream (Granite and Gemma multiply)."""

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.module, nn.Embedding)

    @property
    def has_bias(self) -> bool:
        return getattr(self.module, "bias", None) is not None

    @property
    def in_features(self) -> int:
        return self.module.num_embeddings if self.is_embedding else _shape(self.module)[1]


@dataclass(frozen=True)
class Prompts:
    """Prompts that deltas are recorded on, right-padded; with the counterfactual that a patch needs.

    A patch has no meaning on text without one: there it is recorded as no delta.
    """

    ids: Int[Tensor, "batch seq"]
    last: Int[Tensor, " batch"] | None = None
    counterfactual: Counterfactual | None = None
    group: Int[Tensor, " batch"] | None = None
    """What belongs together when some are left out: a task's templates; none: each prompt by itself."""

    @classmethod
    def of_task(cls, batch: TaskBatch, live: LiveEdit) -> "Prompts":
        """A task's prompts, each with its own counterfactual."""
        other = {address: batch.counterfactual(value) for address, value in live.read(batch.ids).items()}
        return cls(batch.ids, batch.last, other, batch.cluster)

    def split(self) -> tuple["Prompts", "Prompts"]:
        """Three quarters of the groups (one at least) and the rest."""
        group = torch.arange(len(self.ids), device=self.ids.device) if self.group is None else self.group
        names, place = group.unique(return_inverse=True)
        is_kept = place < max(1, 3 * len(names) // 4)
        return self._select(is_kept), self._select(~is_kept)

    def _select(self, rows: Bool[Tensor, " batch"]) -> "Prompts":
        last, group = (None if value is None else value[rows] for value in (self.last, self.group))
        other = self.counterfactual
        if other is not None:
            other = {address: value[rows] for address, value in other.items()}
        return Prompts(self.ids[rows], last, other, group)

    @property
    def inside(self) -> Tensor:
        """The positions that are no padding: bool, (batch, seq)."""
        column = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
        return (
            torch.ones_like(self.ids, dtype=torch.bool) if self.last is None else column <= self.last[:, None]
        )


@dataclass(frozen=True)
class LowRank:
    """x -> B A x + bias, for one module."""

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    bias: Float[Tensor, " d_out"] | None

    def __call__(self, x: Tensor) -> Float[Tensor, "token d_out"]:
        inner = x @ self.a.T if x.is_floating_point() else self.a.T[x]
        return inner @ self.b.T + (0.0 if self.bias is None else self.bias)


def writer_before(dense: DenseModel, site: Site) -> Writer:
    """The module whose output reaches this site as it is, found by asking the model.

    Raises:
        InputError: the family has no such module (a mixture of experts), or a norm follows it.
    """
    spec = dense.family.copy
    if spec is None:
        raise InputError(f"no adapter for '{dense.config.model_type}': {dense.family.no_copy}")
    if site.index == 0:
        name = spec.embed
    else:
        layer = site.layer if site.stream == "resid_mid" else site.layer - 1
        name = f"{dense.layout.blocks}.{layer}.{spec.out if site.stream == 'resid_mid' else spec.down}"
    module = dense.model.get_submodule(name)
    probe = torch.linspace(-1, 1, dense.width, device=dense.device).cos()
    ids = torch.arange(1, 5, device=dense.device)[None] % dense.config.vocab_size
    plain = dense.run(ids, record=[site]).resid[site]
    with hooked(module.register_forward_hook(lambda module, args, output: output + probe.to(output))):
        moved = dense.run(ids, record=[site]).resid[site] - plain
    gain = (moved.mean((0, 1)) @ probe / (probe @ probe)).item()
    if not (moved - gain * probe).abs().max() <= 1e-3 * abs(gain):
        raise InputError(
            f"no adapter at {site} of '{dense.config.model_type}': what {name} writes passes a norm before "
            "the stream; hold this edit live"
        )
    return Writer(name, module, gain * float(getattr(module, "embed_scale", 1.0)))


@torch.no_grad()
def record(
    live: LiveEdit, writers: dict[Site, Writer], prompts: Sequence[Prompts]
) -> dict[Site, tuple[Tensor, Tensor]]:
    """Per site: the inputs of the module before it and the deltas there, one row per token.

    Both under the live edit, so that a second site sees what the first has done.
    """
    rows: dict[Site, list[tuple[Tensor, Tensor]]] = {site: [] for site in writers}
    for part in prompts:
        inputs: dict[Site, Tensor] = {}
        is_off = live.edit.intervention.needs_counterfactual and part.counterfactual is None
        with ExitStack() as stack:
            for site, writer in writers.items():
                hook = writer.module.register_forward_pre_hook(_keeping(inputs, site))
                stack.enter_context(hooked(hook))
            if is_off:
                live.dense.run(part.ids, record=False)
            else:
                with live.applied(last=part.last, counterfactual=part.counterfactual) as model:
                    model(part.ids, use_cache=False)
        inside = part.inside.flatten()
        for site, writer in writers.items():
            x = inputs[site].flatten() if writer.is_embedding else inputs[site].flatten(0, -2).float()
            delta = torch.zeros(len(inside), live.dense.width, device=x.device)
            if not is_off:
                delta = live.deltas[site].flatten(0, 1)
            rows[site].append((x[inside], delta[inside] / writer.gain))
    return {site: tuple(map(torch.cat, zip(*found, strict=True))) for site, found in rows.items()}


def best_ridge(
    live: LiveEdit, writers: dict[Site, Writer], prompts: Sequence[Prompts], *, rank: int, bias: bool
) -> dict[Site, float]:
    """Per site, the ridge that fits the last quarter of the templates best from the others."""
    halves = [part.split() for part in prompts]
    kept = [first for first, _ in halves]
    left_out = [second for _, second in halves if len(second.ids)]
    if not left_out:
        return dict.fromkeys(writers, RIDGES[0])
    rows, other = record(live, writers, kept), record(live, writers, left_out)

    def missed(site: Site, ridge: float) -> float:
        part = fit(writers[site], *rows[site], rank=rank, bias=bias, ridge=ridge)
        x, y = other[site]
        return (part(x) - y).square().sum().item()

    return {site: min(RIDGES, key=lambda ridge: missed(site, ridge)) for site in writers}


def fit(
    writer: Writer,
    x: Tensor,
    y: Float[Tensor, "token d_out"],
    *,
    rank: int,
    bias: bool,
    ridge: float = RIDGES[0],
) -> LowRank:
    """The map of this rank that is nearest to `y` in least squares; an embedding's is a table of tokens."""
    y = y.double()
    if writer.is_embedding:
        weight = torch.zeros(writer.in_features, y.shape[1], dtype=y.dtype, device=y.device)
        counts = torch.bincount(x, minlength=writer.in_features).clamp(min=1)
        weight.index_add_(0, x, y).div_(counts[:, None])
        predicted, shift = weight[x], None
    else:
        x = x.double()
        centre = x.mean(0) if bias else torch.zeros_like(x[0])
        target = y.mean(0) if bias else torch.zeros_like(y[0])
        gram = (x - centre).T @ (x - centre)
        gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-30)
        weight = torch.linalg.solve(gram, (x - centre).T @ (y - target))
        predicted, shift = (x - centre) @ weight, (target - centre @ weight if bias else None)
    # of all maps of a rank, the one along the main directions of what the full map predicts
    values, vectors = torch.linalg.eigh(predicted.T @ predicted)
    is_kept = values[-rank:] > 1e-12 * values[-1].clamp(min=1e-30)
    basis = vectors[:, -rank:][:, is_kept] if is_kept.any() else vectors[:, -1:]
    if shift is not None:  # what the mean input makes of the directions left out stays in the bias
        shift = target - (centre @ weight) @ basis @ basis.T
    return LowRank(
        (weight @ basis).T.float().contiguous(),
        basis.float().contiguous(),
        None if shift is None else shift.float(),
    )


def constant(writer: Writer, delta: Float[Tensor, " d_out"]) -> LowRank:
    """The same vector for every input: a bias, or a row added to every token's embedding."""
    if writer.is_embedding:
        return LowRank(torch.ones(1, writer.in_features), delta[:, None] / writer.gain, None)
    return LowRank(torch.zeros(1, writer.in_features), torch.zeros(len(delta), 1), delta / writer.gain)


def fitting_error(parts: dict[Site, LowRank], rows: dict[Site, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Per site, the share of the deltas' energy that the map misses (0: exact)."""
    errors: dict[str, Any] = {}
    for site, part in parts.items():
        x, y = rows[site]
        energy = y.square().sum().item()
        missed = (part(x) - y).square().sum().item()
        errors[str(site)] = missed / energy if energy else {"undefined": "the edit adds nothing there"}
    return errors


def _keeping(into: dict[Site, Tensor], site: Site) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple) -> None:
        into[site] = args[0].detach()

    return keep


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features
