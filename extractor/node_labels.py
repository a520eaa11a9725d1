"""First, mechanical labels of nodes: a property of the text that a node tells apart, tested before it stands.

For each node and each side (its high activations, its low ones), on held-out text in two halves of blocks:

1. Choice, on the first half: of all properties, the one with the largest AUROC plus precision.
2. Test, on the second half: the label stands where the AUROC is at least 0.95, its 95 % interval (blocks
   resampled) stays above 0.9, and at least 0.8 of the node's n strongest positions have the property, n
   being how often it holds. Precision is the condition on the base rate: a rare property can have a high
   AUROC although most strong activations stand elsewhere.

A property is a candidate if it holds in at least 5 blocks of each half and at most at half of all positions.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from extractor.predicates import Predicates
from extractor.statistics import undefined

MIN_AUROC, MIN_AUROC_LOW, MIN_PRECISION = 0.95, 0.90, 0.80
MIN_BLOCKS, MAX_BASE_RATE = 5, 0.5
NUM_RESAMPLES = 1000
NO_CANDIDATE = undefined("no property holds often enough in both halves of the text")


def label_nodes(
    activations: Float[Tensor, "block seq node"], predicates: Predicates, seed: int
) -> list[dict[str, object]]:
    """For every node {"high": ..., "low": ...}: the chosen property, its test, and the label or None."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(activations), generator=generator)
    chosen_on, tested_on = order[: len(order) // 2], order[len(order) // 2 :]
    candidates = {
        phrase: holds
        for phrase, holds in predicates.items()
        if holds.float().mean() <= MAX_BASE_RATE
        and min(int(holds[half].any(1).sum()) for half in (chosen_on, tested_on)) >= MIN_BLOCKS
    }
    found: list[dict[str, object]] = [{} for _ in range(activations.shape[-1])]
    for side in ("high", "low"):
        signed = activations if side == "high" else -activations
        names = _choose(signed[chosen_on], {name: holds[chosen_on] for name, holds in candidates.items()})
        for node, name in enumerate(names):
            if name is None:
                found[node][side] = NO_CANDIDATE
                continue
            test = _test(signed[tested_on][..., node], candidates[name][tested_on], generator)
            label = f"{side} {name}" if is_supported(test) else None
            found[node][side] = {"label": label, "property": name, **test}
    return found


def is_supported(test: Mapping[str, object]) -> bool:
    """Whether a test's figures carry a label."""
    return (
        test["auroc"] >= MIN_AUROC
        and test["auroc_interval"][0] >= MIN_AUROC_LOW
        and test["precision"] >= MIN_PRECISION
    )


def labels_of(tested: Mapping[str, object]) -> list[str]:
    """The labels that stand, of one entry of `label_nodes`."""
    return [side["label"] for side in tested.values() if side.get("label")]


def _choose(
    values: Float[Tensor, "block seq node"], candidates: Mapping[str, Bool[Tensor, "block seq"]]
) -> Sequence[str | None]:
    """Per node the best candidate's name; None where there is no candidate."""
    names = list(candidates)
    if not names:
        return [None] * values.shape[-1]
    ranks = average_ranks(values.flatten(0, 1))
    holds = torch.stack([candidates[name].flatten() for name in names])
    scores = _auroc(ranks, holds) + torch.stack([_precision(ranks, with_it) for with_it in holds])
    return [names[best] for best in scores.argmax(0).tolist()]


def _test(
    values: Float[Tensor, "block seq"], holds: Bool[Tensor, "block seq"], generator: torch.Generator
) -> dict[str, object]:
    wins, num_with, num_without = block_wins(values, holds)
    area = wins.sum() / (num_with.sum() * num_without.sum())
    precision = _precision(average_ranks(values.reshape(-1, 1)), holds.flatten())
    return {
        "auroc": float(area),
        "auroc_interval": _auroc_interval(wins, num_with, num_without, generator),
        "precision": float(precision),
        "base_rate": float(holds.float().mean()),
        "positions": holds.numel(),
        "blocks": len(holds),
    }


def average_ranks(values: Float[Tensor, "position node"]) -> Float[Tensor, "position node"]:
    """Ranks from 1 of every column; equal values share their mean rank."""
    columns = values.T.contiguous()
    ordered = columns.sort(dim=1).values
    below = torch.searchsorted(ordered, columns)
    up_to = torch.searchsorted(ordered, columns, right=True)
    return (below + up_to + 1).T.double() / 2


def _auroc(
    ranks: Float[Tensor, "position node"], holds: Bool[Tensor, "candidate position"]
) -> Float[Tensor, "candidate node"]:
    """The chance that a position with the property has a higher value than one without (Mann and Whitney)."""
    with_it = holds.sum(1, keepdim=True).double()
    above = holds.double() @ ranks - with_it * (with_it + 1) / 2
    return above / (with_it * (holds.shape[1] - with_it))


def _precision(
    ranks: Float[Tensor, "position node"], holds: Bool[Tensor, " position"]
) -> Float[Tensor, " node"]:
    """Share with the property of the n highest positions, n being how many have it."""
    strongest = ranks > len(ranks) - holds.sum()
    return strongest[holds].sum(0) / strongest.sum(0).clamp(min=1)


def block_wins(
    values: Float[Tensor, "block seq"], holds: Bool[Tensor, "block seq"]
) -> tuple[Float[Tensor, "block block"], Float[Tensor, " block"], Float[Tensor, " block"]]:
    """How often values with the property, of one block, beat those without it, of another (a tie is half).

    Also the numbers with and without it per block. With these, resampling blocks needs no sorting.
    """
    of_block, _ = holds.nonzero(as_tuple=True)
    with_it = values[holds]
    wins = torch.zeros(len(values), len(values), dtype=torch.double)
    for other, (row, has_it) in enumerate(zip(values, holds, strict=True)):
        without = row[~has_it].sort().values
        below = torch.searchsorted(without, with_it) + torch.searchsorted(without, with_it, right=True)
        wins[:, other].index_add_(0, of_block, below.double() / 2)
    return wins, holds.sum(1).double(), (~holds).sum(1).double()


def _auroc_interval(
    wins: Tensor, num_with: Tensor, num_without: Tensor, generator: torch.Generator
) -> list[float]:
    """95 % percentile interval, blocks resampled; resamples without the property do not count."""
    blocks = len(wins)
    drawn = torch.randint(blocks, (NUM_RESAMPLES, blocks), generator=generator)
    times = torch.zeros(NUM_RESAMPLES, blocks, dtype=torch.double).scatter_add_(
        1, drawn, torch.ones(NUM_RESAMPLES, blocks, dtype=torch.double)
    )
    total = torch.einsum("ri,ij,rj->r", times, wins, times)
    pairs = (times @ num_with) * (times @ num_without)
    areas = total[pairs > 0] / pairs[pairs > 0]
    return torch.quantile(areas, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
