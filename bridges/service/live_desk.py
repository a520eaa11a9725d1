"""The intervention desk, live: a run's models stay loaded and answer under changes of a circuit's nodes.

    desk = LiveDesk.of_run(Path("runs/quickstart"))
    desk.tasks()                        # what can be changed, with an example of each task
    desk.intervene(DeskRequest(...))    # next tokens of the student and of the dense model, before and after

What the models do unedited is kept for the last few prompts, so an intervention takes one forward of each.
As in `bridges.desk`, the student's change reaches only the sublayer that reads the nodes; the dense model's
is its crossing, which everything after reads. One question at a time: who serves several holds a lock.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState

from bridges.checkpoint import DenseConfig
from bridges.edit import Edit, EditLimits
from bridges.edit_table import best_strength
from bridges.live import LiveEdit
from bridges.run_models import RunModels
from bridges.service.desk_export import EditBench
from bridges.service.desk_prompt import DeskPrompts, shown
from bridges.service.desk_request import DeskRequest
from extractor.artifacts import read_json
from extractor.circuit import Circuit
from extractor.data import DataConfig
from extractor.errors import InputError, UsageError
from extractor.intervention import Intervention, ablate, patch, steer
from extractor.sites import Node
from extractor.statistics import undefined
from extractor.task_tokens import tokens_of

SHOWN_NODES = 500  # of a circuit, on the page; a request may name any
TASK_PAIRS = 64  # held-out pairs of a task, whose answers are known
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
Stamp = list[tuple[str, int, int]]
PARTS = ("config.yaml", "evaluation.json", "student/*", "bridges/*", "circuits/*", "edits/*/edit.json")


class LiveDesk:
    """The models of a finished run; `of_run` loads them."""

    def __init__(self, models: RunModels, data: DataConfig, stamp: Stamp):
        self.models, self.run = models, models.run
        self.edits = _edits(self.run, models.hashes.student_sha256)
        self.nodes = {task: self._nodes(circuit) for task, circuit in models.circuits.items()}
        """By task: of its edit, then those that it was chosen among, then the others in forward order."""
        self.prompts = DeskPrompts(models, (node for nodes in self.nodes.values() for node in nodes))
        self.bench = EditBench(models, data)
        self._answers: dict[str, dict[str, tuple[int, int]]] = {}
        self._stamp = stamp

    @classmethod
    def of_run(cls, run: Path, device: torch.device | None = None) -> "LiveDesk":
        """Load what recipes/train.py and recipes/extract.py left in a run folder.

        Raises:
            InputError: a part is missing or damaged, or the parts do not belong together.
        """
        stamp = _stamp(run)  # before anything is read
        dense, data = _configs(run)
        return cls(RunModels(run, dense, device or PartialState().device), data, stamp)

    @property
    def is_current(self) -> bool:
        """The run's files are those that were loaded."""
        return self._stamp == _stamp(self.run)

    def tasks(self) -> list[dict[str, Any]]:
        """Every circuit: verdict, nodes (the first matter most; `of_nodes` in all), edit (None: there is
        none), an example."""
        found = []
        for task, circuit in sorted(self.models.circuits.items()):
            edit, verdict = self.edits.get(task), circuit.evidence.get("verdict")
            found.append(
                {
                    "task": task,
                    "verdict": verdict["word"] if verdict else undefined("not judged"),
                    "nodes": list(map(str, islice(self.nodes[task], SHOWN_NODES))),
                    "of_nodes": len(self.nodes[task]),
                    "edit": None if edit is None else _edit_facts(edit),
                    "example": circuit.evidence.get("example") or undefined("none is recorded"),
                }
            )
        return found

    @torch.inference_mode()
    def intervene(self, request: DeskRequest) -> dict[str, Any]:
        """Both models on the prompt, before and after, for JSON.

        Per model: `before` and `after` (the same tokens, in one order), `kl` (before || after, nats, at the
        last position), `changed` (another token is the most likely one), `difference` (answer minus
        distractor in logits, on the task's own prompts), `continuation` if asked for. Where the nodes cannot
        be carried over, `dense` is undefined, with the reason.

        Raises:
            UsageError, InputError: a setting or a prompt that makes no sense, in one line.
        """
        circuit, change = self._change(request)
        if request.kind == "patch" and not request.counterfactual:
            raise UsageError("counterfactual: a patch takes the nodes' values from another prompt; give one")
        counterfactual = request.counterfactual if request.kind == "patch" else None
        case = self.prompts.case(request.prompt, counterfactual, request.continuation)
        found: dict[str, Any] = {"task": circuit.task, "prompt_tokens": case.ids.shape[1]}
        edited = {"student": change.applied(self.models.student, counterfactual=case.counterfactual)}
        after = {"student": self.prompts.student_after(case, change)}
        try:
            live = LiveEdit(self._carried(change), self.models.dense, self.models.student)
        except InputError as error:
            found["dense"] = undefined(str(error))
        else:
            edited["dense"] = live.applied(counterfactual=case.counterfactual)
            after["dense"] = self.prompts.dense_after(case, live)
        answers = self._answers_of(circuit).get(request.prompt)
        for model in after:
            found[model] = shown(case.unedited[model], after[model], request.top, self.models, answers)
            if request.continuation:
                found[model]["continuation"] = {
                    "before": self.prompts.continuation(case, model, request.continuation),
                    "after": self.prompts.continuation_under(case, edited[model], request.continuation),
                }
        if request.off_target:
            is_carried = "dense" in after
            found["off_target"] = self.bench.off_target(circuit, live) if is_carried else found["dense"]
        return found

    def save(self, request: DeskRequest, name: str) -> Path:
        """The setting as interventions/<name>.json of the run, for `Intervention.load`.

        Raises:
            UsageError, InputError: a name that is not allowed or is taken, a setting that makes no sense.
        """
        _, change = self._change(request)
        path = _free(self.run / "interventions", name, ".json")
        change.save(path)
        return path

    @torch.inference_mode()
    def export(self, request: DeskRequest, name: str, *, force: bool = False) -> dict[str, Any]:
        """The setting's edit of the dense model as a PEFT adapter, adapters/<name>/ of the run.

        Returns:
            `name`, `off_target`, and what `export_adapter` says.

        Raises:
            UsageError, InputError: as `save`; nodes that cannot be carried over; limits that the edit does
                not meet, unless `force`.
        """
        circuit, change = self._change(request)
        folder = _free(self.run / "adapters", name)
        own = self.edits.get(circuit.task)
        limits = EditLimits() if own is None else EditLimits(**own["limits"])
        return {"name": name} | self.bench.export(circuit, self._carried(change), folder, limits, force=force)

    def _change(self, request: DeskRequest) -> tuple[Circuit, Intervention]:
        """The circuit and the intervention that a request means."""
        (circuit,) = self.models.chosen((request.task,))
        nodes = [Node.parse(name) for name in request.nodes]
        if strange := [str(node) for node in nodes if node not in self.nodes[request.task]]:
            raise UsageError(f"nodes: {strange[0]} is no node of the circuit of '{request.task}'")
        if (request.kind == "steer") != (request.value is not None):
            raise UsageError("value: steer takes one, which it adds to every node; the other kinds take none")
        where = {"positions": request.positions, "strength": request.strength}
        if request.kind == "patch":
            change = patch(nodes, **where)
        elif request.kind == "steer":
            change = steer(nodes, [request.value] * len(nodes), **where)
        else:
            change = ablate(nodes, self.models.means if request.kind == "mean" else None, **where)
        return circuit, change.of_student(self.models.hashes.student_sha256)

    def _nodes(self, circuit: Circuit) -> dict[Node, None]:
        edit = self.edits.get(circuit.task, {"nodes": [], "growth": []})
        first = [Node.parse(name) for name in edit["nodes"]]
        tried = [Node.parse(name) for growth in edit["growth"] for name in growth["nodes"]]
        rest = sorted(circuit.nodes, key=lambda node: node.sort_key)
        return dict.fromkeys([*first, *(node for node in tried if node in circuit.nodes), *rest])

    def _carried(self, change: Intervention) -> Edit:
        """Raises InputError where a node cannot be carried over, with the reason."""
        models = self.models
        return Edit.from_intervention(change, models.student, models.bridges, hashes=models.hashes)

    def _answers_of(self, circuit: Circuit) -> dict[str, tuple[int, int]]:
        """Answer and distractor by prompt: of the circuit's example and of the task's held-out pairs."""
        if circuit.task not in self._answers:
            pairs = [circuit.evidence["example"]] if "example" in circuit.evidence else []
            with suppress(InputError):  # the task's own file is gone, or holds fewer
                pairs += map(vars, self.models.pairs(circuit, "held_out", TASK_PAIRS))
            found = {}
            for pair in pairs:
                texts = [pair["answer"], pair["distractor"]]
                one, other = (ids[0] for ids in tokens_of(texts, self.models.tokenizer))
                found |= {pair["clean"]: (one, other), pair["corrupted"]: (other, one)}
            self._answers[circuit.task] = found
        return self._answers[circuit.task]


