"""Judges that compare two responses: both orders always, ties, abstentions, and win rates that know of length.

A judge is a `PairJudge` (a language model with a template of `rlhf.evals.questions`) or a `ScoreJudge` (anything that
scores single responses: a reward model, a rubric grader, a function). Language models prefer what is shown first, or
second, more than they admit: a `PairJudge` is asked twice, in both orders, and a pair on which the orders disagree is a
tie. An answer outside the template's choices is an abstention: it is counted, and wins for nobody.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rlhf.calls import call
from rlhf.errors import InputError, RunStopped, reason
from rlhf.evals.answers import LITTLE, Answered, NoAnswer, Spent
from rlhf.evals.asks import Asks
from rlhf.evals.questions import PairTemplate
from rlhf.intervals import Estimate, clustered_mean
from rlhf.quantiles import student_quantile
from rlhf.rows.messages import Messages
from rlhf.rows.records import Prompt, split_key

Metrics = dict[str, dict[str, float | int]]
"""Numbers by name: value, low, high, n."""


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt; `columns` are further data of the row."""

    prompt: Messages
    first: str
    second: str
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What pairs that are not independent share: the column `split_group`, else the prompt."""
        return split_key(Prompt(self.prompt, dict(self.columns)))


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a pair: 1 for its first response, 0 for its second, 0.5 for a tie; None for an abstention.

    forward: asked in the pair's order; backward: asked in the other order. A judge of single responses has no order,
    and both are the same.
    """

    forward: float | None
    backward: float | None
    share: float | None = None
    """The first response's part of the probability, a tie halved, as the mean of both orders."""
    together: float | None = None
    """The probability that all choices had, as the mean of both orders."""

    @property
    def win(self) -> float | None:
        """The mean of both orders: 1 and 0 where they agree, 0.5 where they contradict each other."""
        return None if self.forward is None or self.backward is None else (self.forward + self.backward) / 2

    @property
    def decision(self) -> float | None:
        """The mean of both orders, rounded away from a half: a win and a tie are a win."""
        return None if self.win is None else float((self.win > 0.5) + 0.5 * (self.win == 0.5))

    @property
    def flipped(self) -> bool:
        """Whether each order preferred the other response."""
        return {self.forward, self.backward} == {0.0, 1.0}


class Judge(Protocol):
    """What compares pairs, and counts what that costs."""

    spent: Spent

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]: ...


class PairJudge:
    """A language model that compares two responses by a template, in both orders.

    least: the probability that a template's choices must have together; below it, the model would have written
    something else, and the answer is an abstention.
    """

    def __init__(self, ask: Asks, template: PairTemplate, least: float = LITTLE) -> None:
        self.ask, self.template, self.least = ask, template, least
        self.spent: Spent = getattr(ask, "spent", None) or Spent()

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Return a verdict per pair. Raises what the model, its server or its text fails with."""
        forward = [self.template.question(pair.prompt, pair.first, pair.second) for pair in pairs]
        backward = [self.template.question(pair.prompt, pair.second, pair.first) for pair in pairs]
        answers = [self._read(answer) for answer in self.ask([*forward, *backward], list(self.template.choices))]
        return [_both(one, other) for one, other in zip(answers[: len(pairs)], answers[len(pairs) :], strict=True)]

    def _read(self, answer: Answered | Exception) -> _Order | None:
        """Return what an answer says of the response that was shown first."""
        if isinstance(answer, NoAnswer):
            return None
        if isinstance(answer, InputError | RunStopped):
            raise answer
        if isinstance(answer, Exception):
            raise RunStopped(f"judge: {type(answer).__name__}: {reason(answer)}") from answer
        if answer.together < self.least:
            return None
        said = dict(zip(self.template.choices.values(), answer.probabilities, strict=True))
        first, second, tie = (said.get(meaning, 0.0) for meaning in ("first", "second", "tie"))
        most = max(said.values())
        decided = 1.0 if first == most > max(second, tie) else 0.0 if second == most > max(first, tie) else 0.5
        return _Order(decided, first + tie / 2, answer.together)


@dataclass(frozen=True)
class _Order:
    """One order's answer, of the response that it showed first."""

    decided: float
    share: float
    together: float


