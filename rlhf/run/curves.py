"""The report's curves: each metric of a stage over its steps, and score against KL."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlhf.metrics import METRICS
from rlhf.run import page as html
from rlhf.run.page import FIRST, INK, SECOND, legend, svg
from rlhf.run.tables import Json, label, policies

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, float]]
"""Lines of a metrics.jsonl."""
Points = list[tuple[float, float]]

PPO = ("score", "kl_nats", "entropy_nats", "clip_fraction", "response_tokens", "explained_variance",
       "pretraining_loss")  # fmt: skip
SUPERVISED = ("loss", "accuracy", "margin", "token_accuracy", "learning_rate")
FROM_ZERO = ("kl_nats", "entropy_nats", "clip_fraction", "response_tokens", "learning_rate")
GOLD = "#0f9d76"


def is_ppo(rows: Rows) -> bool:
    """Return whether these are the lines of a PPO run."""
    return any("kl_nats" in row for row in rows)


def curves(rows: Rows, summary: Json) -> str:
    """Draw a stage's metrics side by side, all over the same steps: the trained data's, and with them the held-out
    ones (`eval_loss` with `loss`). On PPO's score stand the evaluation's scores and the gold score, too."""
    ppo = is_ppo(rows)
    last = max((row["step"] for row in rows), default=1)
    names = PPO if ppo else SUPERVISED
    drawn = [_curve(name, rows, last, summary if ppo and name == "score" else {}) for name in names]
    return f"<div class=grid>{''.join(drawn)}</div>" if any(drawn) else ""


def frontier(rows: Rows, summary: Json) -> str:
    """Draw score against KL, a point per update, with SFT and best-of-n for comparison."""
    kl_of = dict(_points(rows, "kl_nats"))
    points = [(kl_of[step], score) for step, score in _points(rows, "score") if step in kl_of]
    if not points:
        return ""

    def draw(axes: Axes) -> None:
        kl, score = zip(*points, strict=True)
        axes.plot(kl, score, color=FIRST, linewidth=1, alpha=0.5)
        axes.scatter(
            kl, score, s=16, label="PPO updates, darker is later",
            c=range(len(points)), cmap="Blues", edgecolors=FIRST, linewidths=0.6,
        )  # fmt: skip
        for (name, entry), marker in zip(policies(summary).items(), "s^Dv*", strict=False):
            if entry.get("score") is not None and entry.get("kl_nats") is not None:
                at = [entry["kl_nats"]], [entry["score"]]
                axes.scatter(*at, color=SECOND, marker=marker, s=42, label=f"{label(name, entry)}, held out")
        legend(axes)
        axes.set_xlabel("KL to the reference (nats per response)")
        axes.set_ylabel("score")

    return f"<figure class=wide>{svg(draw, 4.6, 3.5)}</figure>"


def _curve(name: str, rows: Rows, last: float, summary: Json) -> str:
    points, held_out = _points(rows, name), _points(rows, f"eval_{name}")
    if not points and not held_out:
        return ""
    metric = METRICS[name]
    ends = {measure: _before_and_after(summary, measure, last) for measure in ("score", "gold_score")}
    golds = {found: _points(rows, found) for found in _gold_functions(rows)} | {"gold, held out": ends["gold_score"]}

    def draw(axes: Axes) -> None:
        _line(axes, points, FIRST, "training prompts" if name == "score" else "training data")
        _line(axes, held_out, SECOND, "held out")
        if ends["score"]:
            axes.plot(*zip(*ends["score"], strict=True), "D", color=SECOND, markersize=5, label="evaluation", zorder=3)
        if name in FROM_ZERO:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        low, high = axes.get_ylim()
        for bound in (metric.healthy_low, metric.healthy_high):
            if bound is not None and low < bound < high:
                axes.axhline(bound, color=INK, alpha=0.6, linewidth=0.9, linestyle="--")
        axes.set_xlim(0, last * 1.03)
        axes.locator_params("x", integer=True, nbins=6)
        axes.set_xlabel("update" if is_ppo(rows) else "step")
        _draw_gold(axes, golds)
        if held_out or any(ends.values()) or any(golds.values()):
            legend(axes)

    unit = "" if metric.unit == name else html.text(metric.unit)
    caption = f"<figcaption><strong>{name}</strong> {unit}<br>{html.text(metric.meaning)}</figcaption>"
    return f"<figure>{svg(draw, 4.0, 2.6)}{caption}</figure>"


def _draw_gold(axes: Axes, golds: Mapping[str, Points]) -> None:
    """Draw gold scores over an axis of their own, on the right: their unit is not the reward model's."""
    if not any(golds.values()):
        return
    right = axes.twinx()
    right.spines[["top", "left"]].set_visible(False)
    right.tick_params(colors=GOLD)
    right.spines["right"].set_color(GOLD)
    right.set_ylabel("gold score", color=GOLD)
    for name, points in golds.items():
        if points:
            style = "^:" if name == "gold, held out" else "-"
            right.plot(*zip(*points, strict=True), style, color=GOLD, linewidth=1.2, markersize=5, label=name)


def _line(axes: Axes, points: Points, color: str, name: str) -> None:
    if points:
        marker = "o" if len(points) < 40 else None
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.6, marker=marker, markersize=2.5, label=name)


def _points(rows: Rows, name: str) -> Points:
    return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _gold_functions(rows: Rows) -> list[str]:
    """Name the metrics of reward functions that call themselves gold: functions of weight 0 that only watch."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if re.fullmatch(r"(eval_)?score/.*gold.*", name, re.IGNORECASE)]


def _before_and_after(summary: Json, measure: str, last: float) -> Points:
    """Return the evaluation's mean before the first update (SFT's) and after the last (PPO's)."""
    entries = policies(summary)
    found = [(step, entries.get(name, {}).get(measure)) for step, name in ((0.0, "sft"), (last, "ppo"))]
    return [(step, value) for step, value in found if value is not None]
