"""Run folder -> report.json and one self-contained report.html.

    accelerate launch recipes/audit.py --config recipes/python/audit.yaml

Adds the behaviour of dense model and student side by side and recorded interventions on circuit nodes, checks
what was measured against thresholds that stand in the config, and writes the report. Reads evaluation.json,
circuits/, edits/, manifest.json, and where they are there transfer/ and compare.json. Writes report.json,
report.html, report.intoto.json (provenance as an in-toto statement), model cards, and the paper's figures
of the run in figures/ (extra `plot`).
"""

import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from bridges.attestation import write_statement
from bridges.behaviour import compare_behaviour
from bridges.cards import push, write_cards
from bridges.checkpoint import DenseConfig
from bridges.claims import Thresholds, check_criteria
from bridges.desk import DeskConfig, record_desk
from bridges.figures import write_figures
from bridges.report import summary_rows, write_report
from bridges.run_models import RunModels, extraction_of
from extractor.artifacts import SCHEMA_VERSION, environment, file_sha256, read_json
from extractor.circuit import Circuit
from extractor.config import Config, run_recipe
from extractor.errors import InputError
from extractor.machine import fast_fp32, start_processes, use_all_cores
from extractor.node_labels import labels_of
from extractor.statistics import undefined
from extractor.tasks import task_label, task_names

MEASURING = ("extract", "edit", "transfer", "compare")
"""Recipes between training and the report, in their order."""
TOLERANCE = {"prompts": 1, "nats": 0.001}
"""What a replay may differ by: other processors round sums otherwise."""
MOST_CARDS = 40  # of a circuit's nodes
MOST_EDGES = 1000  # of a circuit in the report, the strongest; its file has all


class AuditConfig(Config):
    run: Path = Path("runs/python")
    """The run folder."""
    dense: DenseConfig = DenseConfig()
    thresholds: Thresholds = Thresholds()
    desk: DeskConfig = DeskConfig()
    held_out_pairs: int = Field(64, ge=2)
    """Held-out pairs per task for the behaviour table, over every task the tokenizer allows."""
    seed: int = 0
    push_to_hub: bool = False
    """Upload the run folder (student, bridges, circuits, edits, report) to `hub_model_id`."""
    hub_model_id: str | None = None
    hub_private_repo: bool = True
    hub_revision: str | None = None


def main(config: AuditConfig) -> None:
    use_all_cores()
    fast_fp32()
    state = start_processes()
    if not state.is_main_process:
        return
    evaluation = read_json(config.run / "evaluation.json", "evaluation", "recipes/train.py")
    manifest = read_json(config.run / "manifest.json", "manifest", "recipes/train.py")
    artifacts = checked_artifacts(config.run, manifest)
    models = RunModels(config.run, config.dense, state.device, config.seed, needs_circuits=False)
    extraction = extraction_of(config.run) if models.circuits else {}
    behaviour, refused = compare_behaviour(models, config.held_out_pairs)
    for name, tasks in behaviour.items():
        evaluation[name]["tasks"] = tasks
    circuits, edits = read_circuits(config.run), read_edits(config.run)
    criteria = check_criteria(config.thresholds, evaluation, circuits, edits)
    report = {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "run": str(config.run),
        **{key: evaluation[key] for key in ("dense", "student", "bridges", "mixtures", "held_out_tokens")},
        "circuits": circuits,
        "edits": edits,
        "desk": record_desks(models, extraction, config.desk),
        "transfer": read_transfer(config.run),
        "compare": read_comparison(config.run),
        "exclusions": refused + exclusions(manifest, evaluation, circuits, edits),
        "accounting": accounting(manifest, evaluation, behaviour, refused, circuits, edits),
        "criteria": criteria,
        "method": method(config, manifest),
        "provenance": provenance(manifest, artifacts),
    }
    page = write_report(report, config.run)
    write_statement(page)
    write_cards(config.run)
    write_figures(config.run)
    print_summary(report)
    print(f"report: {page}")
    if config.push_to_hub:
        target = config.hub_model_id or ""
        sent = push(config.run, target, private=config.hub_private_repo, revision=config.hub_revision)
        print(f"pushed: {sent}")


