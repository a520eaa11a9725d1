"""The table of circuits: one row per task, every figure from the circuit files."""

from collections.abc import Sequence
from pathlib import Path

from extractor.circuit import Circuit
from extractor.errors import InputError
from extractor.statistics import holm

COLUMNS = {
    "task": "task",
    "student_accuracy": "whole student",
    "nodes": "nodes",
    "edges": "edges",
    "loss": "held-out loss",
    "sufficiency": "sufficiency",
    "necessity": "necessity",
    "random": "better than random circuits",
    "p": "p (Holm)",
    "adversarial": "loss, worst node restored",
    "recurrence": "recurrence over seeds",
    "verdict": "verdict",
    "failed": "what it fails",
}
OF_NO_CIRCUIT = ("task", "student_accuracy", "verdict", "failed")
NAMED = 3  # failed checks, the first ones; how many more there are is said


def circuit_table(circuits: Sequence[Circuit]) -> str:
    """Markdown; undefined values show as a dash, values that were not measured as "not run".

    `p` is that of a random circuit of the same size being as good alone, adjusted over the tasks (Holm).
    Where no circuit was found there is nothing to show but the student and the verdict.
    """
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    p_values = {
        circuit.task: _at(circuit.evidence, "random_circuits", "sufficiency_p") for circuit in circuits
    }
    adjusted = holm({task: p for task, p in p_values.items() if p is not None})
    for circuit in sorted(circuits, key=lambda circuit: circuit.task):
        row = _row(circuit) | {"p": _number(adjusted.get(circuit.task))}
        if _is_missing(circuit):
            row = dict.fromkeys(COLUMNS, "-") | {name: row[name] for name in OF_NO_CIRCUIT}
        lines.append("| " + " | ".join(row[name] for name in COLUMNS) + " |")
    words = [_at(circuit.evidence, "verdict", "word") for circuit in circuits]
    counts = ", ".join(
        f"{words.count(word)} {word}" for word in ("supported", "partly", "not supported", "not tested")
    )
    return "\n".join([*lines, "", f"Verdicts: {counts}.", ""])


def put_table(path: Path, table: str, name: str = "circuits") -> None:
    """Put a table between the markers of a Markdown file, `<!-- name -->` and `<!-- /name -->`.

    Raises:
        InputError: no such file, or not exactly one pair of markers.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"table '{path}' cannot be read: {error.strerror}") from None
    if text.count(start) != 1 or text.count(end) != 1:
        raise InputError(
            f"table '{path}' needs one line '{start}' and one line '{end}'; the table goes between"
        )
    before, rest = text.split(start)
    after = rest.split(end)[1]
    path.write_text(f"{before}{start}\n{table}{end}{after}", encoding="utf-8")


def _row(circuit: Circuit) -> dict[str, str]:
    found = circuit.evidence
    worst = _at(found, "verdict", "reasons") or []
    adversarial = [check["value"] for check in worst if check["name"].startswith("loss with the worst")]
    return {
        "task": f"`{circuit.task}`",
        "student_accuracy": _percent(_at(found, "student_accuracy")),
        "nodes": f"{len(circuit.nodes):,}",
        "edges": f"{len(circuit.edges):,}",
        "loss": _number(_at(found, "loss")),
        "sufficiency": _number(_at(found, "sufficiency"), 2),
        "necessity": _number(_at(found, "necessity"), 2),
        "random": _number(_at(found, "random_circuits", "sufficiency_percentile"), 0, unit=" %"),
        "adversarial": _number(next(iter(adversarial), None), 2),
        "recurrence": _percent(_at(found, "controls", "seeds", "recurrence")),
        "verdict": str(_at(found, "verdict", "word") or "not tested"),
        "failed": _failed(circuit),
    }


def _failed(circuit: Circuit) -> str:
    """Which checks do not pass, with value and limit: those that everything rests on come first."""
    if _is_missing(circuit):
        return "no circuit: the student itself, or every mask, stays above the target loss"
    reasons = _at(circuit.evidence, "verdict", "reasons") or []
    failed = sorted(
        (check for check in reasons if not check["passed"]), key=lambda check: not check["is_essential"]
    )
    words = [
        f"{check['name']} {'not run' if check['not_run'] else _number(check['value'], 2)} "
        f"({check['relation']} {check['limit']:.2g})"
        for check in failed[:NAMED]
    ]
    more = [f"{len(failed) - NAMED} more"] if len(failed) > NAMED else []
    return "; ".join(words + more)


def _is_missing(circuit: Circuit) -> bool:
    return circuit.settings.get("reached_loss", 0.0) is None


def _at(value: object, *keys: str) -> object:
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def _number(value: object, digits: int = 3, unit: str = "") -> str:
    if value is None:
        return "not run"
    return f"{value:.{digits}f}{unit}" if isinstance(value, int | float) else "-"


def _percent(value: object) -> str:
    return _number(100 * value if isinstance(value, int | float) else value, 0, unit=" %")
