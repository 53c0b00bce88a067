"""Convert Fine-Grained RLHF's question answering feedback to rankings of four answers.

python data/qa_feedback/qa_feedback.py dev_feedback.json runs/qa_feedback/all.jsonl
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.rows.records import write_jsonl

ANSWERS = [f"prediction {number}" for number in (1, 2, 3, 4)]


def ranking(row: dict[str, Any]) -> dict[str, Any] | None:
    """Rank a question's four answers by comparisons lost minus comparisons won; return None where all are ties.

    `preference` has the pairs in the order 1-2, 1-3, 1-4, 2-3, 2-4, 3-4. 0: equal, 1: the first is better, 2: the
    second.
    """
    ranks = [0] * len(ANSWERS)
    for (first, second), choice in zip(combinations(range(len(ANSWERS)), 2), row["preference"], strict=True):
        if choice:
            winner, loser = (first, second) if choice == 1 else (second, first)
            ranks[winner] -= 1
            ranks[loser] += 1
    responses = [row[name] for name in ANSWERS]
    return {"prompt": row["question"], "responses": responses, "ranks": ranks} if any(ranks) else None


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Read the file's rows: a JSON list, as published, or JSON lines; gzip if the name ends in .gz."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; download it from github.com/allenai/FineGrainedRLHF")
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    yield from json.loads(text) if text.lstrip().startswith("[") else map(json.loads, filter(None, text.split("\n")))


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise InputError("give two paths: the published dev_feedback.json, and the file to write")
    rankings = [ranking(row) for row in rows_of(Path(argv[0]))]
    kept = [row for row in rankings if row is not None]
    write_jsonl(argv[1], kept)
    print(f"{argv[1]}: {len(kept)} questions, {len(rankings) - len(kept)} of ties only left out")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