def _configs(run: Path) -> tuple[DenseConfig, DataConfig]:
    """The dense checkpoint and the text that a run was made with."""
    path = run / "config.yaml"
    if not path.is_file():
        raise InputError(f"no run in '{run}' (no config.yaml); recipes/train.py makes one")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return DenseConfig.model_validate(values["dense"]), DataConfig.model_validate(values["data"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{path}' is damaged ({' '.join(str(error).split())})") from None


def _edits(run: Path, student_sha256: str) -> dict[str, dict[str, Any]]:
    """What the run's edits of this student say of themselves, by task."""
    paths = run.glob("edits/*/edit.json")
    headers = {path.parent.name: read_json(path, "edit", "recipes/edit.py") for path in paths}
    return {task: own for task, own in headers.items() if own["student_sha256"] == student_sha256}


def _stamp(run: Path) -> Stamp:
    """Size and time of every file that a desk reads."""
    files = sorted(path for part in PARTS for path in run.glob(part) if path.is_file())
    return [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]


def _edit_facts(edit: Mapping[str, Any]) -> dict[str, Any]:
    """What the page begins with: the edit's nodes at their best strength, or all the way."""
    strength = best_strength(edit["strengths"], edit["flip_rate_indirect"])
    return {"nodes": edit["nodes"], "strength": strength, "refusals": edit["refusals"]}


def _free(folder: Path, name: str, suffix: str = "") -> Path:
    """Where something new of this name goes.

    Raises:
        UsageError: a name that is not allowed.
        InputError: one that is taken.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"name {name!r}: write it in a to z, 0 to 9, _ and -, 64 at most")
    if (path := folder / f"{name}{suffix}").exists():
        raise InputError(f"name '{name}' is taken; give another one")
    return path
