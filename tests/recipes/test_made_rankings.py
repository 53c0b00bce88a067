"""Rankings that `data: make` wrote are found and split by their groups; several seeds are the reward model's alone."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf import config as configs
from rlhf.rows.records import read_prompts, read_rankings
from rlhf_recipes.chain import ChainConfig, steps_of
from rlhf_recipes.rankings import DataConfig, rankings


def test_rankings_and_prompts_of_the_runs_data_are_found(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pairs = [{"prompt": "Write.", "chosen": f"good {n}", "rejected": f"bad {n}", "split_group": n} for n in range(20)]
    (data / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    prompts = [{"prompt": f"Continue {n}", "scored_prompt": "Write."} for n in range(4)]
    (data / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = DataConfig(output_dir=str(data), held_out_fraction=0.2, judge_fraction=0.25)
    outputs = rankings(config)
    assert (outputs["train"], outputs["held_out"], outputs["judge"], outputs["ppo_prompts"]) == (12, 4, 4, 4)
    files = [read_rankings(tmp_path / f"rankings/{name}.jsonl") for name in ("train", "held_out", "judge")]
    groups = [ranking.columns["split_group"] for file in files for ranking in file]
    assert sorted(groups) == list(range(20))
    found = read_prompts(tmp_path / "rankings/prompts.jsonl")
    assert [prompt.columns["scored_prompt"] for prompt in found] == ["Write."] * 4
    assert rankings(config) == outputs, "complete, skipped"


def test_a_prompt_stays_text_or_messages_as_its_row_had_it(tmp_path: Path) -> None:
    """Reward functions get strings for the one and messages for the other."""
    asked = [f"Question {n}?" for n in range(40)]
    plain = [{"prompt": text, "chosen": "good", "rejected": "bad"} for text in asked[:20]]
    turns = [{**plain[0], "prompt": [{"role": "user", "content": text}]} for text in asked[20:]]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in plain + turns))
    assert [one.text for one in read_prompts(read_rankings(pairs))] == [True] * 20 + [False] * 20
    for name, prompts in (("own", None), ("given", str(pairs))):
        rankings(DataConfig(output_dir=str(tmp_path / name / "data"), rankings=str(pairs), prompts=prompts))
        for file in ("prompts", "eval_prompts", "train"):
            found = read_prompts(tmp_path / name / f"rankings/{file}.jsonl")
            assert {one.text for one in found} == {True, False}, file
            assert all(one.text == (one.messages[0]["content"] in asked[:20]) for one in found), file


def test_no_prompt_of_a_held_out_group_is_ppos(tmp_path: Path) -> None:
    """Further questions on a held-out document; one prompt for all, told apart by group; rows without a group."""

    def ppo_prompts(name: str, pairs: list[dict], prompts: list[dict]) -> tuple[list, list]:
        data = tmp_path / name / "data"
        data.mkdir(parents=True)
        for file, rows in (("rankings", pairs), ("prompts", prompts)):
            (data / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rankings(DataConfig(output_dir=str(data), held_out_fraction=0.2))
        held_out = read_rankings(tmp_path / name / "rankings/held_out.jsonl")
        return held_out, read_prompts(tmp_path / name / "rankings/prompts.jsonl")

    def pair(prompt: str, **columns: object) -> dict:
        return {"prompt": prompt, "chosen": "good", "rejected": "bad", **columns}

    documents = range(20)
    pairs = [pair(f"Document {n}: {q}?", split_group=n) for n in documents for q in range(3)]
    more = [{"prompt": f"Document {n}: {q}?", "split_group": n} for n in documents for q in range(6)]
    held_out, found = ppo_prompts("documents", pairs, more)
    apart = {one.columns["split_group"] for one in held_out}
    assert len(apart) == 4
    assert {prompt.columns["split_group"] for prompt in found} == {*documents} - apart
    assert len(found) == 16 * 6
    held_out, found = ppo_prompts("no group", pairs, [{"prompt": row["prompt"]} for row in more])
    assert len(found) == 120 - len(held_out)
    same = [pair("Write.", split_group=n) for n in documents]
    held_out, found = ppo_prompts("one prompt", same, [{"prompt": "Write.", "split_group": n} for n in documents])
    assert {one.columns["split_group"] for one in found} == {*documents} - {
        one.columns["split_group"] for one in held_out
    }
    held_out, found = ppo_prompts("no group in rankings", [pair(f"Document {n}") for n in documents],
                                  [{"prompt": f"Document {n}", "split_group": n} for n in documents])  # fmt: skip
    assert len(found) == 16


def test_the_judge_of_several_seeds_is_trained_once() -> None:
    steps = {step.name: step.config for step in steps_of(configs.load(ChainConfig, ["--config", "hh.yaml"]))}
    assert (steps["reward_model"].seeds, steps["reward_model"].keep_seeds) == ([0, 1, 2], True)
    assert (steps["judge"].seeds, steps["judge"].keep_seeds) == (None, False)
