"""Tasks: minimal pairs of prompts with a two-way choice of the next token.

A pair is two prompts that differ in one place; the clean one continues with `answer`, the corrupted one
with `distractor`. Both sides are scored, so a batch of n pairs holds 2n examples, and the counterfactual of
example i is example (i + n) mod 2n. The loss is the two-way cross-entropy at the last position
(Gao et al. 2025, section 2.2; chance is ln 2).
"""

import difflib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from extractor.data import Split
from extractor.errors import InputError, UsageError
from extractor.task_specs import HELD_OUT, PREAMBLES, SLOTS, TASKS

MAX_TRIES_PER_PAIR = 50


@dataclass(frozen=True)
class Pair:
    """Two prompts and the next token of each."""

    clean: str
    corrupted: str
    answer: str
    distractor: str
    template: int


@dataclass(frozen=True)
class TaskBatch:
    """2n examples, right-padded: clean prompts first, then the corrupted ones in the same order."""

    ids: Int[Tensor, "example seq"]
    last: Int[Tensor, " example"]  # position of each prompt's last token
    answer: Int[Tensor, " example"]
    distractor: Int[Tensor, " example"]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "TaskBatch":
        return TaskBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def select(self, pairs: Int[Tensor, " pair"]) -> "TaskBatch":
        """The examples of some pairs, cut to their longest prompt."""
        examples = torch.cat([pairs, pairs + len(self) // 2])
        last = self.last[examples]
        ids = self.ids[examples, : int(last.max()) + 1]
        return TaskBatch(ids, last, self.answer[examples], self.distractor[examples])

    def logit_difference(self, logits: Float[Tensor, "example seq vocab"]) -> Float[Tensor, " example"]:
        """Answer minus distractor at each prompt's last position."""
        rows = logits[torch.arange(len(self), device=logits.device), self.last].float()
        answer = rows.gather(1, self.answer[:, None])[:, 0]
        return answer - rows.gather(1, self.distractor[:, None])[:, 0]

    def counterfactual(self, activation: Float[Tensor, "example seq d"]) -> Float[Tensor, "example seq d"]:
        """Each example's activation on its counterfactual prompt, aligned token by token.

        Prompts are aligned by their shared beginning and their shared end; a token that has no
        counterpart keeps its own activation.
        """
        partner = torch.arange(len(self), device=self.ids.device).roll(len(self) // 2)
        other, known = self._alignment()
        aligned = activation[partner[:, None], other]
        return torch.where(known[..., None], aligned, activation)

    def _alignment(self) -> tuple[Int[Tensor, "example seq"], Bool[Tensor, "example seq"]]:
        """For each token, its place in the counterfactual prompt, and whether it has one."""
        half = len(self) // 2
        partner_ids, partner_last = self.ids.roll(half, 0), self.last.roll(half, 0)
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
        same = (self.ids == partner_ids).int().cumprod(1).sum(1)  # length of the shared beginning
        shorter = torch.minimum(self.last, partner_last) + 1
        shared_start = torch.minimum(same, shorter)[:, None]
        shift = (partner_last - self.last)[:, None]
        from_end = (positions + shift).clamp(0, self.ids.shape[1] - 1)
        equal_at_end = (self.ids == partner_ids.gather(1, from_end)) | (shift == 0)
        inside = positions <= self.last[:, None]
        # a token belongs to the shared end if everything from it to the last token agrees
        tail = (equal_at_end | ~inside).flip(1).int().cumprod(1).flip(1).bool() & inside
        at_start = positions < shared_start
        other = torch.where(at_start, positions, from_end)
        return other, (at_start | tail) & inside


def two_way_loss(difference: Float[Tensor, " example"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the two-way choice in nats; chance is ln 2."""
    return F.softplus(-difference).mean()


def accuracy(difference: Float[Tensor, " example"]) -> float:
    """Share of examples whose answer beats its distractor."""
    return (difference > 0).float().mean().item()


def task_names() -> tuple[str, ...]:
    return tuple(TASKS)


def refuse_unknown_tasks(names: Sequence[str]) -> None:
    """Raises UsageError for a name that is not a task."""
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
            known = ", ".join(TASKS)
            raise UsageError(f"unknown task '{name}'; did you mean '{near}'? known: {known}")


def make_pairs(
    name: str, tokenizer: PreTrainedTokenizerBase, *, split: Split, count: int, seed: int
) -> list[Pair]:
    """Distinct pairs of a task, from the split's own templates and contents.

    Raises:
        UsageError: no task of that name.
        InputError: an answer is not one token in this tokenizer, or too few distinct pairs exist.
    """
    refuse_unknown_tasks([name])
    rng = random.Random(f"{name}/{split}/{seed}")
    templates = _part(TASKS[name], split)
    pairs: dict[tuple[str, str], Pair] = {}
    refused = ""
    for _ in range(count * MAX_TRIES_PER_PAIR):
        if len(pairs) == count:
            return list(pairs.values())
        pair = _fill(templates, split, rng)
        problem = _problem(pair, tokenizer)
        if problem:
            refused = problem
        else:
            pairs[pair.clean, pair.corrupted] = pair
    reason = f" ({refused})" if refused else ""
    raise InputError(f"task '{name}': {len(pairs)} of {count} {split} pairs could be made{reason}")


def encode_pairs(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> TaskBatch:
    """Tokenise pairs into one batch."""
    prompts = [pair.clean for pair in pairs] + [pair.corrupted for pair in pairs]
    encoded = [_ids(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in encoded])
    answer = torch.tensor([_ids(tokenizer, pair.answer)[0] for pair in pairs])
    distractor = torch.tensor([_ids(tokenizer, pair.distractor)[0] for pair in pairs])
    return TaskBatch(
        ids=ids,
        last=torch.tensor([len(row) - 1 for row in encoded]),
        answer=torch.cat([answer, distractor]),
        distractor=torch.cat([distractor, answer]),
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _fill(templates: Sequence[tuple[str, str, str, str]], split: Split, rng: random.Random) -> Pair:
    index = rng.randrange(len(templates))
    slots: dict[str, str] = {}
    for slot, pool in SLOTS.items():
        free = [word for word in _part(pool, split) if word not in slots.values()]
        slots[slot] = rng.choice(free)
    preamble = rng.choice(_part(PREAMBLES, split))
    clean, corrupted, answer, distractor = (part.format(**slots) for part in templates[index])
    preamble = preamble.format(**slots)
    return Pair(preamble + clean, preamble + corrupted, answer, distractor, index)


def _problem(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a pair cannot be used with this tokenizer; empty if it can."""
    for prompt, token in ((pair.clean, pair.answer), (pair.corrupted, pair.distractor)):
        ids = _ids(tokenizer, token)
        if len(ids) != 1:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            return f"the answer {token!r} is not one token but {pieces}"
        if _ids(tokenizer, prompt + token) != _ids(tokenizer, prompt) + ids:
            return f"{token!r} does not stay one token after the prompt"
    if pair.answer == pair.distractor:
        return "answer and distractor are the same"
    return ""


def _part(pool: Sequence, split: Split) -> list:
    """The training part (before the marker) or the held-out part of a list."""
    middle = list(pool).index(HELD_OUT)
    return list(pool[:middle] if split == "train" else pool[middle + 1 :])
