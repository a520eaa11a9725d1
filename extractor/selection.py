"""Which entries are largest: exactly k by magnitude along the last axis, ties by the lowest index.

The rule is written on the bits: a float's bits without the sign, read as an integer, sort as its magnitude
does. So bf16 needs no conversion, +0 equals -0, and a NaN counts as larger than every number: it is kept,
the count stays exact, and the loss shows it.

`AbsTopK` is the one autograd function. What it saves is the kept entries as one bit each (8 to a byte, the
lowest bit first). Three implementations select alike, bit for bit:

- torch.topk, on any device, without waiting for it: what the tests compare with;
- numpy's vectorised partition, on a CPU;
- compiled ones where their packages are installed: `selection_fast` (numba), `selection_triton` (GPU).
"""

import functools
import importlib
import os
from types import ModuleType
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from extractor.threads import in_threads

INTEGER_OF = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
COMPILED_FROM = 1 << 14  # entries; loading numba does not pay for fewer
NUMPY_BLOCK = 1 << 18  # entries per call: threads wait for the interpreter lock before each


class Kept(NamedTuple):
    """The entries kept, all others 0, and which they are."""

    values: Float[Tensor, "row n"]
    packed: UInt8[Tensor, "row byte"]  # ceil(n / 8) bytes; entry i is bit i % 8 of byte i // 8


@runtime_checkable
class Backend(Protocol):
    """One implementation, for contiguous rows."""

    def select(self, x: Float[Tensor, "row n"], k: int) -> Kept: ...

    def mask(self, x: Float[Tensor, "row n"], packed: UInt8[Tensor, "row byte"]) -> Tensor: ...


class AbsTopK(torch.autograd.Function):
    """Keeps the k largest of a row, or the entries of a mask; the gradient passes where the bit is set."""

    @staticmethod
    def forward(ctx, x: Tensor, k: int, packed: Tensor | None) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        backend = backend_for(rows)
        kept = backend.select(rows, k) if packed is None else Kept(backend.mask(rows, packed), packed)
        ctx.k = k
        ctx.save_for_backward(kept.packed)
        return kept.values.view(x.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return AbsTopK.apply(gradient, ctx.k, *ctx.saved_tensors), None, None


def abs_topk(x: Float[Tensor, "*batch n"], frac: float | None) -> Float[Tensor, "*batch n"]:
    """Keep the int(frac * n) entries of largest |x|, zero the rest; None or 1 leaves x as it is.

    The gradient passes through kept entries only (Gao et al. 2025, appendix A.1).
    """
    if frac is None or frac >= 1:
        return x
    return AbsTopK.apply(x, max(1, int(frac * x.shape[-1])), None)


def keep_largest(values: Float[Tensor, "*batch n"], k: int) -> Bool[Tensor, "*batch n"]:
    """Mask of the k largest |values| along the last axis; ties go to the lowest index.

    Raises:
        ValueError: k is below 1 or above the axis length.
    """
    size = values.shape[-1]
    if not 0 < k <= size:
        raise ValueError(f"k is {k}; it must lie between 1 and the axis length {size}")
    rows = values.detach().reshape(-1, size).contiguous()
    return unpack(backend_for(rows).select(rows, k).packed, size).view(values.shape)


def backend_for(x: Tensor) -> Backend:
    """The fastest implementation that is installed for a tensor's device, type and size."""
    if x.is_cuda and x.dtype != torch.float64:
        triton = optional("extractor.selection_triton")
        return triton if triton is not None and x.shape[-1] <= triton.MAX_WIDTH else TorchBackend()
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return TorchBackend()
    return compiled(x.numel()) or NumpyBackend()


def compiled(entries: int) -> ModuleType | None:
    """numba's kernels; none without numba, for few entries, or where SPARSEBRIDGE_NO_NUMBA is set."""
    if entries < COMPILED_FROM or os.environ.get("SPARSEBRIDGE_NO_NUMBA"):
        return None
    return optional("extractor.selection_fast")


@functools.cache
def optional(name: str) -> ModuleType | None:
    """A module of ours whose compiler may be missing (or, RuntimeError, find no place for its cache)."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        return None


# --- torch, any device ----------------------------------------------------------------------------------


class TorchBackend:
    """torch.topk with the tie-break written out; no step of it waits for the device."""

    def select(self, x: Float[Tensor, "row n"], k: int) -> Kept:
        keep = largest(magnitude(x), k)
        return Kept(torch.where(keep, x, 0), pack(keep))

    def mask(self, x: Float[Tensor, "row n"], packed: UInt8[Tensor, "row byte"]) -> Tensor:
        return torch.where(unpack(packed, x.shape[-1]), x, 0)


def magnitude(x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Integers of the same width that sort as |x|."""
    integer = INTEGER_OF[x.dtype]
    return x.view(integer) & torch.iinfo(integer).max


def largest(values: Int[Tensor, "*batch n"], k: int) -> Bool[Tensor, "*batch n"]:
    """Mask of the k largest integers along the last axis; ties go to the lowest index."""
    kth = torch.topk(values, k, dim=-1).values[..., -1:]
    above, tied = values > kth, values == kth
    missing = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= missing))


