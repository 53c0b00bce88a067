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


def test_the_judge_of_several_seeds_is_trained_once() -> None:
    steps = {step.name: step.config for step in steps_of(configs.load(ChainConfig, ["--config", "hh.yaml"]))}
    assert (steps["reward_model"].seeds, steps["reward_model"].keep_seeds) == ([0, 1, 2], True)
    assert (steps["judge"].seeds, steps["judge"].keep_seeds) == (None, False)
