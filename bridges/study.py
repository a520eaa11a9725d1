"""What a study's runs came to, and the table that sets them against its base.

A row holds, beside what was run: dense_sha256, student_sha256, held_out_text_sha256, environment, nonzeros,
train_tokens, dense_ce, ce, kl, switch_kl_mean and switch_kl_max (over all single switches between the models,
both ways), mixture_kl, nmse_encode, nmse_decode (losses in nats/token on held-out text), and curves: by task,
the edges of the smallest circuit at each target loss (null: none reaches it). A run that diverged has
{"undefined": reason} instead.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bridges.tables import at, markdown, number
from extractor.artifacts import read_json
from extractor.circuit import Circuit
from extractor.size_curve import geometric_mean
from extractor.statistics import mean_interval

COLUMNS = (
    "variant",
    "what it changes",
    "seeds",
    "nonzeros",
    "KL",
    "KL, less the base's",
    "one switch, mean",
    "one switch, worst",
    "edges",
    "times the base's edges",
)


def run_figures(run: Path) -> dict[str, Any]:
    """The figures of a trained run, and of its circuits' sizes if they were looked for.

    Raises:
        InputError: a file that is missing or damaged.
    """
    evaluation = read_json(run / "evaluation.json", "evaluation", "recipes/train.py")
    trained = read_json(run / "manifest.json", "manifest", "recipes/train.py")["train"]
    student, sites = evaluation["student"], evaluation["bridges"].values()
    switches = [site[name] for site in sites for name in ("kl_dense_to_sparse", "kl_sparse_to_dense")]
    circuits = [Circuit.load(path) for path in sorted((run / "circuits").glob("*.json"))]
    return {
        "dense_sha256": trained["inputs"]["dense"]["sha256"],
        "student_sha256": trained["outputs"]["student/model.safetensors"],
        "held_out_text_sha256": trained["inputs"]["held_out_text_sha256"],
        "environment": trained["environment"],
        "nonzeros": student["nonzeros"],
        "train_tokens": student["train_tokens"],
        "dense_ce": evaluation["dense"]["ce"],
        "ce": student["ce"],
        "kl": student["kl_dense"],
        "switch_kl_mean": _mean(switches),
        "switch_kl_max": max(switches),
        "mixture_kl": evaluation["mixtures"]["kl_mean"],
        "nmse_encode": _mean([site["nmse_encode"] for site in sites]),
        "nmse_decode": _mean([site["nmse_decode"] for site in sites]),
        "curves": {circuit.task: _sizes(circuit) for circuit in circuits},
    }


def _sizes(circuit: Circuit) -> dict[str, float | None]:
    targets = at(circuit.evidence, "size_curve", "targets") or []
    return {str(size["target_loss"]): size.get("edges") for size in targets}


def study_table(rows: Sequence[Mapping[str, Any]], base: str, target_loss: float) -> str:
    """A row per variant, in the order given: means over its seeds, with ranges.

    Differences are between runs of one seed, with a 95 % interval (t over seeds) from three seeds on. Edges
    are geometric means over tasks and seeds; their ratio is over those that variant and base both have a
    circuit of.
    """
    by_variant: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
    lines = [_line(own, by_variant.get(base, []), str(target_loss)) for own in by_variant.values()]
    return markdown(COLUMNS, lines)


def frontier(rows: Sequence[Mapping[str, Any]], target_loss: float) -> dict[str, list[tuple[float, float]]]:
    """By variant, KL and geometric mean of edges of every run all of whose tasks reach the target."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        edges = [curve.get(str(target_loss)) for curve in row.get("curves", {}).values()]
        if edges and None not in edges:
            found.setdefault(row["variant"], []).append((row["kl"], geometric_mean(edges)))
    return found


def _line(own: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], target: str) -> list[str]:
    first, whole = own[0], [row for row in own if "undefined" not in row]
    changes = ", ".join(f"`{key}` {value}" for key, value in first["changes"].items())
    diverged = f", {len(own) - len(whole)} diverged" if len(whole) < len(own) else ""
    line = [f"`{first['variant']}`", changes, f"{len(own)}{diverged}"]
    if not whole:
        return line + ["-"] * (len(COLUMNS) - len(line))
    by_seed = {row["seed"]: row for row in base if "undefined" not in row}
    pairs = [(row, by_seed[row["seed"]]) for row in whole if row["seed"] in by_seed]
    edges, reached, asked, ratio = _edges(whole, pairs, target)
    is_base = first["variant"] == base[0]["variant"] if base else False
    return [
        *line,
        f"{_mean([row['nonzeros'] for row in whole]):,.0f}",
        _range([row["kl"] for row in whole]),
        "" if is_base else _difference([row["kl"] - its["kl"] for row, its in pairs]),
        number(_mean([row["switch_kl_mean"] for row in whole])),
        number(max(row["switch_kl_max"] for row in whole)),
        f"{number(edges)} ({reached} of {asked})" if asked else "-",
        "" if is_base else number(ratio),
    ]


def _edges(
    whole: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[Mapping, Mapping]], target: str
) -> tuple[float | None, int, int, float | None]:
    """Geometric mean of edges, circuits that reach the target, circuits looked for, ratio to the base."""
    sizes = [curve.get(target) for row in whole for curve in row["curves"].values()]
    found = [size for size in sizes if size is not None]
    both = [
        (curve.get(target), at(its["curves"], task, target))
        for row, its in pairs
        for task, curve in row["curves"].items()
    ]
    both = [(size, other) for size, other in both if size is not None and other is not None]
    ratio = geometric_mean([a for a, _ in both]) / geometric_mean([b for _, b in both]) if both else None
    return geometric_mean(found) if found else None, len(found), len(sizes), ratio


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _range(values: Sequence[float]) -> str:
    ends = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{_mean(values):.3f}{ends}"


def _difference(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) < 3:
        return f"{_mean(values):+.3f}"
    found = mean_interval(torch.tensor(values), torch.arange(len(values)))
    return f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
