"""What a training starts with: a student made of the dense model, or that of a finished run.

Going on from a run is how one gets from a good student to a sparser one without paying for the way there
again: student and bridges, their zeros too, are the finished run's, and density falls from theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from bridges.bridge import BridgeSet
from bridges.checkpoint import check_same_tokenizer
from bridges.dense import DenseModel
from bridges.run_models import check_hashes
from bridges.warm_start import StudentShape, make_student
from extractor.artifacts import read_json
from extractor.errors import InputError, UsageError
from extractor.rotation import RotationConfig
from extractor.sparsity import SparsityConfig
from extractor.student import Student, load_student


@dataclass(frozen=True)
class Start:
    """Student and bridges before the first step, and what is known of those of a finished run.

    `densities` (by parameter) are empty, `tokens` 0 and `facts` empty for a student made just now, all of
    whose matrices start dense.
    """

    student: Student
    bridges: BridgeSet
    densities: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


def make_start(
    dense: DenseModel,
    shape: StudentShape,
    rotation: RotationConfig,
    from_run: Path | None = None,
    show_progress: bool = False,
) -> Start:
    """`make_student`, or student and bridges of `from_run`.

    Raises:
        InputError: an unfinished run, or one of another dense model.
        UnsupportedModelError: a family, or an option of one, that no exact copy is known for.
    """
    if from_run is None:
        return Start(*make_student(dense, shape, rotation, show_progress))
    student, tokenizer = load_student(from_run / "student")
    check_same_tokenizer(tokenizer, str(from_run / "student"), dense.tokenizer, dense.name)
    bridges = BridgeSet.from_pretrained(from_run / "bridges")
    hashes = check_hashes(from_run, dense, circuits=())
    before = read_json(from_run / "evaluation.json", "evaluation", "recipes/train.py")["student"]
    facts = {
        "name": str(from_run),
        "student_sha256": hashes.student_sha256,
        "bridges_sha256": hashes.bridges_sha256,
        "density": before["density"],
        "train_tokens": before["train_tokens"],
    }
    return Start(student, bridges, _densities(student), before["train_tokens"], {"from_run": facts})


def shape_of(run: Path) -> StudentShape:
    """The student's shape and options that a run was trained with.

    Raises:
        InputError: no readable config there.
    """
    try:
        settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return StudentShape.model_validate(settings["student"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"from_run: no finished run in '{run}' ({error}); recipes/train.py makes one"
        ) from None


def check_goes_on(run: Path, shape: StudentShape, sparsity: SparsityConfig) -> None:
    """Raises UsageError for settings that the student of a finished run cannot be trained to."""
    if shape not in (StudentShape(), shape_of(run)):
        raise UsageError(f"student.* is taken from '{run}' (from_run), which has others; leave it out")
    density = read_json(run / "evaluation.json", "evaluation", "recipes/train.py")["student"]["density"]
    if sparsity.density > density:
        raise UsageError(
            f"sparsity.density {sparsity.density}: the student in '{run}' (from_run) has {density}; "
            "at most that, or leave from_run out"
        )


def _densities(student: nn.Module) -> dict[str, float]:
    return {name: int(p.count_nonzero()) / p.numel() for name, p in student.named_parameters()}
