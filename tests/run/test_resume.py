"""Long runs: exact resume, damaged checkpoints, SIGTERM, alarms, and NaN and infinity."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import forked, resume_worker
from reference.ppo_runs import ROWS, StopAfter, lines, low_share, make, prepared, weights
from reference.tiny_chain import chain
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from reward_models import RewardModel
from rlhf.errors import InputError, RunStopped
from rlhf.metrics import METRICS, Watch
from rlhf.run.checkpoint import checkpoints_in
from rlhf.run.resume import Termination


@pytest.fixture
def full(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)


def same_weights(one, other) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- exact resume ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.long)])
def test_with_two_processes_every_stage_goes_on_bit_for_bit(tmp_path, tiny_model, tiny_tokenizer, kind):
    """PPO, supervised fine-tuning and reward model: N + N steps are 2N steps, the metrics too."""
    folders = chain(tmp_path, tiny_model, tiny_tokenizer, kind == "lora")
    done = forked.shared().together([resume_worker.__file__, tmp_path / "out", kind, *folders])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == {
        f"{stage}/{kind}": {"processes": 2, "stopped at": 2, "weights": True, "metrics": True, "moved": True}
        for stage in ("sft", "reward_model", "ppo")
    }


def drawn(prompts, completions, completion_ids, **columns):
    """Score by draws from the global random states, as a user's function may."""
    return [random.random() + np.random.rand() + float(torch.rand(())) for _ in prompts]


class Counter(TrainerCallback, ExportableState):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}


@pytest.mark.slow
def test_the_global_random_states_and_users_callbacks_go_on_too(tmp_path, full):
    def run(name: str, *callbacks, resume=False):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        (tmp_path / name).mkdir(exist_ok=True)
        trainer = make(tmp_path / name, full[0], drawn, updates=4, save_steps=2, callbacks=[*callbacks])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, counter = run("a"), Counter()
    run("b", StopAfter(2))
    resumed = run("b", counter, resume=True)
    same_weights(weights(resumed), weights(whole))
    assert counter.steps == 2  # the stopped run had no such callback
    scores = [[row["score"] for row in lines(tmp_path / name, "metrics.jsonl")] for name in "ab"]
    assert scores[0] == scores[1]
    again = Counter()
    make(tmp_path / "b", full[0], drawn, updates=4, save_steps=2, callbacks=[again]).train(resume_from_checkpoint=True)
    assert again.steps == 2  # restored from the last checkpoint; no step was left to do


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", pytest.param("foreign", marks=pytest.mark.long)])
def test_the_checkpoint_before_a_damaged_one_ends_at_the_same_weights(tmp_path, full, caplog, damage):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    settings = {"updates": 4, "save_steps": 1, "save_total_limit": 3}
    whole = make(tmp_path / "a", full[0], **settings)
    whole.train()
    assert [path.name for path in checkpoints_in(tmp_path / "a/run")] == [f"checkpoint-{i}" for i in (2, 3, 4)]
    make(tmp_path / "b", full[0], callbacks=[StopAfter(3)], **settings).train()
    newest = tmp_path / "b/run/checkpoint-3"
    if damage == "truncated":
        (newest / "ppo.pt").write_bytes((newest / "ppo.pt").read_bytes()[:-100])
        reason = "checkpoint-3: ppo.pt has"
    else:
        marker = newest / "complete"
        marker.write_text(marker.read_text().replace('"kl_coef": 0.05', '"kl_coef": 0.07'))
        reason = "checkpoint-3: made with kl_coef=0.07, now 0.05"
    resumed = make(tmp_path / "b", full[0], **settings)
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        resumed.train(resume_from_checkpoint=True)
    assert reason in caplog.text
    assert "going on from checkpoint-2 instead" in caplog.text
    same_weights(weights(resumed), weights(whole))
    with pytest.raises(InputError, match="no complete checkpoint"):
        resumed.train(resume_from_checkpoint=tmp_path)


# -- SIGTERM -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", pytest.param("reward_model", marks=pytest.mark.long), "ppo"])
def test_sigterm_finishes_the_step_saves_and_exits_143(tmp_path, full, stage):
    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    whole = resume_worker.make(stage, *full, tmp_path / "whole")
    whole.train()
    killed = resume_worker.make(stage, *full, tmp_path / "killed", callbacks=[Terminate()], save_steps=0)
    with pytest.raises(SystemExit) as caught:
        killed.train()
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in checkpoints_in(tmp_path / "killed")] == ["checkpoint-2"]
    resumed = resume_worker.make(stage, *full, tmp_path / "killed", save_steps=0)
    resumed.train(resume_from_checkpoint=True)
    same_weights(resume_worker.weights(resumed), resume_worker.weights(whole))
    assert signal.getsignal(signal.SIGTERM) == before


