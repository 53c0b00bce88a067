"""recipes/best_of_n.py: samples that stay and grow, curves, votes, demonstrations that SFT takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from reference import recipe, tiny_chain

from rlhf.rows.records import read_demonstrations


@pytest.fixture
def folders(tmp_path: Path, tiny_model, tiny_tokenizer) -> tuple[Path, Path]:
    return tiny_chain.chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)


SCORES = """
def short(prompts, completions, **columns):
    return [-float(len(str(completion))) for completion in completions]

def good(prompts, completions, **columns):
    return [float("e" in str(completion)) for completion in completions]
"""


def flags(tmp_path: Path, model: Path, *more: object) -> list[object]:
    (tmp_path / "scores.py").write_text(SCORES)
    rows = [{"prompt": f"Count to {n}, please", "answer": str(n), "chosen": "a", "rejected": "b"} for n in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    data, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    return ["--model", model, "--data", data, "--output_dir", out, "--max_new_tokens", 8,
            "--scorers", f"{tmp_path}/scores.py:short", *more]  # fmt: skip


def run(*given: object, code: int = 0) -> recipe.Result:
    result = recipe.run("best_of_n", *given)
    assert result.code == code, result.out + result.err
    return result


def numbers(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "best_of_n.json").read_text())


def test_samples_grow_and_other_scorers_sample_nothing(tmp_path, folders):
    judge = ("--judge", f"{tmp_path}/scores.py:good")
    first = run(*flags(tmp_path, folders[0], "--n", 2, *judge))
    assert "1 of 5 prompts come twice" in first.out
    assert "8 of 8 responses to draw" in first.out
    before = (tmp_path / "out" / "samples.jsonl").read_bytes()
    assert "complete, skipped" in run(*flags(tmp_path, folders[0], "--n", 2, *judge)).out
    more = run(*flags(tmp_path, folders[0], "--n", 5, *judge, "--scorers", f"{tmp_path}/scores.py:short,{folders[1]}"))
    assert "12 of 20 responses to draw" in more.out
    assert (tmp_path / "out" / "samples.jsonl").read_bytes().startswith(before)
    found = numbers(tmp_path)
    assert {"policy", "short_at_5", "short_gain", "reward_model_at_5", "reward_model_gain"} == found["metrics"].keys()
    for curve in found["curves"].values():
        assert [point["n"] for point in curve] == [1, 2, 3, 4, 5]
        assert curve[0]["value"] == pytest.approx(found["metrics"]["policy"]["value"])
        assert all(point["low"] <= point["value"] <= point["high"] for point in curve)
    assert found["curves"]["short"][4]["kl_nats"] == pytest.approx(np.log(5) - 4 / 5)
    assert "responses to draw" not in run(*flags(tmp_path, folders[0], "--n", 3, *judge)).out
    assert "<svg" in (tmp_path / "out" / "best_of_n.html").read_text()
    other = run(*flags(tmp_path, folders[0], "--n", 3, "--temperature", 0.5), code=2)
    assert "config.temperature was 1.0, now 0.5" in other.err


def test_the_chosen_are_the_best_and_train_sft(tmp_path, folders):
    run(*flags(tmp_path, folders[0], "--n", 4, "--max_new_tokens", 80))
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    chosen = [json.loads(line) for line in (tmp_path / "out" / "chosen.jsonl").read_text().splitlines()]
    assert 0 < len(chosen) <= 4
    for row in chosen:
        made, text = row["provenance"], row["completion"][0]["content"]
        key = next(s["key"] for s in samples if s["text"] == text and s["k"] == made["sample"])
        fine = [s["text"] for s in samples if s["key"] == key and s["stopped"] and s["text"].strip()]
        assert len(str(text)) == min(map(len, fine))
        assert made["chosen_by"] == "short"
        assert made["n"] == 4
        assert {"prompt", "completion", "provenance"} == row.keys()
        assert made["columns"]["answer"] in row["prompt"][0]["content"]
    assert len(read_demonstrations(tmp_path / "out" / "chosen.jsonl")) == len(chosen)
    least = run(*flags(tmp_path, folders[0], "--n", 4, "--max_new_tokens", 80, "--min_scores", "{short: 0.0}"))
    assert "4 of 4 prompts left out" in least.out
    assert "rlhf sft" not in least.out  # there is nothing to train on
    assert "was interrupted" not in least.out
    assert (tmp_path / "out" / "chosen.jsonl").read_text() == ""


def test_votes_are_measured_by_a_column(tmp_path, folders):
    given = flags(tmp_path, folders[0], "--n", 3, "--answer", "[0-9a-z]", "--answer_column", "answer")
    run(*given, "--choose", "weighted_short")
    found = numbers(tmp_path)
    assert {"majority_at_3", "weighted_short_at_3", "short_at_3", "policy"} <= found["metrics"].keys()
    assert all(0 <= point["value"] <= 1 for curve in found["curves"].values() for point in curve)
    assert found["curves"]["majority"][0]["kl_nats"] is None


def test_a_gains_interval_knows_that_it_may_be_a_loss():
    """3 of 20 prompts gain 3/4: of shares as likely 0 by chance; with the signs turned round, the mirror image."""
    from rlhf_recipes.best_of_n_results import gain

    ends, keys = np.r_[np.full(3, 0.75), np.zeros(17)], [f"q{n}" for n in range(20)]
    for scale in (1.0, 8.0):  # shares; scores without bounds
        curve = scale * np.column_stack([np.zeros(20), ends])
        up, down = gain(curve, keys, 0), gain(curve[:, ::-1], keys, 0)
        assert (down["low"], down["high"]) == pytest.approx((-up["high"], -up["low"]))
        assert up["low"] < 0 < up["value"] == pytest.approx(scale * 0.1125)
    assert gain(curve, ["one"] * 10 + ["other"] * 10, 0)["high"] > up["high"], "two groups tell less than 20 prompts"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--choose", "long"], "unknown way to choose long"),
        (["--min_scores", "{longer: 1}"], "min_scores: unknown scorer longer"),
        (["--answer_column", "truth"], "no column 'truth' (columns: "),
        (["--answer", "("], "is no regular expression"),
        (["--temperature", "0"], "temperature=0.0 must be positive"),
        (["--n", "0"], "n=0 must be at least 1"),
        (["--grader", "x"], "grader and rubric belong together"),
        (["--judge", "os.path:join"], "join: it needs 'a', and "),
    ],
)
def test_mistakes_are_told_before_anything_is_sampled(tmp_path, folders, more, says):
    assert says in run(*flags(tmp_path, folders[0], *more), code=2).err
    assert not (tmp_path / "out" / "samples.jsonl").exists()
