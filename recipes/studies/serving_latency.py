"""Latency and tokens per second of `rlhf serve_policy`, beside transformers' generate and, where one is up, vLLM.

    python recipes/studies/serving_latency.py --model runs/my/ppo
    python recipes/studies/serving_latency.py --model runs/my/ppo --other http://127.0.0.1:8001

Each of 1, 8 and 64 clients asks for one answer after another; the server is a process of its own. Printed are the
median seconds of an answer and the tokens that all clients got per second. `generate` decodes as many rows as there are
clients in one batch, all at once: what no server can have.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rlhf import config as configs
from rlhf.client import Client
from rlhf.errors import RunStopped
from rlhf.run import console

console.quiet()

QUESTION = "Write a few sentences about the sea, and about the people who live beside it."


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """Measuring a policy's server."""

    model: str
    """The policy's folder."""
    other: str | None = None
    """Address of another server of OpenAI's HTTP that has the same weights."""
    clients: list[int] = field(default_factory=lambda: [1, 8, 64])
    """Clients at a time."""
    answers: int = 3
    """Answers that each client asks for."""
    max_tokens: int = 64
    """The most tokens of an answer."""


@contextlib.contextmanager
def own_server(model: str) -> Iterator[str]:
    """Start `rlhf serve_policy` in float32 on a free port; yield its address."""
    command = [sys.executable, "-m", "rlhf.cli", "serve_policy", "--model", model, "--port", "0", "--bf16", "false"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if " on http://" not in line:
            raise RunStopped(f"the server did not start: {line.strip() or 'see above'}")
        yield line.split(" on ")[1].split(",")[0]
    finally:
        process.terminate()
        process.wait(60)


def of_server(url: str, clients: int, config: LatencyConfig) -> tuple[float, float]:
    """Return the median seconds of an answer, and the tokens per second of all clients together."""

    def ask(seed: int) -> tuple[float, int]:
        began = time.perf_counter()
        body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "seed": seed}
        answer = client.asked("/v1/chat/completions", body | {"max_tokens": config.max_tokens})
        return time.perf_counter() - began, int(answer["usage"]["completion_tokens"])

    client = Client(url, timeout=600, retries=20)
    model = client.model
    ask(0)  # warm up
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(ask, range(clients * config.answers)))
    seconds = time.perf_counter() - began
    return statistics.median(took for took, _ in found), sum(tokens for _, tokens in found) / seconds


def of_generate(model: str, rows: int, config: LatencyConfig) -> tuple[float, float]:
    """Return the same of transformers' generate on one batch."""
    import torch

    from rlhf import chat
    from rlhf.models.loading import load_policy, load_tokenizer

    tokenizer, policy = load_tokenizer(model), load_policy(model).eval()
    prompt = torch.tensor([chat.encode_prompt(tokenizer, [{"role": "user", "content": QUESTION}])] * rows)
    stops = list(chat.stop_ids(tokenizer))
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": stops, "pad_token_id": chat.pad_id(tokenizer)}
    times, tokens = [], 0
    for _ in range(config.answers + 1):
        began = time.perf_counter()
        written = policy.generate(prompt, max_new_tokens=config.max_tokens, **settings)[:, prompt.shape[1] :]
        times.append(time.perf_counter() - began)
        ends = torch.isin(written, torch.tensor(stops)).int().cumsum(-1)
        tokens = int(((ends == 0) | ((ends == 1) & torch.isin(written, torch.tensor(stops)))).sum())
    took = statistics.median(times[1:])
    return took, tokens / took


def measure(config: LatencyConfig) -> None:
    """Print a line per number of clients and engine."""
    with own_server(config.model) as url:
        for clients in config.clients:
            show("rlhf serve_policy", clients, of_server(url, clients, config))
    for clients in config.clients:
        show("generate", clients, of_generate(config.model, clients, config))
        if config.other is not None:
            show(config.other, clients, of_server(config.other, clients, config))


def show(name: str, clients: int, found: tuple[float, float]) -> None:
    """Print one measurement."""
    console.stage_line(f"{clients} at a time", f"{name}: median {found[0]:.2f} s, {found[1]:.0f} tokens/s")


def main(argv: list[str]) -> None:
    measure(configs.load(LatencyConfig, argv, description=__doc__ or ""))


if __name__ == "__main__":
    configs.run(main)
