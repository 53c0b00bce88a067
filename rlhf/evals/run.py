"""Run an eval: ask the policy, let its class or a judge read the answers, and keep every item with what it earned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.errors import InputError
from rlhf.evals.asking import Asker, Sampler, seed_of
from rlhf.evals.classes import Verdict
from rlhf.evals.grading import Eval
from rlhf.evals.modelgraded import ModelBasedClassify
from rlhf.evals.samples import Sample
from rlhf.rows.messages import Messages

COMPLETION = "completion"
"""The name of the answer where an eval asks for one alone."""


@dataclass(frozen=True)
class Trial:
    """One try at an item: the policy's answers by their places, and the verdict on them."""

    answers: Mapping[str, str]
    verdict: Verdict
    reply: str | None = None
    """What the judge wrote, or the log-probabilities that decided."""


@dataclass(frozen=True)
class Item:
    """A sample, what was asked, and its trials."""

    sample: Sample
    asked: Messages
    trials: tuple[Trial, ...]

    def row(self, name: str) -> dict[str, Any]:
        """Return the row of items.jsonl."""
        return {
            "eval": name,
            "key": self.sample.key,
            **({} if self.sample.group == self.sample.key else {"group": self.sample.group}),
            "where": self.sample.where,
            "prompt": self.asked,
            "ideal": list(self.sample.ideal),
            "trials": [
                {
                    "answers": dict(trial.answers),
                    "numbers": dict(trial.verdict.numbers),
                    "picked": trial.verdict.picked,
                    **({} if trial.reply is None else {"reply": trial.reply}),
                }
                for trial in self.trials
            ],
        }


@dataclass(frozen=True)
class Result:
    """An eval's items, each with its trials."""

    eval: Eval
    items: tuple[Item, ...]


def run_eval(
    one: Eval,
    policy: Asker,
    sampler: Sampler,
    *,
    seed: int = 0,
    samples: int = 1,
    judge: Asker | None = None,
    judge_tokens: int = 512,
) -> Result:
    """Ask the policy for `samples` answers to every item, and judge them.

    An eval's own max_tokens and temperature go before the sampler's. Raises InputError where this eval cannot be run:
    prompts that the template refuses or that are too long, no judge.
    """
    own = Sampler(
        sampler.max_new_tokens if one.max_new_tokens is None else one.max_new_tokens,
        sampler.temperature if one.temperature is None else one.temperature,
    )
    if samples > 1 and own.temperature == 0:
        raise InputError(
            f"{one.where}: its own temperature 0 would give {samples} equal answers; lower samples_per_item"
        )
    if isinstance(one.grader, ModelBasedClassify):
        if judge is None:
            raise InputError(f"{one.where}: a judge reads its answers; name a model or a server with --judge")
        return _judged(one, one.grader, policy, judge, own, seed, samples, judge_tokens)
    prompts = [prompt for sample in one.samples for prompt in [policy.target.prompt(sample.messages)] * samples]
    seeds = [seed_of(seed, sample.messages, n) for sample in one.samples for n in range(samples)]
    texts = iter(policy.sample(prompts, seeds, own))
    items = []
    for sample in one.samples:
        found = [next(texts).text for _ in range(samples)]
        trials = [Trial({COMPLETION: text}, one.grader.verdict(text, sample.ideal)) for text in found]
        items.append(Item(sample, sample.messages, tuple(trials)))
    return Result(one, tuple(items))


def run_by_likelihood(one: Eval, policy: Asker) -> Result:
    """Let the policy choose among each item's `choices` by their log-probabilities as the whole answer.

    `accuracy` goes by the log-probability itself: the choice that would be sampled most often. `accuracy_per_byte` goes
    by that divided by the choice's length in UTF-8 (lm-eval's acc_norm), which takes the advantage from short ones.
    `confidence` is the chosen one's share of the choices' probability, of which `calibration_error` is made.
    Raises InputError for an eval without choices, or one whose answers a judge reads.
    """
    if isinstance(one.grader, ModelBasedClassify):
        raise InputError(f"{one.where}: a judge reads its answers, and likelihood scoring writes none")
    prompts = [policy.target.prompt(sample.messages) for sample in one.samples]
    choices = [sample.choices for sample in one.samples]
    items = []
    for sample, texts, logprobs in zip(one.samples, choices, policy.logprobs(prompts, choices), strict=True):
        per_byte = [value / len(text.encode()) for value, text in zip(logprobs, texts, strict=True)]
        best, best_per_byte = (texts[max(range(len(texts)), key=values.__getitem__)] for values in (logprobs, per_byte))
        share = 1 / sum(math.exp(value - max(logprobs)) for value in logprobs)
        numbers = {"accuracy": float(best in sample.ideal), "accuracy_per_byte": float(best_per_byte in sample.ideal)}
        numbers["confidence"] = share
        shown = ", ".join(f"{text!r} {value:.2f}" for text, value in zip(texts, logprobs, strict=True))
        trial = Trial({COMPLETION: best}, Verdict(numbers, best), f"log-probabilities in nats: {shown}")
        items.append(Item(sample, sample.messages, (trial,)))
    return Result(one, tuple(items))


def _judged(
    one: Eval,
    grader: ModelBasedClassify,
    policy: Asker,
    judge: Asker,
    sampler: Sampler,
    seed: int,
    samples: int,
    judge_tokens: int,
) -> Result:
    asked = [grader.asks(sample) for sample in one.samples]
    drawn = range(samples * grader.compared)
    wanted = [(messages, n) for places in asked for messages in places.values() for n in drawn]
    answers = policy.sample(
        [policy.target.prompt(messages) for messages, _ in wanted],
        [seed_of(seed, messages, n) for messages, n in wanted],
        sampler,
    )
    texts = iter(answer.text for answer in answers)
    tried: list[list[dict[str, list[str]]]] = []
    for places in asked:
        found = {place: [next(texts) for _ in drawn] for place in places}
        size = grader.compared
        tried.append([{p: own[t * size : (t + 1) * size] for p, own in found.items()} for t in range(samples)])
    questions = [
        grader.question(sample, found)
        for sample, trials in zip(one.samples, tried, strict=True)
        for found in trials
    ]  # fmt: skip
    replies = iter(_replies(one, grader, judge, questions, judge_tokens))
    items = []
    for sample, places, trials in zip(one.samples, asked, tried, strict=True):
        kept = []
        for found in trials:
            choice, reply = next(replies)
            kept.append(Trial(dict(_named(found)), grader.verdict(sample, choice), reply))
        shown = sample.messages or [turn for messages in places.values() for turn in messages]
        items.append(Item(sample, shown, tuple(kept)))
    return Result(one, tuple(items))


def _replies(
    one: Eval, grader: ModelBasedClassify, judge: Asker, questions: Sequence[Messages], judge_tokens: int
) -> list[tuple[str, str]]:
    """Return the judge's choice and its words for every question."""
    if grader.by_letter:
        return [(row["choice"], row["reply"]) for row in judge.choose(questions, grader.choices)]
    prompts = [judge.target.prompt(question) for question in questions]
    answers = judge.sample(prompts, [0] * len(prompts), Sampler(one.judge_tokens or judge_tokens, 0.0))
    return [(grader.chosen(answer.text), answer.text) for answer in answers]


def _named(found: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    for place, texts in found.items():
        for n, text in enumerate(texts):
            yield (place if len(texts) == 1 else f"{place} {n + 1}"), text
