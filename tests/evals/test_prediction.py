"""Scaling laws: exact data, published arithmetic, coverage, and registrations that cannot be changed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from reference import recipe

from rlhf.errors import InputError
from rlhf.evals.prediction import (
    compare,
    fit_loss,
    fit_pass_rate,
    mean_log_pass_rate,
    measured_coverage,
    predict,
    prediction,
    register,
)
from rlhf.quantiles import student_quantile
from rlhf.run.stages import Manifest

COMPUTE = np.geomspace(1e15, 1e19, 12)


def law(compute, a=20.0, b=-0.12, c=1.7):
    return a * (np.asarray(compute) / 1e15) ** b + c


def test_exact_data_give_the_law_back():
    for a, b, c in ((20.0, -0.12, 1.7), (3.0, -0.4, 2.0), (50.0, -0.05, 0.0)):
        found = fit_loss(COMPUTE, law(COMPUTE, a, b, c))
        assert found.b == pytest.approx(b, rel=0.03)
        assert found.at(1e21) == pytest.approx(float(law(1e21, a, b, c)), rel=5e-3)
        assert found.spread < 1e-3


def test_the_fit_is_the_least_of_all_relative_errors():
    """Against a fine grid over b and c."""
    draw = np.random.default_rng(0)
    loss = law(COMPUTE) * np.exp(0.03 * draw.standard_normal(12))
    found = fit_loss(COMPUTE, loss)
    own = float((((np.array([found.at(c) for c in COMPUTE]) - loss) / loss) ** 2).sum())
    least = math.inf
    for b in -np.geomspace(0.02, 0.6, 100):
        x = (COMPUTE / found.unit) ** b
        for c in np.linspace(0.0, loss.min(), 80):
            a = max(0.0, float((x * (loss - c) / loss**2).sum() / (x**2 / loss**2).sum()))
            least = min(least, float((((a * x + c - loss) / loss) ** 2).sum()))
    assert own <= least * (1 + 1e-4)


def test_a_mean_log_pass_rate_is_a_straight_line():
    """Two points apart by a factor of ten, -1 and -0.1: k = 1."""
    found = fit_pass_rate([1.0, 10.0, 100.0, 1000.0], [-1.0, -0.1, -0.01, -0.001])
    assert found.b == pytest.approx(-1.0)
    assert found.at(10_000.0) == pytest.approx(1e-4)


def test_a_pass_rates_interval_is_students_for_a_new_point():
    size, rates = [1.0, 2.0, 4.0, 8.0, 16.0], [-2.1, -1.4, -1.05, -0.7, -0.5]
    found = fit_pass_rate(size, rates)
    x, y = np.log(size), np.log([-rate for rate in rates])
    slope, start = np.polyfit(x, y, 1)
    residual = y - slope * x - start
    error = math.sqrt(residual @ residual / 3) * math.sqrt(
        1 + 1 / 5 + (math.log(64) - x.mean()) ** 2 / float(((x - x.mean()) ** 2).sum())
    )
    low, high = predict(found, size, rates, 64.0, seed=0).interval
    centre, half = start + slope * math.log(64), student_quantile(0.975, 3) * error
    assert (low, high) == pytest.approx((-math.exp(centre + half), -math.exp(centre - half)), rel=1e-9)


def test_a_pass_rates_interval_holds_as_often_as_it_says_where_scatter_hides_the_law():
    """Student's interval is exact, so of 200 worlds it holds about 190; in many of them the line rises."""
    size = np.geomspace(1e15, 1e17, 5)
    for seed in range(5):
        noise = np.exp(0.25 * np.random.default_rng(seed).standard_normal(5))
        rates = -2.0 * (size / 1e15) ** -0.15 * noise
        made = prediction("mean_log_pass_rate", size.tolist(), rates.tolist(), 1e18, seed=0)
        assert 0.9 <= made.coverage <= 0.99


def test_mean_log_pass_rate_of_counts():
    assert mean_log_pass_rate([0, 20], 20) == pytest.approx((math.log(0.5 / 21) + math.log(20.5 / 21)) / 2)
    with pytest.raises(InputError, match="from 0 to samples=20"):
        mean_log_pass_rate([21], 20)