def _both(forward: _Order | None, backward: _Order | None) -> Verdict:
    if forward is None or backward is None:
        ours = None if forward is None else forward.decided
        theirs = None if backward is None else 1.0 - backward.decided
        return Verdict(ours, theirs)
    share = (forward.share + 1.0 - backward.share) / 2
    return Verdict(forward.decided, 1.0 - backward.decided, share, (forward.together + backward.together) / 2)


class ScoreJudge:
    """A judge of single responses: the higher score wins.

    score: a function in the signature of a reward function, f(prompts, completions, **columns) -> scores. A response
    that it gives None, or answers with a `NoAnswer`, makes the pair an abstention. margin: scores that are no further
    apart are a tie.
    """

    def __init__(self, score: Callable[..., Any], margin: float = 0.0) -> None:
        self.score, self.margin = score, margin
        self.spent = Spent()

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Return a verdict per pair; each response to a prompt with its columns is scored once. Raises InputError for
        scores that are no numbers."""
        keys = [json.dumps([pair.prompt, dict(pair.columns)], sort_keys=True, default=repr) for pair in pairs]
        rows: dict[tuple[str, str], tuple[Pair, str]] = {}
        for key, pair in zip(keys, pairs, strict=True):
            for text in (pair.first, pair.second):
                rows.setdefault((key, text), (pair, text))
        scores = dict(zip(rows, self._scores([*rows.values()]) if rows else [], strict=True))
        verdicts = []
        for key, pair in zip(keys, pairs, strict=True):
            first, second = scores[key, pair.first], scores[key, pair.second]
            if first is None or second is None:
                verdicts.append(Verdict(None, None))
                continue
            won = 0.5 if abs(first - second) <= self.margin else float(first > second)
            verdicts.append(Verdict(won, won))
        return verdicts

    def _scores(self, rows: Sequence[tuple[Pair, str]]) -> list[float | None]:
        asked: Spent | None = getattr(getattr(self.score, "ask", None), "spent", None)
        before, started = asked.tokens if asked else None, time.perf_counter()
        names = sorted({name for pair, _ in rows for name in pair.columns})
        columns = {name: [pair.columns.get(name) for pair, _ in rows] for name in names}
        prompts = [pair.prompt for pair, _ in rows]
        completions = [[{"role": "assistant", "content": text}] for _, text in rows]
        given = list(call(self.score, {**columns, "prompts": prompts, "completions": completions}))
        after = asked.tokens if asked else None
        tokens = None if before is None or after is None else after - before
        self.spent.add(len(rows), tokens, time.perf_counter() - started)
        if len(given) != len(rows):
            raise InputError(f"judge: got {len(given)} scores for {len(rows)} responses; return one of each")
        return [self._number(value) for value in given]

    def _number(self, value: object) -> float | None:
        if value is None or isinstance(value, NoAnswer):
            return None
        if isinstance(value, Exception):
            raise value
        number = float(value)  # type: ignore[arg-type]
        if not math.isfinite(number):
            raise InputError(f"judge: a score is {number}; scores must be finite numbers")
        return number


# ------------------------------------------------------------------------------------------------- win rates


def compared(pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> Metrics:
    """Compute what verdicts on pairs (a policy's response first, the baseline's second) come to, over prompts.

    `win_rate` is the mean of both orders' decisions, ties counting half; `length_controlled_win_rate` what it would be
    between answers of the same length, from the same decisions. `abstentions` are a share of all pairs, the rest of
    those with a verdict; flips and position are left out for a judge of single responses, which has no order.
    Raises InputError where the judge abstains from every pair.
    """
    there = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.win is not None]
    if not there:
        raise InputError(f"judge: abstains from all {len(pairs)} pairs; does the model answer with a letter?")
    keys = [pair.key for pair, _ in there]
    wins = [float(verdict.win or 0.0) for _, verdict in there]
    lengths = [(len(pair.first), len(pair.second)) for pair, _ in there]
    everywhere = [pair.key for pair in pairs]
    found = {
        "win_rate": clustered_mean(wins, keys),
        "length_controlled_win_rate": length_controlled(wins, lengths, keys),
        "ties": clustered_mean([float(v.decision == 0.5) for _, v in there], keys),
        "longer_preferred": clustered_mean(longer(wins, lengths), keys),
    }
    if any(verdict.together is not None for _, verdict in there):
        found |= {
            "flip_rate": clustered_mean([float(v.flipped) for _, v in there], keys),
            "position_bias": position_bias([v for _, v in there], keys),
        }
    metrics = {name: measured(estimate, len(there)) for name, estimate in found.items()}
    abstained = clustered_mean([float(verdict.win is None) for verdict in verdicts], everywhere)
    return metrics | {"abstentions": measured(abstained, len(pairs))}


def measured(estimate: Estimate, n: int) -> dict[str, float | int]:
    """Return an estimate over n pairs as a metric."""
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": n}


def position_bias(verdicts: Sequence[Verdict], keys: Sequence[Hashable]) -> Estimate:
    """Compute how much more often than half a judge prefers what it is shown first, over both orders of every pair."""
    shown_first = [((v.forward or 0.0) + 1.0 - (v.backward or 0.0)) / 2 - 0.5 for v in verdicts]
    return clustered_mean(shown_first, keys, bounds=(-0.5, 0.5))


def longer(wins: Sequence[float], lengths: Sequence[tuple[int, int]]) -> list[float]:
    """Return how far each verdict goes to the longer response: 1, 0, or between; 0.5 where both are equally long."""
    return [0.5 if a == b else win if a > b else 1.0 - win for win, (a, b) in zip(wins, lengths, strict=True)]


def length_controlled(
    shares: Sequence[float], lengths: Sequence[tuple[int, int]], keys: Sequence[Hashable], level: float = 0.95
) -> Estimate:
    """Compute the win rate that a judge would give between responses of the same length, after AlpacaEval 2.

    Dubois et al. (2404.04475) fit a logistic regression to a judge's preferences (from its probabilities) and predict
    them with the length term at 0. Here shares in [0, 1] are fitted, decisions or probabilities: the rate is of what
    they are. With l the lengths in characters::

        logit p = theta + phi tanh((l_first - l_second) / sd(l_first - l_second))        the rate is sigmoid(theta)

    Where we depart: their third term, how hard an instruction is, is estimated over a whole leaderboard of models and
    left out here, where there are two; instead of their L2 penalty, four observations of weight 1/2 are added, one of
    each outcome at either end of the tanh, so that the fit exists where all pairs are won or length decides every one.
    The interval is the sandwich estimate's over prompts with Student's quantile, carried through the sigmoid. Like any
    regression it takes from length only what a linear term in tanh explains: a judge that likes length because longer
    answers are better is corrected, too.
    """
    apart = np.array([first - second for first, second in lengths], dtype=np.float64)
    spread = float(apart.std()) or 1.0
    ends = np.array([-1.0, -1.0, 1.0, 1.0])
    x = np.column_stack([np.ones(len(apart) + 4), np.append(np.tanh(apart / spread), ends)])
    y = np.append(np.asarray(shares, dtype=np.float64), [0.0, 1.0, 0.0, 1.0])
    weight = np.append(np.ones(len(apart)), np.full(4, 0.5))
    fit = np.zeros(2)
    for _ in range(50):  # Newton's steps; the function is concave
        p = 1 / (1 + np.exp(-x @ fit))
        slope = x.T @ (weight * (y - p))
        curvature = (x * (weight * p * (1 - p))[:, None]).T @ x
        step = np.linalg.solve(curvature, slope)
        fit = fit + step * min(1.0, 4.0 / max(1e-12, float(np.abs(step).max())))
        if float(np.abs(step).max()) < 1e-10:
            break
    p = 1 / (1 + np.exp(-x @ fit))
    pulls: dict[Hashable, np.ndarray] = {}
    for key, pull in zip([*keys, *(("added", n) for n in range(4))], x * (weight * (y - p))[:, None], strict=True):
        pulls[key] = pulls.get(key, np.zeros(2)) + pull
    outer = sum((np.outer(pull, pull) for pull in pulls.values()), np.zeros((2, 2)))
    inverse = np.linalg.inv((x * (weight * p * (1 - p))[:, None]).T @ x)
    clusters = len(pulls)
    variance = clusters / (clusters - 1) * float((inverse @ outer @ inverse)[0, 0])
    half = student_quantile((1 + level) / 2, max(1, clusters - 5)) * math.sqrt(variance)
    theta = float(fit[0])
    return Estimate(*((1 + math.tanh(value / 2)) / 2 for value in (theta, theta - half, theta + half)))
