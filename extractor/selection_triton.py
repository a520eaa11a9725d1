"""Selection on a GPU, in Triton. Imported only when a tensor on one is first selected from.

Rows (AbsTopK): one program holds a row in registers and halves the range of cuts until exactly k magnitudes
exceed one, or only equal values are left, of which the last go.

Matrices (the projection): three histograms of 11, 10 and 10 bits find each threshold, for all matrices in
the same launches; equal values are counted per block, so that the first ones stay. k and the addresses are
device tensors and nothing is read back: the host never waits.

Integers stand for floats, as in `extractor.selection`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from extractor.projection import Projection, keys_with_floor
from extractor.selection import INTEGER_OF, Kept, empty_kept

MAX_WIDTH = 1 << 15  # entries of a row that fit into one program's registers
BLOCK = 4096  # weights per program
LEVELS = ((20, 11), (10, 10), (0, 10))  # bits below a histogram's digit, and in it


def select(x: Float[Tensor, "row n"], k: int) -> Kept:
    """The k largest of every row."""
    kept = empty_kept(x)
    if len(x):
        _select[(len(x),)](
            _integers(x), _integers(kept.values), kept.packed, x.shape[1], k, TOP=_top(x), **_tile(x)
        )
    return kept


def mask(x: Float[Tensor, "row n"], packed: UInt8[Tensor, "row byte"]) -> Tensor:
    """The entries whose bit is set, others 0."""
    masked = torch.empty_like(x)
    if len(x):
        _mask[(len(x),)](_integers(x), packed, _integers(masked), x.shape[1], **_tile(x))
    return masked


def _integers(x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    return x.view(INTEGER_OF[x.dtype])


def _top(x: Tensor) -> int:
    return torch.iinfo(INTEGER_OF[x.dtype]).max


def _tile(x: Float[Tensor, "row n"]) -> dict[str, int]:
    num_bytes = triton.next_power_of_2(triton.cdiv(x.shape[1], 8))
    return {"BYTES": num_bytes, "num_warps": min(16, max(1, num_bytes // 64))}


@triton.jit
@no_type_check
def _select(x_ptr, values_ptr, packed_ptr, n, k, TOP: tl.constexpr, BYTES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.arange(0, BYTES)
    bit = tl.arange(0, 8)[None, :]
    place = byte[:, None] * 8 + bit
    inside = place < n
    bits = tl.load(x_ptr + row * n + place, mask=inside, other=0)
    size = tl.where(inside, bits.to(tl.int32) & TOP, -1)
    low = tl.full((), -1, tl.int64)  # at least k exceed low, fewer exceed high
    high = tl.full((), TOP, tl.int64)
    count = tl.sum(tl.sum(inside.to(tl.int32), 1), 0)
    while (high - low > 1) & (count != k):
        cut = (low + high) // 2
        exceed = tl.sum(tl.sum((size > cut.to(tl.int32)).to(tl.int32), 1), 0)
        is_low = exceed >= k
        low = tl.where(is_low, cut, low)
        high = tl.where(is_low, high, cut)
        count = tl.where(is_low, exceed, count)
    low = low.to(tl.int32)
    keep = size > low
    if count > k:
        tied = (size == low + 1).to(tl.int32)
        per_byte = tl.sum(tied, 1)
        rank = (tl.cumsum(per_byte, 0) - per_byte)[:, None] + tl.cumsum(tied, 1)
        keep = keep & ((tied == 0) | (rank <= tl.sum(per_byte, 0) - (count - k)))
    tl.store(values_ptr + row * n + place, tl.where(keep, bits, 0), mask=inside)
    packed = tl.sum(keep.to(tl.int32) << bit, 1)
    num_bytes = (n + 7) // 8
    tl.store(packed_ptr + row * num_bytes + byte, packed.to(tl.uint8), mask=byte < num_bytes)


@triton.jit
@no_type_check
def _mask(x_ptr, packed_ptr, values_ptr, n, BYTES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.arange(0, BYTES)
    bit = tl.arange(0, 8)[None, :]
    place = byte[:, None] * 8 + bit
    num_bytes = (n + 7) // 8
    packed = tl.load(packed_ptr + row * num_bytes + byte, mask=byte < num_bytes, other=0).to(tl.int32)
    keep = ((packed[:, None] >> bit) & 1) == 1
    bits = tl.load(x_ptr + row * n + place, mask=keep, other=0)
    tl.store(values_ptr + row * n + place, bits, mask=place < n)


# --- matrices --------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """How matrices of given sizes are cut up."""

    matrix: Int[Tensor, " block"]
    start: Int[Tensor, " block"]  # its first entry in its matrix
    first: Int[Tensor, " matrix"]  # a matrix's first block


def project_(projections: Sequence[Projection], least: int) -> None:
    """Zero all but the k largest of every fp32 weight, in place (see `extractor.projection`)."""
    keys = [
        _integers(p.weight) if p.axis is None else keys_with_floor(p.weight, least, p.axis)
        for p in projections
    ]
    columns = [
        [key.data_ptr() for key in keys],
        [p.weight.data_ptr() for p in projections],
        [p.weight.numel() for p in projections],
        [p.k for p in projections],
    ]
    device = projections[0].weight.device
    table = torch.tensor(columns, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    blocks = _blocks(tuple(columns[2]), device)
    project_table_(table, blocks)


@functools.lru_cache(maxsize=16)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> Blocks:
    counts = [triton.cdiv(size, BLOCK) for size in sizes]
    first = [sum(counts[:i]) for i in range(len(counts))]
    matrix = [i for i, count in enumerate(counts) for _ in range(count)]
    start = [j * BLOCK for count in counts for j in range(count)]
    return Blocks(*(torch.tensor(values, device=device) for values in (matrix, start, first)))


def project_table_(table: Int[Tensor, "4 matrix"], blocks: Blocks) -> None:
    """The projection as a CUDA graph may hold it: keys' and weights' addresses, sizes and k are read from
    `table` (int64) on the device each time."""
    keys, weights, sizes, left = table.unbind()
    grid, threshold = (len(blocks.matrix),), torch.zeros_like(left)
    for shift, width in LEVELS:
        counts = torch.zeros(len(left), 1 << width, dtype=torch.int32, device=left.device)
        _histogram[grid](
            keys, sizes, *blocks[:2], threshold, counts, SHIFT=shift, WIDTH=width, BLOCK=BLOCK, num_warps=8
        )
        at_least = counts.flip(1).cumsum(1).flip(1)  # keys of this digit or a higher one
        digit = (at_least >= left[:, None]).sum(1, keepdim=True) - 1
        tied = counts.gather(1, digit)[:, 0].long()
        left = left - (at_least.gather(1, digit)[:, 0] - tied)
        threshold = threshold << width | digit[:, 0]
    ties = torch.empty_like(blocks.start)
    common = (keys, sizes, *blocks[:2], threshold, left, tied)
    _count_ties[grid](*common, ties, BLOCK=BLOCK, num_warps=8)
    before = ties.cumsum(0) - ties
    before = before - before[blocks.first][blocks.matrix]
    _zero[grid](*common, before, weights, BLOCK=BLOCK, num_warps=8)


@triton.jit
@no_type_check
def _load_keys(keys_ptr, sizes_ptr, matrix, start, BLOCK: tl.constexpr):
    place = start + tl.arange(0, BLOCK)
    inside = place < tl.load(sizes_ptr + matrix)
    keys = tl.load(keys_ptr + matrix).to(tl.pointer_type(tl.int32))
    return place, inside, tl.load(keys + place, mask=inside, other=0) & 0x7FFFFFFF


@triton.jit
@no_type_check
def _histogram(
    keys_ptr, sizes_ptr, matrix_ptr, start_ptr, prefix_ptr, counts_ptr,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the digits of a block's keys that begin with their matrix's prefix."""
    matrix = tl.load(matrix_ptr + tl.program_id(0))
    start = tl.load(start_ptr + tl.program_id(0))
    _, inside, key = _load_keys(keys_ptr, sizes_ptr, matrix, start, BLOCK)
    # In two shifts: one by all 31 bits of a key would be by the width of the first level, too.
    begins = ((key >> SHIFT) >> WIDTH) == tl.load(prefix_ptr + matrix)
    digit = (key >> SHIFT) & ((1 << WIDTH) - 1)
    counts = tl.histogram(digit, 1 << WIDTH, mask=inside & begins)
    place = matrix * (1 << WIDTH) + tl.arange(0, 1 << WIDTH)
    tl.atomic_add(counts_ptr + place, counts, mask=counts > 0, sem="relaxed")


