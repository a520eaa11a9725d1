"""Routes of the live desk: load a run's models, change nodes, keep the setting as a file or an adapter."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from bridges.service.desk_request import DeskRequest
from bridges.service.follow import run_folder
from bridges.service.sessions import Sessions


class SessionView(BaseModel):
    """A loaded run, and what can be asked of it."""

    id: str
    run: str
    tasks: list[dict[str, Any]]


class KeepRequest(BaseModel):
    """A setting of the desk, and the name that it is kept under."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    setting: DeskRequest
    force: bool = False
    """Keep an adapter that does not meet the limits, too; they are written into it."""


def add_session_routes(app: FastAPI, sessions: Sessions, runs: Path) -> None:
    @app.post("/api/v1/runs/{run}/sessions", status_code=201)
    def open_session(run: str) -> SessionView:
        """Load the run's models, which takes seconds; they are unloaded when nobody asks."""
        run_folder(runs, run)
        session = sessions.open(run)
        with session.lock:
            return SessionView(id=session.id, run=run, tasks=session.desk.tasks())

    @app.delete("/api/v1/sessions/{session_id}", status_code=204)
    def close_session(session_id: str) -> None:
        """Unload the models."""
        sessions.drop(session_id)

    @app.post("/api/v1/sessions/{session_id}/intervene")
    def intervene(session_id: str, request: DeskRequest) -> dict[str, Any]:
        """Next-token distributions of student and dense model, before and after."""
        with sessions.using(session_id) as session:
            return session.desk.intervene(request)

    @app.post("/api/v1/sessions/{session_id}/interventions", status_code=201)
    def save_intervention(session_id: str, request: KeepRequest) -> dict[str, str]:
        """Keep the setting as interventions/<name>.json of the run."""
        with sessions.using(session_id) as session:
            return {"file": session.desk.save(request.setting, request.name).name}

    @app.post("/api/v1/sessions/{session_id}/adapters", status_code=201)
    def export_adapter(session_id: str, request: KeepRequest) -> dict[str, Any]:
        """Export the setting as a PEFT adapter, adapters/<name>/ of the run; takes a while."""
        with sessions.using(session_id) as session:
            return session.desk.export(request.setting, request.name, force=request.force)
