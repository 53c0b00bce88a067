"""recipes/synthetic.py: requests and their answers, what is left out, provenance, going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reference import recipe, tiny_chain

from rlhf.rows.records import read_prompts


@pytest.fixture
def given(tmp_path: Path, tiny_model, tiny_tokenizer) -> list[object]:
    model, _ = tiny_chain.chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)
    rows = [{"prompt": f"Write a {kind} about the fox."} for kind in ("song", "poem", "letter", "story")]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "Count all of the lazy dogs."}) + "\n")
    data, held_out, out = tmp_path / "seeds.jsonl", tmp_path / "eval.jsonl", tmp_path / "out"
    return ["--model", model, "--data", data, "--eval_data", held_out, "--examples", 3, "--new_examples", 1,
            "--requests_at_once", 2, "--output_dir", out]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "stopped", "tasks"),
    [
        ("Task 4: Name a fruit.\nTask 5: Sing.", True, ["Name a fruit.", "Sing."]),
        ("Sure!\n4. Name a fruit.\nOr two.\n5) Si", False, ["Name a fruit.\nOr two."]),
        ("Name a fruit.", True, ["Name a fruit."]),
        ("Name a fru", False, []),
        ("4.\n5.  ", True, []),
    ],
)
def test_tasks_in_a_continued_list(text, stopped, tasks):
    assert recipe.load("synthetic").new_prompts(text, stopped) == tasks


WRITTEN = [
    "Task 4: Name three fruits.\nTask 5: Write a song about a fox.",  # the second: nearly a seed
    "Task 4: Name three FRUITS!\nTask 5: Sing.",  # equal; too short
    "Task 4: Count all the lazy dogs.\nTask 5: What is the capital of France?",  # evaluated
    "Task 4: Explain how rain is made\nTask 5: Draw a map of the cap",  # cut off
]


def answer(module, monkeypatch, texts=WRITTEN) -> list[list[int]]:
    """Let the model write these, in turn; return the requests' tokens."""
    from rlhf import chat
    from rlhf.models.loading import load_tokenizer
    from rlhf.sampling.decode import TransformersEngine
    from rlhf.sampling.engine import Responses

    asked: list[list[int]] = []

    def generate(self, prompt_ids, max_new_tokens, temperature, generator):
        first = len(asked)
        asked.extend(prompt_ids)
        tokenizer = load_tokenizer(self.model.name_or_path)
        rows = [chat.encode_response(tokenizer, texts[(first + i) % len(texts)]) for i in range(len(prompt_ids))]
        return Responses(rows, [not texts[(first + i) % len(texts)].endswith("cap") for i in range(len(prompt_ids))])

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    return asked


def test_what_stays_what_goes_and_where_it_comes_from(tmp_path, given, monkeypatch):
    asked = answer(recipe.load("synthetic"), monkeypatch)
    result = recipe.run("synthetic", *given, "--count", 3)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [
        "Name three fruits.", "What is the capital of France?", "Explain how rain is made"
    ]  # fmt: skip
    numbers = json.loads((tmp_path / "out" / "synthetic.json").read_text())
    assert sorted(numbers["left_out"].values()) == [1, 1, 1, 1, 1]
    assert numbers["left_out"]["the last task of an answer that was cut off (max_new_tokens)"] == 1
    assert numbers["metrics"]["kept_share"]["value"] == pytest.approx(3 / 8)
    assert [row["provenance"]["request"] for row in rows] == [0, 2, 3]
    assert "Name three fruits." not in rows[0]["provenance"]["shown"]
    assert len(asked) == 4
    assert any("Name three fruits." in row["provenance"]["shown"] for row in rows[1:])  # a later request shows it
    assert read_prompts(tmp_path / "out" / "prompts.jsonl")[0].messages[-1]["content"] == "Name three fruits."
    more = recipe.run("synthetic", *given, "--count", 2)  # what was written stays
    assert more.code == 0, more.err
    assert len(asked) == 4


def test_a_prompt_around_an_evaluation_prompt_is_left_out(tmp_path, given, monkeypatch):
    """It is too long to be nearly equal, and holds every letter of the evaluation's."""
    evaluated = "Count all of the lazy dogs that sleep behind the old barn today."
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": evaluated}) + "\n")
    around = f"Here is a long story about a farm where nothing ever happens in autumn, winter or spring. {evaluated}"
    answer(
        recipe.load("synthetic"), monkeypatch, [f"Task 4: {around}\nTask 5: Name a fruit.", f"Task 4: {around} Or so!"]
    )
    result = recipe.run("synthetic", *given, "--count", 2, "--max_requests", 2)
    assert result.code == 0, result.err
    numbers = json.loads((tmp_path / "out" / "synthetic.json").read_text())
    assert numbers["prompts"] == 1
    assert "1 new prompts, asked for 2 (in 2 requests: max_requests)" in result.out
    more = recipe.run("synthetic", *given, "--count", 2, "--max_requests", 3)
    assert "max_requests was 2, now 3" in more.out
    assert "was interrupted" not in more.out
    assert numbers["left_out"] == {"with text of an evaluation prompt in it": 2}


def test_a_killed_run_goes_on_to_the_same_prompts(tmp_path, given, monkeypatch):
    answer(recipe.load("synthetic"), monkeypatch)
    recipe.run("synthetic", *given, "--count", 3)
    whole = (tmp_path / "out" / "prompts.jsonl").read_bytes()
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "prompts.jsonl").unlink()
    samples = (tmp_path / "out" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out" / "samples.jsonl").write_bytes(b"".join(samples[:2]) + samples[2][:9])
    asked = answer(recipe.load("synthetic"), monkeypatch, WRITTEN[2:])
    again = recipe.run("synthetic", *given, "--count", 3)
    assert again.code == 0, again.err
    assert len(asked) == 2
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == whole


def test_a_model_that_writes_nothing_new_ends_with_1(tmp_path, given, monkeypatch):
    answer(recipe.load("synthetic"), monkeypatch, ["Task 4: Write a song about the fox."])
    result = recipe.run("synthetic", *given, "--max_requests", 3)
    assert result.code == 1
    assert "no new prompt passed" in result.err
    assert recipe.run("synthetic", *given, "--near_duplicate", 0).code == 2


def test_a_request_that_is_too_long_tells_what_shortens_it(given):
    result = recipe.run("synthetic", *given, "--max_new_tokens", 100_000)
    assert (result.code, "fewer --examples shorten it" in result.err) == (2, True), result.err
