"""What this machine does well: its cores, and bf16 autocast only where the hardware has it."""

import os
from collections.abc import Callable
from typing import Literal

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor

from extractor.errors import UsageError

Precision = Literal["auto", "fp32", "bf16"]


def mixed_precision(precision: Precision) -> Literal["no", "bf16"]:
    """Accelerate's `mixed_precision` for a wish; `auto` is bf16 only where it is fast.

    On CPUs without AVX512-BF16 or AMX torch's bf16 matmul is 44 to 500 times slower than fp32
    (pytorch#146508), so `auto` asks the CPU first.
    """
    if precision == "auto":
        return "bf16" if has_fast_bf16() else "no"
    return "bf16" if precision == "bf16" else "no"


def use_all_cores() -> None:
    """Share the cores out over the local processes.

    `accelerate launch` on a CPU sets OMP_NUM_THREADS=1 unless told otherwise, which would leave all
    cores but one idle.
    """
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes))


def has_fast_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device) -> torch.autocast:
    """bf16 autocast where the hardware is fast at it; does nothing elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_fast_bf16())


def start_processes() -> PartialState:
    """This process's place among those the launcher started (gloo on a CPU).

    Raises:
        UsageError: fewer processes joined than the launcher was asked for.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != asked:
        raise UsageError(f"the launcher started {asked} processes, {state.num_processes} joined")
    return state


def attend(attention: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention(q, k, v)`, on a CPU in fp32 also where autocast or the weights are bf16.

    torch 2.13's attention backward on a CPU takes three to five times as long in bf16 as in fp32
    (16 x 8 heads x 128 tokens: 45 against 14 ms), which would make it the dearest part of a step.
    """
    if q.device.type != "cpu":
        return attention(q, k, v)
    inputs = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        return attention(*inputs).to(q.dtype)


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be sharded over processes (FSDP2); then every process must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value
