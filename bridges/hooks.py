"""Hooks on somebody else's model: read, replace, add, count, stop; each is gone when its block ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from extractor.cache_name import cache_of
from extractor.sites import Site


class Reached(Exception):  # noqa: N818  not an error: it carries the stream out of the forward
    def __init__(self, resid: Tensor):
        self.resid = resid


class PositionsSeen:
    """Counts the positions that a cache holds before a forward, as a hook on the whole model."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = cache_of(kwargs)
        self.count = cache.get_seq_length() if cache is not None else 0

    def part_of(self, delta: Tensor, resid: Tensor) -> Tensor:
        """The rows of `delta` that fall on this forward's positions, zeros after its end."""
        batch, width = delta.shape[0], delta.shape[-1]
        length = resid.numel() // (batch * width)
        rows = delta[:, self.count : self.count + length]
        missing = length - rows.shape[1]
        return torch.nn.functional.pad(rows, (0, 0, 0, missing)).view_as(resid)


@contextmanager
def hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def replace_input(value: Tensor | None) -> Callable[..., tuple]:
    """Replace the first argument; with None by a copy of itself."""
    return lambda module, args: (args[0].clone() if value is None else value, *args[1:])


def add_to_input(delta: Callable[[Tensor], Tensor]) -> Callable[..., tuple]:
    return lambda module, args: (args[0] + delta(args[0]), *args[1:])


def add_to_output(delta: Callable[[Tensor], Tensor]) -> Callable[..., object]:
    def add(module: nn.Module, args: tuple, output: object) -> object:
        if isinstance(output, tuple):
            return (output[0] + delta(output[0]), *output[1:])
        return output + delta(output)

    return add


def keep_output(into: dict[Site, Tensor], site: Site) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple, output: object) -> None:
        into[site] = output[0] if isinstance(output, tuple) else output

    return keep
