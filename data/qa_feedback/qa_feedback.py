"""Convert Fine-Grained RLHF's question answering feedback to rankings of four answers.

python data/qa_feedback/qa_feedback.py dev_feedback.json runs/qa_feedback/data         # passages, demonstrations
python data/qa_feedback/qa_feedback.py dev_feedback.json runs/qa_feedback/all.jsonl    # questions and rankings alone
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.rows.records import read_demonstrations, read_rankings, split_by_prompt, split_key, write_jsonl

ANSWERS = [f"prediction {number}" for number in (1, 2, 3, 4)]


def question(row: dict[str, Any]) -> str:
    """Return the question alone."""
    return str(row["question"])


def with_passages(row: dict[str, Any]) -> str:
    """Return the passages, each under its title, and the question behind them."""
    texts = []
    for title, *sentences in row["passages"]:
        texts.append(f"{title}\n{' '.join(sentences).removeprefix(title).strip()}")
    return "\n\n".join([*texts, f"Question: {row['question']}"])


def ranking(row: dict[str, Any], prompt: Callable[[dict[str, Any]], str] = question) -> dict[str, Any] | None:
    """Rank a question's four answers by comparisons lost minus comparisons won; return None where all are ties.

    prompt: makes the prompt of the row. `preference` has the pairs in the order 1-2, 1-3, 1-4, 2-3, 2-4, 3-4. 0: equal,
    1: the first is better, 2: the second.
    """
    ranks = [0] * len(ANSWERS)
    for (first, second), choice in zip(combinations(range(len(ANSWERS)), 2), row["preference"], strict=True):
        if choice:
            winner, loser = (first, second) if choice == 1 else (second, first)
            ranks[winner] -= 1
            ranks[loser] += 1
    responses = [row[name] for name in ANSWERS]
    return {"prompt": prompt(row), "responses": responses, "ranks": ranks} if any(ranks) else None


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Read the file's rows: a JSON list, as published, or JSON lines; gzip if the name ends in .gz."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; download it from github.com/allenai/FineGrainedRLHF")
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    yield from json.loads(text) if text.lstrip().startswith("[") else map(json.loads, filter(None, text.split("\n")))


def make(
    folder: str | Path, seed: int = 0, source: str = "dev_feedback.json", held_out_fraction: float = 0.25
) -> dict[str, int]:
    """Write rankings.jsonl, with the passages in the prompts, and demonstrations.jsonl, the answers that people
    corrected, into ``folder``.

    seed, held_out_fraction: those of the run's `data` section. The questions that `rlhf rankings` then holds out have
    no demonstration. Returns rows per file.
    """
    read = list(rows_of(Path(source)))
    ranked = [made for row in read if (made := ranking(row, with_passages))]
    _, held_out = split_by_prompt(read_rankings(ranked), held_out_fraction, seed)
    apart = {split_key(one) for one in held_out}
    shown = [
        {"prompt": with_passages(row), "completion": str(row["feedback"]["corrected-prediction"])}
        for row in read
        if str(row["feedback"].get("corrected-prediction") or "").strip()
    ]
    keys = map(split_key, read_demonstrations(shown))
    files = {"rankings": ranked, "demonstrations": [r for r, key in zip(shown, keys, strict=True) if key not in apart]}
    for name, content in files.items():
        write_jsonl(Path(folder) / f"{name}.jsonl", content)
    return {name: len(content) for name, content in files.items()}


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise InputError("give two paths: the published dev_feedback.json, and the file or folder to write")
    if not argv[1].endswith(".jsonl"):
        print(f"{argv[1]}: {make(argv[1], source=argv[0])}")
        return
    rankings = [ranking(row) for row in rows_of(Path(argv[0]))]
    kept = [row for row in rankings if row is not None]
    write_jsonl(argv[1], kept)
    print(f"{argv[1]}: {len(kept)} questions, {len(rankings) - len(kept)} of ties only left out")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
