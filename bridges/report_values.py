"""What the report's page and tables read from the record: values, rows of tables, the verdict.

A value is a finite number or `{"undefined": reason}`; what the record lacks is "not recorded".
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from bridges.drawing import as_text, finite, number, percent, reason, visible

SERIES = (
    ("flip_rate", "total effect"),
    ("flip_rate_indirect", "indirect effect"),
    ("control_random_node", "control: random nodes (indirect)"),
    ("control_random_direction", "control: random direction (indirect)"),
)
"""Keys in an edit's record and their names on the page; the position picks the line style."""


def tidy(value: Any) -> Any:
    """A copy in which numbers that are not finite are undefined, as JSON needs them to be."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"undefined": f"measured as {'infinite' if math.isinf(value) else 'no number'}"}
    if isinstance(value, dict):
        return {str(key): tidy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(inner) for inner in value]
    return value


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The run in a few lines: models, then circuit and edit of every task, as (what, value)."""
    student = at(report, "student")
    rows = [
        ("dense model, CE", number(at(report, "dense", "ce"), "nats/token")),
        ("student, CE", number(at(student, "ce"), "nats/token")),
        ("student, KL to dense", number(at(student, "kl_dense"), "nats/token")),
        ("KL to dense before training", number(at(student, "init_kl_dense"), "nats/token")),
        ("student, weight density asked for", percent(at(student, "density"))),
        ("student, nonzeros", _of(at(student, "nonzeros"), at(student, "parameters"), "weights")),
    ]
    for task, circuit in entries(at(report, "circuits")):
        rows.append((f"circuit, {visible(task)}", _circuit_line(circuit)))
    for task, edit in entries(at(report, "edits")):
        rows.append((f"edit, {visible(task)}", _edit_line(edit)))
    return rows


def verdict(report: dict[str, Any]) -> tuple[str, str]:
    """A word and the count behind it: criteria set before the run against what was measured."""
    criteria = listed(at(report, "criteria"))
    met, tested = (sum(at(c, "met") is ok for c in criteria) for ok in (True, False))
    tested += met
    count = f"{met} of {len(criteria)} criteria set before the run are met"
    if untested := len(criteria) - tested:
        count += f", {untested} could not be tested"
    if at(report, "status") != "complete":
        return "not tested", f"the run is not complete (status: {as_text(at(report, 'status'))})"
    if not tested:
        return "not tested", count
    if met == len(criteria):
        return "supported", count
    return ("partly supported" if met else "not supported"), count


def at(value: Any, *keys: str | int | None) -> Any:
    """The value below `keys`; an undefined value on the way is the answer, a gap is None."""
    for key in keys:
        if reason(value) is not None:
            return value
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return None
    return value


def entries(value: Any) -> list[tuple[str, Any]]:
    """The named parts of a section; none where the section itself is undefined or missing."""
    return list(value.items()) if isinstance(value, dict) and reason(value) is None else []


def task_names(
    report: dict[str, Any], sections: Sequence[str] = ("dense", "student", "circuits", "edits")
) -> list[str]:
    """Every task that any of the sections speaks of, in the order of first mention."""
    parts = [at(report, *((name, "tasks") if name in ("dense", "student") else (name,))) for name in sections]
    return list(dict.fromkeys(task for part in parts for task, _ in entries(part)))


