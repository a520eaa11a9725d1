"""The command `sparsebridge`: what an auditor does beside the recipes, which are started by their files.

    sparsebridge doctor | check | verify | replay | diff | sign | figures              (each with --help)
    sparsebridge serve | link | submit | jobs | logs | cancel | runs | worker | gc | reindex | desk
                                                                                        (bridges.service)

Every sub-command is imported when it is run: torch takes seconds, and `doctor` must run where torch does not.
"""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bridges.service.commands import add_commands

EXIT_CODES = """exit codes: 0 fine; 1 `diff` found other evidence; 2 wrong command line; 3 input refused;
4 this machine or installation; 6 `verify`: changed or not as signed; 7 `replay`: another verdict;
130 interrupted; 141 nobody reads the output"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sub-command; a user's mistake becomes one line on stderr and an exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 130
    except BrokenPipeError:  # the reader has closed (`| head`); nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except RecursionError:
        sys.stderr.write("error: a file is nested too deeply to be read\n")
        code = 3
    except ValueError as error:
        from bridges.findings import one_line
        from extractor.errors import SparsebridgeError

        if not isinstance(error, SparsebridgeError):
            raise
        sys.stdout.flush()
        sys.stderr.write(one_line(f"error: {' '.join(str(error).split())}"))
        code = error.exit_code
    if code:
        sys.exit(code)


# --- sub-commands ------------------------------------------------------------------------------------------


def _doctor(arguments: argparse.Namespace) -> int:
    from bridges.doctor import doctor

    return doctor(as_json=arguments.json)


def _check(arguments: argparse.Namespace) -> int:
    from bridges.check_model import check

    return check(arguments.model, arguments.revision, as_json=arguments.json)


def _verify(arguments: argparse.Namespace) -> int:
    from bridges.verify import verify

    return verify(arguments.report, arguments.artifacts, arguments.key)


def _replay(arguments: argparse.Namespace) -> int:
    from bridges.replay import replay

    return replay(arguments.report, arguments.run_folder, arguments.dense, arguments.sample)


def _diff(arguments: argparse.Namespace) -> int:
    from bridges.diff_reports import diff

    return diff(arguments.a, arguments.b, as_json=arguments.json, show_all=arguments.all)


def _figures(arguments: argparse.Namespace) -> int:
    from bridges.figures import write_figures
    from extractor.errors import InputError

    if not arguments.run_folder.is_dir():
        raise InputError(f"run '{arguments.run_folder}' is no folder; it should be one that recipes wrote")
    written = write_figures(arguments.run_folder)
    sys.stdout.write("".join(f"{path}\n" for path in written) or "nothing was drawn\n")
    return 0


def _sign(arguments: argparse.Namespace) -> int:
    from bridges.attestation import envelope_path, sign
    from bridges.dsse import new_key

    envelope_path(arguments.report)  # no key is made for a report that is not there
    if arguments.new_key:
        public = new_key(arguments.new_key)
        sys.stdout.write(f"private key: {arguments.new_key}\npublic key: {public}\n")
    sys.stdout.write(f"signed: {sign(arguments.report, arguments.new_key or arguments.key)}\n")
    return 0


# --- the command line --------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sparsebridge",
        description="Check a machine, a checkpoint or a report; compare, sign, draw; run recipes as jobs.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        summary = text.partition(":")[0]
        added = commands.add_parser(name, help=summary, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    doctor = command(
        "doctor",
        _doctor,
        "Look at this machine and installation: versions against the floors below which known holes are "
        "open, accelerator, CPU, optional packages, disk, memory, caches, the shipped checkpoint. Exit code "
        "0, or 4 where something must be put right.",
    )
    check = command(
        "check",
        _check,
        "Look at a dense checkpoint before it is used: no code of it runs and no model is made of its "
        "weights. Config, formats, SHA-256, tensors against the config, NaN, tokenizer, licence, memory. "
        "Exit code 0, or 3 where the recipes would refuse it; every fault is named.",
    )
    check.add_argument("model", help="a Hugging Face model folder, or a hub id org/name")
    check.add_argument("--revision", help="branch, tag or commit of a hub id")
    verify = command(
        "verify",
        _verify,
        "Tell a changed report from an unchanged one: schema, every figure drawn again from the record, "
        "hashes of the files it rests on, signature; each check is printed. Exit code 0, or 6 where "
        "one fails.",
    )
    _add_report(verify)
    verify.add_argument(
        "--artifacts", type=Path, metavar="DIR", help="the run folder, if not the report's own"
    )
    verify.add_argument("--key", type=Path, help="public key (PEM, Ed25519) that must have signed the report")
    replay = command(
        "replay",
        _replay,
        "Measure a report's claims again: on the named weights, within the tolerance that the report states. "
        "Exit code 0, or 7 where a verdict differs.",
    )
    _add_report(replay)
    replay.add_argument(
        "--run", dest="run_folder", type=Path, metavar="DIR", help="the run folder, if not the report's own"
    )
    replay.add_argument("--dense", help="the dense checkpoint, if not where the report says")
    replay.add_argument("--sample", type=_count, metavar="N", help="only N claims, drawn by a fixed seed")
    diff = command(
        "diff",
        _diff,
        "Compare two reports: verdicts, criteria, models, hashes, settings, circuits, edits, every number "
        "side by side. When, where and in which folder a run was made is shown, but is no difference of "
        "evidence. Exit code 0 where the evidence is the same, 1 where it differs.",
    )
    diff.add_argument("a", type=Path, metavar="A", help="report.json, report.html, or a run folder")
    diff.add_argument("b", type=Path, metavar="B", help="the other one")
    diff.add_argument("--all", action="store_true", help="print every difference, however many there are")
    for machine_readable in (doctor, check, diff):
        machine_readable.add_argument("--json", action="store_true", help="print JSON instead of text")
    figures = command(
        "figures",
        _figures,
        "Draw the paper's figures of a run: steering curves, orders of edges, inverse pruning and token "
        "losses, as far as the run has the numbers. Needs the extra `plot`. Exit code 0.",
    )
    figures.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder")
    add_commands(command)
    sign = command(
        "sign",
        _sign,
        "Sign a report: an in-toto statement about the page, its record and the run's files, in a DSSE "
        "envelope (NAME.intoto.dsse.json beside the report), with an Ed25519 key. Needs the extra `sign`.",
    )
    _add_report(sign)
    keys = sign.add_mutually_exclusive_group(required=True)
    keys.add_argument("--key", type=Path, help="private key (PEM, not encrypted)")
    keys.add_argument("--new_key", type=Path, metavar="PATH", help="first make a key pair: PATH and PATH.pub")
    return parser


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", type=Path, help="report.html, report.json, or a run folder")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count of at least 1")
    return int(text)


def _version() -> str:
    try:
        return importlib.metadata.version("sparsebridge")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    main()
