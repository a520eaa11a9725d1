"""Configs: precedence, nearest names, one-line errors and exit codes."""

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from extractor.config import Config, dump_config, load_config, run_recipe
from extractor.errors import InputError, UsageError


class Inner(Config):
    density: float = Field(0.5, gt=0, le=1)
    """Share kept."""
    shape: str = "linear"


class Place(Config):
    shorthand: ClassVar[str] = "path"
    path: str = "here"
    mode: str | None = None
    deep: bool = False


class Outer(Config):
    run: Path = Path("runs/x")
    """Where."""
    steps: int = Field(10, ge=1)
    rate: float = 1e-3
    tasks: tuple[str, ...] = ()
    inner: Inner = Inner()
    place: Place = Place()


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_then_yaml_then_command_line(tmp_path) -> None:
    path = write(tmp_path, "steps: 20\ninner:\n  density: 0.25\n  shape: cubic\n")
    config = load_config(Outer, ["--config", path, "--inner.density=0.125", "--run", "a/b"])
    assert config == Outer(run=Path("a/b"), steps=20, inner=Inner(density=0.125, shape="cubic"))


def test_dumped_config_reads_back_the_same(tmp_path) -> None:
    config = Outer(steps=3, rate=1e-5, tasks=("a", "b"))
    assert load_config(Outer, ["--config", write(tmp_path, dump_config(config))]) == config


@pytest.mark.parametrize("text", ["1e-4", "0.0001"])
def test_scientific_notation_is_a_number(text: str) -> None:
    assert load_config(Outer, ["--rate", text]).rate == 1e-4


@pytest.mark.parametrize(
    ("text", "argv", "place"),
    [
        ("place: there", [], Place(path="there")),
        ("place: there", ["--place.mode", "b"], Place(path="there", mode="b")),
        ("place: there", ["--place", "x"], Place(path="x")),
        ("place: {mode: b}", ["--place", "x"], Place(path="x", mode="b")),
        ("{}", ["--place", "x", "--place.deep", "true"], Place(path="x", deep=True)),
        ("{}", ["--place.deep", "true", "--place", "x"], Place(path="x", deep=True)),
    ],
)
def test_a_config_with_a_shorthand_may_be_one_value(
    tmp_path, text: str, argv: list[str], place: Place
) -> None:
    config = load_config(Outer, ["--config", write(tmp_path, text), *argv])
    assert config.place == place
    assert load_config(Outer, ["--config", write(tmp_path, dump_config(config))]) == config


def test_a_config_with_a_shorthand_may_be_one_value_in_code() -> None:
    assert Outer(place="there").place == Outer(place=Path("there")).place == Place(path="there")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepps", "3"], "unknown key 'stepps'.*did you mean 'steps'"),
        (["--inner.densty", "0.1"], "unknown key 'inner.densty'.*did you mean 'inner.density'"),
        (["--inner.density", "0"], "inner.density: got 0; Input should be greater than 0"),
        (["--inner.density", "1.5"], "inner.density: got 1.5"),
        (["--steps", "many"], "steps: got 'many'"),
        (["--steps.x", "1", "--steps", "2", "--steps.y", "1"], "it has no keys below it"),
        (["--place.pth", "x"], "unknown key 'place.pth'.*did you mean 'place.path'"),
        (["--place.path.x", "1"], "it has no keys below it|place.path: got"),
        (["--place", "[1]"], "place.path: got .1."),
        (["--steps"], "--steps needs a value"),
        (["steps"], "unexpected argument 'steps'"),
        (["--config", "/nowhere.yaml"], "no file at '/nowhere.yaml'"),
        (["--rate", "[1"], "cannot read the value"),
    ],
)
def test_mistakes_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(Outer, argv)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "stepps: 1", "inner: 3"])
def test_bad_yaml_is_refused(tmp_path, text: str) -> None:
    with pytest.raises(UsageError):
        load_config(Outer, ["--config", write(tmp_path, text)])


@pytest.mark.parametrize(("error", "code"), [(UsageError("a\nb"), 2), (InputError("no"), 3)])
def test_user_errors_end_in_one_line_and_a_code(error: ValueError, code: int, capsys) -> None:
    def main(config: Outer) -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_recipe(main, Outer, [])
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


def test_our_own_faults_keep_their_traceback() -> None:
    def main(config: Outer) -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        run_recipe(main, Outer, [])


def test_help_lists_every_key(capsys) -> None:
    run_recipe(lambda config: None, Outer, ["--help"])
    out = capsys.readouterr().out
    for key in ("--run", "--steps", "--inner.density", "--inner.shape"):
        assert key in out
    assert "Share kept." in out
