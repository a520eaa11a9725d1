"""Loaded models for the live desk: few at a time, one question at a time, unloaded when nobody asks."""

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridges.service.guard import Absent
from extractor.errors import MachineError

if TYPE_CHECKING:
    from bridges.service.live_desk import LiveDesk

WAITING = 24
"""Questions and loads that may be open at once: each holds one of the server's 40 threads, and pages need
some."""
IDLE = 900.0  # seconds without a question after which models are unloaded


@dataclass
class Session:
    """One run's models; `lock` is held while they answer."""

    id: str
    run: str
    desk: "LiveDesk"
    tasks: list[dict[str, Any]]
    """What can be asked of it."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    used: float = field(default_factory=time.monotonic)


class Sessions:
    """The models that are loaded, at most `most`; the one that was used longest ago makes room."""

    def __init__(self, runs: Path, *, most: int = 1, idle: float = IDLE):
        self.runs, self.most, self.idle = runs, most, idle
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()  # of the list, for a moment; models load under the other
        self._loading = threading.Lock()
        self._places = threading.BoundedSemaphore(WAITING)
        self._closed = threading.Event()
        threading.Thread(target=self._unload_idle, daemon=True).start()

    def open(self, run: str) -> Session:
        """The session of a run; its models are loaded if they are not.

        Raises:
            InputError: the run is not finished, or its parts do not belong together.
            MachineError: too many wait already.
        """
        with self._place(), self._loading:
            if (known := self._current(run)) is not None:
                return known
            while len(self._sessions) >= self.most:  # first: two runs' models may not fit
                self._drop_oldest()
            desk = loaded(self.runs / run)
            session = Session(secrets.token_urlsafe(16), run, desk, desk.tasks())
            with self._lock:
                self._sessions[session.id] = session
            return session

    @contextmanager
    def using(self, session_id: str) -> Iterator[Session]:
        """One question to a session.

        Raises:
            Absent: there is none (any more).
            MachineError: too many wait already.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise Absent(session_id)
        with self._place(), session.lock:
            if session_id not in self._sessions:  # it made room while this waited
                raise Absent(session_id)
            session.used = time.monotonic()
            yield session
            session.used = time.monotonic()

    def drop(self, session_id: str) -> None:
        """Unload, once a question that is being answered has its answer. Raises as `using`."""
        with self.using(session_id), self._lock:
            self._sessions.pop(session_id, None)

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            self._sessions.clear()

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Raises MachineError where none is free."""
        if not self._places.acquire(blocking=False):
            raise MachineError(f"{WAITING} questions to the models wait already; ask again a little later")
        try:
            yield
        finally:
            self._places.release()

    def _listed(self) -> list[Session]:
        with self._lock:
            return list(self._sessions.values())

    def _current(self, run: str) -> Session | None:
        for session in self._listed():
            if session.run == run and session.desk.is_current:
                session.used = time.monotonic()
                return session
        return None

    def _drop_oldest(self) -> None:
        """Its models stay in memory while they answer: that is waited for. Nor may whoever loads others hold
        it by a name of its own."""
        if listed := self._listed():  # empty: somebody else dropped it
            oldest = min(listed, key=lambda own: own.used)
            with oldest.lock, self._lock:
                self._sessions.pop(oldest.id, None)

    def _unload_idle(self) -> None:
        while not self._closed.wait(min(30.0, self.idle / 4)):
            with self._lock:
                now = time.monotonic()
                for session in list(self._sessions.values()):
                    if now - session.used > self.idle and not session.lock.locked():
                        del self._sessions[session.id]


def loaded(run: Path) -> "LiveDesk":
    """A run's desk. Imported here: a server that only shows pages starts in a second, without torch."""
    from bridges.service.live_desk import LiveDesk
    from extractor.machine import fast_fp32, use_all_cores

    use_all_cores()
    fast_fp32()
    return LiveDesk.of_run(run)
