"""Compare sampling: PPO's own engine, transformers' generate and, where one is named, vLLM (--only sampling).

The same adapter, prompts and number of new tokens, by turns of one rollout; tokens per second, and the seconds until
each one's first rollout was there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench_tables import markdown
from board import Board
from cases import CASES, precision, settings_here
from jobs import Worker

NAMES = {"ours": "PPO's own engine", "generate": "transformers' generate", "vllm": "vLLM server"}


def measure(
    board: Board, cases: Sequence[str], model: str, updates: int, threads: int | None, vllm_python: str | None,
    bf16: bool | None = None,
) -> None:  # fmt: skip
    """Measure every engine on every case, and show the tables.

    vllm_python: an interpreter that has vllm. bf16: None: where the hardware is fast at it."""
    results: dict[str, Any] = {}
    for name in cases:
        case, made = CASES[name], board.made(name, CASES[name], model)
        if made is None:
            continue
        made |= {"bf16_hardware": made["bf16_hardware"] if bf16 is None else bf16}
        settings = settings_here("ours_adapter", made["bf16_hardware"])
        job = made | {"updates": updates, "settings": settings, "vllm_python": vllm_python}
        workers = {
            engine: Worker(
                "sampling_worker.py", job | {"engine": engine}, board.folder / "sampling" / name / engine,
                threads=threads, in_turns=True,
            )
            for engine in NAMES if engine != "vllm" or vllm_python
        }  # fmt: skip
        results[name] = board.in_turns(f"{name}: sampling", workers, updates)
        board.keep("sampling", results)
        lengths = case.prompt_lengths
        about = f"{case.rollout_size} prompts of {lengths[0]}-{lengths[-1]} tokens, {case.new_tokens} new tokens"
        board.show(f"{name}: sampling, {about}, {precision(settings)}", table(results[name]))
        board.show(f"{name}: seconds until the first rollout", start_table(results[name]))


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row per engine: tokens per second after the first rollout, median and range."""
    rates = {}
    for engine, result in results.items():
        pairs = list(zip(result["response_tokens"], result["updates"], strict=True))
        rates[engine] = [tokens / update["step"] for tokens, update in pairs[1:] or pairs]
    theirs = rates.get("generate")
    rows = [
        [NAMES[engine], f"{median(own):.1f}", f"{min(own):.1f}-{max(own):.1f}",
         f"{median(own) / median(theirs):.2f}" if theirs else "-"]
        for engine, own in rates.items()
    ]  # fmt: skip
    return markdown(["engine", "tokens/s", "range", "times as fast as generate"], rows) if rows else ""


def start_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row per engine: seconds of its imports, until it can sample, and of the first rollout."""
    rows = [
        [NAMES[engine], *(f"{seconds:.1f}" for seconds in result["start"].values()),
         f"{sum(result['start'].values()):.1f}"]
        for engine, result in results.items()
    ]  # fmt: skip
    return markdown(["engine", "imports", "models or server", "first rollout", "in all"], rows) if rows else ""
