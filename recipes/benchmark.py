"""What a step costs: ratios of times in one interleaved run, and peak memory.

    python recipes/benchmark.py                                   # ratios, on the quickstart's shapes
    python recipes/benchmark.py --shape.hidden_size 1024 --shape.batch_size 256 --shape.head_dim 64   # a GPU
    python recipes/benchmark.py --memory.enabled true             # and memory, at the shape of GPT-2

Every ratio is the median over rounds of a ratio within one round, with the rounds' range; caches are cold
(`extractor.clock`). Nothing else should run beside it. Circuits are timed on a trained student (`--run`).

A row of memory runs in a process of its own, so its peak is its own: resident memory beyond what the process
held after its imports (CPU), or what torch's allocator peaked at (GPU). On a CPU freed memory goes back at
once (MALLOC_MMAP_THRESHOLD_), so that the peak is what a step holds and not what glibc's heap keeps: without
it the passes over all sites can take twice as much. Writes benchmark.json.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import GPT2Config, GPT2LMHeadModel

from bridges.coupled import CoupledModel, LossConfig
from bridges.dense import DenseModel
from bridges.speed import (
    ShapeConfig,
    bridged_rows,
    kernel_choices,
    kernels,
    optimizer_rows,
    precisions,
    step_rows,
    student_step,
)
from bridges.warm_start import StudentShape, make_student
from extractor.artifacts import SCHEMA_VERSION, write_json
from extractor.circuit_speed import compact_rows, mask_rows, sparse_product_rows
from extractor.circuit_table import put_table
from extractor.clock import Row, machine_limits
from extractor.config import Config, run_recipe
from extractor.machine import fast_fp32, use_all_cores
from extractor.rotation import RotationConfig
from extractor.selection import TorchBackend, keep_largest, largest, magnitude, unpack
from extractor.sparsity import SparsityConfig, WeightSparsifier

EXACTNESS_STEPS = 20

# At most, unless it says otherwise; rows without a goal are for comparison.
GOALS = {
    "sparse step / dense step, fp32, plain": "1.15",
    "sparse step / dense step, bf16, plain": "1.30",
    "sparse step / dense step, fp32, fast": "1.05",
    "sparse step / dense step, bf16, fast": "1.12",
    "AbsTopK / sparse step, fp32, plain": "0.10",
    "AbsTopK / sparse step, bf16, plain": "0.15",
    "AbsTopK / sparse step, fp32, fast": "0.03",
    "AbsTopK / sparse step, bf16, fast": "0.05",
    "projection / sparse step, fp32, plain": "0.02",
    "projection / sparse step, bf16, plain": "0.02",
    "projection / sparse step, fp32, fast": "0.005",
    "projection / sparse step, bf16, fast": "0.005",
    "matrix products / dense step, fp32": "at least 0.45",
    "matrix products / dense step, bf16": "at least 0.45",
    "(AdamW + projection) / AdamW, 4 M weights, plain": "4",
    "(AdamW + projection) / AdamW, 4 M weights, fast": "1.3",
    "projection with a floor of 4 / without, plain": "2",
    "projection with a floor of 4 / without, fast": "2",
    "bridged step / dense step, fp32, plain": "2.4",
    "bridged step / dense step, bf16, plain": "2.4",
    "bridged step / dense step, fp32, fast": "2.2",
    "bridged step / dense step, bf16, fast": "2.2",
    "cost of the teacher / its forward, fp32": "1.1",
    "cost of the teacher / its forward, bf16": "1.1",
    "masks: 8 seeds together / one alone": "2",
    "masks: folded / not folded": "0.33",
    "extraction / attribution (2 forwards, 1 backward)": "30",
    "masked / compact, d 512, 3 % kept, 8 x 256 tokens": "at least 25",
    "largest logit difference, d 512, 3 % kept, 8 x 256 tokens": "1e-5",
    "dense product / sparse one, 1 token": "at least 15",
    "dense product / sparse one, 256 tokens": "at least 6.5",
}


RowGroup = Literal["steps", "optimizer", "bridged", "compact", "products", "masks"]
ROW_GROUPS: tuple[RowGroup, ...] = ("steps", "optimizer", "bridged", "compact", "products", "masks")


class MemoryConfig(Config):
    """Peak memory, at the shape of GPT-2 (124 M) unless told otherwise."""

    enabled: bool = False
    num_hidden_layers: int = Field(12, ge=1)
    hidden_size: int = Field(768, ge=8)
    num_attention_heads: int = Field(12, ge=1)
    vocab_size: int = Field(50257, ge=2)
    context_length: int = Field(256, ge=2)
    batch_size: int = Field(8, ge=1)


class BenchmarkConfig(Config):
    out: Path = Path("runs/benchmark")
    shape: ShapeConfig = ShapeConfig()
    rounds: int = Field(7, ge=1)
    run: Path = Path("runs/quickstart")
    """A run folder with a trained student, for the rows on masks."""
    task: str = "with_as"
    mask_rounds: int = Field(1, ge=1)
    """Rounds of the rows on masks, which learn nineteen masks each."""
    rows: tuple[RowGroup, ...] = ROW_GROUPS
    """What to measure."""
    memory: MemoryConfig = MemoryConfig()
    table: Path | None = None
    """A Markdown file whose lines between `<!-- speed -->` and `<!-- /speed -->` become the table."""


def main(config: BenchmarkConfig) -> None:
    use_all_cores()
    fast_fp32()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limits = machine_limits(device, config.rounds)
    for name, value in limits.items():
        show(f"{name:64} {value:10,.1f}")
    measures: dict[RowGroup, Callable[[], list[Row]]] = {
        "steps": lambda: step_rows(config.shape, device, config.rounds),
        "optimizer": lambda: optimizer_rows(device, config.rounds, config.shape.density),
        "bridged": lambda: bridged_rows(config.shape, device, config.rounds),
        "compact": lambda: compact_rows(device, config.rounds),
        "products": lambda: sparse_product_rows(device, config.rounds, config.shape.density),
        "masks": lambda: masks(config, device),
    }
    rows: list[Row] = []
    for group in config.rows:
        rows += (new := measures[group]())
        for row in new:
            median, low, high = row.ratio
            show(
                f"{row.name:64} {median:10.3g}   [{low:.3g}, {high:.3g}]   goal {GOALS.get(row.name, 'none')}"
            )
    exact = exactness(config.shape, device)
    show(f"{'selections equal to the torch.topk oracle':64} {exact['equal']} of {exact['selections']}")
    report = {
        "schema_version": SCHEMA_VERSION,
        "config": config.model_dump(mode="json"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "limits": limits,
        "ratios": {row.name: row.ratio._asdict() | {"goal": GOALS.get(row.name)} for row in rows},
        "exactness": exact,
    }
    if config.memory.enabled:
        report["peak_bytes"] = peak_memory(config.memory)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "benchmark.json", report)
    if config.table is not None:
        put_table(config.table, speed_table(report), "speed")


def speed_table(report: Mapping[str, Any]) -> str:
    """The report's ratios, what was exact and the machine's limits, in Markdown."""
    lines = ["| ratio | median | range of the rounds | goal |", "|---|---|---|---|"]
    for name, ratio in report["ratios"].items():
        median, low, high = (f"{ratio[key]:.3g}" for key in ("median", "low", "high"))
        lines.append(f"| {name} | {median} | {low} to {high} | {ratio['goal'] or ''} |")
    exact, limits = report["exactness"], report["limits"]
    lines += [
        "",
        f"{exact['equal']} of {exact['selections']} selections equal `torch.topk` with ties by index "
        "(projections over real steps, activations with ties, fp32 and bf16).",
        f"Limits of that machine: {limits['fp32_gemm_gflops']:.0f} GFLOP/s in fp32 products, "
        f"{limits['bf16_gemm_gflops']:.0f} in bf16, {limits['copy_gb_per_s']:.0f} GB/s copied.",
    ]
    return "\n".join([*lines, ""])


def masks(config: BenchmarkConfig, device: torch.device) -> list[Row]:
    if not (config.run / "student").is_dir():
        show(f"masks: not measured, no student in '{config.run}' (--run)")
        return []
    return mask_rows(config.run, config.task, device, config.mask_rounds)


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def exactness(shape: ShapeConfig, device: torch.device) -> dict[str, int]:
    """Selections that equal torch.topk with ties by index: projections over real steps, and activations with
    ties in fp32 and bf16."""
    counts = {"selections": 0, "equal": 0}

    def count(found: torch.Tensor, expected: torch.Tensor) -> None:
        counts["selections"] += 1
        counts["equal"] += int(torch.equal(found, expected))

    step, student = student_step(shape, device, precisions()[-1], sparse=True)
    for choice in kernel_choices(device):
        with kernels(choice):
            for _ in range(EXACTNESS_STEPS):
                step.loss().backward()
                step.optimizer.step()
                step.optimizer.zero_grad()
                before = {name: p.detach().clone() for name, p in student.sparse_matrices().items()}
                step.project()
                for name, weight in before.items():
                    k = step.sparsifier.num_kept(name, 1)
                    kept = largest(magnitude(weight.flatten()), k).view_as(weight)
                    count(student.get_parameter(name).detach(), weight * kept)
            for dtype in (torch.float32, torch.bfloat16):
                x = (torch.randn(4096, shape.hidden_size, device=device) * 4).round().div(4).to(dtype)
                k = int(shape.activation_frac * shape.hidden_size)
                oracle = unpack(TorchBackend().select(x, k).packed, x.shape[-1])
                count(keep_largest(x, k), oracle)
    return counts


def peak_memory(config: MemoryConfig) -> dict[str, int]:
    """Peak bytes of every row."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # read by the processes started below
    spawn = multiprocessing.get_context("spawn")
    rows = {}
    for name in MEMORY_ROWS:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # a killed process is an error, not a wait
            rows[name] = pool.submit(_peak, name, config).result()
        show(f"{name:64} {rows[name] / 2**20:10,.0f} MiB")
    return rows


