"""Twenty steps of the recipe's own loop functions on a tiny model, on however many processes there are.

    torchrun --nproc_per_node 2 -m tests.recipes.worker <mode> <batch> <accumulation> <out> [last]

Modes: `ddp`; `fsdp`, sharded by hand as Accelerate would on GPUs (1.15 starts FSDP on no CPU); `shard`, with
the dense model sharded; `nan`, where one process's loss is no number, once. With `last` it stops after that
many steps; started again on the same folder it goes on from its checkpoint. Writes what every process saw:
losses of each step, the whole gradient of the first, whether every matrix had exactly k nonzeros after each
step, and the final weights.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bridges.coupled import CoupledModel
from bridges.dense import DenseModel
from bridges.evaluate import measure_energies_
from bridges.warm_start import make_student
from extractor.checkpoints import (
    checkpoint_step,
    load_optimizer,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
)
from extractor.data import TokenBlocks
from extractor.machine import whole
from extractor.sparsity import WeightSparsifier
from extractor.training import Watch, WatchConfig, control_gradients_
from recipes.train import TrainConfig, accumulate_gradients
from tests.conftest import tiny_gpt2

STEPS = 20


def main(mode: str, batch: int, accumulation: int, out: Path, last: int = STEPS) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    config = TrainConfig.model_validate(
        {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "rotation": {"enabled": False},
            "sparsity": {"density": 0.2, "anneal_frac": 0.5},
            "data": {"context_length": 16},
        }
    )
    dense = DenseModel(tiny_gpt2())
    blocks = np.random.default_rng(0).integers(1, 97, (64, 16), dtype=np.int32)
    train = TokenBlocks(blocks, "worker")
    student, bridges = make_student(dense, config.student, config.rotation)
    measure_energies_(dense, student, bridges, train.first(16))
    if mode == "shard":
        dense.shard_(accelerator.device)
    coupled = CoupledModel(student.train(), bridges, dense, config.loss)
    checkpoint = newest_checkpoint(out / "checkpoints")
    if checkpoint is not None:
        load_weights(checkpoint, coupled)
    if mode == "fsdp":
        mesh = init_device_mesh("cpu", (accelerator.num_processes,))
        for layer in student.layers:
            fully_shard(layer, mesh=mesh)
        model = fully_shard(coupled, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    else:
        optimizer = torch.optim.AdamW(coupled.parameters(), lr=1e-3, fused=True)
        model, optimizer = accelerator.prepare(coupled, optimizer)
    inner = getattr(optimizer, "optimizer", optimizer)
    if checkpoint is not None:
        load_optimizer(checkpoint, coupled, inner)
    sparsifier = WeightSparsifier(dict(student.named_parameters()), config.sparsity, STEPS)
    record: dict[str, list] = {"losses": [], "exact": [], "taken": []}
    watch = Watch(out, WatchConfig(max_skipped=2), is_writer=False)
    gradients = {}
    for step in range(checkpoint_step(checkpoint), last):
        if mode == "nan" and step == 3 and accelerator.process_index == 1:
            coupled.config = config.loss.model_copy(update={"ce": math.nan})
        losses = accumulate_gradients(config, accelerator, model, train, step)
        coupled.config = config.loss
        mean = accelerator.reduce(torch.stack(list(losses.values())), reduction="mean")
        record["losses"].append(mean.tolist())
        if step == 0:
            gradients = {name: whole(p.grad).clone() for name, p in coupled.named_parameters()}
        norm = control_gradients_(accelerator, model.parameters(), config.optimizer)
        watch.step(optimizer, norm)
        record["taken"].append(watch.check_skipped(step + 1, norm, losses) == 0)
        sparsifier.project_(step + 1)
        counts = {name: int(whole(p).count_nonzero()) for name, p in sparsifier.parameters.items()}
        record["exact"].append(all(n == sparsifier.num_kept(name, step + 1) for name, n in counts.items()))
        optimizer.zero_grad()
        if step == STEPS // 2:  # an evaluation in between must not lose the projection (FSDP2)
            with torch.no_grad():
                model(train.first(2), seed=0, step=step)
    is_writer = accelerator.is_main_process
    save_checkpoint(out / "checkpoints", coupled, inner, last, is_writer=is_writer)
    weights = {name: whole(p).detach().clone() for name, p in coupled.named_parameters()}
    loaded, _ = coupled.whole()
    record["whole"] = all(
        torch.equal(value, weights[f"student.{name}"]) for name, value in loaded.named_parameters()
    )
    out.mkdir(parents=True, exist_ok=True)
    rank = accelerator.process_index
    (out / f"record-{rank}.json").write_text(json.dumps(record))
    if is_writer and gradients:
        save_file(gradients, out / "gradients.safetensors")
    if is_writer:
        save_file(weights, out / "weights.safetensors")
    # torch 2.13 can hang where the last reference to a gloo group goes while a thread of the group still
    # wants the interpreter lock, so: the model first, then a barrier, then the group.
    del model
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), *map(int, sys.argv[5:]))
