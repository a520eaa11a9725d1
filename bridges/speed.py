"""What sparse and bridged training steps cost, as multiples of the dense step: rows of the benchmark.

Every row is measured in one interleaved run (`extractor.clock`) on random weights of a given shape. Rows
named `fast` use the compiled kernels (numba on a CPU, Triton on a GPU), rows named `plain` use none.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from bridges.coupled import CoupledModel, LossConfig
from bridges.dense import DenseModel
from bridges.losses import cross_entropy, kl_divergence, log_probs
from bridges.warm_start import StudentShape, make_student
from extractor.clock import Row, Work, interleave, ratio
from extractor.config import Config
from extractor.machine import has_fast_bf16
from extractor.rotation import RotationConfig
from extractor.selection import COMPILED_FROM, abs_topk, compiled
from extractor.sites import Recorder, node_addresses
from extractor.sparsity import SparsityConfig, WeightSparsifier
from extractor.student import Student
from extractor.student_config import StudentConfig


class ShapeConfig(Config):
    """The student that steps are timed on."""

    num_hidden_layers: int = Field(4, ge=1)
    hidden_size: int = Field(256, ge=32)
    head_dim: int = Field(16, ge=2)
    vocab_size: int = Field(2048, ge=2)
    context_length: int = Field(256, ge=2)
    batch_size: int = Field(8, ge=1)
    density: float = Field(1 / 64, gt=0, le=1)
    activation_frac: float = Field(0.25, gt=0, le=1)

    def student(self, activation_frac: float | None = None) -> StudentConfig:
        return StudentConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.hidden_size // self.head_dim,
            head_dim=self.head_dim,
            intermediate_size=4 * self.hidden_size,
            max_position_embeddings=self.context_length,
            activation_frac=activation_frac,
        )

    def dense(self, device: torch.device) -> DenseModel:
        """A dense model of half the student's width: a quarter of its matrix products."""
        width = self.hidden_size // 2
        config = GPT2Config(
            vocab_size=self.vocab_size,
            n_positions=self.context_length,
            n_embd=width,
            n_layer=self.num_hidden_layers,
            n_head=width // self.head_dim,
            bos_token_id=0,
            eos_token_id=0,
        )
        return DenseModel(GPT2LMHeadModel(config).to(device))

    def tokens(self, device: torch.device) -> Tensor:
        return torch.randint(self.vocab_size, (self.batch_size, self.context_length), device=device)


def kernel_choices(device: torch.device) -> tuple[str, ...]:
    """Without compiled kernels and, where they are installed, with them; a GPU has one way."""
    if device.type == "cuda":
        return ("fast",)
    has_numba = compiled(COMPILED_FROM) is not None
    return ("plain", "fast") if has_numba else ("plain",)


def precisions() -> tuple[str, ...]:
    return ("fp32", "bf16") if has_fast_bf16() else ("fp32",)


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """With numba's kernels, or without."""
    before = os.environ.pop("SPARSEBRIDGE_NO_NUMBA", None)
    try:
        if choice == "plain":
            os.environ["SPARSEBRIDGE_NO_NUMBA"] = "1"
        yield
    finally:
        os.environ.pop("SPARSEBRIDGE_NO_NUMBA", None)
        if before is not None:
            os.environ["SPARSEBRIDGE_NO_NUMBA"] = before


def using(choice: str, work: Work) -> Work:
    def run() -> None:
        with kernels(choice):
            work()

    return run


