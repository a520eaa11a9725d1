"""Figures of a comparison: counts, calibration, correlations with intervals, most likely tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bridges.token_classes import token_texts
from extractor.evidence import correlation
from extractor.statistics import CONFIDENCE, FEW_CLUSTERS, NUM_RESAMPLES, undefined


def counted(planned: int, run: int, scored: int, reasons: Mapping[str, int]) -> dict[str, Any]:
    """Counts of a table, with the reasons that apply."""
    given = [{"reason": reason, "count": count} for reason, count in reasons.items() if count]
    return {
        "planned": planned,
        "run": run,
        "scored": scored,
        "excluded": planned - scored,
        "reasons": given,
    }


def calibration_bins(
    confidence: Float[Tensor, " example"], is_right: Bool[Tensor, " example"], bins: int
) -> list[dict[str, Any]]:
    """Mean confidence and accuracy in bins of equal width, (low, high]; empty bins are left out."""
    index = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    rows = []
    for place in index.unique().tolist():
        chosen = index == place
        rows.append(
            {
                "low": place / bins,
                "high": (place + 1) / bins,
                "count": int(chosen.sum()),
                "confidence": confidence[chosen].double().mean().item(),
                "accuracy": is_right[chosen].double().mean().item(),
            }
        )
    return rows


def calibration_error(rows: list[dict[str, Any]]) -> float | dict[str, str]:
    """Mean distance of accuracy from confidence over bins, by their size (Guo et al. 2017)."""
    total = sum(row["count"] for row in rows)
    if not total:
        return undefined("no examples")
    return sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / total


def rank_correlation(a: Float[Tensor, " example"], b: Float[Tensor, " example"]) -> float | dict[str, str]:
    """Spearman's."""
    if len(a) < 2:
        return undefined("fewer than two examples")
    return correlation(*(torch.from_numpy(stats.rankdata(x.numpy())) for x in (a, b)))


def correlation_interval(
    a: Float[Tensor, " example"], b: Float[Tensor, " example"], cluster: Int[Tensor, " example"], seed: int
) -> dict[str, Any]:
    """Pearson's r with its percentile bootstrap interval over clusters."""
    value = correlation(a, b) if len(a) > 1 else undefined("fewer than two examples")
    if isinstance(value, dict):
        return value
    groups, index = np.unique(cluster.numpy(), return_inverse=True)
    found = {"value": value, "clusters": len(groups), "n": len(a)}
    if len(groups) < FEW_CLUSTERS:
        few = undefined(f"{len(groups)} clusters are too few for a bootstrap")
        return found | {"low": few, "high": few, "method": "none"}
    x, y = ((part.double() - part.double().mean()).numpy() for part in (a, b))
    columns = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = np.stack([np.bincount(index, weights=column) for column in columns])

    def pearson(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        n, sx, sy, sxx, syy, sxy = sums[:, drawn].sum(axis)
        spread = (sxx - sx * sx / n) * (syy - sy * sy / n)
        return (sxy - sx * sy / n) / np.sqrt(np.maximum(spread, np.finfo(float).tiny))

    ends = stats.bootstrap(
        (np.arange(len(groups)),),
        pearson,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=200,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return found | {"low": float(ends.low), "high": float(ends.high), "method": "percentile"}


def top_tokens(
    probabilities: Float[Tensor, " vocab"], count: int, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The most likely tokens, with their probabilities."""
    best = probabilities.topk(min(count, len(probabilities)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"token": token_texts([i], tokenizer)[0], "probability": p} for i, p in pairs]
