"""Dense checkpoint -> weight-sparse student and bridges.

    accelerate launch recipes/train.py --config recipes/python/train.yaml --sparsity.density 0.125

1. Copy the dense model exactly into a student, turn its bases until the matrices are sparse.
2. Train student and bridges while density falls; after every step each matrix keeps its k largest weights.
3. Evaluate on held-out text and write student/, bridges/ and evaluation.json into the run folder.

Density 1.0 (without AbsTopK) needs no training: the result is an exact, turned view of the dense model.
Killed, the same command resumes from the last checkpoint and ends in the same weights.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor

from bridges.bridge import BridgeSet
from bridges.cards import write_cards
from bridges.checkpoint import DenseConfig
from bridges.coupled import CoupledModel, LossConfig
from bridges.dense import DenseModel
from bridges.evaluate import (
    compare_on_text,
    evaluate_bridges,
    evaluate_mixtures,
    load_plain,
    measure_energies_,
    measure_placement,
)
from bridges.hub import resolve_folder
from bridges.plan import describe, plan
from bridges.run_models import run_text
from bridges.start import check_goes_on, make_start, shape_of
from bridges.warm_start import StudentShape
from extractor.artifacts import (
    SCHEMA_VERSION,
    claim_run_folder,
    fingerprint,
    remove_folder,
    replace_folder,
    update_manifest,
    write_json,
)
from extractor.checkpoints import (
    checkpoint_step,
    load_optimizer,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
)
from extractor.config import Config, dump_config, run_recipe
from extractor.data import DataConfig, TokenBlocks
from extractor.errors import UsageError
from extractor.machine import Precision, fast_fp32, mixed_precision, start_processes, to_device, use_all_cores
from extractor.neurons import dead_neurons, revive_
from extractor.rotation import RotationConfig
from extractor.scores import WeightScores
from extractor.sparsity import SparsityConfig, WeightSparsifier, anneal
from extractor.student import Student
from extractor.text import describe_data
from extractor.training import (
    Meter,
    MetricsFile,
    OptimizerConfig,
    StopSignals,
    Watch,
    WatchConfig,
    control_gradients_,
    is_due,
    learning_rate,
    make_optimizer,
    mean_over_processes,
)


class TrainConfig(Config):
    dense: DenseConfig = DenseConfig()
    run: Path = Path("runs/python")
    """The run folder; must be new, or hold a run of the same config, which is then resumed."""
    from_run: Path | None = None
    """A finished run of the same dense model to go on from: density falls from its student's, and
    `student.*` is taken from it. Without, the student is made of the dense model."""
    data: DataConfig = DataConfig()
    student: StudentShape = StudentShape()
    rotation: RotationConfig = RotationConfig()
    sparsity: SparsityConfig = SparsityConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    max_steps: int = Field(500, ge=0)
    per_device_train_batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_train_tokens: int = Field(2_000_000, ge=1)
    """Text read before the first repetition."""
    eval_blocks: int = Field(512, ge=1)
    """Held-out blocks for the losses."""
    bridge_eval_blocks: int = Field(32, ge=1)
    """Held-out blocks for every single-switch pass."""
    num_mixtures: int = Field(64, ge=1)
    """Random paths that switch between the models at several sites, evaluated at the end."""
    mixture_eval_blocks: int = Field(8, ge=1)
    """Held-out blocks for each of them."""
    logging_steps: int = Field(10, ge=1)
    save_steps: int = Field(200, ge=1)
    watch: WatchConfig = WatchConfig()
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """An Accelerate tracker beside metrics.jsonl; its package must be installed."""
    precision: Precision = "auto"
    """`auto`: bf16 autocast where the hardware is fast at it, else fp32. Weights stay fp32."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights are rounded to it before they are evaluated; bfloat16 halves the files."""
    dry_run: bool = False
    """Print what the run would need, from the checkpoint's config alone, and stop."""
    plan_from: Path | None = None
    """A folder whose config.json stands for the checkpoint's in a dry run, so that it needs no hub."""
    seed: int = 0


