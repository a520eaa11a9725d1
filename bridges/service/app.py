"""The HTTP API and the pages. Ids and plain values come in, never a path; nothing is uploaded.

Who may ask is decided before any route runs (`bridges.service.guard`).
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from bridges.service import circuit_files, follow, submit
from bridges.service.follow import JobView
from bridges.service.guard import LINKS, Absent, contained
from bridges.service.jobs import State
from bridges.service.pages import PAGE, After, Before, add_pages, error_page
from bridges.service.queue import Queue
from bridges.service.rows import NoSuchJob
from bridges.service.session_routes import add_session_routes
from bridges.service.sessions import Sessions
from extractor.artifacts import read_json
from extractor.errors import InputError, MachineError, UsageError

REPORT_POLICY = "sandbox allow-scripts; frame-ancestors 'none'"
"""The report brings its own policy; in a sandbox its script has no cookie and no way back to this server."""


class JobRequest(BaseModel):
    """A recipe and its config by name, the run by the name of its folder, and plain values."""

    model_config = ConfigDict(extra="forbid")
    recipe: str = Field(max_length=64)
    config: str = Field("", max_length=128)
    run: str = Field(max_length=128)
    settings: dict[str, Any] = Field({}, max_length=64)


class JobPage(BaseModel):
    """Jobs, newest first; `before` of the next page, if there is one. The first page has beside them the
    newest of those that other engines have, as their files say."""

    jobs: list[JobView]
    before: int | None
    handed_over: list[JobView]
    of_handed_over: int
    """How many there are."""


class RunPage(BaseModel):
    """What run folders hold, by name; `after` of the next page, if there is one."""

    runs: list[dict[str, Any]]
    after: str | None


class Link(BaseModel):
    """Where one more browser starts."""

    link: str


def make_app(home: Path, runs: Path, sessions: Sessions, new_link: Callable[[], str]) -> FastAPI:
    """The application over the runs; `home` holds the recipes."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        sessions.close()
        queue.close()

    queue = Queue(runs)
    app = FastAPI(
        title="sparsebridge", version="1", docs_url=None, redoc_url=None,
        openapi_url="/api/v1/openapi.json", lifespan=lifespan,
    )  # fmt: skip
    add_errors(app, home, runs)
    add_job_routes(app, queue, home, runs)

    @app.post(LINKS, status_code=201)
    def make_link() -> Link:
        """A link that opens the pages once, within ten minutes. It takes the token itself, no cookie."""
        return Link(link=new_link())

    add_run_routes(app, runs)
    add_session_routes(app, sessions, runs)
    add_pages(app, queue, home, runs)
    return app


def add_errors(app: FastAPI, home: Path, runs: Path) -> None:
    """A user's mistake is one line; what is absent and what is not allowed to be seen answer alike. A browser
    that asks for a page gets one."""

    def reply(request: Request, message: str, code: int) -> Response:
        wants_page = "text/html" in request.headers.get("accept", "")
        if wants_page and not request.url.path.startswith("/api/"):
            return error_page(message, code)
        return JSONResponse({"error": message}, code)

    def answer(code: int):
        async def handler(request: Request, error: Exception) -> Response:
            text = " ".join(str(error).split())
            for folder in (runs, home):  # where they lie is no client's business
                text = text.replace(f"{folder}/", "")
            return reply(request, text, code)

        return handler

    async def not_found(request: Request, error: Exception) -> Response:
        return reply(request, "no such thing here", 404)

    async def failed(request: Request, error: Exception) -> Response:
        return reply(request, "the service failed; its log says why", 500)

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return reply(request, f"{where}: {first['msg']}", 422)

    app.add_exception_handler(UsageError, answer(400))
    app.add_exception_handler(InputError, answer(422))
    app.add_exception_handler(MachineError, answer(503))
    for kind in (Absent, NoSuchJob, 404):
        app.add_exception_handler(kind, not_found)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, failed)  # logged, too


