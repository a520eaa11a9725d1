"""Configs: frozen pydantic models <- defaults < YAML < dotted command-line overrides.

A recipe is started as `recipes/<verb>.py --config x.yaml --some.key value` (or `--some.key=value`).
Unknown keys are errors that name the nearest right one. `--print_config` shows the resolved config
and exits; `--help` lists every key with its meaning and default. A config with a `shorthand` may be
written as one value: `dense: folder` in YAML and `--dense folder` both set `dense.path`.
"""

import contextlib
import difflib
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from extractor.errors import SparsebridgeError, UsageError


class Config(BaseModel):
    """Base of every config: unknown keys refused, values fixed once read, field docstrings kept."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )
    shorthand: ClassVar[str] = ""
    """The key that a single value in the place of this config stands for; empty: there is none."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, value: Any) -> Any:
        is_short = cls.shorthand and isinstance(value, (str, Path))
        return {cls.shorthand: str(value)} if is_short else value


C = TypeVar("C", bound=Config)


def run_recipe(main: Callable[[C], None], config_type: type[C], argv: Sequence[str] | None) -> None:
    """Read the config, run `main`, and turn a user's mistake into one line and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if "--help" in arguments or "-h" in arguments:
            sys.stdout.write(f"{(sys.modules[main.__module__].__doc__ or '').strip()}\n\n")
            sys.stdout.write("\n".join(describe(config_type)) + "\n")
            return
        print_config = "--print_config" in arguments
        config = load_config(config_type, [a for a in arguments if a != "--print_config"])
        if print_config:
            sys.stdout.write(dump_config(config))
            return
        main(config)
    except SparsebridgeError as error:
        sys.stdout.flush()
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.stderr.flush()
        _leave_outcome(error.exit_code, str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run the same command again to resume\n")
        _leave_outcome(130, "interrupted")
        sys.exit(130)


def _leave_outcome(exit_code: int, error: str) -> None:
    """For who started the launcher (`bridges.service.worker`): launchers keep their script's exit code and
    last words to themselves."""
    if path := os.environ.get("SPARSEBRIDGE_OUTCOME"):
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"exit_code": exit_code, "error": error}), encoding="utf-8")


def load_config(config_type: type[C], argv: Sequence[str]) -> C:
    """Resolve defaults < YAML (`--config`) < dotted overrides into one validated config.

    Raises:
        UsageError: unreadable YAML, an unknown key, or a value of the wrong type or range.
    """
    overrides = _pair_up(argv, switches=_switches(config_type))
    values: dict[str, Any] = {}
    origin = "command line"
    if config_path := overrides.pop("config", None):
        values, origin = read_yaml(Path(config_path)), config_path
    _spell_out_shorthands(config_type, values)
    for dotted, text in overrides.items():
        _set_dotted(values, _full_key(config_type, dotted), _parse_value(dotted, text))
    _refuse_unknown_keys(config_type, values, prefix="", origin=origin)
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{key}: got {first['input']!r}; {first['msg']} ({origin})") from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML; reading it back gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe(config_type: type[Config], prefix: str = "", *, optional: bool = False) -> list[str]:
    """One line per key: name, default, meaning. The keys of an `optional` config may all be left out."""
    lines = []
    for name, field in config_type.model_fields.items():
        nested = _as_config(field.annotation)
        if nested is not None:
            lines += describe(nested, f"{prefix}{name}.", optional=not field.is_required())
            continue
        missing = "none" if optional else "required"
        default = missing if field.is_required() else f"default {field.default!s}"
        meaning = " ".join((field.description or "").split())
        lines.append(f"  --{prefix}{name}  ({default})  {meaning}")
    return lines


def _pair_up(argv: Sequence[str], switches: set[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"unexpected argument {word!r}; options look like --some.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif key in switches:  # alone, it is turned on
                value = "true"
            else:
                raise UsageError(f"--{key} needs a value")
        pairs[key] = value
    return pairs


def _switches(config_type: type[Config], prefix: str = "") -> set[str]:
    """Dotted names of every true-or-false key."""
    found: set[str] = set()
    for name, field in config_type.model_fields.items():
        if (nested := _as_config(field.annotation)) is not None:
            found |= _switches(nested, f"{prefix}{name}.")
        elif field.annotation is bool:
            found.add(f"{prefix}{name}")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file; none, where it is empty.

    Raises:
        UsageError: no such file, not YAML, or something else at its top level.
    """
    if not path.is_file():
        raise UsageError(f"--config: no file at '{path}'")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML ({error})") from None
    if values is not None and not isinstance(values, dict):
        raise UsageError(f"{path}: the top level must be keys and values")
    return values or {}


def _parse_value(dotted: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--{dotted}: cannot read the value {text!r}") from None


def _set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"--{dotted}: '{parent}' is a single value, it has no keys below it")
    values[last] = value


def _spell_out_shorthands(config_type: type[Config], values: dict[str, Any]) -> None:
    """Give every config that YAML wrote as one string its key, so that overrides can add others."""
    for key, value in values.items():
        nested = _nested(config_type, key)
        if nested is not None and nested.shorthand and isinstance(value, str):
            values[key] = {nested.shorthand: value}
        elif nested is not None and isinstance(value, dict):
            _spell_out_shorthands(nested, value)


def _full_key(config_type: type[Config], dotted: str) -> str:
    """The key that a dotted override sets: `dense` stands for `dense.path`."""
    nested: type[Config] | None = config_type
    for part in dotted.split("."):
        nested = _nested(nested, part) if nested is not None else None
    return f"{dotted}.{nested.shorthand}" if nested is not None and nested.shorthand else dotted


def _nested(config_type: type[Config], key: Any) -> type[Config] | None:
    """The Config class below a key, if the key is known and holds one."""
    field = config_type.model_fields.get(key)
    return _as_config(field.annotation) if field is not None else None


def _refuse_unknown_keys(config_type: type[Config], values: dict[str, Any], prefix: str, origin: str) -> None:
    known = config_type.model_fields
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise UsageError(f"unknown key '{prefix}{key}' ({origin}); did you mean '{prefix}{near}'?")
        nested = _as_config(known[key].annotation)
        if nested is not None and isinstance(value, dict):
            _refuse_unknown_keys(nested, value, f"{prefix}{key}.", origin)


def _as_config(annotation: Any) -> type[Config] | None:
    """The Config class behind an annotation, also behind `X | None`."""
    candidates = (annotation,)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        candidates = typing.get_args(annotation)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None
