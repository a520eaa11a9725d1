"""Dense model, student, circuits and edits side by side -> compare.json and compare.md.

    accelerate launch recipes/compare.py --config recipes/python/compare.yaml

On held-out text: loss per token and its correlation, KL, top-1 agreement and calibration, over all tokens and
by class of token, with paired intervals over documents; the tokens on which dense model and student differ
most, with their context. On every task that the tokenizer allows: the same prompts asked of both models, of
the circuit alone (all else at its mean) and of the edited dense model, with paired intervals over templates;
the prompts on which both differ most. Reads student/, bridges/, circuits/, edits/ and manifest.json of a run
folder. A circuit is meant for its task's prompts: on text alone it is expected to be poor, and shown to be.

    schema_version, settings, hashes {dense_sha256, student_sha256, bridges_sha256}
    text    as `bridges.compare` says; each of `models` also has kind (dense, student, circuit, edited), task
            and note, and is {"undefined": reason} where there is none (circuit:<task>, edited:<task>)
    tasks   by name: prompts (what is asked), and what `bridges.compare_tasks` says; `edit`: sites, nodes,
            strength, steering, refusals; a model that there is not is {"undefined": reason}
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from tqdm.auto import tqdm

from bridges.checkpoint import DenseConfig
from bridges.compare import Forward, ShowConfig, TextSample, compare_text
from bridges.compare_figures import counted
from bridges.compare_table import comparison_tables
from bridges.compare_tasks import RunEdit, compare_task, of_dense, of_student
from bridges.run_models import RunModels, extraction_of
from bridges.token_classes import kind_of
from extractor.artifacts import SCHEMA_VERSION, update_manifest, write_json, write_text
from extractor.circuit import Circuit
from extractor.compact import CompactStudent
from extractor.config import Config, run_recipe
from extractor.data import DataConfig, load_spread
from extractor.errors import InputError
from extractor.machine import fast_fp32, start_processes, use_all_cores
from extractor.statistics import undefined
from extractor.tasks import encode_pairs, make_pairs, refuse_unknown_tasks, task_names

NOTES = {
    "dense": "the dense model itself: every difference is zero",
    "student": "the whole student",
    "circuit": "the student with all but the circuit at its mean over text; expected to be poor on text",
    "edited": "the dense model under the edit; on text its steering form, where its gate is open",
}


class CompareConfig(Config):
    run: Path = Path("runs/python")
    """The run folder of recipes/train.py and recipes/extract.py; with edits/, if recipes/edit.py was run."""
    dense: DenseConfig = DenseConfig()
    tasks: tuple[str, ...] = ()
    """Which tasks; empty: all that there are."""
    data: DataConfig | None = None
    """The text; by default that of the run's circuits."""
    text_blocks: int = Field(128, ge=1)
    """Blocks of held-out text, evenly spread over 32 times as many."""
    circuits_on_text: bool = True
    """Circuits alone and edited models on text, too: two more forward passes over it for each circuit."""
    held_out_pairs: int = Field(64, ge=2)
    """Held-out pairs of a task."""
    train_pairs: int = Field(32, ge=2)
    """Training pairs that an edit's steering form is made from; recipes/edit.py takes as many."""
    show: ShowConfig = ShowConfig()
    seed: int = 0


class Bench:
    """The models of a run, its circuits as models of their own, and its edits or why there are none."""

    def __init__(self, config: CompareConfig, device: torch.device):
        self.config = config
        self.models = RunModels(config.run, config.dense, device, config.seed)
        names = config.tasks or sorted({*task_names(), *self.models.circuits})
        refuse_unknown_tasks([name for name in names if name not in self.models.circuits])
        self.tasks: Sequence[str] = names
        self.data = config.data or DataConfig(**extraction_of(config.run)["data"])
        mine = [self.models.circuits[task] for task in names if task in self.models.circuits]
        self.alone = {circuit.task: self._alone(circuit) for circuit in mine}
        self.edits = {circuit.task: self._edit(circuit) for circuit in mine}

    def _alone(self, circuit: Circuit) -> CompactStudent | str:
        """The circuit's nodes and edges; what is outside carries what it carried when it was looked for."""
        if not circuit.nodes:
            return "no circuit was found: it is empty"
        return circuit.compact(self.models.student, self.models.carried(circuit))

    def _edit(self, circuit: Circuit) -> RunEdit | str:
        try:
            return RunEdit.load(self.models, circuit, self.config.train_pairs, self.data)
        except InputError as error:
            return str(error)