SEEN_BY_ONE = """
import os, signal
from accelerate import Accelerator
from rlhf.run.resume import Termination
accelerator = Accelerator(cpu=True)
termination = Termination(accelerator)
left = []
with termination:
    left.append(termination.agreed())
    if accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGINT)  # as while the first process saves
    try:
        termination.leave()
        left.append("stayed")
        left.append(termination.agreed())
        termination.leave()
    except KeyboardInterrupt:
        left.append("left")
print(left)
"""


@pytest.mark.slow
def test_no_process_leaves_for_a_signal_that_others_have_not_seen():
    """It comes between the processes' agreeing and their leaving; at the next step all go."""
    done = forked.shared().together(["-c", SEEN_BY_ONE], limit=60)
    assert (done.returncode, done.stdout) == (0, "[False, 'stayed', True, 'left']\n" * 2), done.stderr


def test_a_process_that_loses_another_after_sigterm_leaves_without_a_word(monkeypatch, caplog):
    """As a launcher sends it to all others when one has failed."""

    def fails(text):
        with Termination(SimpleNamespace(num_processes=2)):
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError(text)

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="143"):
        fails("[pair.cc:534] Connection closed by peer [127.0.0.1]:9")
    with pytest.raises(RuntimeError, match="shape"):
        fails("shape mismatch")
    assert not caplog.records


# -- alarms ------------------------------------------------------------------------------------------------


def test_a_metric_that_leaves_its_range_is_told_once_until_it_was_back():
    low, patience = METRICS["eos_rate"].healthy_low, METRICS["eos_rate"].patience
    watch, told = Watch(), []
    for value in [0.1] * (patience + 3) + [0.95] + [0.1] * (patience - 1) + [low] + [0.1] * patience:
        told.append(len(watch.see({"eos_rate": value, "score": -1e9, "unknown": 3.0})))
    first, again = patience - 1, len(told) - 1
    assert [i for i, count in enumerate(told) if count] == [first, again]
    watch = Watch()
    told = [advice for _ in range(9) for advice in watch.see({"eos_rate": 0.1, "loss": float("nan")})]
    assert len(told) == 2
    assert told[0].startswith("loss is nan: training has diverged")  # at once; the other after its patience
    assert told[1].startswith("eos_rate=0.1 is below 0.9: ")
    assert "missing_eos=replace" in told[1]


@pytest.mark.slow
def test_on_alarm_warns_saves_or_stops_and_a_stopped_run_goes_on(tmp_path, full, caplog):
    """An untrained model never stops by itself: eos_rate is out of its range from the first update."""
    for kind in ("warn", "save", "stop"):
        (tmp_path / kind).mkdir()
    settings = {"updates": 6, "inner_epochs": 1}
    told = METRICS["eos_rate"].patience

    def run(kind: str, **more):
        caplog.clear()
        trainer = make(tmp_path / kind, full[0], on_alarm=kind, **settings)
        with caplog.at_level(logging.WARNING, logger="rlhf"):
            trainer.train(**more)
        return trainer

    whole = run("warn")
    assert [m for m in caplog.messages if "eos_rate" in m] == [
        m for m in caplog.messages if f"step {told}: eos_rate=" in m
    ]
    assert len([m for m in caplog.messages if "eos_rate" in m]) == 1
    assert checkpoints_in(tmp_path / "warn/run") == []
    run("save")
    assert f"checkpoint-{told}" in [path.name for path in checkpoints_in(tmp_path / "save/run")]
    steps = []
    for _ in range(6):  # other alarms may follow; each stops the run once
        try:
            resumed = run("stop", resume_from_checkpoint=True)
        except RunStopped as stopped:
            steps.append(str(stopped))
            continue
        break
    assert 1 <= len(steps) <= 5
    assert any(f"step {told}: " in step for step in steps)
    assert len(set(steps)) == len(steps)
    same_weights(weights(resumed), weights(whole))


def test_training_ends_early_on_kl_and_inner_epochs_on_approximate_kl(tmp_path, full):
    fast = {"learning_rate": 2e-2, "updates": 6, "kl_coef": 0.0, "lr_schedule": "constant", "save_steps": 10}
    (tmp_path / "a").mkdir()
    trainer = make(tmp_path / "a", full[0], stop_kl_nats=0.05, **fast)
    metrics = trainer.train()
    kl = [row["kl_nats"] for row in lines(tmp_path / "a", "metrics.jsonl")]
    assert len(kl) < 6
    assert kl[-1] > 0.05 >= max(kl[:-1])
    assert metrics["kl_nats"] == kl[-1]
    assert [path.name for path in checkpoints_in(tmp_path / "a/run")] == [f"checkpoint-{len(kl)}"]
    again = make(tmp_path / "a", full[0], stop_kl_nats=0.05, **fast)
    again.train(resume_from_checkpoint=True)
    assert again.update_index == len(kl)  # it had ended there
    (tmp_path / "b").mkdir()
    make(tmp_path / "b", full[0], stop_approx_kl_nats=1e-9, **fast | {"inner_epochs": 5, "updates": 1}).train()
    (row,) = lines(tmp_path / "b", "metrics.jsonl")
    assert row["optimizer_steps"] == 2  # the first epoch's two minibatches
    trainer = make(tmp_path / "b", full[0], stop_approx_kl_nats=1e9)
    assert trainer.update(prepared(trainer))["optimizer_steps"] == 4