def main(config: TrainConfig) -> None:
    if config.from_run is not None:
        check_goes_on(config.from_run, config.student, config.sparsity)
        config = config.model_copy(update={"student": shape_of(config.from_run)})
    if config.dry_run:
        return show_plan(config)
    use_all_cores()
    fast_fp32()
    set_seed(config.seed)
    start_processes()
    accelerator = Accelerator(
        mixed_precision=mixed_precision(config.precision),
        cpu=not torch.cuda.is_available(),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.run,
    )
    is_sharded = config.dense.placement == "shard" and accelerator.num_processes > 1
    refuse_combinations(config, is_sharded)
    dense = DenseModel.from_pretrained(config.dense, device=accelerator.device)
    train, held_out = run_text(config.data, dense, config.max_train_tokens, config.eval_blocks)
    # Beside the config: a branch may hold other weights, a launcher another number of processes.
    claim = f"{dump_config(config)}# dense sha256 {dense.sha256}\n# processes {accelerator.num_processes}\n"
    if config.from_run is not None:
        claim += f"# from student sha256 {fingerprint(config.from_run / 'student')}\n"
    claim_run_folder(config.run, claim, is_writer=accelerator.is_main_process)
    if (config.run / "evaluation.json").is_file():
        accelerator.print(f"'{config.run}' is already trained with this config; nothing to do")
        return
    accelerator.init_trackers("sparsebridge", config={"run": str(config.run)})

    plain = load_plain(config.dense, dense)
    placement = measure_placement(dense, plain, held_out.first(8))
    start = make_start(
        plain, config.student, config.rotation, config.from_run, show_progress=accelerator.is_main_process
    )
    student, bridges = start.student.to(accelerator.device), start.bridges.to(accelerator.device)
    measure_energies_(dense, student, bridges, *train.sample(32))
    initial = compare_on_text(plain, student, *held_out.sample(config.bridge_eval_blocks))
    del plain
    accelerator.print(
        f"student: {student.num_parameters():,} parameters, KL(dense || student) "
        f"{initial['kl_dense']:.1e} nats/token before training"
    )
    if is_sharded:
        dense.shard_(accelerator.device)
    coupled = CoupledModel(student, bridges, dense, config.loss)
    num_steps = steps_needed(config, accelerator)
    train_tokens = train_student(config, accelerator, coupled, train, num_steps, start.densities)
    student, bridges = coupled.whole()
    student.set_activation_frac(config.student.activation_frac)
    dtype = getattr(torch, config.save_dtype)
    for parameter in (*student.parameters(), *bridges.parameters()):
        parameter.data = parameter.data.to(dtype).float()  # what is evaluated is what is saved
    measure_energies_(dense, student, bridges, *train.sample(32))
    if accelerator.is_main_process:
        if is_sharded:  # evaluated by this process alone, so whole again
            dense = DenseModel.from_pretrained(config.dense, device=accelerator.device)
        train_tokens += start.tokens
        save_results(config, dense, student.eval(), bridges, held_out, initial, placement, train_tokens)
        update_manifest(
            config.run,
            "train",
            inputs={
                "dense": dense.facts,
                **start.facts,
                "train_text_sha256": train.digest,
                "held_out_text_sha256": held_out.digest,
                "train_text": train.facts,
                "held_out_text": held_out.facts,
            },
            outputs=[config.run / name for name in ("student", "bridges", "evaluation.json")],
            seed=config.seed,
        )
        write_cards(config.run)
    accelerator.end_training()


def refuse_combinations(config: TrainConfig, is_sharded: bool) -> None:
    """Raises UsageError for keys that do not go together."""
    if is_sharded and (config.loss.hybrid_sites == "multi" or config.dense.quantization != "none"):
        raise UsageError("dense.placement shard goes with loss.hybrid_sites sampled or all, unquantised")
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UsageError(f"report_to {config.report_to}: the package is not installed; pip install it")


