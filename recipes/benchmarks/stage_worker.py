"""Run SFT, reward-model training or sampling on the toy's sizes, some steps a turn; report every turn's seconds.

Started by the benchmark, on a job file.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from rlhf.run import console

console.quiet()

import torch  # noqa: E402
from cases import Case  # noqa: E402
from jobs import Job, Result, serve, wait_for_turn  # noqa: E402
from synthetic import ROLES, make_prompts  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from turns import Turns  # noqa: E402

from reward_models import RewardConfig, RewardTrainer  # noqa: E402
from rlhf import SFTConfig, SFTTrainer, chat  # noqa: E402
from rlhf.sampling.decode import TransformersEngine  # noqa: E402

ROWS, PROMPTS, RESPONSES = 16, 4, 4  # of an SFT step; of a reward-model step, and per prompt: toy.yaml's
STEPS = 20  # a turn
TRAINING: dict[str, Any] = {"save_steps": 0, "preflight": False, "bf16": False, "learning_rate": 1e-5}


def work(job: Job) -> Result:
    """Return the seconds of each of `updates` turns."""
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    return {"updates": [{"step": seconds} for seconds in STAGES[job["stage"]](job, tokenizer)]}


def sft(job: Job, tokenizer: Any) -> list[float]:
    turns = Turns(STEPS)
    rows = [{"prompt": prompt, "completion": response} for prompt, (response,) in texts(job, tokenizer, ROWS, 1)]
    args = SFTConfig(output_dir=job["folder"], epochs=1, batch_size=ROWS, **TRAINING)
    SFTTrainer(job["model"], args, rows, processing_class=tokenizer, callbacks=[turns]).train()
    return turns.seconds


def reward_model(job: Job, tokenizer: Any) -> list[float]:
    turns, ranks = Turns(STEPS), [float(rank) for rank in range(1, RESPONSES + 1)]
    rows = [
        {"prompt": prompt, "responses": responses, "ranks": ranks}
        for prompt, responses in texts(job, tokenizer, PROMPTS, RESPONSES)
    ]
    args = RewardConfig(
        output_dir=job["folder"], prompts_per_batch=PROMPTS, microbatch_size=PROMPTS, normalizer_samples=0, **TRAINING
    )
    RewardTrainer(job["model"], args, train_dataset=rows, processing_class=tokenizer, callbacks=[turns]).train()
    return turns.seconds


def sampling(job: Job, tokenizer: Any) -> list[float]:
    """Sample a rollout's responses once a turn."""
    case, seconds = Case.of_job(job["case"]), []
    model = AutoModelForCausalLM.from_pretrained(job["model"]).eval()
    engine = TransformersEngine(model, (), chat.pad_id(tokenizer))  # never stops early
    prompts = [
        chat.encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
        for row in make_prompts(tokenizer, case.prompt_lengths)
    ]
    for turn in range(job["updates"]):
        began = time.perf_counter()
        engine.generate(prompts, case.new_tokens, 1.0, torch.Generator().manual_seed(turn))
        seconds.append(time.perf_counter() - began)
        wait_for_turn()
    return seconds


STAGES: dict[str, Callable[[Job, Any], list[float]]] = {
    "sft": sft, "reward_model": reward_model, "sampling": sampling
}  # fmt: skip


def texts(
    job: Job, tokenizer: Any, per_step: int, responses: int, steps: int | None = None
) -> list[tuple[str, list[str]]]:
    """Return prompts with so many different responses each, enough for all turns of `steps` steps (None: STEPS);
    lengths are the case's."""
    case, draw = Case.of_job(job["case"]), random.Random(0)
    words = [f"w{i}" for i in range(len(ROLES), len(tokenizer) // 2)]

    def text(tokens: int) -> str:
        return " ".join(draw.choices(words, k=tokens))

    return [
        (text(draw.randint(*case.prompt_tokens)), [text(case.new_tokens) for _ in range(responses)])
        for _ in range(job["updates"] * (steps or STEPS) * per_step)
    ]


if __name__ == "__main__":
    serve(work)
