"""Attacks from circuits: inputs on which a circuit predicts failure, and whether the dense model fails there.

An edit inserts spans of text into a prompt where they cannot change its right answer:

    document   at the start, closed by the end-of-text token: any text, it belongs to other documents
    comment    as a Python comment on a line of its own, wherever no bracket and no string is open

Two kinds of spans, those that Gao et al. 2025 foretold by hand for bracket counting:

    distractor  ends of held-out prompts whose right answer is the wrong one here, from other pairs
    dilution    held-out text

The search is greedy and looks at the circuit alone (its small exact model, calibrated): in each round it
tries several spans and places and keeps what lowers the right answer's margin most. Student and dense model
are asked at the end, about the edits found and random ones of the same kind and length.
"""

import io
import math
import re
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bridges.dense import DenseModel
from bridges.readout import last_differences
from extractor.circuit import Circuit
from extractor.config import Config
from extractor.evidence import correlation
from extractor.masks import Means
from extractor.statistics import mean_interval, undefined
from extractor.student import Student
from extractor.task_specs import TASKS
from extractor.task_text import Pair
from extractor.task_tokens import tokens_of
from extractor.tasks import TaskBatch, encode_pairs

KINDS = ("distractor", "dilution")
ROWS = 64  # prompts of a forward
DRAWS = 10  # of a random edit that does not fit, before a prompt stays as it is
Place = Literal["document", "comment"]
Answers = Callable[[TaskBatch], Float[Tensor, " example"]]  # answer minus distractor


class AttackConfig(Config):
    """The budget of the search."""

    spans: int = Field(3, ge=0)
    """Most spans inserted into a prompt: rounds of the search."""
    span_tokens: int = Field(16, ge=1)
    """Tokens that a span is cut from; fewer where a prompt of the task is shorter."""
    candidates: int = Field(16, ge=1)
    """Spans tried per prompt and round, each at a random place."""
    random_edits: int = Field(4, ge=1)
    """Random edits per prompt to compare with."""
    examples: int = Field(4, ge=0)
    """Edits written out as text, first those that break the dense model."""
    seed: int = 0


@dataclass(frozen=True)
class Insert:
    """A span of text and the place in the prompt, in characters, before which it goes."""

    place: int
    text: str


Inserts = Sequence[Insert]


@dataclass(frozen=True)
class Prompts:
    """Prompts as text that can be edited; clean ones first, as in a batch."""

    pairs: Sequence[Pair]
    tokenizer: PreTrainedTokenizerBase
    place: Place
    most_tokens: int
    device: torch.device

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    @cached_property
    def texts(self) -> list[str]:
        return [pair.clean for pair in self.pairs] + [pair.corrupted for pair in self.pairs]

    @cached_property
    def batch(self) -> TaskBatch:
        return encode_pairs(self.pairs, self.tokenizer).to(self.device)

    @cached_property
    def places(self) -> list[list[int]]:
        """Where each prompt may be edited."""
        return [comment_places(text) if self.place == "comment" else [0] for text in self.texts]

    def insert(self, example: int, span: str, generator: torch.Generator) -> Insert:
        """A span at a random place of a prompt, dressed so that it changes no answer."""
        if self.place == "document":
            return Insert(0, span + self.tokenizer.eos_token)
        places, text = self.places[example], self.texts[example]
        place = places[int(torch.randint(len(places), (), generator=generator))]
        indent = re.match(" *", text[place:])[0]
        return Insert(place, f"{indent}# {' '.join(span.split())}\n")

    def edited(self, edits: Sequence[Inserts]) -> tuple[TaskBatch, list[bool]]:
        """The batch under edits, and which of them fit; prompts whose edit does not fit stay as they are.

        An edit fits if the prompt ends in the token it ended in, and is not too long.
        """
        batch = self.batch
        own = [ids[: last + 1] for ids, last in zip(batch.ids.tolist(), batch.last.tolist(), strict=True)]
        texts = [apply(text, some) for text, some in zip(self.texts, edits, strict=True)]
        found = tokens_of(texts, self.tokenizer)
        fits = [
            len(new) <= self.most_tokens and new[-1] == old[-1] for new, old in zip(found, own, strict=True)
        ]
        rows = [new if fit else old for new, old, fit in zip(found, own, fits, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.eos_token_id] * (width - len(row)) for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows])
        rest = (batch.answer, batch.distractor, batch.cluster)
        return TaskBatch(ids.to(self.device), last.to(self.device), *rest), fits


def place_for(task: str) -> Place:
    """Comments where the task is known to be Python; for prose and tasks of users, whole documents."""
    spec = TASKS.get(task)
    return "comment" if spec is not None and not spec.prose else "document"


