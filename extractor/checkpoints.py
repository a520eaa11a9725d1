"""Resumable checkpoints: safetensors and a state file with their hashes, whole or invisible.

The newest one that verifies wins. Gathered from and scattered to sharded tensors, so that a checkpoint does
not know on how many processes it was written.
"""

import json
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from extractor.artifacts import SCHEMA_VERSION, file_sha256, remove_folder, replace_folder, write_json
from extractor.errors import MachineError
from extractor.machine import whole

CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors")
CHECKPOINTS_KEPT = 2  # the newest may be torn by a failing disk; then the one before counts


def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    is_writer: bool = True,
    attempts: int = 3,
) -> None:
    """Weights and optimiser state after `step` steps, as `folder/checkpoint-<step>/`.

    Every process calls it: sharded tensors are gathered, and the writer writes. Data order and randomness
    are pure functions of (seed, step), so nothing else is needed to go on.

    Raises:
        MachineError: the disk refused it, `attempts` times; earlier checkpoints are untouched.
    """
    weights = {name: whole(value).detach().contiguous() for name, value in model.state_dict().items()}
    names = {id(p): name for name, p in model.named_parameters()}
    state = {
        f"{names[id(parameter)]}:{key}": whole(value).detach().contiguous()
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state[parameter].items()
    }
    if not is_writer:
        return

    def write(target: Path) -> None:
        save_file(_without_aliases(weights), target / "model.safetensors")
        save_file(state, target / "optimizer.safetensors")
        hashes = {name: file_sha256(target / name) for name in CHECKPOINT_FILES}
        write_json(target / "state.json", {"schema_version": SCHEMA_VERSION, "step": step, "sha256": hashes})

    for attempt in range(1, attempts + 1):
        try:
            replace_folder(folder / f"checkpoint-{step}", write)
            break
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder / f".tmp-checkpoint-{step}", ignore_errors=True)
            if attempt == attempts:
                raise MachineError(
                    f"checkpoint {step} cannot be written to '{folder}' ({error}); earlier ones are whole"
                ) from error
            time.sleep(2.0 ** (attempt - 2))
    for old in sorted(_checkpoints(folder), key=_step_of)[:-CHECKPOINTS_KEPT]:
        remove_folder(old)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are what its state says; what a kill left half-written goes."""
    for torn in folder.glob(".tmp-*"):
        shutil.rmtree(torn, ignore_errors=True)
    for checkpoint in sorted(_checkpoints(folder), key=_step_of, reverse=True):
        try:
            hashes = json.loads((checkpoint / "state.json").read_text())["sha256"]
            if all(file_sha256(checkpoint / name) == hashes[name] for name in CHECKPOINT_FILES):
                return checkpoint
        except (OSError, ValueError, KeyError):
            continue
    return None


def load_checkpoint(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest whole checkpoint below `folder`; returns its step (0 where there is none)."""
    newest = newest_checkpoint(folder)
    if newest is not None:
        load_weights(newest, model)
        load_optimizer(newest, model, optimizer)
    return checkpoint_step(newest)


def checkpoint_step(checkpoint: Path | None) -> int:
    """Steps taken before this checkpoint; 0 without one."""
    return 0 if checkpoint is None else _step_of(checkpoint)


@torch.no_grad()
def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Restore a model's weights, before it is sharded."""
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, value in model.state_dict().items():
        if key in weights:
            value.copy_(weights[key])


def load_optimizer(checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore an optimiser's state; sharded parameters take their part of it."""
    parameters = dict(model.named_parameters())
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, _, field = key.rpartition(":")
            value, parameter = file.get_tensor(key), parameters[name]
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            elif value.ndim:
                value = value.to(parameter.device)
            optimizer.state[parameter][field] = value


def _without_aliases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied weights once: safetensors refuses shared storage."""
    seen: set[int] = set()
    kept = {}
    for key, value in tensors.items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            kept[key] = value
    return kept


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if (path / "state.json").is_file()]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
