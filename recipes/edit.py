"""Circuits and bridges -> edits of the dense model, measured beside their controls.

    accelerate launch recipes/edit.py --config recipes/python/edit.yaml

Per circuit: nodes and site are chosen on training prompts by the indirect effect, then the edit is
measured on held-out prompts. Reads student/, bridges/, circuits/ and evaluation.json of a run folder, writes
edits/<task>/. With `ship.adapter` there is an adapter/ for PEFT in it, with `ship.merged` a whole checkpoint
in merged/, both loaded again in a fresh process and compared with the live edit. An edit that does not meet
`limits` is saved with the reasons, and neither shipped nor loaded, unless `force`.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field
from tqdm.auto import tqdm

from bridges.bridge import BridgeSet
from bridges.checkpoint import DenseConfig, check_same_tokenizer
from bridges.choose import EditConfig, PromptStreams, choose_edit, measure_edit
from bridges.crossing import Source
from bridges.dense import DenseModel
from bridges.edit import Edit, EditLimits, Hashes, add_facts, unmet_limits
from bridges.edit_adapter import export_adapter, export_merged
from bridges.fresh import compare_exports
from bridges.live import LiveEdit
from bridges.low_rank import Prompts
from extractor.artifacts import fingerprint, read_json, update_manifest
from extractor.circuit import Circuit
from extractor.config import Config, run_recipe
from extractor.errors import InputError, UsageError
from extractor.machine import fast_fp32, start_processes, use_all_cores
from extractor.student import load_student
from extractor.tasks import TaskBatch, encode_pairs, make_pairs


class ShipConfig(Config):
    """In which forms others get the edits, besides edit.json."""

    adapter: bool = False
    """A PEFT adapter fitted on the training prompts, and on the other tasks' as text to leave alone."""
    merged: bool = False
    """The adapter merged into a whole checkpoint; needs `adapter`."""
    rank: int = Field(16, ge=1)
    """Largest rank of a fitted adapter."""


class EditRecipeConfig(Config):
    run: Path = Path("runs/python")
    """The run folder of recipes/train.py and recipes/extract.py."""
    dense: DenseConfig = DenseConfig()
    tasks: tuple[str, ...] = ()
    """Which circuits; empty: all of the run."""
    edit: EditConfig = EditConfig()
    source: Source = "student"
    """What tells the sparse activation: the `student` run alongside, or the `bridge`'s encoder on the dense
    model's own stream, which needs no student later."""
    limits: EditLimits = EditLimits()
    force: bool = False
    """Ship edits that do not meet the limits, too; the reasons stay in their files."""
    ship: ShipConfig = ShipConfig()
    train_pairs: int = Field(32, ge=2)
    """Training pairs on which site and nodes are chosen."""
    held_out_pairs: int = Field(64, ge=2)
    seed: int = 0


class Models:
    """Everything that edits are made with, loaded and checked once."""

    def __init__(self, config: EditRecipeConfig, circuits: list[Circuit], device: Any):
        self.config, self.circuits = config, circuits
        # an edit is one of the model itself, so it is chosen and measured in full precision
        self.dense = DenseModel.from_pretrained(config.dense, device=device, plain=True)
        self.student, self.tokenizer = load_student(config.run / "student", device)
        name = str(config.run / "student")
        check_same_tokenizer(self.tokenizer, name, self.dense.tokenizer, self.dense.name)
        self.bridges = BridgeSet.from_pretrained(config.run / "bridges").to(device)
        self.hashes = check_hashes(config, self.dense, circuits)
        self.bridge_facts = read_json(config.run / "evaluation.json", "evaluation", "recipes/train.py")[
            "bridges"
        ]

    def prompts(self, circuit: Circuit, split: str) -> TaskBatch:
        config, count = (
            self.config,
            self.config.train_pairs if split == "train" else self.config.held_out_pairs,
        )
        pairs = make_pairs(
            str(circuit.settings["prompts"]),
            self.tokenizer,
            split=split,
            count=count,
            seed=config.seed,
            max_tokens=self.student.config.max_position_embeddings,
        )
        return encode_pairs(pairs, self.tokenizer).to(self.dense.device)

    def streams(self, batch: TaskBatch) -> PromptStreams:
        return PromptStreams(self.dense, self.student, self.bridges, batch, source=self.config.source)


