"""Which pairs can be asked in a tokenizer: the answers must be its next tokens after the prompts."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from extractor.task_text import Pair

FIRST_TOKEN = "~"  # ends an answer of our own templates of which the first token is meant


def tokens_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of many texts at once, without any added at the start or the end."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def check_answers(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    *,
    marked: bool = False,
) -> list[tuple[Pair, str]]:
    """Each pair with its answers as single tokens, and why it cannot be asked; empty if it can.

    Prompt and answer together must tokenise as the prompt's tokens and the answer's one: a merge over
    the boundary would make another prompt of it. `max_tokens` is the longest prompt that is read.
    `marked`: a `~` at an answer's end is a mark, no text.
    """
    asked = [(pair.clean, pair.answer) for pair in pairs] + [
        (pair.corrupted, pair.distractor) for pair in pairs
    ]
    prompts = tokens_of([prompt for prompt, _ in asked], tokenizer)
    mark = FIRST_TOKEN if marked else ""
    whole = tokens_of([prompt + answer.removesuffix(mark) for prompt, answer in asked], tokenizer)
    answers = {answer: _as_token(answer, mark, tokenizer) for answer in {answer for _, answer in asked}}
    problems = []
    for (_, answer), before, after in zip(asked, prompts, whole, strict=True):
        text, token, problem = answers[answer]
        if not problem and after[: len(before) + 1] != [*before, token]:
            problem = f"{text!r} does not stay one token after the prompt"
        if not problem and max_tokens is not None and len(before) > max_tokens:
            problem = f"a prompt has {len(before)} tokens, the model reads {max_tokens}"
        problems.append(problem)
    checked = []
    for index, pair in enumerate(pairs):
        tokens = replace(pair, answer=answers[pair.answer][0], distractor=answers[pair.distractor][0])
        problem = problems[index] or problems[index + len(pairs)]
        if not problem and tokens.answer == tokens.distractor:
            problem = f"answer and distractor are both {tokens.answer!r}"
        checked.append((tokens, problem))
    return checked


def _as_token(answer: str, mark: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int, str]:
    """An answer's text and id as one token, and why it is none."""
    text = answer.removesuffix(mark)
    (ids,) = tokens_of([text], tokenizer)
    if ids and text != answer:
        text = tokenizer.decode(ids[:1])
        (ids,) = tokens_of([text], tokenizer)
    if len(ids) != 1:
        return text, -1, f"the answer {text!r} is not one token but {tokenizer.convert_ids_to_tokens(ids)}"
    return text, ids[0], ""
