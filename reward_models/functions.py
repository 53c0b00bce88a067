"""Reward functions without a model, in trl's signature.

Each function here makes a reward function: ``reward_funcs=[reward_model, length_penalty(200)]``. A reward function is
called with lists of prompts and completions (text, or messages whose last turn is the response) and the dataset's
further columns as keywords. It returns one number per completion, or None where it does not apply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

from rlhf.errors import InputError
from rlhf.rows.messages import Messages

RewardFunction = Callable[..., list[float | None]]
Texts = Sequence[str | Messages]
"""Prompts or completions, each as text or as messages."""

NOT_COLUMNS = (
    "completion_ids",
    "parsed_completions",
    "raw_completions",
    "processing_class",
    "stop_ids",
    "trainer_state",
    "log_metric",
    "log_extra",
    "give_step_scores",
    "environments",
)
"""Keywords that trainers pass to a reward function besides the dataset's columns."""
SCORED_PROMPT, SCORED_PREFIX = "scored_prompt", "scored_prefix"
"""Columns that change what a reward model reads (`talks_of`)."""


def response_text(completion: str | Messages) -> str:
    """Return a completion's text: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def conversation(prompt: str | Messages, completion: str | Messages) -> Messages:
    """Join prompt and completion, each text or messages, into one list of messages."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    answered = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    return asked + answered


def talks_of(prompts: Texts, completions: Texts, columns: Mapping[str, object]) -> list[Messages]:
    """Join prompts and completions into the conversations that are scored.

    Where the dataset has a column `scored_prompt` (text or messages), it is read in place of the policy's prompt, and
    where it has `scored_prefix`, that text stands before the response: so a model of whole texts scores continuations
    of their beginnings. A row whose value is None is read as it is. Raises InputError for values of another kind."""
    talks = [conversation(p, c) for p, c in zip(prompts, completions, strict=True)]
    for number, value in _given(columns, SCORED_PROMPT):
        if not isinstance(value, str | list | tuple):
            raise InputError(
                f"column {SCORED_PROMPT}: {value!r} is no text and no messages; write one of them, or null"
            )
        talks[number] = conversation(cast("str | Messages", value), completions[number])
    for number, value in _given(columns, SCORED_PREFIX):
        if not isinstance(value, str):
            raise InputError(f"column {SCORED_PREFIX}: {value!r} is no text; write text, or null")
        *asked, answer = talks[number]
        talks[number] = [*asked, {**answer, "content": value + answer["content"]}]
    return talks


def _given(columns: Mapping[str, object], name: str) -> Iterator[tuple[int, object]]:
    """Yield the number and the value of every response that has one in a column."""
    values = columns.get(name)
    yield from ((n, v) for n, v in enumerate(values if isinstance(values, list | tuple) else ()) if v is not None)


def column_values(function: str, column: str, columns: Mapping[str, object]) -> Sequence[object]:
    """Return the dataset column that `function` needs, one value per response. Raises InputError if it is missing."""
    if column not in columns:
        given = (name for name in columns if name not in NOT_COLUMNS)
        known = ", ".join(sorted(given)) or "none"
        raise InputError(f"{function}: the prompts have no column {column!r}; columns: {known}")
    return cast(Sequence[object], columns[column])


def length_penalty(target_words: int, per_word: float = 0.01) -> RewardFunction:
    """Score ``-per_word * max(0, words - target_words)``: 0 up to the target, then linear.

    Reward models tend to favour length (Singhal et al. 2310.03716); a penalty that starts at 0 does not reward
    empty responses.
    """
    if target_words < 0 or per_word < 0:
        raise InputError(f"length_penalty: target_words={target_words} and per_word={per_word} must be 0 or more")

    def score(prompts: Texts, completions: Texts, **columns: object) -> list[float | None]:
        words = [len(response_text(completion).split()) for completion in completions]
        return [-per_word * max(0, count - target_words) for count in words]

    return _named(score, "length_penalty")


def matches(pattern: str) -> RewardFunction:
    """Score 1 where the whole response, stripped of outer white space, matches the regular expression, else 0.

    ``.`` also matches a line break. For a format: ``matches(r"<think>.*</think>\\s*<answer>.*</answer>")``.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"matches: {pattern!r} is no regular expression: {error}") from None

    def score(prompts: Texts, completions: Texts, **columns: object) -> list[float | None]:
        return [float(compiled.fullmatch(response_text(c).strip()) is not None) for c in completions]

    return _named(score, "matches")


def final_answer(column: str = "answer") -> RewardFunction:
    """Score 1 where the response's last number (its last word, if it has no number) equals the dataset's `column`,
    else 0. None where that column is empty, so that rows of another kind are left to other functions."""

    def score(prompts: Texts, completions: Texts, **columns: object) -> list[float | None]:
        answers = column_values("final_answer", column, columns)
        return [_answer_score(response_text(c), a) for c, a in zip(completions, answers, strict=True)]

    return _named(score, f"final_{column}")


def repetition_penalty(n: int = 3) -> RewardFunction:
    """Score minus the share of a response's word n-grams that repeat an earlier one.

    0 without repetition, towards -1 where a policy loops. Looping is the commonest way to get a high score from a
    reward model with an empty response.
    """
    if n < 1:
        raise InputError(f"repetition_penalty: n={n} must be at least 1")

    def score(prompts: Texts, completions: Texts, **columns: object) -> list[float | None]:
        scores: list[float | None] = []
        for completion in completions:
            words = response_text(completion).lower().split()
            grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            scores.append(len(set(grams)) / len(grams) - 1 if grams else 0.0)
        return scores

    return _named(score, "repetition_penalty")


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _answer_score(text: str, answer: object) -> float | None:
    if answer is None or not str(answer).strip():
        return None
    given, wanted = _final(text), _final(str(answer))
    return float(given is not None and given == wanted)


def _final(text: str) -> float | str | None:
    """Return a text's last number, else its last word in lower case; None where it has neither."""
    numbers = _NUMBER.findall(text)
    if numbers:
        return float(numbers[-1].replace(",", ""))
    words = re.findall(r"\w+", text.lower())
    return words[-1] if words else None


def _named(function: RewardFunction, name: str) -> RewardFunction:
    function.__name__ = name  # trainers log a reward function under this name
    return function
