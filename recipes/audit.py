"""Run folder -> report.json and one self-contained report.html.

    accelerate launch recipes/audit.py --config recipes/python/audit.yaml

Adds the behaviour of dense model and student side by side, checks what was measured against thresholds
that stand in the config, and writes the report. Reads evaluation.json, circuits/, edits/, manifest.json.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from bridges.cards import push, write_cards
from bridges.checkpoint import DenseConfig, check_same_tokenizer
from bridges.dense import DenseModel
from bridges.report import summary_rows, write_report
from extractor.artifacts import SCHEMA_VERSION, environment, file_sha256, read_json
from extractor.circuit import Circuit
from extractor.config import Config, as_arguments, dump_config, run_recipe
from extractor.errors import InputError
from extractor.machine import fast_fp32, start_processes, use_all_cores
from extractor.student import load_student
from extractor.tasks import accuracy, encode_pairs, make_pairs, task_names, two_way_loss


class Thresholds(Config):
    """What the claims must reach; fixed before the run."""

    init_kl_dense: float = 1e-6
    """Largest KL(dense || student) before training, nats/token."""
    kl_dense: float = 0.5
    """Largest KL(dense || student) after training, nats/token."""
    circuit_loss: float = 0.15
    circuit_accuracy: float = 0.95
    circuit_share_of_nodes: float = 0.03
    accuracy_without_circuit: float = 0.60
    circuits: int = 4
    """Tasks whose circuit must meet all four lines above."""
    edit_size: int = 8
    edit_flip_rate_indirect: float = 0.80
    edit_controls: float = 0.10
    edits: int = 3
    """Tasks whose edit must meet all three lines above at one strength of at most 2."""


class AuditConfig(Config):
    run: Path = Path("runs/python")
    """The run folder."""
    dense: DenseConfig = DenseConfig()
    thresholds: Thresholds = Thresholds()
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
    behaviour, exclusions = compare_behaviour(config, state.device)
    for name, tasks in behaviour.items():
        evaluation[name]["tasks"] = tasks
    circuits = read_circuits(config.run)
    edits = read_edits(config.run)
    if all(site.endswith("resid_pre") for site in evaluation["bridges"]):
        why = "its attention and MLP read the same stream (parallel residual)"
        exclusions.append({"what": "sites between attention and MLP of the dense model", "why": why})
    exclusions += [
        {"what": f"edit for {task}", "why": "the circuit reads no residual channel at any site"}
        for task in circuits
        if task not in edits
    ]
    exclusions += [{"what": what, "why": why} for what, why in NOT_DONE]
    report = {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "run": str(config.run),
        **{key: evaluation[key] for key in ("dense", "student", "bridges", "mixtures", "held_out_tokens")},
        "circuits": circuits,
        "edits": edits,
        "exclusions": exclusions,
        "criteria": check_criteria(config.thresholds, evaluation, circuits, edits),
        "method": {
            "config": (config.run / "config.yaml").read_text() + dump_config(config),
            "replay": replay_lines(config),
        },
        "provenance": provenance(config.run),
    }
    page = write_report(report, config.run)
    write_cards(config.run)
    print_summary(report)
    print(f"report: {page}")
    if config.push_to_hub:
        sent = push(
            config.run,
            config.hub_model_id or "",
            private=config.hub_private_repo,
            revision=config.hub_revision,
        )
        print(f"pushed: {sent}")


def compare_behaviour(
    config: AuditConfig, device: torch.device
) -> tuple[dict[str, dict[str, dict[str, float]]], list[dict[str, str]]]:
    """Two-way accuracy and loss of both models on held-out prompts of every task."""
    dense = DenseModel.from_pretrained(config.dense, device=device, plain=True)
    student, tokenizer = load_student(config.run / "student", device)
    check_same_tokenizer(tokenizer, str(config.run / "student"), dense.tokenizer, dense.name)
    tables: dict[str, dict] = {"dense": {}, "student": {}}
    exclusions = []
    limit = student.config.max_position_embeddings
    for task in task_names():
        try:
            pairs = make_pairs(
                task,
                tokenizer,
                split="held_out",
                count=config.held_out_pairs,
                seed=config.seed,
                max_tokens=limit,
            )
        except InputError as error:
            exclusions.append({"what": f"task {task}", "why": str(error)})
            continue
        batch = encode_pairs(pairs, tokenizer).to(device)
        with torch.no_grad():
            logits = {
                "dense": dense.run(batch.ids, record=False).logits,
                "student": student(batch.ids).logits,
            }
        for name, table in tables.items():
            difference = batch.logit_difference(logits[name])
            table[task] = {"accuracy": accuracy(difference), "loss": two_way_loss(difference).item()}
        tables["dense"][task]["num_prompts"] = len(batch)
    return tables, exclusions


def read_circuits(run: Path) -> dict[str, Any]:
    """Every circuit's evidence, settings and graph."""
    found = {}
    for path in sorted((run / "circuits").glob("*.json")):
        circuit = Circuit.load(path)
        raw = read_json(path, "circuit", "recipes/extract.py")
        settings = {key: circuit.settings[key] for key in ("target", "target_loss", "ablation")}
        graph = {"nodes": raw["nodes"], "edges": raw["edges"]}
        found[circuit.task] = {**circuit.evidence, **settings, "graph": graph}
    return found


