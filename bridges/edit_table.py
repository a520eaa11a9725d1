"""The table of edits: one row per task, every figure from the edit files."""

from collections.abc import Mapping, Sequence
from typing import Any

from bridges.tables import at, markdown, number, percent
from extractor.errors import InputError

GOAL = 0.8  # of indirect flips: an edit's strength is the least that reaches it, or else the best
FORM = "gated"  # in which edit and difference of means are compared
COLUMNS = (
    "task", "site", "nodes", "smallest at strength 1 / 2 (flips)", "strength", "flips: indirect / total",
    "share of all channels' effect", "all channels: best site (flips)",
    "random nodes / direction", "steering: prompts, strength",
    "its flips: indirect / total", "its KL on text", "fires on", "student predicts (r)",
    "flips at equal KL: edit / difference of means",
    "after the first attention: nodes, site, strength (flips)", "refused",
)  # fmt: skip
NOTES = """
Patch: each prompt's nodes at the counterfactual prompt's values; flip rates of held-out prompts, at the least
strength with at least 80 % by the indirect effect, or else at the best. Its share is of the indirect change
of answer minus distractor, in nats, that all channels of the site make at that strength. All channels of one
site, moved to the first strength sought, carry what it carries; a few chosen ones can flip more. The smallest
are the sets that reach the goal where they were chosen, here with their indirect flips on held-out prompts.
Steering: one vector behind a gate, both chosen on training prompts and text; its flips and its KL to the
unedited model (held-out text, nats/token) are at the same strength, which is its own.
Edit against difference of means: both gated, within the limit of off-target KL, by the indirect effect.
"""


def edit_table(edits: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, with what the columns mean below; a dash where a value is undefined or was not measured."""
    rows = [_row(entry) for entry in sorted(edits, key=lambda entry: entry["task"])]
    return markdown(COLUMNS, rows) + NOTES


def _row(edit: Mapping[str, Any]) -> list[str]:
    index = edit["strengths"].index(best_strength(edit["strengths"], edit["flip_rate_indirect"]))
    strength = f"{edit['strengths'][index]:g}"
    steering = at(edit, "steering_form")
    return [
        f"`{edit['task']}`",
        edit["site"],
        str(edit["size"]),
        " / ".join(map(_smallest, edit["smallest"].values())),
        strength,
        f"{percent(edit['flip_rate_indirect'][index])} / {percent(edit['flip_rate'][index])}",
        percent(at(edit, "share_of_all_channels", strength)),
        _all_channels(at(edit, "all_channels")),
        f"{percent(edit['control_random_node'][index])} / {percent(edit['control_random_direction'][index])}",
        _named(at(steering, "direction"), at(steering, "strength")),
        f"{percent(at(steering, 'flip_rate_indirect'))} / {percent(at(steering, 'flip_rate'))}",
        number(at(edit, "off_target_kl")),
        percent(at(steering, "share_of_tokens"), 2),
        number(at(edit, "prediction", "stream", "pearson")),
        _against_means(edit),
        _later(edit),
        "yes" if edit["refusals"] else "no",
    ]


def _smallest(found: Mapping[str, Any]) -> str:
    size = at(found, "size")
    return "-" if size is None else f"{size} ({percent(at(found, 'flip_rate_indirect'))})"


def _all_channels(rates: Mapping[str, Any] | None) -> str:
    """The site at which moving all channels flips most, the first of those that are alike."""
    if not rates or "undefined" in rates:
        return "-"
    site = max(rates, key=rates.__getitem__)
    return f"{site} ({percent(rates[site])})"


def _later(edit: Mapping[str, Any]) -> str:
    later = at(edit, "later")
    if at(later, "size") is None:
        return "-"
    flips = percent(at(later, "flip_rate_indirect"))
    return f"{later['size']}, {later['site']}, {later['strength']:g} ({flips})"


def _named(direction: str | None, strength: float | None) -> str:
    return "-" if direction is None or strength is None else f"{direction}, {strength:g}"


def _against_means(edit: Mapping[str, Any]) -> str:
    """Both rates at the largest compared KL that is within the edit's limit, and whether the edit's is no
    smaller."""
    rows = at(edit, "alternatives", "against_difference_of_means", FORM)
    allowed = at(edit, "limits", "off_target_kl")
    if not isinstance(rows, Mapping) or "undefined" in rows:
        return "-"
    within = [limit for limit in rows if allowed is None or float(limit) <= allowed]
    if not within:
        return "-"
    row = rows[max(within, key=float)]
    is_as_good = at(row, "at_least_as_good")
    word = ("yes" if is_as_good else "no") if isinstance(is_as_good, bool) else "-"
    return f"{percent(at(row, 'edit'))} / {percent(at(row, 'difference_of_means'))}, {word}"


def best_strength(strengths: Sequence[float], indirect: Sequence[float]) -> float:
    """The least with a flip rate of at least 80 % by the indirect effect, or else the best; never zero."""
    rates = {s: rate for s, rate in zip(strengths, indirect, strict=True) if s}
    if not rates:
        raise InputError("the edit was measured at no strength but zero")
    reached = [s for s, rate in rates.items() if rate >= GOAL]
    return min(reached) if reached else max(rates, key=rates.__getitem__)
