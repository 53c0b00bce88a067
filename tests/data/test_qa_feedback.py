"""The converter of Fine-Grained RLHF's question answering feedback: no comparison is lost or reversed."""

from __future__ import annotations

import gzip
import importlib.util
import json
from itertools import combinations
from pathlib import Path

import pytest

from rlhf.errors import InputError
from rlhf.rows.records import check_disjoint, read_demonstrations, read_rankings, split_by_prompt

FILE = Path(__file__).resolve().parents[2] / "data/qa_feedback/qa_feedback.py"


@pytest.fixture
def converter():
    spec = importlib.util.spec_from_file_location("qa_feedback", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(preference: list[int], question: str = "Which?") -> dict:
    return {"question": question, "preference": preference} | {f"prediction {k}": f"answer {k}" for k in (1, 2, 3, 4)}


def test_ranks_by_hand(converter):
    # 1 = 2, 1 beats 3, 4 beats 1, 2 beats 3, 4 beats 2, 4 beats 3
    made = converter.ranking(row([0, 1, 2, 1, 2, 2]))
    assert made == {"prompt": "Which?", "responses": [f"answer {k}" for k in (1, 2, 3, 4)], "ranks": [0, 0, 3, -3]}
    assert converter.ranking(row([0] * 6)) is None


def test_files_as_published_and_as_lines(converter, tmp_path, capsys):
    rows = [row([1] * 6, "One?"), row([0] * 6, "Two?"), row([2] * 6, "Three?")]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(r) + "\n" for r in rows))
    for name in ("list.json", "lines.jsonl.gz"):
        converter.main([str(tmp_path / name), str(tmp_path / "out.jsonl")])
        assert [r.ranks for r in read_rankings(tmp_path / "out.jsonl")] == [(-3, -1, 1, 3), (3, 1, -1, -3)]
        assert "2 questions, 1 of ties only left out" in capsys.readouterr().out
    with pytest.raises(InputError, match="no such file; download it from"):
        converter.main([str(tmp_path / "absent.json"), "x"])


def test_passages_stand_before_the_question_and_held_out_questions_are_not_demonstrated(converter, tmp_path, capsys):
    passages = [["Sea", "Sea\n\nIt is wet.", "It is wide."], ["Sky", "It is high."]]
    rows = [
        row([1] * 6, f"What is {n}?") | {"passages": passages, "feedback": {"corrected-prediction": f"It is {n}."}}
        for n in range(12)
    ]
    rows[3]["feedback"] = {"corrected-prediction": " "}
    (tmp_path / "list.json").write_text(json.dumps(rows))
    converter.main([str(tmp_path / "list.json"), str(tmp_path / "data")])
    ranked = read_rankings(tmp_path / "data/rankings.jsonl")
    shown = read_demonstrations(tmp_path / "data/demonstrations.jsonl")
    wanted = "Sea\nIt is wet. It is wide.\n\nSky\nIt is high.\n\nQuestion: What is 0?"
    assert ranked[0].prompt[0]["content"] == wanted
    assert len(ranked) == 12
    rest, held_out = split_by_prompt(ranked, 0.25, 0)  # as `rlhf rankings` with the config's settings
    check_disjoint(shown, held_out)
    rest = [one for one in rest if "What is 3?" not in one.prompt[0]["content"]]
    assert [one.prompt for one in shown] == [one.prompt for one in rest]
    assert shown[0].response.startswith("It is ")


def test_every_real_comparison_is_kept(converter, shared_data, tmp_path):
    with gzip.open(shared_data / "qa_feedback.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    kept = 0
    for one in rows:
        made = converter.ranking(one)
        for (i, j), choice in zip(combinations(range(4), 2), one["preference"], strict=True):
            if choice:
                better, worse = (i, j) if choice == 1 else (j, i)
                assert made["ranks"][better] < made["ranks"][worse]
                kept += 1
    assert kept == 2104
