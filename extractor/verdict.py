"""Verdict on a circuit: a word that follows from thresholds which were written before the run.

- `not tested`: the student or the circuit was not measured at all;
- `not supported`: a check that everything rests on failed: the student does the task, the circuit does it
  alone, as the student does, better than random circuits, and the same search finds nothing in nonsense;
- `partly`: these hold, but another check failed, or a control was not run;
- `supported`: every check passed.

A value that is missing, undefined or not finite never passes. Never "safe", never a single score.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from extractor.artifacts import SCHEMA_VERSION, read_json, write_json
from extractor.config import Config
from extractor.errors import InputError

Word = Literal["supported", "partly", "not supported", "not tested"]
CHANCE_ACCURACY, CHANCE_LOSS = 0.5, math.log(2)


class Thresholds(Config):
    """What a circuit has to reach; losses in nats per two-way choice (chance is 0.693)."""

    min_student_accuracy: float = Field(0.8, gt=0.5, le=1)
    """Of the whole student: there is no circuit of a task that the student does not do."""
    max_loss: float = Field(0.2, gt=0, lt=CHANCE_LOSS)
    """Of the circuit alone; what nonsense tasks and a shuffled student must not reach."""
    min_agreement: float = Field(0.9, gt=0.5, le=1)
    """Share of prompts on which the circuit answers as the student does, right or wrong."""
    min_correlation: float = Field(0.7, gt=0, le=1)
    """Between the circuit's and the student's logit differences."""
    max_p: float = Field(0.05, gt=0, lt=1)
    """That a random circuit of the same size is as good alone, or as needed."""
    random_circuits: int = Field(100, ge=1)
    """How many random circuits have to be measured."""
    nonsense_tasks: int = Field(2, ge=1)
    """How many nonsense tasks have to be searched."""
    min_necessity: float = Field(0.75, gt=0)
    """Share of the student's logit difference over the floor that goes with the circuit, under mean and under
    resample ablation."""
    max_accuracy_without: float = Field(0.75, ge=0.5, lt=1)
    """Of the student without the circuit, at the best scale and shift for what is left."""
    adversary_nodes: int = Field(1, ge=0)
    """How many nodes the adversary may restore (0: any number)."""
    max_adversarial_loss: float = Field(0.35, gt=0)
    """Of the circuit with the worst such nodes found restored; half of chance."""
    max_random_restored_loss: float = Field(0.3, gt=0)
    """Of the circuit with random sets of any searched size restored."""
    min_template_accuracy: float = Field(0.75, gt=0, le=1)
    """From which on the circuit solves a held-out template."""
    min_templates_solved: float = Field(0.75, gt=0, le=1)
    """Share of the held-out templates that the circuit solves."""
    max_better: float = Field(0.02, ge=0)
    """Nats that the circuit's loss may surely (by the interval's upper end) lie below its student's."""
    seeds: int = Field(10, ge=2)
    """How many seeds have to be searched."""
    min_recurrence: float = Field(0.5, gt=0, le=1)
    """Mean share of the other seeds' circuits that a node of the circuit is in."""
    max_other_alone: float = Field(0.75, gt=0.5, le=1)
    """Mean accuracy of the circuit alone on other tasks that the student does."""
    max_other_drop: float = Field(0.4, gt=0)
    """Mean fall of the student's accuracy on those tasks without the circuit, at the best scale and shift."""

    def fix(self, path: Path) -> None:
        """Write the thresholds before a run; a file that is there must hold the same.

        Raises:
            InputError: the file holds other thresholds, or is damaged.
        """
        if path.exists():
            if type(self).load(path) != self:
                raise InputError(
                    f"thresholds '{path}' were fixed with other values; use those, or another run folder"
                )
            return
        write_json(path, {"schema_version": SCHEMA_VERSION, **self.model_dump(mode="json")})

    @classmethod
    def load(cls, path: Path) -> "Thresholds":
        """Read what `fix` wrote.

        Raises:
            InputError: missing, damaged, or of another schema version.
        """
        value = read_json(path, "thresholds", "recipes/extract.py")
        try:
            return cls.model_validate({key: part for key, part in value.items() if key != "schema_version"})
        except (AttributeError, ValidationError) as error:
            raise InputError(f"thresholds '{path}' are damaged ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True)
class Check:
    """One comparison; `value` is a number or {"undefined": reason}."""

    name: str
    value: float | dict[str, str]
    relation: Literal["at least", "at most", "above"]
    limit: float
    is_essential: bool
    not_run: bool = False

    @property
    def passed(self) -> bool:
        if self.not_run or isinstance(self.value, dict):
            return False
        compare: dict[str, Callable[[float, float], bool]] = {
            "at least": lambda a, b: a >= b,
            "at most": lambda a, b: a <= b,
            "above": lambda a, b: a > b,
        }
        return compare[self.relation](self.value, self.limit)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


@dataclass(frozen=True)
class Verdict:
    """The word and every check behind it."""

    word: Word
    reasons: tuple[Check, ...]

    def as_json(self) -> dict[str, Any]:
        return {"word": self.word, "reasons": [check.as_json() for check in self.reasons]}


def judge(evidence: Mapping[str, Any], controls: Mapping[str, Any], thresholds: Thresholds) -> Verdict:
    """What `extractor.evidence` and the controls say, by the thresholds alone."""
    checks = (
        *student_checks(evidence, thresholds),
        *sufficiency_checks(evidence, thresholds),
        *control_checks(controls, thresholds),
        *necessity_checks(evidence, thresholds),
        *robustness_checks(evidence, thresholds),
        *recurrence_checks(controls, thresholds),
        *specificity_checks(controls, thresholds),
    )
    essential = [check for check in checks if check.is_essential and not check.not_run]
    word: Word = "partly"
    if "loss" not in evidence or "student_accuracy" not in evidence:
        word = "not tested"
    elif not all(check.passed for check in essential):
        word = "not supported"
    elif all(check.passed for check in checks):
        word = "supported"
    return Verdict(word, checks)


def at(value: Any, *keys: str) -> float | dict[str, str]:
    """The number below some keys, or why there is none."""
    for key in keys:
        if isinstance(value, Mapping) and "undefined" in value:
            break
        if not isinstance(value, Mapping) or key not in value:
            return {"undefined": f"not measured: no '{'.'.join(keys)}'"}
        value = value[key]
    if isinstance(value, Mapping) and "undefined" in value:
        return {"undefined": str(value["undefined"])}
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return {"undefined": f"no finite number: {value!r}"}
    return float(value)


def student_checks(evidence: Mapping[str, Any], limits: Thresholds) -> list[Check]:
    low = at(evidence, "intervals", "student_accuracy", "low")
    return [
        Check("student accuracy", at(evidence, "student_accuracy"), "at least",
              limits.min_student_accuracy, True),
        Check("student accuracy, lower end", low, "above", CHANCE_ACCURACY, True),
    ]  # fmt: skip


def sufficiency_checks(evidence: Mapping[str, Any], limits: Thresholds) -> list[Check]:
    """The circuit alone does the task, as the student does it, and random circuits do not."""
    against, random = (evidence.get(key, {}) for key in ("against_student", "random_circuits"))
    high = at(evidence, "intervals", "loss", "high")
    better = at(against, "loss_difference", "high")
    count = at(random, "count")
    is_measured = isinstance(count, float) and count > 0
    return [
        Check("held-out loss", at(evidence, "loss"), "at most", limits.max_loss, True),
        Check("held-out loss, upper end", high, "at most", CHANCE_LOSS, True),
        Check("agreement with the student", at(against, "sign", "value"), "at least",
              limits.min_agreement, True),
        Check("correlation with the student", at(against, "correlation"), "at least",
              limits.min_correlation, True),
        Check("random circuits as good alone: p", at(random, "sufficiency_p"), "at most", limits.max_p, True,
              not_run=not is_measured),
        Check("random circuits measured", count, "at least", limits.random_circuits, False),
        Check("loss minus the student's, upper end", better, "at least", -limits.max_better, False),
    ]  # fmt: skip


def control_checks(controls: Mapping[str, Any], limits: Thresholds) -> list[Check]:
    """The same search finds nothing in nonsense tasks and in a shuffled student."""
    losses = [at(found, "loss") for found in controls.get("nonsense") or ()]
    known = [loss for loss in losses if isinstance(loss, float)]
    lowest = min(known) if known else {"undefined": "not run: no nonsense task was searched"}
    shuffled = at(controls.get("shuffled") or {}, "loss")
    is_run = isinstance(shuffled, float)
    return [
        Check("lowest loss on a nonsense task", lowest, "above", limits.max_loss, True, not_run=not known),
        _run_often("nonsense tasks searched", len(known), limits.nonsense_tasks),
        Check("loss of the shuffled student's circuit",
              shuffled if is_run else {"undefined": "not run: no shuffled student was searched"}, "above",
              limits.max_loss, True, not_run=not is_run),
    ]  # fmt: skip


def _run_often(name: str, count: float, wanted: int) -> Check:
    return Check(name, float(count), "at least", float(wanted), False, not_run=count == 0)


def necessity_checks(evidence: Mapping[str, Any], limits: Thresholds) -> list[Check]:
    """Without the circuit the student does not do the task, and removing as much elsewhere does less."""
    ablations = evidence.get("ablations", {})
    checks = [
        Check(f"necessity, {kind} ablation", at(ablations, kind, "necessity", "value"), "at least",
              limits.min_necessity, False)
        for kind in ("mean", "resample")
    ]  # fmt: skip
    left = at(evidence, "accuracy_without_calibrated")
    p = at(evidence, "random_circuits", "necessity_p")
    return [
        *checks,
        Check("accuracy without the circuit", left, "at most", limits.max_accuracy_without, False),
        Check("random circuits as needed: p", p, "at most", limits.max_p, False),
    ]


def robustness_checks(evidence: Mapping[str, Any], limits: Thresholds) -> list[Check]:
    """Nodes that come back do no harm, and no template is left out."""
    curve = evidence.get("adversary", {}).get("curve", [])
    most = limits.adversary_nodes or "any"
    worst = next((at(point, "loss") for point in curve if point["most"] == most), None)
    random = [at(point, "random_sets", "loss_max") for point in curve]
    templates = [at(row, "accuracy") for row in evidence.get("templates", [])]
    missing = {"undefined": f"not run: no search for {most} restored nodes"}
    return [
        Check(f"loss with the worst {most} restored", worst if worst is not None else missing, "at most",
              limits.max_adversarial_loss, False, not_run=worst is None),
        Check("loss with random sets restored", _largest(random, "not run: no search"), "at most",
              limits.max_random_restored_loss, False),
        Check("held-out templates solved", _share(templates, limits.min_template_accuracy), "at least",
              limits.min_templates_solved, False),
    ]  # fmt: skip


def _largest(values: list[float | dict[str, str]], missing: str) -> float | dict[str, str]:
    """The largest of some numbers; undefined, if one is, or if there are none."""
    unknown = [value for value in values if isinstance(value, dict)]
    return unknown[0] if unknown else max(values, default={"undefined": missing})


def _share(values: list[float | dict[str, str]], least: float) -> float | dict[str, str]:
    """Share of the values that reach `least`; an undefined one does not."""
    if not values:
        return {"undefined": "not measured: no templates"}
    return sum(isinstance(value, float) and value >= least for value in values) / len(values)


def recurrence_checks(controls: Mapping[str, Any], limits: Thresholds) -> list[Check]:
    """Other seeds find the same nodes."""
    seeds = controls.get("seeds") or {}
    count = at(seeds, "count")
    recurrence = at(seeds, "recurrence") if seeds else {"undefined": "not run: no other seed"}
    return [
        _run_often("seeds searched", count if isinstance(count, float) else 0, limits.seeds),
        Check("recurrence of nodes over seeds", recurrence, "at least", limits.min_recurrence, False,
              not_run=not seeds),
    ]  # fmt: skip


def specificity_checks(controls: Mapping[str, Any], limits: Thresholds) -> list[Check]:
    """On other tasks that the student does, the circuit is neither enough nor needed."""
    others = [
        found
        for found in (controls.get("other_tasks") or {}).values()
        if isinstance(accuracy := at(found, "student_accuracy"), float)
        and accuracy >= limits.min_student_accuracy
    ]
    alone = _mean([at(found, "accuracy_alone") for found in others])
    drop = _mean([_drop(found) for found in others])
    return [
        Check("accuracy alone on other tasks", alone, "at most", limits.max_other_alone, False,
              not_run=not others),
        Check("other tasks' fall without the circuit", drop, "at most", limits.max_other_drop, False,
              not_run=not others),
    ]  # fmt: skip


def _drop(found: Mapping[str, Any]) -> float | dict[str, str]:
    key = "accuracy_without_calibrated" if "accuracy_without_calibrated" in found else "accuracy_without"
    whole, without = at(found, "student_accuracy"), at(found, key)
    if isinstance(whole, dict) or isinstance(without, dict):
        return whole if isinstance(whole, dict) else without
    return whole - without


def _mean(values: list[float | dict[str, str]]) -> float | dict[str, str]:
    """Mean of some numbers; undefined, if one is, or if there are none."""
    unknown = [value for value in values if isinstance(value, dict)]
    if unknown or not values:
        return unknown[0] if unknown else {"undefined": "not run: no other task that the student does"}
    return sum(values) / len(values)