def pack(keep: Bool[Tensor, "*batch n"]) -> UInt8[Tensor, "*batch byte"]:
    bits = F.pad(keep, (0, -keep.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    places = torch.arange(8, device=keep.device, dtype=torch.uint8)
    return (bits << places).sum(-1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, "*batch byte"], size: int) -> Bool[Tensor, "*batch n"]:
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    bits = (packed[..., None] >> places) & 1
    return bits.flatten(-2)[..., :size].bool()


# --- numpy, on a CPU without a compiler ------------------------------------------------------------------


class NumpyBackend:
    """numpy's quickselect (AVX2 or AVX-512): 10 to 20 times as fast as torch.topk on a CPU."""

    def select(self, x: Float[Tensor, "row n"], k: int) -> Kept:
        kept = empty_kept(x)
        bits, values, packed = integers(x), integers(kept.values), kept.packed.numpy()
        in_threads(lambda rows: _select(bits[rows], k, values[rows], packed[rows]), blocks(x, NUMPY_BLOCK))
        return kept

    def mask(self, x: Float[Tensor, "row n"], packed: UInt8[Tensor, "row byte"]) -> Tensor:
        masked = torch.empty_like(x)
        bits, values, mask = integers(x), integers(masked), packed.numpy()

        def run(rows: slice) -> None:
            keep = np.unpackbits(mask[rows], axis=-1, count=x.shape[1], bitorder="little")
            np.multiply(bits[rows], keep, out=values[rows])

        in_threads(run, blocks(x, NUMPY_BLOCK))
        return masked


def integers(x: Float[Tensor, "*shape"]) -> np.ndarray:
    """A CPU tensor's bits, signed, without a copy."""
    return x.detach().view(INTEGER_OF[x.dtype]).numpy()


def empty_kept(x: Float[Tensor, "row n"]) -> Kept:
    return Kept(torch.empty_like(x), x.new_empty((len(x), -(-x.shape[1] // 8)), dtype=torch.uint8))


def blocks(x: Float[Tensor, "row n"], entries: int) -> list[slice]:
    """Neighbouring rows with about so many entries together."""
    step = max(1, entries // x.shape[1])
    return [slice(row, row + step) for row in range(0, len(x), step)]


def _select(bits: np.ndarray, k: int, values: np.ndarray, packed: np.ndarray) -> None:
    keep = keep_rows(bits, k)
    packed[:] = np.packbits(keep, axis=-1, bitorder="little")
    np.multiply(bits, keep, out=values)


def keep_rows(bits: np.ndarray, k: int) -> np.ndarray:
    """Mask of the k largest magnitudes of every row; ties go to the lowest index."""
    size = bits.shape[-1]
    keys = bits & np.iinfo(bits.dtype).max
    if bits.itemsize == 2 and size <= 1 << 16:
        # In bf16 most rows have equal values at the threshold; with the index in the key none has.
        keys = (keys.astype(np.int32) << 16) | np.arange(size - 1, -1, -1, dtype=np.int32)
    threshold = np.partition(keys, size - k, axis=-1)[:, size - k, None]
    keep = keys >= threshold
    # Counted on bits: adding bools up as they are would cost as much as the partition.
    counts = np.bitwise_count(np.packbits(keep, axis=-1)).sum(-1, dtype=np.int32)
    if (counts > k).any():
        _drop_last(keep, keys == threshold, counts - k)
    return keep


def _drop_last(keep: np.ndarray, tied: np.ndarray, excess: np.ndarray) -> None:
    """Let the last `excess` (row,) equal values of each row go."""
    row, column = np.nonzero(tied & (excess > 0)[:, None])
    end = np.bincount(row, minlength=len(excess)).cumsum()
    from_last = end[row] - np.arange(len(row))  # 1: the last of its row
    drop = from_last <= excess[row]
    keep[row[drop], column[drop]] = False