def show_plan(config: TrainConfig) -> None:
    """Parameters, tokens, memory and time of this config; no weight is read."""
    use_all_cores()
    without_weights = config.dense.model_copy(update={"random_weights": True})
    needed = plan(
        config.plan_from or resolve_folder(without_weights).path,
        config.student,
        sparsity=config.sparsity,
        hybrid=config.loss.hybrid_sites,
        batch_size=config.per_device_train_batch_size,
        context_length=config.data.context_length,
        num_steps=config.max_steps,
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
        quantization=config.dense.quantization,
        accumulation=config.gradient_accumulation_steps,
        bf16=mixed_precision(config.precision) == "bf16",
    )
    sys.stdout.write(f"{dump_config(config)}\n{describe_data(config.data)}\n{describe(needed)}\n")


def steps_needed(config: TrainConfig, accelerator: Accelerator) -> int:
    is_copy = config.student.start == "copy" and config.student.activation_frac is None
    is_view = is_copy and config.sparsity.density == 1
    if is_view and config.max_steps:
        accelerator.print("density 1.0: the turned copy is exact, nothing to train")
    return 0 if is_view else config.max_steps


def train_student(
    config: TrainConfig,
    accelerator: Accelerator,
    coupled: CoupledModel,
    train: TokenBlocks,
    num_steps: int,
    densities: Mapping[str, float],
) -> int:
    """The training loop; returns the tokens it used."""
    student, folder = coupled.student, config.run / "checkpoints"
    if num_steps == 0:
        WeightSparsifier(dict(student.named_parameters()), config.sparsity, num_steps).project_(0)
        return 0
    checkpoint = newest_checkpoint(folder)
    first_step = checkpoint_step(checkpoint)
    if checkpoint is not None:
        load_weights(checkpoint, coupled)
    model, optimizer = accelerator.prepare(coupled, make_optimizer(coupled, config.optimizer))
    if checkpoint is not None:
        load_optimizer(checkpoint, coupled, optimizer.optimizer)
    # After `prepare`: sharding puts other tensors in the place of the parameters.
    sparsifier = WeightSparsifier(dict(student.named_parameters()), config.sparsity, num_steps, densities)
    scores = WeightScores(student, config.sparsity.score, optimizer)
    if config.sparsity.revive_steps and any(isinstance(p, DTensor) for p in student.parameters()):
        raise UsageError("sparsity.revive_steps writes single weights, which FSDP2 shards; use DDP, or 0")
    metrics = MetricsFile(config.run / "metrics.jsonl", first_step, is_writer=accelerator.is_main_process)
    watch = Watch(config.run, config.watch, is_writer=accelerator.is_main_process)
    meter = Meter(accelerator, first_step, num_steps, tokens_per_step(config, accelerator))
    with StopSignals(accelerator) as signals, scores:
        for step in meter.steps():
            density = sparsifier.density(step)
            rate = learning_rate(step, num_steps, config.optimizer, density, config.sparsity.density)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if config.student.activation_frac is not None:
                target = config.student.activation_frac
                begin = 1.0 if config.from_run is None else target
                student.set_activation_frac(anneal(config.sparsity, target, step + 1, num_steps, begin))
            losses = accumulate_gradients(config, accelerator, model, train, step)
            norm = control_gradients_(accelerator, model.parameters(), config.optimizer)
            watch.step(optimizer, norm)
            density = sparsifier.project_(step + 1, scores.factors())
            optimizer.zero_grad()
            if is_due(step + 1, config.sparsity.revive_steps):
                revive_(student, seed=config.seed, step=step + 1)
                sparsifier.project_(step + 1, scores.factors())
            is_last = step + 1 == num_steps
            if is_due(step + 1, config.logging_steps) or is_last:
                row = mean_over_processes(losses, accelerator) | {
                    "grad_norm": float(norm),
                    "density": density,
                    "dead_neurons": float(sum(int(dead.sum()) for dead in dead_neurons(student))),
                    "skipped_steps": float(watch.check_skipped(step + 1, norm, losses)),
                }
                watch.check(step + 1, row)
                metrics.write({"step": step + 1, **row})
                accelerator.log(row, step=step + 1)
                meter.show(step + 1, row)
            may_ask = accelerator.num_processes == 1 or is_due(step + 1, config.logging_steps)
            is_stopping = may_ask and not is_last and signals.asked()
            if (is_due(step + 1, config.save_steps) or is_stopping) and not is_last:
                watch.check_skipped(step + 1, norm, losses)
                save_checkpoint(folder, coupled, optimizer.optimizer, step + 1, is_writer=watch.is_writer)
            if is_stopping:
                signals.stop(step + 1)
    return num_steps * tokens_per_step(config, accelerator)


