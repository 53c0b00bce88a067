"""Sensitivity of a score to changes of the conversation that keep its meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reward_models.card.pairs import Numbers, ScoredPairs
from rlhf.errors import InputError
from rlhf.rows.messages import Messages

Score = Callable[[list[Messages]], np.ndarray]
ALONE = 32
"""Pairs whose responses are scored one by one, which is slow."""


@dataclass(frozen=True)
class Variant:
    """A change of a conversation that keeps its meaning; `change` returns None where it can't be made."""

    name: str
    change: Callable[[Messages], Messages | None]


def _empty_system(messages: Messages) -> Messages | None:
    return None if messages[0]["role"] == "system" else [{"role": "system", "content": ""}, *messages]


def _asked(change: Callable[[str], str]) -> Callable[[Messages], Messages]:
    """Change the last turn before the response."""
    return lambda messages: [
        *messages[:-2], {**messages[-2], "content": change(messages[-2]["content"])}, messages[-1]
    ]  # fmt: skip


def _answered(change: Callable[[str], str]) -> Callable[[Messages], Messages]:
    return lambda messages: [*messages[:-1], {**messages[-1], "content": change(messages[-1]["content"])}]


VARIANTS = (
    Variant("an empty system turn in front", _empty_system),
    Variant("the question between line breaks", _asked(lambda text: f"\n{text}\n")),
    Variant("the question after “User: ”", _asked(lambda text: f"User: {text}")),
    Variant("a space after the response", _answered(lambda text: f"{text} ")),
    Variant("a line break after the response", _answered(lambda text: f"{text}\n")),
)
"""Three changes of the template, two of the response's end."""
PADDING = "beside a longer row in the batch"


def sensitivity(score: Score, pairs: ScoredPairs, seed: int, sample: int = 200) -> Numbers:
    """Measure how far scores move under `VARIANTS` and under padding (a response alone, then beside the longest one).

    score: conversations -> scores. Uses `sample` pairs drawn with the seed (padding: at most 32 of them). Each row has
    `mean_change` and `max_change` of |score - score before|, in standard deviations of the scores over all responses;
    `flips`, the share of pairs whose order is reversed; and `pairs`. Or it has a `note` why the change can't be made.
    """
    drawn = np.random.default_rng(seed).permutation(len(pairs.better))[:sample]
    both = np.stack([pairs.better[drawn], pairs.worse[drawn]], axis=1)
    before = score([_conversation(pairs, i) for i in both.flatten()]).reshape(-1, 2)  # as after: without columns
    deviation = float(pairs.scores.std())
    rows = [_padding(score, pairs, both[:ALONE], deviation)]
    for variant in VARIANTS:
        changed = [[variant.change(_conversation(pairs, i)) for i in couple] for couple in both]
        possible = [number for number, couple in enumerate(changed) if None not in couple]
        conversations = [messages for number in possible for messages in changed[number] if messages is not None]
        if not possible:
            rows.append({"name": variant.name, "note": "every prompt has a system turn already"})
            continue
        try:
            after = score(conversations).reshape(-1, 2)
        except InputError as error:  # a chat template without a system turn
            rows.append({"name": variant.name, "note": str(error)})
            continue
        rows.append({"name": variant.name, **_change(before[possible], after, deviation)})
    return {"std": deviation, "changes": rows}


def _padding(score: Score, pairs: ScoredPairs, both: np.ndarray, deviation: float) -> Numbers:
    longest = _conversation(pairs, max(range(len(pairs.texts)), key=lambda i: len(pairs.texts[i])))
    conversations = [_conversation(pairs, i) for i in both.flatten()]
    alone = np.array([score([messages])[0] for messages in conversations]).reshape(-1, 2)
    beside = np.array([score([messages, longest])[0] for messages in conversations]).reshape(-1, 2)
    return {"name": PADDING, **_change(alone, beside, deviation)}


def _change(before: np.ndarray, after: np.ndarray, deviation: float) -> Numbers:
    """Compare scores [pairs, 2] of the preferred and of the other response before and after a change."""
    moved = np.abs(after - before) / (deviation or 1.0)
    turned = (before[:, 0] - before[:, 1]) * (after[:, 0] - after[:, 1]) < 0
    return {
        "mean_change": float(moved.mean()),
        "max_change": float(moved.max()),
        "flips": float(turned.mean()),
        "pairs": len(before),
    }


def _conversation(pairs: ScoredPairs, index: int) -> Messages:
    prompt: Sequence[dict[str, str]] = pairs.rankings[pairs.ranking_of[index]].prompt
    return [*prompt, {"role": "assistant", "content": pairs.texts[index]}]
