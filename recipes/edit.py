"""Circuits and bridges -> edits of the dense model, measured beside their controls.

    accelerate launch recipes/edit.py --config recipes/python/edit.yaml

Per circuit: nodes and site are chosen on training and selection prompts by the indirect effect, then the
edit is measured on held-out prompts, on held-out text and on the other tasks, and against what the student
predicts; with `alternatives.enabled` beside plain directions and a LoRA at equal off-target KL. Reads
student/, bridges/, circuits/ and evaluation.json of a run folder, writes edits/<task>/ and edits.md; with
`edit.nodes student` it needs no circuits, and without any edits the paper's tasks, unless others are named.
With `ship.adapter` there is an adapter/ for PEFT in it, with `ship.merged` a whole checkpoint in merged/,
both loaded again in a fresh process and compared with the live edit. An edit that does not meet `limits` is
saved with the reasons, and neither shipped nor loaded, unless `force`.
"""

import math
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from tqdm.auto import tqdm

from bridges.adapter_effect import adapter_effect, settle, unmet_by_adapter
from bridges.alternatives import (
    AlternativesConfig,
    alternatives_table,
    compare_alternatives,
    draw_alternatives,
)
from bridges.audit import EditAuditConfig, audit_edit
from bridges.checkpoint import DenseConfig
from bridges.choose import (
    Found,
    Growth,
    allowed_sites,
    edits_to_try,
    grow_edits,
    growth_facts,
    later_facts,
    unmet_in_training,
)
from bridges.crossing import Source
from bridges.dense import DenseModel
from bridges.edit import Edit, EditLimits, add_facts, unmet_limits
from bridges.edit_adapter import export_adapter, export_merged
from bridges.edit_controls import measure_edit, random_direction_rate
from bridges.edit_table import best_strength, edit_table
from bridges.fresh import compare_exports
from bridges.live import LiveEdit
from bridges.low_rank import Prompts
from bridges.off_target import HeldOutText
from bridges.plots import draw
from bridges.run_models import RunModels
from bridges.search import EditConfig
from bridges.steering import Direction
from bridges.steering_gate import Trial, best_direction, steering_forms
from bridges.streams import PromptStreams
from bridges.tails import PromptTails
from extractor.artifacts import read_json, remove_folder, update_manifest, write_text
from extractor.circuit import Circuit
from extractor.config import Config, run_recipe
from extractor.data import DataConfig
from extractor.errors import InputError, UsageError
from extractor.machine import fast_fp32, shared_out, start_processes, use_all_cores
from extractor.tasks import TaskBatch

MOST_TRIED = 3  # edits of a task; whether a gate can be found takes up to half a minute each


class ShipConfig(Config):
    """In which forms others get the edits, besides edit.json.

    An adapter is loaded again and measured by itself; one that does not meet `limits` is not kept, unless
    `force`, and edit.json says why.
    """

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
    """Which circuits; empty: all of the run. With `edit.nodes student` any task, as in recipes/extract.py;
    empty: those of the run's circuits, or without any the paper's."""
    edit: EditConfig = EditConfig()
    source: Source = "student"
    """What tells the sparse activation: the `student` run alongside, or the `bridge`'s encoder on the dense
    model's own stream, which needs no student later."""
    limits: EditLimits = EditLimits()
    force: bool = False
    """Ship edits that do not meet the limits, too; the reasons stay in their files."""
    ship: ShipConfig = ShipConfig()
    data: DataConfig = DataConfig()
    """The run's own text: off-target effects are measured on its held-out part."""
    text_blocks: int = Field(32, ge=2)
    """Held-out blocks for off-target effects."""
    audit: EditAuditConfig = EditAuditConfig()
    alternatives: AlternativesConfig = AlternativesConfig()
    search_pairs: int = Field(16, ge=2)
    """Training pairs, and as many selection pairs, on which site and nodes are chosen."""
    train_pairs: int = Field(32, ge=2)
    """Training pairs from which the steering form and adapters are made."""
    held_out_pairs: int = Field(64, ge=2)
    other_pairs: int = Field(16, ge=2)
    """Held-out pairs of every other task, on which the edit should change nothing."""
    seed: int = 0


class Choice(NamedTuple):
    """An edit that was looked at, and how it did on training prompts and text."""

    edit: Edit
    forms: dict[Direction, Trial] | None
    unmet: tuple[float, float, bool]
    """Of `unmet_in_training`; of several choices the least counts."""
    facts: dict[str, object]