def read_edits(run: Path) -> dict[str, Any]:
    paths = sorted((run / "edits").glob("*/edit.json"))
    edits = [read_json(path, "edit", "recipes/edit.py") for path in paths]
    return {edit.pop("task"): edit for edit in edits}


def check_criteria(
    limits: Thresholds, evaluation: dict, circuits: dict[str, Any], edits: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each claim with its threshold and what was measured."""
    student = evaluation["student"]
    exact = [m["nonzeros"] == m["k"] for m in student["matrices"].values()]
    good_circuits = [task for task, circuit in circuits.items() if circuit_holds(limits, circuit)]
    good_edits = [task for task, edit in edits.items() if edit_holds(limits, edit)]

    def row(claim: str, threshold: str, measured: str, met: bool) -> dict[str, Any]:
        return {"claim": claim, "threshold": threshold, "measured": measured, "met": met}

    return [
        row(
            "the student starts as a copy of the dense model",
            f"KL <= {limits.init_kl_dense:.0e} nats/token",
            f"{student['init_kl_dense']:.1e}",
            student["init_kl_dense"] <= limits.init_kl_dense,
        ),
        row(
            "the student stays close to the dense model",
            f"KL <= {limits.kl_dense} nats/token",
            f"{student['kl_dense']:.3f} at density {student['density']:.4g}",
            student["kl_dense"] <= limits.kl_dense,
        ),
        row(
            "every matrix has exactly its k nonzero weights",
            "all matrices",
            f"{sum(exact)} of {len(exact)}",
            all(exact),
        ),
        row(
            "circuits are enough and needed",
            f">= {limits.circuits} tasks: loss <= {limits.circuit_loss}, accuracy >= "
            f"{limits.circuit_accuracy:.0%}, <= {limits.circuit_share_of_nodes:.0%} of nodes, "
            f"<= {limits.accuracy_without_circuit:.0%} without them",
            f"{len(good_circuits)} of {len(circuits)}: {', '.join(good_circuits) or 'none'}",
            len(good_circuits) >= limits.circuits,
        ),
        row(
            "edits through the bridge flip the dense model's answer indirectly",
            f">= {limits.edits} tasks: <= {limits.edit_size} nodes, >= "
            f"{limits.edit_flip_rate_indirect:.0%} indirect, controls <= {limits.edit_controls:.0%}",
            f"{len(good_edits)} of {len(edits)}: {', '.join(good_edits) or 'none'}",
            len(good_edits) >= limits.edits,
        ),
    ]


def circuit_holds(limits: Thresholds, circuit: dict[str, Any]) -> bool:
    return (
        circuit["loss"] <= limits.circuit_loss
        and circuit["accuracy"] >= limits.circuit_accuracy
        and circuit["nodes"] <= limits.circuit_share_of_nodes * circuit["nodes_total"]
        and circuit["accuracy_without"] <= limits.accuracy_without_circuit
    )


def edit_holds(limits: Thresholds, edit: dict[str, Any]) -> bool:
    """At one and the same strength: the indirect flips reach the limit and both controls stay low."""
    series = ("strengths", "flip_rate_indirect", "control_random_node", "control_random_direction")
    return edit["size"] <= limits.edit_size and any(
        strength <= 2
        and flips >= limits.edit_flip_rate_indirect
        and max(nodes, direction) <= limits.edit_controls
        for strength, flips, nodes, direction in zip(*(edit[key] for key in series), strict=True)
    )


NOT_DONE = (
    ("stability over mask seeds", "one seed per circuit unless prune.seeds lists more"),
    ("off-target effect of edits", "an edit of this form needs a counterfactual prompt to exist"),
)


def replay_lines(config: AuditConfig) -> str:
    """The commands that made this run, as a user types them."""
    dense = f" {as_arguments(config.dense, 'dense')}"
    return "\n".join(
        f"accelerate launch recipes/{verb}.py --config recipes/python/{verb}.yaml --run {config.run}"
        + ("" if verb == "extract" else dense)
        for verb in ("train", "extract", "edit", "audit")
    )


def provenance(run: Path) -> dict[str, Any]:
    """Hashes of every input and artefact named in the manifest, checked against the files now."""
    manifest = read_json(run / "manifest.json", "manifest", "recipes/train.py")
    recipes = {key: value for key, value in manifest.items() if isinstance(value, dict)}
    artifacts: dict[str, str] = {}
    for recipe, entry in recipes.items():
        for name, sha256 in entry["outputs"].items():
            if not (run / name).is_file() or file_sha256(run / name) != sha256:
                raise InputError(f"'{run / name}' is not the file that recipes/{recipe}.py wrote")
            artifacts[name] = sha256
    return {
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
