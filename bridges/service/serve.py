"""`sparsebridge serve`: the API and the pages on one port, and beside it the machine's worker.

The worker is a process of its own: it outlives a server that was killed, and is started again when it dies.
"""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bridges.service.network import find_token, make_token, open_port
from extractor.errors import MachineError, UsageError

WORKER_LOCK = ".worker.lock"


class OneWorker:
    """The lock that the machine's worker holds; the file says which process that is."""

    def __init__(self, runs: Path):
        runs.mkdir(parents=True, exist_ok=True)
        self.path = runs / WORKER_LOCK
        self._file = self.path.open("a+", encoding="ascii")

    def take(self) -> bool:
        """False: another worker works here."""
        for last in (False, False, True):  # who only looks whether it is held holds it for a moment
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if last:
                    return False
                time.sleep(0.1)
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        return True

    def holder(self) -> str:
        self._file.seek(0)
        return self._file.read().strip() or "unknown"

    @property
    def is_held(self) -> bool:
        """By whomever: tried, and let go at once."""
        with self.path.open("a", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False


class WorkerKeeper(threading.Thread):
    """Starts a worker whenever none works here; one that ends again and again, less and less often."""

    FIRST, LONGEST = 1.0, 60.0  # seconds before a worker is started again

    def __init__(self, runs: Path, home: Path, words: Sequence[str] = ()):
        super().__init__(daemon=True)
        command = [sys.executable, "-m", "bridges.cli", "worker", "--runs", str(runs), "--home", str(home)]
        self.command = [*command, *words]
        self.lock, self.worker = OneWorker(runs), None
        self._stopping = threading.Event()

    def run(self) -> None:
        pause, started = self.FIRST, 0.0
        while not self._stopping.wait(self.FIRST):
            if (self.worker is not None and self.worker.poll() is None) or self.lock.is_held:
                continue
            if self.worker is not None:
                code, lived = self.worker.returncode, time.monotonic() - started
                # One that was killed is no fault of its own.
                pause = min(2 * pause, self.LONGEST) if code > 0 and lived < self.LONGEST else self.FIRST
                sys.stderr.write(f"the worker ended with code {code}; it is started again in {pause:.0f} s\n")
                if self._stopping.wait(pause):
                    return
            # In a session of its own: Ctrl-C in the terminal is the server's to pass on.
            self.worker, started = subprocess.Popen(self.command, start_new_session=True), time.monotonic()

    def stop(self) -> None:
        """End the worker that was started here; its job writes a checkpoint and is queued again. Another's
        goes on, and is named."""
        self._stopping.set()
        self.join()
        if self.worker is not None and self.worker.poll() is None:
            sys.stderr.write("the worker writes a checkpoint of its job and ends; it goes on from there\n")
            self.worker.terminate()
            self.worker.wait()
        elif self.lock.is_held:
            sys.stderr.write(
                f"a worker that was started before this server goes on: `kill {self.lock.holder()}` ends it, "
                "after a checkpoint of its job\n"
            )


def serve(
    home: Path,
    runs: Path,
    *,
    host: str,
    port: int,
    token_file: Path | None = None,
    new_token: bool = False,
    allowed_hosts: Sequence[str] = (),
    has_worker: bool = True,
    worker_words: Sequence[str] = (),
) -> int:
    """Answer until Ctrl-C or SIGTERM.

    Raises:
        MachineError: the extra `serve` is not installed, or the port is taken.
        UsageError: an address that needs a token, and there is none; a new token without a file for it.
    """
    if new_token:
        if token_file is None:
            raise UsageError("--new_token makes a token in --token_file; name one")
        make_token(token_file)
    token = find_token(token_file, os.environ)
    # Before anything that takes seconds: whoever asks already waits for it.
    bound, settings = open_port(host, port, token, allowed_hosts)
    try:
        import uvicorn

        from bridges.service.app import make_app
    except ImportError as error:
        raise MachineError(
            f"the service needs the extra `serve` ({error.name} is missing): pip install -e '.[serve]'"
        ) from None
    from bridges.service.guard import Guard
    from bridges.service.sessions import Sessions

    runs.mkdir(parents=True, exist_ok=True)
    runs, home = runs.resolve(), home.resolve()
    os.chdir(home)  # what configs name is relative to it, as for the recipes
    app = make_app(home, runs, Sessions(runs), settings.link)
    keeper = WorkerKeeper(runs, home, worker_words) if has_worker else None
    if keeper is not None:
        keeper.start()
    sys.stdout.write(f"sparsebridge: {settings.link()}\n")
    sys.stdout.flush()
    config = uvicorn.Config(
        Guard(app, settings=settings), log_level="warning", access_log=False, server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3, h11_max_incomplete_event_size=1 << 16,
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises what it caught once more when it has ended; the worker is still to be stopped then.
        signal.signal(number, lambda *_: None)
    try:
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        if keeper is not None:
            keeper.stop()
    return 0
