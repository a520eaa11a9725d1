"""Code of our own on the threads that torch computes with.

After every parallel operation torch's OpenMP threads spin for a while, waiting for the next one, and keep
the cores from any other thread: a pool of Python threads gains nothing right after a matrix product. So
jobs are given to the same threads, through the function that compilers call for `#pragma omp parallel`.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def in_threads(work: Callable[[T], None], jobs: Sequence[T]) -> None:
    """`work(job)` for every job, on as many threads as torch uses.

    For jobs of a millisecond or more that release the interpreter lock: to wait for it costs tens of
    microseconds. They must not call torch's parallel operations.
    """
    queue, errors = iter(jobs), []

    def take_jobs(_: object) -> None:
        try:
            for job in queue:
                work(job)
        except BaseException as error:  # raised in the caller's thread below
            errors.append(error)

    on_all_threads(Body(take_jobs), None, len(jobs))
    if errors:
        raise errors[0]


def on_all_threads(body: Any, argument: int | None, num_jobs: int) -> None:
    """Call `body` (a `Body`) with this address once on each thread; it takes jobs until none is left."""
    threads = torch.get_num_threads()
    if threads == 1 or num_jobs < 2:
        body(argument)
    elif (parallel := _openmp()) is not None:
        # Always torch's own number of threads: for a smaller team OpenMP would end the others.
        parallel(body, argument, threads, 0)
    else:
        helpers = [_pool().submit(body, argument) for _ in range(threads - 1)]
        body(argument)
        for helper in helpers:
            helper.result()


@functools.cache
def _openmp() -> Callable | None:
    """The entry to torch's threads; None where torch brings no GNU OpenMP along."""
    package = Path(torch.__file__).parent
    found = [*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")]
    if len(found) != 1:
        return None
    parallel = ctypes.CDLL(str(found[0])).GOMP_parallel  # of the copy that is already loaded
    parallel.argtypes = [Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "sparsebridge")


if hasattr(os, "register_at_fork"):  # a fork takes no threads along
    os.register_at_fork(after_in_child=_pool.cache_clear)
