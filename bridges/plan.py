"""What a training run needs, from config.json alone: parameters, memory, FLOPs and time.

Counts are exact (`bridges.skeleton`). Memory is estimated in `bridges.footprint`. FLOPs of one forward pass
per token, over blocks and head, with a multiply-add as two:

    F = 2 * (weights of the matrices) + 2 * context * layers * heads * d_head

(the second part is attention, causal: half of the context on average). A step runs, per token,

    F(dense) + 3 F(student) + 3 share F(student) + 2 share F(dense) + 12 sites * d_dense * d_sparse

because a backward pass costs twice a forward one, or once where the weights are frozen; `share` is the part
of the blocks behind a site, on average over sites. With `hybrid` all, the two shares are sums over all sites,
and each pass runs forward once more; with multi, each of two passes is half in either model.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.footprint import FP32, step_memory, weights_memory
from bridges.skeleton import Skeleton, empty_student, num_nonzeros, num_parameters, skeleton
from bridges.warm_start import StudentShape
from extractor.errors import InputError
from extractor.machine import has_fast_bf16
from extractor.sparsity import SparsityConfig
from extractor.student import Student, StudentConfig

# Part of a training step's time that its FLOPs would take at the full speed of matrix products. From the
# README's run of recipes/python/train.yaml, 2200 steps in 30 minutes on one core: 1.24e11 FLOPs (as above) in
# 0.82 s, on a core (EPYC, Zen 5) whose bf16 products were measured at 4.6e11 FLOP/s. Not measured on a GPU.
GEMM_SHARE = 0.33
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
NEXT_TO_NO_TIME = 0.1  # seconds of a product, up to which a larger one is timed


@dataclass(frozen=True)
class Plan:
    """Counts are exact; `memory` (bytes per process), `flops` (per step, all processes), times are not."""

    name: str
    quantization: str
    precision: str
    dense_parameters: int
    student_parameters: int
    student_nonzeros: int
    bridge_parameters: int
    num_sites: int
    num_steps: int
    num_processes: int
    tokens_per_step: int
    memory: dict[str, int]
    loading_bytes: int
    """A quantised dense model, the plain one it came from, and the student: before training."""
    flops: dict[str, float]
    gemm_flops_per_second: float
    """Of one process, as measured here."""

    @property
    def tokens(self) -> int:
        return self.num_steps * self.tokens_per_step

    @property
    def peak_bytes(self) -> int:
        return max(sum(self.memory.values()), self.loading_bytes)

    @property
    def seconds_per_step(self) -> float:
        """If every process multiplies matrices as fast as this one, for `GEMM_SHARE` of its time."""
        return sum(self.flops.values()) / (self.num_processes * self.gemm_flops_per_second * GEMM_SHARE)


def plan(
    dense_folder: Path,
    shape: StudentShape,
    *,
    sparsity: SparsityConfig,
    hybrid: str = "sampled",
    batch_size: int = 16,
    context_length: int = 128,
    num_steps: int = 0,
    num_processes: int = 1,
    quantization: str = "none",
    accumulation: int = 1,
    bf16: bool | None = None,
) -> Plan:
    """What training this student needs.

    Args:
        dense_folder: holds the checkpoint's config.json; nothing else of it is read.
        hybrid: `sampled`, `all` or `multi`, as `loss.hybrid_sites`.
        batch_size: sequences per process and forward pass.
        accumulation: forward and backward passes per optimiser step.
        bf16: under bf16 autocast; None: if this machine is fast at it.

    Raises:
        InputError: a config, family or width that training would refuse, too; a context that is too long.
    """
    bf16 = has_fast_bf16() if bf16 is None else bf16
    dense = skeleton(dense_folder)
    student, copied = empty_student(dense, shape)
    longest = student.config.max_position_embeddings
    if context_length > longest:
        raise InputError(f"data.context_length is {context_length}; '{dense_folder}' has {longest} positions")
    with torch.device("meta"):
        bridges = BridgeSet(dense.sites, dense.width, student.config.hidden_size, removes_mean=False)
    memory = weights_memory(dense, student, bridges, quantization, num_processes)
    memory |= step_memory(dense, student.config, copied, shape, hybrid, (batch_size, context_length), bf16)
    tokens = batch_size * context_length * accumulation * num_processes
    plain = 0 if quantization == "none" else FP32 * num_parameters(dense.model)
    kept = memory["dense model"] + memory["student and bridges"]
    return Plan(
        name=str(dense_folder),
        quantization=quantization,
        precision="bf16" if bf16 else "fp32",
        dense_parameters=num_parameters(dense.model),
        student_parameters=num_parameters(student),
        student_nonzeros=num_nonzeros(student, sparsity),
        bridge_parameters=num_parameters(bridges),
        num_sites=len(dense.sites),
        num_steps=num_steps,
        num_processes=num_processes,
        tokens_per_step=tokens,
        memory=memory,
        loading_bytes=kept + plain,
        flops={
            name: tokens * count
            for name, count in flops_per_token(dense, student, copied, hybrid, context_length).items()
        },
        gemm_flops_per_second=gemm_speed(bf16),
    )


def describe(plan: Plan) -> str:
    """The plan as text, one fact a line."""
    hours = plan.num_steps * plan.seconds_per_step / 3600
    rows = [
        ("dense model", f"{plan.dense_parameters:,} parameters ({plan.name}; {plan.quantization})"),
        ("student", f"{plan.student_parameters:,} parameters, {plan.student_nonzeros:,} nonzero at the end"),
        ("bridges", f"{plan.bridge_parameters:,} parameters at {plan.num_sites} sites"),
        ("tokens", f"{plan.tokens_per_step:,} per step, {plan.tokens:,} in {plan.num_steps:,} steps"),
        ("memory", f"about {_gib(plan.peak_bytes)} per process ({plan.precision})"),
        *((f"  {name}", _gib(size)) for name, size in plan.memory.items() if size),
        ("FLOPs", f"{sum(plan.flops.values()):.2e} per step, {_total_flops(plan):.2e} in all"),
        *((f"  {name}", f"{count:.2e}") for name, count in plan.flops.items()),
        (
            "time",
            f"about {plan.seconds_per_step:,.2f} s per step, {hours:,.1f} h in all: an estimate, "
            f"{plan.num_processes} x {plan.gemm_flops_per_second:.1e} FLOP/s of matrix products here, "
            f"for {GEMM_SHARE:.0%} of a step's time",
        ),
    ]
    if plan.loading_bytes > sum(plan.memory.values()):
        rows.insert(5, ("", "while loading: the quantised and the plain dense model beside the student"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _total_flops(plan: Plan) -> float:
    return plan.num_steps * sum(plan.flops.values())


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


# --- FLOPs and time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PassFlops:
    """FLOPs per token of a forward pass: blocks and head."""

    blocks: float
    head: float

    def behind(self, share: float) -> float:
        return share * self.blocks + self.head


def flops_per_token(
    dense: Skeleton, student: Student, copied: StudentConfig, hybrid: str, context_length: int
) -> dict[str, float]:
    """FLOPs of a training step per token (see the top of this file)."""
    own = _pass_flops(student.layers, student.lm_head.weight, student.config, context_length)
    head = dense.model.get_output_embeddings().weight
    teacher = _pass_flops(dense.blocks, head, copied, context_length)
    shares = [1 - site.index / (2 * len(dense.blocks)) for site in dense.sites]
    passes, again = (len(shares), 1) if hybrid == "all" else (1, 0)
    share = sum(shares) / len(shares)
    to_sparse, to_dense = own.behind(share), teacher.behind(share)
    if hybrid == "multi":
        to_sparse, to_dense = own.behind(1), teacher.behind(1)
    return {
        "dense pass": teacher.behind(1),
        "student, forward and backward": 3 * own.behind(1),
        "hybrid, student's part": passes * (3 + again) * to_sparse,
        "hybrid, dense part": passes * (2 + again) * to_dense,
        "bridges": 12.0 * len(shares) * dense.width * student.config.hidden_size,
    }


def _pass_flops(blocks: nn.Module, head: Tensor, config: StudentConfig, context_length: int) -> PassFlops:
    matrices = sum(p.numel() for p in blocks.parameters() if p.ndim >= 2)
    mixed = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return PassFlops(2.0 * (matrices + context_length * mixed), 2.0 * head.numel())


def gemm_speed(bf16: bool) -> float:
    """FLOP/s of a large square matrix product here: the best of a few, in a second at most.

    Sizes grow as long as a product takes next to no time: a CPU without bf16 of its own takes seconds for a
    large one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 256
    while True:
        matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        seconds = min(_product_seconds(matrix) for _ in range(5))
        if size >= GEMM_SIZE[device] or seconds > NEXT_TO_NO_TIME:
            return 2 * size**3 / seconds
        size *= 2


def _product_seconds(matrix: Tensor) -> float:
    started = time.perf_counter()
    matrix @ matrix
    if matrix.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
