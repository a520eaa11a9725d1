"""What a steering does where nobody asked for it: to held-out text, and to the answers of other tasks.

KL is that of the steered next-token distribution from the unedited one, KL(unedited || steered), in nats per
token. An edit that fires seldom has a small one over all tokens, so it is also given near where it fires.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.dense import DenseModel
from bridges.losses import log_probs
from bridges.steering import Steering
from bridges.tails import PromptTails
from extractor.sites import Site
from extractor.statistics import mean_interval, undefined
from extractor.tasks import accuracy

NEAR = 8  # tokens after one at which something was added
KEPT_VALUES = 2**26  # log-probabilities that are kept (256 MiB); more are computed again each time


@dataclass(frozen=True)
class OffTarget:
    """The effect of one steering at one strength on held-out text."""

    kl: float
    """Mean over all tokens, nats/token."""
    kl_near: float | dict[str, str]
    """Mean over the tokens where something is added, and the 8 after each."""
    share_of_tokens: float
    """At which something is added."""
    loss_change: float
    """Of the next token's cross-entropy, nats/token."""
    perplexity_before: float
    perplexity_after: float
    kl_by_block: Float[Tensor, " block"]

    def as_json(self, seed: int = 0) -> dict[str, Any]:
        """The figures, with the interval of `kl` over blocks of text."""
        facts = {name: _finite(value) for name, value in vars(self).items() if name != "kl_by_block"}
        blocks = torch.arange(len(self.kl_by_block))
        return facts | {
            "kl_interval": mean_interval(self.kl_by_block, blocks, bounds=(0, math.inf), seed=seed)
        }


class HeldOutText:
    """The unedited dense model on blocks of text: its loss, and its stream at the sites asked for."""

    def __init__(
        self,
        dense: DenseModel,
        blocks: Int[Tensor, "block token"],
        position_ids: Int[Tensor, "block token"] | None = None,
        *,
        batch_size: int = 16,
    ):
        self.dense, self.batch_size = dense, batch_size
        self.blocks = blocks.to(dense.device)
        self.position_ids = None if position_ids is None else position_ids.to(dense.device)
        self._resid: dict[Site, Float[Tensor, "block token d_dense"]] = {}
        self._kept: Float[Tensor, "block token vocab"] | None = None
        self.nll = self._unedited()

    @property
    def loss(self) -> float:
        """Cross-entropy of the next token without any edit, nats/token."""
        return self.nll.mean().item()

    @cached_property
    def halves(self) -> tuple["HeldOutText", "HeldOutText"]:
        """Every other block, and the rest: what is fitted to the one can be tried on the other."""
        return self._part(slice(0, None, 2)), self._part(slice(1, None, 2))

    def _part(self, rows: slice) -> "HeldOutText":
        part = copy.copy(self)
        part.blocks, part.nll, part._resid = self.blocks[rows], self.nll[rows], {}
        part.position_ids = None if self.position_ids is None else self.position_ids[rows]
        part._kept = None if self._kept is None else self._kept[rows]
        return part

    @torch.no_grad()
    def resid(self, site: Site) -> Float[Tensor, "block token d_dense"]:
        """The unedited stream at a site, computed once."""
        if site not in self._resid:
            runs = (
                self.dense.run(ids, [site], position_ids=at) for ids, at in map(self._rows, self._parts())
            )
            self._resid[site] = torch.cat([run.resid[site] for run in runs])
        return self._resid[site]

    @torch.no_grad()
    def effect(self, steering: Steering, strength: float = 1.0) -> OffTarget:
        """KL and loss under the steering; blocks in which nothing is added are not run."""
        resid = self.resid(steering.site)
        delta = steering.delta(resid, strength)
        touched = delta.any(-1)
        kl, nll = torch.zeros_like(touched, dtype=torch.float32), self.nll.clone()
        (changed,) = touched.any(1).nonzero(as_tuple=True)
        for rows in changed.split(self.batch_size) if len(changed) else ():
            ids, at = self._rows(rows)
            logits = self.dense.run_from(steering.site, resid[rows] + delta[rows], position_ids=at)
            own, reference = log_probs(logits), self._reference(rows)
            kl[rows] = F.kl_div(own, reference, reduction="none", log_target=True).sum(-1)
            nll[rows] = next_token_loss(own, ids)
        near = nearby(touched)
        return OffTarget(
            kl=kl.mean().item(),
            kl_near=kl[near].mean().item() if near.any() else undefined("nothing is added on this text"),
            share_of_tokens=touched.float().mean().item(),
            loss_change=(nll - self.nll).mean().item(),
            perplexity_before=self.nll.mean().exp().item(),
            perplexity_after=nll.mean().exp().item(),
            kl_by_block=kl.mean(1).cpu(),
        )

    @torch.no_grad()
    def kl_to(self, other: DenseModel) -> Float[Tensor, " block"]:
        """KL(unedited || other) of another model with the same tokens, nats/token of every block."""
        found = []
        for rows in self._parts():
            ids, at = self._rows(rows)
            own = log_probs(other.run(ids, record=False, position_ids=at).logits)
            kl = F.kl_div(own, self._reference(rows), reduction="none", log_target=True)
            found.append(kl.sum(-1).mean(1))
        return torch.cat(found)

    @torch.no_grad()
    def _unedited(self) -> Float[Tensor, "block token"]:
        """Each next token's loss; keeps the log-probabilities if they are few."""
        keeps = self.blocks.numel() * self.dense.config.vocab_size <= KEPT_VALUES
        losses, kept = [], []
        for rows in self._parts():
            ids, at = self._rows(rows)
            own = log_probs(self.dense.run(ids, record=False, position_ids=at).logits)
            losses.append(next_token_loss(own, ids))
            kept += [own] * keeps
        self._kept = torch.cat(kept) if keeps else None
        return torch.cat(losses)

    def _reference(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "row token vocab"]:
        if self._kept is not None:
            return self._kept[rows]
        ids, at = self._rows(rows)
        return log_probs(self.dense.run(ids, record=False, position_ids=at).logits)

    def _parts(self) -> tuple[Tensor, ...]:
        return torch.arange(len(self.blocks), device=self.blocks.device).split(self.batch_size)

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.blocks[rows], None if self.position_ids is None else self.position_ids[rows]


