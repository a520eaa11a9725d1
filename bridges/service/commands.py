"""The service's commands for a terminal: whatever a page can do, one of these does.

sparsebridge serve | link | submit | jobs | logs | cancel | runs | worker | gc | reindex | desk
"""

import argparse
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bridges.service.jobs import ENDED, RECIPES, JobFolder
from extractor.errors import InputError, MachineError

if TYPE_CHECKING:
    from bridges.service.queue import Queue

DAY = 86400.0
LOOK = 10.0  # seconds between two questions to an engine
MANY = 1_000_000  # run folders
WORKER = ("lease", "grace", "attempts", "max_attempts", "launcher")


def _queue(runs: Path) -> "Queue":
    """Raises InputError where there is no such folder: who only looks makes none."""
    from bridges.service.queue import Queue

    return Queue(_there(runs))


def _there(runs: Path) -> Path:
    """Raises InputError where there is no such folder."""
    if not runs.is_dir():
        raise InputError(f"no folder of runs at '{runs}'; give --runs, or submit a job")
    return runs


def serve(arguments: argparse.Namespace) -> int:
    from bridges.service.serve import serve as run

    return run(
        arguments.home,
        arguments.runs,
        host=arguments.host,
        port=arguments.port,
        token_file=arguments.token_file,
        new_token=arguments.new_token,
        allowed_hosts=arguments.allowed_host,
        has_worker=not arguments.no_worker,
        worker_words=[
            f"--{name}={getattr(arguments, name)}" for name in WORKER if getattr(arguments, name) is not None
        ],
    )


def link(arguments: argparse.Namespace) -> int:
    from bridges.service.link_command import link as run

    return run(arguments)


def submit(arguments: argparse.Namespace) -> int:
    from bridges.drawing import visible
    from bridges.service.follow import view
    from bridges.service.queue import Queue
    from bridges.service.submit import from_command_line

    words = arguments.arguments
    job = from_command_line(arguments.home, arguments.runs, arguments.recipe, words, arguments.key)
    if arguments.runner == "local" and arguments.dry_run:
        sys.stdout.write(f"{job.command}\n")
        return 0
    if arguments.runner == "local":
        queue = Queue(arguments.runs)
        job = queue.submit(job)
        sys.stdout.write(f"{job.id}\n")
        _tell(view(queue, *queue.get(job.id)).waits)
        return 0
    from bridges.service.runners import runner

    engine = runner(arguments.runner, arguments.runs, arguments.home, arguments.option)
    if arguments.dry_run:
        sys.stdout.write(engine.render(job))
    else:
        sys.stdout.write(f"{job.id} {visible(engine.submit(job))}\n")
    return 0


def jobs(arguments: argparse.Namespace) -> int:
    from bridges.service.follow import as_table, views
    from bridges.service.runners import handed_over

    queue, limit = _queue(arguments.runs), arguments.limit
    own = [(job, status) for _, job, status in queue.page(limit=limit + 1)]
    given = handed_over(arguments.runs, ask=True)
    shown = views(queue, own[:limit] + given[:limit])
    if max(len(own), len(given)) > limit:
        sys.stderr.write(f"the latest {limit} alone; --limit shows more\n")
    if arguments.json:
        sys.stdout.write(json.dumps([own.model_dump() for own in shown], indent=1) + "\n")
    else:
        sys.stdout.write(as_table(shown))
    return 0


def _tell(waits: str) -> None:
    """Beside what was asked for: why nothing will happen."""
    if waits:
        sys.stderr.write(f"queued jobs wait: {waits}\n")


