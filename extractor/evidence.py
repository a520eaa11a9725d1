"""Does a circuit hold? Every number that a claim about it rests on, from held-out prompts.

With m the mean logit difference (answer minus distractor) of the uncalibrated models:

    sufficiency = (m_circuit - m_floor)    / (m_student - m_floor)   all but the circuit ablated
    necessity   = (m_student - m_complement) / (m_student - m_floor)   only the circuit ablated

m_floor is the student with every node ablated, in the same way: mean, zero, or resample (the nodes of a
random token of training text for every token; a pair's prompts share the draws where they share tokens).

A circuit may answer by its own scale and shift (its calibration, from selection prompts). So that it is not
called better than its student for that alone, the student is given the same: `student_loss_calibrated`.
Losses are in nats per two-way choice; chance is ln 2. Intervals are those of `extractor.statistics`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from extractor.adversary import AdversaryConfig, attack, spread
from extractor.circuit import Circuit, count_edges, edges_between, keep_nodes, sides
from extractor.closed_edges import close_edges
from extractor.compact import CompactStudent
from extractor.config import Config
from extractor.masks import Bank, Frozen, Means
from extractor.packed import Chunks, Run, join
from extractor.random_circuits import random_controls
from extractor.sites import Tap
from extractor.smallest import calibrate
from extractor.statistics import mean_interval, ratio_interval, undefined
from extractor.student import Student
from extractor.tasks import TaskBatch, accuracy, two_way_loss

Ablation = Literal["mean", "zero", "resample"]
Difference = Float[Tensor, " example"]  # logits, answer minus distractor

LEAST_GAP = 1e-3  # logits between student and floor; a share of less says nothing
SHARE = (0.0, 1.0)
LOSS = (0.0, math.inf)


class EvidenceConfig(Config):
    """How much is measured."""

    random_circuits: int = Field(100, ge=0)
    """Random circuits of the same size at every address; n of them give a p of 1 / (n + 1) at least."""
    random_removed: int = Field(100, ge=0)
    """Of these, how many are also taken out of the whole student, which costs much more than one alone."""
    random_pairs: int = Field(32, ge=1)
    """Held-out pairs on which random circuits, and the circuit beside them, are measured."""
    ablations: tuple[Ablation, ...] = Field(("mean", "resample", "zero"), min_length=1)
    seed: int = 0
    """Of resample ablation, random circuits and intervals."""
    adversary: AdversaryConfig = AdversaryConfig()
    """The search for the worst nodes to restore."""


class Bench:
    """One student, one circuit, some prompts: logit differences with parts of the student ablated."""

    def __init__(
        self, student: Student, circuit: Circuit, prompts: TaskBatch, means: Means, bank: Bank, seed: int
    ):
        self.student, self.circuit = student, circuit
        self.packed = Chunks(prompts, student.config)
        self.prompts = self.packed.prompts
        parts = self.packed.parts
        self.constants: dict[Ablation, Means] = {
            "mean": means,
            "zero": {address: torch.zeros_like(mean) for address, mean in means.items()},
        }
        self.frozen: dict[Ablation, list[Frozen]] = {
            **{kind: [carried] * len(parts) for kind, carried in self.constants.items()},
            "resample": [bank.draw(*part.shape, seed=seed + i) for i, part in enumerate(parts)],
        }

    @property
    def own(self) -> Ablation:
        """What the circuit was looked for under."""
        return self.circuit.settings.get("ablation", "mean")

    @property
    def carried(self) -> Means:
        """What a closed weight of the circuit carries, under any ablation of the other nodes."""
        return self.constants["zero" if self.own == "zero" else "mean"]

    @torch.no_grad()
    def whole(self) -> Difference:
        return self.packed.differences(self.student)[0]

    def alone(self, ablation: Ablation) -> Difference:
        """The circuit's nodes and edges only."""
        if self.constants.get(ablation) is self.carried:
            with torch.no_grad():
                return self.packed.differences(self.circuit.compact(self.student, self.carried))[0]
        run = close_edges(self.student, self.circuit.nodes, self.circuit.pairs, self.carried)
        return self._ablated(run, ablation, self.circuit.tap)

    def without(self, ablation: Ablation) -> Difference:
        return self._ablated(self.student, ablation, partial(self.circuit.tap, complement=True))

    def floor(self, ablation: Ablation) -> Difference:
        if ablation in self.constants:
            with torch.no_grad():
                empty = CompactStudent(self.student, {}, self.constants[ablation])
                return self.packed.differences(empty)[0]
        return self._ablated(self.student, ablation, partial(keep_nodes, ()))

    @torch.no_grad()
    def _ablated(self, run: Run, ablation: Ablation, tap_of: Callable[[Frozen], Tap]) -> Difference:
        pairs = zip(self.packed.parts, self.frozen[ablation], strict=True)
        return join([part.differences(run, tap_of(frozen))[0] for part, frozen in pairs])


