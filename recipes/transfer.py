"""Do the student's circuits hold in the dense model? Monitors, removal of a circuit's image, attacks.

    accelerate launch recipes/transfer.py --config recipes/python/transfer.yaml

Per circuit, on the dense model: a monitor that reads the circuit's nodes through the bridge, with its alarms
on held-out, shifted and ordinary text beside linear probes; what is lost when the circuit's image is taken
out of the stream, beside random subspaces of the same energy; and inputs that the circuit predicts to break
the behaviour, beside random ones. Reads student/, bridges/ and circuits/ of a run folder, writes
monitors/<task>/, transfer/<task>.json and transfer.md.
"""

import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from tqdm.auto import tqdm

from bridges.attacks import AttackConfig, Prompts, attack_circuit, place_for
from bridges.checkpoint import DenseConfig
from bridges.image import ImageConfig, measure_image, stream_moments
from bridges.monitor import Monitor, MonitorConfig, MonitorHashes
from bridges.monitor_quality import measure_monitor, preceded_by_text
from bridges.run_models import RunModels
from bridges.transfer_table import transfer_table
from extractor.artifacts import SCHEMA_VERSION, file_sha256, read_json, update_manifest, write_json
from extractor.circuit import Circuit
from extractor.config import Config, run_recipe
from extractor.data import DataConfig
from extractor.errors import InputError
from extractor.machine import fast_fp32, shared_out, start_processes, use_all_cores
from extractor.statistics import undefined


class TransferConfig(Config):
    run: Path = Path("runs/python")
    """The run folder of recipes/train.py and recipes/extract.py."""
    dense: DenseConfig = DenseConfig()
    tasks: tuple[str, ...] = ()
    """Which circuits; empty: all of the run."""
    data: DataConfig = DataConfig()
    """The run's own text."""
    text_blocks: int = Field(64, ge=2)
    """Blocks of training and of held-out text."""
    shift_tokens: int = Field(64, ge=1)
    """Tokens of other text before a shifted prompt."""
    train_pairs: int = Field(32, ge=2)
    held_out_pairs: int = Field(48, ge=2)
    attacked_pairs: int = Field(24, ge=2)
    monitor: MonitorConfig = MonitorConfig()
    image: ImageConfig = ImageConfig()
    attack: AttackConfig = AttackConfig()
    seed: int = 0


class Bench:
    """The models of a run, its text, and what only has to be computed once."""

    def __init__(self, config: TransferConfig, device: torch.device):
        self.config = config
        self.models = RunModels(config.run, config.dense, device, config.seed)
        self.text = {
            split: self.models.text(config.data, split, config.text_blocks)[0]
            for split in ("train", "held_out")
        }
        self.moments = stream_moments(self.models.dense, self.text["train"], self.text["held_out"])
        self.held_out = {
            task: self.models.prompts(circuit, "held_out", config.held_out_pairs)
            for task, circuit in self.models.circuits.items()
        }


def main(config: TransferConfig) -> None:
    use_all_cores()
    fast_fp32()
    state = start_processes()
    bench = Bench(config, state.device)
    circuits = bench.models.chosen(config.tasks)
    mine = shared_out(circuits, state, config.run)
    total = len(circuits) if state.num_processes == 1 else None
    for circuit in (bar := tqdm(mine, total=total, desc="transfer", disable=not state.is_main_process)):
        bar.write(transfer(bench, circuit))
    if state.is_main_process:
        paths = [config.run / "transfer" / f"{circuit.task}.json" for circuit in circuits]
        table = transfer_table([read_json(path, "transfer", "recipes/transfer.py") for path in paths])
        (config.run / "transfer.md").write_text(table, encoding="utf-8")
        monitors = [config.run / "monitors" / circuit.task for circuit in circuits]
        update_manifest(
            config.run,
            "transfer",
            inputs=vars(bench.models.hashes),
            outputs=[config.run / "transfer.md", *paths, *(path for path in monitors if path.is_dir())],
            config=config.model_dump(mode="json"),
        )


def transfer(bench: Bench, circuit: Circuit) -> str:
    """Everything of one circuit; returns the line that says what came of it."""
    started = time.monotonic()
    found = {"schema_version": SCHEMA_VERSION, "task": circuit.task, "num_nodes": len(circuit.nodes)}
    for name, measure in (("monitor", watch), ("image", remove), ("attacks", attack)):
        try:
            found[name] = measure(bench, circuit) if circuit.nodes else undefined("the circuit is empty")
        except InputError as error:  # a circuit may read no channel at any site
            found[name] = undefined(str(error))
    write_json(bench.config.run / "transfer" / f"{circuit.task}.json", found)
    return f"{circuit.task}: done ({time.monotonic() - started:.0f} s)"


def watch(bench: Bench, circuit: Circuit) -> dict[str, Any]:
    """A monitor from training prompts, saved, and how well it does."""
    config, models = bench.config, bench.models
    train, calibration = (models.prompts(circuit, s, config.train_pairs) for s in ("train", "selection"))
    path = config.run / "circuits" / f"{circuit.task}.json"
    hashes = MonitorHashes(*vars(models.hashes).values(), file_sha256(path))
    monitor = Monitor.fit(
        models.dense, models.student, models.bridges, circuit, train, calibration, config.monitor, hashes
    )
    held_out, text = bench.held_out[circuit.task], bench.text["held_out"]
    end_of_text = models.tokenizer.eos_token_id
    shifted = preceded_by_text(held_out, text, config.shift_tokens, end_of_text, config.seed)
    sets = {"held_out": held_out, "shifted": shifted}
    found = measure_monitor(monitor, train, sets, text, config.monitor, config.seed)
    monitor.save(config.run / "monitors" / circuit.task, found)
    return {"site": str(monitor.site), "nodes": [str(node) for node in monitor.nodes], **found}


def remove(bench: Bench, circuit: Circuit) -> dict[str, Any]:
    """The circuit's image taken out of the dense stream."""
    own = {circuit.task: bench.held_out[circuit.task]}
    batches = own | bench.held_out  # its own task first
    text, dense = bench.text["held_out"], bench.models.dense
    return measure_image(
        dense, bench.models.bridges, circuit, batches, bench.moments, text, bench.config.image
    )


def attack(bench: Bench, circuit: Circuit) -> dict[str, Any]:
    """Inputs that the circuit predicts to fail, asked of the dense model."""
    config, models = bench.config, bench.models
    prompts = Prompts(
        models.pairs(circuit, "held_out", config.attacked_pairs),
        models.tokenizer,
        place_for(str(circuit.settings["prompts"])),
        models.student.config.max_position_embeddings,
        models.dense.device,
    )
    text = bench.text["held_out"]
    return attack_circuit(
        circuit, models.student, models.dense, models.carried(circuit), prompts, text, config.attack
    )


if __name__ == "__main__":
    run_recipe(main, TransferConfig, None)
