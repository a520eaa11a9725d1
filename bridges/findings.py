"""What `sparsebridge doctor` and `sparsebridge check` found: one line each, as text or as JSON."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warning", "problem", "not checked"]
STATES: tuple[State, ...] = ("ok", "warning", "problem", "not checked")


@dataclass(frozen=True)
class Finding:
    """One check: its name, how it went, what was found, and what to do about it."""

    name: str
    state: State
    found: str
    advice: str = ""


def print_findings(findings: Sequence[Finding], facts: dict[str, Any], as_json: bool) -> None:
    """To standard output; `facts` are for JSON alone."""
    if as_json:
        record = {"schema_version": 1, **facts, "findings": [asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
        return
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        advice = f" -> {finding.advice}" if finding.advice else ""
        sys.stdout.write(one_line(f"{finding.state:<11}  {finding.name:<{width}}  {finding.found}{advice}"))
    sys.stdout.write(f"{_counts(findings)}\n")


def has_problem(findings: Iterable[Finding]) -> bool:
    return any(finding.state == "problem" for finding in findings)


def one_line(text: str) -> str:
    """A line for a terminal: what names and files of others hold cannot move its cursor."""
    line = " ".join(text.splitlines())
    if not (line.isascii() and line.isprintable()):
        from bridges.drawing import visible  # imports torch, which `doctor` must live without

        line = visible(line)
    return f"{line}\n"


def _counts(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.state for finding in findings)
    return ", ".join(
        f"{counts[state]} {state}" for state in STATES if counts[state] or state != "not checked"
    )
