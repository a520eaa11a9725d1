"""Loaded models of the service: how many, for how many at once, and not before they are asked for."""

import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from bridges.service.desk_request import DeskRequest
from bridges.service.guard import Absent
from bridges.service.session_routes import told
from bridges.service.sessions import Sessions
from extractor.errors import MachineError
from extractor.positions import Positions
from tests.conftest import ROOT


def test_pages_are_served_without_the_seconds_that_torch_takes() -> None:
    """Models are imported when a run's are loaded. So the request repeats what positions there are."""
    code = "import sys, bridges.service.app, bridges.service.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert DeskRequest.model_fields["positions"].annotation == Positions


class Desk:
    """Stands for a run's models."""

    is_current = True

    def __init__(self, run: str):
        self.run = run

    def tasks(self) -> list[dict[str, str]]:
        return [{"task": self.run}]


def test_models_make_room_before_others_are_loaded_and_only_some_questions_wait(
    monkeypatch, tmp_path
) -> None:
    """Two runs' models may not fit, and each question holds a thread that pages need."""
    monkeypatch.setattr("bridges.service.sessions.WAITING", 2)
    sessions, at_load, desks = Sessions(tmp_path), [], weakref.WeakSet()

    def load(run: Path) -> Desk:
        at_load.append((len(sessions._sessions), len(desks)))
        desks.add(desk := Desk(run.name))
        return desk

    monkeypatch.setattr("bridges.service.sessions.loaded", load)
    first, second = sessions.open("a").id, sessions.open("b")
    assert at_load == [(0, 0), (0, 0)]
    assert sessions.open("b") is second
    with pytest.raises(Absent), sessions.using(first):
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


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_loads_take_places_and_wait_for_the_models_that_make_room(monkeypatch, tmp_path) -> None:
    """Whoever waits for a load holds a thread; a model that still answers is still in memory."""
    monkeypatch.setattr("bridges.service.sessions.WAITING", 3)
    sessions, loads, may_load = Sessions(tmp_path), [], threading.Event()

    def load(run: Path) -> Desk:
        loads.append(run.name)
        assert run.name == "a" or may_load.wait(30)
        return Desk(run.name)

    monkeypatch.setattr("bridges.service.sessions.loaded", load)
    first, opened = sessions.open("a"), []
    assert first.tasks == [{"task": "a"}]

    def ask_late() -> None:
        with suppress(Absent), sessions.using(first.id):  # before the models go, or after
            pass

    with sessions.using(first.id):
        loading = threading.Thread(target=lambda: opened.append(sessions.open("b")))
        loading.start()
        waiting = threading.Thread(target=ask_late)
        waiting.start()
        wait_until(lambda: not sessions._places._value)
        with pytest.raises(MachineError, match="wait already"):
            sessions.open("b")
        assert loads == ["a"]  # the first still answers
    wait_until(lambda: "b" in loads)
    waiting.join(1)
    may_load.set()
    loading.join()
    waiting.join()
    assert (loads, opened[0].run) == (["a", "b"], "b")
    with pytest.raises(Absent), sessions.using(first.id):
        pass
    sessions.drop(opened[0].id)
    assert sessions._places._value == 3
    sessions.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/home/me/runs/a/student"), "(Permission denied)"),
        (MemoryError(), "memory is full"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 GB"), "memory is full"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), "memory is full"),
    ],
)
def test_what_the_machine_refuses_is_one_line_that_names_no_path(error: Exception, words: str) -> None:
    with pytest.raises(MachineError) as told_of, told():
        raise error
    assert words in str(told_of.value)
    assert "/home" not in str(told_of.value)
    with pytest.raises(RuntimeError, match="shape"), told():  # a fault of ours stays one
        raise RuntimeError("shape mismatch")
