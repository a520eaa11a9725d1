"""The worker on real processes: a home folder whose recipes end, crash, hang or are killed, started as
users' are."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from bridges.service.jobs import Job, JobFolder, Status
from bridges.service.log_pump import LogPump, parse_bar
from bridges.service.processes import MARK, processes_of
from bridges.service.queue import Queue
from bridges.service.redact import Redactor
from bridges.service.serve import OneWorker, WorkerKeeper
from bridges.service.worker import Worker, WorkerConfig
from extractor.errors import MachineError
from tests.conftest import ROOT

RECIPE = """
import json, os, signal, sys, time
from pathlib import Path

mode, run = sys.argv[1], Path(sys.argv[sys.argv.index("--run") + 1])
attempt = int(os.environ["SPARSEBRIDGE_ATTEMPT"])
with (run / "attempts.txt").open("a") as file:
    file.write(f"{attempt}\\n")


def leave(code, words):
    Path(os.environ["SPARSEBRIDGE_OUTCOME"]).write_text(json.dumps({"exit_code": code, "error": words}))
    sys.exit(code)


if mode == "mistake":
    leave(2, "tasks: no such task, hf_abcdefghijklmnopqrstuvwxyzABCDEFGH")
elif mode == "gives_up":  # says that it can go on, and nobody had asked it to stop
    leave(int(sys.argv[2]), "interrupted")
elif mode == "crash":
    raise RuntimeError("it always breaks")
elif mode == "kill_parent":
    os.kill(int(os.environ["WORKER_PID"]), signal.SIGKILL)
    time.sleep(60)
elif mode == "progress":  # crashes each time, but gets further
    (run / f"step-{attempt}").touch()
    if attempt < 6:
        os._exit(9)
elif mode == "tracked":  # a crash, but a tracker begins a new file at each start
    (run / "sparsebridge").mkdir(exist_ok=True)
    (run / "sparsebridge" / f"events.out.tfevents.{attempt}").touch()
    if attempt < 6:
        os._exit(9)
elif mode == "stop":  # as training does: a checkpoint on SIGTERM
    def stop(*_):
        (run / "checkpoint").touch()
        leave(75, "stopped by SIGTERM")
    signal.signal(signal.SIGTERM, stop)
    (run / "started").touch()
    if not (run / "checkpoint").exists():
        time.sleep(60)
elif mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (run / "started").touch()
    time.sleep(60)
