"""What this machine does well: its cores, its matrix units, bf16 autocast only where the hardware has it."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor

from extractor.errors import UsageError

Precision = Literal["auto", "fp32", "bf16"]
T = TypeVar("T")

FP32_ERROR = 1e-6  # of a true fp32 product: 2e-7 to 4e-7; in bf16 2e-3


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


def fast_fp32() -> bool:
    """Let a CPU's fp32 matrix products go through oneDNN, if they stay fp32 there; whether they do.

    torch calls that 'medium'. With AVX-512 it is true fp32 and up to twice as fast as the default; with AMX
    the same word computes in bf16. So one product is compared with float64, and the default comes back
    where it differs. To be called once, before anything is computed: it may change last bits.
    """
    if torch.cuda.is_available():
        return False
    torch.set_float32_matmul_precision("medium")
    if matmul_error() < FP32_ERROR:
        return True
    torch.set_float32_matmul_precision("highest")
    return False


def matmul_error() -> float:
    """Relative error of an fp32 product, as the machine is set now, against float64."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=random) for shape in ((256, 512), (512, 384)))
    exact = a.double() @ b.double()
    return float((a @ b - exact).norm() / exact.norm())


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


def shared_out(items: Sequence[T], state: PartialState, run: Path) -> Iterator[T]:
    """The items in order, each to whichever process asks first, so that none waits long for the others.

    A claim is a file in the run folder, which all processes see; ends when all are done everywhere.
    """
    if state.num_processes == 1:
        yield from items
        return
    claims = run / ".tmp-claims"
    if state.is_main_process:
        shutil.rmtree(claims, ignore_errors=True)  # of a launch that was killed
        claims.mkdir(parents=True)
    state.wait_for_everyone()
    for number, item in enumerate(items):
        try:
            (claims / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield item
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(claims, ignore_errors=True)


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """A batch on its device, without waiting for what a GPU still computes."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


def attend(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
    """`attention(q, k, v, *more)`, on a CPU in fp32 also where autocast or the weights are bf16.

    torch 2.13's attention backward on a CPU takes three to five times as long in bf16 as in fp32
    (16 x 8 heads x 128 tokens: 45 against 14 ms), which would make it the dearest part of a step.
    """
    if q.device.type != "cpu":
        return attention(q, k, v, *more)
    inputs = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        return attention(*inputs, *more).to(q.dtype)


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be sharded over processes (FSDP2); then every process must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value
