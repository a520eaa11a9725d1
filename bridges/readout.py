"""Telling the two sides of a task's pairs apart from the dense stream: AUROC, and linear probes.

Batches hold clean prompts first, then their corrupted partners; a score is meant to be higher on clean ones.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor, nn

from bridges.dense import DenseModel
from bridges.hooks import hooked
from extractor.sites import Site
from extractor.statistics import mean_interval
from extractor.tasks import TaskBatch

ROWS = 64  # prompts of a forward


@torch.no_grad()
def last_streams(
    dense: DenseModel, batch: TaskBatch, sites: Collection[Site]
) -> dict[Site, Float[Tensor, "example d_dense"]]:
    """The dense stream at each prompt's last position, by site."""
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for ids, last in zip(batch.ids.split(ROWS), batch.last.split(ROWS), strict=True):
        rows = torch.arange(len(ids), device=ids.device)
        for site, resid in dense.run(ids, record=sites).resid.items():
            parts[site].append(resid[rows, last].float())
    return {site: torch.cat(part) for site, part in parts.items()}


@torch.no_grad()
def last_differences(dense: DenseModel, batch: TaskBatch) -> Float[Tensor, " example"]:
    """Answer minus distractor of every prompt; the head computes the last positions only."""
    head, found = dense.model.get_output_embeddings(), []
    for ids, last in zip(batch.ids.split(ROWS), batch.last.split(ROWS), strict=True):
        rows = torch.arange(len(ids), device=ids.device)

        def select(module: nn.Module, args: tuple, rows: Tensor = rows, last: Tensor = last) -> tuple:
            return (args[0][rows, last][:, None], *args[1:])

        with hooked(head.register_forward_pre_hook(select)):
            found.append(dense.model(ids, use_cache=False).logits)
    return batch.logit_difference(torch.cat(found))


def auroc(scores: Float[Tensor, " example"]) -> float:
    """Probability that a clean prompt scores above a corrupted one, over all of them; ties count half."""
    return auroc_of(*scores.chunk(2))


def auroc_of(scores: Float[Tensor, " positive"], others: Float[Tensor, " negative"]) -> float:
    """Probability that a score is above one of the others; ties count half."""
    return _share_below(scores, others).mean().item()


def auroc_influence(scores: Float[Tensor, " example"]) -> Float[Tensor, " pair"]:
    """One value per pair of prompts; their mean is the AUROC.

    The share of corrupted prompts below the clean one, plus the share of clean ones above the corrupted one,
    less the AUROC: the variance of their mean over clusters is Obuchowski's (1997) of a clustered AUROC.
    """
    above, below = _placements(scores)
    return above + below - above.mean()


def auroc_interval(scores: Float[Tensor, " example"], batch: TaskBatch, seed: int = 0) -> dict[str, Any]:
    """AUROC with its 95 % interval, clustered by template."""
    cluster = batch.cluster[: len(batch) // 2]
    return mean_interval(auroc_influence(scores), cluster, bounds=(0.0, 1.0), seed=seed)


def separation(scores: Float[Tensor, " example"]) -> float:
    """Gap between the sides' means in standard deviations within a side; at most 1e6."""
    clean, corrupted = scores.double().chunk(2)
    within = ((clean.var(correction=0) + corrupted.var(correction=0)) / 2).sqrt()
    gap = clean.mean() - corrupted.mean()
    return (gap / within.clamp(min=1e-6 * gap.abs().item() or 1.0)).item()


def _placements(scores: Float[Tensor, " example"]) -> tuple[Tensor, Tensor]:
    """For each clean prompt the share of corrupted ones below it; for each corrupted one, of clean above."""
    clean, corrupted = scores.chunk(2)
    return _share_below(clean, corrupted), 1 - _share_below(corrupted, clean)


def _share_below(values: Float[Tensor, " value"], others: Float[Tensor, " other"]) -> Tensor:
    """For each value the share of the others below it; those equal count half."""
    values, others = values.double().contiguous(), others.double().sort().values.contiguous()
    ranks = sum(torch.searchsorted(others, values, side=side) for side in ("left", "right"))
    return ranks.double() / (2 * len(others))


@dataclass(frozen=True)
class LinearProbe:
    """A direction of the dense stream at one site."""

    direction: Float[Tensor, " d_dense"]

    def __call__(self, streams: Float[Tensor, "*batch d_dense"]) -> Float[Tensor, "*batch"]:
        return streams.double() @ self.direction


def difference_of_means(streams: Float[Tensor, "example d_dense"]) -> LinearProbe:
    clean, corrupted = streams.double().chunk(2)
    return LinearProbe(clean.mean(0) - corrupted.mean(0))


def logistic_probe(streams: Float[Tensor, "example d_dense"], ridge: float) -> LinearProbe:
    """Ridge logistic regression on standardised channels."""
    mean, deviation = streams.double().mean(0), streams.double().std(0, correction=0)
    deviation = torch.where(deviation > 1e-9 * deviation.max(), deviation, torch.inf)
    inputs = (streams.double() - mean) / deviation
    is_clean = torch.arange(len(inputs), device=inputs.device) < len(inputs) // 2
    return LinearProbe(ridge_logistic(inputs, is_clean, ridge) / deviation)


def ridge_logistic(
    inputs: Float[Tensor, "example d"], is_first: Bool[Tensor, " example"], ridge: float
) -> Float[Tensor, " d"]:
    """Weights, to convergence, for telling the first class from the other; the intercept is free.

    The loss is the sum of cross-entropies in nats plus `ridge`/2 times the squared norm of the weights.
    """
    rows = inputs.double().cpu().numpy()
    side = np.where(is_first.cpu().numpy(), 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:-1], parameters[-1]
        margin = side * (rows @ weights + bias)
        pull = -side * expit(-margin)  # gradient of each example's loss by its output
        gradient = np.append(pull @ rows + ridge * weights, pull.sum())
        return np.logaddexp(0, -margin).sum() + ridge / 2 * weights @ weights, gradient

    start = np.zeros(rows.shape[1] + 1)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    return torch.from_numpy(found.x[:-1]).to(inputs.device)
