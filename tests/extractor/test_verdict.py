"""Verdicts: every check can fail, and none passes on what was not measured."""

import copy
import json
import math

import pytest
import torch

from extractor.circuit import Circuit, edges_between
from extractor.circuit_table import circuit_table
from extractor.errors import InputError
from extractor.evidence import gather_evidence
from extractor.masks import Bank, mean_activations
from extractor.sites import Node
from extractor.smallest import calibrate
from extractor.tasks import TaskBatch
from extractor.verdict import Thresholds, judge
from tests.extractor.test_circuits import PLANTED, planted_student, planted_task
from tests.extractor.test_evidence import QUICK

LIMITS = Thresholds()


def interval(value: float, low: float, high: float) -> dict:
    return {"value": value, "low": low, "high": high, "method": "BCa", "clusters": 12, "n": 128}


def good_evidence() -> dict:
    point = {"loss": 0.1, "random_sets": {"loss_max": 0.05}}
    return {
        "student_accuracy": 0.99,
        "loss": 0.05,
        "accuracy_without_calibrated": 0.55,
        "intervals": {"student_accuracy": interval(0.99, 0.97, 1.0), "loss": interval(0.05, 0.02, 0.1)},
        "against_student": {
            "sign": interval(0.98, 0.95, 1.0),
            "correlation": 0.95,
            "loss_difference": interval(0.01, -0.01, 0.03),
        },
        "ablations": {kind: {"necessity": interval(0.95, 0.9, 1.0)} for kind in ("mean", "resample")},
        "random_circuits": {"count": 100, "sufficiency_p": 1 / 101, "necessity_p": 1 / 101},
        "adversary": {"curve": [{"most": most, **copy.deepcopy(point)} for most in (1, 10, "any")]},
        "templates": [{"template": i, "accuracy": 0.95} for i in range(12)],
    }


def good_controls() -> dict:
    return {
        "nonsense": [
            {"kind": kind, "seed": 0, "loss": 1.2, "accuracy": 0.5, "nodes": 40}
            for kind in ("prompt", "class")
        ],
        "shuffled": {"student_accuracy": 0.5, "loss": 0.9, "accuracy": 0.5, "nodes": 400},
        "other_tasks": {"a": {"student_accuracy": 1.0, "accuracy_alone": 0.5, "accuracy_without": 0.97}},
        "seeds": {"count": 10, "recurrence": 0.8, "core": [], "sizes": [40] * 10},
    }


def changed(value: dict, path: tuple, new: object) -> dict:
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def test_all_checks_passed_is_supported() -> None:
    verdict = judge(good_evidence(), good_controls(), LIMITS)
    assert verdict.word == "supported"
    assert all(check.passed for check in verdict.reasons)
    names = [check.name for check in verdict.reasons]
    assert len(set(names)) == len(names)
    reread = json.loads(json.dumps(verdict.as_json(), allow_nan=False))
    assert all({"name", "value", "limit", "passed"} <= reason.keys() for reason in reread["reasons"])


ESSENTIAL = {
    ("student_accuracy",): 0.7,
    ("intervals", "student_accuracy", "low"): 0.5,
    ("loss",): 0.4,
    ("intervals", "loss", "high"): 0.8,
    ("against_student", "sign", "value"): 0.8,
    ("against_student", "correlation"): 0.3,
    ("random_circuits", "sufficiency_p"): 0.2,
}
CAPPING = {
    ("ablations", "mean", "necessity", "value"): 0.3,
    ("ablations", "resample", "necessity", "value"): 0.3,
    ("accuracy_without_calibrated",): 0.9,
    ("random_circuits", "necessity_p"): 0.2,
    ("random_circuits", "count"): 40,
    ("adversary", "curve", 0, "loss"): 0.6,
    ("adversary", "curve", 2, "random_sets", "loss_max"): 0.5,
    ("templates",): [{"template": 0, "accuracy": 1.0}, {"template": 1, "accuracy": 0.5}],
    ("against_student", "loss_difference", "high"): -0.1,
}
ESSENTIAL_CONTROLS = {
    ("nonsense", 1, "loss"): 0.1,
    ("shuffled", "loss"): 0.1,
}
CAPPING_CONTROLS = {
    ("nonsense",): good_controls()["nonsense"][:1],
    ("seeds", "count"): 3,
    ("seeds", "recurrence"): 0.1,
    ("other_tasks", "a", "accuracy_without"): 0.5,
    ("other_tasks", "a", "accuracy_alone"): 1.0,
}


