"""The report of a run: `report.json` as it was measured, and one HTML file made from it alone.

1. `tidy`: numbers JSON cannot hold become `{"undefined": reason}`, so no page ever says NaN.
2. `seal` (bridges.integrity): a digest for every field.
3. `render_html`: `templates/report.html.jinja` and `templates/report/` lay the page out; every expression
   in them passes through `as_text` and `visible` before it is escaped. No request, no style
   attribute; one script, which moves the recorded interventions and without which nothing is missing.
"""

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, cast

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from bridges.charts import forest, scatter, size_chart, strength_curve
from bridges.checklists import GLOSSARY, checklist
from bridges.desk_table import desk_rows
from bridges.drawing import as_text, node_rows, number, percent, reason, signed, visible
from bridges.integrity import data_block, seal, with_page_digest
from bridges.layouts import block_rows, circuit_figure
from bridges.report_values import (
    SERIES,
    at,
    best_index,
    check_rows,
    checks_line,
    difference,
    entries,
    flatten,
    interval,
    listed,
    lowest,
    recurrence,
    spread,
    strength_rows,
    summary_rows,
    task_names,
    tidy,
    undefined_values,
    verdict,
)
from extractor.artifacts import combine_hashes, file_sha256, write_json, write_text

__all__ = ["page_code", "render_html", "summary_rows", "verdict", "write_report"]

HERE = Path(__file__).parent
TEMPLATES = HERE / "templates"
DRAWN_BY = (
    "report",
    "report_values",
    "charts",
    "checklists",
    "desk_table",
    "drawing",
    "layouts",
    "integrity",
)


def write_report(report: dict[str, Any], run_dir: Path) -> Path:
    """Write `report.json` and `report.html` into a run folder; returns the page's path."""
    report = seal(tidy(report), page_code())
    page = render_html(report)
    write_json(run_dir / "report.json", report)
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def render_html(report: dict[str, Any]) -> str:
    """The whole page as one self-contained HTML document."""
    report = tidy(report)
    style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            json_sha256=_json_sha256(report),
            style=Markup(style),
            script=Markup(script),
            data=Markup(data_block(report)),
        )
    )
    return with_page_digest(page.rstrip() + "\n")


def page_code() -> str:
    """One hash over everything that draws the page: the same code and the same record give the same bytes."""
    files = [HERE / f"{name}.py" for name in DRAWN_BY]
    files += [path for path in TEMPLATES.rglob("*") if "report" in path.relative_to(TEMPLATES).as_posix()]
    return combine_hashes({path.name: file_sha256(path) for path in files if path.is_file()})


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_shown,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (
        *(
            at,
            best_index,
            check_rows,
            checklist,
            checks_line,
            block_rows,
            circuit_figure,
            desk_rows,
            difference,
            entries,
            flatten,
        ),
        *(forest, interval, listed, lowest, node_rows, reason, recurrence, scatter, size_chart, spread),
        *(strength_curve, strength_rows, summary_rows, task_names, undefined_values, verdict),
    )
    names = cast(dict[str, Any], environment.globals)
    names |= {function.__name__: function for function in functions}
    names |= {"SERIES": SERIES, "GLOSSARY": GLOSSARY, "number": number, "percent": percent, "signed": signed}
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
