"""The command line itself: help, mistakes, exit codes, a quick start."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from bridges.cli import main
from tests.conftest import ROOT

COMMANDS = (
    *("doctor", "check", "verify", "replay", "diff", "sign", "figures"),
    *("serve", "link", "submit", "jobs", "logs", "cancel", "worker", "gc", "reindex"),
)


def exit_code(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_and_how_it_ends(command: str, capsys) -> None:
    assert exit_code(command, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"usage: sparsebridge {command}" in text
    assert command == "sign" or "Exit code 0" in text


def test_the_first_help_names_every_command_and_exit_code(capsys) -> None:
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in text
    for code in ("0 fine", "2 wrong", "3 input", "4 this machine", "6 `verify`", "7 `replay`", "130", "141"):
        assert code in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("chek", "x"), "invalid choice: 'chek'"),
        (("check",), "required: model"),
        (("check", "x", "--rev", "main"), "unrecognized arguments: --rev"),
        (("replay", "r.html", "--sample", "0"), "'0' is not a count of at least 1"),
        (("replay", "r.html", "--sample", "-1"), "--sample"),
        (("diff", "a"), "required: B"),
        (("sign", "r.html"), "one of the arguments --key --new_key is required"),
        (("sign", "r.html", "--key", "a", "--new_key", "b"), "not allowed with argument"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(arguments, message: str, capsys) -> None:
    assert exit_code(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "no/such/folder/\x1b[2Jhere\u202e"),
        ("diff", "nothing\nhere.json", "b.json"),
        ("sign", "absent.html", "--key", "absent.pem"),
    ],
)
def test_refused_input_is_one_plain_line_and_code_3(arguments, capsys) -> None:
    assert exit_code(*arguments) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.err.rstrip("\n").isprintable()


@pytest.mark.parametrize("depth", [100, 850, 900, 950, 100_000])
def test_deep_nesting_is_compared_or_refused_and_not_a_traceback(depth: int, tmp_path: Path, capsys) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for value, path in enumerate(paths):
        nested = '{"a":' * depth + str(value) + "}" * depth
        path.write_text(f'{{"schema_version": 1, "run": {nested}}}')
    code = exit_code("diff", *map(str, paths))
    shown = capsys.readouterr()
    if depth == 100:
        assert code == 1
    if depth == 100_000:
        assert code == 3
    assert code in (1, 3)
    assert code == 1 or "nested too deeply" in shown.err


def test_it_starts_without_torch() -> None:
    code = "import sys, bridges.cli, bridges.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_reader_that_closes_is_no_error(tmp_path: Path) -> None:
    """As in `sparsebridge ... | head -0`: the pipe's other end is gone before anything is written."""
    code = "import os, bridges.cli; os.write(2, b'go'); input(); bridges.cli.main(['doctor', '--json'])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # torch cannot be imported, so that `doctor` is quick
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not here')")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes) as process:
        assert process.stderr.read(2) == b"go"
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 141
    assert b"Traceback" not in errors
    assert b"BrokenPipe" not in errors


def test_the_version_is_the_installed_one(capsys) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.split() == ["sparsebridge", importlib.metadata.version("sparsebridge")]
