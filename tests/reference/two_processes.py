"""All trainers on fixed data: what each optimizer step was given and what was logged, in one process or in two.

    torchrun --standalone --nproc_per_node 2 tests/reference/two_processes.py FOLDER 1 OUTPUT.pt "ppo, full" ...

FOLDER holds `full` and `lora`, each a tiny chain's (policy, reward model), and `encoder`; 1 is the size of a
micro-batch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from reward_models import (
    ModerationConfig,
    ModerationTrainer,
    ProcessConfig,
    ProcessTrainer,
    RewardConfig,
    RewardModel,
    RewardTrainer,
)
from rlhf.metrics import read_metrics
from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.sampling.engine import Responses
from rlhf.sft.trainer import SFTConfig, SFTTrainer

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "more", "most"]
PROMPTS = [{"prompt": f"Count to {word}, please" + "!" * (i % 4), "number": i} for i, word in enumerate(WORDS[:12])]
# 11 and 5, 11 and 7: no number of processes, rows per micro-batch or rows per step divides them
DEMONSTRATIONS = [{"prompt": f"Count to {i}", "completion": ", ".join(WORDS[: 1 + 3 * i % 11])} for i in range(16)]
RANKINGS = [
    {
        "prompt": f"Question {i}?" + " please" * (i % 5),
        "responses": ["Paris " * (1 + (2 * i + 3 * k) % 7) + "end" * k for k in range(2 + i % 3)],
        "ranks": [(i + k) % (2 + i % 3) for k in range(2 + i % 3)],
    }
    for i in range(18)
]
SOLUTIONS = [
    {
        "prompt": f"Question {i}?" + " please" * (i % 5),
        "steps": ["Paris " * (1 + (i + k) % 4) + "end" * k for k in range(1 + i % 4)],
        "labels": [(1, -1, 0, None)[(i + k) % 4] if k else 1 - 2 * (i % 2) for k in range(1 + i % 4)],
    }
    for i in range(18)
]
ANIMALS = ("cat", "dog", "bird", "tree", "house")
SAID = [[ANIMALS[(i + k * k) % 5] for k in range(1 + 5 * i % 37)] for i in range(18)]
# of one to several windows; of some both categories are known, of others one or none
TEXTS = [
    {"prompt": " ".join(words), "dog": None if i % 4 == 3 else int("dog" in words),
     "bird": None if i % 3 == 0 else int("bird" in words)}
    for i, words in enumerate(SAID)
]  # fmt: skip
KINDS = ("full", "lora")
SMALL_STEP = 1e-6  # so small that every step's gradient can be compared as closely as the first one's


class GivenResponses:
    """Not sampled: a response is a function of its prompt, so that every split of the prompts sees the same.

    with_logprobs: it also says what it drew them with, around what the tiny models say of a token (-6 or so).
    """

    def __init__(self, with_logprobs: bool = False):
        self.with_logprobs = with_logprobs

    def generate(self, prompt_ids, max_new_tokens, temperature, generator):
        ids, stopped = [], []
        for prompt in prompt_ids:
            key = sum((i + 1) * token for i, token in enumerate(prompt))
            row = [4 + (key + 13 * k * k) % 390 for k in range(1 + key % (max_new_tokens - 1))]
            stopped.append(key % 3 > 0)
            ids.append([*row, 2] if stopped[-1] else row)
        logprobs = [[-7.2 + (token + 3 * place) % 7 / 5 for place, token in enumerate(row)] for row in ids]
        return Responses(ids, stopped, logprobs if self.with_logprobs else None)


class Gradients(TrainerCallback):
    """What each optimizer step gets."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(of(model))


def of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def result(trainer: Any, folder: str, gradients: list, **more: Any) -> dict[str, Any]:
    """The metrics are those of metrics.jsonl, which only the main process writes."""
    trainer.accelerator.wait_for_everyone()
    logs = [
        {name: value for name, value in row.items() if "second" not in name}
        for row in read_metrics(Path(folder, "metrics.jsonl"))
    ]
    return {"processes": trainer.accelerator.num_processes, "gradients": gradients, "logs": logs} | more


def odd_share(prompts, completions, completion_ids, **columns):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def some_lengths(prompts, completions, completion_ids, number, log_metric, **columns):
    """Has nothing to say of some responses, more of them in one process than in the other."""
    for n in number:
        log_metric("mean_number", n)
    return [None if n % 4 == 0 else len(ids) / 10 for n, ids in zip(number, completion_ids, strict=True)]


def ppo(
    policy: str, reward_model: str, folder: str, trainer_class=PPOTrainer, tokenizer=None, engine=None, **changes
) -> dict:
    """Two updates of two minibatches and two inner epochs; Adam is damped so that its steps follow the gradients."""
    config = PPOConfig(**{
        "output_dir": folder, "updates": 2, "rollout_size": 8, "minibatch_size": 4, "inner_epochs": 2,
        "max_new_tokens": 9, "learning_rate": 0.1, "adam_epsilon": 0.1, "tokens_per_microbatch": 10**9,
        "normalize_scores": True, "rescale_rewards": True, "kl_target_nats": 0.01, "kl_horizon": 100,
        "clip_ratio": 0.05, "max_grad_norm": 1e9, "lr_schedule": "linear", "warmup_updates": 1, "eval_steps": 1,
        "bf16": False,
    } | changes)  # fmt: skip
    functions = [odd_share, RewardModel.load(reward_model, device="cpu"), some_lengths]
    engine = engine or GivenResponses(with_logprobs=True)
    trainer = trainer_class(policy, functions, config, PROMPTS[:11], PROMPTS[11:], tokenizer, engine=engine)
    gradients, prompts, rates = [], [], []
    step, collect = trainer.optimizer.step, trainer.collect

    def watched_step():
        gradients.append(of(trainer.accelerator.unwrap_model(trainer.module)))
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        step()

    def watched_collect(share):
        prompts.append([prompt.columns["number"] for prompt in share])
        return collect(share)

    trainer.optimizer.step, trainer.collect = watched_step, watched_collect
    trainer.train()
    shares = gather_object([prompts])  # of each process, update by update
    weights = {name: p.detach().clone() for name, p in trainer.actor_critic.named_parameters() if p.requires_grad}
    return result(
        trainer, folder, gradients, weights=weights, rates=rates, kl_coef=trainer.kl_coef,
        moments=vars(trainer.moments),
        prompts=[[n for row in zip(*update, strict=True) for n in row] for update in zip(*shares, strict=True)],
    )  # fmt: skip


