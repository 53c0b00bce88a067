"""recipes/sft.py --best_by: the weights whose responses a reward model scores highest are the ones that are saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import best_by_worker, forked, recipe, tiny_chain

from reward_models import RewardModel
from rlhf import chat, evaluate
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.rows.records import read_prompts
from rlhf.run.stages import Manifest
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.engine import model_stop_ids
from rlhf_recipes.best_by import BestByScore

ANSWERS = ("the fox", "a dog", "no way", "yes it is")


def rows(path: Path, first: int, count: int) -> Path:
    turns = range(first, first + count)
    lines = [{"instruction": f"Name {n}.", "input": "", "output": ANSWERS[n % 4]} for n in turns]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("lora", [4, pytest.param(0, marks=pytest.mark.long)])
def test_the_weights_of_the_highest_score_are_saved(tmp_path, tiny_model, tiny_tokenizer, lora):
    tiny_chain.shake(tiny_model, 0, 0.05)
    base = tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)
    scorer = tiny_chain.save_reward_model(tmp_path / "scorer", base, tiny_tokenizer)
    train, held_out, out = rows(tmp_path / "a.jsonl", 0, 16), rows(tmp_path / "b.jsonl", 50, 6), tmp_path / "run/sft"
    flags = ["--model", base, "--train_data", train, "--eval_data", held_out, "--best_by", scorer, "--output_dir", out,
             "--epochs", 4, "--batch_size", 8, "--microbatch_size", 8, "--learning_rate", "3e-2", "--lora_rank", lora,
             "--lr_schedule", "constant", "--best_by_tokens", 6, "--save_steps", 0, "--preflight", "false",
             "--bf16", "false"]  # fmt: skip
    result = recipe.run("sft", *flags)
    assert (result.code, result.err) == (0, ""), result.out
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["eval_score"] for line in logged if "eval_score" in line}
    assert list(scores) == [2, 4, 6, 8]
    assert len(set(scores.values())) > 1
    outputs = Manifest.read(out).outputs
    assert outputs["best_score"] == max(scores.values()) == scores[outputs["best_step"]]
    assert not (out / "best.safetensors").exists()

    model, tokenizer = load_policy(out), load_tokenizer(out)
    engine = TransformersEngine(model.eval(), model_stop_ids(model, tokenizer), chat.pad_id(tokenizer))
    generator = torch.Generator().manual_seed(0)
    samples = evaluate.sample_policy(read_prompts(held_out), tokenizer, engine, max_new_tokens=6, generator=generator)
    again = evaluate.judge_samples(samples, RewardModel.load(scorer))
    assert sum(again) / len(again) == pytest.approx(outputs["best_score"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_share_the_prompts(tmp_path, tiny_model, tiny_tokenizer):
    tiny_chain.shake(tiny_model, 0, 0.05)
    policy = str(tiny_chain.save_base(tmp_path, tiny_model, tiny_tokenizer))
    one = best_by_worker.scored(tmp_path / "one", policy)
    done = forked.shared().together([best_by_worker.__file__, tmp_path / "two", policy, tmp_path / "two-"])
    assert done.returncode == 0, done.stderr
    two = [json.loads((tmp_path / f"two-{rank}").read_text()) for rank in (0, 1)]
    for (score, asked), *each in zip(one, *two, strict=True):
        assert [mine for mine, _ in each] == pytest.approx([score, score], rel=1e-12)
        shares = [prompts for _, prompts in each]
        assert sorted(shares[0] + shares[1]) == sorted(asked)
        assert len(shares[1]) == len(asked) // 2
    assert one[0][0] != one[1][0]


@pytest.mark.slow
def test_one_that_is_trained_longer_still_knows_its_best(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    base = tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)
    scorer = tiny_chain.save_reward_model(tmp_path / "scorer", base, tiny_tokenizer)
    given = {1: 5.0, 2: 3.0, 3: 4.0}
    monkeypatch.setattr(BestByScore, "score", lambda self: given[self.trainer.state.global_step])
    sft = recipe.load("sft")
    for epochs in (1, 3):
        asked = sft.SFTRecipe(
            model=str(base), train_data=str(rows(tmp_path / "a.jsonl", 0, 8)), best_by=str(scorer), epochs=epochs,
            eval_data=str(rows(tmp_path / "b.jsonl", 50, 2)), batch_size=8, microbatch_size=8, lr_schedule="constant",
            save_steps=1, keep_checkpoint=True, preflight=False, bf16=False, output_dir=str(tmp_path / "run" / "sft"),
        )  # fmt: skip
        outputs = sft.sft(asked)
        assert (outputs["best_step"], outputs["best_score"]) == (1, 5.0)


def test_what_cannot_choose_is_refused(tmp_path, tiny_model, tiny_tokenizer):
    base = tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)
    scorer = tiny_chain.save_reward_model(tmp_path / "scorer", base, tiny_tokenizer)
    flags = ["--model", base, "--train_data", rows(tmp_path / "a.jsonl", 0, 20), "--output_dir", tmp_path / "run/sft"]
    for more, message in (
        (("--best_by", base), "holds ['LlamaForCausalLM'], no reward model"),
        (("--best_by", scorer, "--best_by_prompts", 0), "best_by_prompts=0 must be at least 1"),
        (("--best_by", tmp_path / "none"), "none: no such model folder"),
    ):
        refused = recipe.run("sft", *flags, *more)
        assert refused.code == 2
        assert message in refused.err
        assert not (tmp_path / "run").exists()
