"""Simulated labelers, each with weights, noise and an error rate of their own, who see the gold score through noise.

Two of them agree about 73% of the time (without ties), like InstructGPT's (Ouyang et al. 2022, section 3.4).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import toy_gold


@dataclass(frozen=True)
class Labeler:
    """One labeler: utility = weights . parts + noise, rounded to a scale whose step is ``step``."""

    content: float
    relevance: float
    courtesy: float
    brevity: float
    noise: float  # standard deviation, in points of gold
    error_rate: float  # probability that a response's rating is random
    step: float = 1.25  # utilities closer than this can get the same rating, a tie


LABELERS: dict[str, Labeler] = {
    "ada": Labeler(1.0, 1.0, 1.8, 1.0, noise=2.1, error_rate=0.04),
    "ben": Labeler(1.1, 0.7, 2.4, 0.8, noise=2.3, error_rate=0.05),
    "cleo": Labeler(0.9, 1.2, 1.5, 1.5, noise=2.2, error_rate=0.06),
    "dan": Labeler(0.8, 1.0, 3.0, 1.0, noise=2.4, error_rate=0.05),
    "eve": Labeler(1.2, 1.0, 1.2, 0.6, noise=2.0, error_rate=0.04),
}


def _ratings(name: str, judged: Sequence[dict[str, float]], rng: random.Random) -> list[int]:
    who = LABELERS[name]
    ratings = []
    for parts in judged:
        utility = sum(getattr(who, part) * parts[part] for part in ("content", "relevance", "courtesy", "brevity"))
        utility += rng.gauss(0.0, who.noise)
        if rng.random() < who.error_rate:
            utility = rng.uniform(0.0, 10.0)
        ratings.append(round(utility / who.step))
    return ratings


def _ranks(ratings: Sequence[int]) -> tuple[float, ...]:
    levels = sorted(set(ratings), reverse=True)
    return tuple(float(levels.index(rating) + 1) for rating in ratings)


def _judged(index: int, prompt: Any, responses: Sequence[Any], columns: dict[str, Any]) -> list[dict[str, float]]:
    family, facts = columns["family"][index], columns["facts"][index]
    return [toy_gold.gold_parts(prompt, response, family=family, facts=facts) for response in responses]


def rank(
    prompts: Sequence[Any], responses: Sequence[Sequence[Any]], seed: int = 0, **columns: Any
) -> list[tuple[float, ...]]:
    """Rank the K responses to each prompt, by one labeler drawn for that prompt.

    The draws depend on the seed, the prompt and its responses alone, not on the order or number of prompts.

    Args:
        prompts: one per entry of ``responses``.
        responses: K responses per prompt, as text or messages.
        seed: seed of the labelers, their noise and their errors.
        columns: ``family`` and ``facts``, lists with one entry per prompt; others are ignored.

    Returns:
        One tuple of K ranks per prompt: 1.0 is best, equal ranks are a tie.
    """
    return rank_as(sorted(LABELERS), prompts, responses, seed, **columns)


def rank_as(
    names: Sequence[str], prompts: Sequence[Any], responses: Sequence[Sequence[Any]], seed: int = 0, **columns: Any
) -> list[tuple[float, ...]]:
    """Rank as `rank` does, each prompt's responses by one of the named labelers."""
    ranked = []
    for index, (prompt, answers) in enumerate(zip(prompts, responses, strict=True)):
        rng = random.Random(f"{seed}|{prompt}|{answers}")
        name = rng.choice(names)
        ranked.append(_ranks(_ratings(name, _judged(index, prompt, answers, columns), rng)))
    return ranked


def shuffled(
    prompts: Sequence[Any], responses: Sequence[Sequence[Any]], seed: int = 0, **columns: Any
) -> list[tuple[float, ...]]:
    """Call `rank` and shuffle each prompt's ranks: a control without any preference."""
    rng = random.Random(f"{seed}|shuffled")
    return [tuple(rng.sample(ranks, len(ranks))) for ranks in rank(prompts, responses, seed, **columns)]


def agreement(
    prompts: Sequence[Any], responses: Sequence[Sequence[Any]], seed: int = 0, **columns: Any
) -> dict[str, float]:
    """Measure how often two different labelers order a pair alike.

    Returns:
        ``agreement`` over the pairs that neither rates as a tie, ``tie_rate`` (the first labeler's),
        ``gold_agreement`` (the first labeler against gold, without ties of either) and the number of ``pairs``.
    """
    alike = strict = tied = right = decided = pairs = 0
    for index, (prompt, answers) in enumerate(zip(prompts, responses, strict=True)):
        rng = random.Random(f"{seed}|agreement|{prompt}|{answers}")
        judged = _judged(index, prompt, answers, columns)
        first, second = (_ratings(name, judged, rng) for name in rng.sample(sorted(LABELERS), 2))
        for a, b in combinations(range(len(answers)), 2):
            pairs += 1
            one, other = first[a] - first[b], second[a] - second[b]
            truth = judged[a]["gold"] - judged[b]["gold"]
            tied += one == 0
            if one and other:
                strict += 1
                alike += (one > 0) == (other > 0)
            if one and truth:
                decided += 1
                right += (one > 0) == (truth > 0)
    return {
        "agreement": alike / max(1, strict),
        "tie_rate": tied / max(1, pairs),
        "gold_agreement": right / max(1, decided),
        "pairs": float(pairs),
    }
