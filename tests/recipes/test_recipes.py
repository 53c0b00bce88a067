"""Each recipe on its own, by flags, on a tiny model and data as users have them; and a whole LoRA chain."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import recipe, tiny_chain

WORDS = ["fox", "dog", "cat", "bird", "fish", "tree", "lake", "hill", "road", "moon"]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def keys(path: Path) -> set[str]:
    return {json.dumps(row["prompt"]) for row in lines(path)}


def run(name: str, *flags: object) -> recipe.Result:
    result = recipe.run(name, *flags)
    assert result.code == 0, result.out + result.err
    assert result.err == ""
    return result


def demonstrations(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Say {WORDS[i % 10]} {i}.", "completion": f"{WORDS[i % 10]}, yes"}
        for i in range(first, first + count)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    """The better answer names the animal; two rows share a prompt."""
    return [
        {
            "prompt": f"Name {WORDS[i // 2 % 10]} {i // 2}.",
            "chosen": f"{WORDS[i // 2 % 10]} of course",
            "rejected": f"no way {i}",
        }
        for i in range(count)
    ]


@pytest.fixture
def base(tmp_path: Path, tiny_model, tiny_tokenizer) -> Path:
    tiny_chain.shake(tiny_model, 0, 0.05)
    return tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)


@pytest.fixture
def judge_file(tmp_path: Path) -> str:
    """A score in a file of the user's own, which sees a column of the data."""
    file = tmp_path / "my_scores.py"
    file.write_text(
        "def fox(prompts, completions, topic=None, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    assert topic is None or len(topic) == len(texts)\n"
        "    return [float(len(t)) / 10 for t in texts]\n"
    )
    return f"{file}:fox"


def test_sft(tmp_path: Path, base: Path) -> None:
    train = write(tmp_path / "train.jsonl", [*demonstrations(20), {"prompt": "Talk.", "completion": "on and on " * 60}])
    held_out = write(tmp_path / "eval.jsonl", demonstrations(4, first=50))
    out = tmp_path / "my" / "sft"
    flags = ("--model", base, "--train_data", train, "--eval_data", held_out, "--output_dir", out,
             "--epochs", 2, "--batch_size", 10, "--microbatch_size", 5, "--learning_rate", "1e-2",
             "--max_length", 64)  # fmt: skip
    result = run("sft", *flags)
    text = " ".join(result.out.split())
    assert "1 of 21 demonstrations are longer than max_length=64 tokens and left out" in text
    assert "demonstrations 21 (counted from 1)" in text
    outputs = manifest(out)["outputs"]
    assert outputs["demonstrations"] == 20
    assert 0 < outputs["eval_loss"] < lines(out / "metrics.jsonl")[0]["loss"]
    assert manifest(out)["base_model"] == str(base)
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (base, out))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert "complete, skipped" in run("sft", *flags).out


@pytest.mark.slow
def test_reward_model_from_a_file_of_pairs(tmp_path: Path, base: Path) -> None:
    from reward_models import RewardModel

    train, out = write(tmp_path / "pairs.jsonl", pairs(60)), tmp_path / "my" / "reward_model"
    run("reward_model", "--model", base, "--train_data", train, "--output_dir", out,
        "--prompts_per_batch", 4, "--learning_rate", "5e-3", "--epochs", 3)  # fmt: skip
    outputs = manifest(out)["outputs"]
    assert outputs["prompts"] == 3  # a tenth of the 30 distinct prompts, with both rows of each
    assert (outputs["n"], outputs["training_prompts"]) == (6, 54)
    assert outputs["accuracy"] == 1.0
    scorer = RewardModel.load(out)
    good, bad = scorer(["Name fox 99."] * 2, ["fox of course", "no way 7"])
    assert good > bad
    assert (scorer.normalizer.mean, scorer.normalizer.std) == (outputs["score_mean"], outputs["score_std"])


