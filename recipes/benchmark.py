"""What a training step needs: peak memory, on random weights of a given shape.

    python recipes/benchmark.py                      # the shape of GPT-2 (124 M), 8 x 256 tokens
    python recipes/benchmark.py --num_hidden_layers 4 --hidden_size 256 --vocab_size 2048

Each row runs in a process of its own, so its peak is its own: resident memory beyond what the process
held after its imports (CPU), or what torch's allocator peaked at (GPU). On a CPU freed memory goes back at
once (MALLOC_MMAP_THRESHOLD_), so that the peak is what a step holds and not what glibc's heap keeps: without
it the passes over all sites can take twice as much. Writes benchmark.json.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from pydantic import Field
from transformers import GPT2Config, GPT2LMHeadModel

from bridges.coupled import CoupledModel, LossConfig
from bridges.dense import DenseModel
from bridges.warm_start import StudentShape, make_student
from extractor.artifacts import SCHEMA_VERSION, write_json
from extractor.config import Config, run_recipe
from extractor.machine import use_all_cores
from extractor.rotation import RotationConfig
from extractor.sparsity import SparsityConfig, WeightSparsifier


class BenchmarkConfig(Config):
    out: Path = Path("runs/benchmark")
    num_hidden_layers: int = Field(12, ge=1)
    hidden_size: int = Field(768, ge=8)
    num_attention_heads: int = Field(12, ge=1)
    vocab_size: int = Field(50257, ge=2)
    context_length: int = Field(256, ge=2)
    batch_size: int = Field(8, ge=1)


def main(config: BenchmarkConfig) -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # read by the processes started below
    spawn = multiprocessing.get_context("spawn")
    rows = {}
    for name in MEMORY_ROWS:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # a killed process is an error, not a wait
            rows[name] = pool.submit(_peak, name, config).result()
        sys.stdout.write(f"{name:60} {rows[name] / 2**20:10,.0f} MiB\n")
        sys.stdout.flush()
    config.out.mkdir(parents=True, exist_ok=True)
    report = {
        "schema_version": SCHEMA_VERSION,
        "config": config.model_dump(mode="json"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "peak_bytes": rows,
    }
    write_json(config.out / "benchmark.json", report)


def _peak(name: str, config: BenchmarkConfig) -> int:
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


def _dense(config: BenchmarkConfig, device: torch.device) -> DenseModel:
    own = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
    )
    return DenseModel(GPT2LMHeadModel(own).to(device))


def _tokens(config: BenchmarkConfig, device: torch.device) -> torch.Tensor:
    return torch.randint(config.vocab_size, (config.batch_size, config.context_length), device=device)


@torch.no_grad()
def _forward(config: BenchmarkConfig, device: torch.device, record: bool) -> None:
    _dense(config, device).run(_tokens(config, device), record=record)


def _step(config: BenchmarkConfig, device: torch.device, hybrid_sites: str) -> None:
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


MEMORY_ROWS: dict[str, Callable[[BenchmarkConfig, torch.device], None]] = {
    "dense forward": lambda config, device: _forward(config, device, record=False),
    "dense forward, every site recorded": lambda config, device: _forward(config, device, record=True),
    "training step, one sampled site per direction": lambda config, device: _step(config, device, "sampled"),
    "training step, hybrid passes over all sites": lambda config, device: _step(config, device, "all"),
}


if __name__ == "__main__":
    run_recipe(main, BenchmarkConfig, None)
