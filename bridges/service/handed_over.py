"""A job that another engine has started: run by the same worker, from its files alone, without the index.

The engine's script calls `sparsebridge worker --handed_over RUN/JOB`. Log, progress and state lie where every
job's do. Exit code 0 where the job is done or cancelled, 75 where it was stopped and can go on, else the
recipe's own.
"""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridges.service.jobs import ENDED, Job, JobFolder, Status
from bridges.service.rows import Lease
from bridges.service.worker import Worker, WorkerConfig
from extractor.errors import UsageError

RESUMABLE = 75


class OneJob:
    """What a worker asks of a queue, for one job that is its own by the engine's word."""

    def __init__(self, runs: Path, run: str, job_id: str):
        self.runs, self.folder = runs, JobFolder(runs, run, job_id)
        self.folder.read()  # refuses what is absent or damaged

    @property
    def status(self) -> Status:
        return self.folder.read()[1]

    def claim(self, owner: str, seconds: float) -> Lease | None:
        """The next attempt, unless the job has ended; one that was running was killed with its machine."""
        job, status = self.folder.read()
        if status.state in ENDED:
            return None
        status = replace(
            status, state="running", attempt=status.attempt + 1, started=time.time(),
            is_cancelling=self.folder.cancel.exists(),
        )  # fmt: skip
        self.folder.write_status(status)
        return Lease(job, status, owner)

    def renew(self, lease: Lease, seconds: float) -> Status:
        return replace(lease.status, is_cancelling=self.folder.cancel.exists())

    def write(self, lease: Lease, **changes: Any) -> Lease:
        status = replace(lease.status, is_cancelling=self.folder.cancel.exists()).after(**changes)
        self.folder.write_status(status)
        return replace(lease, status=status)


def work_on(runs: Path, home: Path, name: str, config: WorkerConfig) -> int:
    """Run a job, named RUN/JOB, to its end or until SIGTERM.

    Raises:
        UsageError: the name is none.
        InputError: there is no such job.
    """
    run, slash, job_id = name.partition("/")
    if not slash:
        raise UsageError(f"handed_over {name!r}: RUN/JOB, as `sparsebridge submit` printed it")
    one = OneJob(runs, Job.new(run, "train").run, os.path.basename(job_id))
    worker = Worker(one, home, config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.is_stopping.set())
    worker.run(until_empty=True)
    status = one.status
    if status.state in ("done", "cancelled"):
        return 0
    return RESUMABLE if status.state == "queued" else status.exit_code or 1
