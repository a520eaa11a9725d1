"""The table of what circuits say of the dense model: one row per task, every figure from the files."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "task", "monitor at", "AUROC held out / shifted", "probe held out / shifted", "alarm on text",
    "cost, share of the dense model", "accuracy without the image", "random subspaces", "p", "selectivity p",
    "distractors: circuit breaks / random", "dense model breaks / random",
)  # fmt: skip


def transfer_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; a dash where a value is undefined.

    `p`: a random subspace of the same dimension and energy takes as much of the task's margin; `selectivity
    p`: it takes as much of this task and as little of the others.
    """
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for entry in sorted(found, key=lambda entry: entry["task"]):
        lines.append("| " + " | ".join(_row(entry)) + " |")
    return "\n".join([*lines, ""])


def _row(entry: Mapping[str, Any]) -> list[str]:
    monitor, image = entry["monitor"], entry["image"]
    models = _at(entry, "attacks", "distractor", "models") or {}
    control = _at(image, "random_subspaces")
    return [
        f"`{entry['task']}`",
        str(_at(monitor, "site") or "-"),
        " / ".join(_number(_at(monitor, "prompts", name, "auroc")) for name in ("held_out", "shifted")),
        " / ".join(
            _number(_at(monitor, "prompts", name, "logistic_probe", "auroc"))
            for name in ("held_out", "shifted")
        ),
        _percent(_at(monitor, "share_of_text_tokens_with_alarm")),
        _percent(_at(monitor, "cost", "monitor_share_of_dense"), 1),
        _percent(_at(image, "accuracy")),
        _percent(_at(control, "accuracy_mean")),
        _number(_at(control, "p")),
        _number(_at(control, "selectivity_p")),
        *(
            f"{_percent(_at(models, name, 'found'))} / {_percent(_at(models, name, 'random'))}"
            for name in ("circuit", "dense")
        ),
    ]


def _at(value: Any, *keys: str) -> Any:
    """What stands below some keys; of an interval its value; None where there is nothing."""
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value["value"] if isinstance(value, Mapping) and "value" in value else value


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "-"


def _percent(value: Any, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %" if isinstance(value, int | float) else "-"
