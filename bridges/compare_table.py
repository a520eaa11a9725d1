"""compare.md: the comparison's tables, every figure from compare.json, each with its counts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bridges.tables import at, markdown, number, percent

WORST_SHOWN = 10  # of each list; compare.json has more
CONTEXT_SHOWN = 60  # characters
FIGURES = (
    "loss, nats", "minus dense", "correlation of losses", "KL", "same top token", "top token right",
    "calibration error",
)  # fmt: skip
TASK_COLUMNS = (
    "task", "accuracy: dense / student / circuit / edited", "loss: dense / student / circuit / edited",
    "student - dense: accuracy", "student - dense: loss", "edit flips", "at strength",
    "prompts: planned / run / scored / excluded",
)  # fmt: skip


def comparison_tables(found: Mapping[str, Any]) -> str:
    """Markdown; a dash where a value is undefined. [low, high]: 95 % interval over documents or templates."""
    text, tasks = found["text"], found["tasks"]
    settings = found["settings"]
    bins = settings["show"]["calibration_bins"]
    parts = [
        "# Dense model, student, circuits and edits side by side\n",
        f"## Held-out text\n\n{counts_line(text['counts'], 'tokens')} {text['blocks']} blocks of "
        f"{text['documents']} documents; intervals draw documents. Calibration error: {bins} bins of equal "
        "width. Circuits are meant for their tasks' prompts: alone on text they are expected to be poor. "
        "Edited models are under their edit's steering form, added where its gate is open.\n",
        markdown(("model", *FIGURES), _model_rows(text["models"])),
        f"### Student by class of token ({text['kind']})\n",
        markdown(("class", "tokens", "dense loss", *FIGURES), _class_rows(text["models"])),
        *(_worst_tokens(name, rows) for name, rows in text["worst"].items()),
        "## Tasks\n\nCircuits answer by their calibration. An edit moves answers to their distractors, so "
        "the edited model is meant to be wrong.\n",
        markdown(TASK_COLUMNS, [_task_row(task, entry) for task, entry in tasks.items()]),
        _excluded_prompts(tasks),
        _missing_models(tasks),
        _worst_prompts(tasks),
    ]
    return "\n".join(part for part in parts if part)


def counts_line(counts: Mapping[str, Any], unit: str) -> str:
    """What was planned, run, scored and excluded, and why."""
    reasons = "; ".join(f"{row['reason']}: {row['count']:,}" for row in counts["reasons"])
    line = (
        f"{counts['planned']:,} {unit} planned, {counts['run']:,} run, {counts['scored']:,} scored, "
        f"{counts['excluded']:,} excluded"
    )
    return f"{line} ({reasons})." if reasons else f"{line}."


def code(text: str) -> str:
    """Any text as code in a table: control characters and what is not ASCII by their escapes."""
    escaped = json.dumps(text)[1:-1].replace('\\"', '"').replace("|", "\\|")
    return f"`` {escaped} ``" if "`" in escaped else f"`{escaped}`"


def interval(value: Any, *keys: str) -> str:
    """value [low, high]."""
    for key in keys:
        value = value.get(key, {}) if isinstance(value, Mapping) else {}
    ends = [number(at(value, end)) for end in ("low", "high")]
    return number(at(value)) + ("" if "-" in ends else f" [{', '.join(ends)}]")


def _figures(summary: Mapping[str, Any]) -> list[str]:
    return [
        interval(summary, "loss"),
        interval(summary, "loss_difference"),
        interval(summary, "loss_correlation", "pearson"),
        interval(summary, "kl"),
        percent(at(summary, "top1_agreement"), 1),
        percent(at(summary, "top1_accuracy"), 1),
        percent(at(summary, "calibration_error"), 1),
    ]


def _model_rows(models: Mapping[str, Any]) -> list[list[str]]:
    """A model that there is not has its reason in its first column."""
    rows = []
    for name, entry in models.items():
        label = f"{name}: {entry['undefined']}" if "undefined" in entry else name
        rows.append([label, *_figures(entry.get("overall", {}))])
    return rows


def _class_rows(models: Mapping[str, Any]) -> list[list[str]]:
    dense, student = (models[name]["by_class"] for name in ("dense", "student"))
    return [
        [label, f"{summary['tokens']:,}", number(at(dense[label], "loss")), *_figures(summary)]
        for label, summary in student.items()
        if summary["tokens"]
    ]


def _worst_tokens(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    shown = rows[:WORST_SHOWN]
    columns = ("before", "token", "class", "KL", "loss: dense / student", "dense: next", "student: next")
    table = [
        [
            code(row["before"][-CONTEXT_SHOWN:]),
            code(row["token"]),
            row["class"],
            number(row["kl"]),
            " / ".join(number(loss) for loss in row["loss"].values()),
            *(
                ", ".join(f"{code(top['token'])} {percent(top['probability'])}" for top in tops)
                for tops in row["top"].values()
            ),
        ]
        for row in shown
    ]
    title = f"### Where dense model and student differ most, {name.replace('_', ' ')}"
    return f"{title}\n\n{len(shown)} of the {len(rows)} kept.\n\n{markdown(columns, table)}" if rows else ""


def _task_row(task: str, entry: Mapping[str, Any]) -> list[str]:
    models = entry.get("models", {})
    names = ("dense", "student", "circuit", "edited")
    against = at(models, "student", "against", "dense") or {}
    return [
        f"`{task}`",
        " / ".join(percent(at(models, name, "accuracy")) for name in names),
        " / ".join(number(at(models, name, "loss")) for name in names),
        interval(against, "accuracy_difference"),
        interval(against, "loss_difference"),
        percent(at(models, "edited", "flips")),
        number(at(entry, "edit", "strength")),
        " / ".join(f"{entry['counts'][key]}" for key in ("planned", "run", "scored", "excluded")),
    ]


def _excluded_prompts(tasks: Mapping[str, Any]) -> str:
    lines = [
        f"- `{task}`: {counts_line(entry['counts'], 'prompts')}"
        for task, entry in tasks.items()
        if entry["counts"]["excluded"]
    ]
    return "### Excluded prompts\n\n" + "\n".join(lines) + "\n" if lines else ""


def _missing_models(tasks: Mapping[str, Any]) -> str:
    """Which circuits and edits there are not, by the reason."""
    reasons: dict[str, list[str]] = {}
    for task, entry in tasks.items():
        for name, model in entry.get("models", {}).items():
            if "undefined" in model:
                reasons.setdefault(f"{name}: {model['undefined']}", []).append(f"`{task}`")
    lines = [f"- {reason} ({', '.join(found)})" for reason, found in reasons.items()]
    return "### Models that there are not\n\n" + "\n".join(lines) + "\n" if lines else ""


def _worst_prompts(tasks: Mapping[str, Any]) -> str:
    rows = [(abs(row["gap"]), task, row) for task, entry in tasks.items() for row in entry.get("worst", ())]
    rows.sort(key=lambda row: -row[0])
    columns = ("task", "prompt ends in", "answer / distractor", "logit difference: dense / student")
    table = [
        [
            f"`{task}`",
            code(row["prompt"][-CONTEXT_SHOWN:]),
            f"{code(row['answer'])} / {code(row['distractor'])}",
            " / ".join(number(row["logit_difference"][name]) for name in ("dense", "student")),
        ]
        for _, task, row in rows[:WORST_SHOWN]
    ]
    title = "### Prompts on which dense model and student differ most"
    kept = f"{len(table)} of the {len(rows)} kept."
    return f"{title}\n\n{kept}\n\n{markdown(columns, table)}" if rows else ""
