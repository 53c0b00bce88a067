"""Predict what a larger run will reach from smaller ones, and register the prediction before that run.

Two laws of the GPT-4 report (section 3), with C the compute of a run (or its parameters, or tokens)::

    loss:                 L(C) = a C^b + c,    b < 0, c >= 0 the loss that no compute removes
    mean log pass rate:   -E[log pass_rate(C)] = a C^-k,    over the problems of a set

Runs scatter around the law by a factor whose logarithm is normal with one spread for all sizes: that is assumed. An
interval is for one run, the law's uncertainty and the scatter together. No law says that it goes on: an interval holds
where the law does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf.errors import InputError
from rlhf.intervals import Estimate
from rlhf.quantiles import student_quantile
from rlhf.rows.jsonl import read_object
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.fingerprint import canonical

Quantity = Literal["loss", "mean_log_pass_rate"]
FEWEST = {"loss": 5, "mean_log_pass_rate": 4}
EXPONENTS = -np.geomspace(0.004, 2.0, 40)
"""The exponents b that a loss's law is fitted with before the best is refined."""


@dataclass(frozen=True)
class Law:
    """A fitted law, y = a (C / unit)^b + c, and the scatter of runs around it.

    Of a mean log pass rate, y is its negative, and c is 0."""

    quantity: Quantity
    a: float
    b: float
    c: float
    unit: float
    """The geometric mean of the runs' compute."""
    spread: float
    """Standard deviation of log y around the law."""
    runs: int

    def at(self, compute: float) -> float:
        """Return y at a compute."""
        return float(self.a * (compute / self.unit) ** self.b + self.c)


def fit_loss(compute: Sequence[float], loss: Sequence[float]) -> Law:
    """Fit L = a C^b + c by least squares of relative errors. Raises InputError where the loss does not fall."""
    size, value = _checked("loss", compute, loss)
    unit = float(np.exp(np.log(size).mean()))
    law = _fitted(size, value, unit)
    if law.a <= 0:
        raise InputError("loss: it does not fall with compute; a law of scaling has nothing to go by")
    return law


def fit_pass_rate(compute: Sequence[float], mean_log_pass_rate: Sequence[float]) -> Law:
    """Fit -E[log pass_rate] = a C^-k by least squares of its logarithm, a straight line. Raises
    InputError where the rate does not rise."""
    law = _straight(*_checked("mean_log_pass_rate", compute, [-rate for rate in mean_log_pass_rate]))
    if law.b >= 0:
        raise InputError("mean_log_pass_rate: it does not rise with compute; a law of scaling has nothing to go by")
    return law


def _straight(size: np.ndarray, value: np.ndarray) -> Law:
    """Fit the straight line of `fit_pass_rate`, whichever way it leads."""
    unit = float(np.exp(np.log(size).mean()))
    x, y = np.log(size / unit), np.log(value)
    b = float((x * (y - y.mean())).sum() / (x**2).sum())
    residual = y - y.mean() - b * x
    spread = math.sqrt(float((residual**2).sum()) / (len(size) - 2))
    return Law("mean_log_pass_rate", math.exp(float(y.mean())), b, 0.0, unit, spread, len(size))


def mean_log_pass_rate(passes: Sequence[int], samples: int) -> float:
    """Compute the mean over problems of log pass rate, from how many of ``samples`` answers passed each.

    A rate is (passes + 1/2) / (samples + 1): of a problem never solved, log 0 would decide everything. The report
    leaves its hardest problems out instead; leave the same out at every size.
    """
    rates = [(count + 0.5) / (samples + 1) for count in passes]
    if not rates or min(passes) < 0 or max(passes) > samples:
        raise InputError(f"passes: write a number from 0 to samples={samples} for each problem")
    return float(np.mean(np.log(rates)))


# ------------------------------------------------------------------------------------------------- intervals


def predict(
    law: Law,
    compute: Sequence[float],
    values: Sequence[float],
    at: float,
    seed: int,
    level: float = 0.95,
    samples: int = 1000,
) -> Estimate:
    """Predict one run at ``at`` from the law and the runs that it was fitted to.

    The pass rate's interval is Student's for a new point of a straight line, exact under the assumption. The loss's
    holds every value y that the runs at hand don't contradict: with E_n the smallest sum of squared relative errors of
    a law through the n runs, and E_y that of one through them and (at, y), those with ``(n - 3) (E_y - E_n) / E_n``
    below a limit. For a straight line this is Student's interval, and the limit the square of his quantile; here it is
    the larger of that and the quantile of a bootstrap, ``samples`` worlds drawn from the fitted law and refitted.
    """
    value = law.at(at)
    if law.quantity == "loss":
        return Estimate(value, *_loss_interval(law, compute, values, at, seed, level, samples))
    x = np.log(np.asarray(compute, dtype=np.float64) / law.unit)
    error = law.spread * math.sqrt(1 + 1 / law.runs + math.log(at / law.unit) ** 2 / float((x**2).sum()))
    factor = math.exp(student_quantile((1 + level) / 2, law.runs - 2) * error)
    return Estimate(-value, -value * factor, -value / factor)


