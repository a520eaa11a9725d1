"""Dense model, student, circuit and edited dense model on the same held-out prompts of a task.

A prompt's logit difference is that of its answer and its distractor; the two-way loss is in nats (chance is
ln 2). KL and top-1 agreement are of the whole next-token distribution at the prompt's end. The circuit
answers by its calibration, as in its evidence; its KL is that of its logits as they are. An edit moves a
prompt towards its distractor, so the edited model is meant to be wrong. `compare_task` returns

    counts      planned, run, scored, excluded (prompts, two per pair), and `reasons` [{reason, count}]
    templates   over which intervals are taken (`cluster`)
    models      by name: accuracy, loss, logit_difference (means over prompts), calibration_error (two-way),
                `against` {dense, student: loss_difference, accuracy_difference, logit_difference (this model
                minus that one, paired), same_answer, difference_correlation {pearson, spearman}, kl,
                top1_agreement}; of the edited one also `flips`: of the prompts that the dense model answers
                right, the share that the edited one answers wrong
    worst       prompts on which the logit differences of student and dense model are furthest apart, worst
                first: prompt, answer, distractor, side, template, gap, logit_difference {model: logits}
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.compare import LOSS, SHARE, VALUES_AT_ONCE, Forward, ShowConfig
from bridges.compare_figures import calibration_bins, calibration_error, counted, rank_correlation
from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.edit_table import best_strength
from bridges.live import LiveEdit
from bridges.losses import log_probs
from bridges.off_target import HeldOutText
from bridges.run_models import RunModels
from bridges.steering import Steering
from bridges.steering_gate import steering_again
from extractor.artifacts import read_json
from extractor.circuit import Calibration, Circuit
from extractor.compact import CompactStudent
from extractor.data import DataConfig
from extractor.errors import InputError
from extractor.evidence import correlation
from extractor.packed import join
from extractor.statistics import mean_interval, ratio_interval, undefined
from extractor.student import Student
from extractor.tasks import Pair, TaskBatch

LastLogits = Callable[[TaskBatch], Float[Tensor, "example vocab"]]
"""Logits at the end of every prompt of a batch of pairs."""
REFERENCES = ("dense", "student")
PAIRS_AT_ONCE = 16


@dataclass(frozen=True)
class Answers:
    """What one model answers, by prompt; on the CPU."""

    difference: Float[Tensor, " example"]
    kl: Mapping[str, Float[Tensor, " example"]]
    """From each reference."""
    agrees: Mapping[str, Float[Tensor, " example"]]
    """1 where the most likely next token is each reference's."""

    def select(self, rows: Tensor) -> "Answers":
        return Answers(
            self.difference[rows],
            *({name: value[rows] for name, value in part.items()} for part in (self.kl, self.agrees)),
        )


@dataclass(frozen=True)
class RunEdit:
    """A run's edit of one task at its best strength, for prompts and, as a vector, for text."""

    live: LiveEdit
    strength: float
    """Of the patch, on prompts."""
    steering: Steering | None
    steering_strength: float
    facts: dict[str, Any]

    @classmethod
    def load(cls, models: RunModels, circuit: Circuit, train_pairs: int, data: DataConfig) -> "RunEdit":
        """The edit, also one that does not meet its limits; `facts` says so.

        Raises:
            InputError: the run has no edit of this task, or one of other weights.
        """
        folder = models.run / "edits" / circuit.task
        if not (folder / "edit.json").is_file():
            raise InputError("the run has no edit of this task")
        found = read_json(folder / "edit.json", "edit", "recipes/edit.py")
        edit = Edit.load(folder, models.dense, force=True)
        if edit.hashes.student_sha256 != models.hashes.student_sha256:
            raise InputError("the edit belongs to another student; recipes/edit.py makes it again")
        strength = best_strength(found["strengths"], found["flip_rate_indirect"])
        facts = {
            "sites": [str(site) for site in edit.sites],
            "nodes": [str(node) for node in edit.nodes],
            "strength": strength,
            "refusals": list(edit.refusals),
        }
        live = LiveEdit(edit, models.dense, models.student)
        form = found.get("steering_form", {})
        try:
            steering = _steering(models, circuit, edit, form, train_pairs, data)
        except InputError as error:
            return cls(live, strength, None, 0.0, facts | {"steering": undefined(str(error))})
        name = f"gated, as the {form['direction']} prompts are moved on average, at {form['strength']:g}"
        return cls(live, strength, steering, form["strength"], facts | {"steering": name})

    def on_prompts(self, batch: TaskBatch) -> Float[Tensor, "example vocab"]:
        """The patch: each prompt's nodes at the counterfactual prompt's values."""
        live = self.live
        other = {address: batch.counterfactual(value) for address, value in live.read(batch.ids).items()}
        with live.applied(strength=self.strength, last=batch.last, counterfactual=other) as model:
            return at_last(model(batch.ids, use_cache=False).logits, batch.last)

    def on_text(self, ids: Tensor, position_ids: Tensor | None) -> Float[Tensor, "block token vocab"]:
        """The steering form, added where its gate is open."""
        dense, site = self.live.dense, self.steering.site
        run = dense.run(ids, [site], position_ids=position_ids)
        delta = self.steering.delta(run.resid[site], self.steering_strength)
        if not delta.any():
            return run.logits
        return dense.run_from(site, run.resid[site] + delta, position_ids=position_ids)


