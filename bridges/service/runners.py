"""Outgrown one machine: the same command in the same run folder, handed to an engine that exists.

    slurm      an sbatch script; needs Slurm's commands
    skypilot   a task of SkyPilot's managed jobs; needs the extra `skypilot`

Home and runs must lie on storage that the engine's machines share. There the job runs under the same worker
as here (`bridges.service.handed_over`): asked to stop, it writes a checkpoint; started again, it goes on.
"""

import re
import shlex
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field, ValidationError

from bridges.service.jobs import ENDED, Job, JobFolder, State, Status
from bridges.service.queue import Queue
from extractor.artifacts import SCHEMA_VERSION, read_json, write_json, write_text
from extractor.config import Config
from extractor.errors import InputError, MachineError, UsageError

TIMEOUT = 120  # seconds for an engine's command to answer
WORD = r"^[A-Za-z0-9][A-Za-z0-9._:,@+=/-]{0,127}$"
"""What may stand in a line of options: nothing that ends it, or that a shell reads."""


class NoAnswer(MachineError):
    """An engine's command took too long: what it was asked may have been done."""


@runtime_checkable
class Runner(Protocol):
    """What an engine is asked for."""

    name: str

    def submit(self, job: Job) -> str:
        """Hand the job over, once; the engine's own id."""

    def poll(self, job: Job) -> tuple[State, str]:
        """Its state, and the engine's word for it."""

    def logs(self, job: Job) -> Iterator[str]:
        """What it printed so far."""

    def cancel(self, job: Job) -> None:
        """Ask it to stop."""

    def render(self, job: Job) -> str:
        """What would be sent."""


class SlurmOptions(Config):
    partition: str | None = Field(None, pattern=WORD)
    account: str | None = Field(None, pattern=WORD)
    time: str = Field("24:00:00", pattern=r"^[0-9][0-9:-]{0,15}$")
    """Limit, as sbatch reads it: minutes, or [days-]hours:minutes:seconds."""
    cpus: int = Field(8, ge=1)
    memory: str = Field("32G", pattern=r"^[0-9]{1,6}[KMGT]?$")
    gpus: int = Field(0, ge=0)
    grace: int = Field(180, ge=10)
    """Seconds before the limit at which the recipe is asked for a checkpoint."""


class SkyPilotOptions(Config):
    accelerators: str | None = Field(None, pattern=WORD)
    """As SkyPilot writes them: H100:1."""
    infra: str | None = Field(None, pattern=WORD)
    cpus: str = Field("8+", pattern=r"^[0-9]{1,4}\+?$")
    memory: str = Field("32+", pattern=r"^[0-9]{1,5}\+?$")
    volume: str | None = Field(None, pattern=WORD)
    """Storage with home and runs, mounted at home's path."""


class _Engine(ABC):
    """What both share: the job's files, the engine's id among them, and the command that runs it."""

    name: str

    def __init__(self, runs: Path, home: Path):
        self.runs, self.home = runs.resolve(), home.resolve()

    def folder(self, job: Job) -> JobFolder:
        return JobFolder(self.runs, job.run, job.id)

    def command(self, job: Job) -> str:
        """What the engine's machine runs, in home."""
        words = ["-m", "bridges.cli", "worker", "--runs", str(self.runs), "--home", str(self.home)]
        return shlex.join([sys.executable, *words, "--handed_over", f"{job.run}/{job.id}"])

    def submit(self, job: Job) -> str:
        """Raises UsageError where the job is in this machine's queue."""
        if self.folder(job).engine.is_file():
            return self.id_of(job)
        script = self.render(job)  # refuses before anything is written
        # The mark stands before the job: whatever stops this from here on, no worker here takes it.
        with closing(Queue(self.runs)) as queue, queue.without(job):
            self._mark(job, None)
        self.folder(job).write_job(job)
        try:
            engine_id = self.send(job, script)
        except NoAnswer:
            raise
        except MachineError:
            self._remove_folder(job)
            raise
        self._mark(job, engine_id)
        return engine_id

    def _mark(self, job: Job, engine_id: str | None) -> None:
        value = {"schema_version": SCHEMA_VERSION, "engine": self.name, "engine_id": engine_id}
        write_json(self.folder(job).engine, value)

    def _remove_folder(self, job: Job) -> None:
        folder = self.folder(job).path
        self.folder(job).remove()
        with suppress(OSError):  # there is more in them
            folder.parent.rmdir()
            folder.parent.parent.rmdir()

    def poll(self, job: Job) -> tuple[State, str]:
        """The job's own word where it has ended or runs, else the engine's."""
        _, status = self.folder(job).read()
        if status.state in ENDED:
            return status.state, status.reason
        return self.ask(self.id_of(job))

    def logs(self, job: Job) -> Iterator[str]:
        log = self.folder(job).log
        if log.is_file():
            with log.open(encoding="utf-8", errors="replace") as file:
                yield from file

    def cancel(self, job: Job) -> None:
        """A job that runs sees the mark and writes its checkpoint; one that waits is taken from the queue."""
        engine_id = self.id_of(job)
        self.folder(job).cancel.touch()
        if self.poll(job)[0] == "queued":
            self.remove(engine_id)
            _, status = self.folder(job).read()
            self.folder(job).write_status(status.after(state="cancelled", reason="cancelled"))

    def id_of(self, job: Job) -> str:
        """Raises InputError where the job was not handed to this engine, or perhaps was not."""
        if not self.folder(job).engine.is_file():
            raise InputError(f"job '{job.id}' was not handed to {self.name}")
        value = read_json(self.folder(job).engine, "engine's id", "sparsebridge submit")
        if value.get("engine") != self.name:
            raise InputError(f"job '{job.id}' was handed to {value.get('engine')}, not to {self.name}")
        if value.get("engine_id") is None:
            raise InputError(
                f"handing job '{job.id}' to {self.name} was broken off, so {self.name} may have it: look "
                f"there for a job of this name; is there none, remove '{self.folder(job).path}' and submit "
                "again"
            )
        return str(value["engine_id"])

    @abstractmethod
    def render(self, job: Job) -> str: ...

    @abstractmethod
    def send(self, job: Job, script: str) -> str: ...

    @abstractmethod
    def ask(self, engine_id: str) -> tuple[State, str]: ...

    @abstractmethod
    def remove(self, engine_id: str) -> None: ...


