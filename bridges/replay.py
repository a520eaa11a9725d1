"""`sparsebridge replay`: the claims of a report, measured again on the named weights and compared.

    text       cross-entropy of both models and KL on held-out text (recipes/train.py)
    behaviour  accuracy and loss of both models on every task's held-out prompts (recipes/audit.py)
    circuits   all evidence on held-out prompts, random circuits and adversary included (recipes/extract.py)
    edits      answers flipped at every strength, total and indirect, with both controls (recipes/edit.py)

Then the criteria and every circuit's verdict follow again from what was measured. Searches are not run
again: the nodes of a circuit and of an edit are those of the files, and controls that search (nonsense tasks,
shuffled weights, other seeds) enter a verdict as recorded; `recipes/extract.py` repeats them.
"""

import copy
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState

from bridges.behaviour import compare_behaviour
from bridges.checkpoint import DenseConfig
from bridges.claims import Thresholds, check_criteria
from bridges.drawing import finite
from bridges.edit import Edit
from bridges.edit_controls import measure_edit
from bridges.evaluate import compare_on_text
from bridges.report_file import read_report
from bridges.report_values import at, entries, verdict
from bridges.run_models import RunModels, run_text
from bridges.search import EditConfig
from extractor.data import DataConfig, load_spread
from extractor.errors import InputError
from extractor.evidence import EvidenceConfig, gather_evidence
from extractor.machine import fast_fp32, use_all_cores
from extractor.masks import Bank
from extractor.verdict import Thresholds as CircuitThresholds
from extractor.verdict import judge

FAILED_CODE = 7
NATS = ("loss", "loss_without", "student_loss")
SHARES = ("accuracy", "accuracy_without", "student_accuracy")
SERIES = ("flip_rate", "flip_rate_indirect", "control_random_node", "control_random_direction")


@dataclass(frozen=True)
class Comparison:
    """One figure: as reported, as measured again, and whether they agree within the stated tolerance.

    `agrees` is None for what cannot be measured here; `reported` then says why.
    """

    what: str
    reported: Any
    measured: Any
    agrees: bool | None

    def __str__(self) -> str:
        if self.agrees is None:
            return f"not replayed  {self.what}: {self.reported}"
        state = "agrees" if self.agrees else "DIFFERS"
        return f"{state:<8}  {self.what}: reported {_text(self.reported)}, measured {_text(self.measured)}"


