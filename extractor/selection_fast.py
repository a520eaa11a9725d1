"""Selection compiled by numba, for CPUs: the optional extra `fast`. Imported only when it is first needed.

A row's k-th largest is found by counting: how many magnitudes exceed a cut is one vectorised pass over data
in the core's cache, and the count tells where to cut next (secant steps inside a bracket, beginning at the
cut of the row before). It ends when exactly k exceed the cut, or at equal values, of which the last are let
go. Integers stand for floats (see `extractor.selection`), 16-bit ones for bf16 and fp16.

The same search projects a weight matrix: one long row, begun from a sample. With a floor, a unit counts for
at least its floor, so one search finds the cut at which floors and the rest together make k.
"""

from collections.abc import Sequence
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numba import carray
from numba.core.dispatcher import Dispatcher
from torch import Tensor

from extractor.compiled import compile_, pointer, run_jobs
from extractor.projection import Projection
from extractor.selection import Kept, blocks, empty_kept

BLOCK = 1 << 16  # entries per job: they stay in a core's cache
COUNTED = 1 << 14  # entries that a 16-bit counter can count
SAMPLE = 1 << 12  # weights that a projection's first cut is guessed from

INTEGERS = {4: np.int32, 2: np.int16}  # by bytes of an entry


def select(x: Float[Tensor, "row n"], k: int) -> Kept:
    """The k largest of every row."""
    kept = empty_kept(x)
    _run_on_rows(_select_job, (x, kept.values, kept.packed), k)
    return kept


def mask(x: Float[Tensor, "row n"], packed: UInt8[Tensor, "row byte"]) -> Tensor:
    """The entries whose bit is set, others 0."""
    masked = torch.empty_like(x)
    _run_on_rows(_mask_job, (x, masked, packed), _SPREAD.ctypes.data)
    return masked


def project_(projections: Sequence[Projection], least: int) -> None:
    """Zero all but the k largest of every weight, in place; units along an axis keep their `least` largest.

    Weights of one type after the other, each by one thread, the largest first.
    """
    ordered = sorted(projections, key=lambda projection: -projection.weight.numel())
    for size in (4, 2):
        jobs = [
            (p.weight.data_ptr(), *(p.weight.shape if p.axis is not None else (p.weight.numel(), 0)),
             p.k, least, 0 if p.axis is None else p.axis)
            for p in ordered
            if p.weight.itemsize == size
        ]  # fmt: skip
        run_jobs(_project_job, INTEGERS[size], jobs)


def _run_on_rows(kernel: Dispatcher, tensors: tuple[Tensor, Tensor, Tensor], last: int) -> None:
    """Jobs of (three addresses, rows, entries, bytes of the mask, `last`) over neighbouring rows."""
    x, _, packed = tensors
    jobs = []
    for rows in blocks(x, BLOCK):
        addresses = (t.data_ptr() + rows.start * t.stride(0) * t.itemsize for t in tensors)
        count = min(rows.stop, len(x)) - rows.start
        jobs.append((*addresses, count, x.shape[1], packed.shape[1], last))
    run_jobs(kernel, INTEGERS[x.itemsize], jobs)


# Byte -> eight bytes, the lowest bit first (the byte order of the CPUs that torch runs on).
_SPREAD = np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little").view(np.uint64)


# --- jobs ------------------------------------------------------------------------------------------------


@compile_
@no_type_check
def _select_job(job, integer):
    x = carray(pointer(job[0]), (job[3], job[4]), integer)
    values = carray(pointer(job[1]), (job[3], job[4]), integer)
    packed = carray(pointer(job[2]), (job[3], job[5]), np.uint8)
    _select(x, integer(np.iinfo(integer).max), job[6], values, packed)


@compile_
@no_type_check
def _mask_job(job, integer):
    x = carray(pointer(job[0]), (job[3], job[4]), integer)
    values = carray(pointer(job[1]), (job[3], job[4]), integer)
    packed = carray(pointer(job[2]), (job[3], job[5]), np.uint8)
    _mask(x, packed, carray(pointer(job[6]), (256,), np.uint64), values)


