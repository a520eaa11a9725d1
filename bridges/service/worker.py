"""The worker: one per machine. It takes a job, starts its recipe command, and sees it to its end.

killed (SIGKILL)       its lease runs out; the next worker ends what is left and goes on from the checkpoint
stopped (SIGTERM, ^C)  the job writes a checkpoint and is queued again
job cancelled          the same, and it ends as `cancelled`
job crashed            it is tried again; after `attempts` in a row without anything new, or `max_attempts` at
                       all, it ends as `failed`
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from pydantic import Field

from bridges.service import processes
from bridges.service.child import BUSY
from bridges.service.jobs import JobFolder, State, names_digest
from bridges.service.log_pump import LogPump
from bridges.service.queue import Queue
from bridges.service.redact import Redactor
from bridges.service.rows import Lease
from extractor.config import Config

MISTAKES = (2, 3, 4, 5)  # exit codes of a recipe that the same command would end in again
RESUMABLE = (75, 130, BUSY)
CANCELLED = "cancelled while it ran; submitted again, it goes on"


class WorkerConfig(Config):
    lease: float = Field(30.0, gt=0)
    """Seconds that a job stays a worker's without a sign of life."""
    grace: float = Field(120.0, ge=0)
    """Seconds that a job has to write its checkpoint before it is killed."""
    poll: float = Field(1.0, gt=0)
    """Seconds between two looks for work."""
    launcher: tuple[str, ...] = (sys.executable, "-m", "accelerate.commands.launch")
    """What starts a recipe's file: `accelerate launch`, or another with its options."""
    attempts: int = Field(3, ge=1)
    """In a row without anything new in the run folder, after which a job has failed."""
    max_attempts: int = Field(1000, ge=1)
    """At all, after which a job has failed however far each of them came."""


class Worker:
    """Runs the jobs of a queue one after the other; recipes lie in `home`/recipes."""

    def __init__(self, queue: Queue, home: Path, config: WorkerConfig = WorkerConfig()):  # noqa: B008  frozen
        self.queue, self.home, self.config = queue, home.resolve(), config
        self.owner = f"{os.getpid()}-{secrets.token_hex(8)}"
        self.redactor = Redactor(os.environ)
        self.is_stopping = threading.Event()

    def run(self, *, until_empty: bool = False) -> None:
        """Work until stopped, or until no job can be claimed."""
        while not self.is_stopping.is_set():
            lease = self.queue.claim(self.owner, self.config.lease)
            if lease is not None:
                self.run_job(lease)
            elif until_empty:
                return
            else:
                self.is_stopping.wait(self.config.poll)

    def run_job(self, lease: Lease) -> None:
        """One attempt at one job."""
        folder = JobFolder(self.queue.runs, lease.job.run, lease.job.id)
        if not processes.kill(lease.job.id, range(lease.attempt)):
            self._end(lease, "queued", "processes of an earlier attempt could not be ended", counts=False)
            return
        if lease.status.is_cancelling:  # its worker was killed before it could see that
            self._end(lease, "cancelled", CANCELLED)
            return
        begun = self._begin(lease, folder)
        if begun is None:
            return
        folder.outcome.unlink(missing_ok=True)
        job = begun.job
        process = processes.start(
            [*self.config.launcher, f"recipes/{job.recipe}.py", *job.arguments],
            job,
            begun.attempt,
            home=self.home,
            lock=self.queue.runs / job.run / "jobs" / ".lock",
            outcome=folder.outcome.resolve(),
        )
        pump = LogPump(process.stdout, folder.log, folder.progress, self.redactor)
        try:
            pump.start()
            state = self._watch(begun, process)
        finally:  # an index that cannot be written, too, must not leave them to work beside the next attempt
            # By attempt: where the lease is lost, another worker may have started the next one.
            processes.kill(job.id, range(begun.attempt, begun.attempt + 1))
            process.wait()
            pump.join(timeout=5)
        folder.redact_outcome(self.redactor.redact)
        if state is not None:
            self._conclude(begun, folder, state, process.returncode, pump.last_line)

    def _begin(self, lease: Lease, folder: JobFolder) -> Lease | None:
        """Count attempts that came to nothing; None: this was one too many, or the lease is lost."""
        digest = names_digest(self.queue.runs / lease.job.run)
        is_new = digest != lease.status.progress
        fruitless = 0 if is_new else lease.status.fruitless + 1
        too_many = ""
        if fruitless >= self.config.attempts:
            too_many = f"{fruitless} attempts in a row came to nothing"
        elif lease.attempt > self.config.max_attempts:
            too_many = f"{self.config.max_attempts} attempts did not end it; submitted again, it goes on"
        if too_many:
            _, why = folder.read_outcome()
            last = why or lease.status.reason or "it took its worker with it"
            self._end(lease, "failed", f"{too_many}: {last}")
            return None
        return self.queue.write(lease, progress=digest, fruitless=fruitless, reason="", exit_code=None)

    def _watch(self, lease: Lease, process: subprocess.Popen) -> State | None:
        """Follow a started job: "running" if it ended by itself, what it is to become if it was stopped,
        None if the lease was lost."""
        renewed, deadline, asked = time.monotonic(), None, set()
        becomes: State = "running"
        while process.poll() is None:
            now = time.monotonic()
            if now - renewed > min(1.0, self.config.lease / 5):
                status = self.queue.renew(lease, self.config.lease)
                if status is None:
                    return None
                renewed = now
                if status.is_cancelling:
                    becomes = "cancelled"
            if self.is_stopping.is_set() and becomes == "running":
                becomes = "queued"
            if becomes != "running":
                deadline = deadline or now + self.config.grace
                processes.ask_to_stop(lease.job.id, lease.attempt, asked, process.pid)
                if now > deadline:
                    return becomes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        return becomes

    def _conclude(self, lease: Lease, folder: JobFolder, state: State, code: int, last_line: str) -> None:
        """What an attempt that ended means for its job."""
        told, why = folder.read_outcome()
        if code == 0:  # also where it was done just before it was stopped
            self._end(lease, "done", "", code=0)
        elif state == "cancelled":
            self._end(lease, "cancelled", CANCELLED, code=told)
        elif state == "queued":
            self._end(lease, "queued", "its worker was stopped", counts=False)
        elif told in MISTAKES:
            self._end(lease, "failed", why, code=told)
        elif told in RESUMABLE or code == BUSY:
            # Nobody asked. What got further has left a checkpoint; the rest would go on like this for ever.
            self._end(lease, "queued", why or last_line, code=told or code)
        else:
            self._end(lease, "queued", why or f"it ended with code {code}: {last_line}", code=told or code)

    def _end(
        self, lease: Lease, state: State, reason: str, *, counts: bool = True, code: int | None = None
    ) -> None:
        changes = {} if counts else {"progress": ""}
        if lease.status.state == "running":
            reason = self.redactor.redact(reason)
            self.queue.write(lease, state=state, reason=reason[:1000], exit_code=code, **changes)


def work(queue: Queue, home: Path, config: WorkerConfig, *, until_empty: bool = False) -> None:
    """`sparsebridge worker`: SIGTERM and Ctrl-C end it after its job has written a checkpoint."""
    worker = Worker(queue, home, config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.is_stopping.set())
    worker.run(until_empty=until_empty)
