"""Sample with a vLLM server on the same GPU, and with the built-in engine: the same prompts, as many tokens each. Then
let PPO sample from that server, which gets its adapter and sleeps while it is trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ours_worker
import torch
from bench_tables import markdown
from cases import LORA, OURS, Case
from jobs import Job, Result
from synthetic import make_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import check, sample, server

from rlhf import chat
from rlhf.metrics import read_metrics
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.vllm import VLLMEngine

ROUNDS = 3  # the first warms up
SHARE = 0.3  # of the card's memory, for the server
UPDATES = 2
LOGGED = ("step_seconds", "generate_seconds", "update_seconds", "engine_kl_nats")
LORA_FLAGS = ["--enable-lora", "--max-lora-rank", str(LORA["lora_rank"])]
EAGER = ["--enforce-eager"]  # compiling and capturing graphs takes a cold server minutes, the part's whole time


def measure(job: Job, made: Job, keep: Callable[[Job, Result], None]) -> None:
    """Show tokens per second of both, and keep them in the job's folder."""
    check(job["vllm_python"], job["cuda"])
    case, tokenizer = Case.of_job(made["case"]), AutoTokenizer.from_pretrained(made["tokenizer"])
    prompts = [
        chat.encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
        for row in make_prompts(tokenizer, case.prompt_lengths)
    ]
    rates: dict[str, float] = {}
    found: Result = {"tokens_per_second": rates, "tables": {}}

    def show() -> None:
        rows = [[name, f"{rate:.0f}", f"{rate / rates['built-in']:.2f}"] for name, rate in rates.items()]
        found["tables"]["sampling"] = markdown(["engine", "tokens/s", "/ built-in"], rows)
        keep(job, found)

    rates["built-in"] = built_in(made, case, prompts, chat.pad_id(tokenizer))
    show()
    on_card = ["--gpu-memory-utilization", str(SHARE), "--enable-sleep-mode"] if job["cuda"] else []
    flags, folder = [*LORA_FLAGS, *EAGER, *on_card], Path(job["folder"])
    with server(job["vllm_python"], made, folder, case, flags) as caller, ThreadPoolExecutor(len(prompts)) as pool:
        ask = partial(sample, caller, "policy", new_tokens=case.new_tokens)
        rates["vLLM server, eager"] = tokens_per_second(case, lambda: list(pool.map(ask, prompts)))
        show()
        found["updates"] = trained_through(job, made, caller.url)
        rows = [[n, *(f"{row[name]:.4g}" for name in LOGGED)] for n, row in enumerate(found["updates"], 1)]
        found["tables"]["PPO through the server"] = markdown(["update", *LOGGED], rows)
        keep(job, found)


def trained_through(job: Job, made: Job, url: str) -> list[dict[str, float]]:
    """Train an adapter for some updates, sampled by the server, which sleeps meanwhile; return what was logged."""
    engine = VLLMEngine(url, "lora", colocated=True)
    asked = made | {"updates": UPDATES, "settings": OURS["ours_adapter"], "folder": str(Path(job["folder"], "ppo"))}
    ours_worker.trainer_of(asked, engine).train()
    return [{name: row[name] for name in LOGGED} for row in read_metrics(Path(asked["folder"], "metrics.jsonl"))]


def built_in(made: Job, case: Case, prompts: list[list[int]], pad_id: int) -> float:
    """Return the built-in engine's rate; its model leaves the card before the server comes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if made["bf16_hardware"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(made["model"], dtype=dtype).to(device).eval()
    engine = TransformersEngine(model, (), pad_id)  # never stops early
    generator = torch.Generator(device).manual_seed(0)
    rate = tokens_per_second(case, lambda: engine.generate(prompts, case.new_tokens, 1.0, generator))
    model.to("meta")
    if device == "cuda":
        torch.cuda.empty_cache()
    return rate


def tokens_per_second(case: Case, generate: Callable[[], Any]) -> float:
    """Return the rate of the fastest round after the first."""
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        generate()
        seconds.append(time.perf_counter() - began)
    return case.rollout_size * case.new_tokens / min(seconds[1:])