def held(law_of, points: int, trials: int, at: float, noise: float, seed: int = 0) -> float:
    draw, size, count = np.random.default_rng(seed), np.geomspace(1e15, 1e19, points), 0
    for trial in range(trials):
        loss = law_of(size) * np.exp(noise * draw.standard_normal(points))
        low, high = predict(fit_loss(size, loss), size, loss, at, trial, samples=200).interval
        count += low <= float(law_of(at)) * math.exp(noise * float(draw.standard_normal())) <= high
    return count / trials


def test_a_losss_interval_holds_a_new_run():
    assert held(law, 12, 40, 1e20, 0.02) >= 0.85


@pytest.mark.long
@pytest.mark.parametrize(
    ("a", "b", "c", "noise", "at"),
    [(20.0, -0.12, 1.7, 0.02, 1e20), (3.0, -0.3, 2.0, 0.01, 1e21), (20.0, -0.05, 0.5, 0.02, 1e20)],
)
def test_twelve_points_hold_the_truth_as_often_as_they_say(a, b, c, noise, at):
    assert 0.92 <= held(lambda x: law(x, a, b, c), 12, 500, at, noise) <= 0.98


def test_five_points_say_what_their_interval_is_worth():
    size = np.geomspace(1e15, 1e18, 5)
    loss = law(size) * np.exp(0.02 * np.random.default_rng(1).standard_normal(5))
    made = prediction("loss", size.tolist(), loss.tolist(), 1e19, seed=0)
    assert f"such intervals hold {100 * made.coverage:.0f}% of runs" in made.sentence
    assert 0.8 <= made.coverage <= 1
    assert made.low < made.value < made.high
    assert made.coverage == measured_coverage(made.law, made.compute, 1e19, seed=0), "a pure function of the seed"


@pytest.mark.parametrize(
    ("compute", "loss", "told"),
    [
        ([1, 2, 3, 4], [4, 3, 2, 1], "4 sizes of runs; a fit needs 5"),
        ([1, 1, 1, 1, 1], [4, 3, 2, 1, 1], "1 sizes of runs"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], "does not fall with compute"),
        ([1, 2, 3, 4, 0], [5, 4, 3, 2, 1], "compute is above 0"),
        ([1, 2, 3, 4, 5], [5, 4, 3, 2, -1], "losses are above 0"),
    ],
)
def test_what_cannot_be_fitted(compute, loss, told):
    with pytest.raises(InputError, match=told):
        fit_loss(compute, loss)


def test_a_pass_rate_that_does_not_rise_has_no_law():
    with pytest.raises(InputError, match="does not rise with compute"):
        fit_pass_rate([1, 2, 3, 4], [-1.0] * 4)