def sft(policy: str, _: str, folder: str, trainer_class=SFTTrainer, tokenizer=None, order=1, **changes) -> dict:
    config = SFTConfig(**{
        "output_dir": folder, "epochs": 2, "batch_size": 4, "microbatch_size": 4, "learning_rate": SMALL_STEP,
        "max_length": 256, "warmup_fraction": 0.3, "max_grad_norm": 0, "logging_steps": 2, "eval_steps": 3,
        "save_steps": 0, "bf16": False,
    } | changes)  # fmt: skip
    gradients = Gradients()
    rows, held_out = DEMONSTRATIONS[:11][::order], DEMONSTRATIONS[11:][::order]
    trainer = trainer_class(policy, config, rows, held_out, tokenizer, callbacks=[gradients])
    trainer.train()
    return result(trainer, folder, gradients.seen, steps=trainer.state.max_steps)


def reward_model(
    policy: str, _: str, folder: str, trainer_class=RewardTrainer, tokenizer=None, order=1, **changes
) -> dict:
    config = RewardConfig(**{
        "output_dir": folder, "epochs": 2, "prompts_per_batch": 4, "microbatch_size": 4, "learning_rate": SMALL_STEP,
        "max_length": 256, "warmup_fraction": 0.3, "max_grad_norm": 0, "logging_steps": 2, "eval_steps": 3,
        "save_steps": 0, "bf16": False, "normalizer_samples": 16,
    } | changes)  # fmt: skip
    gradients = Gradients()
    rows, held_out = RANKINGS[:11][::order], RANKINGS[11:][::order]
    trainer = trainer_class(
        policy, config, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer, callbacks=[gradients]
    )
    trainer.train()
    return result(trainer, folder, gradients.seen, steps=trainer.state.max_steps, normalizer=vars(trainer.normalizer))


def process_reward(
    policy: str, _: str, folder: str, trainer_class=ProcessTrainer, tokenizer=None, order=1, **changes
) -> dict:
    config = ProcessConfig(**{
        "output_dir": folder, "epochs": 2, "solutions_per_batch": 4, "microbatch_size": 4, "learning_rate": SMALL_STEP,
        "max_length": 256, "warmup_fraction": 0.3, "max_grad_norm": 0, "logging_steps": 2, "eval_steps": 3,
        "save_steps": 0, "bf16": False,
    } | changes)  # fmt: skip
    gradients = Gradients()
    rows, held_out = SOLUTIONS[:11][::order], SOLUTIONS[11:][::order]
    trainer = trainer_class(
        policy, config, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer, callbacks=[gradients]
    )
    trainer.train()
    return result(trainer, folder, gradients.seen, steps=trainer.state.max_steps)


def moderation(
    policy: str, _: str, folder: str, trainer_class=ModerationTrainer, tokenizer=None, order=1, **changes
) -> dict:
    config = ModerationConfig(**{
        "output_dir": folder, "epochs": 2, "texts_per_batch": 4, "microbatch_size": 4, "learning_rate": SMALL_STEP,
        "max_length": 24, "warmup_fraction": 0.3, "max_grad_norm": 0, "logging_steps": 2, "eval_steps": 3,
        "save_steps": 0, "bf16": False, "trains": "all", "reads": "trunk", "categories": ["dog", "bird"],
    } | changes)  # fmt: skip
    gradients = Gradients()
    rows, held_out = TEXTS[:11][::order], TEXTS[11:][::order]
    trainer = trainer_class(
        policy, config, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer, callbacks=[gradients]
    )
    trainer.train()
    offsets = trainer.offsets.tolist()
    return result(trainer, folder, gradients.seen, steps=trainer.state.max_steps, offsets=offsets)


STAGES = {
    "ppo": ppo, "sft": sft, "reward_model": reward_model, "process_reward": process_reward, "moderation": moderation,
}  # fmt: skip


def mode(stage: str, kind: str) -> dict[str, str]:
    """The second word of a kind such as "lora shared_trunk": PPO's value model."""
    return {"value_model": kind.split()[1]} if stage == "ppo" and " " in kind else {}


def folders(root: str | Path, kind: str) -> tuple[str, str]:
    kind = kind.split()[0]
    policy = Path(root, kind, "sft" if kind == "lora" else "base")
    return str(policy), str(Path(root, kind, "reward_model"))


def main(root: str, microbatch: str, output: str, *runs: str) -> None:
    """Run each "stage, kind", LoRA with gradient checkpointing; the main process saves what came out."""
    results = {}
    for run in runs:
        name, kind = run.split(", ")
        rows = int(microbatch)
        size = {"tokens_per_microbatch": 30 * rows} if name == "ppo" else {"microbatch_size": rows}
        settings = size | {"gradient_checkpointing": kind == "lora"} | mode(name, kind)
        folder = str(Path(output).with_suffix("") / name / kind)
        results[run] = STAGES[name](*folders(root, kind), folder, **settings)
    if torch.distributed.get_rank() == 0:
        torch.save(results, output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
