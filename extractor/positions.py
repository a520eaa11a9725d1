"""Which positions of a batch of prompts a forward holds, also under `generate()`.

A cached forward sees new tokens only, an uncached one the whole sequence again. `PromptPositions` is a
forward pre-hook on a whole model that counts, so that "the last position of the prompt" stays the same one.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from extractor.cache_name import cache_of
from extractor.errors import InputError

Positions = Literal["all", "last", "from_last"]
"""Every position; the last one of the prompt; that one and all that are generated after it."""


class PromptPositions:
    """Start and length of each forward, and the prompt that it belongs to.

    A forward without a cache whose tokens begin with the last prompt's continues it, any other is a new
    prompt. Positions are columns of the batch as it is padded; the last one of a row is its last column
    that `attention_mask` keeps.
    """

    def __init__(self, last: Int[Tensor, " batch"] | None = None):
        self.given_last = last
        self.start, self.length = 0, 0
        self.last = last
        self.is_new_prompt = False
        self._prompt: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            raise InputError("a forward under an intervention needs input_ids")
        cache = cache_of(kwargs)
        self.start = cache.get_seq_length() if cache is not None else 0
        self.length = tokens.shape[1]
        self.is_new_prompt = self.start == 0 and not self._continues(tokens)
        if self.is_new_prompt:
            self._prompt = tokens
            self.last = self._last_of(tokens, kwargs.get("attention_mask"))

    def mask(self, positions: Positions, like: Tensor) -> Bool[Tensor, "batch seq"] | None:
        """Where this forward's positions are meant; None: everywhere. `like` has (batch, seq, ...)."""
        if positions == "all":
            return None
        column = torch.arange(self.start, self.start + like.shape[1], device=like.device)[None]
        if self.last is None:  # no hook and none given: a batch of whole prompts without padding
            last = torch.full((len(like), 1), like.shape[1] - 1, device=like.device)
        else:
            last = self.rows_of(self.last.to(like.device), len(like))[:, None]
        return column == last if positions == "last" else column >= last

    @staticmethod
    def rows_of(value: Tensor, rows: int) -> Tensor:
        """One entry per row of the forward; `generate` repeats rows for several returned sequences."""
        if rows % len(value):
            raise InputError(f"an intervention was given {len(value)} prompts, the forward has {rows} rows")
        return value.repeat_interleave(rows // len(value), 0)

    def _continues(self, tokens: Tensor) -> bool:
        prompt = self._prompt
        if prompt is None or tokens.ndim != prompt.ndim or tokens.shape[0] != prompt.shape[0]:
            return False
        return tokens.shape[1] > prompt.shape[1] and torch.equal(tokens[:, : prompt.shape[1]], prompt)

    def _last_of(self, tokens: Tensor, attention_mask: Tensor | None) -> Int[Tensor, " batch"]:
        rows, length = tokens.shape[:2]
        if self.given_last is not None:
            return self.rows_of(self.given_last, rows)
        if attention_mask is None or attention_mask.ndim != 2:
            return torch.full((rows,), length - 1, device=tokens.device)
        return length - 1 - (attention_mask != 0).int().flip(1).argmax(1)