def test_a_registered_prediction_is_neither_replaced_nor_changed(tmp_path: Path):
    made = prediction("loss", COMPUTE.tolist(), law(COMPUTE).tolist(), 1e21, seed=0)
    file = tmp_path / "p.json"
    digest = register(file, made)
    with pytest.raises(InputError, match="a registered prediction is not replaced"):
        register(file, made)
    content = json.loads(file.read_text())
    now = datetime.fromisoformat(content["registered"])
    inside = compare(file, made.value, began=now + timedelta(seconds=1))
    assert (inside.inside, inside.before, inside.sha256) == (True, True, digest)
    assert compare(file, made.high * 1.5, began=now - timedelta(seconds=5)).before is False
    assert compare(file, made.high * 1.5).inside is False
    for change in (
        {"high": 99.0},
        {"registered": "2020-01-01T00:00:00+00:00"},
        {"sha256": "0" * 64},
        {"values": [1.0]},
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(InputError, match="was changed after it was registered"):
            compare(file, 2.0)


def test_an_interval_with_an_open_end_is_registered_and_compared(tmp_path: Path):
    made = prediction("loss", COMPUTE.tolist(), law(COMPUTE).tolist(), 1e21, seed=0)
    register(tmp_path / "p.json", replace(made, high=math.inf))
    found = compare(tmp_path / "p.json", 1e9)
    assert (found.low, found.high, found.inside) == (made.low, math.inf, True)
    assert compare(tmp_path / "p.json", made.low / 2).inside is False


@pytest.mark.slow
def test_the_recipe(tmp_path: Path):
    data = tmp_path / "runs.jsonl"
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(12))
    rows = [{"compute": c, "loss": float(v)} for c, v in zip(COMPUTE, law(COMPUTE) * noise, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    registered, out = tmp_path / "loss.json", tmp_path / "out"
    words = ["--data", data, "--at", "1e20", "--register", registered, "--output_dir", out]
    result = recipe.run("predict_capability", *words)
    assert (result.code, result.err) == (0, "")
    found = json.loads((out / "predict_capability.json").read_text())
    metric = found["metrics"]["loss"]
    assert metric["low"] < float(law(1e20)) < metric["high"]
    assert found["sha256"] in result.out
    assert "<svg" in (out / "predict_capability.html").read_text()
    again = recipe.run("predict_capability", *words)
    assert (again.code, again.err.count("\n")) == (2, 1)
    observed = recipe.run("predict_capability", "--compare", registered, "--observed", law(1e20), "--output_dir", out)
    assert "is inside the predicted" in observed.out
    assert json.loads((out / "predict_capability.json").read_text())["inside"] is True
    told = (out / "predict_capability.html").read_text()
    assert f"Observed {float(law(1e20)):.4g}: inside the predicted" in told
    assert "<svg" not in told, "not the prediction's own page"
    for began, said in (
        ("2020-01-01T00:00:00+00:00", ", AFTER that run began: it proves nothing; sha256"),
        ("2120-01-01T00:00:00+00:00", ", before that run began; sha256"),
        (None, "; when that run began is not known; sha256"),  # of an earlier version
    ):
        Manifest(stage="ppo", inputs={}, seed=0, began=began).write(tmp_path)
        words = ["--compare", registered, "--observed", 1, "--run", tmp_path, "--output_dir", out]
        assert said in recipe.run("predict_capability", *words).out
    passes = tmp_path / "passes.jsonl"
    passes.write_text(
        "".join(json.dumps({"compute": 10**n, "passes": [n, 2 * n], "samples": 20}) + "\n" for n in range(1, 6))
    )
    rates = recipe.run("predict_capability", "--data", passes, "--at", "1e7", "--quantity", "mean_log_pass_rate",
                       "--output_dir", out)  # fmt: skip
    assert (rates.code, rates.err) == (0, "")
    assert "mean log pass rate -" in rates.out
    uneven = tmp_path / "uneven.jsonl"
    uneven.write_text("".join(json.dumps({"compute": n, "passes": [1] * n, "samples": 20}) + "\n" for n in range(2, 7)))
    unlike = tmp_path / "unlike.jsonl"
    unlike.write_text("".join(json.dumps({"compute": n, "passes": [0], "samples": 10 * n}) + "\n" for n in range(2, 7)))
    for flags, told in (
        ((), "give --data and --at to predict, or --compare"),
        (("--data", data), "at is missing"),
        (("--compare", registered), "observed is missing"),
        (("--compare", registered, "--observed", 1, "--at", 3), "at belongs to a new prediction"),
        (("--data", data, "--at", 3, "--observed", 1), "observed is compared with a registered prediction"),
        (("--data", passes, "--at", 3), "passes.jsonl:1: loss is None; write a number"),
        (
            ("--data", uneven, "--at", 3, "--quantity", "mean_log_pass_rate"),
            "uneven.jsonl:2: passes: 3 problems, and 2 in the rows before; count the same ones at every size",
        ),
        (
            ("--data", unlike, "--at", 3, "--quantity", "mean_log_pass_rate"),
            "unlike.jsonl:2: samples: 30 per problem, and 20 in the rows before; draw as many at every size",
        ),
    ):
        refused = recipe.run("predict_capability", *flags)
        assert refused.code == 2
        (line,) = refused.err.splitlines()
        assert told in line