def main(config: CompareConfig) -> None:
    use_all_cores()
    fast_fp32()
    state = start_processes()
    if not state.is_main_process:
        return
    started = time.monotonic()
    bench = Bench(config, state.device)
    found = {
        "schema_version": SCHEMA_VERSION,
        "settings": config.model_dump(mode="json") | {"data": bench.data.model_dump(mode="json")},
        "hashes": vars(bench.models.hashes),
        "text": on_text(bench),
        "tasks": {task: on_task(bench, task) for task in tqdm(bench.tasks, desc="compare")},
    }
    write_json(config.run / "compare.json", found)
    write_text(config.run / "compare.md", comparison_tables(found))
    update_manifest(
        config.run,
        "compare",
        inputs=vars(bench.models.hashes),
        outputs=[config.run / "compare.json", config.run / "compare.md"],
        config=config.model_dump(mode="json"),
    )
    print(f"{describe(found)} ({time.monotonic() - started:.0f} s)")


def on_text(bench: Bench) -> dict[str, Any]:
    """All models on held-out text, with what each of them is."""
    config, models, data = bench.config, bench.models, bench.data
    blocks = load_spread(data, models.tokenizer, "held_out", config.text_blocks)
    sample = TextSample.spread(blocks, config.text_blocks, models.tokenizer, kind_of(data))
    forwards: dict[str, Forward | str] = {
        "dense": of_dense(models.dense)[0],
        "student": of_student(models.student)[0],
        **(circuits_on_text(bench) if config.circuits_on_text else {}),
    }
    text = compare_text(
        {name: forward for name, forward in forwards.items() if not isinstance(forward, str)},
        sample,
        models.tokenizer,
        config.show,
        vocab_size=models.dense.config.vocab_size,
        device=models.dense.device,
        seed=config.seed,
    )
    described = {}
    for name, forward in forwards.items():
        kind, _, task = name.partition(":")
        facts = undefined(forward) if isinstance(forward, str) else text["models"][name]
        task_of = task or undefined("not made for a task")
        described[name] = {"kind": kind, "task": task_of, "note": NOTES[kind], **facts}
    return text | {"models": described}


def circuits_on_text(bench: Bench) -> dict[str, Forward | str]:
    """Circuits alone and edited models, or why there is none."""
    found: dict[str, Forward | str] = {}
    for task, alone in bench.alone.items():
        found[f"circuit:{task}"] = alone if isinstance(alone, str) else of_student(alone)[0]
    for task, edit in bench.edits.items():
        if isinstance(edit, str):
            found[f"edited:{task}"] = edit
        elif edit.steering is None:
            found[f"edited:{task}"] = edit.facts["steering"]["undefined"]
        else:
            found[f"edited:{task}"] = edit.on_text
    return found


def on_task(bench: Bench, task: str) -> dict[str, Any]:
    """All models on the prompts of one task; with the reason, where the tokenizer does not allow it."""
    config, models = bench.config, bench.models
    circuit = models.circuits.get(task)
    prompts = task if circuit is None else str(circuit.settings["prompts"])
    limit = models.student.config.max_position_embeddings
    ask = {"split": "held_out", "count": config.held_out_pairs, "seed": config.seed, "max_tokens": limit}
    try:
        pairs = make_pairs(prompts, models.tokenizer, **ask)
    except InputError as error:
        planned = 2 * config.held_out_pairs
        return {"prompts": prompts, "counts": counted(planned, 0, 0, {str(error): planned})}
    missing = "the run has no circuit of this task"
    alone, edit = bench.alone.get(task, missing), bench.edits.get(task, missing)
    last = {"dense": of_dense(models.dense)[1], "student": of_student(models.student)[1]}
    if not isinstance(alone, str):
        last["circuit"] = of_student(alone)[1]
    if not isinstance(edit, str):
        last["edited"] = edit.on_prompts
    found = compare_task(
        last,
        encode_pairs(pairs, models.tokenizer).to(models.dense.device),
        pairs,
        config.show,
        vocab_size=models.dense.config.vocab_size,
        calibration=circuit.calibration if circuit is not None else None,
        seed=config.seed,
    )
    for name, part in (("circuit", alone), ("edited", edit)):
        if isinstance(part, str):
            found["models"][name] = undefined(part)
    facts = undefined(edit) if isinstance(edit, str) else edit.facts
    return {"prompts": prompts, "edit": facts, **found}


def describe(found: dict[str, Any]) -> str:
    counts, student = found["text"]["counts"], found["text"]["models"]["student"]["overall"]
    losses = [found["text"]["models"][name]["overall"]["loss"]["value"] for name in ("dense", "student")]
    asked = sum(task["counts"]["scored"] > 0 for task in found["tasks"].values())
    return (
        f"{counts['scored']} of {counts['planned']} tokens: dense {losses[0]:.3f}, student {losses[1]:.3f} "
        f"nats/token, KL {student['kl']['value']:.3f}; {asked} of {len(found['tasks'])} tasks"
    )


if __name__ == "__main__":
    run_recipe(main, CompareConfig, None)
