"""Markdown tables from JSON facts: a dash where a value is undefined or was not measured."""

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def at(value: Any, *keys: str) -> Any:
    """What stands below some keys; of an interval its value; None where there is nothing."""
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value["value"] if isinstance(value, Mapping) and "value" in value else value


def number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "-"


def percent(value: Any, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %" if isinstance(value, int | float) else "-"
