"""Run trl's own SFTTrainer or RewardTrainer of today on a job's rows, some steps a turn. Started by the benchmark, on a
job file.

trl's trainer is given what a careful user would give it: the rows as it documents them, frozen weights in bfloat16
where the hardware multiplies it fast, no checkpoints, no gradient checkpointing. A ranking becomes all its pairs, and
an optimizer step has the pairs of as many prompts as one of ours, though not of the same ones: trl shuffles pairs.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

from typing import Any  # noqa: E402

import torch  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from jobs import Job, Result, memory, serve  # noqa: E402
from peft import LoraConfig  # noqa: E402
from stages_data import accuracy, loss, pairs_of, preferences, read  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from turns import Turns, now  # noqa: E402

IMPORTED = time.perf_counter()


def work(job: Job) -> Result:
    """Return what stages_ours.work returns, and trl's version."""
    turns, tokenizer, rows = Turns(job["steps"]), AutoTokenizer.from_pretrained(job["tokenizer"]), read(job["train"])
    trainer = (sft if job["stage"] == "sft" else reward_model)(job, rows, tokenizer, turns)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # peft leaves a trained head in the frozen weights' precision
            parameter.data = parameter.data.float()
    built = now()
    trainer.train()
    start = {"imports": IMPORTED - BEGAN, "trainer": built - IMPORTED, "first_step": turns.first_step}
    result: Result = {"updates": [{"step": seconds} for seconds in turns.seconds], "start": start, **memory()}
    if job.get("held_out"):
        held_out = read(job["held_out"])
        if job["stage"] == "sft":
            result["held_out"] = loss(trainer.model, tokenizer, held_out)
        else:
            from reward_models import RewardModel

            result["held_out"] = accuracy(RewardModel(trainer.model, tokenizer, reads_rendered=True), held_out)
    return result | {"trl": trl.__version__}


def shared(job: Job, rows_per_step: int, rows_per_forward: int) -> dict[str, Any]:
    """Return the arguments of both trainers."""
    assert rows_per_step % rows_per_forward == 0, (rows_per_step, rows_per_forward)
    frozen = "bfloat16" if job["bf16"] and job["lora_rank"] else "float32"
    return {
        "output_dir": job["folder"], "num_train_epochs": 1, "per_device_train_batch_size": rows_per_forward,
        "gradient_accumulation_steps": rows_per_step // rows_per_forward, "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant", "bf16": job["bf16"], "gradient_checkpointing": False, "max_length": None,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 10**9,
        "use_cpu": not torch.cuda.is_available(), "model_init_kwargs": {"dtype": frozen},
        "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip


def adapter(job: Job, task: str) -> LoraConfig | None:
    if not job["lora_rank"]:
        return None
    saved = ["score"] if task == "SEQ_CLS" else None
    return LoraConfig(
        r=job["lora_rank"], lora_alpha=job["lora_alpha"], target_modules="all-linear", task_type=task,
        modules_to_save=saved,
    )  # fmt: skip


def sft(job: Job, rows: list[Any], tokenizer: Any, turns: Turns) -> Any:
    data = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])
    args = trl.SFTConfig(completion_only_loss=True, **shared(job, job["rows_per_step"], job["rows_per_forward"]))
    given: Any = {"processing_class": tokenizer, "peft_config": adapter(job, "CAUSAL_LM"), "callbacks": [turns]}
    return trl.SFTTrainer(job["model"], args=args, train_dataset=data, **given)


def reward_model(job: Job, rows: list[Any], tokenizer: Any, turns: Turns) -> Any:
    """A forward of trl's holds both responses of each pair: half as many pairs as ours holds responses."""
    args = trl.RewardConfig(**shared(job, job["rows_per_step"] * len(pairs_of(rows[0])), job["rows_per_forward"] // 2))
    given: Any = {"processing_class": tokenizer, "peft_config": adapter(job, "SEQ_CLS"), "callbacks": [turns]}
    return trl.RewardTrainer(job["model"], args=args, train_dataset=Dataset.from_list(preferences(rows)), **given)


if __name__ == "__main__":
    serve(work)