@triton.jit
@no_type_check
def _count_ties(
    keys_ptr, sizes_ptr, matrix_ptr, start_ptr, threshold_ptr, left_ptr, tied_ptr, ties_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block's keys at the threshold; only where not all of them stay."""
    block = tl.program_id(0)
    matrix = tl.load(matrix_ptr + block)
    ties = tl.zeros((), tl.int32)
    if tl.load(tied_ptr + matrix) > tl.load(left_ptr + matrix):
        start = tl.load(start_ptr + block)
        _, inside, key = _load_keys(keys_ptr, sizes_ptr, matrix, start, BLOCK)
        ties = tl.sum((inside & (key == tl.load(threshold_ptr + matrix))).to(tl.int32), 0)
    tl.store(ties_ptr + block, ties.to(tl.int64))


@triton.jit
@no_type_check
def _zero(
    keys_ptr, sizes_ptr, matrix_ptr, start_ptr, threshold_ptr, left_ptr, tied_ptr, before_ptr, weights_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write zeros where a block's keys are below the threshold, or at it and too many."""
    block = tl.program_id(0)
    matrix = tl.load(matrix_ptr + block)
    start = tl.load(start_ptr + block)
    place, inside, key = _load_keys(keys_ptr, sizes_ptr, matrix, start, BLOCK)
    threshold, left = tl.load(threshold_ptr + matrix), tl.load(left_ptr + matrix)
    keep = key >= threshold
    if tl.load(tied_ptr + matrix) > left:
        tied = (inside & (key == threshold)).to(tl.int32)
        rank = tl.load(before_ptr + block) + tl.cumsum(tied, 0)
        keep = (key > threshold) | ((tied == 1) & (rank <= left))
    weights = tl.load(weights_ptr + matrix).to(tl.pointer_type(tl.int32))
    tl.store(weights + place, tl.zeros((BLOCK,), tl.int32), mask=inside & (keep == 0))
