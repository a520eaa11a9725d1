"""Every implementation selects, to the bit, as a stable sort does; gradients pass where it keeps."""

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from extractor import machine, selection, threads
from extractor.projection import Projection, keep_with_floor, project_
from extractor.selection import AbsTopK, NumpyBackend, TorchBackend, abs_topk, keep_largest, unpack
from extractor.threads import in_threads
from tests.conftest import ROOT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HAS_NUMBA = importlib.util.find_spec("numba") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="numba (the extra `fast`) is not installed")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it is for Linux only)")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def oracle(x: torch.Tensor, k: int) -> torch.Tensor:
    """A stable sort by |value| leaves equal values in the order of their indices; NaN comes first."""
    order = x.float().abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros(x.shape, dtype=torch.bool).scatter_(-1, order, True)


def rows(dtype: torch.dtype, size: int) -> Iterator[torch.Tensor]:
    """Six rows each of: distinct values, heavy ties, all equal, zeros of both signs, ends of the range."""
    x = torch.randn(6, size)
    yield x.to(dtype)
    yield x.round().to(dtype)
    yield torch.full((6, size), -2.0, dtype=dtype)
    yield (x * (torch.rand(6, size) < 0.3)).to(dtype)
    ends = x.clone()
    ends[:, 0], ends[:3, -1], ends[3:, size // 2] = torch.nan, -torch.inf, 1e-7
    yield ends.to(dtype)


def check(backend: selection.Backend, dtype: torch.dtype, size: int, ks: set[int]) -> None:
    """Count, mask and both outputs, to the bit, of one implementation."""
    for x in rows(dtype, size):
        for k in ks:
            keep = oracle(x, k)
            kept = backend.select(x, k)
            assert torch.equal(unpack(kept.packed, size), keep), (dtype, size, k)
            integer = selection.INTEGER_OF[dtype]
            expected = torch.where(keep, x, 0).view(integer)
            assert torch.equal(kept.values.view(integer), expected), (dtype, size, k)
            gradient = torch.randn_like(x)
            assert torch.equal(backend.mask(gradient, kept.packed), torch.where(keep, gradient, 0))


def backend_named(name: str) -> selection.Backend:
    return {"torch": TorchBackend(), "numpy": NumpyBackend()}.get(name) or selection.compiled(1 << 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["torch", "numpy", pytest.param("numba", marks=needs_numba)])
def test_every_implementation_equals_a_stable_sort(name: str, dtype: torch.dtype) -> None:
    backend = backend_named(name)
    for size in (*range(1, 20), 31, 64, 65, 255, 256, 300):
        check(backend, dtype, size, {1, max(1, size // 4), (size + 1) // 2, size})
    check(backend, dtype, 23, set(range(1, 24)))


@pytest.mark.parametrize("name", ["numpy", pytest.param("numba", marks=needs_numba)])
def test_rows_longer_than_a_16_bit_counter(name: str) -> None:
    check(backend_named(name), torch.bfloat16, 70_001, {1, 9_000, 69_999})


@pytest.mark.parametrize("forbidden", ["", "1"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_public_function_on_many_rows(
    forbidden: str, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough rows for numba, and for several threads."""
    monkeypatch.setenv("SPARSEBRIDGE_NO_NUMBA", forbidden)
    assert (selection.compiled(1 << 20) is not None) == (HAS_NUMBA and not forbidden)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for dtype in DTYPES:
            x = torch.randn(3, 500, 130).to(dtype).transpose(0, 1)  # not contiguous
            keep = oracle(x, 32)
            assert torch.equal(keep_largest(x, 32), keep)
            assert torch.equal(abs_topk(x, 0.25), torch.where(keep, x, 0))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    abs_topk(x, 0.5).sum().backward()
    assert x.grad.shape == shape
    assert keep_largest(x, 4).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 12), (400, 100)])
def test_the_gradient_passes_where_the_bit_is_set(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = torch.randn(shape).round().to(dtype).requires_grad_()  # kept zeros pass their gradient, too
    keep = oracle(x.detach(), shape[1] // 2)
    gradient = torch.randn(shape).masked_fill(~keep, torch.nan).to(dtype)
    abs_topk(x, 0.5).backward(gradient)
    assert torch.equal(x.grad, torch.where(keep, gradient, 0))


def test_first_and_second_derivatives() -> None:
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: abs_topk(x, 0.4).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: abs_topk(x, 0.4).pow(3), x)


def test_what_is_saved_is_one_bit_an_entry() -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        abs_topk(torch.randn(64, 100, requires_grad=True), 0.25)
    assert [(x.dtype, tuple(x.shape)) for x in saved] == [(torch.uint8, (64, 13))]


@pytest.mark.parametrize("has_openmp", [True, False])
def test_jobs_are_shared_by_as_many_threads_as_torch_uses(
    has_openmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_openmp:
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        workers, done = set(), []

        def work(job: int) -> None:
            time.sleep(0.002)
            workers.add(threading.get_native_id())
            done.append(job)

        in_threads(work, range(30))
        assert sorted(done) == list(range(30))
        assert len(workers) == 3
        with pytest.raises(ZeroDivisionError):
            in_threads(lambda job: 1 // job, [1, 0, 1, 0])
    finally:
        torch.set_num_threads(before)


def test_importing_the_student_loads_no_compiler() -> None:
    code = (
        "import extractor.student, sys; assert not {'numba', 'extractor.selection_fast'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- matrices --------------------------------------------------------------------------------------------


def matrices(dtype: torch.dtype) -> Iterator[tuple[list[Projection], int]]:
    """Projections of matrices with distinct, tied, mostly zero and badly scaled weights."""
    for kind in range(4):
        projections = []
        for shape, k, axis in (
            ((70, 65), 300, None),
            ((5000,), 30, None),
            ((64, 128), 900, 0),
            ((64, 128), 256, 0),  # no room but for the floor
            ((300, 64), 1000, 1),  # more rows than a byte counts
            ((100, 99), 9899, 1),
        ):
            w = torch.randn(shape)
            if kind == 1:
                w = (3 * w).round()
            if kind == 2:
                w *= torch.rand(shape) < 0.02
            if kind == 3:  # many units keep only their floor
                w *= torch.exp(2 * torch.randn(shape[0])).view(-1, *[1] * (w.ndim - 1))
                w *= torch.exp(2 * torch.randn(shape[-1]))
            projections.append(Projection(w.to(dtype), k, axis))
        yield projections, 4


def expected_weight(projection: Projection, least: int) -> torch.Tensor:
    """The definition with the stable sort: units' own first, the rest of k by size."""
    size = projection.weight.float().abs()
    if projection.axis is not None:
        own = oracle(size if projection.axis == 0 else size.T, least)
        size = size.masked_fill(own if projection.axis == 0 else own.T, torch.inf)
    keep = oracle(size.flatten(), projection.k).view(size.shape)
    return torch.where(keep, projection.weight, 0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("forbidden", [pytest.param("", marks=needs_numba), "1"], ids=["numba", "numpy"])
def test_projections_equal_the_definition(
    forbidden: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEBRIDGE_NO_NUMBA", forbidden)
    monkeypatch.setattr(selection, "COMPILED_FROM", 0)
    for projections, least in matrices(dtype):
        expected = [expected_weight(p, least) for p in projections]
        project_(projections, least)
        for p, weight in zip(projections, expected, strict=True):
            assert torch.equal(p.weight, weight), (p.weight.shape, p.k, p.axis)
        project_(projections, least)  # again: nothing changes
        assert all(torch.equal(p.weight, weight) for p, weight in zip(projections, expected, strict=True))


@pytest.mark.parametrize("forbidden", [pytest.param("", marks=needs_numba), "1"], ids=["numba", "numpy"])
def test_a_sample_that_misleads_costs_time_and_nothing_else(
    forbidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entries that a first cut is guessed from are the largest, or the smallest, of all."""
    monkeypatch.setenv("SPARSEBRIDGE_NO_NUMBA", forbidden)
    for size, stride in ((1 << 18, 64), (1 << 18, 32), (1 << 16, 16)):
        for factor in (1e3, 1e-3, 0):
            weight = torch.randn(size, generator=torch.Generator().manual_seed(0))
            weight[::stride] *= factor
            projection = Projection(weight, size // 16, None)
            expected = expected_weight(projection, 0)
            project_([projection], 0)
            assert torch.equal(weight, expected), (size, stride, factor)


@pytest.mark.parametrize("forbidden", [pytest.param("", marks=needs_numba), "1"], ids=["numba", "numpy"])
def test_a_nan_is_a_largest_weight(forbidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEBRIDGE_NO_NUMBA", forbidden)
    monkeypatch.setattr(selection, "COMPILED_FROM", 0)
    for k in (1, 2, 5):
        weight = torch.arange(-4.0, 4.0)
        weight[[2, 6]] = torch.nan
        project_([Projection(weight, k, None)], 0)
        assert int(weight.isnan().sum()) == min(k, 2)
        assert int(weight.count_nonzero()) == k


def test_a_transposed_weight_is_projected_in_place() -> None:
    weight = torch.randn(7, 30)
    expected = expected_weight(Projection(weight.T, 50, 0), 1)
    project_([Projection(weight.T, 50, 0)], 1)
    assert torch.equal(weight.T, expected)


# --- without waiting for the device ----------------------------------------------------------------------


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: `.item()`, `bool(tensor)`, `nonzero`, masks as indices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"), name
        return function(*args, **(kwargs or {}))


def test_the_torch_implementation_reads_nothing_back() -> None:
    """On a device without data (`meta`), and on a CPU under a guard that is itself checked."""
    x = torch.randn(8, 40, device="meta", requires_grad=True)
    abs_topk(x, 0.25).sum().backward()
    weights = [torch.randn(16, 40, device="meta") for _ in range(3)]
    project_([Projection(w, 100, axis) for w, axis in zip(weights, (None, 0, 1), strict=True)], 2)
    with NoReading():
        TorchBackend().select(torch.randn(8, 40), 10)
        keep_with_floor(torch.randn(16, 40, dtype=torch.float64), 100, 2, 1)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(()).item()


# --- Triton ----------------------------------------------------------------------------------------------


def check_triton() -> None:
    """Run in a process of its own, where Triton interprets its kernels."""
    from extractor import selection_triton

    for dtype in DTYPES:
        for size in (1, 9, 40):
            check(selection_triton, dtype, size, {1, (size + 2) // 3})
    for projections, least in matrices(torch.float32):
        expected = [expected_weight(p, least) for p in projections]
        selection_triton.project_(projections, least)
        for p, weight in zip(projections, expected, strict=True):
            assert torch.equal(p.weight.view(torch.int32), weight.view(torch.int32)), (p.k, p.axis)
    with NoReading():
        selection_triton.project_(projections, least)


@needs_triton
def test_triton_in_its_interpreter() -> None:
    code = "from tests.extractor.test_selection import check_triton; check_triton()"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-3000:]


@needs_triton
def test_triton_kernels_compile_for_a_gpu() -> None:
    """Down to machine code for an H100; the compiler needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from extractor import selection_triton as kernels

    def compile_(kernel: object, types: str, **constants: int) -> None:
        signature = dict(zip(kernel.arg_names, types.split() + ["constexpr"] * len(constants), strict=True))
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

    compile_(kernels._select, "*i16 *i16 *u8 i32 i32", TOP=0x7FFF, BYTES=32)
    compile_(kernels._select, "*i32 *i32 *u8 i32 i32", TOP=0x7FFFFFFF, BYTES=32)
    compile_(kernels._mask, "*i16 *u8 *i16 i32", BYTES=32)
    block = kernels.BLOCK
    for shift, width in kernels.LEVELS:
        compile_(kernels._histogram, "*i64 " * 5 + "*i32", SHIFT=shift, WIDTH=width, BLOCK=block)
    compile_(kernels._count_ties, "*i64 " * 8, BLOCK=block)
    compile_(kernels._zero, "*i64 " * 9, BLOCK=block)


class TestOnAGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_same_entries_are_kept_as_on_a_cpu(self, dtype: torch.dtype) -> None:
        for size in (1, 9, 256, 1000, 4096):
            for x in rows(dtype, size):
                on_gpu = x.cuda().requires_grad_()
                kept = AbsTopK.apply(on_gpu, (size + 3) // 4, None)
                kept.sum().backward()
                keep = oracle(x, (size + 3) // 4)
                assert torch.equal(kept.detach().cpu().nan_to_num(), torch.where(keep, x, 0).nan_to_num())
                assert torch.equal(on_gpu.grad.cpu() == 1, keep)

    def test_weights_are_projected_alike_and_the_host_never_waits(self) -> None:
        for projections, least in matrices(torch.float32):
            on_gpu = [Projection(p.weight.cuda(), p.k, p.axis) for p in projections]
            torch.cuda.set_sync_debug_mode("error")
            try:
                project_(on_gpu, least)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for p, other in zip(projections, on_gpu, strict=True):
                assert torch.equal(other.weight.cpu(), expected_weight(p, least))


# --- fp32 products ---------------------------------------------------------------------------------------


def test_fast_fp32_is_taken_only_where_it_is_fp32() -> None:
    try:
        torch.set_float32_matmul_precision("medium")
        is_fp32 = machine.matmul_error() < 1e-6  # on a CPU with AMX 2e-3: it computes in bf16
        assert machine.fast_fp32() == (is_fp32 and not torch.cuda.is_available())
        a, b = torch.randn(300, 700), torch.randn(700, 200)
        exact = a.double() @ b.double()
        assert (a @ b - exact).norm() / exact.norm() < 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_that_are_not_fp32_put_the_default_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matmul_error", lambda: 2e-3)
    assert not machine.fast_fp32()
    assert torch.get_float32_matmul_precision() == "highest"