def test_ppo_with_a_function_and_no_reward_model(tmp_path: Path, base: Path, judge_file: str) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}.", "topic": str(i)} for i in range(10)])
    out = tmp_path / "my" / "ppo"
    run("ppo", "--model", base, "--reward_functions", f"[{judge_file}]", "--train_data", prompts, "--output_dir", out,
        "--updates", 2, "--rollout_size", 8, "--minibatch_size", 4, "--inner_epochs", 1, "--max_new_tokens", 6,
        "--learning_rate", "1e-3", "--missing_eos", "off")  # fmt: skip
    logged = lines(out / "metrics.jsonl")
    assert [row["step"] for row in logged] == [1, 2]
    assert abs(logged[0]["kl_nats"]) == 0.0
    sample = lines(out / "samples.jsonl")[0]
    assert sample["score"] == pytest.approx(len(sample["response"]) / 10)
    assert manifest(out)["inputs"].get("reward_model") is None
    assert manifest(out)["outputs"]["updates"] == 2


def test_ppo_goes_on_with_a_mended_function_and_with_nothing_else_changed(tmp_path: Path, base: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}."} for i in range(8)])
    file, out = tmp_path / "mine.py", tmp_path / "my" / "ppo"
    flags = ("--model", base, "--reward_functions", f"[{file}:length]", "--train_data", prompts, "--output_dir", out,
             "--updates", 3, "--rollout_size", 8, "--minibatch_size", 4, "--inner_epochs", 1, "--max_new_tokens", 6,
             "--save_steps", 1, "--missing_eos", "off", "--preflight", "false")  # fmt: skip

    def ppo(text: str, *more: object) -> recipe.Result:
        file.write_text(f"def length(completions, calls=[], **columns):\n    {text}\n")
        for name in [name for name in sys.modules if name.startswith("_rlhf_mine_")]:
            del sys.modules[name]  # a process of its own would read the file anew
        return recipe.run("ppo", *flags, *more)

    fine = "return [float(len(text)) for text in completions]"
    failed = ppo("calls.append(1); return [1.0 if len(calls) < 3 else float('nan') for _ in completions]")
    assert "length returned nan" in failed.err
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    refused = ppo(fine, "--kl_coef", 0.3)
    assert refused.code == 2
    assert "config.kl_coef was 0.05, now 0.3" in refused.err
    gone_on = ppo(fine)
    assert gone_on.code == 0, gone_on.err
    assert "checkpoint-2 was kept when a reward function failed" in " ".join((gone_on.out + gone_on.err).split())
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [1, 2, 3]
    assert "belongs to another run: code." in ppo(f"{fine}[::-1]").err  # it is complete


