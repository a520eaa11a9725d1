"""Weights held at exactly k nonzeros per matrix, in place: the projection after every optimiser step.

The k largest |weights| stay, ties go to the lowest index. With a floor the `least` largest of every unit
(row or column) stay whatever their size, the rest of k is filled by size. `keep_with_floor` is that
definition, and what the tests compare with; the faster ways, as in `extractor.selection`, give the same.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from extractor.selection import (
    INTEGER_OF,
    compiled,
    integers,
    keep_largest,
    keep_rows,
    largest,
    magnitude,
    optional,
)
from extractor.threads import in_threads

ROWS_COUNTED = 255  # that a byte can count


class Projection(NamedTuple):
    """One parameter and what it is held to."""

    weight: Float[Tensor, "*shape"]
    k: int
    axis: int | None  # whose units have a floor


def project_(projections: Sequence[Projection], least: int) -> None:
    """Zero all but the k largest of every weight; units along its axis keep their `least` largest.

    Exact on every device; on a GPU it waits for nothing. A NaN counts as largest.
    """
    on_cpu, on_gpu = [], []
    for projection in projections:
        weight = projection.weight
        if not weight.is_contiguous() or weight.dtype == torch.float64:
            _project_torch(projection, least)
        elif weight.device.type == "cpu":
            on_cpu.append(projection)
        elif weight.is_cuda and weight.dtype == torch.float32 and optional("extractor.selection_triton"):
            on_gpu.append(projection)
        else:
            _project_torch(projection, least)
    if on_gpu:
        optional("extractor.selection_triton").project_(on_gpu, least)
    if on_cpu:
        _project_cpu(on_cpu, least)


def keep_with_floor(
    weight: Float[Tensor, "*shape"], k: int, least: int, axis: int | None
) -> Bool[Tensor, "*shape"]:
    """The k largest entries among masks that keep the `least` largest of every unit along `axis`.

    (Gao et al. 2025, appendix A.2.) The units' own largest count as larger than every number.
    """
    size = magnitude(weight) if axis is None else keys_with_floor(weight, least, axis)
    return largest(size.flatten(), k).view(weight.shape)


def keys_with_floor(weight: Float[Tensor, "row column"], least: int, axis: int) -> Int[Tensor, "row column"]:
    """Integers that sort as |weight|, but for the `least` largest of every unit, which come before all."""
    size = magnitude(weight)
    by_unit = weight if axis == 0 else weight.mT
    own = keep_largest(by_unit, least)
    return size.masked_fill(own if axis == 0 else own.mT, torch.iinfo(size.dtype).max)


def _project_torch(projection: Projection, least: int) -> None:
    keep = keep_with_floor(projection.weight, projection.k, least, projection.axis)
    projection.weight.masked_fill_(~keep, 0)


def _project_cpu(projections: list[Projection], least: int) -> None:
    if (fast := compiled(sum(p.weight.numel() for p in projections))) is not None:
        fast.project_(projections, least)
        return
    # The largest first, so that no thread is left waiting for it.
    ordered = sorted(projections, key=lambda projection: -projection.weight.numel())
    cuts: dict[int, _Cut | None] = {}
    in_threads(lambda i: cuts.__setitem__(i, _find_cut(ordered[i], least)), range(len(ordered)))
    for i, projection in enumerate(ordered):  # torch's own threads share these passes out
        if cuts[i] is None:
            _project_torch(projection, least)
        else:
            _apply(cuts[i], projection.weight)


class _Cut(NamedTuple):
    """The least magnitude that is kept, and where a floor keeps lesser ones."""

    threshold: int
    places: np.ndarray


NO_PLACES = np.empty(0, np.int64)


def _find_cut(projection: Projection, least: int) -> _Cut | None:
    """None: equal values at the cut, of which only some can be kept."""
    bits, k, axis = integers(projection.weight), projection.k, projection.axis
    sizes = bits & np.iinfo(bits.dtype).max
    # Without a floor nothing reads the sizes again.
    ordered = sizes.reshape(-1) if axis is None else sizes.flatten()
    ordered.partition(ordered.size - k)
    below, above = np.split(ordered, [ordered.size - k])
    threshold = above[0]
    if axis is None and threshold == 0:
        return _Cut(0, NO_PLACES)  # nothing but zeros is left to zero
    if below.max() == threshold:
        return None
    if axis is None:
        return _Cut(int(threshold), NO_PLACES)
    keep = sizes >= threshold
    counts = _count_units(keep, axis)
    if (counts >= least).all():
        return _Cut(int(threshold), NO_PLACES)
    return _raise_cut(bits, sizes, keep, counts, least, axis)


def _raise_cut(
    bits: np.ndarray, sizes: np.ndarray, keep: np.ndarray, counts: np.ndarray, least: int, axis: int
) -> _Cut | None:
    """Raise the cut until what lies above it and what units lack to their floor make k together.

    Both together never grow as the cut rises, so how many of the k above it must go is found by halving.
    """
    places = np.flatnonzero(keep)
    values, k = sizes.reshape(-1)[places], len(places)
    units = places // sizes.shape[1] if axis == 0 else places % sizes.shape[1]
    lowest = NO_PLACES

    def lacking(gone: int) -> np.ndarray:
        left = counts - np.bincount(units[lowest[:gone]], minlength=len(counts))
        return np.maximum(least - left, 0)

    def is_too_many(gone: int) -> bool:
        return int(lacking(gone).sum()) < gone

    most, asked = 0, 1 + 2 * int(lacking(0).sum())
    while most < k and not is_too_many(most):  # few have to go: the rest is not sorted
        most, asked = min(k, asked), 2 * asked
        lowest = np.argpartition(values, most - 1)[:most]
        lowest = lowest[np.argsort(values[lowest])]
    gone = bisect.bisect_left(range(most + 1), True, key=is_too_many) - 1
    missing = _places_lacking(bits, np.flatnonzero(lacking(gone)), least, axis)
    if gone == k:
        return _Cut(int(np.iinfo(sizes.dtype).max), missing)
    cut = values[lowest[gone]]
    if gone and cut == values[lowest[gone - 1]]:
        return None
    return _Cut(int(cut), missing)


def _count_units(keep: np.ndarray, axis: int) -> np.ndarray:
    """Kept entries of every row or column; adding bools up as they are would cost more than the cut."""
    if axis == 0:
        return np.bitwise_count(np.packbits(keep, axis=1)).sum(1, dtype=np.int64)
    ones, rows = keep.view(np.uint8), range(0, len(keep), ROWS_COUNTED)
    return sum(ones[row : row + ROWS_COUNTED].sum(0, dtype=np.uint8).astype(np.int64) for row in rows)


def _places_lacking(bits: np.ndarray, lacking: np.ndarray, least: int, axis: int) -> np.ndarray:
    """Where (in the flat matrix) the `least` largest entries of these units are."""
    by_unit = np.ascontiguousarray(bits[lacking] if axis == 0 else bits[:, lacking].T)
    unit, entry = np.nonzero(keep_rows(by_unit, least))
    row, column = (lacking[unit], entry) if axis == 0 else (entry, lacking[unit])
    return row * bits.shape[1] + column


def _apply(cut: _Cut, weight: Tensor) -> None:
    """One pass that zeroes what is below the cut."""
    flat = integers(weight).reshape(-1)
    kept = flat[cut.places]
    if cut.threshold > 0:
        just_below = (
            torch.tensor(cut.threshold - 1, dtype=INTEGER_OF[weight.dtype])
            .view(weight.dtype)
            .nan_to_num(nan=torch.inf)
        )
        torch.hardshrink(weight, just_below.item(), out=weight)
    flat[cut.places] = kept
