"""The name of a model's cache in transformers: `cache` from 5.24 on, `past_key_values` before."""

import inspect
from collections.abc import Mapping

from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

CACHE_NAME = next(
    name for name in ("cache", "past_key_values") if name in inspect.signature(create_causal_mask).parameters
)
"""Argument of forwards and masks, and field of their outputs, in the transformers that is installed."""


def cache_of(values: Mapping[str, object]) -> Cache | None:
    """The cache among the arguments of a forward, or in its output, under either name.

    A caller may use the old name with a new transformers, which renames it only inside the model.
    """
    found = values.get(CACHE_NAME)
    return values.get("past_key_values") if found is None else found
