"""Two PPO updates on responses that are given, in one process or (under torchrun) two; rank 0 saves what came out.

torchrun --standalone --nproc_per_node 2 tests/reference/two_processes.py POLICY REWARD_MODEL OUTPUT.pt ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from reward_models import RewardModel
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.rollout import Responses

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ROWS = [{"prompt": f"Count to {word}, please" + "!" * (i % 4)} for i, word in enumerate(WORDS[:8])]


class GivenResponses:
    """Not sampled: a response is a function of its prompt, so that every split of the prompts sees the same."""

    def generate(self, prompt_ids, max_new_tokens, temperature, generator):
        ids, stopped = [], []
        for prompt in prompt_ids:
            key = sum((i + 1) * token for i, token in enumerate(prompt))
            row = [4 + (key + 13 * k * k) % 390 for k in range(1 + key % (max_new_tokens - 1))]
            stopped.append(key % 3 > 0)
            ids.append([*row, 2] if stopped[-1] else row)
        return Responses(ids, stopped)


def odd_share(prompts, completions, completion_ids, **columns):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def two_updates(policy: str, reward_model: str, folder: str, **changes) -> dict:
    config = PPOConfig(**{
        "output_dir": folder, "updates": 2, "rollout_size": 8, "minibatch_size": 8, "inner_epochs": 2,
        "max_new_tokens": 9, "learning_rate": 1e-3, "tokens_per_microbatch": 120, "normalize_scores": True,
        "rescale_rewards": True, "kl_target_nats": 0.01, "kl_horizon": 100, "bf16": False,
    } | changes)  # fmt: skip
    trainer = PPOTrainer(
        policy,
        [odd_share, RewardModel.load(reward_model, device="cpu")],
        args=config,
        train_dataset=ROWS,
        engine=GivenResponses(),
    )
    metrics = trainer.train()
    state = trainer.accelerator.unwrap_model(trainer.module).trained_state()
    return {
        "processes": trainer.accelerator.num_processes,
        "main": trainer.accelerator.is_main_process,
        "state": {name: tensor.clone() for name, tensor in state.items()},
        "kl_coef": trainer.kl_coef,
        "moments": trainer.moments,
        "metrics": {name: value for name, value in metrics.items() if "second" not in name},
    }


def main(*arguments: str) -> None:
    for policy, reward_model, output in zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True):
        results = two_updates(policy, reward_model, str(Path(output).with_suffix(".run")))
        results["moments"] = results["moments"].__dict__
        if results["main"]:
            torch.save(results, output)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
