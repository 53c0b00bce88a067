"""The benchmark's comparison of our SFT and reward-model training with trl's: rows, measures, tables, both sides."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from reference import recipe
from reference.tiny_chain import save_base

from rlhf import chat, intervals
from rlhf.errors import InputError

data, stages, cases = map(recipe.load_benchmark, ("stages_data", "stages", "cases"))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


RANKINGS = [
    {"prompt": [said("user", "Count")], "responses": ["a", "b", "c", "d"], "ranks": [2.0, 1.0, 3.0, 4.0]},
    {"prompt": [said("user", "Hi")], "responses": ["e", "f", "g", "h"], "ranks": [1.0, 1.0, 2.0, 3.0]},
]


def test_pairs_by_hand():
    assert data.pairs_of(RANKINGS[0]) == [("b", "a"), ("b", "c"), ("b", "d"), ("a", "c"), ("a", "d"), ("c", "d")]
    assert data.pairs_of(RANKINGS[1]) == [("e", "g"), ("e", "h"), ("f", "g"), ("f", "h"), ("g", "h")]  # e and f tie
    rows = data.preferences(RANKINGS)
    assert len(rows) == 11
    assert rows[6] == {
        "prompt": [said("user", "Hi")], "chosen": [said("assistant", "e")], "rejected": [said("assistant", "g")]
    }  # fmt: skip


def test_accuracy_by_hand():
    """b > a right, b = c half, a > c wrong ...: 4.5 of the first prompt's 6 pairs, 2 of the second's 5."""
    scores = {"a": 1.0, "b": 3.0, "c": 3.0, "d": 0.0, "e": 0.0, "f": 2.0, "g": 1.0, "h": 1.5}
    right = [1, 0.5, 1, 0, 1, 1, 0, 0, 1, 1, 0]
    seen = []

    def score(talks):
        seen.extend(talks)
        return torch.tensor([scores[talk[-1]["content"]] for talk in talks])

    found = data.accuracy(SimpleNamespace(score=score), RANKINGS)
    expected = intervals.clustered_accuracy(right, [0] * 6 + [1] * 5)
    assert found == {"value": sum(right) / 11, "low": expected.low, "high": expected.high, "n": 2}
    assert seen[0] == [said("user", "Count"), said("assistant", "a")]


def test_loss_is_the_models_own(tiny_model, tiny_tokenizer):
    """Nats per token of what the assistant writes, from the model's whole logits, row by row."""
    chat.prepare_tokenizer(tiny_tokenizer)
    tiny_model.resize_token_embeddings(len(tiny_tokenizer))
    rows = [
        {"prompt": [said("user", "Hi")], "completion": [said("assistant", "Hello, you")]},
        {"prompt": [said("system", "Be brief"), said("user", "Count")], "completion": [said("assistant", "one")]},
        {"prompt": [said("user", "France?")], "completion": [said("assistant", "Paris is the capital")]},
    ]
    expected = []
    for row in rows:
        ids, mask = chat.encode_conversation(tiny_tokenizer, [*row["prompt"], *row["completion"]])
        with torch.no_grad():
            logprobs = tiny_model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = [-float(logprobs[n - 1, ids[n]]) for n in range(len(ids)) if mask[n]]
        expected.append(sum(own) / len(own))
    found = data.loss(tiny_model, tiny_tokenizer, rows)
    assert found["value"] == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert found["n"] == 3
    assert found["low"] < found["value"] < found["high"]


def test_tables():
    def side(*seconds, **more):
        start = {"imports": 3.0, "trainer": 1.5, "first_step": 0.5}
        return {"updates": [{"step": s} for s in seconds], "start": start, "peak_bytes": 2**30, **more}

    learnt = {"value": 0.75, "low": 0.7, "high": 0.8, "n": 9}
    results = {
        "tiny: sft": {"ours": side(9.0, 2.0, 4.0, held_out=learnt), "trl": side(9.0, 6.0, 6.0, trl="1.16.0")},
        "smollm2: reward_model": {"ours": side(9.0, 5.0, held_out=learnt)},
    }
    text = stages.table(results)
    assert "| tiny: sft, ours | 3.00 | 2.00-4.00 | 2.00 | 1.00 | 0.750 [0.700, 0.800] nats per token |" in text
    assert "| tiny: sft, trl 1.16.0 | 6.00 | 6.00-6.00 | 1.00 | 1.00 | - |" in text
    assert "| smollm2: reward_model, ours | 5.00 | 5.00-5.00 | - | 1.00 | 75.0% [70.0%, 80.0%] of the pairs |" in text
    assert "| tiny: sft, ours | 3.0 | 1.5 | 0.5 | 5.0 |" in stages.start_table(results)
    assert stages.table({}) == stages.start_table({}) == ""


