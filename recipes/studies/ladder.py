"""Study 3: PPO is preferred to supervised fine-tuning, and that to the base model, at equal length too.

python recipes/studies/ladder.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from rlhf import config as configs
from rlhf.intervals import bootstrap_interval, wins
from rlhf.rows.jsonl import read_object, read_rows
from rlhf_recipes.studies.shared_runs import chain, compared
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

GOLD, WON = "score", "comparison"
PAIRS = (("ppo", "sft"), ("sft", "base"))


def name(one: str, other: str, equal: bool = False) -> str:
    return f"{one.upper()} over {other.upper()}{', at equal length' if equal else ''}"


def run(config: StudyConfig) -> Iterator[Row]:
    from rlhf.evals.judge import length_controlled

    chain(config)
    folder = compared(config, "ladder", policies=["base"])
    summary = read_object(folder / "evaluation.json")
    samples = [row for _, row in read_rows(folder / "samples.jsonl")]
    for policy in ("base", "sft", "ppo"):
        entry = summary[policy]
        yield Row(policy.upper(), entry["gold_score"], None, *entry["gold_score_ci"], len(samples), GOLD)
    for one, other in PAIRS:
        shares = wins(*([row[f"gold_score_{policy}"] for row in samples] for policy in (one, other)))
        lengths = [(len(row[one]), len(row[other])) for row in samples]
        controlled = length_controlled(shares, lengths, range(len(samples)))
        for equal, found in ((False, bootstrap_interval(shares, 0)), (True, controlled)):
            yield Row(name(one, other, equal), found.value, None, found.low, found.high, len(samples), WON)


def margin(comparison: str, rows: Sequence[Row]) -> float:
    return at(rows, comparison, panel=WON) - 0.5


STUDY = Study(
    name="ladder",
    number=3,
    title="PPO over SFT over the base model, at equal length too",
    claim="Labelers prefer PPO's answers to SFT's and SFT's to GPT-3's.",
    source="Ouyang et al. 2022, figure 1; length control of Dubois et al. 2024",
    miniature="Gold scores of answers to 400 held-out prompts; at equal length: by a logistic regression on lengths. "
    "Of the answers that the toy's base model has read 92% are right, of its demonstrations 60%.",
    panels=[Panel(GOLD, y="gold score"), Panel(WON, y="preferred on")],
    checks=[
        Check(f"{name(*pair, equal)}: more than half", partial(margin, name(*pair, equal)))
        for pair in PAIRS
        for equal in (False, True)
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, StudyConfig, __file__, argv))
