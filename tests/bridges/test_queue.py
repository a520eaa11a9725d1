"""The index of jobs: claims, leases, fences, the order within a run, and its making again from files."""

import errno
import json
import multiprocessing
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from bridges.cli import main
from bridges.service.follow import view
from bridges.service.jobs import Job, JobFolder
from bridges.service.queue import FILE, Queue, reindex
from extractor.errors import InputError, MachineError, UsageError

LONG = 60.0


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "runs")


def state_of(queue: Queue, job: Job) -> str:
    state = queue.get(job.id)[1].state
    _, in_file = JobFolder(queue.runs, job.run, job.id).read()
    assert in_file.state == state
    return state


def test_jobs_are_claimed_in_the_order_of_their_submission(queue: Queue) -> None:
    jobs = [queue.submit(Job.new(f"run{i}", "train")) for i in range(3)]
    claimed = [queue.claim("me", LONG).job.id for _ in jobs]
    assert claimed == [job.id for job in jobs]
    assert queue.claim("me", LONG) is None


def test_a_run_folder_is_worked_on_by_one_job_at_a_time_in_order(queue: Queue) -> None:
    train, extract = (queue.submit(Job.new("one", recipe)) for recipe in ("train", "extract"))
    other = queue.submit(Job.new("two", "train"))
    lease = queue.claim("a", LONG)
    assert lease.job == train
    assert queue.claim("b", LONG).job == other
    assert queue.claim("c", LONG) is None
    queue.write(lease, state="done")
    assert queue.claim("c", LONG).job == extract
    assert state_of(queue, train) == "done"


def test_a_lease_that_ran_out_is_taken_over_and_the_first_owner_is_fenced_off(queue: Queue) -> None:
    job = queue.submit(Job.new("run", "train"))
    first = queue.claim("first", 0.05)
    assert queue.claim("second", LONG) is None
    time.sleep(0.06)
    second = queue.claim("second", LONG)
    assert (second.job, second.attempt) == (job, 2)
    assert queue.renew(first, LONG) is None
    assert queue.write(first, state="done") is None
    assert state_of(queue, job) == "running"
    assert queue.renew(second, LONG).state == "running"
    assert queue.write(second, state="done").status.ended
    assert queue.write(second, state="failed") is None
    assert state_of(queue, job) == "done"


