"""PPOTrainer against a PPO that shares no code with it (tests/reference/ppo_reference.py): weights after three updates.

Both start from the same folders and get the same responses, and the same rows in each minibatch. The reference runs in
float64, one response at a time. Beside tests/test_planted_bugs.py: a bug that nobody has planted shows here too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import ppo_reference
from reference.ppo_reference import Drawn, Model
from reference.ppo_runs import is_value, lines, make, weights
from reference.tiny_chain import chain
from safetensors.torch import load_file

from reward_models import RewardModel
from rlhf.sampling.engine import Responses

WORDS = ["count", "two", "three", "red", "big", "small", "the", "yes", "no", "maybe", "house", "of", "and", "end"]
ROWS = [{"prompt": f"Count to {word}" + ", please" * (i % 3)} for i, word in enumerate(WORDS)]
EVERYTHING = {
    "updates": 3, "rollout_size": 12, "minibatch_size": 6, "inner_epochs": 2, "learning_rate": 2e-3,
    "value_learning_rate": 3e-3, "adam_epsilon": 1e-4, "weight_decay": 0.05, "max_grad_norm": 0.3, "kl_coef": 0.2,
    "kl_target_nats": 0.5, "kl_horizon": 40, "gamma": 0.98, "lam": 0.9, "clip_ratio": 0.1, "clip_value": 0.1,
    "temperature": 0.7, "missing_eos_penalty": 0.8, "warmup_updates": 1, "reward_weights": [1.0, 0.5],
    "max_new_tokens": 40,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "full": {"missing_eos": "replace"},
    "lora": {"missing_eos": "subtract"},
    "full shared_trunk": {"missing_eos": "subtract", "value_loss_coef": 0.5},
    "lora shared_trunk": {"missing_eos": "off", "value_loss_coef": 0.5},
    "full normalised": {"missing_eos": "off", "normalize_scores": True, "clip_scores": 1.0, "rescale_rewards": True},
    "lora warmup": {"missing_eos": "replace", "value_warmup_updates": 1, "kl_target_nats": None},
    "lora warmup with a target": {"missing_eos": "replace", "value_warmup_updates": 1},
}


class Spoken:
    """Responses of words, a function of the prompt; a third of them without a stop token."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.end = tokenizer, tokenizer.convert_tokens_to_ids("<|im_end|>")

    def generate(self, prompt_ids, max_new_tokens, temperature, generator) -> Responses:
        ids, stopped = [], []
        for prompt in prompt_ids:
            key = sum((i + 1) * token for i, token in enumerate(prompt))
            text = " ".join(WORDS[(key * (k + 3)) % len(WORDS)] for k in range(1 + key % 7))
            stopped.append(key % 3 > 0)
            ids.append(self.tokenizer(text).input_ids + [self.end] * stopped[-1])
        return Responses(ids, stopped)


def even_share(prompts, completions, completion_ids, **columns) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def recorded(trainer: Any) -> list[Drawn]:
    """What the trainer draws while it trains."""
    drawn: list[Drawn] = []
    plan, update = trainer.plan, trainer.update
    planned: list[list[list[int]]] = []

    def watched_plan(*args: Any):
        result = plan(*args)
        planned.append([[row for rows in minibatch for row in rows] for minibatch in result])
        return result

    def watched_update(rollout):
        metrics = update(rollout)
        drawn.append(Drawn(rollout.prompt_ids, rollout.response_ids, rollout.stopped.tolist(), planned[:]))
        planned.clear()
        return metrics

    trainer.plan, trainer.update = watched_plan, watched_update
    trainer.train()
    return drawn


@torch.no_grad()
def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]):
    """By tensor: the norm of the difference, as a share of the norm of what training changed."""
    assert found.keys() == expected.keys() == start.keys()
    return {
        name: float((found[name] - tensor).norm() / (tensor - start[name]).norm())
        for name, tensor in ((name, tensor.detach()) for name, tensor in expected.items())
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_trainer_agrees_with_the_reference(tmp_path, tiny_model, tiny_tokenizer, case):
    kind, *more = case.split()
    tiny_model.config.attention_dropout = 0.3  # PPO runs without
    policy, reward_model = chain(tmp_path, tiny_model, tiny_tokenizer, kind == "lora")
    judge, shared = RewardModel.load(reward_model), more == ["shared_trunk"]
    trainer = make(
        tmp_path, str(policy), [judge, even_share], ROWS, engine=Spoken(judge.tokenizer), preflight=False,
        value_kind="shared_trunk" if shared else None, **EVERYTHING | CASES[case],
    )  # fmt: skip
    drawn, args = recorded(trainer), trainer.args
    for now in drawn:
        assert len(now.minibatches) == args.inner_epochs
        for epoch in now.minibatches:
            assert sorted(row for minibatch in epoch for row in minibatch) == list(range(args.rollout_size))
            assert {len(minibatch) for minibatch in epoch} == {args.minibatch_size}

    end, scorer = judge.tokenizer.convert_tokens_to_ids("<|im_end|>"), Model(reward_model)

    def score(prompt: list[int], response: list[int]) -> float:
        whole = response if response[-1] == end else [*response, end]
        even = sum(token % 2 == 0 for token in response) / len(response)
        return scorer.score(prompt + whole) + 0.5 * even

    mine, critic = Model(policy), None if shared else Model(reward_model)
    critic = critic or mine
    log = ppo_reference.train(mine, critic, score, args, drawn)

    logged = lines(tmp_path, "metrics.jsonl")
    for row, expected in zip(logged, log, strict=True):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert row["eos_rate"] < 1
    assert max(row["clip_fraction"] for row in logged) > 0.01
    assert max(row["value_clip_fraction"] for row in logged) > 0.01
    assert max(row["policy_grad_norm"] for row in logged) > args.max_grad_norm
    trainer.save_model(tmp_path / "saved")
    found = differences(saved(tmp_path / "saved"), mine.trained, Model(policy).trained)
    own = {name: tensor for name, tensor in weights(trainer).items() if is_value(name)}
    head = {name.rpartition(".")[2]: own.pop(name) for name in list(own) if name.startswith("value_head.")}
    trunk = {} if shared else critic.trained
    untrained = Model(policy if shared else reward_model)
    found |= differences({plain(name): w for name, w in own.items()}, trunk, untrained.trained if trunk else {})
    found |= differences(
        {"head": head["weight"], "head's bias": head["bias"]},
        {"head": critic.head, "head's bias": critic.bias},
        {"head": untrained.head, "head's bias": untrained.bias},
    )
    assert max(found.values()) < 1e-3, found


def saved(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return {plain(name): tensor for name, tensor in load_file(file).items()}


def plain(name: str) -> str:
    """A tensor's name in the files of a folder, without peft's and our own prefixes."""
    for prefix in ("policy.", "value.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name.replace(".value.weight", ".weight")
