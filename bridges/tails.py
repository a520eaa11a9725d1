"""What a delta at a site does to the answers of a batch of prompt pairs, computed for little.

Only each prompt's last logits are computed, and, where a delta is nothing up to the token from which a pair
is told apart, only the positions from there on: what comes before is read from a cache of keys and values. On
prompts of 50 tokens that differ in the last few this is several times faster. The short way proves itself on
the unedited prompts; a family that fails it (sliding windows) takes the long way.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from bridges.dense import DenseModel
from bridges.hooks import hooked
from extractor.cache_name import CACHE_NAME, cache_of
from extractor.sites import Site
from extractor.tasks import TaskBatch

NOTHING = 1e-4  # of the largest change: what rounding leaves where two prompts agree
AGREEMENT = 1e-3  # of the largest answer, between the short and the long way


class PromptTails:
    """The dense model on a batch: its streams, and the answers when one of them is changed."""

    @torch.no_grad()
    def __init__(self, dense: DenseModel, batch: TaskBatch):
        self.dense, self.batch = dense, batch
        self.head = dense.model.get_output_embeddings()
        self.resid: dict[Site, Float[Tensor, "example seq d_dense"]] = {}
        with ExitStack() as stack:
            stack.enter_context(self._at_last(batch.last, None))
            for site in dense.sites:
                stack.enter_context(dense._reading(site, self.resid, batch.ids.shape))
            run = dense.model(batch.ids, use_cache=True)
        self.unedited = self._answers(run.logits, 0)
        self.start = torch.minimum(batch.aligned_from(), batch.last)
        length = int((batch.last - self.start).max()) + 1
        column = self.start[:, None] + torch.arange(length, device=batch.ids.device)
        self.columns = column.clamp(max=batch.ids.shape[1] - 1)  # what follows a prompt's end cannot reach it
        self.prefix: DynamicCache | None = None
        if int(self.start.max()) > 0:
            self._keep_prefix(cache_of(run))

    def differences(
        self, site: Site, delta: Float[Tensor, "example seq d_dense"]
    ) -> tuple[Float[Tensor, " example"], Float[Tensor, " example"]]:
        """Answer minus distractor with `delta` added at `site`: by the total and by the indirect effect.

        For the indirect effect the delta is taken out again before the final norm.
        """
        is_short = self.prefix is not None and self._is_late(delta)
        logits = (self._short if is_short else self._long)(site, delta)
        return self._answers(logits, 0), self._answers(logits, 1)

    def _answers(self, logits: Float[Tensor, "example effect vocab"], effect: int) -> Tensor:
        return self.batch.logit_difference(logits[:, effect : effect + 1])

    def _is_late(self, delta: Tensor) -> bool:
        """Nothing is added before the token that tells the pair apart."""
        before = torch.arange(delta.shape[1], device=delta.device) < self.start[:, None]
        early = delta.detach() * before[..., None]
        return bool(early.abs().max() <= NOTHING * delta.detach().abs().max())

    def _keep_prefix(self, cache: Cache) -> None:
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            return  # slots of such a cache are not positions
        longest = int(self.start.max())
        self.prefix = DynamicCache(
            (layer.keys[:, :, :longest], layer.values[:, :, :longest]) for layer in cache.layers
        )
        first = self.dense.sites[0]
        again = self._answers(self._short(first, torch.zeros_like(self.resid[first])), 0)
        if not (again - self.unedited).abs().max() <= AGREEMENT * self.unedited.abs().max():
            self.prefix = None

    def _long(self, site: Site, delta: Tensor) -> Float[Tensor, "example effect vocab"]:
        """Every position."""
        resid = self.resid[site] + delta
        with ExitStack() as stack:
            stack.enter_context(self._at_last(self.batch.last, delta))
            self.dense._starting_at(stack, site, resid)
            return self.dense.model(inputs_embeds=resid, use_cache=False).logits

    def _short(self, site: Site, delta: Tensor) -> Float[Tensor, "example effect vocab"]:
        """Each prompt from the token that tells it apart; a shorter prefix leaves slots that are masked."""
        rows = torch.arange(len(self.batch), device=delta.device)[:, None]
        changed = delta[rows, self.columns]
        resid = self.resid[site][rows, self.columns] + changed
        slots = torch.arange(self.prefix.get_seq_length(), device=delta.device)
        mask = torch.cat([slots < self.start[:, None], torch.ones_like(self.columns, dtype=torch.bool)], 1)
        position_ids = self.start[:, None] + torch.arange(resid.shape[1], device=delta.device)
        cache = copy.copy(
            self.prefix
        )  # a forward puts longer tensors into its layers, not into their tensors
        cache.layers = [copy.copy(layer) for layer in self.prefix.layers]
        with ExitStack() as stack:
            stack.enter_context(self._at_last(self.batch.last - self.start, changed))
            self.dense._starting_at(stack, site, resid)
            return self.dense.model(
                inputs_embeds=resid,
                attention_mask=mask.long(),
                position_ids=position_ids.clamp(max=self.batch.ids.shape[1] - 1),
                use_cache=True,
                **{CACHE_NAME: cache},
            ).logits

    @contextmanager
    def _at_last(self, last: Int[Tensor, " example"], removed: Tensor | None) -> Iterator[None]:
        """The output head sees one position of each row: of the stream, and of the stream less `removed`.

        What comes before the final norm is the same for both effects, so one pass gives both.
        """
        rows = torch.arange(len(last), device=last.device)
        stream: list[Tensor] = []

        def keep(module: nn.Module, args: tuple) -> None:
            stream.append(args[0][rows, last])

        def select(module: nn.Module, args: tuple) -> tuple:
            seen = [args[0][rows, last]]
            if removed is not None:
                norm = self.dense.final_norm.forward  # not the module: its hook would keep this, too
                seen.append(norm(stream[-1] - removed[rows, last]))
            return (torch.stack(seen, 1), *args[1:])

        with (
            hooked(self.dense.final_norm.register_forward_pre_hook(keep)),
            hooked(self.head.register_forward_pre_hook(select)),
        ):
            yield
