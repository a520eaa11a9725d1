"""SIGKILL at random to server, worker and training: no job is lost, none runs twice at once, and the
weights are those of an undisturbed run."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from bridges.service.jobs import ENDED, Job
from bridges.service.processes import ATTEMPT, MARK
from bridges.service.queue import Queue
from tests.conftest import ROOT
from tests.recipes.test_recipes import TRAIN, metrics_of

pytest.importorskip("fastapi", reason="FastAPI is in the test extra")
KINDS = ["server", "worker", "training"]


def cli(*words: object) -> list[str]:
    return [sys.executable, "-m", "bridges.cli", *map(str, words)]


class Service:
    """`sparsebridge serve` with its worker, started again when it was killed, as a service manager would."""

    def __init__(self, runs: Path, words: Sequence[str] = ()):
        self.runs, self.words, self.server = runs, words, None
        self.environ = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.overlaps: list[str] = []
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> "Service":
        self.start()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._watcher.join()
        self.server.terminate()
        self.server.wait(timeout=120)
        left = [psutil.Process(pid) for pid in self.pids("worker")]  # of a server that was killed: it stays
        for worker in left:
            worker.terminate()
        psutil.wait_procs(left, timeout=120)

    def start(self) -> None:
        if self.server is None or self.server.poll() is not None:
            words = ("--port", "0", "--lease", "2", "--attempts", "100", "--runs", self.runs, *self.words)
            self.server = subprocess.Popen(cli("serve", *words), cwd=ROOT, env=self.environ)

    def pids(self, what: str) -> list[int]:
        if what == "server":
            return [self.server.pid] if self.server.poll() is None else []
        found = []
        for process in psutil.process_iter(["environ", "cmdline"]):
            words = process.info["cmdline"] or []
            is_job = MARK in (process.info["environ"] or {})
            if what == "training" and is_job and str(self.runs) in " ".join(words):
                found.append(process.pid)
            if what == "worker" and not is_job and "worker" in words and str(self.runs) in words:
                found.append(process.pid)
        return found

    def kill(self, what: str, chance: random.Random) -> bool:
        """SIGKILL to one process of a kind; False: there is none now."""
        pids = self.pids(what)
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(pids), signal.SIGKILL)
                return True
        return False

    def _watch(self) -> None:
        """Two attempts of a job must never live at once."""
        while not self._closing.wait(0.05):
            alive = defaultdict(set)
            for process in psutil.process_iter(["environ", "status"]):
                environ = process.info["environ"] or {}
                if MARK in environ and process.info["status"] != psutil.STATUS_ZOMBIE:
                    alive[environ[MARK]].add(environ[ATTEMPT])
            self.overlaps += [f"{job}: {sorted(own)}" for job, own in alive.items() if len(own) > 1]


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow(reason="minutes"))])
def test_no_job_is_lost_and_none_runs_twice(kills: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Three kills take one job without the seconds that `accelerate launch` needs; fifty take users' way."""
    few = kills < len(KINDS) + 1
    runs, chance = tmp_path / "runs", random.Random(kills)
    words = ["--dense.path", str(tiny_checkpoint), *TRAIN, "--max_steps", "20" if few else "40"]
    undisturbed = tmp_path / "undisturbed"
    alone = subprocess.Popen(
        [sys.executable, "recipes/train.py", *words, "--run", str(undisturbed)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    queue, hit, jobs = Queue(runs), defaultdict(int), []

    def submit() -> None:
        run = f"run{len(jobs)}"
        jobs.append(queue.submit(Job.new(run, "train", [*words, "--run", str(runs / run)])).id)

    def are_ended() -> bool:
        assert time.monotonic() < deadline, [queue.get(job) for job in jobs]
        return {queue.get(job)[1].state for job in jobs} <= set(ENDED)

    for _ in range(1 if few else 2):
        submit()
    with Service(runs, [f"--launcher={sys.executable}"] if few else []) as service:
        deadline = time.monotonic() + 60 * kills + 300
        # As many of each kind, in any order; a job more where all end before the last kill.
        for what in chance.sample(KINDS * -(-kills // len(KINDS)), kills):
            time.sleep(chance.uniform(0.1, 2 if few else 8))
            while not service.kill(what, chance):
                if are_ended():
                    submit()
                service.start()
                time.sleep(0.1)
            hit[what] += 1
        while not are_ended():
            service.start()
            time.sleep(0.2)
    assert alone.wait(timeout=300) == 0
    assert {queue.get(job)[1].state for job in jobs} == {"done"}, [queue.get(job) for job in jobs]
    assert service.overlaps == []
    assert sum(hit.values()) == kills
    assert set(hit) == set(KINDS)
    sys.stdout.write(json.dumps({"kills": hit, "attempts": [queue.get(job)[1].attempt for job in jobs]}))
    for own in sorted(runs.glob("run*")):
        assert metrics_of(own) == metrics_of(undisturbed)
        for name in ("student/model.safetensors", "bridges/bridges.safetensors"):
            expected, found = load_file(undisturbed / name), load_file(own / name)
            assert all(torch.equal(expected[key], found[key]) for key in expected), name