def gather_evidence(
    student: Student,
    circuit: Circuit,
    selection: TaskBatch,
    held_out: TaskBatch,
    means: Means,
    bank: Bank,
    config: EvidenceConfig,
) -> dict[str, Any]:
    """Everything that is measured of one circuit, for JSON; what has no value is {"undefined": reason}.

    Args:
        selection: the prompts its calibration is from: the student is calibrated on them, too, and the
            adversary searches on them. All figures are of `held_out`.
        means: of training text, whatever the circuit was looked for under.
        bank: what resample ablation draws from.
    """
    bench = Bench(student, circuit, held_out, means, bank, config.seed)
    whole, alone = bench.whole(), bench.alone(bench.own)
    held_out = bench.prompts
    with torch.no_grad():
        own = calibrate(Chunks(selection, student.config).differences(student)[0])
    ablations = {kind: ablation_facts(bench, kind, whole, config.seed) for kind in config.ablations}
    few = Chunks(spread(held_out, config.random_pairs), student.config)
    return {
        "nodes": len(circuit.nodes),
        "edges": len(circuit.edges),
        "nodes_total": sum(len(mean) for mean in means.values()),
        "edges_total": count_edges(student),
        "num_prompts": len(held_out),
        "num_templates": len(held_out.cluster.unique()),
        "has_learned_edges": len(circuit.edges) < len(edges_between(student, circuit.nodes)),
        **headline(circuit, held_out, whole, alone, own(whole), config.seed),
        "against_student": agreement(circuit, held_out, whole, alone, own(whole), config.seed),
        "ablations": ablations,
        **flat(ablations.get(bench.own, {})),
        "ablation": bench.own,
        "templates": by_template(held_out, whole, circuit.calibration(alone)),
        "random_circuits": random_controls(
            student,
            circuit,
            few,
            bench.carried,
            config.random_circuits,
            config.random_removed,
            config.seed,
        ),
        "adversary": attack(student, circuit, selection, held_out, bench.carried, config.adversary),
    }


def headline(
    circuit: Circuit, prompts: TaskBatch, whole: Difference, alone: Difference, own: Difference, seed: int
) -> dict[str, Any]:
    """Loss and accuracy of the student and of the circuit; `own`: the student, calibrated."""
    calibrated = circuit.calibration(alone)

    def interval(values: Tensor, bounds: tuple[float, float]) -> dict[str, Any]:
        return mean_interval(values.float(), prompts.cluster, bounds=bounds, seed=seed)

    intervals = {
        "loss": interval(F.softplus(-calibrated), LOSS),
        "accuracy": interval(calibrated > 0, SHARE),
        "student_loss": interval(F.softplus(-whole), LOSS),
        "student_accuracy": interval(whole > 0, SHARE),
    }
    loss, student_loss = two_way_loss(calibrated).item(), two_way_loss(own).item()
    room = math.log(2) - student_loss
    return {
        "loss": loss,
        "loss_uncalibrated": two_way_loss(alone).item(),
        "accuracy": accuracy(calibrated),
        "accuracy_interval": [intervals["accuracy"]["low"], intervals["accuracy"]["high"]],
        "student_loss": two_way_loss(whole).item(),
        "student_loss_calibrated": student_loss,
        "student_accuracy": accuracy(whole),
        # The share of the student's gain over chance that the circuit keeps.
        "loss_recovered": (math.log(2) - loss) / room
        if room > 1e-3
        else undefined("the student is no better than chance"),
        "intervals": intervals,
    }


