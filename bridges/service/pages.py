"""The pages: made on the server, kept alive by one script without a build step."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from bridges.service import follow, submit
from bridges.service.guard import contained, is_id
from bridges.service.queue import Queue

STATIC = {"service.css": "text/css", "service.js": "text/javascript"}
SHOWN = 50  # jobs on the first page


def add_pages(app: FastAPI, queue: Queue, home: Path, runs: Path) -> None:
    environment = Environment(
        loader=PackageLoader("bridges", "templates/service"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip

    def page(name: str, **values: Any) -> HTMLResponse:
        return HTMLResponse(environment.get_template(f"{name}.html.jinja").render(**values))

    @app.get("/", include_in_schema=False)
    def index() -> HTMLResponse:
        jobs = [follow.view(runs, job, status) for _, job, status in queue.page(limit=SHOWN)]
        folders = sorted(path for path in runs.iterdir() if path.is_dir() and is_id(path.name))
        return page(
            "index",
            jobs=jobs,
            total=queue.count(),
            runs=[follow.summary(path) for path in folders],
            configs=submit.configs(home),
            settings={recipe: list(own) for recipe, own in submit.SETTINGS.items()},
        )

    @app.get("/jobs/{job_id}", include_in_schema=False)
    def job(job_id: str) -> HTMLResponse:
        own, status = queue.get(job_id)
        return page("job", job=follow.view(runs, own, status))

    @app.get("/runs/{run}", include_in_schema=False)
    def run(run: str) -> HTMLResponse:
        folder = contained(runs, run)
        if not folder.is_dir():
            raise LookupError(run)
        found = {task: circuit["evidence"] for task, circuit in follow.circuits(folder).items()}
        return page("run", run=follow.summary(folder), circuits=found)

    @app.get("/static/{name}", include_in_schema=False)
    def static(name: str) -> Response:
        if name not in STATIC:
            raise LookupError(name)
        text = files("bridges").joinpath("templates", "service", name).read_text(encoding="utf-8")
        return Response(text, media_type=STATIC[name])