def _finite(value: Any) -> Any:
    is_number = isinstance(value, dict) or math.isfinite(value)
    return value if is_number else undefined("the steered model's logits are not finite, or too large")


def next_token_loss(
    own: Float[Tensor, "block token vocab"], ids: Int[Tensor, "block token"]
) -> Float[Tensor, "block target"]:
    """Cross-entropy of every token but the first, from log-probabilities."""
    return -own[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def nearby(touched: Bool[Tensor, "block token"]) -> Bool[Tensor, "block token"]:
    """The touched tokens and the 8 after each, in the same block."""
    before = F.pad(touched.float(), (NEAR, 0))
    return F.max_pool1d(before[:, None], NEAR + 1, stride=1)[:, 0] > 0


@torch.no_grad()
def steered(
    tails: PromptTails, steering: Steering, strength: float = 1.0
) -> tuple[Float[Tensor, " example"], Float[Tensor, " example"]]:
    """Answer minus distractor under a steering, by the total and by the indirect effect."""
    delta = steering.delta(tails.resid[steering.site], strength)
    if not delta.any():
        return tails.unedited, tails.unedited
    return tails.differences(steering.site, delta)


def other_tasks(
    tails: Mapping[str, PromptTails], steering: Steering, strength: float = 1.0, *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Accuracy on the prompts of other tasks without the steering and with it, and the change's interval."""
    found = {}
    for task, prompts in tails.items():
        before, after = prompts.unedited, steered(prompts, steering, strength)[0]
        change = (after > 0).float() - (before > 0).float()
        found[task] = {
            "accuracy_before": accuracy(before),
            "accuracy_after": accuracy(after),
            "change": mean_interval(change, prompts.batch.cluster, bounds=(-1.0, 1.0), seed=seed),
        }
    return found
