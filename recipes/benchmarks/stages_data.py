"""Give both sides of the stages' comparison the same rows, and measure by the same code what they have learnt.

Rows are read with the standard library; whatever else is imported, is imported when the clock has stopped.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

Row = dict[str, Any]
EVALUATED_TOKENS = 4096  # padded, of one forward


def read(path: str) -> list[Row]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def pairs_of(ranking: Row) -> list[tuple[str, str]]:
    """Return all pairs of a ranking's responses, the better first; ties make none."""
    ordered = sorted(zip(ranking["ranks"], ranking["responses"], strict=True))
    return [(better[1], worse[1]) for better, worse in combinations(ordered, 2) if better[0] < worse[0]]


def preferences(rankings: list[Row]) -> list[Row]:
    """Return trl's rows for its RewardTrainer: every pair of every ranking, as conversations."""
    return [
        {"prompt": ranking["prompt"], "chosen": _answer(better), "rejected": _answer(worse)}
        for ranking in rankings
        for better, worse in pairs_of(ranking)
    ]


def accuracy(scorer: Any, rankings: list[Row]) -> dict[str, float]:
    """Return the share of held-out pairs whose better response scores higher, with its interval over prompts.

    scorer: a `reward_models.RewardModel` of the trained model."""
    from rlhf import intervals

    talks = [[*row["prompt"], *_answer(text)] for row in rankings for text in row["responses"]]
    scores = iter(scorer.score(talks).tolist())
    outcomes: list[float] = []
    keys: list[int] = []
    for number, row in enumerate(rankings):
        own = {text: next(scores) for text in row["responses"]}
        for better, worse in pairs_of(row):
            outcomes.append((own[better] > own[worse]) + 0.5 * (own[better] == own[worse]))
            keys.append(number)
    estimate = intervals.clustered_accuracy(outcomes, keys)
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": len(rankings)}


def loss(model: Any, tokenizer: Any, demonstrations: list[Row]) -> dict[str, float]:
    """Return the mean nats per token of held-out completions, with its interval over rows."""
    import torch

    from rlhf import chat, intervals
    from rlhf.models.forward import response_logprobs
    from rlhf.padding import make_batch

    encoded = [chat.encode(tokenizer, [*row["prompt"], *row["completion"]]) for row in demonstrations]
    parts = [(one.ids[: one.answer_from], one.ids[one.answer_from :]) for one in encoded]
    rows = max(1, EVALUATED_TOKENS // max(len(one.ids) for one in encoded))
    model.eval()
    nats: list[float] = []
    for start in range(0, len(parts), rows):
        prompts, responses = zip(*parts[start : start + rows], strict=True)
        batch = make_batch(prompts, responses, chat.pad_id(tokenizer), model.device)
        with torch.no_grad():
            logprobs, _ = response_logprobs(model, batch, 1.0)
        nats += (-logprobs.sum(-1) / batch.mask.sum(-1)).tolist()
    estimate = intervals.student_mean(nats)
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": len(nats)}


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