@compile_
@no_type_check
def _project_job(job, integer):
    top = integer(np.iinfo(integer).max)
    if job[2] == 0:  # without a floor: flat
        _project(carray(pointer(job[0]), (job[1],), integer), top, job[3], 0, 0)
    else:
        _project(carray(pointer(job[0]), (job[1], job[2]), integer), top, job[3], job[4], job[5])


# --- counting and searching ------------------------------------------------------------------------------


@compile_
@no_type_check
def _count(part, top, cut):
    """How many magnitudes exceed `cut`; a counter of the entries' own width keeps all lanes busy."""
    count = part.dtype.type(0)
    one, none = part.dtype.type(1), part.dtype.type(0)
    for i in range(part.size):
        count = part.dtype.type(count + (one if (part[i] & top) > cut else none))
    return np.int64(count)


@compile_
@no_type_check
def _count_row(row, top, cut):
    if row.size <= COUNTED:
        return _count(row, top, cut)
    total = 0
    for start in range(0, row.size, COUNTED):
        total += _count(row[start : start + COUNTED], top, cut)
    return total


@compile_
@no_type_check
def _count_columns(row, top, cut, counts):
    for i in range(row.size):
        counts[i] += np.int32((row[i] & top) > cut)


@compile_
@no_type_check
def _kept(bits, top, cut, least, axis, counts):
    """Entries kept at this cut: those above it; in a matrix also what units lack to their floor.

    Fills `counts`: what the units of a matrix have above the cut.
    """
    if bits.ndim == 1:
        return _count_row(bits, top, cut)
    if axis == 1:
        counts[:] = 0
    for row in range(bits.shape[0]):
        if axis == 1:
            _count_columns(bits[row], top, cut, counts)
        else:
            counts[row] = _count_row(bits[row], top, cut)
    total = 0
    for count in counts:
        total += max(np.int64(count), least)
    return total


@compile_
@no_type_check
def _search(bits, top, k, guess, bits_per_entry, least, axis, counts):
    """The cut that keeps k, and how many too many it keeps: of equal values just above it."""
    low, high = np.int64(-1), np.int64(top)  # low keeps at least k, high fewer
    n_low, too_many, too_few = np.int64(bits.size), -1.0, -1.0  # below 0: not counted yet
    cut, rounds, was_low = guess, 0, True
    while high - low > 1 and n_low != k:
        cut = min(max(cut, low + 1), high - 1)
        n = _kept(bits, top, bits.dtype.type(cut), least, axis, counts)
        is_low = n >= k
        # The Illinois rule: an end that stays counts half, so that the other one moves soon.
        halved = 0.5 if is_low == was_low else 1.0
        if is_low:
            low, n_low, too_many, too_few = cut, n, n - k + 0.5, too_few * halved
        else:
            high, too_few, too_many = cut, k - n - 0.5, too_many * halved
        rounds, was_low = rounds + 1, is_low
        if too_many < 0 or too_few < 0:  # one end is still far: step by the slope, ever wider
            cut += np.int64((n - k) * bits_per_entry) + (1 if is_low else -1)
            bits_per_entry *= 4.0
        elif rounds % 8 == 0:
            cut = (low + high) >> 1
        else:
            cut = low + np.int64((high - low) * (too_many / (too_many + too_few)))
    return low, n_low - k


# --- rows ------------------------------------------------------------------------------------------------


@compile_
@no_type_check
def _select(x, top, k, values, packed):
    rows, size = x.shape
    words = np.zeros(packed.shape[1], np.uint64)
    keep = words.view(np.uint8)
    counts = np.empty(0, np.int32)
    bits_per_entry = _bits_per_entry(x[0]) if rows else 0.0
    cut = np.int64(top) >> 1
    for row in range(rows):
        bits = x[row]
        cut, excess = _search(bits, top, k, cut, bits_per_entry, 0, 0, counts)
        _write(bits, top, x.dtype.type(cut), values[row], keep)
        i = size - 1
        while excess > 0:  # equal values: the last go
            if (bits[i] & top) == cut + 1:
                values[row, i] = 0
                keep[i] = 0
                excess -= 1
            i -= 1
        _pack(words, packed[row])


@compile_
@no_type_check
def _bits_per_entry(row):
    """How far apart the sizes of a normal row are: 2**24 (fp32) or 2**8 (16 bits) hold about all of them."""
    return (16777216.0 if row.itemsize == 4 else 256.0) / row.size