def accumulate_gradients(
    config: TrainConfig, accelerator: Accelerator, model: torch.nn.Module, train: TokenBlocks, step: int
) -> dict[str, Tensor]:
    """Backward over a step's micro-batches; returns their mean losses on this process."""
    count = config.gradient_accumulation_steps
    sums: dict[str, Tensor] = {}
    for micro in range(count):
        batch = train.batch(
            step=step * count + micro,
            size=config.per_device_train_batch_size,
            seed=config.seed,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
        )
        batch = to_device(batch, accelerator.device)
        is_last = micro + 1 == count
        with nullcontext() if is_last else accelerator.no_sync(model):
            losses = model(batch, train.positions(batch), seed=config.seed, step=step)
            # Only Accelerate knows the scaler of its precision; the mean over micro-batches is ours.
            accelerator.backward(losses.total / count)
        for name, loss in losses._asdict().items():
            sums[name] = sums.get(name, 0) + loss.detach().float() / count
    return sums


def tokens_per_step(config: TrainConfig, accelerator: Accelerator) -> int:
    blocks = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return blocks * accelerator.num_processes * config.data.context_length


def save_results(
    config: TrainConfig,
    dense: DenseModel,
    student: Student,
    bridges: BridgeSet,
    held_out: TokenBlocks,
    initial: dict[str, float],
    placement: dict[str, Any],
    train_tokens: int,
) -> None:
    """Evaluate on held-out text; write student/, bridges/ and evaluation.json, drop checkpoints."""
    student.config.density = config.sparsity.density
    sparsifier = WeightSparsifier(dict(student.named_parameters()), config.sparsity, num_steps=1)
    matrices = sparsifier.count_nonzeros(student.sparse_matrices())
    final = compare_on_text(dense, student, *held_out.sample(config.eval_blocks))
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
            "density": config.sparsity.density,
            "dead_neurons": sum(int(dead.sum()) for dead in dead_neurons(student)),
            "activation_frac": config.student.activation_frac,
            "nonzeros": sum(int(p.count_nonzero()) for p in student.parameters()),
            "parameters": student.num_parameters(),
            "train_tokens": train_tokens,
            "matrices": matrices,
        },
        "bridges": evaluate_bridges(dense, student, bridges, *held_out.sample(config.bridge_eval_blocks)),
        "mixtures": evaluate_mixtures(
            dense,
            student,
            bridges,
            *held_out.sample(config.mixture_eval_blocks),
            count=config.num_mixtures,
            seed=config.seed,
        ),
        "held_out_tokens": held_out.num_tokens,
    }

    dtype = getattr(torch, config.save_dtype)

    def write(folder: Path) -> None:
        student.save_pretrained(folder, state_dict={k: v.to(dtype) for k, v in student.state_dict().items()})
        dense.tokenizer.save_pretrained(folder)

    replace_folder(config.run / "student", write)
    bridges.save_pretrained(config.run / "bridges", dtype, dense_sha256=dense.sha256)
    write_json(config.run / "evaluation.json", evaluation)
    remove_folder(config.run / "checkpoints")


if __name__ == "__main__":
    run_recipe(main, TrainConfig, None)