def test_what_a_prompt_takes_is_known_before_anything_is_sampled(tmp_path: Path, base: Path, judge_file: str) -> None:
    """Its tools belong to it: this template leaves them out."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}.", "tools": [tool]} for i in range(4)])
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "sft").symlink_to(base)
    out = tmp_path / "my" / "rankings"
    refused = recipe.run("rankings", "--prompts", prompts, "--labeler", judge_file, "--output_dir", out)
    assert refused.code == 2
    assert "tools: the chat template leaves them out" in refused.err
    assert not out.exists()


@pytest.mark.parametrize("judged_by", ["function", "reward model"])
def test_evaluate_policy_of_any_two_folders(
    tmp_path: Path, base: Path, tiny_tokenizer, judge_file: str, judged_by: str
) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(base)
    tiny_chain.shake(other, 5, 0.02)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}."} for i in range(6)])
    held_out, out = write(tmp_path / "held_out.jsonl", pairs(12)), tmp_path / "my" / "comparison"
    model = tiny_chain.save_reward_model(tmp_path / "rm", base, tiny_tokenizer)
    picked = judged_by == "function"  # the judge alone picks nothing: it would judge its own pick
    judge = ("--judge", judge_file, "--reward_model", model) if picked else ("--judge", model)
    result = run("evaluate_policy", "--policy", tmp_path / "other", "--baseline", base, *judge,
                 "--eval_data", prompts, "--rankings", held_out, "--output_dir", out, "--max_new_tokens", 6,
                 "--best_of", 3)  # fmt: skip
    outcome, samples = manifest(out)["outputs"]["evaluation"], out / "samples.jsonl"
    ppo = outcome["ppo"]
    assert ppo["prompts"] == 6
    assert ppo["win_rate_ci"][0] <= ppo["win_rate_vs_sft"] <= ppo["win_rate_ci"][1]
    assert (ppo["gold_score"] is None) == (judged_by == "reward model")
    assert math.isfinite(ppo["kl_nats"])
    assert ("best_of_n" in outcome) == picked == (ppo["score"] is not None) == ("score_ppo" in lines(samples)[0])
    assert ("no reward model: no score, and no best-of-n" in result.out) != picked
    if picked:
        assert outcome["best_of_n"]["kl_nats"] == pytest.approx(math.log(3) - 2 / 3)
    assert outcome["judge"]["kind"] == ("gold" if judged_by == "function" else "reward_model")
    assert 0 <= outcome["judge"]["accuracy"] <= 1
    assert "Judge:" in result.out
    assert len(lines(samples)) == 6


def no_nan(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_greedy_answers_have_no_kl_and_no_best_of_n(tmp_path: Path, base: Path, judge_file: str) -> None:
    prompts, out = write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}."} for i in range(6)]), tmp_path / "my/eval"
    result = run("evaluate_policy", "--policy", base, "--baseline", base, "--judge", judge_file, "--eval_data", prompts,
                 "--output_dir", out, "--max_new_tokens", 6, "--temperature", 0, "--max_prompts", 4)  # fmt: skip
    assert "temperature 0: each policy's most likely answer; no KL, and no best-of-n" in result.out
    assert "the first 4 of 6 prompts (max_prompts)" in result.out
    found = no_nan((out / "evaluation.json").read_text())
    assert found["note"].startswith("temperature 0")
    assert "best_of_n" not in found
    assert found["ppo"]["kl_nats"] is None
    assert found["ppo"]["win_rate_vs_sft"] == 0.5, "a policy against itself: the same answers"
    metrics = found["metrics"]
    low, high = found["ppo"]["gold_score_ci"]
    assert metrics["ppo/gold_score"] == {"value": found["sft"]["gold_score"], "low": low, "high": high, "n": 4}
    low, high = found["ppo"]["win_rate_ci"]
    assert metrics["ppo/win_rate_vs_sft"] == {"value": 0.5, "low": low, "high": high, "n": 4}
    tokens = found["sft"]["response_tokens"]
    assert metrics["sft/response_tokens"] == {"value": tokens, "low": None, "high": None, "n": 4}
    assert "ppo/kl_nats" not in metrics
    assert all(row["sft"] == row["ppo"] for row in lines(out / "samples.jsonl"))


def test_a_kl_of_greedy_answers_is_refused() -> None:
    from rlhf.errors import InputError
    from rlhf_recipes.evaluate_policy import EvaluationConfig
    from rlhf_recipes.sampled import sequence_kl

    nothing: Any = None
    with pytest.raises(InputError, match="temperature=0: greedy answers have no KL"):
        sequence_kl(nothing, nothing, nothing, nothing, EvaluationConfig(temperature=0.0))
    with pytest.raises(InputError, match="temperature=nan must be 0 or more"):
        EvaluationConfig(temperature=math.nan)


def test_responses_are_sampled_so_many_at_once(tmp_path: Path, base: Path, judge_file: str, monkeypatch) -> None:
    from rlhf.sampling.decode import TransformersEngine

    seen: list[int] = []
    decode = TransformersEngine._decode

    def counted(self, prompts, *rest):
        seen.append(len(prompts))
        return decode(self, prompts, *rest)

    monkeypatch.setattr(TransformersEngine, "_decode", counted)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}."} for i in range(7)])
    run("evaluate_policy", "--policy", base, "--baseline", base, "--judge", judge_file, "--eval_data", prompts,
        "--output_dir", tmp_path / "my/eval", "--max_new_tokens", 2, "--best_of", 0,
        "--generation_batch_size", 3)  # fmt: skip
    assert seen == [3, 3, 1] * 2


def test_no_row_of_a_large_file_is_dropped_silently(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", pairs(7200))
    assert "drawn" not in run("rankings", "--rankings", source, "--output_dir", tmp_path / "all/data").out
    outputs = manifest(tmp_path / "all/data")["outputs"]
    assert outputs["train"] + outputs["held_out"] == 7200
    some = run("rankings", "--rankings", source, "--output_dir", tmp_path / "some/data", "--comparisons", 100).out
    assert "comparisons=100 of 7,200 rankings drawn" in some


def test_rankings_read_from_pairs_are_split_by_prompt(tmp_path: Path) -> None:
    source, out = write(tmp_path / "pairs.jsonl", pairs(80)), tmp_path / "split here"
    run(
        "rankings",
        "--rankings",
        source,
        "--judge_fraction",
        0.5,
        "--held_out_fraction",
        0.25,
        "--output_dir",
        out,
    )
    files = {name: out / f"{name}.jsonl" for name in ("train", "held_out", "judge", "prompts", "eval_prompts")}
    found = {name: keys(file) for name, file in files.items()}
    assert [len(found[name]) for name in ("train", "held_out", "judge")] == [15, 10, 15]
    assert not found["train"] & found["judge"]
    assert not (found["train"] | found["judge"]) & found["held_out"]
    assert found["prompts"] == found["train"]
    assert found["eval_prompts"] == found["held_out"]
    assert sum(len(lines(files[name])) for name in ("train", "held_out", "judge")) == 80


@pytest.mark.slow
@pytest.mark.long
def test_a_lora_chain_on_pairs_with_a_second_reward_model_as_judge(tmp_path: Path, base: Path) -> None:
    """SFT's adapter is continued by the reward model, the judge and PPO; the base never changes."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from reward_models import RewardModel

    weights = (base / "model.safetensors").read_bytes()
    source, out = write(tmp_path / "pairs.jsonl", pairs(80)), tmp_path / "run"
    flags = ("--output_dir", out, "--data.rankings", source, "--data.judge_fraction", 0.5,
             "--data.held_out_fraction", 0.2,
             "--sft.model", base, "--sft.lora_rank", 4, "--sft.learning_rate", "1e-2", "--sft.max_length", 64,
             "--reward_model.prompts_per_batch", 4, "--reward_model.learning_rate", "1e-2",
             "--ppo.updates", 2, "--ppo.rollout_size", 8, "--ppo.minibatch_size", 4, "--ppo.max_new_tokens", 6,
             "--ppo.learning_rate", "1e-2", "--evaluation.max_new_tokens", 6, "--evaluation.best_of", 2)  # fmt: skip
    result = run("chain", *flags)
    assert (base / "model.safetensors").read_bytes() == weights
    for stage, task in (("sft", "CAUSAL_LM"), ("reward_model", "SEQ_CLS"), ("judge", "SEQ_CLS"), ("ppo", "CAUSAL_LM")):
        config = PeftConfig.from_pretrained(str(out / stage))
        assert (config.task_type, config.r, config.base_model_name_or_path) == (task, 4, str(base))
        assert not (out / stage / "model.safetensors").exists(), "an adapter, no copy of the base"
    tokenizer = AutoTokenizer.from_pretrained(out / "ppo")
    ids = tokenizer("Name fox 1.", return_tensors="pt").input_ids
    said = {}
    for stage in ("sft", "ppo"):
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out / stage))
        said[stage] = policy(ids).logits
        assert list(policy.peft_config) == ["default"]
    assert not torch.equal(said["sft"], said["ppo"])
    scores = [RewardModel.load(out / stage)(["Name fox 1."], ["fox"])[0] for stage in ("reward_model", "judge")]
    assert scores[0] != scores[1]
    # the judge is another model, on prompts that nothing else saw, and its accuracy stands beside its verdict
    assert not keys(out / "rankings/judge.jsonl") & (
        keys(out / "rankings/train.jsonl") | keys(out / "rankings/prompts.jsonl")
    )
    judge = manifest(out / "judge")
    assert judge["seed"] == manifest(out / "reward_model")["seed"] + 1
    assert judge["inputs"]["train_data"] != manifest(out / "reward_model")["inputs"]["train_data"]
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["stages"]) == {"rankings", "sft", "reward_model", "judge", "ppo"}
    told = summary["evaluation"]["judge"]
    assert told["kind"] == "reward_model"
    assert told["accuracy"] == pytest.approx(summary["stages"]["judge"]["accuracy"])
    assert f"{told['accuracy']:.1%}" in result.out
    assert summary["evaluation"]["ppo"]["gold_score"] is None
    assert run("chain", *flags).out.count("complete, skipped") == 6


