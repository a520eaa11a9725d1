"""Tasks: minimal pairs of prompts with a two-way choice of the next token.

A pair is two prompts that differ in one place; the clean one continues with `answer`, the corrupted one
with `distractor`. Both sides are scored, so a batch of n pairs holds 2n examples, and the counterfactual of
example i is example (i + n) mod 2n. The loss is the two-way cross-entropy at the last position
(Gao et al. 2025, section 2.2; chance is ln 2).
"""

import difflib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from extractor.errors import InputError, UsageError
from extractor.task_controls import random_answers
from extractor.task_files import is_task_file, pairs_of_file, read_task_file
from extractor.task_specs import TASKS
from extractor.task_text import Pair, TaskSpec, write_pair
from extractor.task_tokens import check_answers, tokens_of
from extractor.task_words import TaskSplit

NONSENSE = "nonsense/"  # before a task's name: its prompts, random answers
ROUNDS_WITHOUT_NEWS = 6  # a task is given up when so many rounds of candidates bring no new pair


@dataclass(frozen=True)
class TaskBatch:
    """2n examples, right-padded: clean prompts first, then the corrupted ones in the same order."""

    ids: Int[Tensor, "example seq"]
    last: Int[Tensor, " example"]  # position of each prompt's last token
    answer: Int[Tensor, " example"]
    distractor: Int[Tensor, " example"]
    cluster: Int[Tensor, " example"] | None = None
    """What intervals resample together: the template; every pair by itself, where none is given."""

    def __post_init__(self) -> None:
        if self.cluster is None:
            pairs = torch.arange(len(self) // 2, device=self.ids.device)
            object.__setattr__(self, "cluster", pairs.repeat(2))

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "TaskBatch":
        return TaskBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def select(self, pairs: Int[Tensor, " pair"]) -> "TaskBatch":
        """The examples of some pairs, cut to their longest prompt."""
        examples = torch.cat([pairs, pairs + len(self) // 2])
        last = self.last[examples]
        ids = self.ids[examples, : int(last.max()) + 1]
        rest = (getattr(self, name)[examples] for name in ("answer", "distractor", "cluster"))
        return TaskBatch(ids, last, *rest)

    def join(self, other: "TaskBatch") -> "TaskBatch":
        """The pairs of both; their clusters stay apart."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        fields = []
        for name in ("ids", "last", "answer", "distractor", "cluster"):
            parts = [getattr(self, name), getattr(other, name)]
            if name == "ids":
                parts = [F.pad(ids, (0, width - ids.shape[1])) for ids in parts]
            if name == "cluster":
                parts[1] = parts[1] + int(parts[0].max()) + 1
            (clean, corrupted), (clean2, corrupted2) = (part.chunk(2) for part in parts)
            fields.append(torch.cat([clean, clean2, corrupted, corrupted2]))
        return TaskBatch(*fields)

    def logit_difference(self, logits: Float[Tensor, "example seq vocab"]) -> Float[Tensor, " example"]:
        """Answer minus distractor at each prompt's last position; logits of all positions, or of that one."""
        where = self.last if logits.shape[1] > 1 else torch.zeros_like(self.last)
        rows = logits[torch.arange(len(self), device=logits.device), where].float()
        answer = rows.gather(1, self.answer[:, None])[:, 0]
        return answer - rows.gather(1, self.distractor[:, None])[:, 0]

    def counterfactual(self, activation: Float[Tensor, "example seq d"]) -> Float[Tensor, "example seq d"]:
        """Each example's activation on its counterfactual prompt, aligned token by token.

        From the change on, the two prompts are aligned by their ends, before it by their beginnings. Where
        one is longer by n tokens, the last n before the change stand for them in the other: a token put in
        takes the place of one before it, and one taken out becomes like that one. Without that, what only
        one of the prompts has could be moved on neither.
        """
        partner = torch.arange(len(self), device=self.ids.device).roll(len(self) // 2)
        shift = (self.last[partner] - self.last)[:, None]
        own = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
        is_moved = (own >= self.aligned_from()[:, None]) & (own <= self.last[:, None])
        other = torch.where(is_moved, own + shift, own).clamp(min=0)
        return torch.where(is_moved[..., None], activation[partner[:, None], other], activation)

    def aligned_from(self) -> Int[Tensor, " example"]:
        """The first token of each prompt that has another counterpart than itself.

        That is where the prompts part, and in the shorter one as many tokens sooner as it lacks.
        """
        half = len(self) // 2
        shared = (self.ids == self.ids.roll(half, 0)).int().cumprod(1).sum(1)
        other_last = self.last.roll(half)
        parts = torch.minimum(shared, torch.minimum(self.last, other_last) + 1)
        return (parts - (other_last - self.last).clamp(min=0)).clamp(min=0)


def two_way_loss(difference: Float[Tensor, " example"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the two-way choice in nats; chance is ln 2."""
    return F.softplus(-difference).mean()


def accuracy(difference: Float[Tensor, " example"]) -> float:
    """Share of examples whose answer beats its distractor."""
    return (difference > 0).float().mean().item()


def task_names() -> tuple[str, ...]:
    """The tasks that come with the package."""
    return tuple(TASKS)


def task_label(name: str) -> str:
    """What a task is called in files and tables: its name, or the stem of a user's `.jsonl` file."""
    if name.startswith(NONSENSE):
        return f"nonsense-{task_label(name.removeprefix(NONSENSE))}"
    return Path(name).stem if is_task_file(name) else name


def refuse_unknown_tasks(names: Sequence[str]) -> None:
    """Refuse names that are neither tasks nor sound task files, before any work is done.

    Raises:
        UsageError: a name that is not a task, or two tasks that would be called the same.
        InputError: a task file that is refused.
    """
    for name in (name.removeprefix(NONSENSE) for name in names):
        if is_task_file(name):
            read_task_file(name)
        elif name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
            known = ", ".join(TASKS)
            raise UsageError(f"unknown task '{name}'; did you mean '{near}'? known: {known}")
    labels = Counter(task_label(name) for name in set(names))
    labels.update(set(TASKS) & set(map(task_label, filter(is_task_file, names))))
    if twice := [label for label, times in labels.items() if times > 1]:
        raise UsageError(f"two tasks are called '{twice[0]}'; rename the file of one")


def make_pairs(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: TaskSplit,
    count: int,
    seed: int,
    max_tokens: int | None = None,
) -> list[Pair]:
    """Distinct pairs of a task, from the split's own templates and contents, all templates in turn.

    `nonsense/with_as` are the pairs of `with_as` with random answers (`extractor.task_controls`).
    `max_tokens` is what the model reads: pairs with a longer prompt are left out, in a file refused.

    Raises:
        UsageError: no task of that name.
        InputError: an answer is not one token in this tokenizer, too few distinct pairs exist, or the
            task's file is refused.
    """
    if name.startswith(NONSENSE):
        base = name.removeprefix(NONSENSE)
        pairs = make_pairs(base, tokenizer, split=split, count=count, seed=seed, max_tokens=max_tokens)
        return random_answers(pairs, tokenizer, f"{base}/{seed}")
    if is_task_file(name):
        return pairs_of_file(name, tokenizer, split=split, count=count, seed=seed, max_tokens=max_tokens)
    refuse_unknown_tasks([name])
    rng = random.Random(f"{name}/{split}/{seed}")
    pairs, refused = _fitting_pairs(TASKS[name], tokenizer, split, count, rng, max_tokens)
    if len(pairs) < count:
        reason = f" ({refused})" if refused else ""
        raise InputError(f"task '{name}': {len(pairs)} of {count} {split} pairs could be made{reason}")
    return pairs


def _fitting_pairs(
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    split: TaskSplit,
    count: int,
    rng: random.Random,
    max_tokens: int | None,
) -> tuple[list[Pair], str]:
    """Up to `count` pairs that the tokenizer can be asked, and why another one cannot be."""
    pairs: dict[tuple[str, str], Pair] = {}
    refused, without_news = "", 0
    templates = range(len(spec.templates(split)))
    order = rng.sample(templates, len(templates))
    while len(pairs) < count and without_news < ROUNDS_WITHOUT_NEWS:
        before = len(pairs)
        rounds = -(-(count - before) // len(order))
        candidates = [write_pair(spec, split, index, rng) for _ in range(rounds) for index in order]
        for pair, problem in check_answers(candidates, tokenizer, max_tokens, marked=True):
            if problem:
                refused = problem
            else:
                pairs[pair.clean, pair.corrupted] = pair
        without_news = 0 if len(pairs) > before else without_news + 1
    return list(pairs.values())[:count], refused


def encode_pairs(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> TaskBatch:
    """Tokenise pairs into one batch."""
    encoded = tokens_of([pair.clean for pair in pairs] + [pair.corrupted for pair in pairs], tokenizer)
    width = max(map(len, encoded))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in encoded])
    answer = torch.tensor([row[0] for row in tokens_of([pair.answer for pair in pairs], tokenizer)])
    distractor = torch.tensor([row[0] for row in tokens_of([pair.distractor for pair in pairs], tokenizer)])
    return TaskBatch(
        ids=ids,
        last=torch.tensor([len(row) - 1 for row in encoded]),
        answer=torch.cat([answer, distractor]),
        distractor=torch.cat([distractor, answer]),
        cluster=torch.tensor([pair.template for pair in pairs]).repeat(2),
    )
