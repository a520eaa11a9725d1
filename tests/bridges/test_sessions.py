"""Loaded models of the service: how many, for how many at once, and not before they are asked for."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bridges.service.desk_request import DeskRequest
from bridges.service.guard import Absent
from bridges.service.sessions import Sessions
from extractor.errors import MachineError
from extractor.positions import Positions
from tests.conftest import ROOT


def test_pages_are_served_without_the_seconds_that_torch_takes() -> None:
    """Models are imported when a run's are loaded. So the request repeats what positions there are."""
    code = "import sys, bridges.service.app, bridges.service.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert DeskRequest.model_fields["positions"].annotation == Positions


def test_models_make_room_before_others_are_loaded_and_only_some_questions_wait(
    monkeypatch, tmp_path
) -> None:
    """Two runs' models may not fit, and each question holds a thread that pages need."""
    monkeypatch.setattr("bridges.service.sessions.WAITING", 2)
    sessions, at_load = Sessions(tmp_path), []

    def load(run: Path) -> SimpleNamespace:
        at_load.append(len(sessions._sessions))
        return SimpleNamespace(is_current=True)

    monkeypatch.setattr("bridges.service.sessions.loaded", load)
    first, second = sessions.open("a"), sessions.open("b")
    assert at_load == [0, 0]
    assert sessions.open("b") is second
    with pytest.raises(Absent), sessions.using(first.id):
        pass
    answered = []

    def ask() -> None:
        with sessions.using(second.id):
            answered.append(1)

    waiting = threading.Thread(target=ask)
    with sessions.using(second.id):
        waiting.start()
        while sessions._places._value:
            time.sleep(0.01)
        with pytest.raises(MachineError, match="wait already"), sessions.using(second.id):
            pass
    waiting.join()
    ask()
    assert answered == [1, 1]
    sessions.close()