class SlurmRunner(_Engine):
    """Slurm's own commands, each with the options that its manual page gives."""

    name = "slurm"
    STATES: dict[str, State] = {
        "PENDING": "queued", "CONFIGURING": "queued", "REQUEUED": "queued", "REQUEUE_HOLD": "queued",
        "SUSPENDED": "queued", "PREEMPTED": "queued", "RUNNING": "running", "COMPLETING": "running",
        "COMPLETED": "done", "CANCELLED": "cancelled",
    }  # fmt: skip

    def __init__(self, runs: Path, home: Path, options: SlurmOptions = SlurmOptions()):  # noqa: B008  frozen
        super().__init__(runs, home)
        self.options = options

    def render(self, job: Job) -> str:
        environment = Environment(
            loader=PackageLoader("bridges", "templates/service"), undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
        )  # fmt: skip
        log = self.folder(job).path / "engine.txt"
        if not re.fullmatch(r"[\w/._+=@,:-]+", str(log)):
            raise UsageError(f"runs '{self.runs}': Slurm takes letters, digits and / . _ + = @ , : - in it")
        return environment.get_template("sbatch.jinja").render(
            job=job,
            options=self.options,
            log=log,
            home=shlex.quote(str(self.home)),
            command=self.command(job),
        )

    def send(self, job: Job, script: str) -> str:
        answer = call(["sbatch", "--parsable"], script, LOAD_SLURM)
        return answer.strip().partition(";")[0]  # "id" or "id;cluster"

    def ask(self, engine_id: str) -> tuple[State, str]:
        # allocations only, no header, fields parted by |
        lines = call(["sacct", "-X", "-n", "-P", "-o", "State", "-j", engine_id], None, LOAD_SLURM).split(
            "\n"
        )
        word = lines[0].strip()
        if not word:
            return "queued", "not in the accounts yet"
        return self.STATES.get(word.partition(" ")[0], "failed"), word  # "CANCELLED by 1000"

    def remove(self, engine_id: str) -> None:
        call(["scancel", engine_id], None, LOAD_SLURM)


