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

FREE, AGAIN = "no penalty, stopped there", "no penalty, PPO's other seed"
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
    folders = {FREE: policy(config, 0.0)}
    folders |= {f"penalty {coefficient}": policy(config, coefficient) for coefficient in config.kl_coefs}
    folders[AGAIN] = policy(config, 0.0, another=True)
    for name, folder in folders.items():
        updates = samples(folder)
        gold = [[row["score/gold"] for row in rows] for rows in updates]
        for x, found in at_grid(gold, kl_of(updates)).items():
            yield Row(name, found.value, x, found.low, found.high, len(gold[0]))


def apart(rows: Sequence[Row], again: bool = False) -> float:
    """Return the mean over penalised points from `PARTED` on of |gold - gold of the unpenalised run at that KL|; with
    ``again`` that of the unpenalised run of another seed, as far as a penalised one came."""
    free = {row.x: row.value for row in rows if row.series == FREE and row.x is not None and row.x >= PARTED}
    penalised = [row for row in rows if row.series not in (FREE, AGAIN) and row.x in free]
    reached = {row.x for row in penalised}
    others = [row for row in rows if row.series == AGAIN and row.x in reached] if again else penalised
    if not others:
        name = AGAIN if again else "penalised"
        raise InputError(f"no run ({name}) came as far as {PARTED:g} nats; raise updates or lower kl_coefs")
    return sum(abs(row.value - free[row.x]) for row in others) / len(others)


STUDY = Study(
    name="kl_or_stopping",
    number=5,
    title="A KL penalty is like early stopping",
    claim="With a KL penalty RL reaches a proxy score at less KL, but gold over KL is the same frontier.",
    source="Gao et al. 2022, section 3.6",
    miniature="PPO against a reward model of 120 prompts with KL coefficients 0, 0.05 and 0.2, gold of every update; "
    "and without a penalty once more, with another seed of PPO: how far two runs of one setting are apart.",
    panels=[Panel(x="KL to SFT, nats (root scale)", y="gold score", scale="sqrt")],
    checks=[
        Check(
            f"at equal KL from {PARTED:g} nat on less than {NEAR} points of gold apart", lambda rows: NEAR - apart(rows)
        ),
        Check(
            f"less than {NEAR} points further apart than two runs without a penalty",
            lambda rows: NEAR - (apart(rows) - apart(rows, again=True)),
        ),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, StoppingConfig, __file__, argv))
