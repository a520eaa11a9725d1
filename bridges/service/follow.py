"""What can be seen of a job while it runs, read from its files: state, progress, losses by step, log.

An event stream keeps no state on the server: an event's id says how far its reader is (step, bytes of
metrics, bytes of log), so that a reader who comes back goes on there. Nothing is sent faster than it is read.
"""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bridges.drawing import visible
from bridges.service.circuit_files import circuit_files
from bridges.service.guard import Absent, contained, is_id
from bridges.service.jobs import ENDED, Job, JobFolder, State, Status
from bridges.service.queue import Queue
from bridges.service.redact import redact
from bridges.service.rows import NoSuchJob
from bridges.service.runners import engine_name, handed_over
from bridges.service.serve import OneWorker

NO_WORKER = "no worker is running: start `sparsebridge worker`, or `sparsebridge serve` without --no_worker"
WORKER_GONE = (
    "its worker (on {}) is gone: start `sparsebridge worker` there, or `sparsebridge reindex` queues it again"
)
EVERY = 0.5  # seconds between two looks at the files
CHUNK = 1 << 16  # bytes of log or metrics in one event
TAIL = 1 << 20  # bytes of log that a page begins with
LOSSES = ("train", "quickstart")
"""Recipes that write metrics.jsonl; in a job of another one it is an earlier training's."""
PRINTED = re.compile(r"[^\n\t]+")
CURSOR = re.compile(r"(\d{1,12})\.(\d{1,15})\.(\d{1,15})")


class Progress(BaseModel):
    """The last progress bar that the recipe showed."""

    what: str
    done: float
    total: float
    elapsed: str
    left: str
    """Time left, as the bar estimates it; empty where the job does not run."""
    values: dict[str, str]
    """Losses, tokens per second and what else it showed."""


class JobView(BaseModel):
    """A job as others see it."""

    id: str
    run: str
    recipe: str
    command: str
    engine: str
    """That it was handed to; empty: it runs on this machine."""
    waits: str
    """Why it does not go on, where nothing that runs will see to it."""
    state: State
    attempt: int
    is_cancelling: bool
    exit_code: int | None
    reason: str
    created: str
    started: str | None
    ended: str | None
    progress: Progress | None


def views(queue: Queue, found: Iterable[tuple[Job, Status]], has_worker: bool | None = None) -> list[JobView]:
    """Of several jobs. None: whether a worker runs is looked up, once."""
    if has_worker is None:
        has_worker = OneWorker(queue.runs).is_held
    return [view(queue, job, status, has_worker) for job, status in found]


def view(queue: Queue, job: Job, status: Status, has_worker: bool | None = None) -> JobView:
    """What the API says of a job; times are UTC. None: whether a worker runs is looked up."""
    folder = JobFolder(queue.runs, job.run, job.id)
    engine = engine_name(folder) if folder.engine.is_file() else ""
    waits = ""
    if status.state == "queued" and not engine:
        is_worked_on = OneWorker(queue.runs).is_held if has_worker is None else has_worker
        waits = "" if is_worked_on else NO_WORKER
    elif status.state == "running" and (host := queue.lost_to(job.id)):
        waits = WORKER_GONE.format(host)
    progress = read_progress(folder)
    if progress is not None and status.state != "running":
        progress.left = ""
    return JobView(
        id=job.id,
        run=job.run,
        recipe=job.recipe,
        command=redact(job.command),
        engine=engine,
        waits=waits,
        state=status.state,
        attempt=status.attempt,
        is_cancelling=status.is_cancelling,
        exit_code=status.exit_code,
        reason=status.reason,
        created=str(_utc(job.created)),
        started=_utc(status.started),
        ended=_utc(status.ended),
        progress=progress,
    )


def find(queue: Queue, job_id: str) -> tuple[Job, Status]:
    """A job of the index, or one that an engine has, as its files say. Raises NoSuchJob."""
    try:
        return queue.get(job_id)
    except NoSuchJob:
        for path in queue.runs.glob(f"*/jobs/{job_id}/engine.json") if is_id(job_id) else ():
            if is_folder(queue.runs, run := path.parents[2].name, "jobs", job_id):
                return JobFolder(queue.runs, run, job_id).read()
        raise


def elsewhere(runs: Path) -> list[tuple[Job, Status]]:
    """The jobs that other engines have, newest first, as their files say: those that lie here."""
    return [own for own in handed_over(runs, ask=False) if is_folder(runs, own[0].run, "jobs", own[0].id)]


def job_page(
    queue: Queue, limit: int, before: int | None = None, state: State | None = None
) -> tuple[list[tuple[Job, Status]], int | None]:
    """Jobs of the index, newest first; and before which number the next page begins, if there is one."""
    found = queue.page(limit=limit + 1, before=before, states=(state,) if state else ())
    older = found[limit - 1][0] if len(found) > limit else None
    return [(job, status) for _, job, status in found[:limit]], older