def record_desks(models: RunModels, extraction: dict[str, Any], config: DeskConfig) -> dict[str, Any]:
    """Recorded interventions on every circuit; means are those the circuits were found with."""
    if not config.nodes or not models.circuits:
        return undefined("not recorded: desk.nodes is 0" if models.circuits else "there are no circuits")
    desks = {}
    for task, circuit in models.circuits.items():
        pairs = models.pairs(circuit, "held_out", extraction["held_out_pairs"])
        parts = (models.dense, models.student, models.bridges, circuit, pairs, models.tokenizer, models.means)
        desks[task] = record_desk(*parts, config)
    return desks


def read_circuits(run: Path) -> dict[str, Any]:
    """Every circuit's evidence, settings and graph."""
    found = {}
    for path in sorted((run / "circuits").glob("*.json")):
        circuit = Circuit.load(path)
        raw = read_json(path, "circuit", "recipes/extract.py")
        edges = sorted(raw["edges"], key=lambda edge: -abs(edge[2]))[:MOST_EDGES]
        found[circuit.task] = {
            **circuit.evidence,
            **{key: circuit.settings[key] for key in ("target", "target_loss", "ablation")},
            "hashes": circuit.hashes,
            "graph": {"nodes": raw["nodes"], "edges": edges},
            "cards": node_cards(run / "circuits" / circuit.task / "nodes.json"),
        }
    return found


def node_cards(path: Path) -> Any:
    """What the nodes mean (`recipes/extract.py --describe true`), those with the largest effects first."""
    if not path.is_file():
        return undefined("nodes were not described: --describe true")
    rows = read_json(path, "nodes", "recipes/extract.py")["nodes"]
    rows.sort(key=lambda row: -abs(row["effect"]["total"].get("value", 0.0)))
    return [
        {
            "node": row["node"],
            "labels": labels_of(row["labels"]),
            "effect": row["effect"],
            "contexts": [*row["top"][:2], *row["bottom"][:1]],
        }
        for row in rows[:MOST_CARDS]
    ]


def read_edits(run: Path) -> dict[str, Any]:
    paths = sorted((run / "edits").glob("*/edit.json"))
    edits = [read_json(path, "edit", "recipes/edit.py") for path in paths]
    return {edit.pop("task"): edit for edit in edits}


def read_transfer(run: Path) -> dict[str, Any]:
    paths = sorted((run / "transfer").glob("*.json"))
    found = [read_json(path, "transfer", "recipes/transfer.py") for path in paths]
    return {entry.pop("task"): entry for entry in found}


def read_comparison(run: Path) -> dict[str, Any]:
    path = run / "compare.json"
    if not path.is_file():
        return undefined("recipes/compare.py was not run")
    return read_json(path, "comparison", "recipes/compare.py")


def exclusions(
    manifest: dict[str, Any], evaluation: dict[str, Any], circuits: dict[str, Any], edits: dict[str, Any]
) -> list[dict[str, str]]:
    """What this run leaves out, besides tasks that the tokenizer refuses."""
    found = []
    if all(site.endswith("resid_pre") for site in evaluation["bridges"]):
        why = "its attention and MLP read the same stream (parallel residual)"
        found.append({"what": "sites between attention and MLP of the dense model", "why": why})
    for task, circuit in circuits.items():
        if not circuit["nodes"]:
            found.append({"what": f"circuit of {task}", "why": "none was found: it is empty"})
        if task not in edits:
            found.append({"what": f"edit for {task}", "why": why_no_edit(manifest, task)})
        if circuit["controls"].get("seeds", {}).get("count") == 1:
            why = "one seed per circuit unless prune.seeds lists more"
            found.append({"what": f"stability over mask seeds, {task}", "why": why})
    return found


def why_no_edit(manifest: dict[str, Any], task: str) -> str:
    if "edit" not in manifest:
        return "recipes/edit.py was not run"
    asked = manifest["edit"]["config"]["tasks"]
    if asked and task not in map(task_label, asked):
        return "recipes/edit.py was run on other tasks"
    return "no node of the circuit can be moved at any site"


