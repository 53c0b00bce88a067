"""Simulated labelers: they label steps up to the first that they find wrong, and rank responses, with slips of their
own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import toy_steps_gold

UNSTEADY, SCALE = 2.0, 1.0
"""Standard deviation of a ranking labeler's hand, in points of gold, and the step of the scale that is read off."""


def label(first_wrong: int, steps: int, rng: random.Random, noise: float) -> list[int | None]:
    """Label a solution's steps as a labeler does: 1 or -1, turned round with probability `noise`; nothing behind the
    first step that the labeler finds wrong.

    A wrong step that slips through leaves steps that go on from a wrong total. They are labelled as if they were right
    by themselves, as all are but a second one in which somebody forgot to borrow."""
    labels: list[int | None] = []
    for index in range(steps):
        wrong = (index == first_wrong) != (rng.random() < noise)
        labels.append(-1 if wrong else 1)
        if wrong:
            break
    return labels + [None] * (steps - len(labels))


def label_steps(
    prompts: Sequence[Any], completions: Sequence[Any], seed: int = 0, noise: float = 0.1, **columns: Any
) -> list[list[int | None]]:
    """Label the steps of a policy's responses; needs the column ``facts``. The draws depend on the seed, the prompt and
    its response alone."""
    labelled = []
    for prompt, completion, facts in zip(prompts, completions, columns["facts"], strict=True):
        steps = toy_steps_gold.lines_of(completion)
        first = toy_steps_gold.first_wrong(steps, toy_steps_gold.numbers_of(facts))
        labelled.append(label(first, len(steps), random.Random(f"{seed}|{prompt}|{completion}"), noise))
    return labelled


def rank(
    prompts: Sequence[Any], responses: Sequence[Sequence[Any]], seed: int = 0, **columns: Any
) -> list[tuple[float, ...]]:
    """Rank the K responses to each prompt, 1 the best; what a labeler's unsteady hand rates alike is a tie. Needs the
    column ``facts``."""
    ranked = []
    for prompt, answers, facts in zip(prompts, responses, columns["facts"], strict=True):
        rng = random.Random(f"{seed}|{prompt}|{answers}")
        scores = [toy_steps_gold.gold_parts(answer, facts)["gold"] + rng.gauss(0.0, UNSTEADY) for answer in answers]
        ratings = [round(score / SCALE) for score in scores]
        levels = sorted(set(ratings), reverse=True)
        ranked.append(tuple(float(levels.index(rating) + 1) for rating in ratings))
    return ranked
