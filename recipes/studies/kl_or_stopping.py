"""Study 5: a KL penalty buys no better frontier of gold over KL than stopping early.

python recipes/studies/kl_or_stopping.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf_recipes.studies.proxy_runs import ProxyConfig, at_grid, kl_of, policy, samples
from rlhf_recipes.studies.study import Check, Panel, Row, Study, main

FREE = "no penalty, stopped there"
NEAR = 0.3
PARTED = 1.0
"""KL in nats from which runs are compared: they start from the same weights and prompts, and below it they are still
nearly the same run."""


@dataclass(frozen=True, kw_only=True)
class StoppingConfig(ProxyConfig):
    """Settings of the study."""

    kl_coefs: list[float] = field(default_factory=lambda: [0.05, 0.2])
    """Coefficients of the penalised runs; another one has none."""


def run(config: StoppingConfig) -> Iterator[Row]:
    for coefficient in (0.0, *config.kl_coefs):
        updates = samples(policy(config, coefficient))
        gold = [[row["score/gold"] for row in rows] for rows in updates]
        name = f"penalty {coefficient}" if coefficient else FREE
        for x, found in at_grid(gold, kl_of(updates)).items():
            yield Row(name, found.value, x, found.low, found.high, len(gold[0]))


def apart(rows: Sequence[Row]) -> float:
    """Return the mean over penalised points from `PARTED` on of |gold - gold of the unpenalised run at that KL|."""
    free = {row.x: row.value for row in rows if row.series == FREE and row.x is not None and row.x >= PARTED}
    found = [abs(row.value - free[row.x]) for row in rows if row.series != FREE and row.x in free]
    if not found:
        raise InputError(f"no penalised run came as far as {PARTED:g} nats; raise updates or lower kl_coefs")
    return sum(found) / len(found)


STUDY = Study(
    name="kl_or_stopping",
    number=5,
    title="A KL penalty is like early stopping",
    claim="With a KL penalty RL reaches a proxy score at less KL, but gold over KL is the same frontier.",
    source="Gao et al. 2022, section 3.6",
    miniature="PPO against a reward model of 120 prompts with KL coefficients 0, 0.05 and 0.2, gold of every update.",
    panels=[Panel(x="KL to SFT, nats (root scale)", y="gold score", scale="sqrt")],
    checks=[
        Check(
            f"at equal KL from {PARTED:g} nat on less than {NEAR} points of gold apart", lambda rows: NEAR - apart(rows)
        )
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, StoppingConfig, __file__, argv))
