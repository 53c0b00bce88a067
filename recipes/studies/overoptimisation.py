"""Study 4: against a weak reward model the gold score rises, peaks and falls; best-of-n and PPO follow Gao's two laws.

python recipes/studies/overoptimisation.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf import config as configs
from rlhf.rows.jsonl import read_object
from rlhf_recipes.best_of_n import BestOfNConfig, best_of_n
from rlhf_recipes.studies.proxy_runs import ProxyConfig, at_grid, kl_of, policy, proxy, samples
from rlhf_recipes.studies.shared_runs import GOLD
from rlhf_recipes.studies.study import Check, Panel, Row, Study, at, main

NOISE = 4.0
"""Standard errors of an update's mean by which gold must fall: the highest of 32 updates lies above the last one by
chance in 97% of runs whose gold is flat, by 4 standard errors in 4%."""
KL, FIT, END = "gold", "fit", "end of PPO"
PPO, BEST, PROXY = "PPO, gold", "best of n, gold", "PPO, proxy"


@dataclass(frozen=True, kw_only=True)
class OveroptimisationConfig(ProxyConfig):
    """Settings of the study."""

    n: int = 64
    """Responses per prompt of best-of-n."""
    max_prompts: int = 150
    """Prompts of best-of-n."""


def fitted(d: Sequence[float], gain: Sequence[float], bend: Callable[[np.ndarray], np.ndarray]) -> float:
    """Fit gain = d (a - b bend(d)) by least squares, with d the root of the KL, and return R squared."""
    x, y = np.asarray(d, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    columns = np.column_stack([x, -x * bend(x)])
    left = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    return 1.0 - float((left**2).sum() / ((y - y.mean()) ** 2).sum())


def linear(d: np.ndarray) -> np.ndarray:
    return d


def logarithm(d: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(d, 1e-9))


def run(config: OveroptimisationConfig) -> Iterator[Row]:
    weak = proxy(config)
    updates = samples(policy(config, 0.0))
    kl = kl_of(updates)
    gold = [[row["score/gold"] for row in rows] for rows in updates]
    score = [[row["score/proxy"] for row in rows] for rows in updates]
    for name, values in ((PPO, gold), (PROXY, score)):
        for x, found in at_grid(values, kl).items():
            yield Row(name, found.value, x, found.low, found.high, len(values[0]), KL if name == PPO else "proxy")
    means, proxies = [float(np.mean(values)) for values in gold], [float(np.mean(values)) for values in score]
    peak = int(np.argmax(means))
    yield Row("gold, at its peak", means[peak], panel=END)
    yield Row("gold, at the end", means[-1], panel=END)
    yield Row("proxy, at gold's peak", proxies[peak], panel=END)
    yield Row("proxy, at the end", proxies[-1], panel=END)
    out = config.shared / "best_of_n_proxy"
    best_of_n(BestOfNConfig(
        model=str(config.shared / "sft"), data=str(config.shared / "data/eval_prompts.jsonl"), scorers=[str(weak)],
        judge=GOLD, n=config.n, max_prompts=config.max_prompts, max_new_tokens=48, output_dir=str(out),
        seed=config.seed, bf16=False,
    ))  # fmt: skip
    (curve,) = read_object(out / "best_of_n.json")["curves"].values()
    for point in curve:
        if point["n"] & (point["n"] - 1) == 0:
            yield Row(BEST, point["value"], point["kl_nats"], point["low"], point["high"], config.max_prompts, KL)
    of_ppo = [max(x, 0.0) ** 0.5 for x in kl], [value - means[0] for value in means]
    of_best = [p["kl_nats"] ** 0.5 for p in curve], [p["value"] - curve[0]["value"] for p in curve]
    for name, points in (("PPO", of_ppo), ("best of n", of_best)):
        yield Row(f"{name}: d (a - b d)", fitted(*points, linear), panel=FIT)
        yield Row(f"{name}: d (a - b ln d)", fitted(*points, logarithm), panel=FIT)


def of_end(rows: Sequence[Row], more: str, less: str) -> float:
    return at(rows, more, panel=END) - at(rows, less, panel=END)


def fallen(rows: Sequence[Row]) -> float:
    """Return how far gold falls from its peak beyond `NOISE`; an update's standard error is the median over the curve's
    points of their interval's width, which is 2 x 1.96 of it."""
    widths = [
        row.high - row.low
        for row in rows
        if (row.series, row.panel) == (PPO, KL) and row.low is not None and row.high is not None
    ]
    return of_end(rows, "gold, at its peak", "gold, at the end") - NOISE * float(np.median(widths)) / 3.92


def of_fit(rows: Sequence[Row], better: str, worse: str) -> float:
    return at(rows, better, panel=FIT) - at(rows, worse, panel=FIT)


STUDY = Study(
    name="overoptimisation",
    number=4,
    title="Over-optimisation: gold peaks and falls while the proxy rises",
    claim="Gold follows d (a - b d) for best-of-n and d (a - b ln d) for RL, where d is the root of the KL.",
    source="Gao et al. 2022, figure 1",
    miniature="A reward model of 120 prompts; PPO without a KL penalty and best of 64 against it; gold only watches.",
    panels=[
        Panel(KL, "KL to SFT, nats (root scale)", "gold score", "sqrt"),
        Panel("proxy", "KL to SFT, nats (root scale)", "proxy score", "sqrt"),
        Panel(END, y="mean score"),
        Panel(FIT, y="R squared"),
    ],
    checks=[
        Check(f"gold falls from its peak by the end of PPO, by over {NOISE:g} standard errors", fallen),
        Check("the proxy rises meanwhile", lambda r: of_end(r, "proxy, at the end", "proxy, at gold's peak")),
        Check("PPO: the law with ln d fits better", lambda r: of_fit(r, "PPO: d (a - b ln d)", "PPO: d (a - b d)")),
        Check(
            "best of n: the law with d fits better",
            lambda r: of_fit(r, "best of n: d (a - b d)", "best of n: d (a - b ln d)"),
        ),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, OveroptimisationConfig, __file__, argv))