class Step:
    """One training step: loss, backward, fused AdamW and, with a sparse student, its projection."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], sparse: Student | None, density: float):
        self.loss = loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.sparsifier = None
        if sparse is not None:
            config = SparsityConfig(density=density, anneal_frac=0)
            self.sparsifier = WeightSparsifier(sparse.sparse_matrices(), config, 1)
            self.project()

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.project()
        self.optimizer.zero_grad()

    def project(self) -> None:
        if self.sparsifier is not None:
            self.sparsifier.project_(1)


def student_step(
    shape: ShapeConfig,
    device: torch.device,
    precision: str,
    *,
    sparse: bool,
    teacher: DenseModel | None = None,
) -> tuple[Step, Student]:
    """A next-token step of a student (with a teacher: towards its logits), sparse or dense."""
    student = Student(shape.student(shape.activation_frac if sparse else None)).to(device)
    ids = shape.tokens(device)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            own = log_probs(student(ids).logits)
            if teacher is None:
                return cross_entropy(own, ids)
            with torch.no_grad():
                reference = log_probs(teacher.run(ids, record=False).logits)
            return cross_entropy(own, ids) + kl_divergence(reference, own)

    return Step(student, loss, student if sparse else None, shape.density), student


def step_rows(shape: ShapeConfig, device: torch.device, rounds: int) -> list[Row]:
    """The sparse step against the dense one, the shares of AbsTopK and projection, and of matrix products."""
    rows = []
    for precision in precisions():
        dense, _ = student_step(shape, device, precision, sparse=False)
        sparse, student = student_step(shape, device, precision, sparse=True)
        topk = _through_topk(student, shape, device, precision)
        works: dict[str, Work] = {"dense": dense, "products": _products(shape, device, precision)}
        for choice in kernel_choices(device):
            works[f"step {choice}"] = using(choice, sparse)
            works[f"topk {choice}"] = using(choice, topk)
            works[f"projection {choice}"] = using(choice, sparse.project)
        times = interleave(works, rounds, device)
        for choice in kernel_choices(device):
            step = f"step {choice}"
            where = f"{precision}, {choice}"
            share = ratio(times, f"topk {choice}", step)
            rows.append(Row(f"sparse step / dense step, {where}", ratio(times, step, "dense")))
            rows.append(Row(f"AbsTopK / sparse step, {where}", share))
            share = ratio(times, f"projection {choice}", step)
            rows.append(Row(f"projection / sparse step, {where}", share))
        rows.append(
            Row(
                f"matrix products / dense step, {precision}",
                ratio(times, "products", "dense"),
            )
        )
    return rows


def _through_topk(student: Student, shape: ShapeConfig, device: torch.device, precision: str) -> Work:
    """AbsTopK, forward and backward, on one step's activations."""
    recorder = Recorder(*node_addresses(shape.num_hidden_layers))
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
        student(shape.tokens(device), tap=recorder)
    # What was recorded has been through AbsTopK: other values of the same shape and type stand for it.
    nodes = [torch.randn_like(x).requires_grad_() for x in recorder.activations.values()]
    gradients = [torch.randn_like(node) for node in nodes]

    def work() -> None:
        kept = [abs_topk(node, shape.activation_frac) for node in nodes]
        torch.autograd.grad(kept, nodes, gradients)

    return work


def _products(shape: ShapeConfig, device: torch.device, precision: str) -> Work:
    """The matrix products of a dense step, forward and backward: each layer's and the unembedding's."""
    width, tokens = shape.hidden_size, shape.batch_size * shape.context_length
    layer = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    sizes = layer * shape.num_hidden_layers + [(width, shape.vocab_size)]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    products = [
        (torch.randn(tokens, a, device=device, dtype=dtype), torch.randn(a, b, device=device, dtype=dtype))
        for a, b in sizes
    ]

    def work() -> None:
        for x, weight in products:
            y = x @ weight
            y @ weight.T  # the gradient of the input
            x.T @ y  # and of the weight

    return work


