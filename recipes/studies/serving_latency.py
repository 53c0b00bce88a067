"""Latency and tokens per second of `rlhf serve_policy`, beside transformers' generate and, where one is up, vLLM.

    python recipes/studies/serving_latency.py --model runs/my/ppo
    python recipes/studies/serving_latency.py --model runs/my/ppo --other http://127.0.0.1:8001

Each of 1, 8 and 64 clients asks for one answer after another; the server is a process of its own. Measured are the
median seconds of an answer and the tokens that all clients got per second; the engines take turns, round after round,
and the table has the medians over the rounds, with their range. `generate` decodes as many rows as there are clients in
one batch, all at once: what no server can have. `write_results.py` takes the table over.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rlhf import config as configs
from rlhf.client import Client
from rlhf.errors import RunStopped
from rlhf.run import console
from rlhf_recipes.studies import measured
from rlhf_recipes.studies.measured import Table

console.quiet()

OWN, GENERATE = "rlhf serve_policy", "transformers' generate, one batch"

QUESTION = "Write a few sentences about the sea, and about the people who live beside it."


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """Measuring a policy's server."""

    model: str
    """The policy's folder."""
    other: str | None = None
    """Address of another server of OpenAI's HTTP that has the same weights."""
    other_name: str = "vLLM"
    """What the table calls it."""
    clients: list[int] = field(default_factory=lambda: [1, 8, 64])
    """Clients at a time."""
    answers: int = 3
    """Answers that each client asks for in a round."""
    rounds: int = 3
    """Turns of every engine."""
    max_tokens: int = 64
    """The most tokens of an answer."""
    output_dir: Path = Path("runs/serving_latency")
    """Folder for the table."""


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
    times, tokens = [], []
    for _ in range(config.answers + 1):
        began = time.perf_counter()
        written = policy.generate(prompt, max_new_tokens=config.max_tokens, **settings)[:, prompt.shape[1] :]
        times.append(time.perf_counter() - began)
        ends = torch.isin(written, torch.tensor(stops)).int().cumsum(-1)
        tokens.append(int(((ends == 0) | ((ends == 1) & torch.isin(written, torch.tensor(stops)))).sum()))
    return statistics.median(times[1:]), sum(tokens[1:]) / sum(times[1:])  # the first warms up


def measure(config: LatencyConfig) -> list[Table]:
    """Print a line per round, number of clients and engine; return the table."""
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    with own_server(config.model) as url:
        engines = {
            OWN: partial(of_server, url, config=config),
            GENERATE: partial(of_generate, config.model, config=config),
        }
        if config.other is not None:
            engines[config.other_name] = partial(of_server, config.other, config=config)
        for _ in range(config.rounds):
            for clients, (name, one) in itertools.product(config.clients, engines.items()):
                took, pace = one(clients)
                found.setdefault((clients, name), []).append((took, pace))
                console.stage_line(f"{clients} at a time", f"{name}: median {took:.2f} s, {pace:.0f} tokens/s")
    rows = []
    for (clients, name), numbers in found.items():
        seconds, paces = zip(*numbers, strict=True)
        rows.append([str(clients), name, spread(seconds, "{:.2f}"), spread(paces, "{:.0f}")])
    return [("Serving", ["clients", "engine", "seconds of an answer", "tokens/s of all"], rows)]


def spread(numbers: Sequence[float], form: str) -> str:
    """The median, with the range in brackets."""
    low, middle, high = (form.format(number) for number in (min(numbers), statistics.median(numbers), max(numbers)))
    return f"{middle} [{low}, {high}]"


def main(argv: list[str]) -> None:
    config = configs.load(LatencyConfig, argv, description=__doc__ or "")
    tables = measure(config)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    measured.keep(config.output_dir, asdict(config), tables)


if __name__ == "__main__":
    configs.run(main)