class Bench:
    """The models of a run, and the text and the tasks on which an edit should change nothing."""

    def __init__(self, config: EditRecipeConfig, device: torch.device):
        self.config = config
        of_student = config.edit.nodes == "student"
        self.models = RunModels(config.run, config.dense, device, config.seed, needs_circuits=not of_student)
        allowed_sites(self.models.bridges, config.edit)
        find = self.models.with_empty if of_student else self.models.chosen
        self.circuits = find(config.tasks)
        self.every = self.models.circuits | {circuit.task: circuit for circuit in self.circuits}
        self.bridge_facts = read_json(config.run / "evaluation.json", "evaluation", "recipes/train.py")[
            "bridges"
        ]
        self.text, self.train_text = (
            HeldOutText(self.models.dense, *self.models.text(config.data, split, count))
            for split, count in (("held_out", config.text_blocks), ("train", config.audit.gate.text_blocks))
        )
        self.others = {
            task: PromptTails(self.models.dense, self.models.prompts(circuit, "held_out", config.other_pairs))
            for task, circuit in self.every.items()
        }


def main(config: EditRecipeConfig) -> None:
    if config.ship.merged and not config.ship.adapter:
        raise UsageError("ship.merged true merges the adapter; set ship.adapter true, too")
    use_all_cores()
    fast_fp32()
    state = start_processes()
    bench = Bench(config, state.device)
    circuits = bench.circuits
    mine = shared_out(circuits, state, config.run)
    total = len(circuits) if state.num_processes == 1 else None
    for circuit in (bar := tqdm(mine, total=total, desc="edit", disable=not state.is_main_process)):
        bar.write(make_edit(bench, circuit))
    if state.is_main_process:
        folders = [config.run / "edits" / circuit.task for circuit in circuits]
        folders = [folder for folder in folders if folder.is_dir()]
        found = [read_json(folder / "edit.json", "edit", "recipes/edit.py") for folder in folders]
        (config.run / "edits.md").write_text(edit_table(found), encoding="utf-8")
        update_manifest(
            config.run,
            "edit",
            inputs=vars(bench.models.hashes),
            outputs=[config.run / "edits.md", *folders],
            config=config.model_dump(mode="json"),
        )


def make_edit(bench: Bench, circuit: Circuit) -> str:
    """Choose, measure, save and ship one task's edit; returns the line that says what came of it."""
    config, models, started = bench.config, bench.models, time.monotonic()
    growths = grow_edits(search_streams(bench, circuit), circuit, models.bridges, config.edit)
    folder = config.run / "edits" / circuit.task
    if not growths:
        remove_folder(folder)  # what an earlier circuit gave is not this one's
        return f"{circuit.task}: the circuit reads no residual channel; no edit"
    train = models.streams(models.prompts(circuit, "train", config.train_pairs), config.source)
    choice = choose_edit(bench, growths, train)
    chosen = choice.edit
    held_out = models.streams(models.prompts(circuit, "held_out", config.held_out_pairs), config.source)
    found = measure_edit(held_out, chosen, models.bridges, config.edit, config.seed)
    found["chosen"] = choice.facts
    found |= growth_facts(growths, held_out, circuit, models.bridges, config.edit)
    if config.edit.later_max_size:
        found["later"] = later_facts(growths, held_out, models.bridges, config.edit, config.seed)
    others = {task: tails for task, tails in bench.others.items() if task != circuit.task}
    found |= audit_edit(
        chosen,
        circuit,
        train,
        held_out,
        models.student,
        models.bridges,
        bench.text,
        others,
        config.audit,
        train_text=bench.train_text,
        forms=choice.forms,
        strengths=[strength for strength in config.edit.strengths if strength],
        seed=config.seed,
    )
    edit = with_refusals(bench, chosen, found["off_target_kl"])
    edit.save(folder, {"task": circuit.task, **found, "limits": config.limits.model_dump()})
    if config.alternatives.enabled:
        compared = compare_alternatives(
            chosen,
            train,
            held_out,
            bench.text,
            models.student,
            models.bridges,
            config.alternatives,
            config.seed,
            train_text=bench.train_text,
            gate=config.audit.gate,
        )
        add_facts(folder, {"alternatives": compared})
        write_text(folder / "alternatives.md", alternatives_table(compared))
        draw(folder / "alternatives.svg", draw_alternatives, compared)
    if config.ship.adapter and (config.force or not edit.refusals):
        add_facts(folder, ship(bench, circuit, edit, folder, train.batch, held_out.batch))
    return describe(circuit.task, edit, found, time.monotonic() - started)


