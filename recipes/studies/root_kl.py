"""Study 6: early in PPO the score is linear in the root of the KL; later it outruns a held-out reward model's.

python recipes/studies/root_kl.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf import config as configs
from rlhf_recipes.studies.proxy_runs import ProxyConfig, at_grid, kl_of, policy, samples
from rlhf_recipes.studies.study import Check, Panel, Row, Study, at, main

TRAINED, HELD_OUT = "reward model that PPO trains against", "reward model of other prompts"
FIT, GAIN = "fit", "gain by the end"
ROOT, PLAIN = "score over the root of KL", "score over KL"


@dataclass(frozen=True, kw_only=True)
class RootConfig(ProxyConfig):
    """Settings of the study."""

    early_nats: float = 4.0
    """Updates up to this KL are early."""


def straight(x: Sequence[float], y: Sequence[float]) -> float:
    """Return R squared of a straight line."""
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def run(config: RootConfig) -> Iterator[Row]:
    from reward_models import RewardModel

    updates = samples(policy(config, 0.0))
    kl = kl_of(updates)
    other = RewardModel.load(config.shared / "reward_model")
    trained = [[row["score/proxy"] for row in rows] for rows in updates]
    held_out = [other([row["prompt"] for row in rows], [row["response"] for row in rows]) for rows in updates]
    for name, values in ((TRAINED, trained), (HELD_OUT, held_out)):
        for x, found in at_grid(values, kl).items():
            yield Row(name, found.value, x, found.low, found.high, len(values[0]))
        yield Row(name, float(np.mean(values[-1]) - np.mean(values[0])), panel=GAIN)
    early = [place for place, value in enumerate(kl) if value <= config.early_nats]
    scores, nats = [float(np.mean(trained[place])) for place in early], [max(kl[place], 0.0) for place in early]
    yield Row(ROOT, straight([value**0.5 for value in nats], scores), panel=FIT)
    yield Row(PLAIN, straight(nats, scores), panel=FIT)


STUDY = Study(
    name="root_kl",
    number=6,
    title="The score is linear in the root of the KL; held-out reward models diverge",
    claim="Reward grows about linearly in the root of the KL; later, a reward model of held-out data lags behind.",
    source="Bai et al. 2022, sections 4.2 and 4.3",
    miniature="PPO against a reward model of 120 prompts; the chain's, of 3,200 others, scores the responses, too.",
    panels=[
        Panel(x="KL to SFT, nats (root scale)", y="score, in spreads", scale="sqrt"),
        Panel(GAIN, y="gain in score"),
        Panel(FIT, y="R squared of a straight line"),
    ],
    checks=[
        Check("the line over the root of KL explains 90%", lambda r: at(r, ROOT, panel=FIT) - 0.9),
        Check("it fits better than one over KL", lambda r: at(r, ROOT, panel=FIT) - at(r, PLAIN, panel=FIT)),
        Check(
            "its own score gains more than the held-out one",
            lambda r: at(r, TRAINED, panel=GAIN) - at(r, HELD_OUT, panel=GAIN),
        ),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, RootConfig, __file__, argv))