def test_the_gold_score_never_trains(tmp_path: Path, base: Path) -> None:
    """PPO without reward model or function has nothing to learn from; a judge is no reason to go on."""
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "Hello."}])
    result = recipe.run("ppo", "--model", base, "--train_data", prompts, "--output_dir", tmp_path / "run" / "ppo")
    assert result.code == 2
    assert result.err.startswith("error: --reward_model is missing, and no earlier stage left")
    known = {name for name in recipe.load("ppo").PPORecipe.__dataclass_fields__ if "judge" in name or "gold" in name}
    assert known == set()


def test_the_first_rows_to_label_are_a_random_part() -> None:
    """Whoever stops early has labelled the first rows, and the prompts' file may hold one family after the other."""
    from rlhf.evaluate import PolicySamples
    from rlhf.rows.records import Prompt
    from rlhf_recipes.judging import to_label

    asked = tuple(Prompt([{"role": "user", "content": f"{'ab'[n // 50]} {n}"}], {}) for n in range(100))
    one, other = (PolicySamples(asked, (text,) * 100, ((1,),) * 100, (True,) * 100) for text in ("yes", "no"))
    rows = to_label(one, other, 0)
    assert rows == to_label(one, other, 0) != to_label(one, other, 1)
    assert {row["prompt"][0]["content"] for row in rows} == {prompt.messages[0]["content"] for prompt in asked}
    assert {row["prompt"][0]["content"][0] for row in rows[:20]} == {"a", "b"}