@compile_
@no_type_check
def _write(bits, top, cut, values, keep):
    none = bits.dtype.type(0)
    for i in range(bits.size):
        above = (bits[i] & top) > cut
        values[i] = bits[i] if above else none
        keep[i] = above


@compile_
@no_type_check
def _pack(words, packed):
    """Eight bytes of 0 and 1 -> the eight bits of one, by one multiplication."""
    for i in range(words.size):
        packed[i] = np.uint8((words[i] * np.uint64(0x0102040810204080)) >> np.uint64(56))


@compile_
@no_type_check
def _mask(x, packed, spread, values):
    words = np.empty(packed.shape[1], np.uint64)
    keep = words.view(np.uint8)
    for row in range(x.shape[0]):
        for i in range(words.size):
            words[i] = spread[packed[row, i]]
        _keep(x[row], keep, values[row])


@compile_
@no_type_check
def _keep(bits, keep, values):
    none = bits.dtype.type(0)
    for i in range(bits.size):
        values[i] = bits[i] if keep[i] else none


# --- matrices --------------------------------------------------------------------------------------------


@compile_
@no_type_check
def _project(weight, top, k, least, axis):
    """`weight`: flat, or with a floor the matrix."""
    flat = weight.reshape(-1)
    counts = np.empty(0 if weight.ndim == 1 else weight.shape[axis], np.int32)
    guess, bits_per_entry = _guess(flat, top, k)
    cut, excess = _search(weight, top, k, guess, bits_per_entry, least, axis, counts)
    if weight.ndim == 2:
        _kept(weight, top, weight.dtype.type(cut), least, axis, counts)
    places = _places_lacking(weight, top, least, axis, counts)
    values = flat[places]
    _zero_below(flat, top, weight.dtype.type(cut))
    i = flat.size
    while excess > 0:  # equal values: the last go, but for those that a floor needs
        i -= 1
        if (flat[i] & top) != cut + 1:
            continue
        if weight.ndim == 2:
            unit = i // weight.shape[1] if axis == 0 else i % weight.shape[1]
            if counts[unit] <= least:
                continue
            counts[unit] -= 1
        flat[i] = 0
        excess -= 1
    for j in range(places.size):
        flat[places[j]] = values[j]


@compile_
@no_type_check
def _guess(flat, top, k):
    """A first cut, and how far to move it per entry too many, from a sample of the weights."""
    stride = max(1, flat.size // SAMPLE)
    sample = np.ascontiguousarray(flat[::stride])
    share = k / flat.size
    place, error = share * sample.size, 1 + np.sqrt(share * (1 - share) * sample.size)
    fewer, more = max(1, int(place - error)), min(sample.size, int(place + error) + 1)
    none = np.empty(0, np.int32)
    high, _ = _search(sample, top, fewer, np.int64(top) >> 1, 1024.0, 0, 0, none)
    low, _ = _search(sample, top, more, high, 1024.0, 0, 0, none)
    return (low + high) >> 1, 1 + (high - low) / ((more - fewer + 1) * stride)


@compile_
@no_type_check
def _zero_below(flat, top, cut):
    none = flat.dtype.type(0)
    for i in range(flat.size):
        flat[i] = flat[i] if (flat[i] & top) > cut else none


@compile_
@no_type_check
def _places_lacking(weight, top, least, axis, counts):
    """Where the `least` largest of those units are that keep fewer at the common cut."""
    lacking = np.flatnonzero(counts < least)
    places = np.empty(lacking.size * least, np.int64)
    if weight.ndim == 1:
        return places
    none, noted, cut = np.empty(0, np.int32), 0, np.int64(top) >> 1
    for unit in lacking:
        own = np.ascontiguousarray(weight[unit] if axis == 0 else weight[:, unit])
        cut, _ = _search(own, top, least, cut, _bits_per_entry(own), 0, 0, none)
        tied = least - _count_row(own, top, own.dtype.type(cut + 1))
        for i in range(own.size):
            size = own[i] & top
            if size > cut + 1 or (size == cut + 1 and tied > 0):
                tied -= size == cut + 1
                places[noted] = unit * weight.shape[1] + i if axis == 0 else i * weight.shape[1] + unit
                noted += 1
    return places
