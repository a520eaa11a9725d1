"""The pages: made on the server, kept alive by one script without a build step."""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bridges.drawing import visible
from bridges.service import circuit_files, follow, submit
from bridges.service.guard import Absent
from bridges.service.queue import Queue
from bridges.service.serve import OneWorker

STATIC = {"service.css": "text/css", "service.js": "text/javascript"}
PAGE = 50  # jobs or runs, where no other number is asked for
Before = Annotated[int | None, Query(ge=1, le=2**63 - 1)]  # the index counts in 64 bits
After = Annotated[str, Query(max_length=128)]


def page(name: str, code: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(_environment().get_template(f"{name}.html.jinja").render(**values), code)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("bridges", "templates/service"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_shown,
    )  # fmt: skip


def _shown(value: Any) -> Any:
    """What a template puts on the page: text from outside with what a browser would obey spelled out."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def error_page(message: str, code: int) -> HTMLResponse:
    """What a browser sees of a mistake, with the way back."""
    return page("error", code, message=message)


def add_pages(app: FastAPI, queue: Queue, home: Path, runs: Path) -> None:
    @app.get("/", include_in_schema=False)
    def index(before: Before = None, after: After = "") -> HTMLResponse:
        found, older = follow.job_page(queue, PAGE, before)
        elsewhere = [] if before else follow.elsewhere(runs)
        has_worker = OneWorker(runs).is_held
        shown_runs, last = follow.run_page(runs, PAGE, after)
        return page(
            "index",
            jobs=follow.views(queue, found, has_worker),
            before=before,
            older=older,
            elsewhere=follow.views(queue, elsewhere[:PAGE], has_worker),
            of_elsewhere=len(elsewhere),
            total=queue.count(),
            has_worker=has_worker,
            no_worker=follow.NO_WORKER,
            runs=[follow.summary(path) for path in shown_runs],
            after=after,
            more_runs=last,
            configs=submit.configs(home),
            settings={recipe: list(own) for recipe, own in submit.SETTINGS.items()},
        )

    @app.get("/jobs/{job_id}", include_in_schema=False)
    def job(job_id: str) -> HTMLResponse:
        return page("job", job=follow.view(queue, *follow.find(queue, job_id)), losses=follow.LOSSES)

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
