"""What reviewers ask of such evidence, answered from the record: the report's checklist and its glossary.

Questions of mechanistic-validity reviews (necessity under two ablations, sufficiency, specificity,
minimality, confounds), of circuit hypothesis tests (Shi et al. 2024), and of STREAM for evaluation reports.
An answer says "not done" where the record holds nothing.
"""

from collections.abc import Callable
from typing import Any

from bridges.drawing import finite, reason
from bridges.report_values import at, entries, listed

NOT_DONE = "not done"

GLOSSARY = (
    ("student", "the weight-sparse network made from the dense model; circuits are circuits of the student"),
    ("bridge", "a linear map between the residual streams of dense model and student at one site"),
    ("site", "a place in the residual stream: before an attention (resid_pre) or before an MLP (resid_mid)"),
    ("node", "one channel of a sublayer's input, output, query, key, value or neurons"),
    ("ablation", "a node is set to its mean over text, to zero, or to its value on random text (resample)"),
    ("sufficiency", "share of the student's logit difference that the circuit keeps alone"),
    ("necessity", "share of it that is lost when only the circuit is ablated"),
    ("total effect", "change of the answer with the edit as applied"),
    ("indirect effect", "the same without the edit's own direct write to the logits"),
    ("off target", "on text and tasks that the edit is not about"),
    ("KL", "Kullback-Leibler divergence of next-token distributions, nats per token"),
    ("NMSE", "mean squared error as a share of the target's own mean square"),
)


def checklist(report: Any) -> list[tuple[str, str, str]]:
    """Question, answer, section."""
    circuits = [circuit for _, circuit in entries(at(report, "circuits"))]
    edits = [edit for _, edit in entries(at(report, "edits"))]

    def has(*keys: str | int) -> Callable[[Any], bool]:
        return lambda found: (value := at(found, *keys)) is not None and reason(value) is None

    def count(parts: list[Any], test: Callable[[Any], bool], what: str) -> str:
        met = sum(map(test, parts))
        return f"{met} of {len(parts)} {what}" if met else NOT_DONE

    kinds = sorted({kind for circuit in circuits for kind, _ in entries(at(circuit, "ablations"))})
    return [
        (
            "Falsifiable: thresholds set before?",
            f"{len(listed(at(report, 'criteria')))} criteria" if listed(at(report, "criteria")) else NOT_DONE,
            "2",
        ),
        ("Necessity under at least two ablations?", ", ".join(kinds) or NOT_DONE, "5"),
        ("Sufficiency?", count(circuits, has("sufficiency"), "circuits"), "5"),
        ("Minimality: size against loss?", count(circuits, has("size_curve", "targets"), "circuits"), "5"),
        (
            "Better than random circuits of the same size?",
            count(circuits, lambda c: bool(finite(at(c, "random_circuits", "count"))), "circuits"),
            "2, 5",
        ),
        (
            "Nothing found where there is nothing to find?",
            count(
                circuits, lambda c: bool(listed(at(c, "controls", "nonsense"))), "circuits: nonsense tasks"
            ),
            "2",
        ),
        (
            "Specific: what does it do on other tasks?",
            count(circuits, has("controls", "other_tasks"), "circuits"),
            "5",
        ),
        (
            "Consistent over seeds?",
            count(circuits, has("controls", "seeds", "recurrence"), "circuits, more than one seed"),
            "6",
        ),
        (
            "Faithful with outside nodes put back?",
            count(circuits, has("adversary", "curve", 0, "loss"), "circuits"),
            "2",
        ),
        ("Edits beside controls?", count(edits, has("control_random_direction"), "edits"), "2, 10"),
        ("Edits off target?", count(edits, has("off_target_kl"), "edits"), "10"),
        (
            "Edits against other methods?",
            count(edits, has("alternatives"), "edits"),
            "10",
        ),
        (
            "Test construction: prompts, their number, an example?",
            count(circuits, has("example", "clean"), "circuits with an example"),
            "3, 7",
        ),
        ("Baseline: the dense model on the same prompts?", _behaviour(report), "4"),
        ("Elicitation, threat relevance", "not applicable: no claim about use or misuse is made", "1"),
    ]


def _behaviour(report: Any) -> str:
    tasks = entries(at(report, "dense", "tasks"))
    return f"{len(tasks)} tasks" if tasks else NOT_DONE
