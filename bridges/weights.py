"""Stored weights: whether they are the ones that the config describes, and finite."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from extractor.errors import InputError

NUM_LISTED = 5  # of a list of tensors, in an error of one line

Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]  # tensor, shape in the file, shape by the config


def check_keys(name: str, info: dict[str, Any], model: nn.Module, files: list[Path]) -> None:
    """Refuse weights that do not fit the config, tensor by tensor.

    Raises:
        InputError: with the first tensors that are missing, unexpected or of another shape.
    """
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    stored = {key: shape for file in files for key, shape in _stored_shapes(file)}
    problems = {
        "missing keys": [f"{key} {own.get(key, '')}".strip() for key in sorted(info["missing_keys"])],
        "unexpected keys": [
            f"{key} {stored.get(key, '')}".strip() for key in sorted(info["unexpected_keys"])
        ],
        "shapes that differ": [
            f"{key} {tuple(found)} in the file, {tuple(wanted)} by the config"
            for key, found, wanted in sorted(info["mismatched_keys"], key=lambda row: str(row[0]))
        ],
    }
    for problem, found in problems.items():
        if found:
            raise InputError(
                f"'{name}': {len(found)} {problem}: {'; '.join(found[:NUM_LISTED])}; these weights are not "
                "the ones that config.json describes"
            )


def check_finite(name: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises InputError naming the tensors with NaN or infinite values, and how many each has."""
    bad: dict[str, int] = {}
    for key, value in tensors:
        if value.is_floating_point() and (count := int((~value.float().isfinite()).sum())):
            bad[key] = count
    if bad:
        listed = ", ".join(f"{count} values of '{key}'" for key, count in list(bad.items())[:NUM_LISTED])
        raise InputError(f"'{name}': {listed} are NaN or infinite ({len(bad)} tensors in all)")


def _stored_shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                yield key, tuple(tensors.get_slice(key).get_shape())


def stored_tensors(files: list[Path], model: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they were stored, one at a time: quantising can hide a NaN.

    Pickled ones are taken from the model, which has them already.
    """
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    yield key, tensors.get_tensor(key)
        elif model is not None:
            yield from model.state_dict().items()
            return
