"""Film reviews to continue, and pairs of a positive and a negative sentence, from the sentence polarity dataset."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.rows.records import write_jsonl
from rlhf.rows.sources import rows

SYSTEM = {"role": "system", "content": "You write film reviews."}
WHOLE = "Write a sentence."
CONTINUE = "Continue the sentence: "
LEAST = 5
"""Words that a sentence has at least beyond its beginning."""


def sentences(source: str) -> list[tuple[str, int]]:
    """Read the distinct sentences and their labels. Raises InputError for a row of another kind."""
    found: dict[str, int] = {}
    for where, row in rows(source, "train"):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or row.get("label") not in (0, 1):
            raise InputError(f"{where}: expected a text and a label, 1 (positive) or 0")
        found.setdefault(" ".join(row["text"].split()), row["label"])
    return list(found.items())


def asked(beginning: str) -> list[dict[str, str]]:
    """Return the prompt that asks for a continuation."""
    return [SYSTEM, {"role": "user", "content": f"{CONTINUE}{beginning}"}]


def whole() -> list[dict[str, str]]:
    """Return the fixed instruction under which whole sentences are compared."""
    return [SYSTEM, {"role": "user", "content": WHOLE}]


def prompt(beginning: str, rest: str, label: int) -> dict[str, Any]:
    """Make a prompt, whose continuations are scored with their beginning as one text."""
    scored = {"scored_prompt": whole(), "scored_prefix": f"{beginning} "}
    return {"prompt": asked(beginning), "continuation": rest, "sentiment": label, **scored}


def pairs_of(rest: list[tuple[str, int]], most: int) -> Iterator[dict[str, Any]]:
    """Pair positive with negative sentences, each of them once."""
    good, bad = ([text for text, label in rest if label == wanted] for wanted in (1, 0))
    for number, (chosen, rejected) in enumerate(zip(good[:most], bad[:most], strict=False)):
        answers = {
            name: [{"role": "assistant", "content": text}]
            for name, text in (("chosen", chosen), ("rejected", rejected))
        }
        yield {"prompt": whole(), **answers, "split_group": number}


def make(
    folder: str | Path,
    seed: int = 0,
    source: str = "cornell-movie-review-data/rotten_tomatoes",
    demonstrations: int = 320,
    prompts: int = 1024,
    evaluation_prompts: int = 200,
    pairs: int = 3500,
    words: int = 5,
) -> dict[str, int]:
    """Write the four files into ``folder``; the same arguments give the same bytes.

    Args:
        folder: the folder to write into; made if missing.
        seed: decides which sentence goes where.
        source: a hub data set, or a file, with a text and a label (1 positive, 0 negative) per row.
        demonstrations, prompts, evaluation_prompts, pairs: rows per file; of pairs as many as sentences are left for.
        words: words of a beginning.

    Returns:
        Rows per file. Raises InputError where the source has too few sentences.
    """
    found = sentences(source)
    random.Random(seed).shuffle(found)
    begun = demonstrations + prompts + evaluation_prompts
    long = [one for one in found if len(one[0].split()) >= words + LEAST][:begun]
    if len(long) < begun:
        raise InputError(f"{source}: {len(long)} sentences of {words + LEAST} words or more, {begun} are asked for")
    cut = [(" ".join(text.split()[:words]), " ".join(text.split()[words:]), label) for text, label in long]
    shown, rest = cut[:demonstrations], cut[demonstrations:]
    used = {text for text, _ in long}
    files: dict[str, list[dict[str, Any]]] = {
        "demonstrations": [
            {"prompt": asked(start), "completion": [{"role": "assistant", "content": end}], "sentiment": label}
            for start, end, label in shown
        ],
        "eval_prompts": [prompt(*one) for one in rest[:evaluation_prompts]],
        "rankings": list(pairs_of([one for one in found if one[0] not in used], pairs)),
    }
    held_out = {row["prompt"][-1]["content"] for row in files["eval_prompts"]}
    distinct = {one[0]: prompt(*one) for one in rest[evaluation_prompts:]}
    files["prompts"] = [row for row in distinct.values() if row["prompt"][-1]["content"] not in held_out]
    for name, content in files.items():
        write_jsonl(Path(folder) / f"{name}.jsonl", content)
    return {name: len(content) for name, content in files.items()}
