"""The report card's pictures, as SVG in the page's own text colour. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reward_models.card.pairs import Numbers
from rlhf.errors import short
from rlhf.run.page import FIRST, INK, SECOND, WRONG, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODEL, OTHER = FIRST, SECOND


def forest(rows: Sequence[Numbers], first: int = 0) -> str:
    """Draw accuracies with their intervals, one row each, in per cent; the first `first` rows in the model's colour (0:
    all rows). A dashed line at 50%."""

    def draw(axes: Axes) -> None:
        for line, row in enumerate(rows):
            low, high = (100 * bound for bound in row["accuracy_ci"])
            color = MODEL if not first or line < first else OTHER
            axes.plot([low, high], [line, line], color=color, linewidth=2, solid_capstyle="butt")
            axes.plot([100 * row["accuracy"]], [line], "o", color=color, markersize=6)
        axes.axvline(50, color=INK, linewidth=0.9, linestyle="--", alpha=0.6)
        axes.set_yticks(range(len(rows)), [f"{_label(row['name'])}  ({row['n']:,})" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        low = min(100 * row["accuracy_ci"][0] for row in rows)
        axes.set_xlim(max(-1, min(40, low - 3)), min(101, max(80, 3 + max(100 * r["accuracy_ci"][1] for r in rows))))
        axes.set_xlabel("% of pairs right, 95% interval")
        axes.grid(visible=False, axis="y")

    return svg(draw, 7.2, 0.85 + 0.3 * len(rows))


def reliability(raw: Numbers, calibrated: Numbers | None) -> str:
    """Draw accuracy against confidence by bins; the area of a point shows the number of its pairs."""

    def draw(axes: Axes) -> None:
        axes.plot([50, 100], [50, 100], color=INK, linewidth=0.9, linestyle="--", alpha=0.6, label="perfect")
        curves = [("as it is", MODEL, raw)]
        if calibrated is not None:
            curves.append(("with the temperature", OTHER, calibrated))
        for label, color, numbers in curves:
            x = [100 * row["confidence"] for row in numbers["curve"]]
            y = [100 * row["accuracy"] for row in numbers["curve"]]
            most = max(row["n"] for row in numbers["curve"])
            axes.plot(x, y, color=color, linewidth=1.4, label=label)
            axes.scatter(x, y, s=[6 + 90 * row["n"] / most for row in numbers["curve"]], color=color, alpha=0.75)
        axes.set_xlim(49, 101)
        axes.set_xlabel("confidence of the model (%)")
        axes.set_ylabel("pairs right (%)")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")

    return svg(draw, 4.6, 3.6)


def differences(counts: Sequence[int], edges: Sequence[float]) -> str:
    """Draw a histogram of score differences: the pairs left of 0 are wrong."""

    def draw(axes: Axes) -> None:
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            color = WRONG if (low + high) / 2 < 0 else MODEL
            axes.bar(low, count, width=0.94 * (high - low), align="edge", color=color)
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_xlabel("score of the preferred response minus the other's (left of 0: wrong)")
        axes.set_ylabel("pairs")

    return svg(draw, 4.6, 3.0)


def score_and_length(characters: Sequence[int], scores: Sequence[float]) -> str:
    """Draw a point per response."""

    def draw(axes: Axes) -> None:
        axes.scatter(characters, scores, s=9, color=MODEL, alpha=0.35, linewidths=0)
        axes.set_xlabel("response length (characters)")
        axes.set_ylabel("score")

    return svg(draw, 4.6, 3.0)


def preferences(rows: Sequence[Numbers]) -> str:
    """Draw, for each feature, how often model and labels prefer the response with more of it, joined by a line."""
    shown = [row for row in rows if row["model_prefers_more"] is not None]

    def draw(axes: Axes) -> None:
        for line, row in enumerate(shown):
            model, labels = 100 * row["model_prefers_more"], 100 * row["labels_prefer_more"]
            axes.plot([labels, model], [line, line], color=INK, alpha=0.35, linewidth=2)
            axes.plot([labels], [line], "D", color=OTHER, markersize=6, label="" if line else "labels")
            axes.plot([model], [line], "o", color=MODEL, markersize=7, label="" if line else "model")
        axes.axvline(50, color=INK, linewidth=0.9, linestyle="--", alpha=0.6)
        axes.set_yticks(range(len(shown)), [f"{row['feature']}  ({row['n']:,})" for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("% of pairs in which the response with more of it is preferred")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        axes.grid(visible=False, axis="y")

    return svg(draw, 7.2, 1.2 + 0.3 * len(shown)) if shown else ""


def best_of_n(curve: Numbers) -> str:
    """Draw both models' scores of the best of n by the first model, against KL."""

    def draw(axes: Axes) -> None:
        for rows, style, where in ((curve["per_prompt"], "-", "a prompt's own"), (curve["pool"], ":", "pool of all")):
            kl = [row["kl_nats"] for row in rows]
            for name, color, who in (("proxy", MODEL, "this model"), ("second", OTHER, "second model")):
                values = [row[name] for row in rows]
                axes.plot(kl, values, style, marker="o", markersize=4, color=color, label=f"{who}, {where}")
            if rows and "second_ci" in rows[0]:
                low, high = zip(*(row["second_ci"] for row in rows), strict=True)
                axes.fill_between(kl, low, high, color=OTHER, alpha=0.18)
        for row in max(curve["per_prompt"], curve["pool"], key=len):
            axes.annotate(f"n={row['n']}", (row["kl_nats"], axes.get_ylim()[0]), fontsize=8, ha="center", va="bottom")
        axes.set_xlabel("KL of best-of-n from the policy (nats)")
        axes.set_ylabel("score (standard deviations)")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")

    return svg(draw, 7.2, 3.8)


def _label(text: str) -> str:
    """Shorten a label and escape what matplotlib would read as mathematics."""
    return short(text, 40).replace("$", r"\$")
