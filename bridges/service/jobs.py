"""Jobs as files: a job is one resumable recipe command in one run folder, where all that is known of it is.

    runs/<run>/jobs/<id>/job.json        what was asked; never changed
    runs/<run>/jobs/<id>/state.json      state, attempt, exit code, reason, times; replaced whole
    runs/<run>/jobs/<id>/log.txt         what its processes printed, secrets taken out
    runs/<run>/jobs/<id>/progress.json   the last progress bar: step, losses, tokens/s, time left

The database (`bridges.service.queue`) is an index that is made again from these.
"""

import hashlib
import json
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from extractor.artifacts import SCHEMA_VERSION, read_json, remove_folder, write_json
from extractor.errors import InputError, UsageError

State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
TRACKERS = ("sparsebridge", "wandb", "trackio")
"""Folders of a run in which every start makes new files: Accelerate's TensorBoard writes into the one of the
project's name (`init_trackers` in recipes/train.py), the others into theirs where they are sent here."""
RECIPES = ("quickstart", "train", "extract", "edit", "transfer", "compare", "audit")


@dataclass(frozen=True)
class Job:
    """What was asked."""

    id: str
    run: str
    """Name of the run folder."""
    recipe: str
    arguments: tuple[str, ...]
    """As after `accelerate launch recipes/<recipe>.py`."""
    created: float = field(default_factory=time.time)
    """Unix time."""
    idempotency_key: str | None = None

    @classmethod
    def new(
        cls, run: str, recipe: str, arguments: Sequence[str] = (), idempotency_key: str | None = None
    ) -> "Job":
        """Raises UsageError for a recipe that there is none of, or a run's name that is no plain name."""
        if recipe not in RECIPES:
            raise UsageError(f"recipe {recipe!r}; it is one of {', '.join(RECIPES)}")
        check_run_name(run)
        if idempotency_key is not None and not 1 <= len(idempotency_key) <= 200:
            raise UsageError("idempotency key: 1 to 200 characters")
        # The same key gives the same id: a repeated request finds the job, even in files without an index.
        own = idempotency_key.encode() if idempotency_key else secrets.token_bytes(32)
        return cls(f"j{hashlib.sha256(own).hexdigest()[:23]}", run, recipe, tuple(arguments),
                   idempotency_key=idempotency_key)  # fmt: skip

    @property
    def command(self) -> str:
        """The line that a user would type."""
        return shlex.join(["accelerate", "launch", f"recipes/{self.recipe}.py", *self.arguments])

    @property
    def wanted(self) -> tuple[str, str, tuple[str, ...]]:
        """What two requests with one key must agree in."""
        return self.run, self.recipe, self.arguments

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"arguments": list(self.arguments)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Job":
        fields = {name: value[name] for name in cls.__dataclass_fields__}
        return cls(**fields | {"arguments": tuple(value["arguments"])})


@dataclass(frozen=True)
class Status:
    """How far a job has come."""

    state: State = "queued"
    attempt: int = 0
    """How often it was started; with the owner it fences every write."""
    fruitless: int = 0
    """Attempts in a row that left nothing new in the run folder."""
    progress: str = ""
    """Digest of the run folder's names when the last attempt began; empty: not to be compared."""
    is_cancelling: bool = False
    exit_code: int | None = None
    reason: str = ""
    started: float | None = None
    ended: float | None = None

    def after(self, **changes: Any) -> "Status":
        """With changes: what was asked to stop is not queued again, and what has ended is asked no longer."""
        own = replace(self, **changes)
        if own.is_cancelling and own.state == "queued":
            own = replace(own, state="cancelled")
        return replace(own, is_cancelling=False, ended=time.time()) if own.state in ENDED else own


class JobFolder:
    """The files of one job."""

    def __init__(self, runs: Path, run: str, job_id: str):
        self.path = runs / run / "jobs" / job_id
        self.log, self.progress = self.path / "log.txt", self.path / "progress.json"
        self.cancel = self.path / "cancel"
        """Where it lies, a job that an engine runs is to stop."""
        self.engine = self.path / "engine.json"
        """Where it lies, the job was handed to another engine, and no worker here takes it."""
        self.outcome = self.path / "outcome.json"
        """What the recipe says as it ends: a launcher keeps exit codes to itself."""

    def write_job(self, job: Job) -> None:
        write_json(self.path / "job.json", {"schema_version": SCHEMA_VERSION, **job.as_json()})

    def write_status(self, status: Status) -> None:
        write_json(self.path / "state.json", {"schema_version": SCHEMA_VERSION, **asdict(status)})

    def remove(self) -> None:
        """The request first: whatever a kill leaves of the rest is no job that is queued again."""
        if self.path.is_dir():
            (self.path / "job.json").unlink(missing_ok=True)
            remove_folder(self.path)

    def read(self) -> tuple[Job, Status]:
        """Raises InputError where the files are damaged; a job without a state was never started."""
        try:
            job = Job.from_json(read_json(self.path / "job.json", "job", "sparsebridge submit"))
            if (job.run, job.id) != (self.path.parents[1].name, self.path.name):
                raise ValueError("it names another folder")
            status = Status()
            if (self.path / "state.json").is_file():
                value = read_json(self.path / "state.json", "job state", "sparsebridge worker")
                status = Status(**{name: value[name] for name in Status.__dataclass_fields__})
            if status.state not in get_args(State):
                raise ValueError(f"state {status.state!r}")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"job '{self.path.name}' is damaged ({error})") from None
        return job, status

    def read_outcome(self) -> tuple[int | None, str]:
        """Exit code and last words of the recipe, if it left any."""
        try:
            value = json.loads(self.outcome.read_text(encoding="utf-8"))
            return int(value["exit_code"]), str(value["error"])
        except (OSError, ValueError, KeyError, TypeError):
            return None, ""

    def redact_outcome(self, redact: Callable[[str], str]) -> None:
        """Take secrets out of the recipe's last words, which it writes itself."""
        code, error = self.read_outcome()
        if error != (own := redact(error)):
            write_json(self.outcome, {"exit_code": code, "error": own})


def check_run_name(run: str) -> str:
    """Raises UsageError unless it is a plain name of a folder."""
    if not NAME.fullmatch(run):
        raise UsageError(f"run {run!r}: a name of letters, digits, '.', '_' and '-', at most 128 characters")
    return run


def job_folders(runs: Path) -> Iterator[JobFolder]:
    """Every job below the runs."""
    for path in sorted(runs.glob("*/jobs/*/job.json")):
        yield JobFolder(runs, path.parents[2].name, path.parent.name)


def names_digest(run: Path) -> str:
    """Digest of the names of all files of a run but those of its jobs and trackers: a new checkpoint, circuit
    or edit changes it, a crash that repeats itself does not."""
    below = (path.relative_to(run) for path in run.rglob("*"))
    names = sorted(
        path.as_posix()
        for path in below
        if path.parts[0] not in ("jobs", *TRACKERS) and not any(part.startswith(".") for part in path.parts)
    )
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