def undefined_values(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Every undefined value as (where, why)."""
    if (why := reason(value)) is not None:
        return [(path, why)]
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    else:
        inner = ()
    found = [undefined_values(part, f"{path}.{key}" if path else str(key)) for key, part in inner]
    return [pair for pairs in found for pair in pairs]


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, text)."""
    if isinstance(value, dict) and value and reason(value) is None:
        found = [flatten(part, f"{path}.{key}" if path else key) for key, part in value.items()]
        return [pair for pairs in found for pair in pairs]
    return [(path, "none" if value == {} else as_text(value))]


def difference(new: Any, old: Any) -> Any:
    """`new - old`, or why there is none."""
    a, b = finite(new), finite(old)
    if a is None or b is None:
        return {"undefined": "a side is missing"}
    return a - b


def interval(value: Any) -> str:
    """A pair of shares as percentages; anything else as text."""
    if isinstance(value, list) and len(value) == 2:
        return f"{percent(value[0])} to {percent(value[1])}"
    return as_text(value)


def best_index(edit: Any) -> int | None:
    """The least strength above 0 with the highest indirect flip rate, or total where that is unknown.

    The indirect rate, because a total one can be nothing but a direct write to the logits.
    """
    strengths = listed(at(edit, "strengths"))
    for key in ("flip_rate_indirect", "flip_rate"):
        ranked = [
            (-rate, abs(strength), i)
            for i, x in enumerate(strengths)
            if (strength := finite(x)) and (rate := finite(at(edit, key, i))) is not None
        ]
        if ranked:
            return min(ranked)[2]
    return None


def strength_rows(edit: Any) -> list[list[str]]:
    """The numbers of a strength curve as text: strength and four rates."""
    return [
        [number(strength)] + [percent(at(edit, key, i)) for key, _ in SERIES]
        for i, strength in enumerate(listed(at(edit, "strengths")))
    ]


def checks_line(circuit: Any, passed: bool) -> str:
    """The checks behind a circuit's verdict that passed, or that did not, with what was measured."""
    checks = listed(at(circuit, "verdict", "reasons"))

    def has_passed(check: Any) -> bool:
        is_known = all(reason(at(check, key)) is None for key in ("value", "limit"))
        return is_known and at(check, "passed") is True

    own = [check for check in checks if has_passed(check) is passed]
    if passed:
        return f"{len(own)} of {len(checks)}"
    shown = (
        f"{as_text(at(check, 'name'))}: {number(at(check, 'value'))}, "
        f"{as_text(at(check, 'relation'))} {number(at(check, 'limit'))}"
        for check in own
    )
    return "; ".join(shown) or "none"


def listed(value: Any) -> list[Any]:
    """The list, or an empty one in its place."""
    return value if isinstance(value, list) else []


def _of(part: Any, whole: Any, what: str) -> str:
    return f"{number(part)} of {number(whole)} {what}"


def _circuit_line(circuit: Any) -> str:
    if (why := reason(circuit)) is not None:
        return f"undefined: {why}"
    sizes = (_of(at(circuit, key), at(circuit, f"{key}_total"), key) for key in ("nodes", "edges"))
    return (
        f"{', '.join(sizes)}; loss {number(at(circuit, 'loss'), 'nats')}; "
        f"accuracy {percent(at(circuit, 'accuracy'))}; "
        f"without it {percent(at(circuit, 'accuracy_without'))}"
    )


def _edit_line(edit: Any) -> str:
    if (why := reason(edit)) is not None:
        return f"undefined: {why}"
    start = f"{as_text(at(edit, 'site'))}, {number(at(edit, 'size'))} nodes"
    best = best_index(edit)
    if best is None:
        return f"{start}; no strength with a known flip rate"
    total, indirect, nodes, direction = (percent(at(edit, key, best)) for key, _ in SERIES)
    return (
        f"{start}; best strength {number(at(edit, 'strengths', best))}: flips {total} total, "
        f"{indirect} indirect; controls {nodes} random nodes, {direction} random direction"
    )


def check_rows(circuit: Any) -> list[tuple[str, str, str, str]]:
    """Every check of a circuit's verdict: name, what was measured, what was asked, the outcome."""
    rows = []
    for check in listed(at(circuit, "verdict", "reasons")):
        asked = f"{as_text(at(check, 'relation'))} {number(at(check, 'limit'))}"
        if at(check, "not_run") is True:
            outcome = "not run"
        else:
            outcome = {True: "passed", False: "failed"}.get(at(check, "passed"), "not recorded")
        essential = " (essential)" if at(check, "is_essential") is True else ""
        rows.append((as_text(at(check, "name")) + essential, number(at(check, "value")), asked, outcome))
    return rows


def recurrence(circuit: Any) -> list[Any]:
    """How many of a circuit's nodes are core, contingent and noise over mask seeds."""
    core, noise = (at(circuit, "controls", "seeds", key) for key in ("core", "noise"))
    nodes = finite(at(circuit, "nodes"))
    if not isinstance(core, list) or not isinstance(noise, list) or nodes is None:
        return [{"undefined": "needs more than one seed"}] * 3
    return [len(core), int(nodes) - len(core) - len(noise), len(noise)]


def lowest(rows: Any, key: str) -> Any:
    """The least known value of a key in a list of findings; why there is none."""
    known = [x for row in listed(rows) if (x := finite(at(row, key))) is not None]
    return min(known) if known else {"undefined": "none measured"}


def spread(mark: Any, show: Callable[[Any], str] = number) -> str:
    """A value with its interval, as text; the value alone where there is none."""
    if not isinstance(mark, dict) or reason(mark) is not None:
        return show(mark)
    ends = at(mark, "low"), at(mark, "high")
    if any(finite(end) is None for end in ends):
        why = next((text for end in ends if (text := reason(end)) is not None), "not measured")
        return f"{show(at(mark, 'value'))} (interval undefined: {why})"
    return f"{show(at(mark, 'value'))} ({show(ends[0])} to {show(ends[1])})"
