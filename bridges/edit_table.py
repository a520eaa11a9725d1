"""The table of edits: one row per task, every figure from the edit files."""

from collections.abc import Mapping, Sequence
from typing import Any

from bridges.tables import at, markdown, number, percent
from extractor.errors import InputError

GOAL = 0.8  # of indirect flips: an edit's strength is the least that reaches it, or else the best
COLUMNS = (
    "task", "site", "nodes", "smallest at strength 1 / 2", "share of all channels' effect", "strength",
    "flips: indirect / total", "random nodes / direction", "off-target KL", "student predicts (r)",
    "at least as good as difference of means", "refused",
)  # fmt: skip


def edit_table(edits: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; a dash where a value is undefined or was not measured.

    Flip rates are at the least strength with at least 80 % by the indirect effect, or else at the best.
    """
    return markdown(COLUMNS, [_row(entry) for entry in sorted(edits, key=lambda entry: entry["task"])])


def _row(edit: Mapping[str, Any]) -> list[str]:
    index = edit["strengths"].index(best_strength(edit["strengths"], edit["flip_rate_indirect"]))
    smallest = list(edit["smallest"].values())
    first = smallest[0]
    compared = at(edit, "alternatives", "at_least_as_good")
    return [
        f"`{edit['task']}`",
        edit["site"],
        str(edit["size"]),
        " / ".join(number(at(found, "size")) for found in smallest),
        percent(at(first, "share_of_everything")),
        f"{edit['strengths'][index]:g}",
        f"{percent(edit['flip_rate_indirect'][index])} / {percent(edit['flip_rate'][index])}",
        f"{percent(edit['control_random_node'][index])} / {percent(edit['control_random_direction'][index])}",
        number(at(edit, "off_target_kl")),
        number(at(edit, "prediction", "stream", "pearson")),
        {True: "yes", False: "no"}.get(compared, "-"),
        "yes" if edit["refusals"] else "no",
    ]


def best_strength(strengths: Sequence[float], indirect: Sequence[float]) -> float:
    """The least with a flip rate of at least 80 % by the indirect effect, or else the best; never zero."""
    rates = {s: rate for s, rate in zip(strengths, indirect, strict=True) if s}
    if not rates:
        raise InputError("the edit was measured at no strength but zero")
    reached = [s for s, rate in rates.items() if rate >= GOAL]
    return min(reached) if reached else max(rates, key=rates.__getitem__)
