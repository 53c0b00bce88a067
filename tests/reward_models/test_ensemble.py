"""Ensembles: rules by hand, aligned normalisers, one base in memory, PPO's metric, the card; averaged weights."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from reference import recipe
from reference.ppo_runs import lines, make
from reference.tiny_chain import save_adapter, save_base, shake
from transformers import AutoModelForSequenceClassification

from reward_models import averaging
from reward_models import ensemble as ensembles
from reward_models.averaging import average_folders
from reward_models.card.disagreement import disagreement
from reward_models.card.pairs import scored_pairs
from reward_models.ensemble import RewardEnsemble, load_scorer
from reward_models.functions import conversation
from reward_models.scoring import RewardModel
from rlhf.errors import InputError
from rlhf.models.scalar import NORMALIZER_FILE, ScoreNormalizer, new_scalar_model
from rlhf.rows.records import Ranking
from rlhf.run.objects import of_function

PROMPTS = ["What is the capital of France?", "Count to ten", "Hello?"]
COMPLETIONS = ["Paris", "one two three four five", "Hi"]
RANKINGS = [
    {"prompt": f"Name {n}.", "responses": [f"the fox {n}", f"a dog {n}", "no"], "ranks": [1, 2, 3]} for n in range(6)
]
TALKS = [conversation(row["prompt"], text) for row in RANKINGS for text in row["responses"]]


def member(folder: Path, start: Path, tokenizer, seed: int, size: float = 0.1, head: int | None = None) -> Path:
    """A reward model: noise of `seed` on the weights (an adapter's factors), the head of `head` or of the seed."""
    scalar = new_scalar_model(start, seed=seed if head is None else head)
    shake(scalar, seed, size, only="lora_" if isinstance(scalar, PeftModel) else "")
    scalar.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    ScoreNormalizer(mean=0.1 * seed, std=1.0 + seed, count=10).save(folder)
    return folder


@pytest.fixture
def full(tmp_path, tiny_model, tiny_tokenizer) -> list[Path]:
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    return [member(tmp_path / f"m{seed}", base, tiny_tokenizer, seed) for seed in (1, 2, 3)]


@pytest.fixture
def adapters(tmp_path, tiny_model, tiny_tokenizer) -> list[Path]:
    shake(tiny_model, 0, 0.05)
    sft = save_adapter(tmp_path, save_base(tmp_path, tiny_model, tiny_tokenizer), tiny_tokenizer)
    return [member(tmp_path / f"m{seed}", sft, tiny_tokenizer, seed, head=9) for seed in (1, 2)]


# -- rules ----------------------------------------------------------------------------------------------------


def test_the_rules_by_hand():
    scores = torch.tensor([[1.0, -1.0], [3.0, -1.0], [2.0, 5.0]])
    assert ensembles.mean_score(scores).tolist() == [2.0, 1.0]
    assert ensembles.least_score(scores).tolist() == [1.0, -1.0]
    spread = [math.sqrt(2 / 3), math.sqrt((4 + 4 + 16) / 3)]
    assert ensembles.spread_of(scores).tolist() == pytest.approx(spread, abs=1e-6)
    assert ensembles.mean_minus_std(scores, 0.5).tolist() == pytest.approx([2 - spread[0] / 2, 1 - spread[1] / 2])


@pytest.mark.parametrize("rule", ensembles.RULES)
def test_scores_are_the_rule_over_the_members_own(full, rule):
    own = np.array([RewardModel.load(folder, device="cpu")(PROMPTS, COMPLETIONS) for folder in full])
    expected = {"mean": own.mean(0), "min": own.min(0), "mean_minus_std": own.mean(0) - 2.0 * own.std(0)}[rule]
    ensemble, logged = RewardEnsemble.load(full, rule, k=2.0, device="cpu"), {}
    scores = ensemble(PROMPTS, COMPLETIONS, log_metric=logged.setdefault, log_extra=logged.setdefault, answer=["x"] * 3)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert own.std(0).min() > 1e-3
    talks = [conversation(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    np.testing.assert_allclose(ensemble.score(talks), expected, atol=1e-5)
    np.testing.assert_allclose(ensemble.spread(talks), own.std(0), atol=1e-5)
    assert logged["ensemble_std"] == pytest.approx(own.std(0).mean(), abs=1e-5)  # the metric came first
    assert ensemble([], []) == []


def test_what_cannot_be_an_ensemble_is_refused(full):
    with pytest.raises(InputError, match="got 1 reward models"):
        RewardEnsemble.load(full[:1])
    with pytest.raises(InputError, match="got one folder"):
        RewardEnsemble.load(str(full[0]))
    with pytest.raises(InputError, match="rule='median' must be one of mean, min, mean_minus_std"):
        RewardEnsemble.load(full, "median")
    with pytest.raises(InputError, match=r"k=-1\.0"):
        RewardEnsemble.load(full, k=-1.0)
    (full[1] / NORMALIZER_FILE).unlink()
    with pytest.raises(InputError, match="m2 has no measured normaliser"):
        RewardEnsemble.load(full)
    assert RewardEnsemble.load(full, responses=RANKINGS).members[1].normalizer.count == 18


# -- normalisers, memory, fingerprints ------------------------------------------------------------------------


def test_normalisers_are_aligned_on_the_same_responses(full):
    ensemble = RewardEnsemble.load(full, responses=RANKINGS, device="cpu")
    scores = ensemble.member_scores(TALKS)
    np.testing.assert_allclose(scores.mean(1), 0.0, atol=1e-5)
    np.testing.assert_allclose(scores.std(1, correction=0), 1.0, atol=1e-5)
    raw = RewardModel.load(full[0], device="cpu").raw_scores(TALKS).numpy()
    assert ensemble.members[0].normalizer.mean == pytest.approx(raw.mean(), abs=1e-5)
    assert ensemble.members[0].normalizer.std == pytest.approx(raw.std(), abs=1e-5)


def test_adapters_over_one_base_share_it_and_score_as_alone(adapters, monkeypatch):
    read, load = [], ensembles.load_scalar_base
    monkeypatch.setattr(ensembles, "load_scalar_base", lambda *given: read.append(given) or load(*given))
    ensemble = RewardEnsemble.load(adapters, device="cpu")
    assert len(read) == 1
    one, two = (dict(m.model.named_parameters()) for m in ensemble.members)
    shared = [name for name in one if one[name] is two[name]]
    assert len(shared) > 15
    assert not any("lora_" in name or "modules_to_save" in name for name in shared)
    alone = [RewardModel.load(folder, device="cpu").score(TALKS) for folder in adapters]
    assert torch.equal(ensemble.member_scores(TALKS), torch.stack(alone))
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


def test_a_resumed_run_notices_another_member_rule_or_normaliser(full):
    def ensemble(folders=full, **given) -> str:
        return of_function(RewardEnsemble.load(folders, device="cpu", **given))

    same = ensemble()
    assert same == ensemble()
    changed = [ensemble(rule="min"), ensemble(k=2.0), ensemble(full[:2]), ensemble(responses=RANKINGS)]
    assert len({same, *changed}) == 5


# -- saved, served to PPO, on the card -------------------------------------------------------------------------


def test_a_saved_ensemble_is_the_same_and_a_changed_member_is_refused(tmp_path, full):
    ensemble = RewardEnsemble.load(full, "mean_minus_std", 0.5, responses=RANKINGS, device="cpu")
    (tmp_path / "both").mkdir()
    ensemble.save(tmp_path / "both")
    again = load_scorer(tmp_path / "both", device="cpu")
    assert isinstance(again, RewardEnsemble)
    assert torch.equal(again.score(TALKS), ensemble.score(TALKS))
    assert isinstance(load_scorer(full[0], device="cpu"), RewardModel)
    shuffled = copy.deepcopy(ensemble.members[0].model)
    shake(shuffled, 5)
    shuffled.save_pretrained(full[0])
    with pytest.raises(InputError, match="m1 has changed since the ensemble was made"):
        load_scorer(tmp_path / "both")


def test_ppo_logs_the_spread_and_the_value_model_starts_from_the_first_member(tmp_path, full):
    ensemble = RewardEnsemble.load(full, responses=RANKINGS, device="cpu")
    settings = {"updates": 1, "eval_rows": [{"prompt": "Hi"}], "eval_steps": 1}
    trainer = make(tmp_path, str(full[0].parent / "base"), ensemble, **settings)
    head, first = trainer.actor_critic.value_head, ensemble.members[0]
    expected = first.model.score.weight.detach() / first.normalizer.std
    np.testing.assert_allclose(head.weight.detach(), expected, atol=1e-6)
    trainer.train()
    row = lines(tmp_path, "metrics.jsonl")[0]
    assert 0 < row["ensemble_std"] < 10
    assert row["eval_ensemble_std"] > 0
    assert all(sample["ensemble_std"] > 0 for sample in lines(tmp_path, "samples.jsonl"))


def test_the_cards_numbers_by_hand():
    rankings = [Ranking([{"role": "user", "content": str(n)}], ("good", "bad"), (1, 2)) for n in range(3)]
    members = np.array([[1.0, 0.0, 1.0, 0.0, 0.0, 3.0], [1.0, 0.0, 3.0, 0.0, 2.0, 1.0]])
    pairs = scored_pairs(rankings, members.mean(0).reshape(3, 2).tolist())
    card = disagreement(pairs, members, ["a", "b"], seed=0)
    assert card["std"] == pytest.approx((0.0 + 0.5 + 1.0) / 3)  # spreads 0 0, 1 0, 1 1
    assert [row["accuracy"] for row in card["members"]] == pytest.approx([2 / 3, 1.0])
    assert [row["accuracy"] for row in card["by_spread"]] == [1.0, 1.0, 0.0]  # the differences' 0, 1 and 2
    assert card["wrong_auc"] == 1.0


def test_the_spreads_interval_is_as_narrow_as_the_prompts_agree():
    """Spreads of 0.05 with a deviation of 0.005 over 20 prompts: half the width is 2.09 * 0.005 / sqrt(20)."""
    rankings = [Ranking([{"role": "user", "content": str(n)}], ("good", "bad"), (1, 2)) for n in range(20)]
    apart = 0.05 + 0.005 * np.sqrt(19 / 20) * np.resize([1.0, -1.0], 20)
    members = np.stack([np.repeat(apart, 2), -np.repeat(apart, 2)])
    card = disagreement(scored_pairs(rankings, [(1.0, 0.0)] * 20), members, ["a", "b"], seed=0)
    assert card["std_ci"] == pytest.approx([0.05 - 0.00234, 0.05 + 0.00234], abs=1e-5)


def test_the_recipe_makes_a_folder_that_evaluation_and_ppo_take(tmp_path, full):
    data = tmp_path / "rankings.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in RANKINGS))
    out = tmp_path / "run" / "ensemble"
    members = ",".join(map(str, full[:2]))
    flags = ["--members", members, "--data", data, "--eval_data", data, "--rule", "min", "--output_dir", out]
    first = recipe.run("ensemble", *flags)
    assert first.code == 0, first.err
    metrics = json.loads((out / "ensemble.json").read_text())["metrics"]
    assert {"ensemble_std", "accuracy", "accuracy_m1", "accuracy_m2"} == metrics.keys()
    assert metrics["ensemble_std"]["low"] <= metrics["ensemble_std"]["value"] <= metrics["ensemble_std"]["high"]
    assert "Members and their spread" in (out / "reward_report.html").read_text()
    assert "2 reward models, rule min." in (out / "ensemble.html").read_text()
    assert "complete, skipped" in recipe.run("ensemble", *flags).out
    assert recipe.run("ensemble", "--members", full[0], "--data", data).code == 2
    card = ["--reward_model", out, "--data", data, "--output_dir", tmp_path / "card", "--sensitivity_pairs", 0]
    again = recipe.run("evaluate_reward_model", *card)
    assert again.code == 0, again.err
    judged = recipe.run("judge_card", "--judge", out, "--human", data, "--output_dir", tmp_path / "judge")
    assert judged.code == 0, judged.err
    sft = recipe.load("sft")
    chosen, _ = sft.inputs(sft.SFTRecipe(model=str(full[0]), train_data=str(data), best_by=str(out)))
    assert sft.load_scorer(chosen)(["Hi."], ["Yes."]) == load_scorer(out)(["Hi."], ["Yes."])


# -- WARM ------------------------------------------------------------------------------------------------------


def test_averaged_weights_are_the_mean(tmp_path, tiny_model, tiny_tokenizer):
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    folders = [member(tmp_path / f"m{n}", base, tiny_tokenizer, n, size=0.005, head=9) for n in (1, 2, 3)]
    average = average_folders(folders, tmp_path / "warm", RANKINGS)
    states = [AutoModelForSequenceClassification.from_pretrained(f, dtype=torch.float32).state_dict() for f in folders]
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "warm", dtype=torch.float32).state_dict()
    for name, tensor in saved.items():
        expected = np.mean([state[name].double().numpy() for state in states], axis=0)
        np.testing.assert_allclose(tensor, expected, atol=1e-6, err_msg=name)
    assert average.score(TALKS).mean().item() == pytest.approx(0.0, abs=1e-5)
    assert torch.equal(RewardModel.load(tmp_path / "warm", device="cpu").score(TALKS), average.score(TALKS))


def test_averaged_adapters_are_the_mean_of_the_merged_weights(tmp_path, adapters):
    average = average_folders(adapters, tmp_path / "warm", RANKINGS)
    merged = [RewardModel.load(folder, device="cpu").model.merge_and_unload() for folder in adapters]
    expected = copy.deepcopy(merged[0])
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_((parameter + dict(merged[1].named_parameters())[name]) / 2)
    wanted = RewardModel(expected, average.tokenizer).raw_scores(TALKS)
    torch.testing.assert_close(average.raw_scores(TALKS), wanted, atol=1e-5, rtol=0)
    assert isinstance(average.model, PeftModel)
    assert average.model.peft_config["default"].r == 8


@pytest.mark.parametrize("killed_in", ["reward_models.averaging.measured", "recipes.ensemble.measure"])
def test_an_average_that_was_killed_is_made_by_the_same_command(
    tmp_path, tiny_model, tiny_tokenizer, monkeypatch, killed_in
):
    """While its normaliser is measured there is no model yet; once it is there, the rest follows."""
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    members = [member(tmp_path / f"m{n}", base, tiny_tokenizer, n, size=0.005, head=9) for n in (1, 2)]
    data = tmp_path / "rankings.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in RANKINGS))
    flags = ["--members", ",".join(map(str, members)), "--data", data, "--rule", "average", "--output_dir"]

    def killed(*given):
        raise KeyboardInterrupt

    where, _, name = killed_in.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(recipe.load("ensemble") if where == "recipes.ensemble" else averaging, name, killed)
        assert recipe.run("ensemble", *flags, tmp_path / "out").code == 130
    assert (tmp_path / "out" / "config.json").exists() == (where == "recipes.ensemble")
    if where != "recipes.ensemble":
        assert not (tmp_path / "out" / "score_normalizer.json").exists()
    again = recipe.run("ensemble", *flags, tmp_path / "out")
    assert again.code == 0, again.err
    assert recipe.run("ensemble", *flags, tmp_path / "whole").code == 0
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("out", "whole")]
    assert names[0] == names[1]
    for name in ("model.safetensors", "score_normalizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert RewardModel.load(tmp_path / "out").normalizer.count > 0


def test_members_that_cannot_be_averaged_are_refused(tmp_path, full, tiny_model, tiny_tokenizer):
    with pytest.raises(InputError, match=r"the heads of .* point apart \(cosine .*init_seed"):
        average_folders(full[:2], tmp_path / "a", RANKINGS)
    stranger = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for number, parameter in enumerate(stranger.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.02)
    (tmp_path / "other").mkdir()
    other = save_base(tmp_path / "other", stranger, tiny_tokenizer)
    one = member(tmp_path / "one", tmp_path / "base", tiny_tokenizer, 1, size=0.001, head=9)
    two = member(tmp_path / "two", other, tiny_tokenizer, 2, size=0.001, head=9)
    with pytest.raises(InputError, match=r"the weights of .* point apart"):
        average_folders([one, two], tmp_path / "b", RANKINGS)
    sft = save_adapter(tmp_path, tmp_path / "base", tiny_tokenizer)
    adapter = member(tmp_path / "adapter", sft, tiny_tokenizer, 3, head=9)
    with pytest.raises(InputError, match=r"one is a full model and .*adapter an adapter"):
        average_folders([one, adapter], tmp_path / "c", RANKINGS)
    with pytest.raises(InputError, match="holds a model already"):
        average_folders([one, one], one, RANKINGS)
    tiny_tokenizer.add_tokens(["<new>"])
    tiny_tokenizer.save_pretrained(two)
    with pytest.raises(InputError, match="different tokenizers"):
        average_folders([one, two], tmp_path / "d", RANKINGS)
