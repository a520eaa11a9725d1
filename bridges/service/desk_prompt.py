"""Both models on a prompt of the desk: unedited, which is kept for a few prompts, and under a change."""

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from bridges.live import LiveEdit
from bridges.run_models import RunModels
from extractor.errors import InputError, UsageError
from extractor.intervention import Intervention
from extractor.sites import Node, Recorder
from extractor.statistics import undefined
from extractor.task_tokens import tokens_of
from extractor.tasks import TaskBatch

CASES = 8  # prompts whose unedited side is kept


@dataclass
class Case:
    """A prompt, and what both models do on it unedited."""

    ids: Int[Tensor, "1 seq"]
    unedited: Mapping[str, Float[Tensor, " vocab"]]
    """Log-probabilities of the next token, by model."""
    presented: Mapping[str, Float[Tensor, "1 seq _"]]
    """The student's activations where nodes may be changed, and at every site."""
    counterfactual: Mapping[str, Float[Tensor, "1 seq _"]] | None
    """Those of the counterfactual prompt, aligned token by token; None: there is none."""
    continuations: dict[tuple[str, int], str] = field(default_factory=dict)
    """Unedited, by model and number of tokens."""


class DeskPrompts:
    """The models of a run, one prompt at a time; `nodes` are those that may be changed."""

    def __init__(self, models: RunModels, nodes: Iterable[Node]):
        self.models = models
        self.addresses = {node.address for node in nodes}
        configs = (models.student.config, models.dense.config)
        limits = [getattr(config, "max_position_embeddings", None) for config in configs]
        self.longest = min(limit for limit in limits if limit)
        parameters = inspect.signature(models.dense.model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cases: OrderedDict[tuple[str, str | None], Case] = OrderedDict()

    def case(self, prompt: str, counterfactual: str | None, continuation: int = 0) -> Case:
        """The prompt with its counterfactual, run if it is none of the last few.

        Raises:
            UsageError: a prompt that the models cannot read, or that goes on too long; two that do not align.
        """
        key = (prompt, counterfactual)
        if key not in self._cases:
            self._cases[key] = self._run_unedited(prompt, counterfactual)
            if len(self._cases) > CASES:
                self._cases.popitem(last=False)
        self._cases.move_to_end(key)
        case = self._cases[key]
        if (length := case.ids.shape[1] + continuation) > self.longest:
            raise UsageError(
                f"continuation: the prompt and {continuation} new tokens are {length}, the models read "
                f"{self.longest}"
            )
        return case

    def student_after(self, case: Case, change: Intervention) -> Float[Tensor, " vocab"]:
        """Log-probabilities under a change. What comes before its first node is as it was, and not run."""
        student = self.models.student
        start = change.nodes[0].site_before(parallel=student.config.parallel_residual)
        tap = change.tap(counterfactual=case.counterfactual)
        run = student(case.ids, tap=tap, start=start, resid=case.presented[str(start)], logits_to_keep=1)
        return next_token(run.logits)

    def dense_after(self, case: Case, live: LiveEdit) -> Float[Tensor, " vocab"]:
        with live.applied(counterfactual=case.counterfactual, presented=case.presented) as model:
            return self._dense(model, case.ids)

    def continuation(self, case: Case, model: str, tokens: int) -> str:
        """Of a model as it is, "student" or "dense"."""
        key = (model, tokens)
        if key not in case.continuations:
            own = self.models.student if model == "student" else self.models.dense.model
            case.continuations[key] = self._continue(own, case, tokens)
        return case.continuations[key]

    def continuation_under(
        self, case: Case, edited: AbstractContextManager[PreTrainedModel], tokens: int
    ) -> str:
        """Of a model under a change: what `Intervention.applied` or `LiveEdit.applied` gives."""
        with edited as model:
            return self._continue(model, case, tokens)

    def _continue(self, model: PreTrainedModel, case: Case, tokens: int) -> str:
        """The most likely token each time, whatever the checkpoint's own generation settings are."""
        greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        greedy |= {"max_new_tokens": tokens, "pad_token_id": self.models.tokenizer.eos_token_id}
        whole = model.generate(case.ids, attention_mask=torch.ones_like(case.ids), **greedy)
        return self.models.tokenizer.decode(whole[0, case.ids.shape[1] :])

    def _run_unedited(self, prompt: str, counterfactual: str | None) -> Case:
        ids = self._encoded("prompt", prompt)
        other = None if counterfactual is None else self._encoded("counterfactual", counterfactual)
        if other is not None and other.shape != ids.shape and other[0, -1] != ids[0, -1]:
            raise UsageError(
                f"counterfactual: it has {other.shape[1]} tokens, the prompt {ids.shape[1]}; give one of as "
                "many, or one that ends in the same token, so that tokens have counterparts"
            )
        presented, student = self._run_student(ids)
        unedited = {"student": student, "dense": self._dense(self.models.dense.model, ids)}
        aligned = None if other is None else align(ids, presented, other, self._run_student(other)[0])
        return Case(ids, unedited, presented, aligned)

    def _run_student(self, ids: Int[Tensor, "1 seq"]) -> tuple[dict[str, Tensor], Float[Tensor, " vocab"]]:
        student = self.models.student
        recorder = Recorder(*self.addresses, *map(str, student.sites))
        logits = student(ids, tap=recorder, logits_to_keep=1).logits
        return recorder.activations, next_token(logits)

    def _dense(self, model: PreTrainedModel, ids: Int[Tensor, "1 seq"]) -> Float[Tensor, " vocab"]:
        return next_token(model(ids, use_cache=False, **self._last_only).logits)

    def _encoded(self, what: str, text: str) -> Int[Tensor, "1 seq"]:
        (ids,) = tokens_of([text], self.models.tokenizer)
        if not 0 < len(ids) <= self.longest:
            raise UsageError(f"{what}: it has {len(ids)} tokens, the models read 1 to {self.longest}")
        return torch.tensor([ids], device=self.models.dense.device)


def align(
    ids: Int[Tensor, "1 seq"],
    presented: Mapping[str, Tensor],
    other_ids: Int[Tensor, "1 other"],
    other: Mapping[str, Tensor],
) -> dict[str, Float[Tensor, "1 seq _"]]:
    """The other prompt's activations at the presented one's tokens, by `TaskBatch.counterfactual`."""
    lengths = torch.tensor([ids.shape[1], other_ids.shape[1]], device=ids.device)
    no_answer = torch.zeros_like(lengths)
    batch = TaskBatch(padded(ids, other_ids), lengths - 1, no_answer, no_answer)
    return {
        address: batch.counterfactual(padded(value, other[address]))[:1, : ids.shape[1]].clone()
        for address, value in presented.items()
    }


def padded(one: Tensor, other: Tensor) -> Tensor:
    """Two rows of different length as one batch, zeros after the end."""
    return pad_sequence([one[0], other[0]], batch_first=True)


def next_token(logits: Float[Tensor, "1 seq vocab"]) -> Float[Tensor, " vocab"]:
    """Log-probabilities at the last position, in float64 so that equal logits have a KL of zero.

    Raises:
        InputError: the logits are not finite.
    """
    found = logits[0, -1].double().log_softmax(-1)
    if not found.isfinite().all():
        raise InputError("strength: the logits are not finite under this change; take less")
    return found


def shown(
    before: Float[Tensor, " vocab"],
    after: Float[Tensor, " vocab"],
    top: int,
    models: RunModels,
    answers: tuple[int, int] | None,
) -> dict[str, Any]:
    """Two next-token distributions side by side: the tokens that are among the first of either.

    `answers`: answer and distractor, where the prompt has them.
    """
    first = [own.topk(min(top, len(own))).indices.tolist() for own in (before, after)]
    tokens = list({*first[0], *first[1]})
    chances = zip(before[tokens].exp().tolist(), after[tokens].exp().tolist(), strict=True)
    rows = sorted(zip(tokens, chances, strict=True), key=lambda row: -max(row[1]))
    texts = [models.tokenizer.decode([token]) for token, _ in rows]
    found: dict[str, Any] = {
        when: [
            {"id": token, "text": text, "probability": both[side]}
            for (token, both), text in zip(rows, texts, strict=True)
        ]
        for side, when in enumerate(("before", "after"))
    }
    found["kl"] = max(0.0, (before.exp() * (before - after)).sum().item())
    found["changed"] = first[0][0] != first[1][0]
    found["difference"] = undefined("the prompt is none of the task's")
    if answers is not None:
        before, after = (own[answers[0]] - own[answers[1]] for own in (before, after))
        found["difference"] = {"before": before.item(), "after": after.item()}
    return found
