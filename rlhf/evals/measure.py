"""The numbers of an eval, each with a 95% interval over its items, as run_evals.json holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.evals.modelgraded import ModelBasedClassify
from rlhf.evals.run import Result
from rlhf.intervals import Estimate, bootstrap_interval, clustered_mean, reflected

Metric = dict[str, Any]
"""value, low, high and n: the number of items, over which the interval is."""


def pass_at_k(n: int, right: int, k: int) -> float:
    """Compute the probability that at least one of k answers drawn from n without replacement is right:
    ``1 - C(n - right, k) / C(n, k)``, an unbiased estimate of pass@k (Chen et al. 2021, section 2.1)."""
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"{k=} must be from 1 to {n=}, and {right=} from 0 to n")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def calibration_error(pairs: np.ndarray) -> float:
    """Compute the expected calibration error of rows (right 0 or 1, confidence): the mean over items of |share right -
    mean confidence| of their bin, ten bins of equal width (Guo et al. 2017; GPT-4's report measures it before and
    after RLHF)."""
    right, confidence = pairs[:, 0], pairs[:, 1]
    bins = np.minimum((confidence * 10).astype(int), 9)
    gaps = [abs(float((right - confidence)[bins == number].sum())) for number in range(10)]
    return sum(gaps) / len(pairs)


def metrics_of(result: Result, ks: Sequence[int] = ()) -> dict[str, Metric]:
    """Compute an eval's metrics, each named <eval>/<metric>: the means of what its verdicts count, and pass@k.

    An interval is over items, or their `split_group`s: several answers to one item, and items that are asked twice, are
    one cluster (`rlhf.intervals.clustered_mean`, which is Wilson's for one answer per item). The calibration error's,
    of the first answer to each item, redraws items and is too narrow (`rlhf.intervals.reflected`).
    """
    items, name = result.items, result.eval.name
    if not items:
        return {}
    grader, found = result.eval.grader, {}
    groups, count = [item.sample.group for item in items], len({item.sample.key for item in items})
    for metric in items[0].trials[0].verdict.numbers:
        values = [trial.verdict.numbers[metric] for item in items for trial in item.trials]
        keys = [group for group, item in zip(groups, items, strict=True) for _ in item.trials]
        scored = metric == "score" and isinstance(grader, ModelBasedClassify)
        bounds = grader.bounds if scored else (0.0, 1.0)  # type: ignore[union-attr]
        found[f"{name}/{metric}"] = as_metric(clustered_mean(values, keys, bounds), count)
    if "confidence" in items[0].trials[0].verdict.numbers:
        pairs = [[item.trials[0].verdict.numbers[part] for part in ("accuracy", "confidence")] for item in items]
        error = reflected(bootstrap_interval(np.array(pairs), seed=0, statistic=calibration_error, keys=groups))
        found[f"{name}/calibration_error"] = as_metric(error, count)
    if "accuracy" in items[0].trials[0].verdict.numbers:
        for k in ks:
            shares = [
                pass_at_k(len(item.trials), sum(t.verdict.numbers["accuracy"] == 1.0 for t in item.trials), k)
                for item in items
            ]
            found[f"{name}/pass@{k}"] = as_metric(clustered_mean(shares, groups), count)
    return found


def as_metric(estimate: Estimate, n: int) -> Metric:
    """Return an estimate as the JSON of a metric."""
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": n}