print("the end, with hf_abcdefghijklmnopqrstuvwxyzABCDEFGH in it")
"""


PLAIN = (sys.executable,)
LAUNCH = (*PLAIN, "-m", "accelerate.commands.launch")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "train.py").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def queue(home: Path) -> Iterator[Queue]:
    queue = Queue(home / "runs")
    yield queue
    own = {job.id for _, job, _ in queue.page(limit=1000)}
    for process in psutil.process_iter(["environ"]):
        assert (process.info["environ"] or {}).get(MARK) not in own, "a job's process outlived its test"
    queue.close()


def submit(queue: Queue, mode: str, run: str = "run") -> Job:
    return queue.submit(Job.new(run, "train", [mode, "--run", f"runs/{run}"]))


def work(queue: Queue, home: Path, **settings: object) -> None:
    """Recipes started by Python alone: `accelerate launch` takes seconds, and other tests here use it."""
    plain = {"poll": 0.1, "grace": 20, "launcher": (sys.executable,)}
    Worker(queue, home, WorkerConfig(**plain | settings)).run(until_empty=True)


def ended(queue: Queue, job: Job) -> Status:
    return queue.get(job.id)[1]


def log_of(queue: Queue, job: Job) -> str:
    return JobFolder(queue.runs, job.run, job.id).log.read_text()


def attempts(home: Path, run: str = "run") -> list[int]:
    return [int(line) for line in (home / "runs" / run / "attempts.txt").read_text().split()]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def start_worker(home: Path, launcher: tuple[str, ...] = PLAIN, **environ: str) -> subprocess.Popen:
    """A worker as a process of its own, with a short lease."""
    code = (
        "from pathlib import Path; from bridges.service.queue import Queue;"
        "from bridges.service.worker import WorkerConfig, work;"
        "work(Queue(Path('runs')), Path('.'), WorkerConfig("
        f"lease=1.0, poll=0.1, grace=20, launcher={launcher!r}), until_empty=True)"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=home, env={**os.environ, "PYTHONPATH": path, **environ}
    )


def test_a_job_runs_to_its_end_and_no_secret_reaches_its_log(queue: Queue, home: Path) -> None:
    job = submit(queue, "fine")
    work(queue, home)
    status = ended(queue, job)
    assert (status.state, status.exit_code, status.attempt) == ("done", 0, 1)
    assert "the end, with [redacted] in it" in log_of(queue, job)


def test_a_user_s_mistake_fails_at_once_with_the_recipe_s_own_words(queue: Queue, home: Path) -> None:
    job = submit(queue, "mistake")
    work(queue, home, launcher=LAUNCH)
    status = ended(queue, job)
    assert (status.state, status.exit_code) == ("failed", 2)
    assert status.reason == "tasks: no such task, [redacted]"
    folder = JobFolder(queue.runs, job.run, job.id)
    assert folder.read_outcome() == (2, status.reason)  # the file that the recipe wrote holds no secret, too
    assert attempts(home) == [1]


def test_a_poison_job_fails_after_its_attempts_and_the_queue_goes_on(queue: Queue, home: Path) -> None:
    poison, fine = submit(queue, "crash"), submit(queue, "fine", "other")
    work(queue, home, attempts=2)
    assert ended(queue, poison).state == "failed"
    assert "2 attempts in a row came to nothing" in ended(queue, poison).reason
    assert ended(queue, fine).state == "done"
    assert len(attempts(home)) <= 3


@pytest.mark.parametrize("code", ["75", "130"])
def test_a_job_that_stops_unasked_again_and_again_fails(queue: Queue, home: Path, code: str) -> None:
    job = queue.submit(Job.new("run", "train", ["gives_up", code, "--run", "runs/run"]))
    work(queue, home, attempts=2)
    assert ended(queue, job).state == "failed"
    assert "2 attempts in a row came to nothing: interrupted" in ended(queue, job).reason


def test_attempts_that_get_further_are_not_counted(queue: Queue, home: Path) -> None:
    job = submit(queue, "progress")
    work(queue, home, attempts=2)
    assert ended(queue, job).state == "done"
    assert attempts(home) == [1, 2, 3, 4, 5, 6]


def test_attempts_that_get_further_for_ever_end_at_the_cap(queue: Queue, home: Path) -> None:
    job = submit(queue, "progress")
    work(queue, home, max_attempts=3)
    assert ended(queue, job).state == "failed"
    assert ended(queue, job).reason.startswith("3 attempts did not end it; submitted again, it goes on: ")
    assert attempts(home) == [1, 2, 3]


def test_a_tracker_s_new_file_is_no_progress(queue: Queue, home: Path) -> None:
    job = submit(queue, "tracked")
    work(queue, home, attempts=2)
    assert "2 attempts in a row came to nothing" in ended(queue, job).reason
    assert len(attempts(home)) <= 3


def test_a_job_that_was_cancelled_as_its_worker_died_is_not_started(queue: Queue, home: Path) -> None:
    job = submit(queue, "fine")
    queue.claim("nobody", 0.0)
    queue.cancel(job.id)
    work(queue, home)
    status = ended(queue, job)
    assert (status.state, status.is_cancelling) == ("cancelled", False)
    assert not (home / "runs" / "run" / "attempts.txt").exists()


def test_a_worker_that_fails_leaves_no_process_behind(queue: Queue, home: Path, monkeypatch) -> None:
    job = submit(queue, "deaf")

    def renew(*_: object) -> None:
        wait_for((home / "runs" / "run" / "started").exists)
        raise MachineError("another process holds the index")

    monkeypatch.setattr(queue, "renew", renew)
    with pytest.raises(MachineError, match="holds the index"):
        work(queue, home, lease=1.0)
    assert not processes_of(job.id, range(9))


def test_a_job_that_kills_its_worker_fails_after_its_attempts(queue: Queue, home: Path) -> None:
    job = submit(queue, "kill_parent")
    for _ in range(8):
        if ended(queue, job).state == "failed":
            break
        worker = subprocess.Popen(
            [sys.executable, "-c", """
