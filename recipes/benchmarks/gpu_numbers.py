"""Count what a run makes of a GPU: tokens per second of sampling and training, and the share of its matrix products.

The model FLOPs utilisation is the counted work of a phase (limit.py: what the algorithm needs, whoever runs it) over
its seconds and over the card's measured peak at this model's shapes. Recomputed activations count as nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench_tables import markdown
from cases import TRL, Case
from limit import Sizes, count, update_of


def training_flops(run: str, settings: Mapping[str, Any], case: Case, sizes: Sizes) -> float:
    """Return the operations of a run's inner epochs. trl trains its value model whole, beside a LoRA policy too."""
    flops = count(update_of(dict(settings), case, sizes))["update"].flops
    if run not in TRL or not settings.get("lora_rank"):
        return flops
    policy = count(update_of({**settings, "value_model": "shared_trunk"}, case, sizes))["update"].flops
    whole = {**settings, "lora_rank": 0}
    both = count(update_of({**whole, "value_model": "separate"}, case, sizes))["update"].flops
    return policy + both - count(update_of({**whole, "value_model": "shared_trunk"}, case, sizes))["update"].flops


def of(
    run: str, settings: Mapping[str, Any], case: Case, sizes: Sizes, machine: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return a run's numbers. machine: what machine.py measured; summary: bench_tables.summarize of its updates."""
    peak, settings = machine[summary["precision"]], {**settings, "bf16": summary["precision"] == "bfloat16"}
    sampling = count(update_of(settings, case, sizes))["generate"]
    responses = case.rollout_size * case.new_tokens
    trained = case.inner_epochs * (sum(case.prompt_lengths) + responses)
    seconds = None if settings.get("rollouts_ahead") else summary["generate"]  # it samples while it trains
    return {
        "precision": summary["precision"],
        "rows": summary["rows"],
        "step_seconds": summary["step"],
        **{f"{phase}_seconds": summary[phase] for phase in ("generate", "score", "logprobs", "update")},
        "sampled_tokens_per_second": responses / seconds if seconds else None,
        "trained_tokens_per_second": trained / summary["update"],
        "sampling_mfu": sampling.flops / seconds / peak if seconds else None,
        "sampling_of_limit": sampling.seconds(peak, machine["bandwidth"]) / seconds if seconds else None,
        "training_mfu": training_flops(run, settings, case, sizes) / summary["update"] / peak,
        "peak_gib": summary["peak_gib"],
    }


def shown(number: float | None, form: str) -> str:
    """Return a number as text, "-" where there is none."""
    return "-" if number is None else format(number, form)


def table(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row per run."""
    headers = [
        "run", "precision", "rows", "s/update", "generate", "score", "log-probs", "update", "tokens/s sampled",
        "trained", "MFU sampling", "MFU training", "sampling / limit", "peak GiB",
    ]  # fmt: skip
    rows = [
        [run, n["precision"], n["rows"] or "-", *(f"{n[f'{phase}_seconds']:.2f}" for phase in
                                ("step", "generate", "score", "logprobs", "update")),
         *(shown(n[name], form) for name, form in (
             ("sampled_tokens_per_second", ".0f"), ("trained_tokens_per_second", ".0f"), ("sampling_mfu", ".1%"),
             ("training_mfu", ".1%"), ("sampling_of_limit", ".0%"), ("peak_gib", ".2f"),
         ))]
        for run, n in numbers.items()
    ]  # fmt: skip
    return markdown(headers, rows) if rows else "none"