def _steering(
    models: RunModels,
    circuit: Circuit,
    edit: Edit,
    form: Mapping[str, Any],
    train_pairs: int,
    data: DataConfig,
) -> Steering:
    streams = models.streams(models.prompts(circuit, "train", train_pairs), edit.source)
    text = None
    if blocks := form.get("train_text_blocks"):
        text = HeldOutText(models.dense, *models.text(data, "train", blocks))
    return steering_again(edit, streams, models.student, models.bridges, text, form)


def at_last(logits: Float[Tensor, "example seq vocab"], last: Int[Tensor, " example"]) -> Tensor:
    return logits[torch.arange(len(last), device=logits.device), last]


def of_dense(dense: DenseModel) -> tuple[Forward, LastLogits]:
    """The dense model on text and on prompts."""
    return (
        lambda ids, at: dense.run(ids, record=False, position_ids=at).logits,
        lambda batch: at_last(dense.run(batch.ids, record=False).logits, batch.last),
    )


def of_student(student: Student | CompactStudent) -> tuple[Forward, LastLogits]:
    """A student, or a circuit alone, on text and on prompts."""
    return (
        lambda ids, at: student(ids, position_ids=at).logits,
        lambda batch: student(batch.ids, logits_to_keep=batch.last[:, None]).logits[:, 0],
    )


