"""Run trl's PPOTrainer on the toy world until the gold score passes the mark. Started by the benchmark, on a job file.

The hyperparameters are the toy config's and the job's `settings`, as far as trl's PPO has them: no learning rate of
the value model's own, no updates for the value model alone, no clipping of gradients. A response without its stop token
loses the penalty (ours, in the toy config: it is replaced by it). The reward model's normaliser is put into its head,
so that scores and first values are those of ours.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from cases import trl_names
from datasets import Dataset
from jobs import Job, Result, serve
from toy_clock import GoldClock, MarkPassed, settings
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl_worker import fixed_arguments

from rlhf.chat import encode_prompt
from rlhf.config import from_dict, to_dict
from rlhf.models import loading as models
from rlhf.models.scalar import ScoreNormalizer
from rlhf.ppo.config import PPOConfig
from rlhf.rows.records import read_prompts


def work(job: Job) -> Result:
    """Return the same as quality_ours.work."""
    from trl.experimental.ppo import ppo_trainer

    run = Path(job["run"])
    tokenizer = models.load_tokenizer(str(run / "sft"))
    tokenizer.padding_side = "left"
    toy: Any = from_dict(PPOConfig, settings()["ppo"] | job["settings"], "toy.yaml: ppo")
    ids = [encode_prompt(tokenizer, prompt.messages) for prompt in read_prompts(str(run / "rankings/prompts.jsonl"))]
    clock = GoldClock(job, tokenizer)
    args = ppo_trainer.PPOConfig(
        output_dir=job["folder"],
        num_mini_batches=toy.rollout_size // toy.minibatch_size,
        total_episodes=toy.rollout_size * (job["updates"] or toy.updates),
        per_device_train_batch_size=toy.rollout_size,  # cut into minibatches, one optimizer step each
        local_rollout_forward_batch_size=toy.rollout_size,
        stop_token="eos",
        missing_eos_penalty=toy.missing_eos_penalty,
        **fixed_arguments(),
        **trl_names(to_dict(toy) | {"seed": job["seed"]}),
    )
    trainer = ppo_trainer.PPOTrainer(
        args,
        tokenizer,
        model=AutoModelForCausalLM.from_pretrained(run / "sft", dtype=torch.float32),
        ref_model=None,
        reward_model=scalar_model(run / "reward_model"),
        value_model=scalar_model(run / "reward_model"),
        train_dataset=Dataset.from_dict({"input_ids": [i for i in ids if len(i) <= toy.max_prompt_tokens]}),
        callbacks=[clock],
    )
    clock.start()
    with contextlib.suppress(MarkPassed):
        trainer.train()
    return clock.result()


def scalar_model(folder: Path) -> Any:
    """Return the reward model with its normaliser in its head: score = (w h - mean) / std."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    normalizer = ScoreNormalizer.load(folder)
    head = torch.nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / normalizer.std)
        head.bias.fill_(-normalizer.mean / normalizer.std)
    model.score = head
    return model


if __name__ == "__main__":
    serve(work)