def measured_coverage(
    law: Law, compute: Sequence[float], at: float, seed: int, level: float = 0.95, trials: int = 200
) -> float:
    """Return how often the interval of `predict` holds a new run, over worlds drawn from the law: what its level is
    worth with this many runs at these sizes, if the law is true. A world whose scatter hides the law counts like every
    other: its interval is as wide as its runs make it."""
    draw = np.random.default_rng([seed, 1])
    true = np.array([law.at(one) for one in (*compute, at)])
    runs = true * np.exp(law.spread * draw.standard_normal((trials, len(true))))
    if law.quantity == "loss":
        size = np.append(np.asarray(compute, dtype=np.float64), at) / law.unit
        a, b, c, error = _fit_losses(size[:-1], runs[:, :-1])
        spread = np.sqrt(error / (len(compute) - 3))
        return float((_apart(size, runs) <= _limits(size, (a, b, c, spread), draw, level, 60)).mean())
    held, size = 0, np.asarray(compute, dtype=np.float64)
    for *seen, new in runs.tolist():
        low, high = predict(_straight(size, np.array(seen)), compute, seen, at, seed, level).interval
        held += low <= -new <= high
    return held / trials


def _loss_interval(
    law: Law, compute: Sequence[float], values: Sequence[float], at: float, seed: int, level: float, samples: int
) -> tuple[float, float]:
    size = np.append(np.asarray(compute, dtype=np.float64), at) / law.unit
    fitted = tuple(np.array([part]) for part in (law.a, law.b, law.c, law.spread))
    limit = float(_limits(size, fitted, np.random.default_rng([seed, 2]), level, samples)[0])
    steps = np.geomspace(1e-2, 1e3, 120) * max(law.spread, 1e-9)
    steps = steps[steps < math.log(100)]
    ends = []
    for side in (-1, 1):
        tried = np.tile(np.append(np.asarray(values, dtype=np.float64), 0.0), (len(steps), 1))
        tried[:, -1] = law.at(at) * np.exp(side * steps)
        apart = _apart(size, tried)
        out = np.flatnonzero(apart > limit)
        if not len(out):
            ends.append(0.0 if side < 0 else math.inf)
            continue
        n = int(out[0])
        step = steps[0] if n == 0 else np.interp(limit, apart[n - 1 : n + 1], steps[n - 1 : n + 1])
        ends.append(float(law.at(at) * math.exp(side * step)))
    return ends[0], ends[1]


def _limits(
    size: np.ndarray, fitted: tuple[np.ndarray, ...], draw: np.random.Generator, level: float, samples: int
) -> np.ndarray:
    """Return [T] the limit of `_apart` for each of T fitted laws (a, b, c and spread): the larger of Student's squared
    quantile and that of worlds drawn from the law."""
    a, b, c, spread = (part[:, None] for part in fitted)
    true = a * size**b + c
    noise = draw.standard_normal((len(true), samples, len(size)))
    drawn = true[:, None] * np.exp(spread[..., None] * noise)
    apart = _apart(size, drawn.reshape(-1, len(size))).reshape(len(true), samples)
    return np.maximum(np.quantile(apart, level, axis=1), student_quantile((1 + level) / 2, len(size) - 4) ** 2)