def choose_edit(bench: Bench, growths: list[Growth], train: PromptStreams) -> Choice:
    """Of the edits found the first, on training data, that a random push of its size cannot replace, and
    whose steering form leaves text alone and still flips prompts; else the one that fails least of that.

    At an early site a gate often sees nothing but the token, so that the edit would act wherever it stands.
    """
    config, models = bench.config, bench.models
    gate = config.audit.gate
    choices: list[Choice] = []
    for found, edit, push in hardest_to_replace(bench, growths, train)[:MOST_TRIED]:
        forms, kl, flips = None, math.inf, 0.0
        with suppress(InputError):  # nodes alike on both sides of the pairs; the audit says so
            forms = steering_forms(
                edit,
                train,
                models.student,
                models.bridges,
                bench.train_text,
                config.edit.strengths,
                gate,
            )
            form = forms[best_direction(forms, gate)]
            kl, flips = form.kl, form.flip_rate_indirect
        unmet = unmet_in_training(kl, push, flips, config.edit, gate)
        choices.append(Choice(edit, forms, unmet, found.as_json() | {"control_random_direction": push}))
        if not any(unmet):
            break
    return min(choices, key=lambda choice: choice.unmet)


def hardest_to_replace(
    bench: Bench, growths: list[Growth], train: PromptStreams
) -> list[tuple[Found, Edit, float]]:
    """The edits to try, those first that random directions of their size replace least, with that rate."""
    config = bench.config.edit
    edits = [(found, found.edit(bench.models.bridges)) for found in edits_to_try(growths, config)]
    pushes = [
        random_direction_rate(train, edit, found.strength, config, bench.config.seed) for found, edit in edits
    ]
    tried = [(found, edit, push) for (found, edit), push in zip(edits, pushes, strict=True)]
    return sorted(tried, key=lambda one: max(one[2], config.control_limit))  # below it all are alike


def search_streams(bench: Bench, circuit: Circuit) -> PromptStreams:
    """Training and selection prompts: more templates than either has, and none of them held out."""
    splits = (
        bench.models.prompts(circuit, split, bench.config.search_pairs) for split in ("train", "selection")
    )
    return bench.models.streams(TaskBatch.join(*splits), bench.config.source)


def with_refusals(bench: Bench, chosen: Edit, off_target_kl: Any) -> Edit:
    """The chosen patch as an edit of these weights, with the limits that it does not meet."""
    config, models = bench.config, bench.models
    edit = Edit.from_intervention(
        chosen.intervention.of_student(models.hashes.student_sha256),
        models.student,
        models.bridges,
        source=config.source,
        hashes=models.hashes,
    )
    kl = off_target_kl if isinstance(off_target_kl, float) else math.nan  # undefined is refused
    return replace(edit, refusals=unmet_limits(edit, config.limits, bench.bridge_facts, kl))


def ship(
    bench: Bench, circuit: Circuit, edit: Edit, folder: Path, train: TaskBatch, held_out: TaskBatch
) -> dict[str, Any]:
    """Adapter and merged checkpoint of an edit, with what a fresh process makes of them."""
    config, models = bench.config.ship, bench.models
    live = LiveEdit(edit, models.dense, models.student)
    others = [
        models.prompts(other, "train", bench.config.train_pairs)
        for other in bench.every.values()
        if other is not circuit
    ]
    prompts = Prompts.of_task(held_out, live)
    adapter, merged = folder / "adapter", folder / "merged" if config.merged else None
    facts = export_adapter(
        live,
        adapter,
        fit_on=[Prompts.of_task(train, live), *(Prompts(other.ids, other.last) for other in others)],
        held_out=[prompts],
        rank=config.rank,
    )
    loaded = bench.config.dense.model_copy(update={"adapter": str(adapter)})
    adapted = DenseModel.from_pretrained(loaded, device=models.dense.device, plain=True)
    facts |= adapter_effect(live, adapted, held_out, bench.text, seed=bench.config.seed)
    unmet = unmet_by_adapter(facts, bench.config.limits)
    facts = settle(adapter, facts, unmet, force=bench.config.force)
    if "refused" in facts:
        return {"adapter": facts}
    if merged is not None:
        export_merged(live, adapter, merged)
    return {"adapter": facts | compare_exports(live, adapter, prompts, merged)}


def describe(task: str, edit: Edit, found: dict[str, Any], seconds: float) -> str:
    best = found["strengths"].index(best_strength(found["strengths"], found["flip_rate_indirect"]))
    line = (
        f"{task}: {found['size']} nodes at {edit.site}, strength {found['strengths'][best]}: flips "
        f"{found['flip_rate'][best]:.0%}, indirect {found['flip_rate_indirect'][best]:.0%}; controls "
        f"{found['control_random_node'][best]:.0%} and {found['control_random_direction'][best]:.0%} "
        f"({seconds:.0f} s)"
    )
    return f"{line}; refused: {'; '.join(edit.refusals)}" if edit.refusals else line


if __name__ == "__main__":
    run_recipe(main, EditRecipeConfig, None)
