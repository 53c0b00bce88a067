"""Run ours for some updates of a case: seconds by phase and peak memory. Started by the benchmark, on a job file."""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from rlhf.run import console  # noqa: E402

console.quiet()

import torch  # noqa: E402
import without  # noqa: E402
from cases import SPEED_SETTINGS, Case  # noqa: E402
from jobs import Job, Result, memory, resident_bytes, serve, wait_for_turn  # noqa: E402
from peft import TaskType  # noqa: E402
from synthetic import make_prompts  # noqa: E402
from transformers import AutoTokenizer, TrainerCallback  # noqa: E402

from reward_models import RewardModel  # noqa: E402
from rlhf.metrics import read_metrics  # noqa: E402
from rlhf.models import packing  # noqa: E402
from rlhf.models.adapters import lora_config  # noqa: E402
from rlhf.models.scalar import new_scalar_model  # noqa: E402
from rlhf.ppo.trainer import PPOConfig, PPOTrainer  # noqa: E402
from rlhf.sampling.engine import Engine  # noqa: E402

IMPORTED = time.perf_counter()
ATTENTIONS = {
    "sdpa": "SDPA", packing.BY_ROWS: "our own for CPUs", packing.FLASH: "flash-attn",
    packing.VARLEN: "torch's flash attention",
}  # fmt: skip
PHASES = ("generate", "score", "logprobs", "update")


class Turns(TrainerCallback):
    """Wait between updates, off the clock."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_turn()


def work(job: Job) -> Result:
    """Compute `updates` updates; return each one's seconds by phase. `without`: the trick that is switched off."""
    with without.off(job.get("without")):
        return train(job)


def train(job: Job) -> Result:
    imported, case = resident_bytes(), Case.of_job(job["case"])
    trainer = trainer_of(job)
    start, rows = {"imports": IMPORTED - BEGAN, "trainer": time.perf_counter() - IMPORTED}, rows_of(trainer)
    trainer.engine.stop_ids = ()  # every response has `new_tokens` tokens
    trainer.train()
    logged = read_metrics(Path(job["folder"], "metrics.jsonl"))
    updates = [{name: row[f"{name}_seconds"] for name in PHASES} | {"step": row["step_seconds"]} for row in logged]
    tokens = [row["response_tokens"] * case.rollout_size for row in logged]
    start |= {"first_step": updates[0]["step"]}
    found = {"updates": updates, "response_tokens": tokens, "imported_bytes": imported, "start": start}
    return {**found, "rows": rows, **memory()}


def rows_of(trainer: PPOTrainer) -> str:
    """Return how the policy's rows are computed: packed or padded, and by which attention."""
    name = packing.attention_of(trainer.actor_critic.policy)
    return f"{'packed' if trainer.actor_critic.packs else 'padded'}, {ATTENTIONS.get(name, name)}"


def trainer_of(job: Job, engine: Engine | None = None) -> PPOTrainer:
    """Build the trainer of a job, which samples with `engine`; None: with its own."""
    case, settings = Case.of_job(job["case"]), job["settings"]
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    reward = make_reward(job["model"], tokenizer, settings)
    args = PPOConfig(
        output_dir=job["folder"],
        updates=job["updates"],
        rollout_size=case.rollout_size,
        minibatch_size=case.minibatch_size,
        inner_epochs=case.inner_epochs,
        max_new_tokens=case.new_tokens,
        missing_eos="off",
        preflight=False,  # it refuses random weights
        tokens_per_microbatch=case.tokens_per_microbatch,
        **{**SPEED_SETTINGS, **settings},
    )
    prompts = make_prompts(tokenizer, case.prompt_lengths)
    given: Any = {"processing_class": tokenizer, "callbacks": [Turns()], "engine": engine}
    return PPOTrainer(job["model"], reward, args=args, train_dataset=prompts, **given)


def make_reward(model: str, tokenizer: Any, settings: dict[str, Any]) -> RewardModel:
    """Return a reward model of the policy's size with a random head: an adapter where the policy is one, else full."""
    rank, dtype = settings.get("lora_rank", 0), torch.bfloat16 if settings.get("bf16") else torch.float32
    lora = lora_config(rank, settings.get("lora_alpha", 32.0), task_type=TaskType.SEQ_CLS)
    scalar: Any = new_scalar_model(model, seed=1, dtype=dtype if rank else torch.float32, lora=lora)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return RewardModel(scalar.to(device), tokenizer)


if __name__ == "__main__":
    serve(work)
