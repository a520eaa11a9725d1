"""The report of a run: `report.json` as it was measured, and one HTML file made from it alone.

1. `tidy`: numbers JSON cannot hold become `{"undefined": reason}`, so no page ever says NaN.
2. `render_html`: `templates/report.html.jinja` lays the page out; every expression in it passes
   through `as_text` and `visible` before it is escaped. No script, no request, no style attribute.
3. `summary_rows`: the short table that opens the page and that a recipe may show at its end.

A value is a finite number or `{"undefined": reason}`; what the record lacks is "not recorded".
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from bridges.drawing import (
    as_text,
    circuit_svg,
    finite,
    node_rows,
    number,
    percent,
    reason,
    signed,
    visible,
)
from extractor.artifacts import write_json, write_text

__all__ = ["circuit_svg", "render_html", "summary_rows", "verdict", "write_report"]

SERIES = (
    ("flip_rate", "total effect"),
    ("flip_rate_indirect", "indirect effect"),
    ("control_random_node", "control: random nodes (indirect)"),
    ("control_random_direction", "control: random direction (indirect)"),
)
"""Keys in an edit's record and their names on the page; the position picks the line style."""

_LEFT, _TOP, _WIDTH, _HEIGHT = 46, 12, 300, 180
_MARKERS = (  # circle, square, triangle, diamond
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "M-3-3h6v6h-6z",
    "M0-4l4 7h-8z",
    "M0-4.5l4 4.5l-4 4.5l-4-4.5z",
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series of a strength curve: unbroken runs, and points with their titles."""

    name: str
    marker: str
    runs: list[str]
    points: list[tuple[float, float, str]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Where everything in the chart of an edit lies, in SVG units."""

    grid: list[tuple[float, str]]
    ticks: list[tuple[float, str]]
    lines: list[Line]


def write_report(report: dict[str, Any], run_dir: Path) -> Path:
    """Write `report.json` and `report.html` into a run folder; returns the page's path."""
    report = tidy(report)
    page = render_html(report)
    write_json(run_dir / "report.json", report)
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def render_html(report: dict[str, Any]) -> str:
    """The whole page as one self-contained HTML document."""
    report = tidy(report)
    template = _environment().get_template("report.html.jinja")
    return template.render(report=report, json_sha256=_json_sha256(report)).rstrip() + "\n"


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The run in a few lines: models, then circuit and edit of every task, as (what, value)."""
    student = at(report, "student")
    rows = [
        ("dense model, CE", number(at(report, "dense", "ce"), "nats/token")),
        ("student, CE", number(at(student, "ce"), "nats/token")),
        ("student, KL to dense", number(at(student, "kl_dense"), "nats/token")),
        ("KL to dense before training", number(at(student, "init_kl_dense"), "nats/token")),
        ("student, weight density", percent(at(student, "density"))),
        ("student, nonzeros", _of(at(student, "nonzeros"), at(student, "parameters"), "weights")),
    ]
    for task, circuit in entries(at(report, "circuits")):
        rows.append((f"circuit, {visible(task)}", _circuit_line(circuit)))
    for task, edit in entries(at(report, "edits")):
        rows.append((f"edit, {visible(task)}", _edit_line(edit)))
    return rows


def verdict(report: dict[str, Any]) -> tuple[str, str]:
    """A word and the count behind it: criteria set before the run against what was measured."""
    criteria = _listed(at(report, "criteria"))
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


def tidy(value: Any) -> Any:
    """A copy in which numbers that are not finite are undefined, as JSON needs them to be."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"undefined": f"measured as {'infinite' if math.isinf(value) else 'no number'}"}
    if isinstance(value, dict):
        return {str(key): tidy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(inner) for inner in value]
    return value


# --- reading the record ---------------------------------------------------------------------------


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
    """The least strength with the highest indirect flip rate, or total where that is unknown.

    The indirect rate, because a total one can be nothing but a direct write to the logits.
    """
    strengths = _listed(at(edit, "strengths"))
    for key in ("flip_rate_indirect", "flip_rate"):
        ranked = [
            (-rate, abs(strength), i)
            for i, x in enumerate(strengths)
            if (strength := finite(x)) is not None and (rate := finite(at(edit, key, i))) is not None
        ]
        if ranked:
            return min(ranked)[2]
    return None


def strength_rows(edit: Any) -> list[list[str]]:
    """The numbers of a strength curve as text: strength, four rates, off-target KL if recorded."""
    extra = [] if at(edit, "off_target_kl") is None else ["off_target_kl"]
    return [
        [number(strength)]
        + [percent(at(edit, key, i)) for key, _ in SERIES]
        + [number(at(edit, key, i)) for key in extra]
        for i, strength in enumerate(_listed(at(edit, "strengths")))
    ]


def checks_line(circuit: Any, passed: bool) -> str:
    """The checks behind a circuit's verdict that passed, or that did not, with what was measured."""
    checks = _listed(at(circuit, "verdict", "reasons"))

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


def _listed(value: Any) -> list[Any]:
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


# --- the chart of an edit -------------------------------------------------------------------------


def strength_curve(edit: Any) -> Curve | None:
    """Answers flipped against strength: total, indirect, controls; None without strengths."""
    strengths = _listed(at(edit, "strengths"))
    known = [x for x in map(finite, strengths) if x is not None]
    if not known:
        return None
    low, high = min(0.0, *known), max(0.0, *known)
    scale = _WIDTH / ((high - low) or 1.0)
    shifts = [None if (x := finite(s)) is None else (x - low) * scale for s in strengths]
    xs = [None if shift is None else round(_LEFT + shift, 1) for shift in shifts]
    ticks: list[tuple[float, str]] = []
    for x, strength in sorted((x, number(s)) for x, s in zip(xs, strengths, strict=True) if x):
        if not ticks or x - ticks[-1][0] >= 30:  # labels never touch
            ticks.append((x, strength))
    return Curve(
        grid=[(_height_of(share / 100), f"{share} %") for share in (0, 25, 50, 75, 100)],
        ticks=ticks,
        lines=[_curve_line(edit, i, strengths, xs) for i in range(len(SERIES))],
    )


def _height_of(share: float) -> float:
    return round(_TOP + _HEIGHT * (1 - min(1.0, max(0.0, share))), 1)


def _curve_line(edit: Any, series: int, strengths: Sequence[Any], xs: Sequence[float | None]) -> Line:
    """A line that breaks where a value is undefined."""
    key, name = SERIES[series]
    runs: list[list[str]] = [[]]
    points: list[tuple[float, float, str]] = []
    for i, x in enumerate(xs):
        value = at(edit, key, i)
        share = finite(value)
        if x is None or share is None:
            runs.append([])
            continue
        y = _height_of(share)
        runs[-1].append(f"{x} {y}")
        points.append((x, y, f"{name}, strength {number(strengths[i])}: {percent(value)}"))
    paths = [f"M{'L'.join(run)}" for run in runs if len(run) > 1]
    shown = name if points else f"{name}: {as_text(at(edit, key, 0))}"
    return Line(name=shown, marker=_MARKERS[series], runs=paths, points=points)


# --- the page -------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_shown,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (
        *(at, best_index, checks_line, circuit_svg, difference, entries, flatten, interval, node_rows),
        *(reason, strength_curve, strength_rows, summary_rows, task_names, undefined_values, verdict),
    )
    names = cast(dict[str, Any], environment.globals)
    names |= {function.__name__: function for function in functions}
    names |= {"SERIES": SERIES, "number": number, "percent": percent}
    filters = (number, percent, signed, _block, _csp_hash)
    environment.filters |= {function.__name__.lstrip("_"): function for function in filters}
    return environment


def _shown(value: object) -> object:
    """What an expression in the template becomes: the one door to the page for outside text."""
    return value if isinstance(value, Markup) else visible(as_text(value))


def _block(value: object) -> Markup:
    """Text of many lines for a <pre>: its line feeds stay, all else is made visible."""
    lines = value.split("\n") if isinstance(value, str) else [as_text(value)]
    return Markup("\n").join(map(visible, lines))


def _csp_hash(style: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def _json_sha256(report: dict[str, Any]) -> str:
    """The hash of `report.json` as `write_json` writes it."""
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=True) + "\n"
    return hashlib.sha256(text.encode()).hexdigest()
