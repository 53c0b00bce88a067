"""The toy world: a seeded, offline miniature of the data of an RLHF run, written as four JSONL files.

toy_requests makes the requests, toy_writers the responses, toy_gold the scores of responses.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import toy_words as words
from toy_requests import FAMILIES, Request, arithmetic
from toy_writers import join, respond, sentence, steps_text


def requests(rng: random.Random, count: int, seen: set[str], balanced: bool = False) -> list[Request]:
    """Make ``count`` requests whose texts are not in ``seen``, and add them to it.

    The families get their own shares, or with ``balanced`` equal ones.

    Raises:
        ValueError: a family has no new request left.
    """
    shares = {family: 1 / len(FAMILIES) if balanced else share for family, (share, _) in FAMILIES.items()}
    wanted = {family: int(count * share) for family, share in shares.items()}
    for family in list(FAMILIES)[: count - sum(wanted.values())]:
        wanted[family] += 1
    found: list[Request] = []
    for family, number in wanted.items():
        misses = 0
        while number > 0:
            request = FAMILIES[family][1](rng)
            if request.text in seen:
                misses += 1
                if misses > 5000:
                    raise ValueError(f"family {family} has no new prompts left ({number} missing); ask for fewer")
                continue
            seen.add(request.text)
            found.append(request)
            number, misses = number - 1, 0
    rng.shuffle(found)
    return found


_WORDS = [*sorted(words.FACTS_OF), *words.COLORS, *words.PLACES, *words.VERBS, *(str(n) for n in range(13))]


def _statement(rng: random.Random) -> str:
    """Make a document of true statements, or of words written twice (from which a model learns to copy)."""
    kind = rng.randrange(7)
    if kind == 0:
        thing = rng.choice(sorted(words.FACTS_OF))
        color, size, place = words.FACTS_OF[thing]
        facts = {"color": color, "size": size, "place": place, "kind": words.KIND_OF[thing]}
        aspects = rng.sample(sorted(facts), 4)
        return " ".join(sentence(thing, aspect, facts[aspect], i == 0) for i, aspect in enumerate(aspects))
    if kind == 1:
        task = rng.choice(sorted(words.STEPS_OF))
        return f"To {task}: {steps_text(words.STEPS_OF[task])}"
    if kind == 2:
        sums = [arithmetic(rng).facts["steps"][0] for _ in range(4)]
        return " ".join(f"{step}." for step in sums)
    if kind >= 4:
        copied = " ".join(rng.choices(_WORDS, k=rng.randint(4, 9)))
        return f"{copied}. {copied}."
    name = rng.choice(sorted(words.THINGS))
    return f"Some {words.PLURALS[name]} are {join(rng.sample(sorted(words.THINGS[name]), 4))}."


def _documents(rng: random.Random, count: int, held_out: set[str], right: float) -> Iterator[dict[str, Any]]:
    families, shares = list(FAMILIES), [share for share, _ in FAMILIES.values()]
    while count > 0:
        if rng.random() < 0.3:
            yield {"text": _statement(rng)}
        else:
            request = FAMILIES[rng.choices(families, shares)[0]][1](rng)
            if request.text in held_out:
                continue
            response, _ = respond(request, rng, right=right, polite=0.15, wordy=0.1)
            yield {"messages": [*request.row()["prompt"], {"role": "assistant", "content": response}]}
        count -= 1


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
    prompts: int = 7000,
    demonstrations: int = 2500,
    pretraining_documents: int = 30000,
    evaluation_prompts: int = 400,
    right: float = 0.6,
    pretraining_right: float = 0.92,
) -> dict[str, Any]:
    """Write the toy world's data into ``folder``; the same arguments give the same bytes.

    ``pretraining.jsonl`` (one document per row: ``messages`` or ``text``), ``demonstrations.jsonl`` (prompt and
    completion), ``prompts.jsonl`` (for comparisons and PPO) and ``eval_prompts.jsonl`` (balanced over the families).
    The last three share no prompt, and no prompt of ``eval_prompts.jsonl`` is in any other file.

    Args:
        folder: the folder to write into; made if missing.
        seed: seed of everything random.
        prompts, demonstrations, pretraining_documents, evaluation_prompts: rows per file.
        right: share of right answers among the demonstrations.
        pretraining_right: the same for the conversations of the pretraining documents.

    Returns:
        Rows per file, and rows per family for each file of prompts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng, seen = random.Random(seed), set[str]()
    held_out = requests(rng, evaluation_prompts, seen, balanced=True)
    held_out_texts = set(seen)
    shown = requests(rng, demonstrations, seen)
    asked = requests(rng, prompts, seen)

    def demonstration(request: Request) -> dict[str, Any]:
        response, quality = respond(request, rng, right=right)
        return {**request.row(), "completion": [{"role": "assistant", "content": response}], "quality": quality}

    rows: dict[str, Iterable[dict[str, Any]]] = {
        "eval_prompts": (request.row() for request in held_out),
        "demonstrations": (demonstration(request) for request in shown),
        "prompts": (request.row() for request in asked),
        "pretraining": _documents(rng, pretraining_documents, held_out_texts, pretraining_right),
    }
    report: dict[str, Any] = {name: _write(folder / f"{name}.jsonl", rows[name]) for name in rows}
    for name, made in (("eval_prompts", held_out), ("demonstrations", shown), ("prompts", asked)):
        report[f"{name}_by_family"] = dict(Counter(request.family for request in made))
    return report
