"""Rows that are to be labelled: candidates and gold."""

from __future__ import annotations

import json

import pytest

from rlhf.collection.incoming import check_apart, read_candidates, read_gold
from rlhf.errors import InputError


def texts(item):
    return [candidate.text for candidate in item.candidates]


def test_rows_with_where_each_response_came_from():
    row = {"prompt": "Hi?", "responses": ["a", "b"], "policy": ["sft", "ppo"], "fingerprint": "f1",
           "sampling_seed": [3, 4], "family": "greeting"}  # fmt: skip
    (item,) = read_candidates([row])
    assert item.prompt == [{"role": "user", "content": "Hi?"}]
    assert [(c.text, c.policy, c.fingerprint, c.seed) for c in item.candidates] == [
        ("a", "sft", "f1", 3), ("b", "ppo", "f1", 4),
    ]  # fmt: skip
    assert item.columns == {"family": "greeting"}
    assert item.gold_ranks is None


def test_rankings_and_pairs_are_labelled_again_without_their_order():
    ranked = {"prompt": "Hi?", "responses": ["a", "b"], "ranks": [2, 1]}
    pair = {"prompt": "Hi!", "chosen": "yes", "rejected": "no"}
    first, second = read_candidates([ranked, pair])
    assert texts(first) == ["a", "b"]
    assert sorted(texts(second)) == ["no", "yes"]
    assert first.gold_ranks is second.gold_ranks is None


def test_responses_of_a_table_are_json(tmp_path):
    (tmp_path / "my.csv").write_text('prompt,responses\nHi?,"[""a"", ""b""]"\n')
    (item,) = read_candidates(str(tmp_path / "my.csv"))
    assert sorted(texts(item)) == ["a", "b"]


def test_sets_as_people_have_them_are_labelled_again(tmp_path):
    completions = [{"response": f"answer {n}", "overall_score": n, "model": f"m{n}"} for n in range(3)]
    file = tmp_path / "ultrafeedback.jsonl"
    file.write_text(json.dumps({"instruction": "Hi?", "completions": completions}) + "\n")
    (item,) = read_candidates(str(file))
    assert item.prompt == [{"role": "user", "content": "Hi?"}]
    assert sorted(texts(item)) == ["answer 0", "answer 1", "answer 2"]
    assert item.gold_ranks is None
    (gold,) = read_gold(str(file))
    assert gold.gold_ranks is not None
    assert min(zip(gold.gold_ranks, texts(gold), strict=True))[1] == "answer 2"


def test_an_earlier_verdict_is_left_aside_and_a_label_of_another_kind_stays():
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "a"}]
    other = [talk[0], {"role": "assistant", "content": "b"}]
    battles = [{"conversation_a": talk, "conversation_b": other, "winner": won} for won in ("both_bad", "model_a")]
    assert all("label" not in battle.columns for battle in read_candidates(battles))
    (row,) = read_candidates([{"prompt": "Hi?", "responses": ["a", "b"], "label": "greeting"}])
    assert row.columns == {"label": "greeting"}


def test_repeated_responses_are_left_out_and_counted(caplog):
    rows = [
        {"prompt": "1", "responses": ["a", "b", "a"], "sampling_seed": [1, 2, 3]},
        {"prompt": "2", "responses": ["c", "c"]},
        {"prompt": "3", "responses": ["d", "e"]},
    ]
    items = read_candidates(rows)
    assert [texts(item) for item in items] == [["a", "b"], ["d", "e"]]
    assert [candidate.seed for candidate in items[0].candidates] == [1, 2]
    assert "left out 2 responses" in caplog.text
    assert "1 of 3 prompts" in caplog.text
    with pytest.raises(InputError, match="nothing to compare"):
        read_candidates(rows[1:2])


def test_gold_keeps_the_right_order():
    rows = [{"prompt": "1", "responses": ["a", "b", "a", "c"], "ranks": [2, 1, 2, 3]}]
    (item,) = read_gold(rows)
    assert (texts(item), item.gold_ranks) == (["a", "b", "c"], (2.0, 1.0, 3.0))
    with pytest.raises(InputError, match="1 prompts are also among the items, the first is '1'"):
        check_apart(read_candidates([{"prompt": " 1 ", "responses": ["x", "y"]}]), [item])
    check_apart(read_candidates([{"prompt": "2", "responses": ["x", "y"]}]), [item])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Hi?", "responses": ["a"]}, "a ranking compares at least 2 responses"),
        ({"prompt": "Hi?", "responses": [str(n) for n in range(10)]}, "responses: got 10; the page ranks 2 to 9"),
        ({"responses": ["a", "b"]}, "prompt"),
        ({"prompt": "Hi?"}, "no list of responses: got prompt; write an object"),
        ({"prompt": "Hi?", "responses": "a"}, "no list of responses: got prompt, responses; write"),
        ({"prompt": "Hi?", "responses": ["a", {"role": "assistant", "content": "b"}]}, "responses[1]"),
        ({"prompt": "Hi?", "responses": ["a", " "]}, "responses[1]"),
        ({"prompt": "Hi?", "responses": ["a", "b"], "sampling_seed": [1]}, "sampling_seed: got [1]; write a list with"),
        ({"prompt": "Hi?", "responses": ["a", "b"], "sampling_seed": [1, -1]}, "sampling_seed: got -1"),
        ({"prompt": "Hi?", "responses": ["a", "b"], "policy": ["sft"]}, "policy: got ['sft']"),
        (["a", "b"], "write an object with prompt and responses"),
    ],
)
def test_mistakes_name_the_line(tmp_path, row, says):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "fine", "responses": ["a", "b"]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError) as problem:
        read_candidates(str(file))
    assert says in str(problem.value)
    assert str(problem.value).startswith(f"{file}:2: ")
