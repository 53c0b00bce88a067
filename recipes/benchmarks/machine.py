"""Measure this machine's GEMM peak at a model's shapes and its memory bandwidth; best of several tries.

python recipes/benchmarks/machine.py job.json
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from jobs import Job, Result, serve
from limit import Sizes

TRIES = 8
BANDWIDTH_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Copied at once: so much that starting the copy takes a hundredth of it, on an H200 too (0.9 ms)."""


def best_seconds(function: Callable[[], object], tries: int = TRIES) -> float:
    """Return the shortest of several runs, after one that does not count."""
    seconds = []
    for _ in range(tries + 1):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def gemm_peak(sizes: Sizes, tokens: int, dtype: torch.dtype, device: str) -> float:
    """Return operations per second of the fastest of the model's products (a layer's, the head's) on so many tokens."""
    shapes = {*sizes.matrices, (sizes.hidden_size, sizes.vocab_size)}
    rates = []
    for inputs, outputs in sorted(shapes):
        x = torch.randn(tokens, inputs, device=device).to(dtype)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        seconds = best_seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))
        rates.append(2 * tokens * inputs * outputs / seconds)
    return max(rates)


def bandwidth(device: str) -> float:
    """Return bytes per second of a copy that no cache holds, or of a sum that only reads, whichever is more."""
    size = BANDWIDTH_BYTES[device]
    x = torch.zeros(size // 4, device=device)
    y = torch.empty_like(x)
    copied = 2 * size / best_seconds(lambda: y.copy_(x))
    return max(copied, size / best_seconds(lambda: x.sum()))


@torch.inference_mode()
def work(job: Job) -> Result:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, tokens = Sizes.of(job["sizes"]), job["tokens"]
    return {
        "float32": gemm_peak(sizes, tokens, torch.float32, device),
        "bfloat16": gemm_peak(sizes, tokens, torch.bfloat16, device),
        "bandwidth": bandwidth(device),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    }


if __name__ == "__main__":
    serve(work)