@pytest.mark.parametrize("path", [*ESSENTIAL, *CAPPING])
def test_each_measure_can_fail(path: tuple) -> None:
    word = "not supported" if path in ESSENTIAL else "partly"
    bad = (ESSENTIAL | CAPPING)[path]
    verdict = judge(changed(good_evidence(), path, bad), good_controls(), LIMITS)
    assert verdict.word == word
    assert sum(not check.passed for check in verdict.reasons) == 1


@pytest.mark.parametrize("path", [*ESSENTIAL_CONTROLS, *CAPPING_CONTROLS])
def test_each_control_can_fail(path: tuple) -> None:
    word = "not supported" if path in ESSENTIAL_CONTROLS else "partly"
    bad = (ESSENTIAL_CONTROLS | CAPPING_CONTROLS)[path]
    verdict = judge(good_evidence(), changed(good_controls(), path, bad), LIMITS)
    assert verdict.word == word
    assert sum(not check.passed for check in verdict.reasons) == 1


@pytest.mark.parametrize("path", [path for path in [*ESSENTIAL, *CAPPING] if path != ("templates",)])
@pytest.mark.parametrize("value", [math.nan, math.inf, None, {"undefined": "disk was full"}])
def test_what_has_no_value_never_passes(path: tuple, value: object) -> None:
    verdict = judge(changed(good_evidence(), path, value), good_controls(), LIMITS)
    assert verdict.word in ("partly", "not supported")
    assert any(isinstance(check.value, dict) and not check.passed for check in verdict.reasons)
    json.dumps(verdict.as_json(), allow_nan=False)


