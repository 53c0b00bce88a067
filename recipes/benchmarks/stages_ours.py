"""Run our SFTTrainer or RewardTrainer on a job's rows, some steps a turn. Started by the benchmark, on a job file."""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

from typing import Any  # noqa: E402

from jobs import Job, Result, memory, serve  # noqa: E402
from stages_data import accuracy, loss, read  # noqa: E402

from rlhf.run import console  # noqa: E402

console.quiet()

from transformers import AutoTokenizer  # noqa: E402
from turns import Turns, now  # noqa: E402

from reward_models import RewardConfig, RewardModel, RewardTrainer  # noqa: E402
from rlhf import SFTConfig, SFTTrainer  # noqa: E402

IMPORTED = time.perf_counter()


def work(job: Job) -> Result:
    """Return each turn's seconds, the seconds until the first step was done, and what was learnt on held-out rows."""
    turns, tokenizer, rows = Turns(job["steps"]), AutoTokenizer.from_pretrained(job["tokenizer"]), read(job["train"])
    given: dict[str, Any] = {
        "output_dir": job["folder"],
        "save_steps": 0,
        "preflight": False,
        "lr_schedule": "constant",
    }
    given |= {name: job[name] for name in ("learning_rate", "bf16", "lora_rank", "lora_alpha")} | {"epochs": 1.0}
    given["load_in_4bit"] = job.get("load_in_4bit", False)
    trainer = (sft if job["stage"] == "sft" else reward_model)(job, given, rows, tokenizer, turns)
    built = now()
    trainer.train()
    start = {"imports": IMPORTED - BEGAN, "trainer": built - IMPORTED, "first_step": turns.first_step}
    result = {"updates": [{"step": seconds} for seconds in turns.seconds], "start": start, **memory()}
    if job.get("held_out"):
        rows = read(job["held_out"])
        trained = trainer.model
        learnt = (
            loss(trained, tokenizer, rows) if job["stage"] == "sft" else accuracy(RewardModel(trained, tokenizer), rows)
        )
        result["held_out"] = learnt
    return result


def sft(job: Job, given: dict[str, Any], rows: list[Any], tokenizer: Any, turns: Turns) -> Any:
    args = SFTConfig(batch_size=job["rows_per_step"], microbatch_size=job["rows_per_forward"], **given)
    return SFTTrainer(job["model"], args, rows, processing_class=tokenizer, callbacks=[turns])


def reward_model(job: Job, given: dict[str, Any], rows: list[Any], tokenizer: Any, turns: Turns) -> Any:
    """Rankings of K responses: a forward of `rows_per_forward` responses holds so many prompts fewer."""
    together = max(1, job["rows_per_forward"] // len(rows[0]["responses"]))
    args = RewardConfig(
        prompts_per_batch=job["rows_per_step"],
        microbatch_size=together,
        normalizer_samples=0,
        warmup_fraction=0.0,
        **given,
    )
    return RewardTrainer(job["model"], args, train_dataset=rows, processing_class=tokenizer, callbacks=[turns])


if __name__ == "__main__":
    serve(work)
