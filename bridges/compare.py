"""Dense model, student and others side by side on the same held-out text, token by token.

Every token but a block's first is predicted from those before it. Losses are in nats per token; KL is
KL(dense || model) of next-token distributions, in nats. Of a token five numbers per model are kept, its
logits are not. `compare_text` returns

    counts      planned, run, scored, excluded (tokens), and `reasons` [{reason, count}] of what is excluded
    blocks, documents   of the text that was run; intervals draw documents with replacement (`cluster`)
    kind, classes       class set (`bridges.token_classes`); a token's class is that of the predicted token
    models      by name, the reference first: `overall`, `by_class` {class: the same}, and
                `calibration_bins` [{low, high, count, confidence, accuracy}]
    scatter     x, y (names of models), columns, and `points` [[x's loss, y's loss, index into classes]],
                `shown` of `of` tokens, evenly spread over the text
    worst       `by_kl` and `by_loss_difference`: tokens on which the first two models differ most, the worst
                first: block (of those run), position, document, class, before, token, after (text), kl,
                loss {model: nats}, top {model: [{token, probability}]}

    overall     tokens, loss, loss_difference (model minus reference, paired), loss_correlation {pearson,
                spearman}, kl, top1_agreement, top1_accuracy, calibration_error (the expected one of the most
                likely token, bins of equal width)

Where an interval belongs to a figure it is {value, low, high, method, clusters, n}
(`extractor.statistics`); what has no value is {"undefined": reason}.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bridges.compare_figures import (
    calibration_bins,
    calibration_error,
    correlation_interval,
    counted,
    rank_correlation,
    top_tokens,
)
from bridges.losses import log_probs
from bridges.token_classes import CLASSES, Kind, classify, documents, token_texts
from extractor.config import Config
from extractor.data import TokenBlocks
from extractor.statistics import mean_interval

Forward = Callable[
    [Int[Tensor, "block token"], Int[Tensor, "block token"] | None], Float[Tensor, "block token vocab"]
]
"""Logits from tokens and, where documents are kept apart, their positions."""
VALUES_AT_ONCE = 2**23  # of one model's log-probabilities (32 MiB)
LOSS, SHARE = (0.0, float("inf")), (0.0, 1.0)
FIRST_TOKEN = "the first token of a block: nothing stands before it"


class ShowConfig(Config):
    """How much of the comparison is kept beside the figures."""

    calibration_bins: int = Field(15, ge=1)
    """Bins of equal width in the calibration error."""
    worst: int = Field(20, ge=0)
    """Tokens on which dense model and student differ most, by either measure."""
    worst_prompts: int = Field(8, ge=0)
    """Prompts of each task on which they do."""
    scatter: int = Field(600, ge=0)
    """Tokens whose two losses are kept."""
    tokens_before: int = Field(40, ge=0)
    """Context of a token that is shown; not more than its block has."""
    tokens_after: int = Field(8, ge=0)
    top: int = Field(3, ge=1)
    """Most likely next tokens that are shown."""


@dataclass(frozen=True)
class TextSample:
    """Blocks of held-out text with the document and the class of every token; all on the CPU."""

    ids: Int[Tensor, "block token"]
    position_ids: Int[Tensor, "block token"] | None
    document: Int[Tensor, "block token"]
    token_class: Int[Tensor, "block token"]
    kind: Kind
    planned_blocks: int

    @classmethod
    def spread(
        cls, blocks: TokenBlocks, count: int, tokenizer: PreTrainedTokenizerBase, kind: Kind
    ) -> "TextSample":
        """`count` blocks, or all there are, evenly spread over the text: neighbours are one document."""
        whole = blocks.first(len(blocks))
        chosen = torch.arange(min(count, len(whole))) * len(whole) // min(count, len(whole))
        document = documents(whole.flatten(), tokenizer.eos_token_id)
        wanted = document.view_as(whole)[chosen]
        token_class = classify(whole.flatten(), tokenizer, kind, wanted.flatten()).view_as(whole)[chosen]
        ids = whole[chosen]
        return cls(ids, blocks.positions(ids), wanted, token_class, kind, count)

    def counts(self, scored: Bool[Tensor, "block target"]) -> dict[str, Any]:
        """What was planned, run, scored and excluded, in tokens."""
        blocks, length = self.ids.shape
        reasons = {
            "the held-out text has fewer blocks than planned": (self.planned_blocks - blocks) * length,
            FIRST_TOKEN: blocks,
            "the logits of a model are not finite": int((~scored).sum()),
        }
        return counted(self.planned_blocks * length, blocks * length, int(scored.sum()), reasons)


@dataclass(frozen=True)
class NextTokens:
    """What one model makes of the tokens at some places: (block, target) or a list; on the CPU."""

    loss: Float[Tensor, "*place"]
    kl: Float[Tensor, "*place"]
    """From the reference."""
    agrees: Bool[Tensor, "*place"]
    """With the reference on the most likely token."""
    confidence: Float[Tensor, "*place"]
    """The probability of the model's most likely token."""
    is_right: Bool[Tensor, "*place"]
    """That token is the one that follows."""

    @classmethod
    def of(cls, own: Tensor, reference: Tensor, target: Int[Tensor, "block target"]) -> "NextTokens":
        """From log-probabilities, (block, target, vocab)."""
        best, likeliest = own.max(-1)
        # Rounding may leave less than nothing of a KL; a NaN stays one.
        kl = F.kl_div(own, reference, reduction="none", log_target=True).sum(-1).clamp(min=0)
        loss = -own.gather(-1, target[..., None])[..., 0]
        agrees = likeliest == reference.argmax(-1)
        return cls(*(x.cpu() for x in (loss, kl, agrees, best.exp(), likeliest == target)))

    @property
    def is_finite(self) -> Bool[Tensor, "*place"]:
        return self.loss.isfinite() & self.kl.isfinite() & self.confidence.isfinite()