def accounting(
    manifest: dict[str, Any],
    evaluation: dict[str, Any],
    behaviour: dict[str, Any],
    refused: list[dict[str, str]],
    circuits: dict[str, Any],
    edits: dict[str, Any],
) -> list[dict[str, Any]]:
    """Planned, run, scored, excluded: nothing that was planned may vanish from a denominator."""

    def row(what: str, planned: int, run: int, scored: int, why: str) -> dict[str, Any]:
        counts = {"planned": planned, "run": run, "scored": scored, "excluded": planned - scored}
        return {"what": what, **counts, "why": why if planned > scored else ""}

    done = len(behaviour["dense"])
    extraction = manifest.get("extract", {}).get("config", {"tasks": (), "held_out_pairs": 0})
    asked, pairs = extraction["tasks"], extraction["held_out_pairs"]
    found = sum(circuit["nodes"] > 0 for circuit in circuits.values())
    tested = sum(circuit["verdict"]["word"] != "not tested" for circuit in circuits.values())
    rows = [
        row(
            "tasks, behaviour of both models",
            len(task_names()),
            done,
            done,
            f"{len(refused)} refused by name",
        ),
        row("tasks with a circuit that is not empty", len(asked), tested, found, "no circuit was found"),
        row("tasks with an edit", len(asked), len(edits), len(edits), "see what was left out"),
        row("held-out text, tokens", *[evaluation["held_out_tokens"]] * 3, ""),
    ]
    for task, circuit in circuits.items():
        rows.append(row(f"prompts, circuit of {task}", 2 * pairs, *[circuit["num_prompts"]] * 2, "not made"))
    for task, edit in edits.items():
        right = edit["num_right_before"]
        why = "answered wrong before the edit: they cannot be flipped"
        rows.append(row(f"prompts, edit of {task}", edit["num_prompts"], edit["num_prompts"], right, why))
    return rows


def method(config: AuditConfig, manifest: dict[str, Any]) -> dict[str, Any]:
    """Every recipe's settings, as values and as the files its command reads; what a replay may differ by."""
    settings = {"train": yaml.safe_load((config.run / "config.yaml").read_text(encoding="utf-8"))}
    settings |= {recipe: manifest[recipe]["config"] for recipe in MEASURING if recipe in manifest}
    settings["audit"] = config.model_dump(mode="json")
    files = (f"# {name}.yaml\n{yaml.safe_dump(own, sort_keys=False)}" for name, own in settings.items())
    return {
        "config": "".join(files),
        "settings": settings,
        "replay": "\n".join(
            f"accelerate launch recipes/{recipe}.py --config {recipe}.yaml" for recipe in settings
        ),
        "tolerance": TOLERANCE,
    }


def checked_artifacts(run: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Every file that the recipes wrote, by name, with its hash.

    Raises:
        InputError: a file is missing or is not as it was written.
    """
    artifacts: dict[str, str] = {}
    for recipe, entry in manifest.items():
        for name, sha256 in entry["outputs"].items() if isinstance(entry, dict) else ():
            if not (run / name).is_file() or file_sha256(run / name) != sha256:
                raise InputError(f"'{run / name}' is not the file that recipes/{recipe}.py wrote")
            artifacts[name] = sha256
    return artifacts


def provenance(manifest: dict[str, Any], artifacts: dict[str, str]) -> dict[str, Any]:
    """Date, machine, and hashes of every input and artefact."""
    recipes = {key: value for key, value in manifest.items() if isinstance(value, dict)}
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "inputs": {recipe: entry["inputs"] for recipe, entry in recipes.items()},
        "artifacts": artifacts,
        "recipes": {
            recipe: {"finished": entry["finished"], "git": entry["environment"]["git"]}
            for recipe, entry in recipes.items()
        },
    }


def print_summary(report: dict[str, Any]) -> None:
    rows = summary_rows(report)
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


if __name__ == "__main__":
    run_recipe(main, AuditConfig, None)
