"""What can be seen of a job while it runs, read from its files: state, progress, losses by step, log.

An event stream keeps no state on the server: an event's id says how far its reader is (step, bytes of
log), so that a reader who comes back goes on there. Nothing is sent faster than it is read.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bridges.drawing import visible
from bridges.service.jobs import ENDED, Job, JobFolder, State, Status
from bridges.service.queue import Queue
from bridges.service.redact import redact
from extractor.artifacts import read_json

EVERY = 0.5  # seconds between two looks at the files
CHUNK = 1 << 16  # bytes of log in one event
ROWS = 500  # metric rows in one event
PRINTED = re.compile(r"[^\n\t]+")
CURSOR = re.compile(r"(\d{1,12})\.(\d{1,15})")


class Progress(BaseModel):
    """The last progress bar that the recipe showed."""

    what: str
    done: float
    total: float
    elapsed: str
    left: str
    """Time left, as the bar estimates it."""
    values: dict[str, str]
    """Losses, tokens per second and what else it showed."""


class JobView(BaseModel):
    """A job as others see it."""

    id: str
    run: str
    recipe: str
    command: str
    state: State
    attempt: int
    is_cancelling: bool
    exit_code: int | None
    reason: str
    created: str
    started: str | None
    ended: str | None
    progress: Progress | None


def view(runs: Path, job: Job, status: Status) -> JobView:
    """What the API says of a job; times are UTC."""
    return JobView(
        id=job.id,
        run=job.run,
        recipe=job.recipe,
        command=redact(job.command),
        state=status.state,
        attempt=status.attempt,
        is_cancelling=status.is_cancelling,
        exit_code=status.exit_code,
        reason=status.reason,
        created=str(_utc(job.created)),
        started=_utc(status.started),
        ended=_utc(status.ended),
        progress=read_progress(JobFolder(runs, job.run, job.id)),
    )


def _utc(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def read_progress(folder: JobFolder) -> Progress | None:
    try:
        return Progress.model_validate_json(folder.progress.read_bytes())
    except (OSError, ValueError):
        return None


def metric_rows(run: Path, after: int) -> list[dict[str, float]]:
    """Rows of metrics.jsonl of later steps, each step once; a line that is being written waits."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    except OSError:
        return []
    rows: dict[int, dict[str, float]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if step > after:
            rows[step] = row
    return [rows[step] for step in sorted(rows)][:ROWS]


def read_log(folder: JobFolder, offset: int, limit: int = CHUNK) -> tuple[str, int]:
    """Whole lines of the log from a byte on, and where to go on."""
    try:
        with folder.log.open("rb") as file:
            file.seek(offset)
            data = file.read(limit)
    except OSError:
        return "", offset
    cut = data.rfind(b"\n") + 1 or (len(data) if len(data) == limit else 0)
    return data[:cut].decode("utf-8", "replace"), offset + cut


def for_terminal(text: str) -> str:
    """Lines of a log, with whatever a terminal would obey instead of show spelled out."""
    return PRINTED.sub(lambda found: visible(found[0]), text)


async def events(queue: Queue, job_id: str, cursor: str | None) -> AsyncIterator[str]:
    """Server-sent events of a job until it has ended: `job`, `metrics`, `log`, and at last `end`.

    Args:
        cursor: the id of the last event that was seen.
    """
    found = CURSOR.fullmatch(cursor or "")
    step, offset = (int(found[1]), int(found[2])) if found else (0, 0)
    shown = ""
    while True:
        job, status = await asyncio.to_thread(queue.get, job_id)
        is_over = status.state in ENDED
        own = await asyncio.to_thread(view, queue.runs, job, status)
        if (now := own.model_dump_json()) != shown:
            shown = now
            yield _event("job", now, step, offset)
        while rows := await asyncio.to_thread(metric_rows, queue.runs / job.run, step):
            step = int(rows[-1]["step"])
            yield _event("metrics", json.dumps(rows), step, offset)
        folder = JobFolder(queue.runs, job.run, job.id)
        while (text := await asyncio.to_thread(read_log, folder, offset))[0]:
            offset = text[1]
            yield _event("log", json.dumps(text[0]), step, offset)
        if is_over:
            yield _event("end", "{}", step, offset)
            return
        await asyncio.sleep(EVERY)


def _event(kind: str, data: str, step: int, offset: int) -> str:
    return f"id: {step}.{offset}\nevent: {kind}\ndata: {data}\n\n"


def as_table(rows: list[tuple[Job, Status]], runs: Path) -> str:
    """Jobs as lines of text, for a terminal."""
    lines = [("job", "run", "recipe", "state", "attempt", "progress", "reason")]
    for job, status in rows:
        own = read_progress(JobFolder(runs, job.run, job.id))
        bar = "" if own is None else f"{own.what} {own.done:g}/{own.total:g}, {own.left} left"
        text = bar if status.state == "running" else ""
        reason = " ".join(status.reason.split())[:80]
        words = (job.id, job.run, job.recipe, status.state, str(status.attempt), text, reason)
        lines.append(tuple(map(visible, words)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in lines
    )


def circuits(run: Path) -> dict[str, dict[str, Any]]:
    """Every circuit's file, by task; none that lies elsewhere.

    Raises:
        InputError: a file is damaged.
    """
    own = (path for path in (run / "circuits").glob("*.json") if path.resolve().is_relative_to(run.resolve()))
    return {path.stem: read_json(path, "circuit", "recipes/extract.py") for path in sorted(own)}


def summary(run: Path) -> dict[str, Any]:
    """What a run folder holds, by name."""
    tasks = sorted(path.stem for path in (run / "circuits").glob("*.json"))
    return {
        "run": run.name,
        "has_student": (run / "student" / "config.json").is_file(),
        "has_report": (run / "report.html").is_file(),
        "circuits": tasks,
        "edits": sorted(path.parent.name for path in (run / "edits").glob("*/edit.json")),
    }