def apply(text: str, edits: Inserts) -> str:
    """Of several inserts at one place the first stands nearest to the prompt."""
    for insert in sorted(edits, key=lambda insert: -insert.place):
        text = text[: insert.place] + insert.text + text[insert.place :]
    return text


def comment_places(code: str) -> list[int]:
    """Starts of lines before which no bracket, no string and no continued line is open; always the first."""
    starts = [0, *(match.end() for match in re.finditer("\n", code))]
    return [start for start in starts if _is_complete(code[:start])]


def _is_complete(code: str) -> bool:
    try:
        list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    return True


@dataclass(frozen=True)
class Spans:
    """What edits of one kind are drawn from; every example has its own choice."""

    texts: Sequence[str]
    allowed: Sequence[Sequence[int]]

    @classmethod
    def of(cls, kind: str, prompts: Prompts, text: Int[Tensor, "block seq"], tokens: int) -> "Spans":
        """Spans of so many tokens at most: no longer than the shortest prompt."""
        batch, decode = prompts.batch, prompts.tokenizer.decode
        tokens = min(tokens, int(batch.last.min()) + 1, text.shape[1])
        if kind == "dilution":
            texts = [
                decode(span, skip_special_tokens=True)
                for span in text.unfold(1, tokens, tokens).flatten(0, 1).tolist()
            ]
            return cls(texts, [range(len(texts))] * len(batch))
        half = len(batch) // 2
        texts = [
            decode(ids[last + 1 - tokens : last + 1])
            for ids, last in zip(batch.ids.tolist(), batch.last.tolist(), strict=True)
        ]
        opposite = [
            [pair + half * (i < half) for pair in range(half) if pair != i % half] for i in range(2 * half)
        ]
        return cls(texts, opposite)

    def draw(self, example: int, generator: torch.Generator) -> str:
        rows = self.allowed[example]
        return self.texts[rows[int(torch.randint(len(rows), (), generator=generator))]]


def search(circuit: Answers, prompts: Prompts, spans: Spans, config: AttackConfig) -> list[list[Insert]]:
    """Every prompt's edit, grown as long as the circuit's margin falls."""
    generator = torch.Generator().manual_seed(config.seed)
    found: list[list[Insert]] = [[] for _ in range(len(prompts))]
    margin = circuit(prompts.batch) if config.spans else None
    for _ in range(config.spans):
        best = list(found)
        for _ in range(config.candidates):
            tried = [
                [*own, prompts.insert(i, spans.draw(i, generator), generator)] for i, own in enumerate(found)
            ]
            batch, fits = prompts.edited(tried)
            now = circuit(batch)
            for example in (now < margin).nonzero()[:, 0].tolist():
                if fits[example]:
                    best[example], margin[example] = tried[example], now[example]
        found = best
    return found


def random_edits(
    like: Sequence[Inserts], prompts: Prompts, spans: Spans, generator: torch.Generator
) -> list[list[Insert]]:
    """As many random spans per prompt, at random places; drawn again where they do not fit."""
    found: list[list[Insert]] = [[] for _ in like]
    missing = [i for i, own in enumerate(like) if own]
    for _ in range(DRAWS):
        for i in missing:
            found[i] = [prompts.insert(i, spans.draw(i, generator), generator) for _ in like[i]]
        _, fits = prompts.edited(found)
        missing = [i for i in missing if not fits[i]]
        if not missing:
            break
    return [own if i not in missing else [] for i, own in enumerate(found)]


@torch.no_grad()
def attack_circuit(
    circuit: Circuit,
    student: Student,
    dense: DenseModel,
    means: Means,
    prompts: Prompts,
    text: Int[Tensor, "block seq"],
    config: AttackConfig,
) -> dict[str, Any]:
    """Search with the circuit, then ask all three models; one entry per kind of span.

    Args:
        means: what the circuit's closed nodes carry.
        prompts: held-out; their `most_tokens` is what the models were trained on, or they fail by that.
        text: held-out text, for dilution.
    """
    compact = circuit.compact(student, means)
    models: dict[str, Answers] = {
        "circuit": lambda batch: circuit.calibration(_in_rows(compact, batch)),
        "student": lambda batch: _in_rows(student, batch),
        "dense": lambda batch: last_differences(dense, batch),
    }
    before = {name: answers(prompts.batch) for name, answers in models.items()}
    found: dict[str, Any] = {
        "place": prompts.place,
        "most_tokens": prompts.most_tokens,
        "num_prompts": len(prompts),
        "budget": config.model_dump(),
    }
    for kind in KINDS:
        spans = Spans.of(kind, prompts, text, config.span_tokens)
        edits = search(models["circuit"], prompts, spans, config)
        generator = torch.Generator().manual_seed(config.seed + 1)
        batch = prompts.edited(edits)[0]
        drawn = [
            prompts.edited(random_edits(edits, prompts, spans, generator))[0]
            for _ in range(config.random_edits)
        ]
        after = {name: answers(batch) for name, answers in models.items()}
        random = {name: torch.stack([answers(b) for b in drawn]) for name, answers in models.items()}
        cluster = prompts.batch.cluster
        found[kind] = {
            "spans_mean": sum(map(len, edits)) / len(edits),
            "tokens_added_mean": _tokens_added(prompts, [batch]),
            "tokens_added_mean_random": _tokens_added(prompts, drawn),
            "models": {
                name: _success(before[name], after[name], random[name], cluster, config.seed)
                for name in models
            },
            "prediction": _prediction(before, after, random, cluster, config.seed),
            "examples": _examples(prompts, edits, before, after, config.examples),
        }
    return found


