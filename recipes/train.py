"""Dense checkpoint -> weight-sparse student and bridges.

    accelerate launch recipes/train.py --config recipes/python/train.yaml --sparsity.density 0.125

1. Copy the dense model exactly into a student, turn its bases until the matrices are sparse.
2. Train student and bridges together while density falls to its target; after every step each matrix
   is projected to exactly its k largest weights.
3. Evaluate on held-out text and write student/, bridges/ and evaluation.json into the run folder.

Density 1.0 (without AbsTopK) needs no training: the result is an exact, turned view of the dense model.
Killed, the same command resumes from the last checkpoint and ends in the same weights.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from bridges.bridge import BridgeSet
from bridges.checkpoint import DenseConfig, probe_error
from bridges.coupled import CoupledLosses, CoupledModel, LossConfig
from bridges.dense import DenseModel
from bridges.evaluate import compare_on_text, evaluate_bridges, measure_energies_
from bridges.warm_start import StudentShape, make_student
from extractor.artifacts import (
    SCHEMA_VERSION,
    claim_run_folder,
    load_checkpoint,
    replace_folder,
    save_checkpoint,
    update_manifest,
    write_json,
    write_text,
)
from extractor.config import Config, dump_config, run_recipe
from extractor.data import DataConfig, load_blocks
from extractor.errors import DivergedError
from extractor.machine import Precision, mixed_precision, start_processes, use_all_cores
from extractor.rotation import RotationConfig
from extractor.sparsity import SparsityConfig, WeightSparsifier, anneal, num_kept
from extractor.student import Student

PROBE_BLOCKS = 8  # for the error of a quantised dense model


class TrainConfig(Config):
    dense: DenseConfig = DenseConfig()
    run: Path = Path("runs/python")
    """The run folder; must be new, or hold a run of the same config, which is then resumed."""
    data: DataConfig = DataConfig()
    student: StudentShape = StudentShape()
    rotation: RotationConfig = RotationConfig()
    sparsity: SparsityConfig = SparsityConfig()
    loss: LossConfig = LossConfig()
    max_steps: int = Field(540, ge=0)
    per_device_train_batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(4e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_train_tokens: int = Field(2_000_000, ge=1)
    """Text read before the first repetition."""
    eval_blocks: int = Field(512, ge=1)
    """Held-out blocks for the losses."""
    bridge_eval_blocks: int = Field(32, ge=1)
    """Held-out blocks for the per-site table, which runs every single-switch pass."""
    logging_steps: int = Field(10, ge=1)
    save_steps: int = Field(200, ge=1)
    precision: Precision = "auto"
    """`auto`: bf16 autocast where the hardware is fast at it, else fp32. Weights stay fp32."""
    seed: int = 0


def main(config: TrainConfig) -> None:
    use_all_cores()
    set_seed(config.seed)
    start_processes()
    accelerator = Accelerator(
        mixed_precision=mixed_precision(config.precision), cpu=not torch.cuda.is_available()
    )
    dense = DenseModel.from_pretrained(config.dense, device=accelerator.device)
    train = load_blocks(config.data, dense.tokenizer, "train", max_tokens=config.max_train_tokens)
    held_out_tokens = config.eval_blocks * config.data.context_length
    held_out = load_blocks(config.data, dense.tokenizer, "held_out", max_tokens=held_out_tokens)
    # The hash too: a folder or a branch may hold other weights when a killed run goes on.
    claim = f"{dump_config(config)}# dense sha256 {dense.sha256}\n"
    claim_run_folder(config.run, claim, is_writer=accelerator.is_main_process)
    if (config.run / "evaluation.json").is_file():
        accelerator.print(f"'{config.run}' is already trained with this config; nothing to do")
        return

    plain = load_plain(config, dense)
    placement = measure_placement(dense, plain, held_out.first(PROBE_BLOCKS))
    student, bridges = make_student(
        plain, config.student, config.rotation, show_progress=accelerator.is_main_process
    )
    student, bridges = student.to(accelerator.device), bridges.to(accelerator.device)
    measure_energies_(dense, student, bridges, train.first(32))
    initial = compare_on_text(plain, student, held_out.first(config.bridge_eval_blocks))
    del plain
    accelerator.print(
        f"student: {student.num_parameters():,} parameters, KL(dense || student) "
        f"{initial['kl_dense']:.1e} nats/token before training"
    )
    coupled = CoupledModel(student, bridges, dense, config.loss)
    num_steps = steps_needed(config, accelerator)
    train_tokens = train_student(config, accelerator, coupled, train, num_steps)
    student.set_activation_frac(config.student.activation_frac)
    measure_energies_(dense, student, bridges, train.first(32))
    if accelerator.is_main_process:
        save_results(config, dense, student.eval(), bridges, held_out, initial, placement, train_tokens)
        update_manifest(
            config.run,
            "train",
            inputs={
                "dense": dense.facts,
                "train_text_sha256": train.digest,
                "held_out_text_sha256": held_out.digest,
            },
            outputs=[config.run / name for name in ("student", "bridges", "evaluation.json")],
            seed=config.seed,
        )
    accelerator.wait_for_everyone()


def load_plain(config: TrainConfig, dense: DenseModel) -> DenseModel:
    """The model whose weights a student can be copied from: in full precision, adapter merged."""
    if dense.facts["quantization"] == "none" and dense.facts["adapter_mode"] != "live":
        return dense
    return DenseModel.from_pretrained(config.dense, device=dense.device, plain=True)


@torch.no_grad()
def measure_placement(dense: DenseModel, plain: DenseModel, blocks: Tensor) -> dict[str, Any]:
    """How the dense model is held, and how far that is from its full precision on held-out text."""
    kind = {key: dense.facts[key] for key in ("quantization", "adapter", "adapter_mode")}
    if dense is plain:
        return kind | {"probe_kl": 0.0, "probe_max_logit_error": 0.0}
    ids = blocks.to(dense.device)
    error = probe_error(dense.run(ids, record=False).logits, plain.run(ids, record=False).logits)
    return kind | {"probe_kl": error["kl"], "probe_max_logit_error": error["max_logit"]}


def steps_needed(config: TrainConfig, accelerator: Accelerator) -> int:
    is_view = (
        config.student.start == "copy"
        and config.sparsity.density == 1
        and config.student.activation_frac is None
    )
    if is_view and config.max_steps:
        accelerator.print("density 1.0: the turned copy is exact, nothing to train")
    return 0 if is_view else config.max_steps


def train_student(
    config: TrainConfig, accelerator: Accelerator, coupled: CoupledModel, train, num_steps: int
) -> int:
    """The training loop; returns the tokens it used."""
    student = coupled.student
    sparsifier = WeightSparsifier(student.sparse_matrices(), config.sparsity, num_steps)
    tokens_per_step = config.per_device_train_batch_size * config.data.context_length
    tokens_per_step *= accelerator.num_processes
    if num_steps == 0:
        sparsifier.project_(0)
        return 0
    optimizer = torch.optim.AdamW(
        [p for p in coupled.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )
    first_step = load_checkpoint(config.run / "checkpoints", coupled, optimizer)
    metrics = MetricsFile(config.run / "metrics.jsonl", first_step, accelerator)
    model, optimizer = accelerator.prepare(coupled, optimizer)
    bar = tqdm(
        range(first_step, num_steps),
        desc="train",
        initial=first_step,
        total=num_steps,
        disable=not accelerator.is_main_process,
        mininterval=2,
    )
    started = time.monotonic()
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, config)
        batch = train.batch(
            step=step,
            size=config.per_device_train_batch_size,
            seed=config.seed,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
        ).to(accelerator.device)
        if config.student.activation_frac is not None:
            frac = anneal(config.sparsity, config.student.activation_frac, step + 1, num_steps)
            student.set_activation_frac(frac)
        losses = model(batch, seed=config.seed, step=step)
        accelerator.backward(losses.total)
        accelerator.clip_grad_norm_(coupled.parameters(), config.max_grad_norm)
        optimizer.step()
        density = sparsifier.project_(step + 1)
        optimizer.zero_grad()
        if (step + 1) % config.logging_steps == 0 or step + 1 == num_steps:
            row = summarise(losses, accelerator)
            if not all(abs(value) < float("inf") for value in row.values()):
                raise DivergedError(f"step {step + 1}: loss is not finite ({row}); lower learning_rate")
            seconds = (time.monotonic() - started) / (step + 1 - first_step)
            metrics.write({"step": step + 1, "density": density, **row})
            bar.set_postfix(
                kl=f"{row['kl']:.3f}",
                density=f"{density:.3f}",
                tok_s=f"{tokens_per_step / seconds:.0f}",
                refresh=False,
            )
        if (step + 1) % config.save_steps == 0 and accelerator.is_main_process:
            save_checkpoint(config.run / "checkpoints", coupled, optimizer.optimizer, step + 1)
    return num_steps * tokens_per_step


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then linear to a twentieth."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = 1 - 0.95 * step / max(1, num_steps)
    return config.learning_rate * min(warm, left)


def summarise(losses: CoupledLosses, accelerator: Accelerator) -> dict[str, float]:
    """Means over processes of every loss."""
    stacked = torch.stack([loss.detach().float() for loss in losses])
    reduced = accelerator.reduce(stacked, reduction="mean").tolist()
    return dict(zip(losses._fields, reduced, strict=True))


class MetricsFile:
    """metrics.jsonl: one line per logged step, none twice after a resume."""

    def __init__(self, path: Path, first_step: int, accelerator: Accelerator):
        self.path = path
        self.is_writer = accelerator.is_main_process
        if self.is_writer:
            lines = path.read_text().splitlines() if path.is_file() else []
            kept = [line for line in lines if json.loads(line)["step"] <= first_step]
            write_text(path, "".join(line + "\n" for line in kept))

    def write(self, row: dict[str, float]) -> None:
        if self.is_writer:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")


def save_results(
    config: TrainConfig,
    dense: DenseModel,
    student: Student,
    bridges: BridgeSet,
    held_out,
    initial: dict[str, float],
    placement: dict[str, Any],
    train_tokens: int,
) -> None:
    """Evaluate on held-out text; write student/, bridges/ and evaluation.json, drop checkpoints."""
    density = config.sparsity.density
    student.config.density = density
    matrices = {
        name: {
            "shape": list(matrix.shape),
            "k": num_kept(matrix.numel(), density) if density < 1 else matrix.numel(),
            "nonzeros": int(matrix.count_nonzero()),
        }
        for name, matrix in student.sparse_matrices().items()
    }
    final = compare_on_text(dense, student, held_out.first(config.eval_blocks))
    evaluation = {
        "schema_version": SCHEMA_VERSION,
        "dense": {
            "name": dense.name,
            "sha256": dense.sha256,
            "ce": final["dense_ce"],
            "placement": placement,
        },
        "student": {
            "ce": final["ce"],
            "kl_dense": final["kl_dense"],
            "init_kl_dense": initial["kl_dense"],
            "density": density,
            "activation_frac": config.student.activation_frac,
            "nonzeros": sum(int(p.count_nonzero()) for p in student.parameters()),
            "parameters": student.num_parameters(),
            "train_tokens": train_tokens,
            "matrices": matrices,
        },
        "bridges": evaluate_bridges(dense, student, bridges, held_out.first(config.bridge_eval_blocks)),
        "held_out_tokens": held_out.num_tokens,
    }

    def write(folder: Path) -> None:
        student.save_pretrained(folder)
        dense.tokenizer.save_pretrained(folder)

    replace_folder(config.run / "student", write)
    bridges.save_pretrained(config.run / "bridges", dense_sha256=dense.sha256)
    write_json(config.run / "evaluation.json", evaluation)
    shutil.rmtree(config.run / "checkpoints", ignore_errors=True)


if __name__ == "__main__":
    run_recipe(main, TrainConfig, None)
