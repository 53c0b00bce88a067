"""Measure how our update grows: seconds and peak memory against rollout size, response length and model size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench_tables import markdown
from cases import OURS, Case, llama_shape
from jobs import run_job
from limit import Sizes

MIB = 2**20
MINIBATCH = 16
LINEAR = 1.05
"""An exponent up to this is called linear: timings of the same run differ by some percent."""


def case_of(rollout_size: int = 32, new_tokens: int = 32, hidden: int = 128) -> Case:
    """Return a small model's update; one of the three sizes is varied, the others stay."""
    return Case(
        shape=llama_shape(hidden, 4, 4, 4096), rollout_size=rollout_size, prompt_tokens=(8, 24), new_tokens=new_tokens,
        inner_epochs=2, minibatches=rollout_size // MINIBATCH,
    )  # fmt: skip


CURVES: dict[str, list[tuple[int, Case]]] = {
    "rollout size (responses)": [(n, case_of(rollout_size=n)) for n in (32, 64, 128, 256)],
    "response length (tokens)": [(n, case_of(new_tokens=n)) for n in (32, 64, 128, 256)],
    "model size (weights)": [(h, case_of(hidden=h)) for h in (128, 192, 256, 384, 512)],
}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Fit cost = c * size^k by least squares on logarithms, and return k.

    Raises ValueError on fewer than two sizes, or a cost that is not positive."""
    if len(set(sizes)) < 2 or min([*sizes, *costs]) <= 0:
        raise ValueError(f"exponent: sizes {list(sizes)}, costs {list(costs)}; give two sizes and positive costs")
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def measure(folder: Path, updates: int, threads: int | None) -> dict[str, Any]:
    """Measure every point in a process of its own: {curve: {"sizes", "seconds", "bytes"}}; bytes without the
    libraries'."""
    done: dict[str, dict[str, Any]] = {}
    curves = {}
    for curve, points in CURVES.items():
        result: dict[str, list[float]] = {"sizes": [], "seconds": [], "bytes": []}
        for size, case in points:
            key = repr(case)
            if key not in done:  # the curves share a point
                print(f"scaling: {curve} {size} ...", flush=True)
                done[key] = point(case, folder / f"{len(done):02d}", updates, threads)
            measured = done[key]
            result["sizes"].append(measured["weights"] if curve.startswith("model") else size)
            result["seconds"].append(measured["seconds"])
            result["bytes"].append(measured["bytes"])
        curves[curve] = result
    return curves


def point(case: Case, folder: Path, updates: int, threads: int | None) -> dict[str, Any]:
    """Return median seconds per update after the first, peak bytes above those of the imports, weights of the model."""
    job = {"case": case.as_job(), "model": None, "updates": max(2, updates)}
    made = run_job("synthetic.py", job, folder / "made", threads=threads)
    job |= {"model": made["model"], "tokenizer": made["tokenizer"], "settings": OURS["ours_full"]}
    run = run_job("ours_worker.py", job, folder / "run", threads=threads)
    sizes = Sizes.of(made["sizes"])
    return {
        "seconds": median(update["step"] for update in run["updates"][1:]),
        "bytes": run.get("peak_cuda_bytes", run["peak_bytes"] - run["imported_bytes"]),
        "weights": sizes.trunk_weights + sizes.head_weights,
    }


def table(curves: dict[str, Any]) -> str:
    """Return a table of each curve's points and exponents, and whether anything grows faster than the rollout."""
    rows, worse = [], []
    for curve, points in curves.items():
        seconds, memory = (exponent(points["sizes"], points[cost]) for cost in ("seconds", "bytes"))
        rows.append(
            [
                curve,
                ", ".join(_short(size) for size in points["sizes"]),
                ", ".join(f"{value:.2f}" for value in points["seconds"]),
                f"{seconds:.2f}",
                ", ".join(f"{value / MIB:.0f}" for value in points["bytes"]),
                f"{memory:.2f}",
            ]
        )
        if curve.startswith("rollout"):
            worse = [n for n, k in (("seconds", seconds), ("memory", memory)) if k > LINEAR]
    verdict = (
        f"Worse than linear in rollout size: {', '.join(worse) if worse else 'nothing'} (exponent above {LINEAR})."
    )
    headers = ["varied", "sizes", "seconds per update", "exponent", "peak MiB above imports", "exponent"]
    return f"{markdown(headers, rows)}\n\n{verdict}"


def _short(size: float) -> str:
    return f"{size / 1e6:.1f}M" if size >= 1e6 else f"{size:g}"
