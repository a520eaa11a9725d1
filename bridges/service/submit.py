"""Requests become jobs: a user's own words on the command line, or names and plain values over HTTP.

Over HTTP nothing names a file: the recipe and its config are chosen by name among those that lie in
`home`/recipes, the run by the name of its folder, and the settings are the few below. What opens a path,
code or the network is set in the operator's YAML.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from bridges.service.jobs import NAME, RECIPES, Job, check_run_name
from bridges.service.redact import Redactor
from extractor.errors import InputError, SparsebridgeError, UsageError

Count = Annotated[int, Field(ge=0, le=10_000_000, strict=True)]
Positive = Annotated[int, Field(ge=1, le=10_000_000, strict=True)]
Share = Annotated[float, Field(gt=0, le=1)]
Number = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Names = Annotated[list[Name], Field(min_length=1, max_length=64)]

SETTINGS: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "train": {
        "max_steps": Count,
        "per_device_train_batch_size": Positive,
        "max_train_tokens": Positive,
        "save_steps": Positive,
        "sparsity.density": Share,
        "optimizer.learning_rate": Number,
        "seed": Count,
    },
    "extract": {"tasks": Names, "prune.steps": Positive, "curve": bool, "describe": bool, "seed": Count},
    "edit": {"tasks": Names, "ship.adapter": bool, "seed": Count},
    "transfer": {"tasks": Names, "seed": Count},
    "compare": {"seed": Count},
    "audit": {"seed": Count},
}
"""What may be set over HTTP, by recipe."""


def from_command_line(
    home: Path, runs: Path, recipe: str, arguments: Sequence[str], idempotency_key: str | None = None
) -> Job:
    """A job of a recipe's own words, which the recipe itself has read and found right.

    Raises:
        UsageError, InputError: what the recipe says of them; a run folder that lies elsewhere; a secret
            among the words, by its shape or from the environment, which would be kept in the job's file.
    """
    if recipe not in RECIPES:
        raise UsageError(f"recipe {recipe!r}; it is one of {', '.join(RECIPES)}")
    if kinds := Redactor(os.environ).find_secrets("\n".join([*arguments, idempotency_key or ""])):
        raise InputError(f"the arguments hold a secret ({kinds[0]}); give it by the environment, not here")
    run = home / run_of(home, recipe, arguments)
    if run.resolve().parent != runs.resolve():
        raise UsageError(f"run '{run}': it must lie in '{runs}' (give --run, or --runs for another folder)")
    return Job.new(run.name, recipe, arguments, idempotency_key)


def run_of(home: Path, recipe: str, arguments: Sequence[str]) -> str:
    """The run folder that a recipe resolves its arguments to; the recipe is asked, nothing is run."""
    script = recipe
    if recipe == "quickstart":  # its first recipe reads the same words
        own = arguments or ["--run", "runs/quickstart"]
        script, arguments = "train", ["--config", "recipes/python/train.yaml", *own]
    path = f"recipes/{script}.py"
    if not (home / path).is_file():
        raise InputError(f"no '{path}' in '{home}'; start the command where the recipes lie, or give --home")
    done = subprocess.run(
        [sys.executable, path, *arguments, "--print_config"],
        cwd=home, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        why = done.stderr.strip().rsplit("\n", 1)[-1].removeprefix("error: ")
        error: type[SparsebridgeError] = UsageError if done.returncode == 2 else InputError
        raise error(why or f"'{path}' ended with code {done.returncode}")
    return str(yaml.safe_load(done.stdout)["run"])


def configs(home: Path) -> dict[str, list[str]]:
    """By recipe, the names of the configs that it has: folders of `home`/recipes with `<recipe>.yaml`."""
    found: dict[str, list[str]] = {"quickstart": [""]}
    for recipe in RECIPES[1:]:
        paths = sorted((home / "recipes").glob(f"*/{recipe}.yaml"))
        found[recipe] = [path.parent.name for path in paths if NAME.fullmatch(path.parent.name)]
    return found


def from_names(
    home: Path,
    runs: Path,
    *,
    recipe: str,
    config: str,
    run: str,
    settings: dict[str, Any],
    idempotency_key: str | None = None,
) -> Job:
    """A job of names and plain values: all that a client of the service may give.

    Raises:
        UsageError: a name that there is none of, a run folder that lies elsewhere, a setting that is not one
            of SETTINGS, or its value.
    """
    known = configs(home)
    if recipe not in known:
        raise UsageError(f"recipe: one of {', '.join(known)}")
    if config not in known[recipe]:
        raise UsageError(f"config: one of {', '.join(known[recipe]) or '(none)'} for {recipe}")
    own = runs.resolve() / check_run_name(run) / "jobs"
    if own.resolve() != own:  # the job's files would be written through the link
        raise UsageError(f"run '{run}': its folder leads elsewhere by a symbolic link; take another name")
    words = [] if recipe == "quickstart" else ["--config", f"recipes/{config}/{recipe}.yaml"]
    words += ["--run", own.parent.as_posix()]
    if runs.resolve().is_relative_to(home.resolve()):
        words[-1] = own.parent.relative_to(home.resolve()).as_posix()
    for key, value in settings.items():
        if key not in SETTINGS[recipe]:
            allowed = ", ".join(SETTINGS[recipe]) or "none"
            raise UsageError(f"settings: over HTTP {recipe} takes {allowed}")
        try:
            checked = TypeAdapter(SETTINGS[recipe][key]).validate_python(value)
        except ValidationError as error:
            raise UsageError(f"settings.{key}: {error.errors()[0]['msg']}") from None
        words += [f"--{key}", _one_line(checked)]
    return Job.new(run, recipe, words, idempotency_key)


def _one_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1 << 20).splitlines()[0]
