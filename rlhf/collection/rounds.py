"""What a round of the flywheel decides: which items are labelled, and whether the new policy passes the gate."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from rlhf.collection import choose
from rlhf.collection.store import Item, Store

Strategy = Literal["random", "closeness", "disagreement", "diversity"]
MODELS_NEEDED: dict[Strategy, int] = {"random": 0, "diversity": 0, "closeness": 1, "disagreement": 2}
"""Reward models that a strategy asks."""
FEATURES = 512


class Scorer(Protocol):
    """A reward model: what it says of finished conversations."""

    def score(self, conversations: Sequence[list[dict[str, Any]]]) -> Any:
        """Return one score per conversation."""


def chosen(items: Sequence[Item], count: int, strategy: Strategy, models: Sequence[Scorer], seed: int) -> list[Item]:
    """Choose `count` of the sampled items for labelling.

    closeness: where the last reward model is least sure which response is better. disagreement: where the last two
    differ most. diversity: prompts far apart. random, and any strategy that has too few models yet: drawn."""
    if strategy == "diversity":
        picked = choose.diverse(prompt_features(items), count)
    elif strategy == "random" or len(models) < MODELS_NEEDED[strategy]:
        picked = choose.at_random(len(items), count, seed)
    else:
        scores = [scored(model, items) for model in models[-MODELS_NEEDED[strategy] :]]
        values = choose.closeness(scores[0]) if strategy == "closeness" else choose.disagreement(scores)
        picked = choose.highest(values, count)
    return [items[index] for index in sorted(picked)]


def scored(model: Scorer, items: Sequence[Item]) -> list[list[float]]:
    """Return a reward model's scores, a list per item."""
    conversations = [
        [*item.prompt, {"role": "assistant", "content": candidate.text}]
        for item in items
        for candidate in item.candidates
    ]
    scores = iter(map(float, model.score(conversations)))
    return [[next(scores) for _ in item.candidates] for item in items]


def prompt_features(items: Sequence[Item]) -> np.ndarray:
    """Return a prompt's features [N, FEATURES]: hashed counts of its three-letter pieces, of length 1."""
    features = np.zeros((len(items), FEATURES))
    for row, item in zip(features, items, strict=True):
        text = "\n".join(turn["content"] for turn in item.prompt).lower()
        for start in range(max(1, len(text) - 2)):
            row[zlib.crc32(text[start : start + 3].encode()) % FEATURES] += 1
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def item_row(item: Item) -> dict[str, Any]:
    """Write an item as a row that `rlhf label --candidates` reads, too."""
    return {
        "prompt": item.prompt,
        "responses": [candidate.text for candidate in item.candidates],
        "policy": [candidate.policy for candidate in item.candidates],
        "fingerprint": [candidate.fingerprint for candidate in item.candidates],
        "sampling_seed": [candidate.seed for candidate in item.candidates],
        **item.columns,
    }


def ranks_of(scores: Sequence[float]) -> tuple[float, ...]:
    """Return the rank of each score, 1 for the highest; equal scores share a rank."""
    levels = sorted(set(scores), reverse=True)
    return tuple(float(levels.index(score) + 1) for score in scores)


def wait_for_people(
    store: Store, items: Collection[int], overlap: int, enough: float, seconds: float, tell: Callable[[str], None]
) -> None:
    """Look at the store every so many seconds until `enough` of these items have `overlap` rankings each."""
    told = -1
    while True:
        counts = Counter(said.item for said in store.judgments() if said.item in items and said.ranks is not None)
        done = sum(count >= overlap for count in counts.values())
        if done != told:
            tell(f"{done:,} of {len(items):,} items are judged")
            told = done
        if done >= enough:
            return
        time.sleep(seconds)


@dataclass(frozen=True)
class Verdict:
    """Whether a policy takes the last one's place, and why not."""

    passed: bool
    reason: str


def gate(entry: Mapping[str, Any]) -> Verdict:
    """Let a policy pass that beats the last one: its win rate's interval lies above one half, no family's lies below.

    entry: the policy's in `evaluate.compare`, with the last policy in SFT's place. Each family has a 95% interval of
    its own: of many families one may fall below by chance, which keeps a good policy out and lets no bad one in."""
    low, high = entry["win_rate_ci"]
    rate = f"wins {entry['win_rate_vs_sft']:.1%} [{low:.1%}, {high:.1%}]"
    if low <= 0.5:
        return Verdict(False, f"{rate}: not surely more than half")
    worse = [
        f"{name} {family['win_rate_vs_sft']:.1%} [{family['win_rate_ci'][0]:.1%}, {family['win_rate_ci'][1]:.1%}]"
        for name, family in entry.get("families", {}).items()
        if "win_rate_ci" in family and family["win_rate_ci"][1] < 0.5
    ]
    if worse:
        return Verdict(False, f"{rate}, but worse in {', '.join(worse)}")
    return Verdict(True, f"{rate}, worse in no family" if entry.get("families") else rate)
