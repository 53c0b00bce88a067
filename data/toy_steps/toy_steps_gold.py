"""The world's gold score: it checks every step of a solution and the answer, 0 to 10. It judges and never trains."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

MAX_STEPS, MAX_ANSWER = 5.0, 5.0
_LINE = re.compile(r"(-?\d+) ([+-]) (\d+) = (-?\d+)")
_ANSWER = re.compile(r"The answer is (-?\d+)\.")


def lines_of(response: Any) -> list[str]:
    """Return a response's steps: its lines that are not blank."""
    text = response if isinstance(response, str) else response[-1]["content"]
    return [line.strip() for line in text.split("\n") if line.strip()]


def numbers_of(facts: str | dict[str, Any]) -> list[int]:
    """Return a problem's first number and its changes."""
    return list((json.loads(facts) if isinstance(facts, str) else facts)["numbers"])


def first_wrong(steps: Sequence[str], numbers: Sequence[int]) -> int:
    """Return the index of the first step that is not the next right one; the number of steps where all are."""
    total, done, finished = numbers[0], 1, False
    for index, step in enumerate(steps):
        line, answer = _LINE.fullmatch(step), _ANSWER.fullmatch(step)
        if line and done < len(numbers):
            change = int(line[3]) * (1 if line[2] == "+" else -1)
            if int(line[1]) == total and change == numbers[done] and int(line[4]) == total + change:
                total, done = total + change, done + 1
                continue
        elif answer and done == len(numbers) and not finished and int(answer[1]) == total:
            finished = True
            continue
        return index
    return len(steps)


def gold_parts(response: Any, facts: str | dict[str, Any]) -> dict[str, float]:
    """Score a response: `steps` (0 to 5, by the share of the needed steps before the first wrong one), `answer` (5 if
    the last line says the right one), and their sum `gold`."""
    steps, numbers = lines_of(response), numbers_of(facts)
    right = min(first_wrong(steps, numbers), len(numbers)) / len(numbers)
    answer = _ANSWER.fullmatch(steps[-1]) if steps else None
    values = {"steps": MAX_STEPS * right, "answer": MAX_ANSWER * (bool(answer) and int(answer[1]) == sum(numbers))}
    return {**values, "gold": sum(values.values())}


def parts(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[dict[str, float]]:
    """Call `gold_parts` for a batch; needs the column ``facts``."""
    return [gold_parts(completion, facts) for completion, facts in zip(completions, columns["facts"], strict=True)]


def gold(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return the gold scores (0 to 10), in trl's reward-function signature; needs the column ``facts``."""
    return [judged["gold"] for judged in parts(prompts, completions, **columns)]
