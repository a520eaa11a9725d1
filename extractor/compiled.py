"""Compiled jobs on all of torch's threads, without Python in between: what `selection_fast` is run by.

A job is a row of integers: addresses, shapes, counts. Each thread takes the next row until none is left.
"""

import functools
from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic

from extractor.threads import Body, on_all_threads

HEAD = 3  # before the jobs: the next one to take, how many there are, integers in each

# NumPy's error model: no check for division by zero, which would stop vectorisation.
compile_ = njit(nogil=True, cache=True, error_model="numpy")


def run_jobs(kernel: Dispatcher, integer: type, jobs: list[tuple[int, ...]]) -> None:
    """`kernel(job, integer)` for every job; `integer` is numpy's type of the entries it works on."""
    if not jobs:
        return
    table = np.array([*_head(jobs), *(value for job in jobs for value in job)], dtype=np.int64)
    on_all_threads(_body(kernel, integer), table.ctypes.data, len(jobs))


def _head(jobs: list[tuple[int, ...]]) -> tuple[int, int, int]:
    return 0, len(jobs), len(jobs[0])


@functools.cache
def _body(kernel: Dispatcher, integer: type) -> Any:
    @cfunc("void(CPointer(int64))", cache=True)
    @no_type_check
    def body(table):
        head = carray(table, (HEAD,))
        count, width = head[1], head[2]
        values = carray(table, (HEAD + count * width,))
        job = _take(table)
        while job < count:
            kernel(values[HEAD + job * width : HEAD + (job + 1) * width], integer)
            job = _take(table)

    return Body(body.address)


@intrinsic
@no_type_check
def _take(typing_context, counter):
    """Atomically: the counter's value, which is one higher afterwards."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


@intrinsic
@no_type_check
def pointer(typing_context, address):
    """An address as a pointer, for `carray`."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate
