"""Timings as ratios: every work in turn, round after round, so that a slow minute slows all of them alike.

A ratio is the median over rounds of the ratio within a round, with the smallest and the largest beside it.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Work = Callable[[], object]
Times = dict[str, list[float]]  # seconds of each work, one per round

CACHE_BYTES = 64 * 2**20  # written before every work, so that none finds its data in a cache


class Ratio(NamedTuple):
    """A median over rounds, and the range of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: list[float]) -> "Ratio":
        return cls(statistics.median(rounds), min(rounds), max(rounds))


class Row(NamedTuple):
    """One line of a table of ratios."""

    name: str
    ratio: Ratio


def interleave(
    works: Mapping[str, Work], rounds: int, device: torch.device, *, warm_up: bool = True
) -> Times:
    """Time every work once a round, after one round that does not count; the order turns with the round."""
    flush = torch.zeros(CACHE_BYTES, dtype=torch.uint8, device=device)
    times: Times = {name: [] for name in works}
    names = list(works)
    for turn in range(0 if warm_up else 1, rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            flush.add_(1)
            gc.collect()
            seconds = _seconds(works[name], device)
            if turn:
                times[name].append(seconds)
    return times


def _seconds(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def ratio(times: Times, over: str, under: str) -> Ratio:
    """One work's time as a multiple of another's."""
    return Ratio.of([a / b for a, b in zip(times[over], times[under], strict=True)])


def machine_limits(device: torch.device, rounds: int) -> dict[str, float]:
    """What the machine can do: matrix products in GFLOP/s, copies in GB/s (medians)."""
    size, volume = 2048 if device.type == "cpu" else 8192, 2**26
    a, b = torch.randn(2, size, size, device=device)
    source = torch.zeros(volume, device=device)
    target = torch.empty_like(source)
    half = a.bfloat16(), b.bfloat16()
    works = {
        "fp32": lambda: torch.mm(a, b),
        "bf16": lambda: torch.mm(*half),
        "copy": lambda: target.copy_(source),
    }
    seconds = {name: statistics.median(all_) for name, all_ in interleave(works, rounds, device).items()}
    return {
        "fp32_gemm_gflops": 2 * size**3 / seconds["fp32"] / 1e9,
        "bf16_gemm_gflops": 2 * size**3 / seconds["bf16"] / 1e9,
        "copy_gb_per_s": 2 * source.numel() * source.element_size() / seconds["copy"] / 1e9,
    }