def main(config: EditRecipeConfig) -> None:
    if config.ship.merged and not config.ship.adapter:
        raise UsageError("ship.merged true merges the adapter; set ship.adapter true, too")
    use_all_cores()
    fast_fp32()
    state = start_processes()
    models = Models(config, load_circuits(config), state.device)
    mine = models.circuits[state.process_index :: state.num_processes]
    for circuit in (bar := tqdm(mine, desc="edit", disable=not state.is_main_process)):
        bar.write(make_edit(models, circuit))
    state.wait_for_everyone()
    if state.is_main_process:
        folders = [config.run / "edits" / circuit.task for circuit in models.circuits]
        update_manifest(
            config.run,
            "edit",
            inputs=vars(models.hashes),
            outputs=[folder for folder in folders if folder.is_dir()],
            config=config.model_dump(mode="json"),
        )


def make_edit(models: Models, circuit: Circuit) -> str:
    """Choose, measure, save and ship one task's edit; returns the line that says what came of it."""
    config, started = models.config, time.monotonic()
    train, held_out = (models.prompts(circuit, split) for split in ("train", "held_out"))
    chosen = choose_edit(models.streams(train), circuit, models.bridges, config.edit)
    if chosen is None:
        return f"{circuit.task}: the circuit reads no residual channel; no edit"
    edit = Edit.from_intervention(
        chosen.intervention.of_student(models.hashes.student_sha256),
        models.student,
        models.bridges,
        source=config.source,
        hashes=models.hashes,
    )
    edit = replace(edit, refusals=unmet_limits(edit, config.limits, models.bridge_facts))
    found = measure_edit(models.streams(held_out), chosen, models.bridges, config.edit, config.seed)
    folder = config.run / "edits" / circuit.task
    edit.save(folder, {"task": circuit.task, **found, "limits": config.limits.model_dump()})
    if config.ship.adapter and (config.force or not edit.refusals):
        add_facts(folder, ship(models, circuit, edit, folder, train, held_out))
    return describe(circuit.task, edit, found, time.monotonic() - started)


def ship(
    models: Models, circuit: Circuit, edit: Edit, folder: Path, train: TaskBatch, held_out: TaskBatch
) -> dict[str, Any]:
    """Adapter and merged checkpoint of an edit, with what a fresh process makes of them."""
    config, live = models.config.ship, LiveEdit(edit, models.dense, models.student)
    others = [models.prompts(other, "train") for other in models.circuits if other is not circuit]
    prompts = Prompts.of_task(held_out, live)
    facts = export_adapter(
        live,
        folder / "adapter",
        fit_on=[Prompts.of_task(train, live), *(Prompts(other.ids, other.last) for other in others)],
        held_out=[prompts],
        rank=config.rank,
    )
    merged = folder / "merged" if config.merged else None
    if merged is not None:
        export_merged(live, folder / "adapter", merged)
    return {"adapter": facts | compare_exports(live, folder / "adapter", prompts, merged)}


def load_circuits(config: EditRecipeConfig) -> list[Circuit]:
    folder = config.run / "circuits"
    names = config.tasks or sorted(path.stem for path in folder.glob("*.json"))
    if not names:
        raise InputError(f"no circuits in '{folder}'; recipes/extract.py writes them")
    return [Circuit.load(folder / f"{name}.json") for name in names]


def check_hashes(config: EditRecipeConfig, dense: DenseModel, circuits: list[Circuit]) -> Hashes:
    """The weights everything belongs to; circuits or bridges of other weights are refused."""
    student_sha256 = fingerprint(config.run / "student")
    for circuit in circuits:
        if circuit.student_sha256 != student_sha256:
            raise InputError(
                f"circuit '{circuit.task}' belongs to a student with weights "
                f"{circuit.student_sha256[:12]}, this run has {student_sha256[:12]}; extract it again"
            )
    header = read_json(config.run / "bridges" / "bridges.json", "bridges", "recipes/train.py")
    if header["dense_sha256"] != dense.sha256:
        raise InputError(
            f"the bridges in '{config.run}' were trained on a dense checkpoint with weights "
            f"{header['dense_sha256'][:12]}, '{dense.name}' has {dense.sha256[:12]}"
        )
    return Hashes(dense.sha256, student_sha256, fingerprint(config.run / "bridges"))


def describe(task: str, edit: Edit, found: dict[str, Any], seconds: float) -> str:
    best = max(range(len(found["strengths"])), key=lambda i: found["flip_rate_indirect"][i])
    line = (
        f"{task}: {found['size']} nodes at {edit.site}, strength {found['strengths'][best]}: flips "
        f"{found['flip_rate'][best]:.0%}, indirect {found['flip_rate_indirect'][best]:.0%}; controls "
        f"{found['control_random_node'][best]:.0%} and {found['control_random_direction'][best]:.0%} "
        f"({seconds:.0f} s)"
    )
    return f"{line}; refused: {'; '.join(edit.refusals)}" if edit.refusals else line


if __name__ == "__main__":
    run_recipe(main, EditRecipeConfig, None)
