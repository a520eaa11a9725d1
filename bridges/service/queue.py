"""The index of jobs in SQLite: who may run what, now. Lost or damaged, it is made again from the run folders.

A claim is a lease: the job is the worker's until `lease_until`, and every write of the worker is fenced by
(owner, attempt), so that one that was stopped for longer finds that it has lost the job. A run folder is
worked on by one job at a time, in the order of their submission. For one machine: SQLite's WAL is not for a
network file system, and a lease that ran out is taken over only on the host that held it.
"""

import errno
import fcntl
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridges.service.jobs import Job, JobFolder, State, Status, job_folders
from bridges.service.rows import SCHEMA, Lease, existing, held, insert, job_of, status_of, update
from extractor.errors import InputError, MachineError, UsageError

FILE = ".sparsebridge.sqlite"
PATIENCE = 30.0  # seconds to wait for another process's write
SILENCE = 60.0  # seconds after its lease until a worker is said to be gone
NO_JOB_S_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)


class IndexBusy(MachineError):
    """The index is whole, but another process writes in it for longer than is waited."""


class Queue:
    """All jobs below a folder of runs; one object may be shared by threads, each process makes its own.

    An index that was made again meanwhile is opened in place of the one that it replaced.

    Raises:
        MachineError: the index is damaged (`sparsebridge reindex` makes it again), held by another process
            for too long, or cannot be written. Every method may find that.
    """

    def __init__(self, runs: Path):
        self.runs, self.path, self._lock = runs, runs / FILE, threading.RLock()
        self._open()

    def _open(self) -> None:
        with _told(self.path), _one_opens(self.path):
            is_new = not self.path.exists()
            if is_new:  # an index that was removed leaves these, and its readers still hold them
                for end in ("-wal", "-shm"):
                    self.path.with_name(FILE + end).unlink(missing_ok=True)
            self._db = sqlite3.connect(
                self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )
            self._db.row_factory = sqlite3.Row
            if self._db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check found faults")
            # Enough against killed processes; against a power cut there are the files.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(SCHEMA)
            self._inode = self.path.stat().st_ino
            if is_new:
                self.adopt()

    @property
    def is_current(self) -> bool:
        """The file that is open is the one that lies there: nobody has made the index again."""
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if not self.is_current:
                self._db.close()
                self._open()
            with _told(self.path):
                yield self._db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            _begin(db)
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    # --- what users do -----------------------------------------------------------------------------------

    def submit(self, job: Job) -> Job:
        """Queue a job; one whose idempotency key is known is returned as it is.

        Raises:
            UsageError: the key is known with another request, or to another engine.
        """
        with self._transaction() as db:
            row = db.execute("SELECT * FROM jobs WHERE id = ?", (job.id,)).fetchone()
            if row is not None:
                if job_of(row).wanted != job.wanted:
                    raise _taken(job, "it was used for another request")
                return job_of(row)
            if any(self.runs.glob(f"*/jobs/{job.id}/engine.json")):
                raise _taken(job, "another engine has its job")
            JobFolder(self.runs, job.run, job.id).write_job(job)
            insert(db, job, Status())
        return job

    @contextmanager
    def without(self, job: Job) -> Iterator[None]:
        """For an engine that takes a job: meanwhile it is not queued here. Raises UsageError where it was."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM jobs WHERE id = ?", (job.id,)).fetchone():
                raise _taken(job, "its job is in this machine's queue")
            yield

    def cancel(self, job_id: str) -> Status:
        """A queued job ends at once; a running one is asked to write a checkpoint and stop."""
        with self._transaction() as db:
            row = existing(db, job_id)
            status = status_of(row)
            if status.state == "queued":
                status = status.after(state="cancelled", reason="cancelled")
            elif status.state == "running":
                status = replace(status, is_cancelling=True)
            self._write(db, row["number"], job_of(row), status)
        return status

    def get(self, job_id: str) -> tuple[Job, Status]:
        """Raises NoSuchJob where there is none of this id."""
        with self._reading() as db:
            row = existing(db, job_id)
        return job_of(row), status_of(row)

    def lost_to(self, job_id: str) -> str | None:
        """The host of a running job's worker that has been silent for long, and may never come back."""
        with self._reading() as db:
            row = db.execute(
                "SELECT host FROM jobs WHERE id = ? AND state = 'running' AND lease_until < ?",
                (job_id, time.time() - SILENCE),
            ).fetchone()
        return row and row["host"]

    def page(
        self,
        *,
        limit: int = 50,
        before: int | None = None,
        states: Sequence[State] = (),
        run: str | None = None,
    ) -> list[tuple[int, Job, Status]]:
        """Newest first, with each job's number, which `before` pages by."""
        where, values = ["1"], []
        if before is not None:
            where.append("number < ?")
            values.append(before)
        if states:
            where.append(f"state IN ({', '.join('?' * len(states))})")
            values += states
        if run is not None:
            where.append("run = ?")
            values.append(run)
        query = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ?"
        with self._reading() as db:
            rows = db.execute(query, (*values, limit)).fetchall()
        return [(row["number"], job_of(row), status_of(row)) for row in rows]

    # --- what workers do ---------------------------------------------------------------------------------

    def claim(self, owner: str, seconds: float) -> Lease | None:
        """The oldest job that may run: queued, or running under a lease of this host that ran out; and the
        first that has not ended of its run."""
        with self._transaction() as db:
            while True:
                now = time.time()
                row = db.execute(
                    """SELECT * FROM jobs AS own
                    WHERE (state = 'queued' OR (state = 'running' AND lease_until < ? AND host = ?))
                    AND NOT EXISTS (SELECT 1 FROM jobs AS first WHERE first.run = own.run
                        AND first.number < own.number AND first.state IN ('queued', 'running'))
                    ORDER BY number LIMIT 1""",
                    (now, socket.gethostname()),
                ).fetchone()
                if row is None:
                    return None
                job, status = job_of(row), status_of(row)
                status = replace(status, state="running", attempt=status.attempt + 1, started=now)
                folder = JobFolder(self.runs, job.run, job.id)
                try:
                    if not (folder.path / "job.json").is_file():
                        folder.write_job(job)
                    folder.write_status(status)
                    break
                except OSError as error:
                    if error.errno in NO_JOB_S_FAULT:
                        raise
                    reason = f"its run folder cannot be written ({error.strerror})"
                    update(db, row["number"], status.after(state="failed", reason=reason))
            db.execute(
                "UPDATE jobs SET owner = ?, host = ?, lease_until = ? WHERE number = ?",
                (owner, socket.gethostname(), now + seconds, row["number"]),
            )
            update(db, row["number"], status)
        return Lease(job, status, owner)

    def renew(self, lease: Lease, seconds: float) -> Status | None:
        """Keep the job for longer; None: it is another's now."""
        with self._transaction() as db:
            row = held(db, lease)
            if row is None:
                return None
            until = time.time() + seconds
            db.execute("UPDATE jobs SET lease_until = ? WHERE number = ?", (until, row["number"]))
            return status_of(row)

    def write(self, lease: Lease, **changes: Any) -> Lease | None:
        """Write fields of the job's status, `state` among them; None: the job is another's now."""
        with self._transaction() as db:
            row = held(db, lease)
            if row is None:
                return None
            status = status_of(row).after(**changes)
            self._write(db, row["number"], lease.job, status)
        return replace(lease, status=status)

    def _write(self, db: sqlite3.Connection, number: int, job: Job, status: Status) -> None:
        """The index decides: where the file cannot be written, the queue goes on."""
        update(db, number, status)
        with suppress(OSError):
            JobFolder(self.runs, job.run, job.id).write_status(status)

    # --- from files --------------------------------------------------------------------------------------

    def adopt(self, *, anew: bool = False) -> list[str]:
        """Take in every job of the run folders that the index has not, but for those that another engine has;
        what is damaged is returned. `anew`: first drop every job that no worker holds.

        A job that was running is queued again: its lease is not known, its command goes on where it stopped.
        """
        found, damaged, ended = [], [], {}
        # In one transaction: nobody misses a job meanwhile, nor writes a state behind what was read.
        with self._transaction() as db:
            if anew:
                # Of these the index has the last word: a file may not have taken it.
                rows = db.execute("SELECT * FROM jobs WHERE ended IS NOT NULL")
                ended = {row["id"]: status_of(row) for row in rows}
                db.execute("DELETE FROM jobs WHERE state != 'running' OR lease_until < ?", (time.time(),))
            known = {row["id"] for row in db.execute("SELECT id FROM jobs")}
            for folder in job_folders(self.runs):
                try:
                    if not folder.engine.exists():
                        found.append(folder.read())
                except InputError as error:
                    damaged.append(str(error))
            for job, status in sorted(found, key=lambda own: (own[0].created, own[0].id)):
                if job.id not in known:
                    status = status.after(state="queued") if status.state == "running" else status
                    insert(db, job, ended.get(job.id, status))
        return damaged

    def count(self) -> int:
        with self._reading() as db:
            return db.execute("SELECT count(*) FROM jobs").fetchone()[0]