def logs(arguments: argparse.Namespace) -> int:
    from bridges.service.follow import for_terminal, read_log, view
    from bridges.service.runners import asked, engine_of

    queue, offset, next_look = _queue(arguments.runs), 0, 0.0
    engine = engine_of(arguments.runs, Path(), arguments.job)
    job = queue.get(arguments.job)[0] if engine is None else engine[1]
    folder, is_over = JobFolder(arguments.runs, job.run, job.id), False
    if arguments.follow and engine is None:
        _tell(view(queue, *queue.get(job.id)).waits)
    while True:
        # First the state, then the log: what was written before the end is not missed.
        if engine is None:
            is_over = queue.get(job.id)[1].state in ENDED
        elif arguments.follow and time.monotonic() >= next_look:
            status = asked(*engine, folder.read()[1])
            is_over, next_look = status.state in ENDED, time.monotonic() + LOOK
        text, offset = read_log(folder, offset)
        sys.stdout.write(for_terminal(text))
        sys.stdout.flush()
        if not text and (not arguments.follow or is_over):
            return 0
        if not text:
            time.sleep(0.5)


def cancel(arguments: argparse.Namespace) -> int:
    from bridges.service.runners import engine_of

    queue = _queue(arguments.runs)
    if (engine := engine_of(arguments.runs, Path(), arguments.job)) is not None:
        engine[0].cancel(engine[1])
        sys.stdout.write(f"{engine[1].id}: {engine[0].poll(engine[1])[0]}\n")
        return 0
    status = queue.cancel(arguments.job)
    word = "it writes a checkpoint and stops" if status.is_cancelling else status.state
    sys.stdout.write(f"{arguments.job}: {word}\n")
    return 0


def runs(arguments: argparse.Namespace) -> int:
    from bridges.service import circuit_files, follow

    folder = _there(arguments.runs)
    if arguments.name is None:
        found = [follow.summary(path) for path in follow.run_page(folder, MANY)[0]]
        lines = [("run", "student", "circuits", "edits", "report")]
        for own in found:
            report = str(arguments.runs / own["run"] / "report.html") if own["has_report"] else "-"
            sizes = (str(len(own[name])) for name in ("circuits", "edits"))
            lines.append((own["run"], "yes" if own["has_student"] else "no", *sizes, report))
    elif not follow.is_folder(arguments.runs, arguments.name):
        raise InputError(f"run '{arguments.name}': there is none; `sparsebridge runs` lists them")
    else:
        found = circuit_files.rows(arguments.runs / arguments.name)
        lines = [("circuit", "nodes", "edges", "loss", "verdict")]
        for own in found:
            loss = f"{own['loss']:.3f}" if isinstance(own.get("loss"), int | float) else "-"
            word = own.get("damaged") or (own["verdict"] or {}).get("word", "not judged")
            lines.append((own["task"], str(own.get("nodes", "-")), str(own.get("edges", "-")), loss, word))
    sys.stdout.write(json.dumps(found, indent=1) + "\n" if arguments.json else follow.aligned(lines))
    return 0


def worker(arguments: argparse.Namespace) -> int:
    from bridges.service.queue import Queue
    from bridges.service.serve import OneWorker
    from bridges.service.worker import WorkerConfig, work

    settings = {name: getattr(arguments, name) for name in WORKER if getattr(arguments, name) is not None}
    if "launcher" in settings:
        settings["launcher"] = settings["launcher"].split()
    config = WorkerConfig(**settings)
    if arguments.handed_over:
        from bridges.service.handed_over import work_on

        return work_on(arguments.runs, arguments.home, arguments.handed_over, config)
    lock = OneWorker(arguments.runs)
    if not lock.take():
        raise MachineError(f"a worker works in '{arguments.runs}' already (process {lock.holder()})")
    work(Queue(arguments.runs), arguments.home, config, until_empty=arguments.until_empty)
    return 0


