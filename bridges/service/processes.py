"""The processes of a job: started in a session of their own, marked by their environment, ended together.

Launchers start further sessions (torchrun's workers), and a process id may be used again. So what belongs
to a job is told by a mark in the environment, which children inherit.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from bridges.service.jobs import Job

MARK = "SPARSEBRIDGE_JOB"
ATTEMPT = "SPARSEBRIDGE_ATTEMPT"
OUTCOME = "SPARSEBRIDGE_OUTCOME"


def start(
    command: Sequence[str], job: Job, attempt: int, *, home: Path, lock: Path, outcome: Path
) -> subprocess.Popen[bytes]:
    """Start a job's command in `home`; its output comes through a pipe."""
    marks = {MARK: job.id, ATTEMPT: str(attempt), OUTCOME: str(outcome), "PYTHONUNBUFFERED": "1"}
    # What imports this package must find it in the child, too, whatever folder the recipes lie in.
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    child = [sys.executable, "-m", "bridges.service.child", str(lock), str(os.getpid()), "--"]
    return subprocess.Popen(
        [*child, *command],
        cwd=home,
        env={**os.environ, **marks, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def processes_of(job_id: str, attempts: range) -> list[psutil.Process]:
    """Every living process that bears the job's mark and that of one of these attempts."""
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        environ = process.info["environ"] or {}
        if environ.get(MARK) != job_id or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        if int(environ.get(ATTEMPT, -1)) in attempts:
            found.append(process)
    return found


def kill(job_id: str, attempts: range, seconds: float = 10.0) -> bool:
    """SIGKILL until none is left; False: some would not die in time."""
    deadline = time.monotonic() + seconds
    while left := processes_of(job_id, attempts):
        for process in left:
            _send(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def ask_to_stop(job_id: str, attempt: int, asked: set[int], launcher: int) -> None:
    """SIGTERM, once to every process that was not asked before, but for a launcher that has others below it:
    it would end at once, and leave them to themselves."""
    found = processes_of(job_id, range(attempt, attempt + 1))
    for process in found:
        if process.pid not in asked and (process.pid != launcher or len(found) == 1):
            asked.add(process.pid)
            _send(process, signal.SIGTERM)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)  # psutil checks that the id is not another's by now
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return
