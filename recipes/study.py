"""Training runs side by side: every YAML file of a folder, over seeds -> one table.

    accelerate launch recipes/study.py --config recipes/study/study.yaml

A study is a folder. Its `base.yaml` holds the settings of recipes/train.py that all runs share, `study.yaml`
those of this recipe, `extract.yaml`, if it is there, settings of recipes/extract.py by which the sizes of
circuits are measured too; every other file is a variant: what it changes of the base. All are checked before
the first run. A run is an ordinary one, from a config that is written beside it. What was measured stands in
the folder's results.json and is not measured again with the same settings and dense model, so that a study
can go on later, or elsewhere. study.md in the run folder is the table, study.svg the paper's figure 3 (extra
`plot`): how far each student is from its dense model against the size of its circuits.
"""

import runpy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from tqdm.auto import tqdm

from bridges.figures import draw_frontier
from bridges.plots import draw
from bridges.study import frontier, run_figures, study_table
from extractor.artifacts import SCHEMA_VERSION, fingerprint, read_json, text_sha256, write_json, write_text
from extractor.circuit_table import put_table
from extractor.config import Config, dump_config, load_config, read_yaml, run_recipe
from extractor.errors import DivergedError, InputError, UsageError
from extractor.machine import start_processes
from extractor.size_curve import TARGET_LOSSES
from extractor.statistics import undefined

HERE = Path(__file__).resolve().parent
TRAIN, EXTRACT = HERE / "train.py", HERE / "extract.py"
BASE = "base"
NO_VARIANT = ("study", "extract")


class StudyConfig(Config):
    folder: Path = Path("recipes/study")
    """The study: base.yaml, and a YAML file for every variant."""
    run: Path = Path("runs/study")
    """Where the runs' folders go: <variant>-<seed>."""
    variants: tuple[str, ...] = ()
    """Which of them, besides the base; empty: all."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Every variant is run with the first before any is with the second."""
    target_loss: float = 0.15
    """At which circuits' edges are counted, in nats; one of recipes/extract.py's curve."""
    table: Path | None = None
    """A Markdown file whose lines between `<!-- study -->` and `<!-- /study -->` become the table."""


@dataclass(frozen=True)
class Planned:
    """One run of the study."""

    variant: str
    changes: Mapping[str, Any]  # by dotted key
    config: Config  # of recipes/train.py
    extract: Config | None  # of recipes/extract.py

    @property
    def sha256(self) -> str:
        """Of everything that is the study's to choose: the same, the same run."""
        # without what is not set: a new option of a recipe is another study only where it is used
        settings = self.config.model_dump(mode="json", exclude={"run"}, exclude_none=True)
        dense = Path(self.config.dense.path)
        extract = self.extract and self.extract.model_dump(mode="json", exclude={"run"}, exclude_none=True)
        return text_sha256([settings, fingerprint(dense) if dense.is_dir() else None, extract])


def main(config: StudyConfig) -> None:
    if config.target_loss not in TARGET_LOSSES:
        raise UsageError(f"target_loss: got {config.target_loss}; allowed are {TARGET_LOSSES}")
    planned = {own.sha256: own for own in plan_runs(config)}
    path = config.folder / "results.json"
    rows = read_json(path, "results", "recipes/study.py")["rows"] if path.exists() else []
    state = start_processes()
    left = planned.keys() - {row["sha256"] for row in rows}
    for sha256, own in planned.items():
        if sha256 not in left:
            continue
        if state.is_main_process:
            tqdm.write(f"study: {own.config.run.name}")
        figures = measure(own)
        facts = {"sha256": sha256, "variant": own.variant, "changes": own.changes, "seed": own.config.seed}
        rows.append(facts | figures)
        if state.is_main_process:
            write_json(path, {"schema_version": SCHEMA_VERSION, "rows": rows})
    if state.is_main_process:
        mine = [row for row in rows if row["sha256"] in planned]
        table = study_table(mine, BASE, config.target_loss)
        write_text(config.run / "study.md", table)
        draw(config.run / "study.svg", draw_frontier, frontier(mine, config.target_loss))
        if config.table is not None:
            put_table(config.table, table, "study")
        tqdm.write(table)


def plan_runs(config: StudyConfig) -> Iterator[Planned]:
    """All runs, seed by seed, the base first.

    Raises:
        UsageError: a variant that there is not, or settings that recipes/train.py refuses.
    """
    files = {path.stem: path for path in sorted(config.folder.glob("*.yaml")) if path.stem not in NO_VARIANT}
    if BASE not in files:
        raise InputError(f"study '{config.folder}' has no base.yaml, which holds what all runs share")
    if unknown := [name for name in config.variants if name not in files]:
        raise UsageError(f"variants: there is no {unknown[0]}.yaml in '{config.folder}'")
    names = [BASE, *(name for name in files if name != BASE and name in (config.variants or files))]
    train_config = runpy.run_path(str(TRAIN))["TrainConfig"]
    changed = {name: dotted(read_yaml(files[name])) if name != BASE else {} for name in names}
    extract, settings = config.folder / "extract.yaml", None
    if extract.exists():
        settings = load_config(runpy.run_path(str(EXTRACT))["ExtractConfig"], ["--config", str(extract)])
    for seed in config.seeds:
        for name, changes in changed.items():
            run = {"run": str(config.run / f"{name}-{seed}"), "seed": seed}
            values = {
                key: yaml.safe_dump(value, default_flow_style=True) for key, value in (changes | run).items()
            }
            arguments = [part for key, value in values.items() for part in (f"--{key}", value)]
            try:
                own = load_config(train_config, ["--config", str(files[BASE]), *arguments])
            except UsageError as error:
                raise UsageError(f"variant {name}: {error}") from None
            yield Planned(name, changes, own, settings)


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        found |= dotted(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def measure(planned: Planned) -> dict[str, Any]:
    """Train, look for circuits where that is asked for, and read off what came out."""
    run = planned.config.run
    written = run.with_suffix(".yaml")
    write_text(written, dump_config(planned.config))
    try:
        call(TRAIN, "--config", str(written))
    except SystemExit as stopped:
        if stopped.code != DivergedError.exit_code:
            raise
        return undefined("training diverged")
    if planned.extract is not None:
        settings = written.with_suffix(".extract.yaml")
        write_text(settings, dump_config(planned.extract))
        call(EXTRACT, "--config", str(settings), "--run", str(run))
    return run_figures(run)


def call(recipe: Path, *arguments: str) -> None:
    """Another recipe in this process, as from the command line."""
    before, sys.argv = sys.argv, [str(recipe), *arguments]
    try:
        runpy.run_path(str(recipe), run_name="__main__")
    finally:
        sys.argv = before


if __name__ == "__main__":
    run_recipe(main, StudyConfig, None)