def reindex(runs: Path) -> tuple[int, list[str]]:
    """Make the index again from the run folders: how many jobs there are, and what is damaged.

    A damaged index is kept beside the new one. Jobs that a worker holds stay with it, unless the index that
    says so is the damaged one: then the worker stops them, and they go on from their last checkpoint.

    Raises:
        InputError: there is no such folder.
        MachineError: the index is whole, but held by another process; or a new one cannot be made.
    """
    path = runs / FILE
    if not runs.is_dir():
        raise InputError(f"no folder of runs at '{runs}'")
    try:
        queue = Queue(runs)
        damaged = queue.adopt(anew=True)
    except IndexBusy:
        raise
    except MachineError:
        for end in ("", "-wal", "-shm"):
            if (own := path.with_name(path.name + end)).exists():
                os.replace(own, own.with_name(f"{own.name}.damaged"))
        queue = Queue(runs)
        damaged = queue.adopt()
    with closing(queue):
        return queue.count(), damaged


@contextmanager
def _one_opens(path: Path) -> Iterator[None]:
    """Of several processes that find no index, one makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What SQLite and the file system say becomes one line that says what to do."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if _is_busy(error):
            raise IndexBusy(f"another process holds the index '{path}' ({error}); try again") from None
        raise MachineError(f"the index '{path}' cannot be used ({error})") from None
    except sqlite3.DatabaseError as error:
        raise MachineError(
            f"the index '{path}' is damaged ({error}); `sparsebridge reindex` makes it again"
        ) from None


def _begin(db: sqlite3.Connection) -> None:
    """BEGIN IMMEDIATE, asked for every few milliseconds: SQLite itself sleeps up to a tenth of a second
    between two looks, and where others write all the time can miss every gap for longer than PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    db.execute("PRAGMA busy_timeout = 5")
    try:
        while True:
            try:
                db.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
    finally:
        db.execute(f"PRAGMA busy_timeout = {1000 * PATIENCE:.0f}")


def _is_busy(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _taken(job: Job, why: str) -> UsageError:
    return UsageError(f"idempotency key {job.idempotency_key!r}: {why}; take a new one")
