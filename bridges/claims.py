"""The claims of a run and their thresholds: what the report's verdict counts.

The thresholds stand in the audit's config and are fixed before the run; `sparsebridge replay` asks the same
of what it measures anew.
"""

from typing import Any

from extractor.config import Config


class Thresholds(Config):
    """What the claims must reach; fixed before the run."""

    init_kl_dense: float = 1e-6
    """Largest KL(dense || student) before training, nats/token."""
    kl_dense: float = 0.5
    """Largest KL(dense || student) after training, nats/token."""
    circuit_loss: float = 0.15
    circuit_accuracy: float = 0.95
    circuit_share_of_nodes: float = 0.03
    accuracy_without_circuit: float = 0.60
    circuits: int = 4
    """Tasks whose circuit must meet all four lines above."""
    edit_size: int = 8
    edit_flip_rate_indirect: float = 0.80
    edit_controls: float = 0.10
    edits: int = 3
    """Tasks whose edit must meet all three lines above at one strength of at most 2."""


def check_criteria(
    limits: Thresholds, evaluation: dict, circuits: dict[str, Any], edits: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each claim with its threshold and what was measured."""
    student = evaluation["student"]
    exact = [m["nonzeros"] == m["k"] for m in student["matrices"].values()]
    good_circuits = [task for task, circuit in circuits.items() if circuit_holds(limits, circuit)]
    good_edits = [task for task, edit in edits.items() if edit_holds(limits, edit)]

    def row(claim: str, threshold: str, measured: str, met: bool) -> dict[str, Any]:
        return {"claim": claim, "threshold": threshold, "measured": measured, "met": met}

    return [
        row(
            "the student starts as a copy of the dense model",
            f"KL <= {limits.init_kl_dense:.0e} nats/token",
            f"{student['init_kl_dense']:.1e}",
            student["init_kl_dense"] <= limits.init_kl_dense,
        ),
        row(
            "the student stays close to the dense model",
            f"KL <= {limits.kl_dense} nats/token",
            f"{student['kl_dense']:.3f} at density {student['density']:.4g}",
            student["kl_dense"] <= limits.kl_dense,
        ),
        row(
            "every matrix has exactly its k nonzero weights",
            "all matrices",
            f"{sum(exact)} of {len(exact)}",
            all(exact),
        ),
        row(
            "circuits are enough and needed",
            f">= {limits.circuits} tasks: loss <= {limits.circuit_loss}, accuracy >= "
            f"{limits.circuit_accuracy:.0%}, <= {limits.circuit_share_of_nodes:.0%} of nodes, "
            f"<= {limits.accuracy_without_circuit:.0%} without them",
            f"{len(good_circuits)} of {len(circuits)}: {', '.join(good_circuits) or 'none'}",
            len(good_circuits) >= limits.circuits,
        ),
        row(
            "edits through the bridge flip the dense model's answer indirectly",
            f">= {limits.edits} tasks: <= {limits.edit_size} nodes, >= "
            f"{limits.edit_flip_rate_indirect:.0%} indirect, controls <= {limits.edit_controls:.0%}",
            f"{len(good_edits)} of {len(edits)}: {', '.join(good_edits) or 'none'}",
            len(good_edits) >= limits.edits,
        ),
    ]


def circuit_holds(limits: Thresholds, circuit: dict[str, Any]) -> bool:
    return (
        circuit["loss"] <= limits.circuit_loss
        and circuit["accuracy"] >= limits.circuit_accuracy
        and circuit["nodes"] <= limits.circuit_share_of_nodes * circuit["nodes_total"]
        and circuit["accuracy_without"] <= limits.accuracy_without_circuit
    )


def edit_holds(limits: Thresholds, edit: dict[str, Any]) -> bool:
    """At one and the same strength: the indirect flips reach the limit and both controls stay low."""
    series = ("strengths", "flip_rate_indirect", "control_random_node", "control_random_direction")
    return edit["size"] <= limits.edit_size and any(
        strength <= 2
        and flips >= limits.edit_flip_rate_indirect
        and max(nodes, direction) <= limits.edit_controls
        for strength, flips, nodes, direction in zip(*(edit[key] for key in series), strict=True)
    )
