"""RewardBench 2: its rows, the shared top score, the formula of Ties by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from reward_models.card.pairs import scored_pairs
from reward_models.card.rewardbench2 import rewardbench2, ties_score
from rlhf.errors import InputError
from rlhf.rows.records import read_rankings


def row(subset: str, chosen: list[str], rejected: list[str], name: str = "1") -> dict:
    return {"id": name, "prompt": f"Q {name} {subset}", "chosen": chosen, "rejected": rejected, "subset": subset,
            "num_correct": len(chosen), "models": ["m"]}  # fmt: skip


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_rows_become_rankings(tmp_path: Path):
    (found,) = read_rankings(write(tmp_path / "a.jsonl", [row("Math", ["right"], ["w1", "w2", "w3"])]))
    assert found.responses == ("right", "w1", "w2", "w3")
    assert found.ranks == (1, 2, 2, 2)
    assert (found.columns["subset"], found.columns["id"]) == ("Math", "1")
    with pytest.raises(InputError, match=r"c\.jsonl:2: chosen: missing, and the rows before are RewardBench 2"):
        read_rankings(write(tmp_path / "c.jsonl", [row("Math", ["a"], ["b"]), {"prompt": "q"}]))


def test_a_shared_top_score_counts_its_part(tmp_path: Path):
    """Right alone, shared by two, wrong: (1 + 1/2 + 0) / 3. Another subset: 1. The mean is over subsets."""
    rows = [row("Math", ["r"], ["w1", "w2", "w3"], str(n)) for n in range(3)] + [row("Safety", ["r"], ["w"], "s")]
    rankings = read_rankings(write(tmp_path / "a.jsonl", rows))
    scores = [[4.0, 1.0, 2.0, 3.0], [4.0, 4.0, 1.0, 0.0], [1.0, 2.0, 2.0, 0.0], [1.0, 0.0]]
    found = rewardbench2(scored_pairs(rankings, scores))
    assert found is not None
    assert found["sections"] == pytest.approx({"Math": 0.5, "Safety": 1.0})
    assert found["mean"] == pytest.approx(0.75)
    assert set(found["sections_ci"]) == {"Math", "Safety"}
    mine = read_rankings(write(tmp_path / "b.jsonl", [row("Mine", ["r"], ["w"])]))
    assert rewardbench2(scored_pairs(mine, [[1.0, 0.0]])) is None


def test_the_formula_of_ties_by_hand():
    """Prompt 1: ref leads by 2; tied: right 3 .. 4, wrong 1: lead 2, spread 1. Prompt 2: ref wrong by 1; tied: right 1
    .. 5, wrong 0: lead 1, spread 4. Ref 3 has no tied twin."""
    scores = {
        ("ref", "1"): (np.array([3.0]), np.array([1.0, 0.0])),
        ("tied", "1"): (np.array([3.0, 4.0]), np.array([1.0])),
        ("ref", "2"): (np.array([0.0]), np.array([1.0])),
        ("tied", "2"): (np.array([1.0, 5.0, 2.0]), np.array([0.0, -1.0])),
        ("ref", "3"): (np.array([1.0]), np.array([0.0])),
    }
    tied, ref = 1.0, 2 / 3
    preferred, hard = 1 / 2, 1 / 2
    margin = (math.tanh(2 / 1 - 1) + math.tanh(-1 / 4 - 1)) / 2
    expected = 0.3 * tied + 0.3 * ref + 0.2 * preferred + 0.2 * hard + 0.01 * margin
    assert ties_score(scores) == pytest.approx(expected)
    equal = {("ref", "1"): (np.array([0.0]), np.array([0.0])), ("tied", "1"): (np.array([0.0, 0.0]), np.array([0.0]))}
    assert ties_score(equal) == 0.0, "0 / 0 counts as 0"
    assert ties_score({("ref", "1"): (np.array([1.0]), np.array([0.0]))}) == pytest.approx(0.3)


def test_ties_among_the_subsets(tmp_path: Path):
    rows = [row("Ties", ["a"], ["x", "y"], "ref:7"), row("Ties", ["a", "b", "c"], ["x", "y"], "tied:7")]
    rankings = read_rankings(write(tmp_path / "a.jsonl", rows))
    found = rewardbench2(scored_pairs(rankings, [[2.0, 0.0, 1.0], [3.0, 3.5, 3.25, 0.0, 1.0]]))
    assert found is not None
    # leads 1 and 2, spread 0.5: all four parts hold
    assert found["sections"]["Ties"] == pytest.approx(1.0 + 0.01 * math.tanh(1 / 0.5 - 1))
    bad = read_rankings(write(tmp_path / "b.jsonl", [row("Ties", ["a"], ["x"], "7")]))
    with pytest.raises(InputError, match="has ref:N or tied:N"):
        rewardbench2(scored_pairs(bad, [[1.0, 0.0]]))
