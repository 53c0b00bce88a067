"""Film reviews to continue: a sentence is used once, pairs are of unlike label, the lexicon reads whole texts."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import import_function
from rlhf.errors import InputError
from rlhf.rows.records import check_disjoint, read_demonstrations, read_prompts, read_rankings, split_by_prompt

MAKE = "data/sentiment/sentiment.py:make"
SIZES = {"demonstrations": 20, "prompts": 30, "evaluation_prompts": 10, "pairs": 15}


def sentence(number: int) -> str:
    return (
        f"review number {number} has {'quite ' * (number % 3)}a plot , some {'bad' if number % 2 else 'fine'} scenes ."
    )


@pytest.fixture
def source(tmp_path: Path) -> str:
    rows = [{"text": sentence(n), "label": 1 - n % 2} for n in range(120)] + [{"text": "short and sweet", "label": 1}]
    (tmp_path / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "source.jsonl")


def made(folder: Path, source: str, **settings: Any) -> dict[str, list[dict[str, Any]]]:
    counts = import_function(MAKE)(folder, seed=1, source=source, **{**SIZES, **settings})
    files = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in counts}
    assert {name: len(rows) for name, rows in files.items()} == counts
    return files


def whole(row: dict[str, Any]) -> str:
    return f"{row['prompt'][-1]['content'].removeprefix('Continue the sentence: ')} {row['continuation']}"


def test_every_sentence_is_used_once(tmp_path, source):
    files = made(tmp_path / "data", source)
    prompts = [*files["prompts"], *files["eval_prompts"]]
    shown = [row | {"continuation": row["completion"][0]["content"]} for row in files["demonstrations"]]
    pairs = [row[side][0]["content"] for row in files["rankings"] for side in ("chosen", "rejected")]
    used = [*map(whole, prompts), *map(whole, shown), *pairs]
    assert len(used) == len(set(used)) == 30 + 10 + 20 + 30
    assert set(used) <= {sentence(n) for n in range(120)} | {"short and sweet"}
    for row in files["rankings"]:
        assert "bad" not in row["chosen"][0]["content"]
        assert "bad" in row["rejected"][0]["content"]
    for row in [*prompts, *shown]:
        assert row["sentiment"] == int("bad" not in whole(row))


def test_what_is_scored_is_the_sentence_under_the_pairs_instruction(tmp_path, source):
    files = made(tmp_path / "data", source)
    fixed = {json.dumps(row["prompt"]) for row in files["rankings"]}
    assert len(fixed) == 1
    for row in files["prompts"]:
        assert {json.dumps(row["scored_prompt"])} == fixed
        assert row["scored_prefix"] + row["continuation"] == whole(row)


def test_the_files_are_read_split_and_made_again(tmp_path, source):
    made(tmp_path / "one", source)
    made(tmp_path / "two", source)
    for name in ("demonstrations", "prompts", "eval_prompts", "rankings"):
        assert (tmp_path / f"one/{name}.jsonl").read_bytes() == (tmp_path / f"two/{name}.jsonl").read_bytes()
    rest, held_out = split_by_prompt(read_rankings(tmp_path / "one/rankings.jsonl"), 0.2, 0)
    assert (len(rest), len(held_out)) == (12, 3)
    check_disjoint(rest, held_out)
    check_disjoint(read_prompts(tmp_path / "one/prompts.jsonl"), read_prompts(tmp_path / "one/eval_prompts.jsonl"))
    assert len(read_demonstrations(tmp_path / "one/demonstrations.jsonl")) == 20, "none is taken for one to avoid"


def test_too_few_sentences_and_rows_of_another_kind(tmp_path, source):
    with pytest.raises(InputError, match="120 sentences of 10 words or more, 1040 are asked for"):
        made(tmp_path / "data", source, prompts=1010)
    Path(source).write_text('{"text": "fine", "label": 3}\n')
    with pytest.raises(InputError, match=r"source\.jsonl:1: expected a text and a label, 1 \(positive\) or 0"):
        made(tmp_path / "data", source)


def test_the_real_sentences_are_enough(tmp_path, shared_data):
    file = shared_data / "sentence_polarity.jsonl.gz"
    counts = import_function(MAKE)(tmp_path, seed=0, source=str(file))
    assert counts["rankings"] == 3500
    assert counts["prompts"] > 1000
    with gzip.open(file, "rt") as rows:
        labels = {" ".join(row["text"].split()): row["label"] for row in map(json.loads, rows)}
    for ranking in read_rankings(tmp_path / "rankings.jsonl"):
        assert [labels[text] for text in ranking.responses] == [1, 0]


def test_the_lexicon_reads_beginning_and_continuation():
    pytest.importorskip("vaderSentiment")
    lexicon = import_function("data/sentiment/sentiment_lexicon.py:lexicon")
    answers = ["good and great .", [{"role": "assistant", "content": "bad and awful ."}], "of the film ."]
    good, bad, neutral = lexicon(["a"] * 3, answers)
    assert -1 <= bad < neutral == 0 < good <= 1
    begun = lexicon(["a"] * 2, ["of the film .", "of the film ."], scored_prefix=["a great part ", None])
    assert begun[0] > begun[1] == 0


def test_a_missing_lexicon_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    lexicon = import_function("data/sentiment/sentiment_lexicon.py:lexicon")
    sys.modules[lexicon.__module__].analyzer.cache_clear()
    with pytest.raises(InputError, match="vaderSentiment is missing; pip install"):
        lexicon(["a"], ["good"])