@torch.no_grad()
def answer(models: Mapping[str, LastLogits], prompts: TaskBatch, vocab_size: int) -> dict[str, Answers]:
    """Every model on the same prompts, a few pairs of like length at a time; dense model and student are
    what all are held against."""
    half = len(prompts) // 2
    order = torch.argsort(torch.maximum(prompts.last[:half], prompts.last[half:]), stable=True)
    at_once = min(PAIRS_AT_ONCE, max(1, VALUES_AT_ONCE // (2 * prompts.ids.shape[1] * vocab_size)))
    parts: dict[str, list[Answers]] = {name: [] for name in models}
    for pairs in order.split(at_once):
        batch = prompts.select(pairs)
        own = {name: log_probs(last(batch)) for name, last in models.items()}
        for name, found in own.items():
            parts[name].append(_answers(found, {key: own[key] for key in REFERENCES}, batch))
    back = order.argsort().cpu()
    rows = torch.cat([back, back + half])
    return {name: _joined(found).select(rows) for name, found in parts.items()}


def _answers(own: Tensor, references: Mapping[str, Tensor], batch: TaskBatch) -> Answers:
    def kl(reference: Tensor) -> Tensor:
        return F.kl_div(own, reference, reduction="none", log_target=True).sum(-1).clamp(min=0)

    return Answers(
        batch.logit_difference(own[:, None]).cpu(),
        {name: kl(reference).cpu() for name, reference in references.items()},
        {name: (own.argmax(-1) == r.argmax(-1)).float().cpu() for name, r in references.items()},
    )


def _joined(parts: Sequence[Answers]) -> Answers:
    """Clean sides of all parts, then corrupted ones."""

    def of(values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: join([value[name] for value in values]) for name in REFERENCES}

    return Answers(
        join([part.difference for part in parts]),
        of([part.kl for part in parts]),
        of([part.agrees for part in parts]),
    )


def compare_task(
    models: Mapping[str, LastLogits],
    prompts: TaskBatch,
    pairs: Sequence[Pair],
    config: ShowConfig,
    *,
    vocab_size: int,
    calibration: Calibration | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything above, for JSON; `calibration` is that of the model called `circuit`."""
    answers = answer(models, prompts, vocab_size)
    if calibration is not None and "circuit" in answers:
        alone = answers["circuit"]
        answers["circuit"] = replace(alone, difference=calibration(alone.difference))
    finite = [
        found.difference.isfinite() & torch.stack([*found.kl.values()]).isfinite().all(0)
        for found in answers.values()
    ]
    scored = torch.stack(finite).all(0)
    cluster = prompts.cluster.cpu()
    chosen = {name: found.select(scored) for name, found in answers.items()}
    summaries = {
        name: task_summary(own, chosen, cluster[scored], config.calibration_bins, seed)
        for name, own in chosen.items()
    }
    if "edited" in chosen:
        summaries["edited"]["flips"] = flips(chosen["dense"], chosen["edited"], cluster[scored], seed)
    total = len(prompts)
    reasons = {"the logits of a model are not finite": int((~scored).sum())}
    return {
        "counts": counted(total, total, int(scored.sum()), reasons),
        "templates": len(cluster.unique()),
        "cluster": "template",
        "models": summaries,
        "worst": worst_prompts(answers, scored, pairs, config.worst_prompts),
    }


def task_summary(
    own: Answers, all_answers: Mapping[str, Answers], cluster: Int[Tensor, " example"], bins: int, seed: int
) -> dict[str, Any]:
    """The figures of one model, and its paired differences from dense model and student."""
    every = (-math.inf, math.inf)

    def interval(values: Tensor, bounds: tuple[float, float]) -> dict[str, Any]:
        return mean_interval(values.double(), cluster, bounds=bounds, seed=seed)

    def against(name: str) -> dict[str, Any]:
        other = all_answers[name]
        is_right, was_right = own.difference > 0, other.difference > 0
        pair = (own.difference, other.difference)
        return {
            "loss_difference": interval(two_way(own) - two_way(other), every),
            "accuracy_difference": interval(is_right.double() - was_right.double(), (-1.0, 1.0)),
            "logit_difference": interval(own.difference - other.difference, every),
            "same_answer": interval(is_right == was_right, SHARE),
            "difference_correlation": {
                "pearson": correlation(*pair)
                if len(own.difference) > 1
                else undefined("fewer than two examples"),
                "spearman": rank_correlation(*pair),
            },
            "kl": interval(own.kl[name], LOSS),
            "top1_agreement": interval(own.agrees[name], SHARE),
        }

    is_right = own.difference > 0
    return {
        "accuracy": interval(is_right, SHARE),
        "loss": interval(two_way(own), LOSS),
        "logit_difference": interval(own.difference, every),
        "calibration_error": calibration_error(
            calibration_bins(own.difference.abs().sigmoid(), is_right, bins)
        ),
        "against": {name: against(name) for name in REFERENCES},
    }


def two_way(answers: Answers) -> Float[Tensor, " example"]:
    """Loss of the two-way choice by prompt, nats."""
    return F.softplus(-answers.difference.double())


def flips(dense: Answers, edited: Answers, cluster: Int[Tensor, " example"], seed: int) -> dict[str, Any]:
    """Of the prompts that the dense model answers right, the share that the edited one answers wrong."""
    right = dense.difference > 0
    wrong = right & (edited.difference < 0)
    found = ratio_interval(wrong.double(), right.double(), cluster, bounds=SHARE, seed=seed)
    return found if "undefined" in found else found | {"n": int(right.sum())}


def worst_prompts(
    answers: Mapping[str, Answers], scored: Bool[Tensor, " example"], pairs: Sequence[Pair], count: int
) -> list[dict[str, Any]]:
    """Where student and dense model are furthest apart."""
    gap = answers["student"].difference - answers["dense"].difference
    ranked = torch.where(scored, gap.abs(), -1.0).argsort(descending=True, stable=True)
    rows = []
    for index in ranked[: min(count, int(scored.sum()))].tolist():
        pair, is_clean = pairs[index % len(pairs)], index < len(pairs)
        given = (pair.answer, pair.distractor)
        wanted, other = given if is_clean else given[::-1]
        rows.append(
            {
                "prompt": pair.clean if is_clean else pair.corrupted,
                "answer": wanted,
                "distractor": other,
                "side": "clean" if is_clean else "corrupted",
                "template": pair.template,
                "gap": gap[index].item(),
                "logit_difference": {name: own.difference[index].item() for name, own in answers.items()},
            }
        )
    return rows
