"""The table of what circuits say of the dense model: one row per task, every figure from the files."""

from collections.abc import Mapping, Sequence
from typing import Any

from bridges.tables import at, markdown, number, percent

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
    return markdown(COLUMNS, [_row(entry) for entry in sorted(found, key=lambda entry: entry["task"])])


def _row(entry: Mapping[str, Any]) -> list[str]:
    monitor, image = entry["monitor"], entry["image"]
    models = at(entry, "attacks", "distractor", "models") or {}
    control = at(image, "random_subspaces")
    return [
        f"`{entry['task']}`",
        str(at(monitor, "site") or "-"),
        " / ".join(number(at(monitor, "prompts", name, "auroc")) for name in ("held_out", "shifted")),
        " / ".join(
            number(at(monitor, "prompts", name, "logistic_probe", "auroc"))
            for name in ("held_out", "shifted")
        ),
        percent(at(monitor, "share_of_text_tokens_with_alarm")),
        percent(at(monitor, "cost", "monitor_share_of_dense"), 1),
        percent(at(image, "accuracy")),
        percent(at(control, "accuracy_mean")),
        number(at(control, "p")),
        number(at(control, "selectivity_p")),
        *(
            f"{percent(at(models, name, 'found'))} / {percent(at(models, name, 'random'))}"
            for name in ("circuit", "dense")
        ),
    ]
