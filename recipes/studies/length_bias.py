"""Study 10: where labelers like length, most of what PPO gains is length.

python recipes/studies/length_bias.py
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rlhf import config as configs
from rlhf.rows.jsonl import read_rows
from rlhf.rows.records import Ranking, read_rankings, write_jsonl
from rlhf_recipes.ppo import PPORecipe, ppo
from rlhf_recipes.reward_model import RewardRecipe, reward_model
from rlhf_recipes.studies.shared_runs import WATCHED, chain, compared, stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

PLAIN, BIASED = "labels as they are", "half of the labels by length"
SHARE, LONGER = "share", "length"


@dataclass(frozen=True, kw_only=True)
class LengthConfig(StudyConfig):
    """Settings of the study."""

    share: float = 0.5
    """Share of the prompts whose answers are ranked by their number of words alone."""
    bin_words: int = 4
    """Width of a bin of lengths."""


def length_share(before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]], width: int) -> float:
    """Compute the share of a gain in score that is due to length (Singhal et al. 2023, section 3.1).

    Of (score, words) before and after, the gain within bins of equal length, each weighed by the responses in it, is
    the part that is not; the rest of the whole gain is. Bins in which one side has nothing are left out."""
    bins: dict[int, tuple[list[float], list[float]]] = {}
    for side, rows in enumerate((before, after)):
        for score, words in rows:
            bins.setdefault(words // width, ([], []))[side].append(score)
    both = [(own, other) for own, other in bins.values() if own and other]
    count = sum(len(own) + len(other) for own, other in both)
    within = sum((len(own) + len(other)) * (np.mean(other) - np.mean(own)) for own, other in both) / max(1, count)
    whole = np.mean([score for score, _ in after]) - np.mean([score for score, _ in before])
    return float(1.0 - within / whole)


def measured(name: str, folder: Path, config: LengthConfig) -> Iterator[Row]:
    rows = [row for _, row in read_rows(folder / "samples.jsonl")]
    sides = [[(row[f"score_{policy}"], len(row[policy].split())) for row in rows] for policy in ("sft", "ppo")]
    yield Row(name, length_share(*sides, config.bin_words), n=len(rows), panel=SHARE)
    before, after = (float(np.mean([words for _, words in side])) for side in sides)
    yield Row(f"{name}, SFT", before, n=len(rows), panel=LONGER)
    yield Row(f"{name}, PPO", after, n=len(rows), panel=LONGER)


def by_length(ranking: Ranking) -> Ranking:
    """Rank the same responses by their number of words, the longest first."""
    return replace(ranking, ranks=tuple(-float(len(text.split())) for text in ranking.responses))


def run(config: LengthConfig) -> Iterator[Row]:
    folder = chain(config)
    draw, data = random.Random(config.seed), folder / "train_by_length.jsonl"
    rankings = read_rankings(folder / "rankings/train.jsonl")
    write_jsonl(data, [by_length(r) if draw.random() < config.share else r for r in rankings])
    scorer = stage(config, reward_model, RewardRecipe, "reward_model", "likes_length", train_data=str(data))
    policy = stage(config, ppo, PPORecipe, "ppo", "ppo_length", reward_model=str(scorer), **WATCHED)
    yield from measured(PLAIN, compared(config, "lengths_plain"), config)
    biased = compared(config, "lengths_biased", policy=str(policy), reward_model=str(scorer))
    yield from measured(BIASED, biased, config)


STUDY = Study(
    name="length_bias",
    number=10,
    title="Under a length bias, the gain is length",
    claim="Much of what PPO gains in score is longer outputs; among outputs of equal length it gains little.",
    source="Singhal et al. 2023, section 3",
    miniature="Half of the toy prompts are ranked by number of words alone; the gain within bins of equal length.",
    panels=[Panel(SHARE, y="share of the gain that is length"), Panel(LONGER, y="words per response")],
    checks=[
        Check("more than half of the gain is length", lambda r: at(r, BIASED, panel=SHARE) - 0.5),
        Check(
            "more than with the labels as they are", lambda r: at(r, BIASED, panel=SHARE) - at(r, PLAIN, panel=SHARE)
        ),
        Check(
            "PPO's responses are longer than SFT's",
            lambda r: at(r, f"{BIASED}, PPO", panel=LONGER) - at(r, f"{BIASED}, SFT", panel=LONGER),
        ),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, LengthConfig, __file__, argv))