def add_job_routes(app: FastAPI, queue: Queue, home: Path, runs: Path) -> None:
    @app.get("/healthz")
    def healthz() -> dict[str, bool]:
        """The server answers."""
        return {"ok": True}

    @app.get("/readyz")
    def readyz() -> dict[str, int]:
        """The index can be read: how many jobs there are."""
        return {"jobs": queue.count()}

    @app.get("/api/v1/recipes")
    def recipes() -> dict[str, dict[str, list[str]]]:
        """By recipe: its configs, and what may be set."""
        found = submit.configs(home)
        return {
            recipe: {"configs": found[recipe], "settings": list(submit.SETTINGS[recipe])} for recipe in found
        }

    @app.post("/api/v1/jobs", status_code=201)
    def submit_job(
        request: JobRequest, idempotency_key: Annotated[str | None, Header(max_length=200)] = None
    ) -> JobView:
        """Queue a job; the same key again gives the same job."""
        job = submit.from_names(home, runs, **request.model_dump(), idempotency_key=idempotency_key)
        known, status = queue.get(queue.submit(job).id)
        return follow.view(queue, known, status)

    @app.get("/api/v1/jobs")
    def list_jobs(
        limit: Annotated[int, Query(ge=1, le=200)] = PAGE,
        before: Before = None,
        state: State | None = None,
    ) -> JobPage:
        """Newest first, page by page."""
        found, older = follow.job_page(queue, limit, before, state)
        others = [] if before else follow.elsewhere(runs)
        others = [own for own in others if state in (None, own[1].state)]
        shown = follow.views(queue, [*found, *others[:limit]])
        return JobPage(
            jobs=shown[: len(found)],
            before=older,
            handed_over=shown[len(found) :],
            of_handed_over=len(others),
        )

    @app.get("/api/v1/jobs/{job_id}")
    def get_job(job_id: str) -> JobView:
        """One job."""
        return follow.view(queue, *follow.find(queue, job_id))

    @app.post("/api/v1/jobs/{job_id}/cancel")
    def cancel_job(job_id: str) -> JobView:
        """A running job writes a checkpoint first; submitted again, it goes on from there."""
        if engine := follow.view(queue, *follow.find(queue, job_id)).engine:
            raise UsageError(f"{engine} has this job: `sparsebridge cancel {job_id}` asks it")
        queue.cancel(job_id)
        return follow.view(queue, *queue.get(job_id))

    @app.get("/api/v1/jobs/{job_id}/events", response_class=StreamingResponse)
    def job_events(
        job_id: str, last_event_id: Annotated[str | None, Header(max_length=64)] = None
    ) -> StreamingResponse:
        """State, losses by step and log as they come (server-sent events); resumes after Last-Event-ID."""
        follow.find(queue, job_id)
        return StreamingResponse(follow.events(queue, job_id, last_event_id), media_type="text/event-stream")


def add_run_routes(app: FastAPI, runs: Path) -> None:
    @app.get("/api/v1/runs")
    def list_runs(
        limit: Annotated[int, Query(ge=1, le=200)] = PAGE,
        after: After = "",
    ) -> RunPage:
        """By name, page by page."""
        found, last = follow.run_page(runs, limit, after)
        return RunPage(runs=[follow.summary(path) for path in found], after=last)

    @app.get("/api/v1/runs/{run}")
    def get_run(run: str) -> dict[str, Any]:
        """One run: what it holds, and its evaluation."""
        found = follow.summary(follow.run_folder(runs, run)) | {"evaluation": None}
        with suppress(Absent):
            path = contained(runs, run, "evaluation.json")
            found["evaluation"] = read_json(path, "evaluation", "recipes/train.py")
        return found

    @app.get("/api/v1/runs/{run}/claims")
    def get_claims(run: str) -> list[dict[str, Any]]:
        """Each circuit's size and verdict with the checks behind it; or why its file is damaged."""
        return circuit_files.rows(follow.run_folder(runs, run))

    @app.get("/api/v1/runs/{run}/circuits/{task}", response_class=FileResponse)
    def get_circuit(run: str, task: str) -> Response:
        """A circuit's file: nodes, edges, settings, evidence. Of one above 4 MB its first 5,000 nodes and the
        20,000 edges of the largest weights; `shown` says of how many."""
        found = served(runs, run, "circuits", f"{task}.json", media_type="application/json")
        if Path(found.path).stat().st_size <= circuit_files.WHOLE:
            return found
        return JSONResponse(circuit_files.strongest(Path(found.path)))

    @app.get("/api/v1/runs/{run}/report.json", response_class=FileResponse)
    def get_report(run: str) -> FileResponse:
        """The report's record."""
        return served(runs, run, "report.json", media_type="application/json")

    @app.get("/runs/{run}/report.html", response_class=FileResponse, include_in_schema=False)
    def get_report_page(run: str) -> FileResponse:
        own = served(runs, run, "report.html", media_type="text/html")
        own.headers["content-security-policy"] = REPORT_POLICY
        return own


def served(runs: Path, *parts: str, media_type: str) -> FileResponse:
    """A file of a run. Raises Absent where it is absent, or lies elsewhere."""
    path = contained(runs, *parts)
    if not path.is_file():
        raise Absent(parts[-1])
    return FileResponse(path, media_type=media_type)