def _tokens_added(prompts: Prompts, edited: Sequence[TaskBatch]) -> float:
    added = [(batch.last - prompts.batch.last).float().mean().item() for batch in edited]
    return sum(added) / len(added)


def _in_rows(model: Callable[..., Any], batch: TaskBatch) -> Float[Tensor, " example"]:
    """Logit differences of a student or a compact one."""
    parts = zip(batch.ids.split(ROWS), batch.last.split(ROWS), strict=True)
    logits = [model(ids, logits_to_keep=last[:, None]).logits for ids, last in parts]
    return batch.logit_difference(torch.cat(logits))


def _success(
    before: Tensor, after: Tensor, random: Float[Tensor, "draw example"], cluster: Tensor, seed: int
) -> dict[str, Any]:
    """Share of the prompts that a model had right and now has wrong; margins in logits."""
    right = before > 0
    if not right.any():
        return undefined("no prompt was right before")
    broken, by_chance = (after[right] <= 0).float(), (random[:, right] <= 0).float().mean(0)

    def interval(values: Tensor, bounds: tuple[float, float]) -> dict[str, Any]:
        return mean_interval(values, cluster[right], bounds=bounds, seed=seed)

    return {
        "right_before": int(right.sum()),
        "found": interval(broken, (0.0, 1.0)),
        "random": interval(by_chance, (0.0, 1.0)),
        "found_minus_random": interval(broken - by_chance, (-1.0, 1.0)),
        "margin_found_minus_random": interval(after[right] - random[:, right].mean(0), (-math.inf, math.inf)),
        "margin_before": before[right].mean().item(),
        "margin_found": after[right].mean().item(),
        "margin_random": random[:, right].mean().item(),
    }


def _prediction(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    random: Mapping[str, Tensor],
    cluster: Tensor,
    seed: int,
) -> dict[str, Any]:
    """Whether the dense model fails where the circuit says so: all edits of prompts right in both before."""
    right = (before["circuit"] > 0) & (before["dense"] > 0)
    if not right.any():
        return undefined("no prompt was right in both models before")
    edited = {name: torch.cat([after[name][None], random[name]])[:, right] for name in ("circuit", "dense")}
    predicted, broken = (edited[name] <= 0 for name in ("circuit", "dense"))
    by_edit = cluster[right].expand_as(predicted)

    def share(where: Tensor) -> dict[str, Any]:
        return mean_interval(broken[where].float(), by_edit[where], bounds=(0.0, 1.0), seed=seed)

    moved = [(edited[name] - before[name][right]).flatten() for name in ("circuit", "dense")]
    return {
        "edits": predicted.numel(),
        "predicted_to_fail": int(predicted.sum()),
        "dense_fails_where_predicted": share(predicted),
        "dense_fails_elsewhere": share(~predicted),
        "correlation_of_margin_changes": correlation(*moved),
    }


def _examples(
    prompts: Prompts,
    edits: Sequence[Inserts],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    count: int,
) -> list[dict[str, Any]]:
    """Found edits as text: those that break the dense model first, then by its margin."""
    right = (before["dense"] > 0) & (before["circuit"] > 0)
    order = torch.where(right, after["dense"], torch.inf).argsort(stable=True).tolist()
    decode, batch = prompts.tokenizer.decode, prompts.batch
    return [
        {
            "prompt": prompts.texts[i],
            "edited": apply(prompts.texts[i], edits[i]),
            "answer": decode([int(batch.answer[i])]),
            "distractor": decode([int(batch.distractor[i])]),
            "margin_before": {name: values[i].item() for name, values in before.items()},
            "margin_after": {name: values[i].item() for name, values in after.items()},
        }
        for i in [i for i in order if right[i] and edits[i]][:count]
    ]