@pytest.mark.parametrize("control", ["nonsense", "shuffled", "other_tasks", "seeds"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_control_that_was_not_run_caps_at_partly_and_says_so(control: str, how: str) -> None:
    controls = good_controls()
    if how == "missing":
        del controls[control]
    else:
        controls[control] = type(controls[control])()
    verdict = judge(good_evidence(), controls, LIMITS)
    assert verdict.word == "partly"
    not_run = [check for check in verdict.reasons if check.not_run]
    assert not_run
    assert not any(check.passed for check in not_run)
    assert "not run" in str([check.value for check in not_run])


def test_random_circuits_that_were_not_measured_cap_at_partly() -> None:
    bad = changed(good_evidence(), ("random_circuits",), {"count": 0})
    assert judge(bad, good_controls(), LIMITS).word == "partly"


@pytest.mark.parametrize("missing", ["loss", "student_accuracy"])
def test_no_measurement_is_not_tested(missing: str) -> None:
    evidence = good_evidence()
    del evidence[missing]
    assert judge(evidence, good_controls(), LIMITS).word == "not tested"
    assert judge({}, {}, LIMITS).word == "not tested"


def test_the_adversary_must_have_searched_what_the_thresholds_ask() -> None:
    verdict = judge(good_evidence(), good_controls(), Thresholds(adversary_nodes=1000))
    assert verdict.word == "partly"
    anything = judge(good_evidence(), good_controls(), Thresholds(adversary_nodes=0))
    assert anything.word == "supported"


def test_tasks_that_the_student_does_not_do_say_nothing_about_specificity() -> None:
    controls = good_controls()
    controls["other_tasks"]["b"] = {"student_accuracy": 0.5, "accuracy_alone": 1.0, "accuracy_without": 0.0}
    assert judge(good_evidence(), controls, LIMITS).word == "supported"
    del controls["other_tasks"]["a"]
    assert judge(good_evidence(), controls, LIMITS).word == "partly"


# --- thresholds in a file --------------------------------------------------------------------------------


def test_thresholds_are_fixed_before_the_run(tmp_path) -> None:
    path = tmp_path / "thresholds.json"
    LIMITS.fix(path)
    before = path.read_bytes()
    LIMITS.fix(path)
    assert path.read_bytes() == before
    assert Thresholds.load(path) == LIMITS
    with pytest.raises(InputError, match="fixed with other values"):
        Thresholds(max_loss=0.6).fix(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ['{"schema_version": 1, "max_loss": "much"}', "[1]", '{"max_los": 1}'])
def test_damaged_thresholds_are_refused(tmp_path, text: str) -> None:
    path = tmp_path / "thresholds.json"
    path.write_text(text)
    with pytest.raises(InputError, match="thresholds"):
        Thresholds.load(path)


# --- from measurement to word ----------------------------------------------------------------------------


def nonsense(prompts: TaskBatch) -> TaskBatch:
    """Answers exchanged on half of the pairs."""
    half = len(prompts) // 2
    swapped = (torch.arange(half) % 2 == 0).repeat(2)
    answer = torch.where(swapped, prompts.distractor, prompts.answer)
    distractor = torch.where(swapped, prompts.answer, prompts.distractor)
    return TaskBatch(prompts.ids, prompts.last, answer, distractor, prompts.cluster)


def judged(is_nonsense: bool, nodes_of: str) -> str:
    student = planted_student()
    text = planted_task(64, 0).ids
    means = mean_activations(student, text)
    selection, held_out = planted_task(24, 1), planted_task(24, 2)
    if is_nonsense:
        selection, held_out = nonsense(selection), nonsense(held_out)
    nodes = frozenset(map(Node.parse, PLANTED))
    if nodes_of == "everything":
        nodes = frozenset(Node(address, c) for address, mean in means.items() for c in range(len(mean)))
    circuit = Circuit("t", nodes, edges_between(student, nodes), "sha", {})
    difference = selection.logit_difference(student(selection.ids, tap=circuit.tap(means)).logits)
    circuit = Circuit("t", nodes, circuit.edges, "sha", {}, calibrate(difference))
    evidence = gather_evidence(student, circuit, selection, held_out, means, Bank(student, text), QUICK)
    # Of 12 channels a random circuit often hits one of the planted, and then breaks as much.
    return judge(evidence, good_controls(), Thresholds(random_circuits=10, max_p=0.4)).word


def test_a_planted_circuit_is_supported_and_the_same_mask_on_nonsense_is_not() -> None:
    assert judged(False, "planted") == "supported"
    assert judged(True, "planted") == "not supported"


def test_all_nodes_are_no_circuit() -> None:
    assert judged(False, "everything") == "not supported"


def test_the_table_shows_nothing_of_a_circuit_that_was_not_found() -> None:
    evidence = {
        "student_accuracy": 0.5,
        "loss": 0.7,
        "sufficiency": 0.0,
        "verdict": {"word": "not supported"},
    }
    evidence["random_circuits"] = {"sufficiency_p": 0.01}
    found, missing = (
        Circuit(task, frozenset(), (), student_sha256="", settings={"reached_loss": loss}, evidence=evidence)
        for task, loss in (("found", 0.1), ("missing", None))
    )
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in circuit_table([found, missing]).splitlines()
    ]
    assert rows[2][:6] == ["`found`", "50 %", "0", "0", "0.700", "0.00"]
    assert rows[2][8] == "0.020"  # both were tried
    assert rows[3][:3] == ["`missing`", "50 %", "-"]
    assert set(rows[3][2:11]) == {"-"}
    assert rows[3][11:] == [
        "not supported",
        "no circuit: the student itself, or every mask, stays above the target loss",
    ]
