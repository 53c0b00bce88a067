"""Studies 7, 8, 9, 11, 13, 16, 17 and 19: what each computes, by hand; a seed of each on worlds that take seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import InputError
from rlhf.rows.records import Ranking
from rlhf_recipes.ppo import PPORecipe
from rlhf_recipes.sft import SFTRecipe
from rlhf_recipes.studies import (
    baselines_toy,
    flywheel_toy,
    hh,
    noisy_labels,
    ptx_toy,
    safety_toy,
    shared_runs,
    steps_toy,
    vllm_toy,
)
from rlhf_recipes.studies.study import Row, StudyConfig, main, run_seed

USER = [{"role": "user", "content": "Who?"}]


def margins(study: Any, rows: list[Row]) -> list[float]:
    return [pytest.approx(check.margin(rows)) for check in study.checks]


def test_pairs_are_turned_round_by_the_share_and_ties_stay():
    rankings = [Ranking(USER, ("a", "b", "c", "d"), (1.0, 2.0, 3.0, 3.0)) for _ in range(2000)]
    rows = noisy_labels.flipped_pairs(rankings, 0.25, seed=3)
    assert [row["responses"] for row in rows[:2]] == [["a", "b"], ["c", "d"]]
    first, second = ([row["ranks"] for row in rows[start::2]] for start in (0, 1))
    assert 0.22 < first.count([2.0, 1.0]) / 2000 < 0.28
    assert first.count([2.0, 1.0]) + first.count([1.0, 2.0]) == 2000
    assert second == [[3.0, 3.0]] * 2000
    assert noisy_labels.flipped_pairs(rankings, 0.25, seed=3) == rows
    assert noisy_labels.flipped_pairs(rankings[:1], 0.0, seed=3)[0]["ranks"] == [1.0, 2.0]


def test_margins_by_hand():
    at_n = {"process model": (0.5, 0.8, 0.9), "outcome model": (0.5, 0.7, 0.75), "majority": (0.5, 0.66, 0.7)}
    rows = [Row(name, value, n) for name, values in at_n.items() for n, value in zip((1, 4, 64), values, strict=True)]
    assert margins(steps_toy.STUDY, rows) == [0.15, 0.05, 0.2 - 0.14]

    gold = {"single model": 5.0, "mean": 5.5, "minimum": 6.0, "mean less spread": 6.5, "averaged weights (WARM)": 4.0}
    rows = [Row(name, value + shift, panel=panel) for name, value in gold.items() for panel, shift in
            (("equal", 0.0), ("end", 1.0))]  # fmt: skip
    assert margins(noisy_labels.STUDY, rows) == [1.0, 1.0, -1.0, -1.0]

    right = {"SmolLM2": 0.625, "MiniLM": 0.75, "their mean": 0.6875, "bag of words": 0.5}
    rows = [Row(name, value) for name, value in right.items()] + [Row("PPO over SFT", 0.75, panel="won")]
    assert margins(hh.STUDY, rows) == [0.125, 0.25, 0.1875, 0.125, 0.25, 0.1875, -0.0625, 0.25]

    losses = {"SFT": 1.0, "PPO": 1.5, "PPO with the mix": 1.1}
    rows = [Row(name, value, panel="loss") for name, value in losses.items()]
    rows += [Row(name, value, panel="gold") for name, value in zip(losses, (4.0, 7.0, 5.0), strict=True)]
    assert margins(ptx_toy.STUDY, rows) == [0.5, 0.4, 1.0, -0.5]

    rows = [Row("rounds", 4.0 + n, 200 * n, panel="gold") for n in (1, 2, 3)]
    rows += [Row("one shot", 6.5, 600, panel="gold")]
    rows += [Row("active choice", value, n, panel="accuracy") for n, value in ((200, 0.6), (600, 0.68))]
    rows += [Row("random choice", value, n, panel="accuracy") for n, value in ((200, 0.6), (600, 0.65))]
    assert margins(flywheel_toy.STUDY, rows) == [0.5, 0.03, 1 - 450 / 600]
    assert flywheel_toy.needed(rows, "active choice", 0.55) == 200
    with pytest.raises(InputError, match="'random choice' never reaches an accuracy"):
        flywheel_toy.needed(rows, "random choice", 0.7)

    rows = [Row("SFT", 0.1, panel="complied"), Row("PPO with rule-based rewards", 0.04, panel="complied")]
    rows += [Row("more than before", 0.05, panel="twins"), Row("the suite's prompts", 0.1, panel="attacked")]
    rows += [Row("PPO with novelty", 0.4, panel="attacked"), Row("PPO with novelty", 12, panel="distinct")]
    rows += [Row("PPO without novelty", 5, panel="distinct"), Row("zero-shot", 41, panel="distinct")]
    assert margins(safety_toy.STUDY, rows) == [0.01, -0.03, 0.1, 2, -29]

    rows = [
        Row(name, value, panel="gold")
        for name, value in zip(("PPO", "DPO", "KTO", "GRPO", "RLOO"), (6, 5, 7, 4, 6), strict=True)
    ]
    assert margins(baselines_toy.STUDY, rows) == [1, -1, 2, 0]

    kinds = {"built-in": (6.0, 4.0), "vLLM": (5.9, 2.0), "vLLM, one step off": (5.0, 3.0)}
    rows = [
        Row(f"{name}, {kind}", value, panel=panel)
        for name, values in kinds.items()
        for kind in ("full weights", "LoRA")
        for panel, value in zip(("gold", "pace"), values, strict=True)
    ]
    assert margins(vllm_toy.STUDY, rows) == [0.2, -0.7, 0.2, -0.7, 0.5, 0.5]


def test_settings_are_not_chosen_on_a_reported_seed() -> None:
    with pytest.raises(InputError, match="report others"):
        baselines_toy.BaselinesConfig(seeds=[0, 9])
    with pytest.raises(InputError, match="as many trials"):
        baselines_toy.BaselinesConfig(learning_rates={"ppo": [1e-3], "dpo": [1e-3, 1e-4]})


@pytest.mark.long
def test_baselines_are_tuned_before_they_are_compared(tmp_path: Path) -> None:
    flags = ["--chain", "smoke.yaml", "--output_dir", str(tmp_path / "studies"), "--seeds", "[0]"]
    methods, few = ("ppo", "grpo", "rloo", "dpo", "kto"), {"batch_size": 8, "microbatch_size": 8}
    flags += ["--learning_rates", json.dumps({method: [1e-4, 1e-2] for method in methods})]
    online = {"updates": 4, "rollout_size": 16, "generations": 4, **few}
    own = {
        "max_new_tokens": 16,
        "max_length": 160,
        "bf16": False,
        "dpo": few,
        "kto": few,
        "grpo": online,
        "rloo": online,
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps({"baseline": own}))
    flags += ["--baselines", str(tmp_path / "tiny.yaml")]
    with pytest.raises(InputError, match="run the trials first"):
        baselines_toy.main(flags)
    baselines_toy.main([*flags, "--tune", "true"])
    kept = json.loads((tmp_path / "studies/baselines_toy/tuned.json").read_text())
    assert kept["seed"] == 9
    for method, trials in kept["trials"].items():
        assert kept["best"][method] == float(max(trials, key=lambda rate: trials[rate]))
    baselines_toy.main(flags)
    result = json.loads((tmp_path / "studies/baselines_toy/baselines_toy.json").read_text())
    calls = {point["series"]: point["value"] for point in result["points"] if point["panel"] == "calls"}
    assert calls == {"PPO": 64, "GRPO": 64, "RLOO": 64, "DPO": 0, "KTO": 0}
    tried = {(p["series"].lower(), p["x"]): p["value"] for p in result["points"] if p["panel"] == "trials"}
    assert tried == {(method, float(rate)): gold for method in methods for rate, gold in kept["trials"][method].items()}
    assert result["seeds"] == [0]


def test_a_chain_with_reward_functions_of_its_own_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gold is made to watch PPO only where nothing else scores beside the reward model."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        shared_runs.whole, "steps_of", lambda config: seen.update({config.output_dir: config.ppo}) or []
    )
    for name, chain in (("toy", "toy.yaml"), ("safety", "safety.yaml")):
        shared_runs.chain(StudyConfig(output_dir=str(tmp_path / "studies" / name / "seed-0"), seeds=[0], chain=chain))
    watched, own = seen.values()
    assert (watched.reward_functions, watched.reward_weights) == ([shared_runs.GOLD], [1.0, 0.0])
    assert own.reward_functions == ["rlhf.safety.refusals:keeps_behaviour"]
    assert own.reward_weights == [1.0, 0.5, 1.0]


def test_a_further_stage_has_the_chains_flags_of_its_section(tmp_path: Path) -> None:
    """Else its arm would differ from the chain's by more than the study's factor; what the study sets counts."""
    flags = ["--ppo.learning_rate=0.125", "--sft.epochs", "9", "--ppo.updates", "7", "--ppo.kl-coef", "0.5"]
    config = StudyConfig(output_dir=str(tmp_path / "studies/x/seed-0"), seeds=[0], chain_flags=flags)
    seen: list[Any] = []
    shared_runs.stage(config, lambda own: seen.append(own) or {}, PPORecipe, "ppo", "ppo_other", kl_coef=0.25)
    shared_runs.stage(config, lambda own: seen.append(own) or {}, SFTRecipe, "sft", "sft_other")
    of_ppo, of_sft = seen
    assert (of_ppo.learning_rate, of_ppo.updates, of_ppo.kl_coef) == (0.125, 7, 0.25)
    assert of_sft.epochs == 9


SMALL: dict[str, tuple[Any, Any, list[str]]] = {
    "noisy_labels": (noisy_labels.STUDY, noisy_labels.NoisyConfig,
                     ["--members", "2", "--updates", "2", "--rollout_size", "16", "--minibatch_size", "8"]),
    "ptx_toy": (ptx_toy.STUDY, ptx_toy.PtxConfig, ["--updates", "2", "--pretraining_rows", "4"]),
    "flywheel_toy": (flywheel_toy.STUDY, flywheel_toy.FlywheelStudyConfig,
                     ["--rounds", "2", "--items", "16", "--pool", "2", "--updates", "2", "--rollout_size", "16"]),
    "safety_toy": (safety_toy.STUDY, safety_toy.SafetyStudyConfig, ["--attacks", "8"]),
    "steps_toy": (steps_toy.STUDY, steps_toy.StepsConfig, ["--n", "4", "--max_prompts", "10"]),
    "hh": (hh.STUDY, hh.HHConfig, ["--small", "smoke.yaml"]),
}  # fmt: skip
TINY_STEPS = [
    "--data.options={prompts: 40, demonstrations: 48, pretraining_documents: 300, evaluation_prompts: 12,"
    " solutions: 60, held_out_solutions: 40}",
    "--base.options={hidden_size: 32, layers: 2, heads: 2, learning_rate: 5.0e-3}",
    "--sft.save_steps=0",
]
TINY_SAFETY = [
    "--data.options={prompts: 60, demonstrations: 40, pretraining_documents: 300, evaluation_prompts: 12,"
    " red_team: 24}",
    "--data.comparisons=24", "--data.max_new_tokens=16",
    "--base.options={hidden_size: 32, layers: 2, heads: 2, learning_rate: 5.0e-3}", "--sft.save_steps=0",
    "--ppo.updates=2", "--ppo.value_warmup_updates=1", "--ppo.rollout_size=16", "--ppo.minibatch_size=8",
    "--ppo.max_new_tokens=16",
    "--evaluation.max_prompts=8", "--evaluation.best_of=0", "--red_team.max_new_tokens=16",
]  # fmt: skip
CHAINS = {"steps_toy": ("toy_steps.yaml", TINY_STEPS), "safety_toy": ("safety.yaml", TINY_SAFETY)}


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_a_seed_of_each_study(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, value in (("updates", 2), ("rollout_size", 16), ("minibatch_size", 8), ("value_warmup_updates", 1)):
        monkeypatch.setitem(safety_toy.TRAIN, size, value)
    study, config_class, flags = SMALL[name]
    chain, chain_flags = CHAINS.get(name, ("smoke.yaml", []))
    own = ["--chain", chain, "--chain_flags", json.dumps(chain_flags)]
    words = ["--seeds", "[0]", "--output_dir", str(tmp_path / "studies"), *own, *flags]
    main(study, config_class, noisy_labels.__file__.replace("noisy_labels", name), words)
    result = json.loads((tmp_path / f"studies/{name}/{name}.json").read_text())
    assert result["verdict"] == "too few seeds"
    assert {point["panel"] for point in result["points"]} == {panel.name for panel in study.panels}
    assert (tmp_path / f"studies/{name}/{name}.html").is_file()
    manifest = tmp_path / f"studies/{name}/seed-0/manifest.json"
    before = manifest.stat().st_mtime_ns
    main(study, config_class, noisy_labels.__file__.replace("noisy_labels", name), words)
    assert manifest.stat().st_mtime_ns == before, "a seed that is complete is not run again"


@pytest.mark.parametrize(
    ("study", "config", "message"),
    [
        (vllm_toy.STUDY, vllm_toy.VLLMConfig(python="nowhere/python"), "nowhere/python: not there"),
        (baselines_toy.STUDY, baselines_toy.BaselinesConfig(), "run the trials first"),
        (steps_toy.STUDY, steps_toy.StepsConfig(n=0), "n=0 must be at least 1"),
        (flywheel_toy.STUDY, flywheel_toy.FlywheelStudyConfig(items=0), "items=0 must be at least 2"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(study, config, message, tmp_path):
    config = replace(config, output_dir=str(tmp_path / "studies"))
    with pytest.raises(InputError, match=message):
        run_seed(study, config, 0)
    assert not any(tmp_path.iterdir())
