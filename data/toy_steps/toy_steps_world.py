"""The world of steps: arithmetic worked out line by line, with labels of the steps, written as JSONL files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import toy_steps_labelers
from toy_steps_problems import Problem, problem, solution, steps_of


def problems(rng: random.Random, count: int, seen: set[str]) -> list[Problem]:
    """Make problems whose texts are not in `seen`, and add them to it."""
    found: list[Problem] = []
    while len(found) < count:
        made = problem(rng)
        if made.text not in seen:
            seen.add(made.text)
            found.append(made)
    return found


def _documents(
    rng: random.Random, count: int, held_out: set[str], right: float, forgets: float
) -> Iterator[dict[str, Any]]:
    """Make pretraining documents: a problem with its solution, or (three in ten) the lines of two right solutions."""
    while count > 0:
        made = problem(rng)
        if rng.random() < 0.3:
            yield {"text": "\n".join([*steps_of(made.numbers)[:-1], *steps_of(problem(rng).numbers)[:-1]])}
        elif made.text in held_out:
            continue
        else:
            lines, _ = solution(made.numbers, rng, right, forgets)
            yield {"messages": [*made.row()["prompt"], {"role": "assistant", "content": "\n".join(lines)}]}
        count -= 1


def _labelled(made: Problem, rng: random.Random, right: float, forgets: float, noise: float) -> dict[str, Any]:
    lines, wrong = solution(made.numbers, rng, right, forgets)
    labels = toy_steps_labelers.label(len(lines) if wrong is None else wrong, len(lines), rng, noise)
    return {**made.row(), "steps": lines, "labels": labels}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            count += 1
    return count


def make(
    folder: str | Path,
    seed: int = 0,
    prompts: int = 3000,
    demonstrations: int = 1500,
    pretraining_documents: int = 24000,
    evaluation_prompts: int = 300,
    solutions: int = 4000,
    held_out_solutions: int = 600,
    noise: float = 0.1,
    right: float = 0.7,
    labelled_right: float = 0.4,
    pretraining_right: float = 0.9,
    forgets: float = 0.0,
) -> dict[str, Any]:
    """Write the world's data into ``folder``; the same arguments give the same bytes.

    No two files but pretraining's share a problem, and it asks none of those that measure. Problems are told apart by
    their wording alone: numbers return in other words, and pretraining's `text` rows hold right lines of any numbers,
    held-out ones too (the card counts both).

    Args:
        folder: the folder to write into; made if missing.
        seed: seed of everything random.
        prompts, demonstrations, pretraining_documents, evaluation_prompts: rows per file.
        solutions, held_out_solutions: rows of ``steps.jsonl`` and of ``steps_held_out.jsonl``, whose labels are true.
        noise: probability that a labeler's label of a step is wrong.
        right, labelled_right, pretraining_right: share of right solutions among the demonstrations, the labelled
            solutions and the pretraining documents.
        forgets: probability that whoever writes a solution forgets to borrow where it is needed: a mistake that many
            share, so that a vote does not find it. Those who forget are not counted in the shares of right solutions.

    Returns:
        Rows per file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng, seen = random.Random(seed), set[str]()
    held_out = problems(rng, evaluation_prompts, seen)
    measured = problems(rng, held_out_solutions, seen)
    apart = set(seen)
    shown, asked, labelled = (problems(rng, count, seen) for count in (demonstrations, prompts, solutions))

    def demonstration(made: Problem) -> dict[str, Any]:
        lines, _ = solution(made.numbers, rng, right, forgets)
        return {**made.row(), "completion": [{"role": "assistant", "content": "\n".join(lines)}]}

    rows: dict[str, Iterable[dict[str, Any]]] = {
        "eval_prompts": (made.row() for made in held_out),
        "demonstrations": (demonstration(made) for made in shown),
        "prompts": (made.row() for made in asked),
        "steps": (_labelled(made, rng, labelled_right, forgets, noise) for made in labelled),
        "steps_held_out": (_labelled(made, rng, labelled_right, forgets, 0.0) for made in measured),
        "pretraining": _documents(rng, pretraining_documents, apart, pretraining_right, forgets),
    }
    return {name: _write(folder / f"{name}.jsonl", rows[name]) for name in rows}
