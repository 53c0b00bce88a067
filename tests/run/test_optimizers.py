"""Optimizers by name, in all three trainers: transformers' names, what they need, and the steps that they take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference.ppo_runs import StopAfter, make, prepared, watch_steps, weights
from reference.tiny_chain import chain
from transformers.training_args import OptimizerNames

from reward_models import RewardConfig, RewardTrainer
from rlhf.errors import InputError
from rlhf.ppo.trainer import PPOConfig
from rlhf.run.checkpoint import checkpoints_in
from rlhf.run.settings import OPTIMIZERS
from rlhf.sft.trainer import SFTConfig, SFTTrainer

DEMONSTRATIONS = [{"prompt": f"Count to {i}", "completion": "one, two"} for i in range(4)]
RANKINGS = [{"prompt": f"Count to {i}", "responses": ["one", "two, three"], "ranks": [1, 2]} for i in range(4)]


@pytest.fixture
def full(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)[0]


def test_names_are_transformers_own():
    assert set(OPTIMIZERS) - {"adamw"} <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize("config", [PPOConfig, SFTConfig, RewardConfig])
def test_an_unknown_name_and_a_missing_package_are_one_line(config, monkeypatch):
    with pytest.raises(InputError, match="unknown optimizer adamw_8bits; did you mean adamw_8bit"):
        config(optimizer="adamw_8bits")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="optimizer: lion_8bit needs bitsandbytes, which is not installed"):
        config(optimizer="lion_8bit")


def test_the_supervised_trainers_make_it(full, tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "bf16": False, "batch_size": 4, "microbatch_size": 4}
    sft = SFTTrainer(str(full), SFTConfig(**settings, optimizer="adafactor"), DEMONSTRATIONS)
    assert type(sft.create_optimizer()).__name__ == "Adafactor"
    default = SFTTrainer(str(full), SFTConfig(**settings), DEMONSTRATIONS).create_optimizer()
    assert (type(default), default.defaults["fused"]) == (torch.optim.AdamW, True)
    args = RewardConfig(output_dir=str(tmp_path / "rm"), bf16=False, optimizer="sgd")
    assert type(RewardTrainer(str(full), args, train_dataset=RANKINGS).create_optimizer()) is torch.optim.SGD


def test_ppo_steps_as_it_does(full, tmp_path):
    rates = {"learning_rate": 0.1, "value_learning_rate": 0.02}
    trainer = make(
        tmp_path, full, optimizer="sgd", minibatch_size=12, inner_epochs=1, lr_schedule="constant", weight_decay=0.5,
        **rates,
    )  # fmt: skip
    before, seen = weights(trainer), watch_steps(trainer, step=True)
    trainer.update(prepared(trainer))
    for name, after in weights(trainer).items():
        rate = 0.02 if name.startswith("value") else 0.1
        expected = before[name] - rate * (seen[0].get(name, torch.zeros(())) + 0.5 * before[name])
        if name in seen[0]:
            np.testing.assert_allclose(after, expected, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_ppo_resumes_in_8_bits_exactly(full, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = {"optimizer": "adamw_8bit", "updates": 3, "save_steps": 1, "inner_epochs": 1, "preflight": False}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = make(tmp_path / "a", full, **settings)
    start = weights(whole)
    whole.train()
    states = list(whole.optimizer.optimizer.state.values())  # accelerate's holds bitsandbytes'
    assert any(state["state1"].dtype == torch.uint8 for state in states)
    assert any(state["state1"].dtype == torch.float32 for state in states), "embeddings, and small tensors"
    make(tmp_path / "b", full, callbacks=[StopAfter(2)], **settings).train()
    (checkpoints_in(tmp_path / "b" / "run")[-1] / "complete").unlink()
    resumed = make(tmp_path / "b", full, **settings)
    resumed.train(resume_from_checkpoint=True)
    one, two = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], start[name]) for name in one)