def test_another_host_s_lease_is_left_alone(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.submit(Job.new("run", "train"))
    queue.claim("here", 0.0)
    monkeypatch.setattr("bridges.service.queue.socket.gethostname", lambda: "elsewhere")
    assert queue.claim("there", LONG) is None


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_is_asked(queue: Queue) -> None:
    first, second = (queue.submit(Job.new(name, "train")) for name in ("a", "b"))
    lease = queue.claim("me", LONG)
    assert lease.job == first
    assert queue.cancel(second.id).state == "cancelled"
    assert queue.cancel(first.id).is_cancelling
    assert queue.renew(lease, LONG).is_cancelling
    queue.write(lease, state="cancelled")
    assert queue.cancel(first.id).state == "cancelled"
    assert [state_of(queue, job) for job in (first, second)] == ["cancelled", "cancelled"]
    assert queue.claim("me", LONG) is None


def test_the_same_key_is_the_same_job_also_when_the_index_was_lost(queue: Queue) -> None:
    job = queue.submit(Job.new("run", "train", ["--seed", "1"], "key"))
    assert queue.submit(Job.new("run", "train", ["--seed", "1"], "key")).id == job.id
    with pytest.raises(UsageError, match="another request"):
        queue.submit(Job.new("run", "train", ["--seed", "2"], "key"))
    assert queue.submit(Job.new("run", "train", ["--seed", "1"])).id != job.id
    queue.close()
    queue.path.unlink()
    again = Queue(queue.runs)
    assert again.submit(Job.new("run", "train", ["--seed", "1"], "key")).id == job.id
    assert again.count() == 2


def test_pages_of_a_long_list_hold_every_job_once(queue: Queue) -> None:
    jobs = [queue.submit(Job.new(f"run{i}", "train")) for i in range(25)]
    seen, before = [], None
    while page := queue.page(limit=10, before=before):
        seen += [job.id for _, job, _ in page]
        before = page[-1][0]
    assert seen == [job.id for job in reversed(jobs)]
    assert [job.run for _, job, _ in queue.page(run="run7")] == ["run7"]
    assert queue.page(states=("done",)) == []


def test_an_unknown_job_a_bad_name_and_a_bad_recipe_are_refused(queue: Queue) -> None:
    with pytest.raises(InputError, match="no such job"):
        queue.get("j" + "0" * 23)
    for run in ("", "..", "../x", "a/b", "/abs", ".hidden", "a\0b", "x" * 129):
        with pytest.raises(UsageError, match="a name of letters"):
            Job.new(run, "train")
    with pytest.raises(UsageError, match="one of quickstart"):
        Job.new("run", "rm")


def replace_by_a_file(run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    run.write_text("no folder")


def test_a_job_whose_folder_cannot_be_written_fails_and_the_next_is_claimed(queue: Queue) -> None:
    bad, good, waiting = (queue.submit(Job.new(name, "train")) for name in ("bad", "good", "waiting"))
    for run in ("bad", "waiting"):
        replace_by_a_file(queue.runs / run)
    assert queue.cancel(waiting.id).state == "cancelled"
    lease = queue.claim("me", LONG)
    assert lease.job == good
    status = queue.get(bad.id)[1]
    assert (status.state, status.ended is None) == ("failed", False)
    assert status.reason.startswith("its run folder cannot be written (")
    replace_by_a_file(queue.runs / "good")
    assert queue.write(lease, state="done").status.ended
    assert queue.get(good.id)[1].state == "done"
    assert queue.claim("me", LONG) is None


def test_a_full_disk_is_no_job_s_fault(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    job = queue.submit(Job.new("run", "train"))
    with monkeypatch.context() as patch:
        patch.setattr("bridges.service.jobs.write_json", full)
        with pytest.raises(MachineError, match="No space left"):
            queue.claim("me", LONG)
    assert queue.claim("me", LONG).job == job


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_asked_to_stop_is_not_queued_again(queue: Queue) -> None:
    """Its process ended before its worker saw the flag."""
    job = queue.submit(Job.new("run", "train"))
    lease = queue.claim("me", LONG)
    queue.cancel(job.id)
    queue.write(lease, state="queued", reason="it ended with code 1")
    for _ in range(2):
        status = queue.cancel(job.id)
        assert (status.state, status.is_cancelling) == ("cancelled", False)
    assert status.reason == "it ended with code 1"
    assert JobFolder(queue.runs, "run", job.id).read()[1] == status


def test_a_worker_that_is_gone_is_named_and_reindex_queues_its_job_again(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    job = queue.submit(Job.new("run", "train"))
    with monkeypatch.context() as patch:
        patch.setattr("bridges.service.queue.socket.gethostname", lambda: "old-name")
        queue.claim("me", -50)  # as if its lease had run out 50 seconds ago
        assert view(queue, *queue.get(job.id)).waits == ""
        monkeypatch.setattr("bridges.service.queue.SILENCE", 40)
    told = "its worker (on old-name) is gone: start `sparsebridge worker` there, or `sparsebridge reindex`"
    assert told in view(queue, *queue.get(job.id)).waits
    main(["jobs", "--runs", str(queue.runs)])
    assert told in capsys.readouterr().out
    assert queue.claim("me", LONG) is None
    assert reindex(queue.runs) == (1, [])
    assert queue.claim("me", LONG).attempt == 2


def test_only_a_job_that_runs_has_time_left(queue: Queue) -> None:
    job = queue.submit(Job.new("run", "train"))
    lease = queue.claim("me", LONG)
    bar = {"what": "train", "done": 1, "total": 9, "elapsed": "00:01", "left": "00:08", "values": {}}
    JobFolder(queue.runs, "run", job.id).progress.write_text(json.dumps(bar))
    assert view(queue, *queue.get(job.id)).progress.left == "00:08"
    queue.write(lease, state="failed")
    assert view(queue, *queue.get(job.id)).progress.model_dump() == bar | {"left": ""}


def test_a_list_that_is_cut_says_so(queue: Queue, capsys: pytest.CaptureFixture) -> None:
    jobs = [queue.submit(Job.new(f"run{i}", "train")) for i in range(3)]
    main(["jobs", "--runs", str(queue.runs), "--limit", "2"])
    shown, told = capsys.readouterr()
    assert [job.id in shown for job in jobs] == [False, True, True]
    assert told == "the latest 2 alone; --limit shows more\n"
    main(["jobs", "--runs", str(queue.runs), "--limit", "3"])
    assert capsys.readouterr().err == ""


# --- files are the truth ---------------------------------------------------------------------------------


def everything(queue: Queue) -> list[tuple]:
    return [(job, status) for _, job, status in queue.page(limit=1000)]


def test_an_index_that_is_gone_or_damaged_is_made_again_from_the_files(queue: Queue) -> None:
    jobs = [queue.submit(Job.new(f"run{i}", "train", ["--seed", str(i)])) for i in range(4)]
    queue.write(queue.claim("me", LONG), state="done", exit_code=0)
    queue.write(queue.claim("me", LONG), state="failed", reason="it broke")
    queue.cancel(jobs[3].id)
    before = everything(queue)
    queue.close()
    for damage in (lambda: queue.path.unlink(), lambda: queue.path.write_bytes(b"no database" * 1000)):
        damage()
        for end in ("-wal", "-shm"):
            queue.path.with_name(FILE + end).unlink(missing_ok=True)
        assert reindex(queue.runs) == (4, [])
        again = Queue(queue.runs)
        assert everything(again) == before
        again.close()


def test_a_damaged_index_says_what_to_do(queue: Queue) -> None:
    queue.close()
    queue.path.write_bytes(b"no database" * 1000)
    with pytest.raises(MachineError, match="sparsebridge reindex"):
        Queue(queue.runs)


def test_a_damaged_job_is_named_and_the_others_are_kept(queue: Queue) -> None:
    jobs = [queue.submit(Job.new(f"run{i}", "train")) for i in range(3)]
    (JobFolder(queue.runs, "run1", jobs[1].id).path / "job.json").write_text("{")
    queue.close()
    queue.path.unlink()
    count, damaged = reindex(queue.runs)
    assert count == 2
    assert len(damaged) == 1
    assert jobs[1].id in damaged[0]


def test_what_was_running_when_the_index_was_lost_is_queued_again(queue: Queue) -> None:
    job = queue.submit(Job.new("run", "train"))
    lease = queue.claim("me", LONG)
    queue.path.rename(queue.path.with_name("lost"))
    again = Queue(queue.runs)
    assert again.get(job.id)[1].state == "queued"
    assert queue.renew(lease, LONG) is None  # the worker that held it sees that the index is another
    assert again.claim("other", LONG).attempt == 2


@pytest.mark.parametrize("ends", [("",), ("", "-wal", "-shm")])
def test_a_queue_that_is_open_follows_its_index(queue: Queue, ends: tuple[str, ...]) -> None:
    """A server's: what it queues after the index was removed, a new worker finds; nothing else is lost."""
    first = queue.submit(Job.new("a", "train"))
    for end in ends:
        queue.path.with_name(FILE + end).unlink()
    second = queue.submit(Job.new("b", "train"))
    worker = Queue(queue.runs)
    assert {worker.claim("me", LONG).job.id for _ in range(2)} == {first.id, second.id}
    assert queue.count() == 2
    assert [queue.get(job.id)[1].state for job in (first, second)] == ["running", "running"]
    worker.path.write_bytes(b"no database" * 1000)
    assert reindex(queue.runs) == (2, [])
    assert queue.submit(Job.new("c", "train")).id == Queue(queue.runs).page()[0][1].id


def test_an_index_that_another_process_holds_is_one_line_and_stays(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    job = queue.submit(Job.new("run", "train"))
    monkeypatch.setattr("bridges.service.queue.PATIENCE", 0.05)
    other = sqlite3.connect(queue.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    held = Queue(queue.runs)
    with pytest.raises(MachineError, match="another process holds the index"):
        held.cancel(job.id)
    assert held.get(job.id)[0] == job
    with pytest.raises(SystemExit) as told:
        main(["cancel", job.id, "--runs", str(queue.runs)])
    assert told.value.code == 4
    said = capsys.readouterr().err
    assert said.startswith("error: another process holds")
    assert said.count("\n") == 1
    with pytest.raises(MachineError, match="try again"):
        reindex(queue.runs)
    assert queue.is_current  # held is not damaged
    other.execute("ROLLBACK")
    assert held.cancel(job.id).state == "cancelled"


def test_reindex_leaves_a_held_job_with_its_worker(queue: Queue) -> None:
    queue.submit(Job.new("run", "train"))
    lease = queue.claim("me", LONG)
    assert reindex(queue.runs) == (1, [])
    assert queue.renew(lease, LONG).state == "running"


def test_a_done_job_is_there_while_the_index_is_made_again(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks in between finds it, and its key starts nothing."""
    job = queue.submit(Job.new("run", "train", (), "key"))
    queue.write(queue.claim("me", LONG), state="done")
    other, seen = Queue(queue.runs), []
    read = JobFolder.read
    monkeypatch.setattr(JobFolder, "read", lambda own: seen.append(other.get(job.id)[1].state) or read(own))
    assert reindex(queue.runs) == (1, [])
    assert seen == ["done"]


def test_an_end_that_no_file_could_take_is_kept_when_the_index_is_made_again(queue: Queue) -> None:
    job = queue.submit(Job.new("run", "train"))
    (JobFolder(queue.runs, "run", job.id).path / "state.json").mkdir()  # nothing can be put in its place
    assert queue.cancel(job.id).state == "cancelled"
    assert reindex(queue.runs) == (1, [])
    assert queue.get(job.id)[1].state == "cancelled"


# --- races -----------------------------------------------------------------------------------------------


def race(runs: Path, owner: str, barrier, found) -> None:
    queue = Queue(runs)
    barrier.wait()
    while (lease := queue.claim(owner, LONG)) is not None:
        found.put((lease.job.id, lease.attempt))
        queue.write(lease, state="done")
    found.put(None)


def fill(runs: Path, count: int) -> set[str]:
    """Queued jobs, written straight into the index: files for ten thousand would only take time."""
    queue = Queue(runs)
    jobs = [Job.new(f"run{i}", "train") for i in range(count)]
    rows = [(job.id, job.run, job.created) for job in jobs]
    with sqlite3.connect(runs / FILE) as db:
        db.executemany(
            "INSERT INTO jobs (id, run, recipe, arguments, created, state, attempt, fruitless, progress, "
            "is_cancelling, reason) VALUES (?, ?, 'train', '', ?, 'queued', 0, 0, '', 0, '')",
            rows,
        )
    queue.close()
    return {job.id for job in jobs}


@pytest.mark.parametrize(
    "count", [200, pytest.param(10_000, marks=pytest.mark.slow(reason="minutes of claims"))]
)
def test_no_two_workers_ever_hold_one_job(tmp_path: Path, count: int) -> None:
    """Four processes race for every job."""
    jobs = fill(tmp_path, count)
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(4), context.Queue()
    racers = [context.Process(target=race, args=(tmp_path, f"w{i}", barrier, found)) for i in range(4)]
    for racer in racers:
        racer.start()
    ended, claims = 0, []
    while ended < len(racers):
        claim = found.get(timeout=120)
        ended += claim is None
        claims += [claim] if claim else []
    for racer in racers:
        racer.join()
    assert len(claims) == count
    assert {job for job, _ in claims} == jobs
    assert {attempt for _, attempt in claims} == {1}