def test_evaluate_policy_with_a_language_model_as_judge_and_peoples_labels(
    tmp_path: Path, base: Path, tiny_tokenizer
) -> None:
    """Labels of to_label.jsonl's rows correct the win rate of the same run, done again; others are refused."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(base)
    tiny_chain.shake(other, 5, 0.02)
    other.config.max_position_embeddings = 4096
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}."} for i in range(14)])
    words = ("--policy", tmp_path / "other", "--baseline", base, "--judge", tmp_path / "other", "--template",
             "pairwise", "--least_probability", 0, "--eval_data", prompts, "--max_new_tokens", 6)  # fmt: skip
    first = run("evaluate_policy", *words, "--output_dir", tmp_path / "a/eval")
    judged = manifest(tmp_path / "a/eval")["outputs"]["evaluation"]["ppo"]["judged"]
    assert set(judged) >= {"win_rate", "length_controlled_win_rate", "flip_rate", "position_bias", "abstentions"}
    assert "length controlled win rate" in first.out
    rows = lines(tmp_path / "a/eval/to_label.jsonl")
    labels = write(tmp_path / "labels.jsonl", [{**row, "ranks": [0, n % 2]} for n, row in enumerate(rows[:11])])
    again = run("evaluate_policy", *words, "--human", labels, "--output_dir", tmp_path / "b/eval")
    found = manifest(tmp_path / "b/eval")["outputs"]["evaluation"]["ppo"]
    corrected = found["corrected"]
    assert corrected["raw"]["value"] == pytest.approx(found["win_rate_vs_sft"])
    assert (corrected["labelled"], corrected["judged"]) == (11, 14)
    assert "judge alone" in again.out
    metrics = no_nan((tmp_path / "b/eval/evaluation.json").read_text())["metrics"]
    assert metrics["ppo/judged/win_rate"] == found["judged"]["win_rate"]
    assert metrics["ppo/corrected/labels"] == corrected["labels"]
    assert "ppo/corrected/weight" not in metrics
    low, high = found["win_rate_ci"]
    told = {"value": found["win_rate_vs_sft"], "low": low, "high": high, "n": None}  # it may have abstained
    assert metrics["ppo/win_rate_vs_sft"] == told
    assert "corrected" in again.out
    ours = {row["prompt"]: row["ppo"] for row in lines(tmp_path / "b/eval/samples.jsonl")}
    said = [  # the first response is called the better one of every second row
        0.5 if not n % 2 else float(row["responses"][0] == ours[row["prompt"][-1]["content"]])
        for n, row in enumerate(rows[:11])
    ]
    ties = 14 - len(rows)  # two equal responses, of which nobody is asked
    assert corrected["labels"]["value"] == pytest.approx((0.5 * ties + len(rows) * sum(said) / 11) / 14)
    few = write(tmp_path / "few.jsonl", [{**row, "ranks": [0, 1]} for row in rows[:3]])
    refused = recipe.run("evaluate_policy", *words, "--human", few, "--output_dir", tmp_path / "c/eval")
    assert refused.code == 2
    assert "3 of its labels compare these two policies' responses" in refused.err