def test_both_sides_are_asked_the_same():
    size = stages.SIZES["smollm2"]
    job = stages.job_of("reward_model", size, 3, True)
    assert (job["rows_per_step"], job["steps"], job["lora_rank"], job["bf16"]) == (4, 6, 16, True)
    for size in stages.SIZES.values():
        for stage in stages.STAGES:  # what both trainers divide
            pairs, rows = size.rows_per_step[stage] * 6, size.rows_per_step[stage]
            assert (pairs if stage == "reward_model" else rows) % (size.rows_per_forward // 2) == 0
            assert (
                rows % (max(1, size.rows_per_forward // 4) if stage == "reward_model" else size.rows_per_forward) == 0
            )


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_both_sides_train_on_every_row_once(tmp_path, tiny_model, tiny_tokenizer, stage, lora_rank, monkeypatch):
    """Two turns of two steps each, four rows a step; what was learnt is measured on both alike."""
    base, waits = save_base(tmp_path, tiny_model, tiny_tokenizer), []
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"prompt": [said("user", f"Count to {n}")], "completion": [said("assistant", " ".join(words[: n % 7 + 1]))],
         "responses": [" ".join(words[n % 5 : n % 5 + k]) for k in (1, 2, 3, 4)], "ranks": [1.0, 2.0, 3.0, 4.0]}
        for n in range(20)
    ]  # fmt: skip
    for name, some in (("train", rows[:16]), ("held_out", rows[16:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    job = {
        "stage": stage, "updates": 2, "steps": 2, "rows_per_step": 4, "rows_per_forward": 4, "learning_rate": 1e-3,
        "bf16": False, "lora_rank": lora_rank, "lora_alpha": 8.0, "train": str(tmp_path / "train.jsonl"),
        "held_out": str(tmp_path / "held_out.jsonl"), "model": str(base), "tokenizer": str(base),
    }  # fmt: skip
    monkeypatch.setattr(recipe.load_benchmark("turns"), "wait_for_turn", lambda: waits.append(None))
    learnt = {}
    for side in ("ours", "trl"):
        worker = recipe.load_benchmark(f"stages_{side}")
        result = worker.work(job | {"folder": str(tmp_path / side)})
        assert len(result["updates"]) == 2
        assert min(result["start"].values()) > 0
        assert result["peak_bytes"] > 0
        learnt[side] = result["held_out"]
    assert len(waits) == 4
    assert learnt["ours"]["n"] == learnt["trl"]["n"] == 4
    if stage == "sft":  # the same steps on the same rows, in another order: close, and both below where they began
        before = data.loss(tiny_model.eval(), tiny_tokenizer, rows[16:])["value"]
        assert learnt["ours"]["value"] == pytest.approx(learnt["trl"]["value"], rel=0.05)
        assert max(one["value"] for one in learnt.values()) < before


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_ours_is_asked_for_4_bits(tmp_path, tiny_model, tiny_tokenizer, stage, monkeypatch):
    """By gpu.sh, on a card; here the trainer says that there is none."""
    base = str(save_base(tmp_path, tiny_model, tiny_tokenizer))
    (tmp_path / "train.jsonl").write_text(json.dumps(RANKINGS[0] | {"completion": [said("assistant", "b")]}))
    job = {
        "stage": stage, "updates": 1, "steps": 1, "rows_per_step": 1, "rows_per_forward": 1, "learning_rate": 1e-3,
        "bf16": False, "lora_rank": 4, "lora_alpha": 8.0, "train": str(tmp_path / "train.jsonl"), "model": base,
        "tokenizer": base, "folder": str(tmp_path / "run"), "load_in_4bit": True,
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"load_in_4bit: (there is no GPU here|bitsandbytes is not installed)"):
        recipe.load_benchmark("stages_ours").work(job)


@pytest.mark.long
def test_from_the_flag_to_the_tables(tmp_path, monkeypatch):
    """`--only stages` from nothing, with the smoke config in the toy's place and small sizes; each side a process."""
    benchmark, toy_clock, toy_mark = map(recipe.load_benchmark, ("ppo_vs_trl", "toy_clock", "toy_mark"))
    small = stages.Size(
        rows_per_step={"sft": 4, "reward_model": 2}, steps={"sft": 2, "reward_model": 1}, held_out=4,
        learning_rates={"sft": 1e-3, "reward_model": 1e-3}, rows_per_forward=4,
        lora={"lora_rank": 0, "lora_alpha": 8.0},
    )  # fmt: skip
    monkeypatch.setitem(stages.SIZES, "tiny", small)
    smoke = recipe.ROOT / "recipes/configs/smoke.yaml"
    run = tmp_path / "toy"
    with recipe._restored():
        for module in (toy_clock, toy_mark):
            monkeypatch.setattr(module, "TOY", smoke)
        monkeypatch.chdir(recipe.ROOT)
        toy_mark.make_chain(run, 0, "rankings")
    config = benchmark.BenchmarkConfig(
        output_dir=str(tmp_path / "out"), only="stages", cases=["tiny"], updates=2, threads=1, toy_run=str(run)
    )
    board = benchmark.benchmark(config)
    assert board.failures == []
    results = json.loads((tmp_path / "out/results.json").read_text())["stages"]
    assert {title: list(sides) for title, sides in results.items()} == {
        "tiny: sft": ["ours", "trl"], "tiny: reward_model": ["ours", "trl"]
    }  # fmt: skip
    text = (tmp_path / "out/tables.md").read_text()
    assert "SFT and reward model beside trl's own trainers" in text
    assert "Seconds until the first optimizer step is done" in text