@torch.no_grad()
def score_text(
    models: Mapping[str, Forward], sample: TextSample, vocab_size: int, device: torch.device | str
) -> dict[str, NextTokens]:
    """Every model on every block, a few blocks at a time; the first model is the reference."""
    at_once = max(1, VALUES_AT_ONCE // (sample.ids.shape[1] * vocab_size))
    parts: dict[str, list[NextTokens]] = {name: [] for name in models}
    for rows in torch.arange(len(sample.ids)).split(at_once):
        ids = sample.ids[rows].to(device)
        at = None if sample.position_ids is None else sample.position_ids[rows].to(device)
        reference: Tensor | None = None
        for name, forward in models.items():
            own = log_probs(forward(ids, at)[:, :-1])
            reference = own if reference is None else reference
            parts[name].append(NextTokens.of(own, reference, ids[:, 1:]))
    return {
        name: NextTokens(*(torch.cat([getattr(part, key) for part in found]) for key in vars(found[0])))
        for name, found in parts.items()
    }


def compare_text(
    models: Mapping[str, Forward],
    sample: TextSample,
    tokenizer: PreTrainedTokenizerBase,
    config: ShowConfig,
    *,
    vocab_size: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Everything above, for JSON. The first two models are the dense model and the student."""
    records = score_text(models, sample, vocab_size, device)
    reference, other, *_ = records
    scored = torch.stack([found.is_finite for found in records.values()]).all(0)
    document, token_class = sample.document[:, 1:], sample.token_class[:, 1:]
    classes = CLASSES[sample.kind]

    def figures(name: str, chosen: Bool[Tensor, "block target"]) -> dict[str, Any]:
        own, its = (
            NextTokens(*(x[chosen] for x in vars(records[key]).values())) for key in (name, reference)
        )
        return summary(own, its, document[chosen], config.calibration_bins, seed)

    found = {
        name: {
            "overall": figures(name, scored),
            "by_class": {
                label: figures(name, scored & (token_class == index)) for index, label in enumerate(classes)
            },
            "calibration_bins": calibration_bins(
                own.confidence[scored], own.is_right[scored], config.calibration_bins
            ),
        }
        for name, own in records.items()
    }
    return {
        "counts": sample.counts(scored),
        "blocks": len(sample.ids),
        "documents": len(sample.document.unique()),
        "cluster": "document",
        "kind": sample.kind,
        "classes": list(classes),
        "models": found,
        "scatter": scatter(records, token_class, scored, (reference, other), config.scatter),
        "worst": worst_tokens(models, records, sample, scored, tokenizer, config, device),
    }


def summary(
    own: NextTokens, reference: NextTokens, document: Int[Tensor, " token"], bins: int, seed: int
) -> dict[str, Any]:
    """The figures of one model on some tokens (flat records)."""

    def interval(values: Tensor, bounds: tuple[float, float] = LOSS) -> dict[str, Any]:
        return mean_interval(values.double(), document, bounds=bounds, seed=seed)

    return {
        "tokens": len(own.loss),
        "loss": interval(own.loss),
        "loss_difference": interval(own.loss.double() - reference.loss.double(), (-LOSS[1], LOSS[1])),
        "loss_correlation": {
            "pearson": correlation_interval(reference.loss, own.loss, document, seed),
            "spearman": rank_correlation(reference.loss, own.loss),
        },
        "kl": interval(own.kl),
        "top1_agreement": interval(own.agrees, SHARE),
        "top1_accuracy": interval(own.is_right, SHARE),
        "calibration_error": calibration_error(calibration_bins(own.confidence, own.is_right, bins)),
    }


def scatter(
    records: Mapping[str, NextTokens],
    token_class: Int[Tensor, "block target"],
    scored: Bool[Tensor, "block target"],
    names: tuple[str, str],
    count: int,
) -> dict[str, Any]:
    """Both models' losses on some tokens, evenly spread over the text."""
    total = int(scored.sum())
    shown = min(count, total)
    place = torch.arange(shown) * total // max(1, shown)
    x, y = (records[name].loss[scored][place].tolist() for name in names)
    rows = zip(x, y, token_class[scored][place].tolist(), strict=True)
    points = [[round(a, 4), round(b, 4), index] for a, b, index in rows]
    columns = [f"loss of {name}, nats" for name in names] + ["index into classes"]
    return {
        "x": names[0],
        "y": names[1],
        "columns": columns,
        "shown": shown,
        "of": total,
        "points": points,
    }


@torch.no_grad()
def worst_tokens(
    models: Mapping[str, Forward],
    records: Mapping[str, NextTokens],
    sample: TextSample,
    scored: Bool[Tensor, "block target"],
    tokenizer: PreTrainedTokenizerBase,
    config: ShowConfig,
    device: torch.device | str,
) -> dict[str, list[dict[str, Any]]]:
    """The tokens on which the first two models differ most; their blocks are run again for the words."""
    reference, other, *_ = records
    measures = {
        "by_kl": records[other].kl,
        "by_loss_difference": (records[other].loss - records[reference].loss).abs(),
    }
    found = {}
    for key, measure in measures.items():
        ranked = torch.where(scored, measure, -1.0).flatten()
        order = ranked.argsort(descending=True, stable=True)[: min(config.worst, int(scored.sum()))]
        width = scored.shape[1]
        places = [(index // width, index % width) for index in order.tolist()]
        found[key] = [
            {
                **shown_token(sample, block, target + 1, tokenizer, config),
                "kl": records[other].kl[block, target].item(),
                "loss": {name: records[name].loss[block, target].item() for name in (reference, other)},
                "top": {
                    name: likeliest(models[name], sample, block, target, tokenizer, config.top, device)
                    for name in (reference, other)
                },
            }
            for block, target in places
        ]
    return found


def shown_token(
    sample: TextSample, block: int, position: int, tokenizer: PreTrainedTokenizerBase, config: ShowConfig
) -> dict[str, Any]:
    """Where a token stands, and its text between what is before and after it in the block."""
    pieces = token_texts(sample.ids[block].tolist(), tokenizer)
    before = pieces[max(0, position - config.tokens_before) : position]
    return {
        "block": block,
        "position": position,
        "document": int(sample.document[block, position]),
        "class": CLASSES[sample.kind][int(sample.token_class[block, position])],
        "before": "".join(before),
        "token": pieces[position],
        "after": "".join(pieces[position + 1 : position + 1 + config.tokens_after]),
    }


def likeliest(
    forward: Forward,
    sample: TextSample,
    block: int,
    position: int,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    device: torch.device | str,
) -> list[dict[str, Any]]:
    """The most likely tokens after a position, with their probabilities."""
    ids = sample.ids[block : block + 1].to(device)
    at = None if sample.position_ids is None else sample.position_ids[block : block + 1].to(device)
    return top_tokens(log_probs(forward(ids, at)[0, position]).exp(), count, tokenizer)