# -- NaN and infinity --------------------------------------------------------------------------------------


def test_a_score_that_is_none_names_its_prompt_and_loses_no_update(tmp_path, full):
    calls = []

    def fails(prompts, completions, **columns):
        calls.append(prompts)
        return [float("nan") if len(calls) == 3 and i == 5 else 1.0 * i for i in range(len(prompts))]

    trainer = make(tmp_path, full[0], fails, updates=4, save_steps=10, preflight=False)
    with pytest.raises(InputError, match=r"fails returned nan for response 5, to 'Count to ") as caught:
        trainer.train()
    assert calls[2][5][:30] in str(caught.value)
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-2"]
    calls.clear()
    again = make(tmp_path, full[0], lambda prompts, completions, **columns: [1.0 * i for i in range(len(prompts))],
                 updates=4, save_steps=10)  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert again.update_index == 4


def test_broken_weights_stop_before_a_step_and_are_named(tmp_path, full):
    trainer = make(tmp_path, full[0], RewardModel.load(full[1]), preflight=False)
    with torch.no_grad():
        trainer.actor_critic.policy.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(RunStopped, match=r"update 1: the policy's weights .*layers\.1\.mlp\.up_proj\.weight are not"):
        trainer.train()
    trainer = make(tmp_path, full[0], RewardModel.load(full[1]), preflight=False)
    with torch.no_grad():
        trainer.actor_critic.value_head.weight[0, 0] = float("inf")
    with pytest.raises(
        RunStopped, match=r"update 1: value is .*at response token \d+ \(id \d+\) in row \d+, prompt 'Count"
    ):
        trainer.train()


def test_a_broken_number_in_a_rollout_takes_no_step_and_is_found(tmp_path, full):
    for name in ("advantages", "returns", "logprobs"):
        trainer = make(tmp_path, full[0], RewardModel.load(full[1]), minibatch_size=12)
        rollout, before = prepared(trainer), weights(trainer)
        getattr(rollout, name)[4, 0] = float("nan")
        with pytest.raises(RunStopped) as caught:
            trainer.update(rollout)
        token = rollout.response_ids[4][0]
        prompt = rollout.prompts[4].messages[-1]["content"]
        assert f"{name[:-1]} is nan at response token 0 (id {token}) in row 4, prompt {prompt!r}" in str(caught.value)
        same_weights(weights(trainer), before)


def test_a_gradient_that_overflows_is_traced_to_its_row(tmp_path, full):
    trainer = make(tmp_path, full[0], minibatch_size=12, kl_coef=0.0)
    rollout, before = prepared(trainer), weights(trainer)
    rollout.returns[7, 0] = 3e38
    with pytest.raises(RunStopped, match=r"(loss is inf|gradient of .* is not finite) in row 7, prompt"):
        trainer.update(rollout)
    same_weights(weights(trainer), before)


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_a_supervised_stage_stops_on_nan_and_names_the_text(tmp_path, full, stage):
    trainer = resume_worker.make(stage, *full, tmp_path / "out", save_steps=1)
    tokenizer = trainer.processing_class
    broken = tokenizer.encode("one, two, three, four, five, six, seven", add_special_tokens=False)[-1]

    def poison(module, args, output):
        if trainer.model.training and trainer.state.global_step == 1:
            output = output.clone()
            output[args[0] == broken] = float("nan")
        return output

    trainer.model.get_input_embeddings().register_forward_hook(poison)
    with pytest.raises(RunStopped) as caught:
        trainer.train()
    text = str(caught.value)
    assert text.startswith("step ")
    assert "loss is nan" in text
    assert "Count to" in text
    assert "the last checkpoint is good" in text
    steps = [path.name for path in checkpoints_in(tmp_path / "out")]
    assert steps == [f"checkpoint-{trainer.state.global_step}"]


def test_rows_of_the_fixtures_are_what_these_tests_stand_on():
    assert len({row["prompt"] for row in ROWS}) == 11
    assert low_share([], [], [[1, 300]]) == [0.5]