import os, sys
os.environ["WORKER_PID"] = str(os.getpid())
from pathlib import Path
from bridges.service.queue import Queue
from bridges.service.worker import WorkerConfig, work
config = WorkerConfig(lease=0.5, poll=0.1, attempts=2, launcher=(sys.executable,))
work(Queue(Path("runs")), Path("."), config, until_empty=True)
"""],
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        worker.wait(timeout=60)
        time.sleep(0.6)
    assert ended(queue, job).state == "failed"
    assert "took its worker with it" in ended(queue, job).reason


@pytest.mark.parametrize("launcher", [LAUNCH, PLAIN])
def test_a_cancelled_job_writes_its_checkpoint_first(queue: Queue, home: Path, launcher) -> None:
    job = submit(queue, "stop")
    worker = start_worker(home, launcher)
    wait_for((home / "runs" / "run" / "started").exists)
    queue.cancel(job.id)
    assert worker.wait(timeout=60) == 0
    assert (home / "runs" / "run" / "checkpoint").exists()
    assert (ended(queue, job).state, ended(queue, job).exit_code) == ("cancelled", 75)


def test_a_job_that_will_not_stop_is_killed_after_the_grace(queue: Queue, home: Path) -> None:
    job = submit(queue, "deaf")
    queue.claim("nobody", 0.0)
    worker = Worker(queue, home, WorkerConfig(poll=0.1, grace=0.5, launcher=(sys.executable,)))
    thread = threading.Thread(target=lambda: worker.run(until_empty=True))
    thread.start()
    wait_for((home / "runs" / "run" / "started").exists)
    queue.cancel(job.id)
    thread.join(timeout=60)
    assert ended(queue, job).state == "cancelled"


def test_a_stopped_worker_leaves_its_job_for_the_next_one(queue: Queue, home: Path) -> None:
    job = submit(queue, "stop")
    worker = start_worker(home)
    wait_for((home / "runs" / "run" / "started").exists)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=60) == 0
    assert ended(queue, job).state == "queued"
    assert (home / "runs" / "run" / "checkpoint").exists()
    work(queue, home)
    assert ended(queue, job).state == "done"
    assert attempts(home) == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stalls_loses_its_job_to_the_next(
    queue: Queue, home: Path, number: signal.Signals
) -> None:
    """Never two attempts at once: the next worker ends what is left of the first."""
    job = submit(queue, "stop")
    # With a launcher once: its child is in a session of its own, and must end, too.
    first = start_worker(home, LAUNCH if number == signal.SIGKILL else PLAIN)
    wait_for((home / "runs" / "run" / "started").exists)
    first.send_signal(number)
    (home / "runs" / "run" / "checkpoint").touch()  # the second attempt has something to go on from
    time.sleep(1.1)  # its lease is one second
    second = start_worker(home)
    assert second.wait(timeout=60) == 0
    assert ended(queue, job).state == "done"
    assert attempts(home) == [1, 2]
    if number == signal.SIGSTOP:  # awake again, it finds that the job is not its own
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=60) == 0
        assert ended(queue, job).state == "done"
        assert attempts(home) == [1, 2]
    first.wait(timeout=60)


def test_a_worker_that_cannot_start_is_tried_less_and_less_often(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(WorkerKeeper, "FIRST", 0.02)
    keeper = WorkerKeeper(tmp_path / "runs", tmp_path)
    keeper.command = ["/bin/sh", "-c", "echo started >> count; exit 4"]
    monkeypatch.chdir(tmp_path)
    keeper.start()
    time.sleep(1.0)
    keeper.stop()
    starts = len((tmp_path / "count").read_text().split())
    assert 2 <= starts <= 6  # after 0.04, 0.08, 0.16, ... seconds; not fifty times
    assert "the worker ended with code 4; it is started again in" in capfd.readouterr().err


def test_a_worker_of_an_earlier_server_goes_on_and_is_named(tmp_path: Path, capsys) -> None:
    lock = OneWorker(tmp_path)
    assert lock.take()
    keeper = WorkerKeeper(tmp_path, tmp_path)
    keeper.start()
    keeper.stop()
    assert f"`kill {os.getpid()}` ends it" in capsys.readouterr().err
    assert not OneWorker(tmp_path).take()


@pytest.mark.parametrize("where", ["/dev/full", "/nowhere/log.txt"])
def test_a_log_that_cannot_be_written_does_not_stop_its_job(where: str, tmp_path: Path) -> None:
    read, write = map(os.fdopen, os.pipe(), ("rb", "wb"))
    pump = LogPump(read, Path(where), tmp_path, Redactor({}))
    pump.start()
    # The bar's file cannot be written either: it is a folder.
    text = b"train: 10%|# | 1/10 [00:01<00:09]\n" + (b"x" * 99 + b"\n") * 2000
    said = threading.Thread(target=lambda: (write.write(text), write.close()))
    said.daemon = True
    said.start()
    pump.join(timeout=5)
    assert not pump.is_alive()
    assert pump.last_line == "x" * 99
    said.join(timeout=5)
    assert not said.is_alive()


def test_progress_bars_become_numbers() -> None:
    bar = (
        "train:  19%|█▉        | 752/4000 [01:07<22:14,  2.43it/s, ce=2.332, density=0.459, kl=0.267, "
        "tok_s=4582]"
    )
    found = parse_bar(bar)
    assert (found["what"], found["done"], found["total"], found["left"]) == ("train", 752, 4000, "22:14")
    assert found["values"] == {"ce": "2.332", "density": "0.459", "kl": "0.267", "tok_s": "4582"}
    assert parse_bar("Loading weights: 100%|##########| 52/52 [00:00<00:00, 31086.63it/s]")["total"] == 52
    assert parse_bar("one node of 100% | 3/4") is None
    assert json.dumps(found)
