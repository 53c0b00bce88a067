"""Flash attention takes no float32: nothing outside autocast meets it, and a trained model is an ordinary one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from reference import flash
from reference.ppo_runs import make
from reference.tiny_chain import chain, save_base

from reward_models import RewardConfig, RewardTrainer
from rlhf.models import packing
from rlhf.ppo import build
from rlhf.rows.records import read_prompts
from rlhf.sft import preflight
from rlhf.sft.config import SFTConfig
from rlhf.sft.trainer import SFTTrainer
from rlhf_recipes.best_by import BestByScore

ROWS = [{"prompt": f"Name fruit {n}.", "completion": "apple"} for n in range(4)]
IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(autouse=True)
def counts_as_flash(monkeypatch):
    monkeypatch.setattr(packing, "is_flash", lambda model: packing.attention_of(model) == flash.NAME)


def test_it_refuses_float32(tiny_model):
    flash.use(tiny_model)
    with pytest.raises(RuntimeError, match="only support fp16 and bf16"):
        tiny_model(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model(IDS)


def test_ppo_runs_and_leaves_an_ordinary_policy(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    policy, _ = chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)

    def prepare(models: Any, *args: Any) -> None:
        models.packable = models.packs = False
        for part in models.parts():
            flash.use(part)

    monkeypatch.setattr(build, "prepare", prepare)
    trainer = make(tmp_path, policy, updates=1, bf16=True, preflight=True)
    assert packing.is_flash(trainer.actor_critic.policy)
    trainer.train()
    assert [packing.attention_of(part) for part in trainer.actor_critic.parts()] == ["sdpa"] * 3
    trainer.actor_critic.policy(IDS)


def test_sft_leaves_an_ordinary_model(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    before = packing.attention_of(tiny_model)
    args = SFTConfig(output_dir=str(tmp_path), batch_size=4, microbatch_size=4, epochs=1, save_steps=0, bf16=True)
    trainer = SFTTrainer(tiny_model, args, ROWS, processing_class=tiny_tokenizer)
    monkeypatch.setattr(packing, "prepare", lambda model, *args: bool(flash.use(model)))
    trainer.train()
    assert packing.attention_of(trainer.model) == before
    trainer.model(IDS)


def test_a_reward_model_is_left_an_ordinary_one(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    rows = [{"prompt": f"Name fruit {n}.", "responses": ["apple", "no"], "ranks": [1, 2]} for n in range(4)]
    args = RewardConfig(
        output_dir=str(tmp_path / "out"), epochs=1, prompts_per_batch=4, microbatch_size=4, save_steps=0, bf16=True
    )
    trainer = RewardTrainer(str(base), args, train_dataset=rows)
    before = packing.attention_of(trainer.model)
    monkeypatch.setattr("reward_models.trainer.packs_rows", lambda model, *args: bool(flash.use(model)))
    trainer.train()
    assert packing.attention_of(trainer.model) == before
    trainer.model(IDS)


def test_the_attention_is_chosen_for_where_the_model_will_be(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """Under FSDP2 SFT's and the reward model's are still on the CPU then."""

    class Asked(Exception):
        pass

    def ask(*given: Any) -> None:
        raise Asked(str(given[-1]))

    base, will_be = str(save_base(tmp_path, tiny_model, tiny_tokenizer)), torch.device("cuda", 3)
    out, settings = str(tmp_path / "out"), {"save_steps": 0, "bf16": True, "preflight": False}
    ranked = [{"prompt": row["prompt"], "responses": ["apple", "no"], "ranks": [1, 2]} for row in ROWS]
    trainers = [
        SFTTrainer(base, SFTConfig(output_dir=out, **settings), ROWS),
        RewardTrainer(base, RewardConfig(output_dir=out, **settings), train_dataset=ranked),
    ]
    monkeypatch.setattr(packing, "use_flash", ask)
    monkeypatch.setattr(Accelerator, "device", will_be)
    for trainer in trainers:
        with pytest.raises(Asked, match="cuda:3"):
            trainer.train()
    args = SimpleNamespace(packing="auto", compile=False)
    with pytest.raises(Asked, match="cuda:3"):
        build.prepare(build.build_actor_critic(tiny_model), args, torch.bfloat16, will_be)


def test_preflight_and_best_by_while_the_model_computes_it(tmp_path, tiny_model, tiny_tokenizer):
    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    args = SFTConfig(output_dir=str(tmp_path / "out"), batch_size=4, microbatch_size=4, save_steps=0, bf16=True)
    trainer = SFTTrainer(str(base), args, ROWS)
    flash.use(trainer.model)
    assert preflight.check_precision(trainer).measured.startswith("bfloat16 moves")
    scored = BestByScore(trainer, lambda completions, **columns: [1.0] * len(completions), read_prompts(ROWS), 3, 0)
    assert scored.score() == 1.0
    assert packing.is_flash(trainer.model)