class Replay:
    """A report, its run folder and its models.

    Raises:
        InputError: no report, no run folder, or weights and text that are not those of the report.
    """

    def __init__(self, report: Path, run: Path | None, dense: str | None, sample: int | None):
        self.record = read_report(report)
        self.run = run or (report if report.is_dir() else report.parent)
        self.settings = at(self.record, "method", "settings")
        self.tolerance = at(self.record, "method", "tolerance")
        if not isinstance(self.settings, dict) or not isinstance(self.tolerance, dict):
            raise InputError(f"report '{report}' holds no settings to replay by (method.settings)")
        config = DenseConfig(**self.settings["audit"]["dense"])
        config = config.model_copy(update={"path": dense}) if dense else config
        self.models = RunModels(self.run, config, PartialState().device, self.settings["audit"]["seed"])
        self.tasks = self._sampled(sample)
        self.measured = copy.deepcopy(self.record)
        stated, found = at(self.record, "dense", "sha256"), self.models.dense.sha256
        if stated != found:
            raise InputError(
                f"the report is of a dense model with weights {str(stated)[:12]}, not {found[:12]}"
            )

    def _sampled(self, sample: int | None) -> list[str]:
        tasks = [task for task, _ in entries(at(self.record, "circuits"))]
        if sample is None or sample >= len(tasks):
            return tasks
        return sorted(random.Random(0).sample(tasks, sample))

    def comparisons(self) -> Iterator[Comparison]:
        yield from self.text()
        yield from self.behaviour()
        for task in self.tasks:
            yield from self.circuit(task)
            if finite(at(self.record, "edits", task, "size")) is not None:
                yield from self.edit(task)
        yield from self.claims()

    @cached_property
    def bank(self) -> tuple[Bank, bool]:
        """What resample ablation draws from; whether it is of the text the circuits were found with."""
        settings = self.settings["extract"]
        data, count = DataConfig(**settings["data"]), settings["mean_blocks"]
        train = load_spread(data, self.models.tokenizer, "train", count)
        stated = at(self.record, "provenance", "inputs", "extract", "train_text_sha256")
        return Bank(self.models.student, train.sample(count)[0]), train.digest == stated

    def text(self) -> Iterator[Comparison]:
        trained = self.settings["train"]
        _, held_out = run_text(
            DataConfig(**trained["data"]),
            self.models.dense,
            trained["max_train_tokens"],
            trained["eval_blocks"],
        )
        stated = at(self.record, "provenance", "inputs", "train", "held_out_text_sha256")
        if stated != held_out.digest:
            why = f"SHA-256 {str(stated)[:12]}, here {held_out.digest[:12]}"
            yield Comparison("losses and KL on held-out text", why, None, None)
            return
        blocks = held_out.sample(trained["eval_blocks"])
        found = compare_on_text(self.models.dense, self.models.student, *blocks)
        self.measured["dense"]["ce"] = found["dense_ce"]
        self.measured["student"] |= {"ce": found["ce"], "kl_dense": found["kl_dense"]}
        for model, key in (("dense", "ce"), ("student", "ce"), ("student", "kl_dense")):
            yield self.nats(f"{model}, {key} on text", model, key)

    def behaviour(self) -> Iterator[Comparison]:
        count = self.settings["audit"]["held_out_pairs"]
        tasks = tuple(task for task, _ in entries(at(self.record, "dense", "tasks")))
        tables, _ = compare_behaviour(self.models, count, tasks)
        for model, table in tables.items():
            self.measured[model]["tasks"] = table
            for task, found in table.items():
                yield self.share(
                    f"{model} on {task}, accuracy", found["num_prompts"], model, "tasks", task, "accuracy"
                )
                yield self.nats(f"{model} on {task}, loss", model, "tasks", task, "loss")

    def circuit(self, task: str) -> Iterator[Comparison]:
        """All evidence of one circuit anew, and the verdict that follows."""
        circuit, settings = self.models.circuits[task], self.settings["extract"]
        student, (bank, has_text) = self.models.student, self.bank
        selection, held_out = (
            self.models.prompts(circuit, split, count)
            for split, count in (
                ("selection", settings["prune"]["selection_pairs"]),
                ("held_out", settings["held_out_pairs"]),
            )
        )
        evidence = gather_evidence(
            student,
            circuit,
            selection,
            held_out,
            self.models.means,
            bank,
            EvidenceConfig(**settings["evidence"]),
        )
        if not has_text:  # other text, other draws: they say nothing about the record
            recorded = at(self.record, "circuits", task, "ablations", "resample")
            evidence["ablations"] |= {"resample": recorded} if recorded else {}
            yield Comparison(f"circuit of {task}, resample ablation", "other training text", None, None)
        controls = at(self.record, "circuits", task, "controls") or {}
        word = judge(evidence, controls, CircuitThresholds(**settings["thresholds"])).as_json()
        self.measured["circuits"][task] |= evidence | {"verdict": word}
        prompts = evidence["num_prompts"]
        for key in SHARES:
            yield self.share(f"circuit of {task}, {key}", prompts, "circuits", task, key)
        for key in NATS:
            yield self.nats(f"circuit of {task}, {key}", "circuits", task, key)
        yield self.same(f"circuit of {task}, verdict", "circuits", task, "verdict", "word")

    def edit(self, task: str) -> Iterator[Comparison]:
        settings, circuit = self.settings["edit"], self.models.circuits[task]
        edit = Edit.load(self.run / "edits" / task, self.models.dense, force=True)
        prompts = self.models.prompts(circuit, "held_out", settings["held_out_pairs"])
        streams = self.models.streams(prompts, settings["source"])
        found = measure_edit(
            streams, edit, self.models.bridges, EditConfig(**settings["edit"]), settings["seed"]
        )
        self.measured["edits"][task] |= found
        for key in SERIES:
            for i, strength in enumerate(found["strengths"]):
                what = f"edit of {task}, {key} at strength {strength:g}"
                yield self.share(what, found["num_right_before"], "edits", task, key, i)

    def claims(self) -> Iterator[Comparison]:
        """The criteria and the report's verdict, from what was measured."""
        limits = Thresholds(**self.settings["audit"]["thresholds"])
        parts = (self.measured[key] for key in ("circuits", "edits"))
        self.measured["criteria"] = check_criteria(limits, self.measured, *parts)
        for i, criterion in enumerate(self.record["criteria"]):
            yield self.same(f"criterion: {criterion['claim']}", "criteria", i, "met")
        before, after = verdict(self.record)[0], verdict(self.measured)[0]
        yield Comparison("verdict of the report", before, after, before == after)

    def share(self, what: str, prompts: int, *path: str | int) -> Comparison:
        """Shares agree within the stated number of prompts."""
        return self._close(what, (self.tolerance["prompts"] + 0.01) / max(prompts, 1), path)

    def nats(self, what: str, *path: str | int) -> Comparison:
        return self._close(what, self.tolerance["nats"], path)

    def same(self, what: str, *path: str | int) -> Comparison:
        reported, measured = at(self.record, *path), at(self.measured, *path)
        return Comparison(what, reported, measured, reported == measured)

    def _close(self, what: str, limit: float, path: tuple[str | int, ...]) -> Comparison:
        reported, measured = at(self.record, *path), at(self.measured, *path)
        a, b = finite(reported), finite(measured)
        agrees = reported == measured if a is None or b is None else abs(a - b) <= limit
        return Comparison(what, reported, measured, agrees)


def replay(report: Path, run: Path | None = None, dense: str | None = None, sample: int | None = None) -> int:
    """Print every comparison; 0, or 7 where one differs.

    Args:
        run: the run folder; the report's own folder if None.
        dense: path or id of the dense checkpoint, where it is not the one in the report's settings.
        sample: only so many tasks' circuits and edits.
    """
    use_all_cores()
    fast_fp32()
    replayed, found = Replay(report, run, dense, sample), []
    for comparison in replayed.comparisons():
        sys.stdout.write(f"{comparison}\n")
        found.append(comparison.agrees)
    stated = replayed.tolerance
    compared = len(found) - found.count(None)
    sys.stdout.write(
        f"{found.count(True)} of {compared} figures agree within {stated['prompts']} prompt and "
        f"{stated['nats']:g} nats; not replayed: {found.count(None)}; tasks replayed: "
        f"{len(replayed.tasks)} of {len(replayed.record['circuits'])}\n"
    )
    return FAILED_CODE if False in found else 0


def _text(value: Any) -> str:
    known = finite(value)
    return str(value) if known is None else f"{known:.6g}"
