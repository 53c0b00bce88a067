"""Make arithmetic problems (sums, short stories), solutions in steps, and wrong ones with a known first error."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

MOST, LARGEST_START, LARGEST_CHANGE = 30, 12, 9

PEOPLE = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")
THINGS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "cards")
GAINS = ("{who} finds {n} more.", "{who} buys {n} more.", "{who} gets {n} from {other}.", "{other} brings {n} more.")
LOSSES = ("{who} loses {n}.", "{who} gives {n} to {other}.", "{who} sells {n}.", "{other} takes {n} of them.")
SUMS = ("Work out {s}.", "What is {s}?", "How much is {s}? Show the steps.", "Solve {s} step by step.")


@dataclass(frozen=True)
class Problem:
    """A number and the changes to it, one after the other: 7, +5, -3 is 7 + 5 - 3."""

    family: str
    text: str
    numbers: tuple[int, ...]

    @property
    def answer(self) -> int:
        return sum(self.numbers)

    def row(self) -> dict[str, Any]:
        """Return the problem as a JSONL row; `facts` is a JSON string, which any table can hold."""
        facts = json.dumps({"numbers": self.numbers})
        prompt = [{"role": "user", "content": self.text}]
        return {"prompt": prompt, "family": self.family, "facts": facts, "answer": str(self.answer)}


def problem(rng: random.Random) -> Problem:
    """Make a problem of two to four changes; no total on the way is below 0 or above 30."""
    while True:
        changes = [rng.choice((1, -1)) * rng.randint(1, LARGEST_CHANGE) for _ in range(rng.randint(2, 4))]
        numbers = (rng.randint(1, LARGEST_START), *changes)
        if all(0 <= total <= MOST for total in accumulate(numbers)):
            break
    return Problem("story", _story(numbers, rng), numbers) if rng.random() < 0.5 else Problem(
        "sum", rng.choice(SUMS).format(s=_sum(numbers)), numbers
    )  # fmt: skip


def _sum(numbers: Sequence[int]) -> str:
    return " ".join([str(numbers[0]), *(f"{'+' if n > 0 else '-'} {abs(n)}" for n in numbers[1:])])


def _story(numbers: Sequence[int], rng: random.Random) -> str:
    who, other = rng.sample(PEOPLE, 2)
    thing = rng.choice(THINGS)
    told = [rng.choice(GAINS if n > 0 else LOSSES).format(who=who, other=other, n=abs(n)) for n in numbers[1:]]
    return " ".join([f"{who} has {numbers[0]} {thing}.", *told, f"How many {thing} does {who} have now?"])


def steps_of(numbers: Sequence[int]) -> list[str]:
    """Return the right solution: a line per change, and the answer."""
    totals = list(accumulate(numbers))
    lines = [_line(a, change, b) for a, change, b in zip(totals, numbers[1:], totals[1:], strict=False)]
    return [*lines, f"The answer is {totals[-1]}."]


def _line(total: int, change: int, result: int) -> str:
    return f"{total} {'+' if change > 0 else '-'} {abs(change)} = {result}"


def flawed_steps(numbers: Sequence[int], rng: random.Random) -> tuple[list[str], int]:
    """Return a wrong solution and the index of its first wrong step. What follows goes on from the wrong total.

    The mistake: a wrong result (six in ten), the other sign, a number that is not the problem's, or a wrong answer."""
    at, kind = rng.randint(1, len(numbers)), rng.random()
    lines, total = [], numbers[0]
    for place, change in enumerate(numbers[1:], start=1):
        used, result = change, total + change
        if place == at:
            if kind < 0.6:
                result = rng.choice([r for r in range(result - 3, result + 4) if r != result and r >= 0])
            elif kind < 0.8:
                used, result = -change, total - change
            else:
                other = rng.choice([n for n in range(1, LARGEST_CHANGE + 1) if n != abs(change)])
                used = other if change > 0 else -other
                result = total + used
        lines.append(_line(total, used, result))
        total = result
    answer = total
    if at == len(numbers):
        answer = rng.choice([n for n in range(max(0, total - 3), total + 4) if n != total])
    return [*lines, f"The answer is {answer}."], at - 1


def forgetful_steps(numbers: Sequence[int], rng: random.Random, forgets: float) -> tuple[list[str], int | None]:
    """Return the solution of one who, where ten must be borrowed (12 - 5), forgets it with this probability (= 17), and
    the index of the first such step, if there is one. What follows goes on from the wrong total."""
    lines, total, first = [], numbers[0], None
    for place, change in enumerate(numbers[1:]):
        result = total + change
        if change < 0 and total // 10 > result // 10 and rng.random() < forgets:
            result, first = result + 10, place if first is None else first
        lines.append(_line(total, change, result))
        total = result
    return [*lines, f"The answer is {total}."], first


def solution(
    numbers: Sequence[int], rng: random.Random, right: float, forgets: float = 0.0
) -> tuple[list[str], int | None]:
    """Return a solution and the index of its first wrong step, if it has one. It is by one who forgets to borrow with
    the probability `forgets`; where that does no harm, it is right with the probability `right`."""
    lines, first = forgetful_steps(numbers, rng, forgets)
    return (lines, first) if first is not None or rng.random() < right else flawed_steps(numbers, rng)