def _peak(name: str, config: MemoryConfig) -> int:
    """Peak bytes of one row."""
    use_all_cores()
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    before = _peak_resident()
    MEMORY_ROWS[name](config, torch.device("cuda" if on_gpu else "cpu"))
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    return _peak_resident() - before


def _peak_resident() -> int:
    """Bytes. Not getrusage's figure: that one begins at the size of the process this one came from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def _dense(config: MemoryConfig, device: torch.device) -> DenseModel:
    own = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
    )
    return DenseModel(GPT2LMHeadModel(own).to(device))


def _tokens(config: MemoryConfig, device: torch.device) -> torch.Tensor:
    return torch.randint(config.vocab_size, (config.batch_size, config.context_length), device=device)


@torch.no_grad()
def _forward(config: MemoryConfig, device: torch.device, record: bool) -> None:
    _dense(config, device).run(_tokens(config, device), record=record)


def _step(config: MemoryConfig, device: torch.device, hybrid_sites: str) -> None:
    dense = _dense(config, device)
    student, bridges = make_student(dense, StudentShape(), RotationConfig(enabled=False))
    loss = LossConfig(hybrid_sites=hybrid_sites)
    coupled = CoupledModel(student.to(device), bridges.to(device), dense, loss).train()
    sparsity = SparsityConfig(density=0.125, anneal_frac=0)
    sparsifier = WeightSparsifier(student.sparse_matrices(), sparsity, 2)
    optimizer = torch.optim.AdamW(coupled.parameters(), lr=1e-3, fused=True)
    for step in range(2):  # the second one holds the optimiser's moments from its start, and is the one meant
        coupled.config = LossConfig() if step == 0 else loss
        coupled(_tokens(config, device), seed=0, step=step).total.backward()
        optimizer.step()
        sparsifier.project_(step + 1)
        optimizer.zero_grad()


MEMORY_ROWS: dict[str, Callable[[MemoryConfig, torch.device], None]] = {
    "dense forward": lambda config, device: _forward(config, device, record=False),
    "dense forward, every site recorded": lambda config, device: _forward(config, device, record=True),
    "training step, one sampled site per direction": lambda config, device: _step(config, device, "sampled"),
    "training step, hybrid passes over all sites": lambda config, device: _step(config, device, "all"),
}


if __name__ == "__main__":
    run_recipe(main, BenchmarkConfig, None)
