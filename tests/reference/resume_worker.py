"""Every trainer whole, and stopped half-way and resumed; under torchrun in two processes. What agrees goes to a file.

torchrun --standalone --nproc_per_node 2 tests/reference/resume_worker.py OUTPUT KIND POLICY REWARD_MODEL ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from reward_models import RewardConfig, RewardModel, RewardTrainer
from rlhf.models.loading import tokenizer_of
from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.sft.trainer import SFTConfig, SFTTrainer

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
STEPS = 4


class Stop(TrainerCallback):
    """Ends a run after some steps, as a kill would: without a word to anybody."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def low_share(prompts, completions, completion_ids, **columns):
    return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]


def make(stage: str, policy: Any, reward_model: Any, folder: Path, callbacks=None, **changes) -> Any:
    """A trainer of `STEPS` steps with a checkpoint every second one."""
    peft_config = changes.pop("peft_config", None)
    given = policy if isinstance(policy, torch.nn.Module) else str(policy)
    common = {"output_dir": str(folder), "save_steps": 2, "bf16": False, "learning_rate": 1e-3}
    if stage == "ppo":
        rows = [{"prompt": f"Count to {word}" + ", please" * (i % 3)} for i, word in enumerate(WORDS[:8])]
        settings = {
            "updates": STEPS, "rollout_size": 8, "minibatch_size": 4, "inner_epochs": 2, "max_new_tokens": 7,
            "tokens_per_microbatch": 120, "normalize_scores": True, "kl_target_nats": 0.01, "kl_horizon": 50,
        }  # fmt: skip
        functions = [low_share, RewardModel.load(str(reward_model), device="cpu")]
        config = PPOConfig(**common | settings | changes)
        tokenizer = tokenizer_of(given, None)
        return PPOTrainer(
            given, functions, config, rows, processing_class=tokenizer, peft_config=peft_config, callbacks=callbacks
        )
    if stage == "sft":
        rows = [{"prompt": f"Count to {i}", "completion": ", ".join(WORDS[1 : i + 1])} for i in range(1, 9)]
        settings = {"epochs": 2, "batch_size": 4, "microbatch_size": 2, "logging_steps": 1}
        return SFTTrainer(
            given, SFTConfig(**common | settings | changes), rows, peft_config=peft_config, callbacks=callbacks
        )
    rows = [
        {"prompt": f"Count to {i}", "responses": [", ".join(WORDS[1 : i + 1]), "no", WORDS[i]], "ranks": [1, 3, 2]}
        for i in range(1, 9)
    ]
    settings = {"epochs": 2, "prompts_per_batch": 4, "microbatch_size": 2, "logging_steps": 1}
    config = RewardConfig(**common | settings | changes)
    return RewardTrainer(given, args=config, train_dataset=rows, peft_config=peft_config, callbacks=callbacks)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    if isinstance(trainer, PPOTrainer):
        named = trainer.actor_critic.named_parameters()
        return {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def logged(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in row.items() if "second" not in name} for row in rows]


def compare(stage: str, policy: str, reward_model: str, folder: Path) -> dict[str, Any]:
    whole = make(stage, policy, reward_model, folder / "whole")
    before = weights(whole)
    whole.train()
    stopped = make(stage, policy, reward_model, folder / "parts", [Stop(STEPS // 2)])
    stopped.train()
    at = getattr(stopped, "update_index", None) or stopped.state.global_step
    torch.manual_seed(99)  # nothing may hang on what this process drew before
    resumed = make(stage, policy, reward_model, folder / "parts")
    resumed.train(resume_from_checkpoint=True)
    one, two = weights(whole), weights(resumed)
    return {
        "processes": whole.accelerator.num_processes,
        "stopped at": at,
        "weights": one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one),
        "metrics": logged(folder / "whole") == logged(folder / "parts"),
        "moved": not all(torch.equal(one[name], before[name]) for name in one),
    }


def main(output: str, *arguments: str) -> None:
    found = {}
    for kind, policy, reward_model in zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True):
        for stage in ("sft", "reward_model", "ppo"):
            found[f"{stage}/{kind}"] = compare(stage, policy, reward_model, Path(output) / kind / stage)
    if int(torch.distributed.get_rank()) == 0:
        Path(output).with_suffix(".json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