def _utc(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _real(file: Path, depth: int) -> Path:
    """The file itself, which lies `depth` below the runs. Raises Absent where it lies elsewhere."""
    return contained(file.parents[depth - 1], *file.parts[-depth:])


def read_progress(folder: JobFolder) -> Progress | None:
    try:
        return Progress.model_validate_json(_real(folder.progress, 4).read_bytes())
    except (Absent, OSError, ValueError):
        return None


def metric_rows(run: Path, after: int, offset: int) -> tuple[list[dict[str, float]], int]:
    """Some rows of metrics.jsonl from a byte on, of later steps, each step once; and where to go on. A line
    that is being written waits."""
    try:
        with _real(run / "metrics.jsonl", 2).open("rb") as file:
            file.seek(max(0, offset - 1))
            if offset and file.read(1) != b"\n":  # resumed training wrote the file again: begin anew
                offset = 0
            file.seek(offset)
            data = file.read(CHUNK)
    except (Absent, OSError):
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for line in whole.splitlines():
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if step > after:
            rows.append(row)
            after = step
    return rows, offset + len(whole)


def read_log(folder: JobFolder, offset: int, limit: int = CHUNK) -> tuple[str, int]:
    """Whole lines of the log from a byte on, and where to go on."""
    try:
        with _real(folder.log, 4).open("rb") as file:
            file.seek(offset)
            data = file.read(limit)
    except (Absent, OSError):
        return "", offset
    cut = data.rfind(b"\n") + 1 or (len(data) if len(data) == limit else 0)
    return data[:cut].decode("utf-8", "replace"), offset + cut


def tail_start(folder: JobFolder) -> int:
    """Where the log's last TAIL bytes begin: at a line's start."""
    try:
        with _real(folder.log, 4).open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL)
            file.seek(start)
            return start + len(file.readline(CHUNK)) if start else 0
    except (Absent, OSError):
        return 0


def for_terminal(text: str) -> str:
    """Lines of a log, with whatever a terminal would obey instead of show spelled out."""
    return PRINTED.sub(lambda found: visible(found[0]), text)


async def events(queue: Queue, job_id: str, cursor: str | None) -> AsyncIterator[str]:
    """Server-sent events of a job until it has ended: `job`, `metrics`, `log`, and at last `end`. A long log
    begins near its end, and says so.

    Args:
        cursor: the id of the last event that was seen.
    """
    found = CURSOR.fullmatch(cursor or "")
    step, metrics, log = map(int, found.groups()) if found else (0, 0, 0)
    shown, has_begun = "", log > 0
    while True:
        job, status = await asyncio.to_thread(find, queue, job_id)
        own = await asyncio.to_thread(view, queue, job, status)
        if (now := own.model_dump_json()) != shown:
            shown = now
            yield _event("job", now, step, metrics, log)
        before = -1
        while job.recipe in LOSSES and before != metrics:
            before = metrics
            rows, metrics = await asyncio.to_thread(metric_rows, queue.runs / job.run, step, metrics)
            if rows:
                step = int(rows[-1]["step"])
                yield _event("metrics", json.dumps(rows), step, metrics, log)
        folder = JobFolder(queue.runs, job.run, job.id)
        if not has_begun and (start := await asyncio.to_thread(tail_start, folder)):
            log = start
            left_out = f"({start} bytes are left out here: `sparsebridge logs {job.id}` prints all)\n"
            yield _event("log", json.dumps(left_out), step, metrics, log)
        has_begun = True
        while (text := await asyncio.to_thread(read_log, folder, log))[0]:
            log = text[1]
            yield _event("log", json.dumps(text[0]), step, metrics, log)
        if status.state in ENDED:
            yield _event("end", "{}", step, metrics, log)
            return
        await asyncio.sleep(EVERY)


def _event(kind: str, data: str, *seen: int) -> str:
    return f"id: {'.'.join(map(str, seen))}\nevent: {kind}\ndata: {data}\n\n"


def as_table(views: list[JobView]) -> str:
    """Jobs as lines of text, for a terminal."""
    lines: list[tuple[str, ...]] = [("job", "run", "recipe", "state", "attempt", "progress", "reason")]
    for own in views:
        bar = own.progress if own.state == "running" else None
        text = "" if bar is None else f"{bar.what} {bar.done:g}/{bar.total:g}, {bar.left} left"
        reason = own.waits or " ".join(own.reason.split())[:80]
        lines.append((own.id, own.run, own.recipe, own.state, str(own.attempt), text, reason))
    return aligned(lines)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Rows of words as columns, for a terminal."""
    lines = [tuple(map(visible, line)) for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in lines
    )


def run_page(runs: Path, limit: int, after: str = "") -> tuple[list[Path], str | None]:
    """Run folders below `runs`, by name: of plain names, and none that lies elsewhere. And after which name
    the next page begins, if there is one."""
    names = sorted(name for name in os.listdir(runs) if name > after)
    found = list(islice((runs / name for name in names if is_folder(runs, name)), limit + 1))
    return found[:limit], found[limit - 1].name if len(found) > limit else None


def is_folder(runs: Path, *parts: str) -> bool:
    with suppress(Absent):
        return contained(runs, *parts).is_dir()
    return False


def run_folder(runs: Path, run: str) -> Path:
    """Raises Absent where there is no such run."""
    folder = contained(runs, run)
    if not folder.is_dir():
        raise Absent(run)
    return folder


def summary(run: Path) -> dict[str, Any]:
    """What a run folder holds, by name."""
    return {
        "run": run.name,
        "has_student": (run / "student" / "config.json").is_file(),
        "has_report": (run / "report.html").is_file(),
        "circuits": [path.stem for path in circuit_files(run)],
        "edits": sorted(path.parent.name for path in (run / "edits").glob("*/edit.json")),
    }
