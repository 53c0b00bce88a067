"""recipes/baseline.py: trl's trainers on a run's own files, two steps each on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import PeftModel
from reference import recipe, tiny_chain

from reward_models import RewardModel
from reward_models.ensemble import RewardEnsemble
from rlhf import chat
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.rows.records import Prompt, Ranking
from rlhf.run.changes import changes
from rlhf.run.stages import Manifest
from rlhf_recipes.baseline_config import OnlineConfig, PreferenceConfig
from rlhf_recipes.stage import inputs_of

USER = [{"role": "user", "content": "Name a fox."}]
COMMON = ("--bf16", "false", "--max_new_tokens", 6, "--logging_steps", 1)
SIZES = {
    "dpo": ("--dpo.batch_size", 4, "--dpo.microbatch_size", 2, "--dpo.learning_rate", "1e-2"),
    "kto": ("--kto.batch_size", 8, "--kto.microbatch_size", 4, "--kto.learning_rate", "1e-2"),
}
for _name in ("grpo", "rloo"):
    _sizes = {"updates": 2, "rollout_size": 8, "generations": 4, "batch_size": 4, "microbatch_size": 2,
              "learning_rate": "1e-2"}  # fmt: skip
    SIZES[_name] = tuple(word for key, value in _sizes.items() for word in (f"--{_name}.{key}", value))

SCORES = '''
"""Counts its calls, and fails while a file `stop` lies beside it."""
from pathlib import Path

HERE = Path(__file__).parent


def length(completions, completion_ids, family, **others):
    with (HERE / "calls").open("a") as file:
        file.write(f"{len(completions)}\\n")
    if (HERE / "stop").exists() and len((HERE / "calls").read_text().splitlines()) > 1:
        raise KeyboardInterrupt
    assert all(name == "animals" for name in family)
    return [float(len(ids)) for ids in completion_ids]
'''


@pytest.fixture
def base(tmp_path: Path, tiny_model, tiny_tokenizer) -> Path:
    tiny_chain.shake(tiny_model, 0, 0.05)
    return tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    def write(name: str, rows: list[Any]) -> Path:
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return path

    ranked = [
        {"prompt": f"Name fox {n}.", "responses": ["the fox", "a dog", "no way"], "ranks": [1, 2, 2]} for n in range(4)
    ]
    prompts = [{"prompt": f"Name fox {n}.", "family": "animals"} for n in range(6)]
    return {"rankings": write("rankings.jsonl", ranked), "prompts": write("prompts.jsonl", prompts),
            "scores": write("scores.py", SCORES)}  # fmt: skip


def flags(method: str, model: Path, files: dict[str, Path], out: Path) -> list[object]:
    given: list[object] = ["--method", method, "--model", model, "--output_dir", out, *COMMON, *SIZES[method]]
    if method in ("dpo", "kto"):
        return [*given, "--train_data", files["rankings"]]
    return [*given, "--train_data", files["prompts"], "--reward_functions", f"[{files['scores']}:length]"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in load_policy(folder).state_dict().items()}


def run(*given: object) -> recipe.Result:
    result = recipe.run("baseline", *given)
    assert (result.code, result.err) == (0, ""), result.out + result.err
    return result


@pytest.mark.parametrize(
    ("method", "kind"),
    [("dpo", "full"), ("kto", "lora"), ("grpo", "adapter"), ("rloo", "lora"),
     *(pytest.param(*case, marks=pytest.mark.long) for case in
       (("kto", "full"), ("grpo", "full"), ("rloo", "full"), ("dpo", "adapter")))],
)  # fmt: skip
def test_every_method_trains_and_leaves_a_stage(tmp_path, base, files, tiny_tokenizer, method, kind):
    model = tiny_chain.save_adapter(tmp_path, base, tiny_tokenizer) if kind == "adapter" else base
    out = tmp_path / "run" / method
    given = [*flags(method, model, files, out), *(("--lora_rank", 4) if kind == "lora" else ())]
    run(*given)
    made = Manifest.read(out)
    assert (made.stage, made.base_model) == (method, str(model))
    policy = load_policy(out)
    assert isinstance(policy, PeftModel) == (kind != "full")
    if isinstance(policy, PeftModel):
        assert list(policy.peft_config) == ["default"]
        assert not (out / "ref").exists()
    if kind != "lora":
        before, after = weights(model), weights(out)
        assert before.keys() == after.keys()
        assert any(not before[name].equal(after[name]) for name in before)
    assert load_tokenizer(out).chat_template == load_tokenizer(base).chat_template
    told = json.loads((out / "baseline.json").read_text())
    assert told["method"] == method
    assert told["metrics"]["seconds"]["value"] > 0
    calls = [int(line) for line in (tmp_path / "calls").read_text().split()] if method in ("grpo", "rloo") else []
    assert made.outputs["score_calls"] == told["metrics"]["score_calls"]["value"] == sum(calls)
    assert sum(calls) == (16 if calls else 0)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"] for line in lines}
    # Before the first step the policy is its reference: an adapter that is trained on, the frozen copy of itself.
    name, there = {"dpo": ("loss", math.log(2)), "kto": ("loss", 0.5)}.get(method, ("kl", 0.0))
    assert lines[0][name] == pytest.approx(there, abs=1e-5)
    assert max(steps) == {"dpo": 2, "kto": 2, "grpo": 4, "rloo": 4}[method]
    assert (out / "report.html").exists()
    for name in ("baseline.json", "report.html"):  # a run that was killed before it wrote them
        (out / name).unlink()
    assert "complete, skipped" in run(*given).out
    assert json.loads((out / "baseline.json").read_text()) == told
    assert (out / "report.html").exists()


def test_pairs_and_labels_by_hand(tiny_tokenizer):
    trainers = recipe.load("baseline_trainers")
    chat.prepare_tokenizer(tiny_tokenizer)
    ranking = Ranking(USER, ("a", "b", "c", "d"), (1, 2, 2, 3))  # a over b, c, d; b and c over d
    pairs = trainers.pairs([ranking, Ranking(USER, ("x", "y"), (1, 1))], tiny_tokenizer, 0)
    texts = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs]
    assert texts == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]
    assert all(row["prompt"] == USER for row in pairs)
    rows = trainers.labelled([ranking, Ranking(USER, ("x", "y"), (1, 1))], tiny_tokenizer, 0)
    # b and c won one and lost one
    assert sorted((row["completion"][0]["content"], row["label"]) for row in rows) == [("a", True), ("d", False)]
    many = [Ranking(USER, (f"a{n}", f"b{n}"), (1, 2)) for n in range(20)]
    one, two, three = (trainers.labelled(many, tiny_tokenizer, seed) for seed in (0, 0, 1))
    assert one == two != three


def test_prompts_come_pass_by_pass(tiny_tokenizer):
    trainers, configs = recipe.load("baseline_trainers"), recipe.load("baseline_config")
    own = configs.OnlineConfig(updates=5, rollout_size=8, generations=4, batch_size=8)
    config = configs.BaselineConfig(method="rloo", rloo=own, seed=3)
    prompts = [Prompt([{"role": "user", "content": str(n)}]) for n in range(4)]
    chat.prepare_tokenizer(tiny_tokenizer)
    rows = trainers.prompt_rows(config, prompts, tiny_tokenizer)
    order = [row["row"] for row in rows]
    assert len(order) == 5 * 8 // 4
    assert sorted(order[:4]) == sorted(order[4:8]) == [0, 1, 2, 3]
    assert order == [int(row["prompt"][0]["content"]) for row in rows]


def test_scores_are_those_of_ppo(tmp_path, base, tiny_tokenizer):
    """The reward model's score plus the function's, weighed; a response without a stop token gets the penalty."""
    trainers, configs = recipe.load("baseline_trainers"), recipe.load("baseline_config")
    scorer = tiny_chain.save_reward_model(tmp_path / "scorer", base, tiny_tokenizer)
    (tmp_path / "mine.py").write_text(
        "def three(prompts, completions):\n    return [3.0 * len(c) for c in completions]\n"
    )
    config = configs.BaselineConfig(
        method="grpo", reward_model=str(scorer), reward_functions=[f"{tmp_path}/mine.py:three"], bf16=False,
        reward_weights=[2.0, 0.5], missing_eos_penalty=7.0,
    )  # fmt: skip
    tokenizer = load_tokenizer(base)
    (stop,) = trainers.model_stop_ids(load_policy(base), tokenizer)[:1]
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    prompts = [Prompt(USER), Prompt(USER, text=True)]
    scored = trainers.Scored(config, prompts, tokenizer, [stop, other])
    ids = tokenizer("the fox", add_special_tokens=False)["input_ids"]
    found = scored(completion_ids=[[*ids, stop], [*ids, other], ids], row=[0, 1, 0], prompts=None, trainer_state=None)
    text = tokenizer.decode(ids)
    alone = RewardModel.load(scorer)([USER], [[{"role": "assistant", "content": text}]])[0]
    assert found == pytest.approx([2 * alone + 1.5, 2 * alone + 1.5 * len(text), -7.0], abs=1e-5)
    assert scored.calls == 3


def test_an_ensemble_scores(tmp_path, base, tiny_tokenizer):
    trainers, configs = recipe.load("baseline_trainers"), recipe.load("baseline_config")
    members = [tiny_chain.save_reward_model(tmp_path / f"m{n}", base, tiny_tokenizer, seed=n) for n in (2, 3)]
    folder = tmp_path / "ensemble"
    RewardEnsemble.load(members, rule="min").save(folder)
    config = configs.BaselineConfig(method="rloo", reward_model=str(folder), bf16=False)
    (scorer,) = trainers.score_functions(config)
    texts = ["the fox", "a lazy dog"]
    alone = [RewardModel.load(member)(["Name it."] * 2, texts) for member in members]
    assert scorer(["Name it."] * 2, texts) == pytest.approx([min(pair) for pair in zip(*alone, strict=True)], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", pytest.param("dpo", marks=pytest.mark.long)])
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, base, files, method, monkeypatch):
    whole, broken = tmp_path / "whole" / method, tmp_path / "broken" / method
    more = (f"--{method}.save_steps", 1)
    run(*flags(method, base, files, whole), *more)
    given = [*flags(method, base, files, broken), *more]
    if method == "grpo":
        (tmp_path / "calls").unlink()
        (tmp_path / "stop").write_text("")
        assert recipe.run("baseline", *given).code == 130  # in the second rollout
        (tmp_path / "stop").unlink()
    else:
        steps, original = [], trl.DPOTrainer.compute_loss

        def interrupted(self, *args, **kwargs):
            steps.append(self.state.global_step)
            if self.state.global_step == 1:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        monkeypatch.setattr(trl.DPOTrainer, "compute_loss", interrupted)
        assert recipe.run("baseline", *given).code == 130
        monkeypatch.undo()
    assert not (broken / "manifest.json").exists()
    assert "going on" in run(*given).out
    first, second = weights(whole), weights(broken)
    assert all(first[name].equal(second[name]) for name in first)


def test_only_ktos_micro_batch_size_makes_another_run():
    """KTO estimates its KL within a micro-batch; elsewhere the size is one of memory."""
    module = recipe.load("baseline")
    configs = {
        method: [module.BaselineConfig(method=method, **{method: kind(microbatch_size=size)}) for size in (2, 4)]
        for method, kind in (("kto", PreferenceConfig), ("dpo", PreferenceConfig), ("grpo", OnlineConfig))
    }
    found = {method: len(changes(*(inputs_of(one, {}) for one in two))) for method, two in configs.items()}
    assert found == {"kto": 1, "dpo": 0, "grpo": 0}


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("dpo", ("--reward_functions", "[a.py:b]"), "dpo learns from rankings: leave out reward_functions"),
        ("kto", ("--reward_weights", "[1]"), "kto learns from rankings: leave out reward_weights"),
        ("grpo", ("--reward_weights", "[1, 2]"), "reward_weights has 2 numbers for 1 scores"),
        ("kto", ("--kto.microbatch_size", 1), "kto.microbatch_size=1 must be at least 2"),
        ("rloo", ("--rloo.generations", 3), "rloo: generations=3 must divide rollout_size=8"),
        ("dpo", ("--max_length", 3), "no pair fits max_length=3; raise it"),
        ("dpo", ("--dpo", "null"), "dpo is null; give its settings"),
    ],
)
def test_mistakes_are_one_line(tmp_path, base, files, method, more, message):
    result = recipe.run("baseline", *flags(method, base, files, tmp_path / "run" / method), *more)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_policies_stand_in_one_table(tmp_path, base, files, tiny_tokenizer):
    run(*flags("rloo", base, files, tmp_path / "run" / "rloo"))
    scorer = tiny_chain.save_reward_model(tmp_path / "scorer", base, tiny_tokenizer)
    other = tiny_chain.save_adapter(tmp_path, base, tiny_tokenizer).rename(tmp_path / "mine")
    held_out, out = tmp_path / "held_out.jsonl", tmp_path / "run" / "comparison"
    held_out.write_text("".join(json.dumps({"prompt": f"Name dog {n}."}) + "\n" for n in range(4)))
    given = ["--policy", base, "--baseline", base, "--policies", f"rloo,{other}", "--judge", scorer, "--best_of", 0,
             "--eval_data", held_out, "--max_new_tokens", 4, "--output_dir", out, "--bf16", "false"]  # fmt: skip
    result = recipe.run("evaluate_policy", *given)
    assert (result.code, result.err) == (0, ""), result.out
    told = json.loads((out / "evaluation.json").read_text())
    assert list(told) == ["sft", "ppo", "rloo", "mine", "judge", "metrics"]
    made = Manifest.read(tmp_path / "run" / "rloo")
    assert (told["rloo"]["score_calls"], told["rloo"]["train_seconds"]) == (16, round(made.seconds, 1))
    assert told["ppo"]["kl_nats"] == 0  # the baseline itself
    for name in ("rloo", "mine"):
        assert told[name]["kl_nats"] > 0
        assert 0 <= told[name]["win_rate_vs_sft"] <= 1
    assert all("score_calls" not in told[name] for name in ("ppo", "mine"))  # no stage made them
    assert "RLOO" in result.out
    assert "score calls" in result.out
    row = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert {"sft", "ppo", "rloo", "mine"} <= row.keys()
    refused = recipe.run("evaluate_policy", *given, "--policies", f"rloo,{tmp_path / 'run' / 'rloo'}", "--overwrite")
    assert refused.code == 2
    assert "policies: rloo, rloo: name different folders" in refused.err