def gc(arguments: argparse.Namespace) -> int:
    """Job folders that ended long ago, and what a kill left half-written."""
    from bridges.service.runners import handed_over

    queue, oldest = _queue(arguments.runs), time.time() - arguments.days * DAY
    found = [(job, status) for _, job, status in queue.page(limit=1_000_000)]
    found += handed_over(arguments.runs, ask=False)
    queue.close()
    folders = [
        JobFolder(arguments.runs, job.run, job.id)
        for job, status in found
        if status.state in ENDED and (status.ended or job.created) < oldest
    ]
    gone = {folder.path: folder.remove for folder in folders}
    held = {job.run for job, status in found if status.state == "running"}
    for path in (*arguments.runs.glob("*/.tmp-*"), *arguments.runs.glob("*/jobs/.tmp-*")):
        if path.relative_to(arguments.runs).parts[0] not in held and path.stat().st_mtime < time.time() - DAY:
            gone[path] = partial(shutil.rmtree, path) if path.is_dir() else path.unlink
    code = 0
    for path, remove in gone.items():
        sys.stdout.write(f"{path}\n")
        if not arguments.dry_run:
            try:
                remove()
            except OSError as error:  # one that cannot be removed must not keep the others
                sys.stderr.write(f"left: {path} ({error.strerror})\n")
                code = MachineError.exit_code
    if gone and not arguments.dry_run:
        code = reindex(arguments) or code
    return code


def reindex(arguments: argparse.Namespace) -> int:
    from bridges.drawing import visible
    from bridges.service.queue import reindex as make_again

    count, damaged = make_again(arguments.runs)
    sys.stdout.write(f"{count} jobs\n")
    for line in damaged:
        sys.stderr.write(f"left out: {visible(line)}\n")
    return 3 if damaged else 0


def desk(arguments: argparse.Namespace) -> int:
    from bridges.service.desk_command import desk as run

    return run(arguments)


def add_commands(command) -> None:
    """Add the sub-commands; `command(name, run, text)` gives each one's parser."""
    serving = command(
        "serve", serve, "Open the pages on this machine: jobs with live losses, runs, reports, the desk; a "
        "worker beside it. Exit code 0, 2 where an address needs a token, 4 where the port is taken.",
    )  # fmt: skip
    serving.add_argument(
        "--host", default="127.0.0.1", help="address to bind to (127.0.0.1: this machine alone)"
    )
    serving.add_argument("--port", type=int, default=8765)
    serving.add_argument(
        "--token_file", type=Path, help="file with a token; any address but loopback needs one"
    )
    serving.add_argument("--new_token", action="store_true", help="first make a token in --token_file")
    serving.add_argument(
        "--allowed_host", action="append", default=[], metavar="NAME", help="a name to answer to"
    )
    serving.add_argument("--no_worker", action="store_true", help="jobs are left to a `sparsebridge worker`")

    linking = command(
        "link", link, "Ask a server for a further one-time link: for another browser, or when one ran out. "
        "It opens the pages once, within ten minutes. Exit code 0, 2 where it wants its token, 4 where none "
        "answers.",
    )  # fmt: skip
    linking.add_argument("--server", default="http://127.0.0.1:8765", help="its address (as `serve` has it)")
    linking.add_argument("--token_file", type=Path, help="file with its token; else SPARSEBRIDGE_TOKEN")

    submitting = command(
        "submit", submit, "Queue a recipe: `submit train --config recipes/python/train.yaml`. Its "
        "words are read by the recipe at once; it runs when a worker takes it. Exit code 0, 2 or 3 as the "
        "recipe says.",
    )  # fmt: skip
    submitting.add_argument("--key", help="idempotency key: the same again gives the same job")
    submitting.add_argument("--runner", choices=("local", "slurm", "skypilot"), default="local")
    submitting.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the runner"
    )
    submitting.add_argument("--dry_run", action="store_true", help="print what would be started or sent")
    submitting.add_argument("recipe", choices=RECIPES, metavar="RECIPE", help=", ".join(RECIPES))
    submitting.add_argument("arguments", nargs=argparse.REMAINDER, help="as after recipes/RECIPE.py")

    listing = command("jobs", jobs, "List jobs: newest first, with progress. Exit code 0, or 3.")
    listing.add_argument("--limit", type=int, default=50)
    listing.add_argument("--json", action="store_true", help="print JSON instead of text")
    reading = command(
        "logs",
        logs,
        "Print a job's log: so far, or to its end. Exit code 0, or 3 for a job that there is none of.",
    )
    reading.add_argument("job")
    reading.add_argument("-f", "--follow", action="store_true", help="until the job has ended")
    cancelling = command(
        "cancel", cancel, "Cancel a job: training writes a checkpoint first. Exit code 0, or 3."
    )
    cancelling.add_argument("job")
    looking = command(
        "runs", runs, "List run folders: what each holds; or one's circuits and verdicts. Exit code 0, or 3."
    )
    looking.add_argument("name", nargs="?", metavar="RUN", help="of a run folder")
    looking.add_argument("--json", action="store_true", help="print JSON instead of text")
    working = command(
        "worker", worker, "Run queued jobs: one at a time, until stopped; the job then writes a checkpoint, "
        "and is queued again. Exit code 0, or 4 where a worker works here already.",
    )  # fmt: skip
    working.add_argument("--handed_over", metavar="RUN/JOB", help="only this job, which an engine started")
    working.add_argument("--until_empty", action="store_true", help="end when no job is left")
    cleaning = command(
        "gc",
        gc,
        "Remove old job files: of jobs that ended long ago; runs stay. Exit code "
        "0, or 4 where some cannot be removed.",
    )
    cleaning.add_argument("--days", type=float, default=30.0)
    cleaning.add_argument("--dry_run", action="store_true", help="print what would go")
    again = command("reindex", reindex, "Make the index of jobs again: from the run folders. Exit code 0, or "
                    "3 where a job's files are damaged.")  # fmt: skip
    asking = command(
        "desk", desk, "Change a circuit's nodes in both models: what the page's desk does. Without --task it "
        "lists what can be changed. Exit code 0, 2, or 3 where the run is not finished or an adapter does "
        "not meet the limits.",
    )  # fmt: skip
    _add_desk(asking)
    for parser in (serving, submitting, listing, reading, cancelling, looking, working, cleaning, again):
        parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders (runs)")
    for parser in (serving, working):
        parser.add_argument("--lease", type=float, help="seconds without a sign of life, then a job is lost")
        parser.add_argument("--grace", type=float, help="seconds that a job has for its checkpoint")
        parser.add_argument(
            "--attempts", type=int, help="in a row without anything new, then a job has failed"
        )
        parser.add_argument(
            "--max_attempts", type=int, help="at all (1000), then a job has failed however far it came"
        )
        parser.add_argument("--launcher", help='e.g. "accelerate launch --num_processes 2"')
    for parser in (serving, submitting, working):
        parser.add_argument("--home", type=Path, default=Path(), help="where recipes/ lies (here)")


