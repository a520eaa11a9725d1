"""What a shipped adapter does, as others load it: on the task's held-out prompts, and on held-out text.

A fitted adapter is not the edit that it was fitted to, so the edit's own figures say nothing about it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.dense import DenseModel
from bridges.edit import EditLimits, add_facts
from bridges.live import LiveEdit
from bridges.low_rank import Prompts
from bridges.off_target import HeldOutText
from bridges.readout import last_differences
from extractor.artifacts import remove_folder
from extractor.statistics import mean_interval
from extractor.tasks import TaskBatch


@torch.no_grad()
def adapter_effect(
    live: LiveEdit, adapted: DenseModel, batch: TaskBatch, text: HeldOutText, *, seed: int = 0
) -> dict[str, Any]:
    """Flips on held-out prompts beside the live edit's, and KL on held-out text.

    Args:
        adapted: the base with the adapter, loaded from its folder.

    Returns:
        `flip_rate` of the adapter and `flip_rate_live`: shares of the prompts answered right without either
        whose answer is another with it. `off_target_kl`: KL(base || adapted), nats/token, with its interval
        over blocks of text.
    """
    before = last_differences(live.dense, batch)
    prompts = Prompts.of_task(batch, live)
    with live.applied(last=prompts.last, counterfactual=prompts.counterfactual) as model:
        under_edit = batch.logit_difference(model(batch.ids, use_cache=False).logits)
    kl = text.kl_to(adapted).cpu()
    return {
        "flip_rate": _flips(before, last_differences(adapted, batch)),
        "flip_rate_live": _flips(before, under_edit),
        "off_target_kl": kl.mean().item(),
        "off_target_kl_interval": mean_interval(kl, torch.arange(len(kl)), bounds=(0, torch.inf), seed=seed),
    }


def _flips(before: Float[Tensor, " example"], after: Float[Tensor, " example"]) -> float:
    right = before > 0
    return (right & (after < 0)).sum().item() / max(1, int(right.sum()))


def unmet_by_adapter(facts: Mapping[str, Any], limits: EditLimits) -> tuple[str, ...]:
    """Why this adapter must not be shipped without force; empty: it may.

    Args:
        facts: those of `export_adapter` and `adapter_effect`.
    """
    found = unmet_by_fit(facts, limits)
    kl, limit = facts["off_target_kl"], limits.off_target_kl
    if not kl <= limit:
        found += (f"the adapter's off-target KL is {kl:.3g} nats/token, the limit is {limit:g}",)
    return found


def unmet_by_fit(facts: Mapping[str, Any], limits: EditLimits) -> tuple[str, ...]:
    """The same from what `export_adapter` says alone."""
    return tuple(
        f"the adapter misses {missed:.0%} of what the edit adds at {site}, the limit is "
        f"{limits.adapter_missed:.0%}"
        for site, missed in facts["fitting_error"].items()
        if isinstance(missed, float) and not missed <= limits.adapter_missed
    )


def settle(folder: Path, facts: Mapping[str, Any], unmet: Sequence[str], *, force: bool) -> dict[str, Any]:
    """Keep an adapter that meets its limits or is forced, which its edit.json then says; remove another.

    Returns:
        `facts`, with the limits in `refused` (the folder is gone) or added to `forced`.
    """
    if not unmet:
        return dict(facts)
    if not force:
        remove_folder(folder)
        return {**facts, "refused": list(unmet)}
    forced = [*facts["forced"], *unmet]
    add_facts(folder, {"forced": forced})
    return {**facts, "forced": forced}