def agreement(
    circuit: Circuit, prompts: TaskBatch, whole: Difference, alone: Difference, own: Difference, seed: int
) -> dict[str, Any]:
    """The circuit against the whole student's own logit differences, not the label.

    Correlations are of the preference for the clean side's answer, over both sides, and of the margin by
    which the right answer wins.
    """
    calibrated = circuit.calibration(alone)
    side = sides(whole)
    wanted, given = side * whole, side * calibrated
    spread_ = (wanted - wanted.mean()).square().sum()
    p = torch.sigmoid(whole)
    kl = F.binary_cross_entropy_with_logits(calibrated, p, reduction="none")
    kl = kl - F.binary_cross_entropy_with_logits(whole, p, reduction="none")

    def interval(values: Tensor, bounds: tuple[float, float]) -> dict[str, Any]:
        return mean_interval(values.float(), prompts.cluster, bounds=bounds, seed=seed)

    better = F.softplus(-calibrated) - F.softplus(-own)
    return {
        "sign": interval((calibrated > 0) == (whole > 0), SHARE),
        "correlation": correlation(wanted, given),
        "correlation_of_margins": correlation(whole, calibrated),
        "r2": (1 - (wanted - given).square().sum() / spread_).item()
        if spread_ > 1e-9
        else undefined("the student's logit differences are all the same"),
        "mean_gap": (wanted - given).abs().mean().item(),
        "mean_student_difference": whole.mean().item(),
        "kl_two_way": interval(kl, LOSS),
        # Circuit minus student, both calibrated on selection prompts: below zero, the circuit is better.
        "loss_difference": interval(better, (-math.inf, math.inf)),
        "accuracy_difference": interval((calibrated > 0).float() - (whole > 0).float(), (-1.0, 1.0)),
    }


def correlation(a: Difference, b: Difference) -> float | dict[str, str]:
    """Pearson's r."""
    a, b = (x.double() - x.double().mean() for x in (a, b))
    scale = a.norm() * b.norm()
    if scale < 1e-9:
        return undefined("one of the two does not vary")
    return (a @ b / scale).item()


def ablation_facts(bench: Bench, kind: Ablation, whole: Difference, seed: int) -> dict[str, Any]:
    """Sufficiency and necessity under one ablation, with the floor they are measured from."""
    alone, without, floor = bench.alone(kind), bench.without(kind), bench.floor(kind)
    gap = whole - floor
    cluster = bench.prompts.cluster
    is_defined = abs(gap.mean().item()) > LEAST_GAP

    def share(part: Difference) -> dict[str, Any]:
        if not is_defined:
            return undefined("the task has no gap: student and floor are equally good")
        return ratio_interval(part, gap, cluster, seed=seed)

    calibrated = bench.circuit.calibration(alone)
    left = calibrate(without)(without)  # a shifted preference can hide what is left
    return {
        "sufficiency": share(alone - floor),
        "necessity": share(whole - without),
        "difference_student": whole.mean().item(),
        "difference_circuit": alone.mean().item(),
        "difference_without": without.mean().item(),
        "difference_floor": floor.mean().item(),
        "floor_accuracy": accuracy(floor),
        "loss": two_way_loss(calibrated).item(),
        "accuracy": accuracy(calibrated),
        "loss_without": two_way_loss(without).item(),
        "accuracy_without": accuracy(without),
        "loss_without_calibrated": two_way_loss(left).item(),
        "accuracy_without_calibrated": accuracy(left),
    }


def flat(facts: dict[str, Any]) -> dict[str, Any]:
    """What the report's tables read of the circuit's own ablation, as plain numbers."""
    names = ("accuracy_without", "accuracy_without_calibrated", "loss_without", "floor_accuracy")
    shares = {name: facts[name] for name in ("sufficiency", "necessity") if name in facts}
    values = {name: share.get("value", share) for name, share in shares.items()}
    return values | {name: facts[name] for name in names if name in facts}


def by_template(prompts: TaskBatch, whole: Difference, calibrated: Difference) -> list[dict[str, Any]]:
    """Student and circuit on each held-out template."""
    rows = []
    for template in prompts.cluster.unique().tolist():
        own = prompts.cluster == template
        rows.append(
            {
                "template": template,
                "n": int(own.sum()),
                "student_accuracy": accuracy(whole[own]),
                "accuracy": accuracy(calibrated[own]),
                "loss": two_way_loss(calibrated[own]).item(),
            }
        )
    return rows
