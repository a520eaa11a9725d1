"""Old jobs' files: removed whatever lies there, and never so that a job comes back."""

import os
import shutil
from pathlib import Path

import pytest

from bridges.cli import main
from bridges.service.jobs import Job, JobFolder
from bridges.service.queue import Queue, reindex


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "runs")


def gc(queue: Queue) -> None:
    main(["gc", "--days", "-1", "--runs", str(queue.runs)])


def test_gc_goes_on_where_a_folder_is_gone_already(queue: Queue) -> None:
    jobs = [queue.submit(Job.new(name, "train")) for name in ("gone", "file", "there")]
    for job in jobs:
        queue.cancel(job.id)
    shutil.rmtree(queue.runs / "gone")
    shutil.rmtree(queue.runs / "file")
    (queue.runs / "file").write_text("no folder")
    gc(queue)
    assert queue.count() == 0
    assert not JobFolder(queue.runs, "there", jobs[2].id).path.exists()


def test_a_job_whose_removal_was_broken_off_is_not_queued_again(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue.submit(Job.new("run", "train"))
    queue.cancel(job.id)

    def killed(path: Path, **_: object) -> None:
        if path.exists():
            (path / "state.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(SystemExit):
            gc(queue)
    assert reindex(queue.runs) == (0, [])
    (rest,) = (queue.runs / "run" / "jobs").iterdir()
    os.utime(rest, (0, 0))  # another day
    gc(queue)
    assert not rest.exists()


@pytest.mark.parametrize("words", [["jobs"], ["logs", "j"], ["cancel", "j"], ["gc"], ["reindex"]])
def test_who_only_looks_makes_no_folder(words: list[str], tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as told:
        main([*words, "--runs", str(tmp_path / "typo")])
    assert told.value.code == 3
    assert "no folder of runs at" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()
