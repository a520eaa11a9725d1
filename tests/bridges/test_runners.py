"""Jobs handed to other engines: our side of the contract. No cluster is here: the engines' commands are small
programs that answer as the documentation says, and keep what they were given; the scripts they were given are
run for real."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bridges.cli import main
from bridges.service.jobs import Job, JobFolder, Status
from bridges.service.queue import Queue, reindex
from bridges.service.runners import SkyPilotRunner, SlurmRunner, handed_over, runner
from bridges.service.serve import OneWorker
from extractor.errors import InputError, MachineError, UsageError
from tests.conftest import ROOT

RECIPE = """
import json, os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--run") + 1])
if "--print_config" in sys.argv:
    print(f"run: {run}")
    sys.exit()
(run / "seen.json").write_text(json.dumps(sys.argv[1:]))
def stop(*_):
    (run / "checkpoint").touch()
    Path(os.environ["SPARSEBRIDGE_OUTCOME"]).write_text(json.dumps({"exit_code": 75, "error": "stopped"}))
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if "--slow" in sys.argv and not (run / "checkpoint").exists():
    (run / "started").touch()
    time.sleep(60)
print("the recipe's own words")
"""
ENGINE = """#!/bin/sh
echo "$(basename $0) $*" >> "$CALLS"
case "$(basename $0)" in
sbatch) cat > "$CALLS.script"; echo "4711;cluster" ;;
sacct) cat "$CALLS.state" ;;
sky) [ "$2" = queue ] && cat "$CALLS.state"; true ;;
esac
"""
HOSTILE = ["a b", "it's", "$(touch pwned)", "`touch pwned`", "; touch pwned", "*", '"', "\\"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "train.py").write_text(RECIPE)
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "sacct", "scancel", "scontrol", "sky"):
        (tmp_path / "bin" / name).write_text(ENGINE)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "calls.state").write_text("PENDING\n")
    return tmp_path


def job_of(*words: str) -> Job:
    return Job.new("mine", "train", ["--run", "runs/mine", *words])


def calls(home: Path) -> list[str]:
    return (home / "calls").read_text().splitlines() if (home / "calls").exists() else []


def run_script(home: Path, script: str) -> subprocess.Popen:
    (home / "script.sh").write_text(script)
    launcher = home / "bin" / "python-launcher"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    script = script.replace("--handed_over", f"--launcher {launcher} --handed_over")  # no torch: seconds less
    return subprocess.Popen(["bash", "-c", script], cwd="/", env={**os.environ, "SLURM_JOB_ID": "4711"})


@pytest.mark.parametrize("kind", [SlurmRunner, SkyPilotRunner])
def test_what_is_rendered_runs_the_job_with_its_own_words(kind, home: Path) -> None:
    job = job_of(*HOSTILE)
    engine = kind(home / "runs", home)
    engine.submit(job)
    script = engine.render(job)
    if kind is SkyPilotRunner:
        script = yaml.safe_load(script)["run"]
    assert run_script(home, script).wait(timeout=60) == 0
    assert engine.folder(job).read()[1].ended
    assert json.loads((home / "runs" / "mine" / "seen.json").read_text()) == list(job.arguments)
    assert not list(home.rglob("pwned"))
    assert engine.poll(job) == ("done", "")
    assert "the recipe's own words" in "".join(engine.logs(job))


def test_a_slurm_job_that_is_asked_to_stop_writes_a_checkpoint_and_is_queued_again(home: Path) -> None:
    job = job_of("--slow")
    engine = SlurmRunner(home / "runs", home)
    assert engine.submit(job) == "4711"
    process = run_script(home, (home / "calls.script").read_text())
    wait_for(home / "runs" / "mine" / "started")
    process.terminate()
    assert process.wait(timeout=60) == 75
    assert "scontrol requeue 4711" in calls(home)
    assert (home / "runs" / "mine" / "checkpoint").exists()
    assert run_script(home, engine.render(job)).wait(timeout=60) == 0
    assert engine.poll(job)[0] == "done"


def test_a_running_job_is_cancelled_by_a_mark_and_a_waiting_one_by_the_engine(home: Path) -> None:
    engine = SlurmRunner(home / "runs", home)
    running, waiting = job_of("--slow"), Job.new("other", "train", ["--run", "runs/other"])
    engine.submit(running)
    process = run_script(home, engine.render(running))
    wait_for(home / "runs" / "mine" / "started")
    (home / "calls.state").write_text("RUNNING\n")
    engine.cancel(running)
    assert process.wait(timeout=60) == 0
    assert engine.poll(running)[0] == "cancelled"
    assert (home / "runs" / "mine" / "checkpoint").exists()
    assert "scancel 4711" not in calls(home)
    (home / "calls.state").write_text("PENDING\n")
    engine.submit(waiting)
    engine.cancel(waiting)
    assert "scancel 4711" in calls(home)
    assert engine.poll(waiting)[0] == "cancelled"
    assert engine.folder(waiting).read()[1].ended


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("PENDING", "queued"), ("RUNNING", "running"), ("COMPLETED", "done"), ("PREEMPTED", "queued"),
        ("CANCELLED by 1000", "cancelled"), ("TIMEOUT", "failed"), ("OUT_OF_MEMORY", "failed"),
        ("", "queued"),
    ],
)  # fmt: skip
def test_slurm_s_states_are_ours(word: str, state: str, home: Path) -> None:
    job, engine = job_of(), SlurmRunner(home / "runs", home)
    engine.submit(job)
    (home / "calls.state").write_text(f"{word}\n")
    assert engine.poll(job)[0] == state


def test_skypilot_s_states_are_ours(home: Path) -> None:
    job, engine = job_of(), SkyPilotRunner(home / "runs", home)
    engine.submit(job)
    for word, state in (("RECOVERING", "queued"), ("RUNNING", "running"), ("FAILED_SETUP", "failed")):
        (home / "calls.state").write_text(f"ID TASK NAME STATUS\n1 - {job.id} 1x[H100:1] {word} -\n")
        assert engine.poll(job) == (state, word)


def test_a_job_is_handed_over_once_and_no_worker_here_takes_it(home: Path) -> None:
    job, engine = job_of(), SlurmRunner(home / "runs", home)
    assert engine.submit(job) == engine.submit(job)
    assert len([line for line in calls(home) if line.startswith("sbatch")]) == 1
    queue = Queue(home / "runs")
    queue.adopt()
    assert queue.claim("here", 60) is None
    with pytest.raises(InputError, match="handed to slurm"):
        SkyPilotRunner(home / "runs", home).submit(job)
    assert JobFolder(home / "runs", "mine", job.id).read()[0] == job


def test_one_key_is_run_at_one_place(home: Path) -> None:
    queue, engine = Queue(home / "runs"), SlurmRunner(home / "runs", home)
    here, there = (Job.new("mine", "train", ["--run", "runs/mine"], key) for key in ("here", "there"))
    queue.submit(here)
    with pytest.raises(UsageError, match=r"key 'here': its job is in this machine's queue; take a new one"):
        engine.submit(here)
    assert calls(home) == []
    engine.submit(there)
    with pytest.raises(UsageError, match=r"key 'there': another engine has its job; take a new one"):
        queue.submit(there)
    assert reindex(home / "runs") == (1, [])
    assert queue.claim("me", 60).job == here


def test_gc_removes_jobs_that_ended_elsewhere_and_asks_nobody(home: Path) -> None:
    engine = SlurmRunner(home / "runs", home)
    ended, waiting = job_of(), Job.new("other", "train", ["--run", "runs/other"])
    for job in (ended, waiting):
        engine.submit(job)
    engine.folder(ended).write_status(Status(state="done", ended=time.time()))
    before = calls(home)
    main(["gc", "--days", "-1", "--runs", str(home / "runs")])
    assert [job for job, _ in handed_over(home / "runs", ask=False)] == [waiting]
    assert not engine.folder(ended).path.exists()
    assert calls(home) == before


def test_a_job_that_is_cancelled_before_its_engine_starts_it_again_is_not_started(home: Path) -> None:
    job, engine = job_of(), SlurmRunner(home / "runs", home)
    engine.submit(job)
    engine.folder(job).cancel.touch()
    assert run_script(home, engine.render(job)).wait(timeout=60) == 0
    status = engine.folder(job).read()[1]
    assert (status.state, status.is_cancelling) == ("cancelled", False)
    assert not (home / "runs" / "mine" / "seen.json").exists()


def test_options_and_paths_that_would_break_out_of_a_line_are_refused(home: Path) -> None:
    for option in ("partition=a b", "partition=x\n#SBATCH --uid=0", "time=1;2", "memory=1X", "nonsense=1"):
        with pytest.raises(UsageError, match="option"):
            runner("slurm", home / "runs", home, [option])
    engine = runner("slurm", home / "runs", home, ["partition=gpu", "gpus=2"])
    assert "#SBATCH --partition=gpu\n" in engine.render(job_of())
    assert "#SBATCH --gpus=2\n" in engine.render(job_of())
    with pytest.raises(UsageError, match="Slurm takes letters"):
        SlurmRunner(home / "a b\n#SBATCH", home).render(job_of())
    sent = [line for line in engine.render(job_of("x\n#SBATCH --uid=0")).split("\n") if "uid" in line]
    assert all(not line.startswith("#SBATCH") for line in sent)


def test_an_engine_that_is_not_here_or_fails_is_one_line_and_leaves_no_job(home: Path, monkeypatch) -> None:
    (home / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    (home / "runs" / "other").mkdir(parents=True)
    job = job_of()
    with pytest.raises(MachineError, match="Invalid account"):
        SlurmRunner(home / "runs", home).submit(job)
    assert reindex(home / "runs") == (0, [])  # a refused job is not one for a worker here
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError, match="not on this machine: pip install"):
        SkyPilotRunner(home / "runs", home).submit(job)
    assert reindex(home / "runs") == (0, [])
    assert [path.name for path in (home / "runs").iterdir() if path.is_dir()] == ["other"]


@pytest.mark.parametrize("stop", ["killed", "no answer"])
def test_a_handover_that_was_broken_off_is_run_by_nobody_twice(home: Path, stop: str, monkeypatch) -> None:
    """The engine may have it: a worker here must not take it, nor is it handed over again."""
    job, engine = job_of(), SlurmRunner(home / "runs", home)
    if stop == "killed":
        monkeypatch.setattr(engine, "send", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    else:
        monkeypatch.setattr("bridges.service.runners.TIMEOUT", 0.05)
        (home / "bin" / "sbatch").write_text("#!/bin/sh\nexec sleep 5\n")
    with pytest.raises((KeyboardInterrupt, MachineError)):
        engine.submit(job)
    assert reindex(home / "runs") == (0, [])
    assert Queue(home / "runs").claim("here", 60) is None
    with pytest.raises(InputError, match="was broken off, so slurm may have it"):
        SlurmRunner(home / "runs", home).submit(job)
    ((_, status),) = handed_over(home / "runs", ask=True)
    assert status.state == "queued"
    assert "was broken off" in status.reason


def test_what_an_engine_ended_is_seen_in_lists_and_ends_a_followed_log(home: Path, capsys) -> None:
    """A job that Slurm killed says nothing itself."""
    job, runs = job_of(), ["--runs", str(home / "runs")]
    folder = JobFolder(home / "runs", "mine", job.id)
    SlurmRunner(home / "runs", home).submit(job)
    folder.write_status(Status(state="running", attempt=1))
    folder.log.write_text("step 1\n\x1b]0;owned\x07\x1b[2J\n")
    (home / "calls.state").write_text("TIMEOUT\n")
    main(["jobs", *runs])
    assert re.search(r"mine +train +failed +1 +slurm: TIMEOUT", capsys.readouterr().out)
    main(["logs", "-f", job.id, *runs])
    assert capsys.readouterr().out == "step 1\n[U+001B]]0;owned[U+0007][U+001B][2J\n"
    assert folder.read()[1].state == "running"  # the engine may queue it again
    (home / "calls.state").write_text("RUNNING\n")
    main(["jobs", "--json", *runs])
    assert json.loads(capsys.readouterr().out)[0]["state"] == "running"


def test_a_terminal_is_shown_no_control_characters(home: Path, capsys) -> None:
    """Whatever a recipe printed, or a job was refused with."""
    runs, hostile = ["--runs", str(home / "runs")], "\x1b]0;owned\x07\x9b2J\u202ered"
    job = Queue(home / "runs").submit(job_of())
    folder = JobFolder(home / "runs", "mine", job.id)
    folder.log.write_text(f"a\tb\n{hostile}\n")
    folder.write_status(Status(state="failed", reason=hostile))
    (home / "runs" / ".sparsebridge.sqlite").unlink()
    shown = "[U+001B]]0;owned[U+0007][U+009B]2J[U+202E]red"
    main(["logs", job.id, *runs])
    assert capsys.readouterr().out == f"a\tb\n{shown}\n"
    main(["jobs", *runs])
    assert shown in capsys.readouterr().out


def test_dry_run_prints_what_would_be_sent_and_sends_nothing(home: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(home)
    main(["submit", "--runner", "slurm", "--dry_run", "train", "--run", "runs/mine"])
    assert "#SBATCH --requeue" in capsys.readouterr().out
    assert calls(home) == []
    assert not (home / "runs" / "mine").exists()


def test_a_terminal_is_told_that_no_worker_runs(home: Path, monkeypatch, capsys) -> None:
    """As a page is; what scripts read stays as it was."""
    monkeypatch.chdir(home)
    main(["submit", "train", "--run", "runs/mine"])
    job, said = capsys.readouterr()
    assert said.startswith("queued jobs wait: no worker is running")
    main(["jobs"])
    listed = capsys.readouterr().out
    assert job.strip() in listed
    assert "no worker is running" in listed
    lock = OneWorker(home / "runs")
    assert lock.take()
    main(["jobs"])
    assert "no worker is running" not in capsys.readouterr().out
    lock._file.close()
    end = lambda _: Queue(home / "runs").cancel(job.strip())  # noqa: E731
    monkeypatch.setattr("bridges.service.commands.time.sleep", end)
    main(["logs", "-f", job.strip()])
    assert capsys.readouterr().err == said


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.05)