def optimizer_rows(device: torch.device, rounds: int, density: float) -> list[Row]:
    """AdamW with the projection against AdamW alone, on one matrix of 4 M weights."""
    matrix = nn.Linear(1024, 4096, bias=False, device=device)
    matrix.weight.grad = torch.randn_like(matrix.weight)
    optimizer = torch.optim.AdamW(matrix.parameters(), lr=1e-3, fused=True)
    config = SparsityConfig(density=density, anneal_frac=0)
    floored = config.model_copy(update={"min_weights_per_neuron": 4})
    # The name says which axis holds units, for the floor.
    parameters = {"layers.0.mlp.up_proj.weight": matrix.weight}
    free, floor = (WeightSparsifier(parameters, own, 1) for own in (config, floored))
    works: dict[str, Work] = {"adamw": optimizer.step}
    for choice in kernel_choices(device):
        works[f"free {choice}"] = using(choice, lambda: (optimizer.step(), free.project_(1)))
        works[f"project {choice}"] = using(choice, lambda: (matrix.weight.data.normal_(), free.project_(1)))
        works[f"floor {choice}"] = using(choice, lambda: (matrix.weight.data.normal_(), floor.project_(1)))
    works["normal"] = lambda: matrix.weight.data.normal_()
    times = interleave(works, rounds, device)
    rows = []
    for choice in kernel_choices(device):
        for kind in ("project", "floor"):  # without the time that fresh weights take
            times[f"{kind} {choice}"] = [
                a - b for a, b in zip(times[f"{kind} {choice}"], times["normal"], strict=True)
            ]
        rows.append(
            Row(
                f"(AdamW + projection) / AdamW, 4 M weights, {choice}",
                ratio(times, f"free {choice}", "adamw"),
            )
        )
        floor_cost = ratio(times, f"floor {choice}", f"project {choice}")
        rows.append(Row(f"projection with a floor of 4 / without, {choice}", floor_cost))
    return rows


def bridged_rows(shape: ShapeConfig, device: torch.device, rounds: int) -> list[Row]:
    """A step with every term of the training loss against the dense step; the dense model runs once in it."""
    dense_model = shape.dense(device)
    heads = shape.hidden_size // shape.head_dim
    own = StudentShape(
        start="random",
        hidden_size=shape.hidden_size,
        intermediate_size=4 * shape.hidden_size,
        num_attention_heads=heads,
    )
    rows, ids = [], shape.tokens(device)
    for precision in precisions():
        student, bridges = make_student(dense_model, own, RotationConfig(enabled=False))
        student.set_activation_frac(shape.activation_frac)
        steps = {}
        for sites in ("sampled", "all"):
            model = CoupledModel(
                student.to(device), bridges.to(device), dense_model, LossConfig(hybrid_sites=sites)
            )
            count = iter(range(10**9))

            def loss(
                model: CoupledModel = model, count: Iterator[int] = count, bf16: bool = precision == "bf16"
            ) -> Tensor:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    return model(ids, seed=0, step=next(count)).total

            steps[sites] = Step(model, loss, student, shape.density)
        distilled, _ = student_step(shape, device, precision, sparse=True, teacher=dense_model)
        plain, _ = student_step(shape, device, precision, sparse=True)
        dense, _ = student_step(shape, device, precision, sparse=False)

        def teacher(bf16: bool = precision == "bf16") -> None:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                log_probs(dense_model.run(ids, record=False).logits)

        works: dict[str, Work] = {"dense": dense, "teacher": teacher, "distilled": distilled, "plain": plain}
        works |= {f"bridged {choice}": using(choice, steps["sampled"]) for choice in kernel_choices(device)}
        works["all"] = steps["all"]
        times = interleave(works, rounds, device)
        for choice in kernel_choices(device):
            name = f"bridged step / dense step, {precision}, {choice}"
            rows.append(Row(name, ratio(times, f"bridged {choice}", "dense")))
        rows.append(Row(f"bridged at all sites / dense step, {precision}", ratio(times, "all", "dense")))
        times["extra"] = [a - b for a, b in zip(times["distilled"], times["plain"], strict=True)]
        rows.append(Row(f"cost of the teacher / its forward, {precision}", ratio(times, "extra", "teacher")))
    return rows
