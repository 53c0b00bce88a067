"""Run AgileRL's PPO for language models for some updates of a case: seconds by phase and peak memory.

Started by the benchmark, on a job file, with the Python of an environment that has `agilerl[cpu-llm]`. Policy,
reference and critic are LoRA adapters on one backbone. It has no reward model: rewards are computed here, by the same
model that scores trl's responses, in one batch. No gradient checkpointing, no Liger kernels (they need Triton), and
the rows of one minibatch in one forward; other settings were not tried.

* generate: `get_action`, which without vLLM samples one prompt after another;
* score: the reward model;
* logprobs: the phase of `learn` that it calls no_grad_forward: log-probs of policy and reference, values;
* update: the rest of `learn`.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
from cases import SPEED_SETTINGS, Case
from jobs import Job, Result, memory, resident_bytes, serve, wait_for_turn
from peft import LoraConfig
from synthetic import make_prompts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.chat import encode_prompt

VERSION = "2.58.0"


def work(job: Job) -> Result:
    """Compute `updates` updates; return each one's seconds by phase."""
    import agilerl

    assert (found := version("agilerl")) == VERSION, f"agilerl {found} is installed, not {VERSION}"
    agilerl.HAS_LIGER_KERNEL = False  # where they are installed it applies them on CPUs, too, which have no Triton
    from agilerl.algorithms.ppo_llm import PPO

    imported = resident_bytes()
    case, settings = Case.of_job(job["case"]), job["settings"]
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    torch.manual_seed(1)
    reward_model: Any = AutoModelForSequenceClassification.from_pretrained(
        job["model"], num_labels=1, dtype=torch.float32
    ).eval()
    agent = PPO(model_name=job["model"], **arguments(case, settings, tokenizer))
    frozen = {p.dtype for p in agent.actor.parameters() if not p.requires_grad}
    assert frozen == {dtype_of(settings)}, f"AgileRL's frozen weights are in {frozen}"
    prompts = [
        {"input_ids": torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])])}
        for row in make_prompts(tokenizer, case.prompt_lengths)
    ]
    updates = []
    for _ in range(job["updates"]):
        began = time.perf_counter()
        acted = agent.get_action(prompts)
        sampled = time.perf_counter()
        rewards = scores(reward_model, acted[0], tokenizer.pad_token_id)
        scored = time.perf_counter()
        learned = agent.learn((acted[0], acted[1], rewards))
        ended = time.perf_counter()
        logprobs = learned["learn_phase_no_grad_forward_s"]
        updates.append(
            {
                "generate": sampled - began,
                "score": scored - sampled,
                "logprobs": logprobs,
                "update": ended - scored - logprobs,
                "step": ended - began,
            }
        )
        wait_for_turn()
    written = [int(mask.sum()) for mask in acted[1]]
    assert written == [case.new_tokens] * case.rollout_size, f"responses of {sorted(set(written))} tokens"
    tokens = [case.rollout_size * case.new_tokens] * job["updates"]
    return {"updates": updates, "response_tokens": tokens, "imported_bytes": imported, **memory()}


def dtype_of(settings: dict[str, Any]) -> torch.dtype:
    """Return the type of the frozen weights, the run's precision. AgileRL's default is bfloat16, also on CPUs
    that are slow at it."""
    return torch.bfloat16 if settings["bf16"] else torch.float32


def arguments(case: Case, settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return AgileRL's names for what every run shares."""
    longest = max(case.prompt_lengths) + case.new_tokens
    return {
        "pad_token_id": tokenizer.pad_token_id, "pad_token": tokenizer.pad_token, "batch_size": case.rollout_size,
        "mini_batch_size": case.minibatch_size, "micro_batch_size_per_gpu": case.minibatch_size,
        "update_epochs": case.inner_epochs, "max_output_tokens": case.new_tokens, "min_output_tokens": case.new_tokens,
        "max_model_len": longest, "top_k": 0, "beta": SPEED_SETTINGS["kl_coef"],
        "lr_actor": SPEED_SETTINGS["learning_rate"], "gamma": SPEED_SETTINGS["gamma"],
        "gae_lambda": SPEED_SETTINGS["lam"], "clip_coef": SPEED_SETTINGS["clip_ratio"], "seed": SPEED_SETTINGS["seed"],
        "gradient_checkpointing": False, "use_liger_loss": False, "device": "cpu",
        "hf_generate_chunk_size": case.rollout_size, "model_config": {"torch_dtype": dtype_of(settings)},
        "lora_config": LoraConfig(
            r=settings["lora_rank"], lora_alpha=settings["lora_alpha"], target_modules="all-linear",
            task_type="CAUSAL_LM", lora_dropout=0.0,
        ),
    }  # fmt: skip


@torch.no_grad()
def scores(model: Any, rows: list[torch.Tensor], pad_id: int) -> torch.Tensor:
    """Return the reward model's score of every row [1, T], in one batch [B]."""
    padded = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True, padding_value=pad_id)
    model.config.pad_token_id = pad_id
    return model(input_ids=padded, attention_mask=(padded != pad_id).long()).logits[:, 0]


if __name__ == "__main__":
    serve(work)