def _add_desk(asking: argparse.ArgumentParser) -> None:
    asking.add_argument("run_folder", type=Path, metavar="RUN", help="run folder, with circuits")
    asking.add_argument("--task", help="whose circuit")
    asking.add_argument("--nodes", nargs="+", metavar="NODE", help="the edit's, or the first of the circuit")
    asking.add_argument("--kind", choices=("patch", "mean", "zero", "steer"), help="what nodes change to")
    asking.add_argument("--positions", choices=("all", "last", "from_last"))
    asking.add_argument("--strength", type=float, help="the edit's best, or 1")
    asking.add_argument("--prompt", help="the task's example")
    asking.add_argument("--counterfactual", help="prompt that a patch takes its values from")
    asking.add_argument("--value", type=float, help="what steer adds")
    asking.add_argument("--top", type=int, help="most likely tokens in the JSON")
    asking.add_argument("--continuation", type=int, metavar="TOKENS")
    asking.add_argument(
        "--off_target", action="store_true", help="also the effect on other text; takes seconds"
    )
    keeping = asking.add_mutually_exclusive_group()
    keeping.add_argument("--save", metavar="NAME", help="keep the setting as interventions/NAME.json")
    keeping.add_argument("--export", metavar="NAME", help="export it as the PEFT adapter adapters/NAME")
    asking.add_argument("--force", action="store_true", help="also an adapter that does not meet the limits")
    asking.add_argument("--json", action="store_true", help="print JSON instead of text")
