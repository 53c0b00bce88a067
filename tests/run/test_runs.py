"""What outlives a run: an earlier one's checkpoints, a second run, changed inputs, a longer run, Ctrl-C, the model."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import ppo_runs, resume_worker
from reference.resume_worker import make, weights
from reference.tiny_chain import TARGETS, chain, save_base
from transformers import TrainerCallback

from rlhf.errors import InputError
from rlhf.models.adapters import lora_config
from rlhf.run import lock
from rlhf.run.checkpoint import COMPLETE, checkpoints_in

STAGES = ["sft", "reward_model", "ppo"]
FEW = ["sft", pytest.param("reward_model", marks=pytest.mark.long), "ppo"]  # which shares its trainer with sft


@pytest.fixture
def full(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_in(folder)]


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


class Killed(BaseException):
    pass


def die():
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize("stage", FEW)
def test_a_fresh_run_keeps_its_own_checkpoints_and_sets_older_ones_aside(tmp_path, full, stage, caplog):
    out = tmp_path / "out"
    older = make(stage, *full, out, save_steps=1, seed=1)
    older.train()
    assert names(out) == ["checkpoint-3", "checkpoint-4"]
    with caplog.at_level(logging.WARNING, logger="rlhf"), pytest.raises(Killed):
        make(stage, *full, out, [At(3, die)], save_steps=1).train()
    assert "checkpoint-3, checkpoint-4" in caplog.text
    assert "moved to earlier-1" in caplog.text
    assert names(out)[-1] in ("checkpoint-2", "checkpoint-3")
    assert "checkpoint-4" not in names(out)
    assert names(out / "earlier-1") == ["checkpoint-3", "checkpoint-4"]
    resumed = make(stage, *full, out, save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    whole = make(stage, *full, tmp_path / "whole")
    whole.train()
    assert same(weights(resumed), weights(whole))
    assert not same(weights(resumed), weights(older))


@pytest.mark.slow
def test_a_named_checkpoint_begins_a_branch_of_its_own(tmp_path, full):
    out = tmp_path / "out"
    make("ppo", *full, out, save_steps=1, save_total_limit=4).train()
    branch = make("ppo", *full, out, [At(2, die)], save_steps=1)
    with pytest.raises(Killed):
        branch.train(resume_from_checkpoint=out / "checkpoint-1")
    assert names(out) == ["checkpoint-1", "checkpoint-2"]
    assert names(out / "earlier-1") == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_in_the_folder_is_refused_while_the_first_goes_on(tmp_path, full, stage):
    seen = []

    def second(inner):
        with pytest.raises(InputError, match=rf"process {os.getpid()} \(this one\) is running") as caught:
            make(stage, *full, tmp_path / "out" / inner).train(resume_from_checkpoint=True)
        seen.append(str(caught.value))

    first = make(stage, *full, tmp_path / "out", [At(1, lambda: second(".")), At(2, lambda: second("inner"))])
    first.train()
    assert len(seen) == 2
    steps = [row["step"] for row in resume_worker.logged(tmp_path / "out")]
    assert steps == sorted(set(steps))
    assert not (tmp_path / "out" / lock.NAME).exists()


# ---------------------------------------------------------------- what may change


@pytest.mark.slow
def test_resume_refuses_another_dataset_model_or_reward_in_one_line(tmp_path, full, tiny_tokenizer):
    policy = full[0]
    settings = {"updates": 3, "save_steps": 1}
    (tmp_path / "a").mkdir()
    ppo_runs.make(tmp_path / "a", policy, callbacks=[ppo_runs.StopAfter(1)], **settings).train()

    def other(prompts, completions, completion_ids, **columns):
        return [0.0] * len(prompts)

    with torch.no_grad():
        from transformers import AutoModelForCausalLM

        shifted = AutoModelForCausalLM.from_pretrained(policy)
        shifted.lm_head.weight[0, 0] += 1
        shifted.save_pretrained(tmp_path / "shifted")
        tiny_tokenizer.save_pretrained(tmp_path / "shifted")
    changed = {
        "train_dataset": {"rows": [{"prompt": "another"}] * 11},
        "reward_funcs": {"functions": other},
        "model": {"model": str(tmp_path / "shifted")},
    }
    for name, change in changed.items():
        with pytest.raises(InputError, match=rf"checkpoint-1: made with {name}") as caught:
            ppo_runs.make(tmp_path / "a", **({"model": policy} | change | settings)).train(resume_from_checkpoint=True)
        assert "\n" not in str(caught.value)
    ppo_runs.make(tmp_path / "a", policy, **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_the_supervised_stages_refuse_another_model_too(tmp_path, full, stage):
    out = tmp_path / "out"
    make(stage, *full, out, [resume_worker.Stop(2)]).train()
    (tmp_path / "copy").mkdir()
    for file in Path(full[0]).iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    make(stage, tmp_path / "copy", full[1], out)  # the same content elsewhere
    model = tmp_path / "copy" / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint-2: made with model="):
        make(stage, tmp_path / "copy", full[1], out).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("stage", STAGES)
def test_another_adapters_settings_are_another_run(tmp_path, full, stage):
    """peft writes into the config that it is given: the same object goes on, and one from before this was recorded."""
    out = tmp_path / "out"
    configs = [LoraConfig(r=2, lora_alpha=alpha, target_modules="all-linear") for alpha in (4, 8)]
    make(stage, *full, out, [resume_worker.Stop(2)], peft_config=configs[0]).train()
    with pytest.raises(InputError, match=r'made with peft_config="r=2, .*alpha=4", now "r=2, target') as caught:
        make(stage, *full, out, peft_config=configs[1]).train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r'peft_config="r=2, .*", now null'):
        make(stage, *full, out).train(resume_from_checkpoint=True)
    marker = out / "checkpoint-2" / COMPLETE
    held = json.loads(marker.read_text())
    del held["settings"]["peft_config"]
    for text in (None, json.dumps(held)):
        if text:
            marker.write_text(text)
        make(stage, *full, out, [resume_worker.Stop(2)], peft_config=configs[0]).train(resume_from_checkpoint=True)


def test_the_size_of_the_sampled_batch_is_no_setting_without_effect(tmp_path, full):
    make("ppo", *full, tmp_path / "out", [resume_worker.Stop(2)]).train()
    with pytest.raises(InputError, match="generation_batch_size=256, now 4"):
        make("ppo", *full, tmp_path / "out", generation_batch_size=4).train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", FEW)
def test_a_finished_run_is_extended_as_if_it_had_been_planned_so(tmp_path, full, stage, caplog):
    constant = {"lr_schedule": "constant", "save_steps": 1} | ({} if stage == "ppo" else {"warmup_fraction": 0.0})
    longer = {"updates": 6} if stage == "ppo" else {"epochs": 3}
    whole = make(stage, *full, tmp_path / "whole", **constant | longer)
    whole.train()
    make(stage, *full, tmp_path / "out", **constant).train()
    extended = make(stage, *full, tmp_path / "out", **constant | longer)
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        extended.train(resume_from_checkpoint=True)
    assert "the constant learning rate is counted over the new length" in caplog.text
    assert same(weights(extended), weights(whole))
    with pytest.raises(InputError, match=r"made with (updates=6, now 4|epochs=3(\.0)?, now 2)"):
        make(stage, *full, tmp_path / "out", **constant).train(resume_from_checkpoint=True)


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.slow
@pytest.mark.parametrize("stage", FEW)
def test_ctrl_c_finishes_the_step_saves_and_goes_on(tmp_path, full, stage):
    before = signal.getsignal(signal.SIGINT)
    stop = At(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    interrupted = make(stage, *full, tmp_path / "out", [stop], save_steps=0)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert signal.getsignal(signal.SIGINT) == before
    assert names(tmp_path / "out") == ["checkpoint-2"]
    resumed = make(stage, *full, tmp_path / "out", save_steps=0)
    resumed.train(resume_from_checkpoint=True)
    whole = make(stage, *full, tmp_path / "whole")
    whole.train()
    assert same(weights(resumed), weights(whole))


def test_a_second_ctrl_c_stops_at_once(tmp_path, full):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def twice():  # two that arrive before Python looks are one: it looks at the end of a loop's body
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        make("ppo", *full, tmp_path / "out", [At(1, twice)], save_steps=0).train()
    assert names(tmp_path / "out") == []
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


# ---------------------------------------------------------------- the user's model object


def test_the_users_model_is_as_before_after_ppo_and_a_second_trainer_takes_it(tmp_path, tiny_model, tiny_tokenizer):
    kinds = [type(module) for module in tiny_model.modules()]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trainer = ppo_runs.make(tmp_path / name, tiny_model, tokenizer=tiny_tokenizer)
        trainer.train()
        assert [type(module) for module in tiny_model.modules()] == kinds
        assert tiny_model.config._attn_implementation == "sdpa"
        again, ids = pickle.loads(pickle.dumps(tiny_model)), torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            for other in (again, copy.deepcopy(tiny_model)):
                torch.testing.assert_close(other(ids).logits, tiny_model(ids).logits, rtol=0, atol=0)
        tiny_model.save_pretrained(tmp_path / name / "saved")
        assert "rlhf" not in (tmp_path / name / "saved" / "config.json").read_text()


def test_an_adapter_object_takes_a_second_trainer_and_its_base_is_refused(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model.name_or_path = str(save_base(tmp_path, tiny_model, tiny_tokenizer))
    adapter = get_peft_model(tiny_model, lora_config(2, 4.0, target_modules=TARGETS))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trainer = ppo_runs.make(tmp_path / name, adapter, tokenizer=tiny_tokenizer)
        assert trainer.train()["kl_nats"] is not None
        pickle.dumps(adapter)
    with pytest.raises(InputError, match="already carries an adapter"):
        ppo_runs.make(tmp_path / "a", tiny_model, tokenizer=tiny_tokenizer, lora_rank=2)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "checkpointing"), [("sft", True), ("reward_model", False)])
def test_a_model_can_be_pickled_after_the_supervised_stages(tmp_path, full, tiny_tokenizer, stage, checkpointing):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(full[0])
    trainer = trainer_on(stage, model, tiny_tokenizer, tmp_path / "out", gradient_checkpointing=checkpointing)
    trainer.train()
    for trained in (model, trainer.model):
        pickle.loads(pickle.dumps(trained))
        copy.deepcopy(trained)


def trainer_on(stage, model, tokenizer, out, **changes):
    from reward_models import RewardConfig, RewardTrainer
    from rlhf.sft.trainer import SFTConfig, SFTTrainer

    common = {"output_dir": str(out), "bf16": False, "preflight": False, "epochs": 1, "microbatch_size": 2} | changes
    if stage == "sft":
        rows = [{"prompt": f"Count to {i}", "completion": "one"} for i in range(4)]
        return SFTTrainer(model, SFTConfig(batch_size=2, **common), rows, processing_class=tokenizer)
    rows = [{"prompt": f"Count to {i}", "chosen": "one", "rejected": "no"} for i in range(4)]
    config = RewardConfig(prompts_per_batch=2, **common)
    return RewardTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