def _apart(size: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return [R] how much worse a law fits the runs [R, n + 1] with the last one than without it, in units of the
    scatter: (n - 3) (E_(n + 1) - E_n) / E_n."""
    without, whole = _fit_losses(size[:-1], losses[:, :-1])[3], _fit_losses(size, losses)[3]
    return (len(size) - 4) * (whole - without) / np.maximum(without, 1e-300)


def _fitted(compute: np.ndarray, loss: np.ndarray, unit: float) -> Law:
    a, b, c, error = (float(part[0]) for part in _fit_losses(compute / unit, loss[None]))
    return Law("loss", a, b, c, unit, math.sqrt(error / (len(compute) - 3)), len(compute))


def _fit_losses(size: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fit many runs of losses [R, n] at the same sizes [n]; return a, b, c and the sum of squared relative errors, [R]
    each.

    For a given b the law is a straight line in size^b, so a and c follow; b is the best of `EXPONENTS`, refined by ever
    smaller steps to either side (the error has a kink where c becomes 0), and by the parabola through the last ones."""
    errors = _line(size, losses, EXPONENTS[None])[2]
    b, ratio = EXPONENTS[errors.argmin(axis=1)], EXPONENTS[1] / EXPONENTS[0]
    for width in 0.5 ** np.arange(6):
        tried = np.clip(b[:, None] * ratio ** (width * np.array([-1.0, 0.0, 1.0])), EXPONENTS[-1], EXPONENTS[0])
        errors = _line(size, losses, tried)[2]
        b = tried[np.arange(len(b)), errors.argmin(axis=1)]
    left, middle, right = errors.T
    bend = left - 2 * middle + right
    step = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    b = np.where(np.abs(step) < 1, tried[:, 1] * ratio ** (width * step), b)
    a, c, error = (part[:, 0] for part in _line(size, losses, b[:, None]))
    return a, b, c, np.maximum(error, 0.0)


def _line(size: np.ndarray, losses: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit a and c (both 0 or more) for each of the exponents b, [1, G] or [R, G], by least squares weighted by
    1 / loss^2; return a, c and the error, [R, G] each."""
    weight = 1 / losses**2
    x = size ** b[..., None]
    sx, sxx, sxy = (
        part @ power[0].T if len(b) == 1 else np.einsum("rn,rgn->rg", part, power)
        for part, power in ((weight, x), (weight, x**2), (weight * losses, x))
    )
    s, sy = weight.sum(1)[:, None], (weight * losses).sum(1)[:, None]
    count = losses.shape[1]  # the weighted sum of loss^2
    spread = sxx - sx**2 / s
    a = np.where(spread > 1e-12 * sxx, (sxy - sx * sy / s) / np.maximum(spread, 1e-300), 0.0)
    a = np.maximum(a, 0.0)
    c = (sy - a * sx) / s
    through = c < 0
    a = np.where(through, sxy / sxx, a)
    c = np.where(through, 0.0, c)
    error = count - 2 * (a * sxy + c * sy) + a**2 * sxx + 2 * a * c * sx + c**2 * s
    return a, c, error


def _checked(quantity: Quantity, compute: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    size, value = np.asarray(compute, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(size) != len(value) or len(set(size.tolist())) < FEWEST[quantity]:
        raise InputError(f"{quantity}: {len(set(size.tolist()))} sizes of runs; a fit needs {FEWEST[quantity]} or more")
    if not (np.isfinite(size).all() and np.isfinite(value).all() and (size > 0).all() and (value > 0).all()):
        what = "mean log pass rates are below 0" if quantity != "loss" else "losses are above 0"
        raise InputError(f"{quantity}: compute is above 0 and finite, and {what}")
    return size, value


# --------------------------------------------------------------------------------------------- registrations


@dataclass(frozen=True)
class Prediction:
    """A law, what it predicts for one run, and the data behind it."""

    quantity: Quantity
    at: float
    value: float
    low: float
    high: float
    coverage: float
    """How often such an interval holds a new run, simulated from the law at these sizes."""
    law: Law
    compute: tuple[float, ...]
    values: tuple[float, ...]
    seed: int

    @property
    def sentence(self) -> str:
        """Write the prediction, and what its interval is worth."""
        return (
            f"{self.quantity.replace('_', ' ')} {self.value:.4g} [{self.low:.4g}, {self.high:.4g}] at {self.at:.3g}, "
            f"from {self.law.runs} runs; such intervals hold {100 * self.coverage:.0f}% of runs, if the law is true"
        )


def prediction(
    quantity: Quantity, compute: Sequence[float], values: Sequence[float], at: float, seed: int
) -> Prediction:
    """Fit the quantity's law and predict one run at ``at``. Raises InputError."""
    if not (math.isfinite(at) and at > 0):
        raise InputError(f"at={at} must be above 0: the compute of the run to predict")
    law = fit_loss(compute, values) if quantity == "loss" else fit_pass_rate(compute, values)
    found, coverage = predict(law, compute, values, at, seed), measured_coverage(law, compute, at, seed)
    return Prediction(quantity, at, *found, coverage, law, tuple(compute), tuple(values), seed)


def register(file: str | Path, made: Prediction) -> str:
    """Write a prediction with its data, fit, time and hash, before the run that it is about; return the hash.

    Raises InputError where the file exists: a prediction that can be replaced is none."""
    file = Path(file)
    if file.exists():
        raise InputError(f"{file}: exists; a registered prediction is not replaced, name another file")
    content = {**asdict(made), "registered": datetime.now(UTC).isoformat(timespec="seconds")}
    digest = _hash(content)
    write_json_atomic(file, content | {"sha256": digest})
    return digest


@dataclass(frozen=True)
class Comparison:
    """A registered prediction and what came out."""

    value: float
    low: float
    high: float
    observed: float
    inside: bool
    registered: str
    sha256: str
    before: bool | None
    """Whether it was registered before the run began; None where no run was named, or its beginning is not known."""


def compare(file: str | Path, observed: float, began: datetime | None = None) -> Comparison:
    """Compare a registered prediction with what was observed; ``began``: when that run began.

    Raises InputError for a file whose content does not have its hash: it was changed after it was registered. (The hash
    proves nothing to others unless they have seen it before: publish it, or commit the file.)
    """
    content: dict[str, Any] = read_object(file, "name the file of --register", "registered prediction")
    digest = content.pop("sha256", None)
    if not {"value", "low", "high", "registered"} <= content.keys() or digest != _hash(content):
        raise InputError(f"{file}: is no registered prediction, or was changed after it was registered")
    if not math.isfinite(observed):
        raise InputError(f"observed={observed} must be a finite number")
    low, high = float(content["low"]), float(content["high"])  # an end that is open stands there as text
    before = None if began is None else datetime.fromisoformat(content["registered"]) <= began
    inside = low <= observed <= high
    return Comparison(content["value"], low, high, observed, inside, content["registered"], digest, before)


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(content)).hexdigest()
