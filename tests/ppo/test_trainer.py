"""PPOTrainer: step-0 facts, what may not change a gradient, settings that act, exact resume, and that it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from reference import ppo_numpy as slow
from reference import two_processes
from reference.ppo_runs import (
    ROWS,
    Graphs,
    StopAfter,
    is_value,
    lines,
    low_share,
    make,
    norm,
    prepared,
    same,
    watch_steps,
    weights,
)  # fmt: skip
from reference.prepared import prepared_models
from reference.tiny_chain import NORMALIZER, chain
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from reward_models import RewardModel
from rlhf import chat
from rlhf.errors import InputError, RunStopped
from rlhf.models import packing
from rlhf.padding import make_batch
from rlhf.ppo.trainer import PPOConfig


@pytest.fixture(params=["full", "lora"])
def folders(request, tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, request.param == "lora")


@pytest.fixture
def full(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)


# -- step 0 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True, "temperature": 0.7, "tokens_per_microbatch": 1}]
)
@pytest.mark.parametrize("padded", [False, True])
def test_step_0_is_exact(tmp_path, folders, changes, padded, monkeypatch):
    """Padded too: there, other than in a packed row, the company that a row is in shows in its last bits."""
    if padded:
        monkeypatch.setattr(packing, "can_pack", lambda model: False)
    trainer = make(tmp_path, folders[0], RewardModel.load(folders[1]), **changes)
    rollout = prepared(trainer)
    assert (rollout.kl == 0).all()
    metrics = trainer.update(rollout)
    assert metrics["kl_nats"] == 0.0
    assert metrics["step0_ratio_error"] == 0.0
    assert metrics["ratio_max"] > 1.0
    again = prepared(trainer)  # a later update's first step is as exact, while the KL has moved
    assert trainer.update(again)["step0_ratio_error"] == 0.0
    assert again.kl.abs().max() > 0


def test_old_logprobs_come_from_the_micro_batches_of_the_first_inner_epoch(tmp_path, folders, monkeypatch):
    """Other ones round differently, by shapes and machine: the first ratio would be near 1 only."""
    trainer, seen = make(tmp_path, folders[0], tokens_per_microbatch=60, inner_epochs=1), []

    def spy(prompt_ids, response_ids, *args):
        seen.append(tuple(zip(map(tuple, prompt_ids), map(tuple, response_ids), strict=True)))
        return make_batch(prompt_ids, response_ids, *args)

    monkeypatch.setattr("rlhf.ppo.trainer.make_batch", spy)
    monkeypatch.setattr("rlhf.ppo.rollout.make_batch", spy)
    rollout = prepared(trainer)
    collected = set(seen)
    seen.clear()
    trainer.update(rollout)
    assert set(seen) == collected
    assert sum(map(len, collected)) == len(rollout)
    assert max(map(len, collected)) > 1


def test_dropout_in_the_models_configuration_is_off(tmp_path, tiny_model, tiny_tokenizer):
    chat.prepare_tokenizer(tiny_tokenizer)
    model = LlamaForCausalLM(LlamaConfig(**{**tiny_model.config.to_dict(), "attention_dropout": 0.5}))
    trainer = make(tmp_path, model, tokenizer=tiny_tokenizer)
    assert trainer.module.training
    rollout = prepared(trainer)
    assert (rollout.kl == 0).all()
    assert trainer.update(rollout)["step0_ratio_error"] == 0.0


def test_logprobs_are_those_at_the_temperature_that_was_sampled(tmp_path, full):
    asked = []

    class Spy(two_processes.GivenResponses):
        def generate(self, prompt_ids, max_new_tokens, temperature, generator):
            asked.append((max_new_tokens, temperature))
            return super().generate(prompt_ids, max_new_tokens, temperature, generator)

    rollout = make(tmp_path, full[0], engine=Spy(), temperature=0.6).collect(make(tmp_path, full[0]).next_prompts())
    assert asked == [(8, 0.6)]
    model = AutoModelForCausalLM.from_pretrained(full[0]).eval()
    for i in range(len(rollout)):
        prompt, response = rollout.prompt_ids[i], rollout.response_ids[i]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].double() / 0.6
        expected = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(response) - 1), response]
        for name in ("logprobs", "reference_logprobs"):
            np.testing.assert_allclose(getattr(rollout, name)[i, : len(response)], expected, atol=1e-5)
            assert (getattr(rollout, name)[i, len(response) :] == 0).all()
        assert rollout.mask[i].sum() == len(response)


def test_values_start_from_the_reward_model_among_the_functions(tmp_path, folders):
    """And it is said to: the score of a response is the value of a response that goes on."""
    judge = RewardModel.load(folders[1])
    trainer = make(tmp_path, folders[0], [low_share, judge])
    head = trainer.accelerator.unwrap_model(trainer.module).value_head
    plain = judge.model.get_base_model() if isinstance(judge.model, PeftModel) else judge.model
    np.testing.assert_allclose(head.weight.detach(), plain.score.weight.detach() / NORMALIZER.std, atol=1e-7)
    assert make(tmp_path, folders[0]).collect(trainer.next_prompts()).values.abs().max() == 0


# -- the stages against the slow versions ------------------------------------------------------------------


def test_rewards_advantages_and_returns_against_the_slow_loops(tmp_path, full):
    settings = {"kl_coef": 0.3, "lam": 0.9, "gamma": 0.98, "updates": 3}
    trainer = make(tmp_path, full[0], RewardModel.load(full[1]), engine=two_processes.GivenResponses(), **settings)
    trainer.update(prepared(trainer))
    rollout = prepared(trainer)
    lengths = rollout.response_tokens.tolist()
    assert len(set(lengths)) > 3, "without padding, a mean over padding is the mean"
    rows = lambda name: [row[:n].tolist() for row, n in zip(getattr(rollout, name), lengths, strict=True)]  # noqa: E731
    rewards = [slow.token_rewards(s, k, 0.3) for s, k in zip(rollout.scores.tolist(), rows("kl"), strict=True)]
    both = [slow.gae(r, v, 0.98, 0.9) for r, v in zip(rewards, rows("values"), strict=True)]
    mean, var = slow.moments([b[0] for b in both])
    for i in range(len(rollout)):
        np.testing.assert_allclose(rows("rewards")[i], rewards[i], atol=1e-5)
        np.testing.assert_allclose(rows("returns")[i], both[i][1], atol=1e-5)
        np.testing.assert_allclose(rows("advantages")[i], (np.array(both[i][0]) - mean) / math.sqrt(var), atol=2e-5)
    metrics = trainer.update(rollout)
    kl = [sum(row) for row in rows("kl")]
    np.testing.assert_allclose(metrics["kl_nats"], np.mean(kl), atol=1e-6)
    np.testing.assert_allclose(metrics["objective"], np.mean(rollout.scores.numpy() - 0.3 * np.array(kl)), atol=1e-6)
    np.testing.assert_allclose(metrics["objective"], np.mean([sum(r) for r in rewards]), atol=1e-5)
    np.testing.assert_allclose(metrics["response_tokens"], np.mean(lengths), atol=1e-6)
    np.testing.assert_allclose(metrics["score"], rollout.raw_scores.mean(), atol=1e-6)


def test_metrics_of_a_rollout_count_real_tokens_only(tmp_path, full):
    trainer = make(tmp_path, full[0], RewardModel.load(full[1]), engine=two_processes.GivenResponses())
    rollout = prepared(trainer)
    lengths = rollout.response_tokens.tolist()
    assert len(set(lengths)) > 3
    rows = lambda name: [row[:n].double().numpy() for row, n in zip(getattr(rollout, name), lengths, strict=True)]  # noqa: E731
    entropies, values, returns = rows("entropy"), np.concatenate(rows("values")), np.concatenate(rows("returns"))
    metrics = trainer.update(rollout)
    expected = {
        "entropy_nats": np.mean([row.mean() for row in entropies]),
        "explained_variance": 1 - np.var(returns - values) / np.var(returns),
        "response_tokens": np.mean([len(ids) for ids in rollout.response_ids]),
        "eos_rate": np.mean([ids[-1] in trainer.stop_ids for ids in rollout.response_ids]),
        "score_std": np.std(rollout.raw_scores.double().numpy()),
        "score_length_correlation": np.corrcoef(rollout.raw_scores.double().numpy(), lengths)[0, 1],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_rescaled_rewards_have_unit_variance_and_their_mean(tmp_path, full):
    plain = prepared(make(tmp_path, full[0], RewardModel.load(full[1])))
    scaled = prepared(make(tmp_path, full[0], RewardModel.load(full[1]), rescale_rewards=True))
    before, after = plain.rewards[plain.mask].double(), scaled.rewards[scaled.mask].double()
    np.testing.assert_allclose(after.mean(), before.mean(), atol=1e-5)
    np.testing.assert_allclose(after.std(correction=0), 1.0, atol=1e-4)


def test_stages_in_the_wrong_order_say_so(tmp_path, full):
    trainer = make(tmp_path, full[0])
    rollout = trainer.collect(trainer.next_prompts())
    with pytest.raises(TypeError, match=r"call score\(rollout\) first"):
        trainer.advantages(rollout)
    with pytest.raises(TypeError, match=r"call advantages\(rollout\) first"):
        trainer.update(rollout)


# -- the gradient (what may not change it: test_invariance.py) ----------------------------------------------


def test_the_first_gradient_is_the_papers(tmp_path, folders):
    """At ratio 1: -sum(A * grad logp) / tokens for the policy, sum((V - R) * grad V) / tokens for the value model."""
    settings = {"inner_epochs": 1, "minibatch_size": 12, "max_grad_norm": 1e9, "temperature": 0.8}
    trainer = make(tmp_path, folders[0], RewardModel.load(folders[1]), **settings)
    rollout, seen = prepared(trainer), watch_steps(trainer)
    trainer.update(rollout)
    fresh = prepared_models(folders[0], value_model=folders[1])
    outputs = fresh(rollout.batch(range(12), 3, "cpu"), 0.8, ("policy", "value"))
    tokens = sum(map(len, rollout.response_ids))
    policy = -(rollout.advantages * outputs.logprobs).sum() / tokens
    value = 0.5 * (outputs.values - rollout.returns).square().sum() / tokens
    (policy + value).backward()
    same(seen[0], {name: p.grad for name, p in fresh.named_parameters() if p.grad is not None})


# -- settings that act -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inner_epochs", "minibatch_size", "steps"), [(1, 12, 1), (3, 4, 9), (2, 1, 24)])
def test_optimizer_steps_are_inner_epochs_times_minibatches(tmp_path, full, inner_epochs, minibatch_size, steps):
    trainer = make(tmp_path, full[0], inner_epochs=inner_epochs, minibatch_size=minibatch_size)
    seen = watch_steps(trainer)
    trainer.update(prepared(trainer))
    assert len(seen) == steps


def test_every_response_is_trained_once_per_inner_epoch(tmp_path, full):
    trainer = make(tmp_path, full[0], inner_epochs=3)
    rollout, trained = prepared(trainer), []
    outputs = trainer.outputs
    trainer.outputs = lambda rollout, rows, roles: (
        ("policy" in roles and trained.extend(rows)) or outputs(rollout, rows, roles)
    )
    trainer.update(rollout)
    epochs = [trained[i : i + 12] for i in range(0, 36, 12)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert epochs[0] != epochs[1]


def test_no_graph_outlives_its_micro_batch(tmp_path, folders):
    """One that does lies, in small pieces, between what the next one could take: a quarter more memory on SmolLM2."""
    trainer = make(tmp_path, folders[0], RewardModel.load(folders[1]), tokens_per_microbatch=60)
    rollout, graphs = prepared(trainer), Graphs()
    trainer.outputs = graphs.one_at_a_time(trainer.outputs)
    assert graphs.made == 0
    steps = trainer.update(rollout)["optimizer_steps"]
    assert graphs.made > steps
    assert graphs.alive() == 0


def test_gradients_are_clipped_apart_and_really(tmp_path, folders):
    trainer = make(
        tmp_path, folders[0], RewardModel.load(folders[1]), max_grad_norm=1e9, inner_epochs=1, minibatch_size=12
    )
    free = watch_steps(trainer)
    before = trainer.update(prepared(trainer))
    trainer = make(
        tmp_path, folders[0], RewardModel.load(folders[1]), max_grad_norm=1e-3, inner_epochs=1, minibatch_size=12
    )
    clipped = watch_steps(trainer)
    metrics = trainer.update(prepared(trainer))
    for value, name in ((False, "policy_grad_norm"), (True, "value_grad_norm")):
        np.testing.assert_allclose(norm(free[0], value), before[name], rtol=1e-4)
        assert before[name] > 2e-3
        np.testing.assert_allclose(norm(clipped[0], value), 1e-3, rtol=1e-2)
        np.testing.assert_allclose(metrics[name], before[name], rtol=1e-4)  # the norm that is logged is the one before


def test_one_step_is_adams_with_the_settings_given(tmp_path, full):
    settings = {
        "learning_rate": 2e-3,
        "value_learning_rate": 5e-3,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-4,
    }
    trainer = make(
        tmp_path,
        full[0],
        RewardModel.load(full[1]),
        inner_epochs=1,
        minibatch_size=12,
        lr_schedule="constant",
        **settings,
    )
    before, seen = weights(trainer), watch_steps(trainer, step=True)
    trainer.update(prepared(trainer))
    for name, after in weights(trainer).items():
        rate = 5e-3 if is_value(name) else 2e-3
        expected = slow.adam(before[name].numpy(), seen[0][name].numpy(), 1, rate, 0.8, 0.9, 1e-4)
        np.testing.assert_allclose(after, expected, atol=1e-6, err_msg=name)


def test_the_policy_stands_still_while_the_value_model_warms_up(tmp_path, folders):
    trainer = make(tmp_path, folders[0], RewardModel.load(folders[1]), value_warmup_updates=1, weight_decay=0.1)
    start = weights(trainer)
    trainer.update(prepared(trainer))
    warm = weights(trainer)
    for name in start:
        assert torch.equal(start[name], warm[name]) == (not is_value(name)), name
    trainer.update(prepared(trainer))
    later = weights(trainer)
    assert not all(torch.equal(warm[name], later[name]) for name in warm if not is_value(name))


@pytest.mark.parametrize(("warm", "told"), [(1, False), (2, True)])
def test_a_warm_up_as_long_as_the_run_is_told(tmp_path, folders, caplog, warm, told):
    trainer = make(tmp_path, folders[0], RewardModel.load(folders[1]), value_warmup_updates=warm, updates=2)
    trainer.train()
    assert ("value_warmup_updates=2 of updates=2: the policy is not trained" in caplog.text) == told


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [("linear", 0, [1, 0.75, 0.5, 0.25]), ("constant", 2, [0.5, 1, 1, 1]), ("linear", 2, [0.5, 1, 1, 0.5]),
     ("cosine", 0, [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)])],
)  # fmt: skip
def test_learning_rates_fall_by_update(tmp_path, full, schedule, warmup, factors):
    config = {
        "lr_schedule": schedule,
        "warmup_updates": warmup,
        "value_learning_rate": 3e-3,
        "updates": 4,
        "inner_epochs": 1,
    }
    trainer = make(tmp_path, full[0], **config)
    used = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: used.append([g["lr"] for g in trainer.optimizer.param_groups]) or step()
    trainer.train()
    np.testing.assert_allclose(used, [[1e-3 * f, 3e-3 * f] for f in factors for _ in range(2)], rtol=1e-9)
    np.testing.assert_allclose(
        [row["learning_rate"] for row in lines(tmp_path, "metrics.jsonl")], [1e-3 * f for f in factors], rtol=1e-9
    )


def test_the_kl_coefficient_follows_ziegler(tmp_path, full):
    trainer = make(tmp_path, full[0], updates=4, kl_coef=0.2, kl_target_nats=0.05, kl_horizon=60, learning_rate=5e-3)
    trainer.train()
    rows, expected = lines(tmp_path, "metrics.jsonl"), 0.2
    for row in rows:
        np.testing.assert_allclose(
            row["kl_coef"], expected, rtol=1e-6
        )  # what this update used; the next gets the new one
        expected *= 1 + min(max(row["kl_nats"] / 0.05 - 1, -0.2), 0.2) * 12 / 60
    np.testing.assert_allclose(trainer.kl_coef, expected, rtol=1e-6)
    assert rows[1]["kl_coef"] < 0.2 < max(row["kl_nats"] for row in rows) / 0.05


# -- scores ------------------------------------------------------------------------------------------------


def test_scores_are_normalised_then_clipped_then_the_missing_stop_rules(tmp_path, full):
    raw = [float(i) for i in range(12)]
    given = lambda prompts, completions, **columns: raw  # noqa: E731
    spread = np.std(raw)
    normal = (np.array(raw) - np.mean(raw)) / spread

    def run(**changes):
        trainer = make(
            tmp_path, full[0], given, engine=two_processes.GivenResponses(), missing_eos_penalty=3.0, **changes
        )
        rollout = trainer.score(trainer.collect(trainer.next_prompts()))
        assert rollout.raw_scores.tolist() == raw
        assert 0 < rollout.stopped.sum() < 12
        return rollout.scores.numpy(), rollout.stopped.numpy()

    scores, stopped = run()
    np.testing.assert_allclose(scores, np.where(stopped, raw, -3.0))
    scores, stopped = run(missing_eos="subtract")
    np.testing.assert_allclose(scores, np.array(raw) - 3.0 * ~stopped)
    scores, stopped = run(missing_eos="off", normalize_scores=True)
    np.testing.assert_allclose(scores, normal, atol=1e-5)
    scores, stopped = run(normalize_scores=True, clip_scores=1.0)
    np.testing.assert_allclose(scores, np.where(stopped, normal.clip(-1, 1), -3.0), atol=1e-5)
    scores, stopped = run(missing_eos="off", clip_scores=4.0)
    np.testing.assert_allclose(scores, np.clip(raw, -4, 4))


def test_what_a_function_logs_under_a_name_of_ours_stands_beside_it(tmp_path, full):
    def numbers(completions, log_metric, log_extra, **columns):
        for name in ("score", "step", "mine"):
            log_metric(name, 77.0)
            log_extra(name, ["a"] * len(completions))
        return [float(i) for i in range(len(completions))]

    make(tmp_path, full[0], numbers, updates=1, missing_eos="off", preflight=False).train()
    (row,) = lines(tmp_path, "metrics.jsonl")
    assert (row["step"], row["score"], row["mine"]) == (1, 5.5, 77.0)
    assert row["reward_function/score"] == row["reward_function/step"] == 77.0
    for sample in lines(tmp_path, "samples.jsonl"):
        assert sample["step"] == 1
        assert sample["score"] != "a"
        assert sample["mine"] == sample["reward_function/score"] == sample["reward_function/step"] == "a"


def test_functions_weights_columns_and_the_trainers_own_arguments(tmp_path, full):
    calls = []

    def numbers(prompts, completions, number, trainer_state, log_metric, log_extra, **columns):
        calls.append((trainer_state.global_step, list(number), prompts))
        log_metric("mean_number", sum(number) / len(number))
        log_extra("number", number)
        return [float(n) if n % 2 else None for n in number]

    async def constant(prompts, completions, **columns):
        return [2.0] * len(prompts)

    trainer = make(
        tmp_path,
        full[0],
        [numbers, constant],
        reward_weights=[1.0, 0.5],
        rows=ROWS[3:],
        eval_rows=ROWS[:3],
        eval_steps=1,
        updates=1,
        preflight=False,
    )
    rollout = trainer.score(trainer.collect(trainer.next_prompts()))
    expected = [1.0 + (n if n % 2 else 0) for n in calls[0][1]]
    assert rollout.raw_scores.tolist() == expected
    trainer.train()
    assert calls[1][2][0].startswith("Count to")
    row = lines(tmp_path, "metrics.jsonl")[0]
    assert {"score/numbers", "score/constant", "eval_score", "eval_kl_nats"} <= row.keys()
    assert row["score/constant"] == 2.0
    assert row["eval_score"] == pytest.approx((1 + 2 + 1) / 3)
    assert [sample["number"] for sample in lines(tmp_path, "samples.jsonl")] == calls[1][1][:4]


# -- prompts -----------------------------------------------------------------------------------------------


def test_all_prompts_come_before_any_comes_twice(tmp_path, full):
    trainer = make(tmp_path, full[0], rows=ROWS[:8], updates=5, rollout_size=6)
    seen = []
    for update in range(4):
        trainer.update_index = update
        seen += [p.columns["number"] for p in trainer.next_prompts()]
        assert [p.columns["number"] for p in trainer.next_prompts()] == seen[-6:]  # a pure function of the update
    epochs = [seen[i : i + 8] for i in range(0, 24, 8)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert epochs[0] != epochs[1]
    other = make(tmp_path, full[0], rows=ROWS[:8], updates=5, rollout_size=6, seed=1)
    assert [p.columns["number"] for p in other.next_prompts()] != seen[:6]


# -- resume and what is left on disk -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "kind"),
    [
        pytest.param(False, "separate", marks=pytest.mark.slow),
        (True, "adapter"),
        pytest.param(False, "shared_trunk", marks=pytest.mark.long),
        pytest.param(True, "shared_trunk", marks=pytest.mark.slow),
        pytest.param(True, "separate", marks=pytest.mark.long),
    ],
)
def test_resume_is_exact_and_logs_every_update_once(tmp_path, tiny_model, tiny_tokenizer, lora, kind):
    folders = chain(tmp_path, tiny_model, tiny_tokenizer, lora)
    settings = {
        "value_kind": kind,
        "updates": 4,
        "save_steps": 2,
        "normalize_scores": True,
        "kl_target_nats": 0.01,
        "kl_horizon": 50,
        "samples_logged": 2,
    }
    functions = lambda: [RewardModel.load(folders[1]), low_share]  # noqa: E731
    (tmp_path / "a").mkdir()
    whole = make(tmp_path / "a", folders[0], functions(), **settings)
    whole.train()
    (tmp_path / "b").mkdir()
    killed = make(
        tmp_path / "b", folders[0], functions(), callbacks=[StopAfter(3)], **settings
    )  # one beyond its checkpoint
    killed.train()
    assert killed.update_index == 3
    torch.manual_seed(12345)  # nothing may hang on the global generator
    resumed = make(tmp_path / "b", folders[0], functions(), **settings)
    resumed.train(resume_from_checkpoint=True)
    one, two = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (resumed.kl_coef, resumed.moments, resumed.update_index) == (whole.kl_coef, whole.moments, 4)
    ours, theirs = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert all(torch.equal(torch.as_tensor(ours[i][k]), torch.as_tensor(theirs[i][k])) for i in ours for k in ours[i])
    drop = lambda row: {k: v for k, v in row.items() if "second" not in k}  # noqa: E731
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [drop(row) for row in lines(tmp_path / "a", name)] == [drop(row) for row in lines(tmp_path / "b", name)]
    assert [row["step"] for row in lines(tmp_path / "b", "metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["step"] for row in lines(tmp_path / "b", "samples.jsonl")] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_function_that_fails_in_an_evaluation_costs_no_update(tmp_path, full):
    """Mended, the run goes on from there, with the update before the evaluation in its log."""

    def share(completion_ids, number, **columns):
        return [len(ids) / number for ids, number in zip(completion_ids, number, strict=True)]

    def mended(completion_ids, number, **columns):
        return [len(ids) / (number or 1) for ids, number in zip(completion_ids, number, strict=True)]

    given = {"rows": ROWS[1:], "eval_rows": [{"prompt": "Held out", "number": 0}], "updates": 3, "save_steps": 3}
    with pytest.raises(RunStopped, match="share failed on 1 of 1 responses"):
        make(tmp_path, full[0], share, **given, eval_steps=2).train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    mended.__name__, mended.__qualname__ = share.__name__, share.__qualname__
    metrics = make(tmp_path, full[0], mended, **given, eval_steps=2).train(resume_from_checkpoint=True)
    assert metrics["eval_score"] > 0
    logged = lines(tmp_path, "metrics.jsonl")
    assert [(row["step"], "eval_score" in row) for row in logged] == [(1, False), (2, False), (3, True)]


def test_an_evaluation_that_fails_on_broken_weights_leaves_no_checkpoint(tmp_path, full):
    trainer = make(tmp_path, full[0], eval_rows=[{"prompt": "Held out"}], eval_steps=1, save_steps=2)

    def broken():
        next(trainer.actor_critic.policy.parameters()).data.fill_(math.nan)
        raise RunStopped("a probability is not a number")

    trainer.evaluate = broken
    with pytest.raises(RunStopped, match="not a number"):
        trainer.train()
    assert list((tmp_path / "run").glob("checkpoint-*")) == []


def test_resume_without_a_checkpoint_begins_and_with_other_settings_refuses(tmp_path, full):
    trainer = make(tmp_path, full[0], updates=1, save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.update_index == 1
    other = make(tmp_path, full[0], updates=1, save_steps=1, kl_coef=0.5)
    with pytest.raises(InputError, match=r"made with kl_coef=0\.05, now 0\.5"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="no complete checkpoint"):
        other.train(resume_from_checkpoint=tmp_path)


@pytest.mark.slow
def test_the_same_seed_is_the_same_run(tmp_path, full):
    def run(seed: int, rank: int = 0):
        trainer = make(tmp_path, full[0], updates=1, seed=seed, lora_rank=rank)
        torch.rand(seed + 3)
        trainer.train()
        return weights(trainer)

    for rank in (0, 4):
        one, two, other = run(0, rank), run(0, rank), run(1, rank)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not all(torch.equal(one[name], other[name]) for name in one)


def test_save_model_saves_the_policy_that_was_trained(tmp_path, folders):
    trainer = make(tmp_path, folders[0], RewardModel.load(folders[1]))
    trainer.train()
    trainer.save_model(tmp_path / "ppo")
    rollout = trainer.collect(trainer.next_prompts())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo").eval()
    prompt, response = rollout.prompt_ids[0], rollout.response_ids[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    expected = logits[range(len(prompt) - 1, len(prompt) + len(response) - 1), response]
    np.testing.assert_allclose(rollout.logprobs[0, : len(response)], expected, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ppo")
    assert chat.encode_prompt(tokenizer, rollout.prompts[0].messages) == prompt


# -- that it learns ----------------------------------------------------------------------------------------


def learn(tmp_path, model, kl_coef: float) -> list[dict]:
    make(
        tmp_path, model, kl_coef=kl_coef, updates=12, rollout_size=64, minibatch_size=32, inner_epochs=2,
        learning_rate=5e-3, missing_eos="off", tokens_per_microbatch=10**5, lr_schedule="constant",
    ).train()  # fmt: skip
    return lines(tmp_path, "metrics.jsonl")


@pytest.mark.slow
def test_ppo_learns_and_the_kl_coefficient_holds_it_back(tmp_path, full):
    free = learn(tmp_path, full[0], 0.0)
    assert free[0]["score"] < 0.65
    assert free[-1]["score"] > free[0]["score"] + 0.25
    assert free[-1]["kl_nats"] > 0.5
    held = learn(tmp_path, full[0], 1.0)
    assert held[-1]["kl_nats"] < 0.4 * free[-1]["kl_nats"]
    assert held[-1]["score"] < free[-1]["score"] - 0.1
    assert free[-1]["explained_variance"] > free[0]["explained_variance"]


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_size": 128, "minibatch_size": 48}, "minibatch_size=48 must divide rollout_size=128"),
        ({"updates": 0}, "updates=0 must be at least 1"),
        ({"tokens_per_microbatch": 0}, "tokens_per_microbatch=0 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": 0.0}, r"temperature=0.0 must be positive"),
        ({"learning_rate": -1e-5}, "learning_rate=-1e-05 must be positive"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be a number"),
        ({"clip_ratio": 0.0}, "clip_ratio=0.0 must be positive"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1 must be 0 or more"),
        ({"gamma": 1.1}, "gamma=1.1 must be between 0 and 1"),
        ({"lam": -0.1}, "lam=-0.1 must be between 0 and 1"),
        ({"kl_target_nats": 0.0}, "kl_target_nats=0.0 must be positive or null"),
        ({"kl_target_nats": 6.0, "kl_coef": 0.0}, "kl_coef=0.0 must be positive with kl_target_nats"),
        (
            {"kl_target_nats": 6.0, "kl_horizon": 25, "rollout_size": 128},
            "kl_horizon=25 must be above 25.6, a fifth of rollout_size=128: it is counted in responses",
        ),
        ({"clip_scores": -1.0}, "clip_scores=-1.0 must be positive or null"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0 must be from 0 up to"),
        ({"lr_schedule": "linaer"}, "lr_schedule='linaer' must be one of linear, cosine, constant"),
        ({"missing_eos": "replce"}, "missing_eos='replce' must be one of replace, subtract, off"),
        ({"save_steps": -1}, "save_steps=-1 must be 0 or more"),
    ],
)
def test_settings_that_cannot_be_right(changes, message):
    with pytest.raises(InputError, match=message):
        PPOConfig(**changes)


def test_batches_that_do_not_divide_over_processes():
    with pytest.raises(InputError, match="number of processes=3 must divide minibatch_size=64"):
        PPOConfig().check_processes(3)


def test_arguments_that_cannot_be_right(tmp_path, full, tiny_model, tiny_tokenizer):
    with pytest.raises(InputError, match=r"RewardModel\.load\('runs/rm'\)"):
        make(tmp_path, full[0], "runs/rm")
    with pytest.raises(InputError, match="train_dataset is missing"):
        make(tmp_path, full[0], rows=None)
    with pytest.raises(InputError, match="reward_weights has 2 numbers for 1 reward functions"):
        make(tmp_path, full[0], reward_weights=[1.0, 2.0])
    with pytest.raises(InputError, match="processing_class is missing"):
        make(tmp_path, tiny_model)
    with pytest.raises(InputError, match="longer than max_prompt_tokens=1"):
        make(tmp_path, full[0], max_prompt_tokens=1)
    with pytest.raises(InputError, match="no such model folder"):
        make(tmp_path, str(tmp_path / "absent"))
    assert not (tmp_path / "run").exists()
