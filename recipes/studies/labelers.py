"""Study 2: labelers' agreement is what a reward model reaches, also with labelers that it never saw.

python recipes/studies/labelers.py
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

from rlhf import config as configs
from rlhf.intervals import clustered_accuracy
from rlhf.rows.records import Ranking, read_rankings, split_key, write_jsonl
from rlhf_recipes.reward_model import RewardRecipe, reward_model
from rlhf_recipes.studies.shared_runs import chain, stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

NAMES = ("ada", "ben", "cleo", "dan", "eve")
OWN, NEW = "reward model, labels of its labelers", "reward model, labels of a new labeler"
AMONG, WITH_NEW = "its labelers among themselves", "its labelers and the new one"


@dataclass(frozen=True, kw_only=True)
class LabelersConfig(StudyConfig):
    """Settings of the study."""

    prompts: int = 2000
    """Prompts that the known labelers rank for the reward model."""


def labelled(rankings: Sequence[Ranking], names: Sequence[str], seed: int) -> list[Ranking]:
    """Return the same responses, each prompt's ranked by one of the named labelers."""
    rank_as = configs.import_function("data/toy/toy_labelers.py:rank_as")
    columns = {name: [r.columns[name] for r in rankings] for name in ("family", "facts")}
    ranks = rank_as(names, [r.prompt for r in rankings], [r.responses for r in rankings], seed, **columns)
    return [replace(r, ranks=tuple(own)) for r, own in zip(rankings, ranks, strict=True)]


def two_labelers(rankings: Sequence[Ranking], names: Sequence[str], seed: int) -> tuple[list[Ranking], list[Ranking]]:
    """Return the same responses twice, each prompt's ranked by one of the named labelers and by another."""
    draw, pairs = random.Random(seed), list(permutations(names, 2))
    by_name = [{name: labelled(rankings, [name], at) for name in names} for at in (seed, seed + 1)]
    drawn = [draw.choice(pairs) for _ in rankings]
    first, second = ([by_name[side][pair[side]][n] for n, pair in enumerate(drawn)] for side in (0, 1))
    return first, second


def agreement(name: str, one: Sequence[Ranking], other: Sequence[Ranking]) -> Row:
    """Return how often two labelings order a pair alike that neither ties."""
    alike, keys = [], []
    for first, second in zip(one, other, strict=True):
        for i, j in combinations(range(len(first.ranks)), 2):
            a, b = first.ranks[i] - first.ranks[j], second.ranks[i] - second.ranks[j]
            if a and b:
                alike.append(float((a > 0) == (b > 0)))
                keys.append(split_key(first))
    found = clustered_accuracy(alike, keys)
    return Row(name, found.value, None, found.low, found.high, len(set(keys)))


def among(held_out: Sequence[Ranking], known: Sequence[str], seed: int) -> Row:
    """Return how often two different labelers of the reward model order a held-out pair alike."""
    return agreement(AMONG, *two_labelers(held_out, known, 10 * seed + 3))


def run(config: LabelersConfig) -> Iterator[Row]:
    from reward_models import RewardModel
    from reward_models.card.report import report_card

    folder = chain(config, "rankings")
    new = NAMES[config.seed % len(NAMES)]
    known = [name for name in NAMES if name != new]
    train = labelled(read_rankings(folder / "rankings/train.jsonl")[: config.prompts], known, 10 * config.seed)
    data, held_out = folder / f"train_without_{new}.jsonl", read_rankings(folder / "rankings/held_out.jsonl")
    write_jsonl(data, train)
    out = stage(config, reward_model, RewardRecipe, "reward_model", f"without_{new}", train_data=str(data))
    scorer = RewardModel.load(out)
    own, theirs = labelled(held_out, known, 10 * config.seed + 1), labelled(held_out, [new], 10 * config.seed + 2)
    for name, rankings in ((OWN, own), (NEW, theirs)):
        card = report_card(scorer, rankings)
        yield Row(name, card["accuracy"], None, *card["accuracy_ci"], card["prompts"])
    yield among(held_out, known, config.seed)
    yield agreement(WITH_NEW, own, theirs)


STUDY = Study(
    name="labelers",
    number=2,
    title="Labelers' agreement is the ceiling, also with new labelers",
    claim="Reward models predict their labelers 72.4% and held-out labelers 69.6% of the time; labelers agree 72.6%.",
    source="Ouyang et al. 2022, sections 3.4 and 4.1",
    miniature="Four of five toy labelers rank for the reward model, the fifth (another per seed) for the test alone.",
    panels=[Panel(y="agreement on held-out prompts")],
    checks=[
        Check("within 5 points of its labelers' agreement", lambda r: 0.05 - abs(at(r, OWN) - at(r, AMONG))),
        Check("a new labeler's labels at most 5 points worse", lambda r: 0.05 - (at(r, OWN) - at(r, NEW))),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, LabelersConfig, __file__, argv))
