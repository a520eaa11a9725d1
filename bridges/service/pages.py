"""The pages: made on the server, kept alive by one script without a build step."""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from bridges.service import circuit_files, follow, submit
from bridges.service.guard import Absent
from bridges.service.queue import Queue
from bridges.service.runners import handed_over
from bridges.service.serve import OneWorker

STATIC = {"service.css": "text/css", "service.js": "text/javascript"}
SHOWN = 50  # jobs on the first page


def page(name: str, code: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(_environment().get_template(f"{name}.html.jinja").render(**values), code)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("bridges", "templates/service"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def error_page(message: str, code: int) -> HTMLResponse:
    """What a browser sees of a mistake, with the way back."""
    return page("error", code, message=message)


def add_pages(app: FastAPI, queue: Queue, home: Path, runs: Path) -> None:
    @app.get("/", include_in_schema=False)
    def index(before: Annotated[int | None, Query(ge=1)] = None) -> HTMLResponse:
        found = queue.page(limit=SHOWN, before=before)
        elsewhere = [] if before else handed_over(runs, ask=False)[:SHOWN]
        return page(
            "index",
            jobs=[follow.view(queue, job, status) for _, job, status in found],
            older=found[-1][0] if len(found) == SHOWN else None,
            elsewhere=[follow.view(queue, *own) for own in elsewhere],
            total=queue.count(),
            has_worker=OneWorker(runs).is_held,
            no_worker=follow.NO_WORKER,
            runs=[follow.summary(path) for path in follow.run_folders(runs)],
            configs=submit.configs(home),
            settings={recipe: list(own) for recipe, own in submit.SETTINGS.items()},
        )

    @app.get("/jobs/{job_id}", include_in_schema=False)
    def job(job_id: str) -> HTMLResponse:
        return page("job", job=follow.view(queue, *follow.find(queue, job_id)))

    @app.get("/runs/{run}", include_in_schema=False)
    def run(run: str) -> HTMLResponse:
        folder = follow.run_folder(runs, run)
        return page("run", run=follow.summary(folder), circuits=circuit_files.rows(folder))

    @app.get("/static/{name}", include_in_schema=False)
    def static(name: str) -> Response:
        if name not in STATIC:
            raise Absent(name)
        text = files("bridges").joinpath("templates", "service", name).read_text(encoding="utf-8")
        return Response(text, media_type=STATIC[name])
