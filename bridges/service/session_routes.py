"""Routes of the live desk: load a run's models, change nodes, keep the setting as a file or an adapter."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from bridges.service.desk_request import DeskRequest
from bridges.service.follow import run_folder
from bridges.service.sessions import Sessions
from extractor.errors import MachineError

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
"""As torch says it, of an accelerator and of main memory."""


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
        with told():
            session = sessions.open(run)
        return SessionView(id=session.id, run=run, tasks=session.tasks)

    @app.delete("/api/v1/sessions/{session_id}", status_code=204)
    def close_session(session_id: str) -> None:
        """Unload the models."""
        sessions.drop(session_id)

    @app.post("/api/v1/sessions/{session_id}/intervene")
    def intervene(session_id: str, request: DeskRequest) -> dict[str, Any]:
        """Next-token distributions of student and dense model, before and after."""
        with told(), sessions.using(session_id) as session:
            return session.desk.intervene(request)

    @app.post("/api/v1/sessions/{session_id}/interventions", status_code=201)
    def save_intervention(session_id: str, request: KeepRequest) -> dict[str, str]:
        """Keep the setting as interventions/<name>.json of the run."""
        with told(), sessions.using(session_id) as session:
            return {"file": session.desk.save(request.setting, request.name).name}

    @app.post("/api/v1/sessions/{session_id}/adapters", status_code=201)
    def export_adapter(session_id: str, request: KeepRequest) -> dict[str, Any]:
        """Export the setting as a PEFT adapter, adapters/<name>/ of the run; takes a while."""
        with told(), sessions.using(session_id) as session:
            return session.desk.export(request.setting, request.name, force=request.force)


@contextmanager
def told() -> Iterator[None]:
    """What the machine refuses becomes one line that says what to do.

    Raises:
        MachineError: a file cannot be used, or memory is full.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__  # its own text names paths
        raise MachineError(f"a file of the run cannot be used ({why}); mend that and ask again") from None
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error))):
            raise
        raise MachineError(
            "memory is full: ask with a shorter prompt or fewer tokens, or end what else needs it"
        ) from None