class SkyPilotRunner(_Engine):
    """SkyPilot's managed jobs, by its command line; they start a job again whose machine was taken away."""

    name = "skypilot"
    STATES: dict[str, State] = {
        "PENDING": "queued", "STARTING": "queued", "RECOVERING": "queued", "RUNNING": "running",
        "CANCELLING": "running", "SUCCEEDED": "done", "CANCELLED": "cancelled",
    }  # fmt: skip

    def __init__(self, runs: Path, home: Path, options: SkyPilotOptions = SkyPilotOptions()):  # noqa: B008
        super().__init__(runs, home)
        self.options = options

    def render(self, job: Job) -> str:
        own = self.options
        named = {"accelerators": own.accelerators, "infra": own.infra, "cpus": own.cpus, "memory": own.memory}
        comment = "# " + " ".join(job.command.split())
        task = {
            "name": job.id,
            "resources": {key: value for key, value in named.items() if value is not None},
            **({"volumes": {str(self.home): own.volume}} if own.volume else {}),
            "run": f"{comment}\ncd {shlex.quote(str(self.home))}\n{self.command(job)}\n",
        }
        return yaml.safe_dump(task, sort_keys=False, width=1 << 20)

    def send(self, job: Job, script: str) -> str:
        path = self.folder(job).path / "skypilot.yaml"
        write_text(path, script)
        call(
            ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.id, str(path)], None, INSTALL_SKY
        )
        return job.id  # managed jobs can be asked for by their names

    def ask(self, engine_id: str) -> tuple[State, str]:
        table = call(["sky", "jobs", "queue"], None, INSTALL_SKY)
        line = next((line for line in table.split("\n") if engine_id in line.split()), None)
        if line is None:
            return "queued", "not in the queue yet"
        word = next((word for word in line.split() if word in self.STATES or word.startswith("FAILED")), "")
        return self.STATES.get(word, "failed"), word or line.strip()

    def remove(self, engine_id: str) -> None:
        call(["sky", "jobs", "cancel", "--yes", "--name", engine_id], None, INSTALL_SKY)


INSTALL_SKY = "pip install -e '.[skypilot]', then `sky check`"
LOAD_SLURM = "load Slurm's module, or log in where its commands are"


ENGINES = {"slurm": (SlurmOptions, SlurmRunner), "skypilot": (SkyPilotOptions, SkyPilotRunner)}


def runner(name: str, runs: Path, home: Path, options: Sequence[str]) -> Runner:
    """An engine of ENGINES, with options given as KEY=VALUE.

    Raises:
        UsageError: a key or value that it has not.
    """
    kind, engine = ENGINES[name]
    values = dict(option.partition("=")[::2] for option in options)
    try:
        return engine(runs, home, kind.model_validate(values))
    except ValidationError as error:
        first = error.errors()[0]
        allowed = ", ".join(kind.model_fields)
        raise UsageError(f"option {first['loc'][0]}: {first['msg']} (there are {allowed})") from None


def engine_of(runs: Path, home: Path, job_id: str) -> tuple[Runner, Job] | None:
    """The engine that a job was handed to; None: to none."""
    for folder in _folders(runs):
        if folder.path.name == job_id:
            return runner(engine_name(folder), runs, home, ()), folder.read()[0]
    return None


def _folders(runs: Path) -> Iterator[JobFolder]:
    for path in runs.glob("*/jobs/*/engine.json"):
        yield JobFolder(runs, path.parents[2].name, path.parent.name)


def engine_name(folder: JobFolder) -> str:
    """Raises InputError where the file is damaged."""
    value = read_json(folder.engine, "engine's id", "sparsebridge submit")
    if not isinstance(value, dict) or value.get("engine") not in ENGINES:
        raise InputError(f"'{folder.engine}' is damaged (it names no engine)")
    return value["engine"]


def handed_over(runs: Path, *, ask: bool) -> list[tuple[Job, Status]]:
    """The jobs that engines have, newest first, as their files say; with `ask`, those that have not ended as
    the engine says, which is not written: it may yet queue them again."""
    found = []
    for folder in _folders(runs):
        with suppress(InputError):  # a damaged one: `reindex` names it
            job, status = folder.read()
            name = engine_name(folder)
            status = replace(status, reason=status.reason or f"handed to {name}")
            if ask and status.state not in ENDED:
                status = asked(runner(name, runs, Path(), ()), job, status)
            found.append((job, status))
    return sorted(found, key=lambda own: -own[0].created)


def asked(engine: Runner, job: Job, status: Status) -> Status:
    """A job's status by its engine's word, which is its reason; or else why the engine has none."""
    try:
        state, word = engine.poll(job)
    except (MachineError, InputError) as error:
        return replace(status, reason=str(error))
    return replace(status, state=state, reason=f"{engine.name}: {word}")


def call(words: Sequence[str], text: str | None, install: str) -> str:
    """Run an engine's command and return what it prints.

    Raises:
        NoAnswer: it does not answer.
        MachineError: it is not here, or fails.
    """
    if shutil.which(words[0]) is None:
        raise MachineError(f"`{words[0]}` is not on this machine: {install}")
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise NoAnswer(
            f"`{words[0]}` did not answer in {TIMEOUT} s; it may have done what it was asked"
        ) from None
    if done.returncode:
        last = (done.stderr or done.stdout).strip().rsplit("\n", 1)[-1]
        raise MachineError(f"`{words[0]}` ended with code {done.returncode}: {last[:300]}")
    return done.stdout
