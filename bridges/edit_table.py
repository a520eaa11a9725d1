"""The table of edits: one row per task, every figure from the edit files."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "task", "site", "nodes", "smallest at strength 1 / 2", "share of all channels' effect", "strength",
    "flips: indirect / total", "random nodes / direction", "off-target KL", "student predicts (r)",
    "at least as good as difference of means", "refused",
)  # fmt: skip


def edit_table(edits: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; a dash where a value is undefined or was not measured.

    Flip rates are at the least strength with at least 80 % by the indirect effect, or else at the best.
    """
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for edit in sorted(edits, key=lambda edit: edit["task"]):
        lines.append("| " + " | ".join(_row(edit)) + " |")
    return "\n".join([*lines, ""])


def _row(edit: Mapping[str, Any]) -> list[str]:
    index = _strength(edit["flip_rate_indirect"])
    smallest = list(edit["smallest"].values())
    first = smallest[0]
    compared = _at(edit, "alternatives", "at_least_as_good")
    return [
        f"`{edit['task']}`",
        edit["site"],
        str(edit["size"]),
        " / ".join(_number(found, "size") for found in smallest),
        _percent(_at(first, "share_of_everything")),
        f"{edit['strengths'][index]:g}",
        f"{_percent(edit['flip_rate_indirect'][index])} / {_percent(edit['flip_rate'][index])}",
        f"{_percent(edit['control_random_node'][index])} / "
        f"{_percent(edit['control_random_direction'][index])}",
        _number(edit, "off_target_kl"),
        _number(edit, "prediction", "stream", "pearson"),
        {True: "yes", False: "no"}.get(compared, "-"),
        "yes" if edit["refusals"] else "no",
    ]


def _strength(rates: Sequence[float], goal: float = 0.8) -> int:
    return next(
        (i for i, rate in enumerate(rates) if rate >= goal), max(range(len(rates)), key=rates.__getitem__)
    )


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _number(value: Any, *keys: str) -> str:
    found = _at(value, *keys)
    if isinstance(found, Mapping) and "value" in found:
        found = found["value"]
    return f"{found:.3g}" if isinstance(found, int | float) else "-"


def _percent(value: Any) -> str:
    return f"{100 * value:.0f} %" if isinstance(value, int | float) else "-"
