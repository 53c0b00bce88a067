"""Write the benchmark's numbers as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

PHASES = ("generate", "score", "logprobs", "update", "step")
GIB = 2**30


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def summarize(result: Mapping[str, Any], warmup: int = 1) -> dict[str, Any]:
    """Return medians over the updates after the warm-up: seconds by phase, response tokens/s, peak memory in GiB;
    beside them the shortest and the longest update, the precision, and how rows are computed."""
    measured = result["updates"][warmup:] or result["updates"]
    tokens = result["response_tokens"][warmup:] or result["response_tokens"]
    summary: dict[str, Any] = {name: median(update[name] for update in measured) for name in PHASES}
    summary["range"] = (min(update["step"] for update in measured), max(update["step"] for update in measured))
    summary["precision"], summary["rows"] = result.get("precision", ""), result.get("rows", "")
    summary["tokens_per_second"] = median(t / u["step"] for t, u in zip(tokens, measured, strict=True))
    summary["peak_gib"] = result.get("peak_cuda_bytes", result["peak_bytes"]) / GIB
    summary["process_gib"] = result["peak_bytes"] / GIB
    return summary


def speed_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with one row per run: its precision, seconds per update and by phase, tokens/s, peak memory."""
    headers = ["run", "precision", "s/update", "generate", "score", "log-probs", "update", "tokens/s", "peak GiB"]
    rows = [
        [name, r["precision"], f"{r['step']:.2f}", *(f"{r[phase]:.2f}" for phase in PHASES[:-1]),
         f"{r['tokens_per_second']:.1f}", f"{r['peak_gib']:.2f}"]
        for name, r in runs.items()
    ]  # fmt: skip
    return markdown(headers, rows)


def ratio_table(runs: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table with one row per run of ours: how many times faster, and what share of the memory, against each of
    the others'."""
    theirs = [name for name in runs if not name.startswith("ours")]
    headers = ["run", *(f"x faster than {name}" for name in theirs), *(f"memory / {name}" for name in theirs)]
    rows = [
        [name, *(f"{runs[other]['step'] / ours['step']:.2f}" for other in theirs),
         *(f"{ours['peak_gib'] / runs[other]['peak_gib']:.2f}" for other in theirs)]
        for name, ours in runs.items() if name not in theirs
    ]  # fmt: skip
    return markdown(headers, rows) if theirs and rows else ""


def comparison_table(runs: Mapping[str, Mapping[str, Any]], base: str) -> str:
    """Return a table with one row per run: seconds per update with the shortest and the longest, and peak memory; each
    also as a multiple of the run `base`'s."""
    first = runs[base]
    rows = [
        [name, f"{r['step']:.2f}", "{:.2f}-{:.2f}".format(*r["range"]), f"{r['step'] / first['step']:.3f}",
         f"{r['peak_gib']:.2f}", f"{r['peak_gib'] / first['peak_gib']:.3f}"]
        for name, r in runs.items()
    ]  # fmt: skip
    return markdown(["run", "s/update", "range", f"/ {base}", "peak GiB", f"/ {base}"], rows)


def limit_table(runs: Mapping[str, Mapping[str, float]], limits: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table with one row per run of ours and phase: measured seconds, the limit's, their ratio, and the
    phase's share of what lies between the update and its limit."""
    rows = []
    for name, limit in limits.items():
        gap = runs[name]["step"] - limit["step"]
        for phase in PHASES:
            seconds, least = runs[name][phase], limit[phase]
            share = f"{(seconds - least) / gap:.0%}" if gap > 0 else "-"
            rows.append([name, phase, f"{seconds:.2f}", f"{least:.2f}", f"{seconds / least:.2f}", share])
    return markdown(["run", "phase", "seconds", "limit", "seconds / limit", "share of the rest"], rows)
