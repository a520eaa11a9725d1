"""`sparsebridge desk RUN`: what the page's intervention desk does, from a terminal.

Without --task it lists what can be changed. What is left out is as on the page: the edit's nodes at their
best strength, the task's example.
"""

import argparse
import json
import sys
from typing import Any

from pydantic import ValidationError

from bridges.drawing import visible
from bridges.service.desk_request import DeskRequest
from bridges.service.sessions import loaded
from extractor.errors import InputError, UsageError

FIRST = 4  # nodes of a circuit without an edit, as on the page
GIVEN = ("kind", "positions", "strength", "prompt", "counterfactual", "value", "top", "continuation")


def desk(arguments: argparse.Namespace) -> int:
    """Ask both models, and keep the setting where that is wanted.

    Raises:
        UsageError: a setting or name that is none.
        InputError: the run is not finished, or there is no such task; limits that are not met.
    """
    own = loaded(arguments.run_folder)
    tasks = {task["task"]: task for task in own.tasks()}
    if arguments.task is None:
        sys.stdout.write(
            json.dumps(list(tasks.values()), indent=1) + "\n" if arguments.json else _listed(tasks)
        )
        return 0
    if arguments.task not in tasks:
        raise InputError(f"task '{arguments.task}': this run has circuits of {', '.join(tasks)}")
    request = request_of(tasks[arguments.task], arguments)
    found = own.intervene(request)
    if arguments.save:
        found["kept"] = f"interventions/{own.save(request, arguments.save).name}"
    if arguments.export:
        own.export(request, arguments.export, force=arguments.force)
        found["kept"] = f"adapters/{arguments.export}"
    sys.stdout.write(json.dumps(found, indent=1) + "\n" if arguments.json else _shown(found))
    return 0


def request_of(task: dict[str, Any], arguments: argparse.Namespace) -> DeskRequest:
    """The setting that is meant, with the page's own values for what is left out.

    Raises:
        UsageError: a value that is out of range, or no prompt where the task has no example.
    """
    given = {name: getattr(arguments, name) for name in GIVEN}
    values = {name: value for name, value in given.items() if value is not None}
    edit, example = task["edit"], task["example"]
    values["nodes"] = arguments.nodes or (edit["nodes"] if edit else task["nodes"][:FIRST])
    values.setdefault("strength", edit["strength"] if edit else 1.0)
    if "clean" in example:
        values.setdefault("prompt", example["clean"])
        if values.get("kind", "patch") == "patch":
            values.setdefault("counterfactual", example["corrupted"])
    try:
        return DeskRequest(task=task["task"], off_target=arguments.off_target, **values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _listed(tasks: dict[str, dict[str, Any]]) -> str:
    lines = []
    for task in tasks.values():
        edit, verdict = task["edit"], task["verdict"]
        word = verdict if isinstance(verdict, str) else verdict["undefined"]
        moved = f"edit: {' '.join(edit['nodes'])} at strength {edit['strength']:g}" if edit else "no edit"
        lines.append(
            f"{visible(task['task'])}: {visible(word)}, {task['of_nodes']} nodes, {visible(moved)}\n"
        )
    return "".join(lines)


def _shown(found: dict[str, Any]) -> str:
    lines = []
    for model, name in (("student", "student"), ("dense", "dense model")):
        own = found[model]
        if "undefined" in own:
            lines.append(f"{name}: not asked: {visible(own['undefined'])}")
            continue
        before, after = (
            max(own[when], key=lambda token: token["probability"]) for when in ("before", "after")
        )
        lines.append(
            f'{name}: "{visible(before["text"])}" ({before["probability"]:.1%}) before, '
            f'"{visible(after["text"])}" ({after["probability"]:.1%}) after; KL {own["kl"]:.3g} nats'
        )
        for when, text in own.get("continuation", {}).items():
            lines.append(f"  goes on {when}: {visible(text)}")
    if off := found.get("off_target"):
        kl = off.get("kl", off)
        words = (
            f"KL {kl['value']:.3g} nats/token, as {off['form']}"
            if "value" in kl
            else visible(kl["undefined"])
        )
        lines.append(f"other text: {words}")
    if "kept" in found:
        lines.append(f"kept: {found['kept']}")
    return "\n".join(lines) + "\n"
