"""Sample a case's rollout once a turn: with PPO's own engine, transformers' generate, or a vLLM server.

Started by the benchmark, on a job file. The policy is an adapter on the case's model in all three, as PPO's is, prompts
and seeds are the same, and no response stops early. Each engine imports its own, so that the start-up is its own.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import AbstractContextManager, contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from cases import LORA, Case  # noqa: E402
from jobs import Job, Result, memory, serve, wait_for_turn  # noqa: E402

Sample = Callable[[int], int]
"""Samples a rollout with a seed; returns its tokens."""


def work(job: Job) -> Result:
    """Return the seconds and tokens of each of `updates` rollouts, and the seconds until the first one was there."""
    seconds, tokens = [], []
    with ENGINES[job["engine"]](job) as (imported, sample):
        ready = now()
        for turn in range(job["updates"]):
            began = now()
            tokens.append(sample(turn))
            seconds.append(now() - began)
            wait_for_turn()
    start = {"imports": imported - BEGAN, "ready": ready - imported, "first_rollout": seconds[0]}
    return {"updates": [{"step": took} for took in seconds], "response_tokens": tokens, "start": start, **memory()}


@contextmanager
def ours(job: Job) -> Iterator[tuple[float, Sample]]:
    """Sample as a PPO run does: its trainer, with reward and value model."""
    import ours_worker
    import torch

    imported = time.perf_counter()
    trainer = ours_worker.trainer_of(job)
    trainer.engine.stop_ids = ()

    def sample(seed: int) -> int:
        generator = torch.Generator(trainer.device).manual_seed(seed)
        return sum(map(len, trainer.generate(trainer.prompt_ids, generator).ids))

    yield imported, sample


@contextmanager
def generate(job: Job) -> Iterator[tuple[float, Sample]]:
    """Sample with the model's own `generate`, all rows in one batch, padded on the left."""
    import torch
    from transformers import GenerationConfig

    from rlhf.padding import pad

    case, (tokenizer, prompts), (imported, policy) = Case.of_job(job["case"]), read(job), adapted(job)
    policy.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    ids, mask = pad(prompts, tokenizer.pad_token_id, policy.device, side="left")
    plain: Any = policy.base_model.model
    plain.generation_config = GenerationConfig(  # the model's own would add its stop ids, top-k and penalties
        max_new_tokens=case.new_tokens, do_sample=True, temperature=1.0, top_k=0, pad_token_id=tokenizer.pad_token_id
    )

    @torch.no_grad()
    def sample(seed: int) -> int:
        torch.manual_seed(seed)
        written = policy.generate(input_ids=ids, attention_mask=mask.long())
        return int(written[:, ids.shape[1] :].numel())

    yield imported, sample


@contextmanager
def vllm(job: Job) -> Iterator[tuple[float, Sample]]:
    """Sample with a vLLM server that has loaded the adapter; a request for each prompt, with a seed of its own."""
    from concurrent.futures import ThreadPoolExecutor

    import vllm_server

    vllm_server.check(job["vllm_python"], False)
    case, (_, prompts), folder = Case.of_job(job["case"]), read(job), Path(job["folder"])
    imported, policy = adapted(job)
    policy.save_pretrained(str(folder / "adapter"))
    del policy
    flags = ["--enable-lora", "--max-lora-rank", str(LORA["lora_rank"]), "--lora-modules", f"adapter={folder}/adapter"]
    flags += job.get("vllm_flags", [])
    with (
        vllm_server.server(job["vllm_python"], job, folder, case, flags) as caller,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):

        def sample(seed: int) -> int:
            def ask(row: int) -> int:
                own = seed * len(prompts) + row
                return vllm_server.sample(caller, "adapter", prompts[row], case.new_tokens, own)

            return sum(pool.map(ask, range(len(prompts))))

        yield imported, sample


ENGINES: dict[str, Callable[[Job], AbstractContextManager[tuple[float, Sample]]]] = {
    "ours": ours, "generate": generate, "vllm": vllm
}  # fmt: skip


def read(job: Job) -> tuple[Any, list[list[int]]]:
    """Return the tokenizer, and the case's prompts as token ids."""
    from synthetic import make_prompts
    from transformers import AutoTokenizer

    from rlhf.chat import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    rows = make_prompts(tokenizer, Case.of_job(job["case"]).prompt_lengths)
    return tokenizer, [encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}]) for row in rows]


def adapted(job: Job) -> tuple[float, Any]:
    """Return when the packages were there, and the case's model under a new adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    imported = time.perf_counter()
    dtype = torch.bfloat16 if job["bf16_hardware"] else torch.float32
    lora = LoraConfig(
        r=LORA["lora_rank"], lora_alpha=LORA["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    return imported, get_peft_model(model, lora, autocast_adapter_dtype=False)


def now() -> float:
    """Return the time, once a GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    serve(work)
