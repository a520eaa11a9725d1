"""Jobs as rows of the index: the table, and what is read and written of it by key."""

import sqlite3
from dataclasses import asdict, dataclass

from bridges.service.jobs import Job, Status
from extractor.errors import InputError

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    run TEXT NOT NULL, recipe TEXT NOT NULL, arguments TEXT NOT NULL,
    created REAL NOT NULL, idempotency_key TEXT,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    attempt INTEGER NOT NULL, fruitless INTEGER NOT NULL, progress TEXT NOT NULL,
    is_cancelling INTEGER NOT NULL, exit_code INTEGER, reason TEXT NOT NULL, started REAL, ended REAL,
    owner TEXT, host TEXT, lease_until REAL
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, run, number);
"""
STATUS = tuple(Status.__dataclass_fields__)


class NoSuchJob(InputError):
    """There is no job of this id."""


@dataclass(frozen=True)
class Lease:
    """A job that is this worker's, until it loses it."""

    job: Job
    status: Status
    owner: str

    @property
    def attempt(self) -> int:
        return self.status.attempt


def insert(db: sqlite3.Connection, job: Job, status: Status) -> None:
    own = {**asdict(job), **asdict(status), "arguments": "\0".join(job.arguments)}
    columns = ", ".join(own)
    db.execute(f"INSERT INTO jobs ({columns}) VALUES ({', '.join('?' * len(own))})", tuple(own.values()))


def update(db: sqlite3.Connection, number: int, status: Status) -> None:
    own = asdict(status)
    changes = ", ".join(f"{name} = ?" for name in own)
    db.execute(f"UPDATE jobs SET {changes} WHERE number = ?", (*own.values(), number))


def existing(db: sqlite3.Connection, job_id: str) -> sqlite3.Row:
    row = db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise NoSuchJob("no such job; `sparsebridge jobs` lists them")
    return row


def held(db: sqlite3.Connection, lease: Lease) -> sqlite3.Row | None:
    return db.execute(
        "SELECT * FROM jobs WHERE id = ? AND state = 'running' AND owner = ? AND attempt = ?",
        (lease.job.id, lease.owner, lease.attempt),
    ).fetchone()


def job_of(row: sqlite3.Row) -> Job:
    own = {name: row[name] for name in Job.__dataclass_fields__}
    arguments = tuple(row["arguments"].split("\0")) if row["arguments"] else ()
    return Job(**own | {"arguments": arguments})


def status_of(row: sqlite3.Row) -> Status:
    return Status(**{name: row[name] for name in STATUS} | {"is_cancelling": bool(row["is_cancelling"])})
