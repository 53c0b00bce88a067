"""The report card's pictures, as SVG in the page's own text colour. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reward_models.card.pairs import Numbers
from rlhf.errors import short
from rlhf.run.page import FIRST, INK, SECOND, WRONG, legend, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODEL, OTHER = FIRST, SECOND
WIDE = 4.6  # inches: legible on a telephone, too


def limits(rows: Sequence[Numbers]) -> tuple[float, float]:
    """Return the ends, in per cent, of an axis that holds every row's interval: the same for all forests of a page."""
    ends = [end for row in rows for end in (*row["accuracy_ci"], row.get("length_baseline", 0.5))]
    low, high = 100 * min(ends), 100 * max(ends)
    return max(-1.0, min(40.0, low - 3)), min(101.0, max(80.0, high + 3))


def forest(rows: Sequence[Numbers], ends: tuple[float, float], first: int = 0, of: str = "pairs") -> str:
    """Draw accuracies with their intervals, one row each under its name, in per cent from `ends[0]` to `ends[1]`.

    The first `first` rows are in the model's colour (0: all rows); a group's length rule, where it is there, is a
    diamond. Dashes stand at 50%. of: what is counted.
    """
    ruled = not first and all("length_baseline" in row for row in rows)

    def draw(axes: Axes) -> None:
        for line, row in enumerate(rows):
            low, high = (100 * bound for bound in row["accuracy_ci"])
            color = MODEL if not first or line < first else OTHER
            axes.plot([low, high], [line, line], color=color, linewidth=2, solid_capstyle="butt")
            name = "model" if ruled and not line else None
            axes.plot([100 * row["accuracy"]], [line], "o", color=color, markersize=6, label=name, clip_on=False)
            if ruled:
                name = None if line else "always the longer, or always the shorter"
                at = [100 * row["length_baseline"]], [line]
                axes.plot(*at, "D", color=OTHER, markersize=5, label=name, clip_on=False)
            text = f"{_label(row['name'])}: {100 * row['accuracy']:.1f}% of {row['n']:,}"
            axes.text(0, line - 0.25, text, transform=axes.get_yaxis_transform(), va="bottom", fontsize=9)
        for line in range(len(rows)):  # beside the rows only: names stand between them
            axes.plot([50, 50], [line - 0.16, line + 0.3], color=INK, linewidth=0.9, linestyle="--", alpha=0.6)
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.6, -0.85)
        axes.set_xlim(*ends)
        axes.set_xlabel(f"% of {of} right, 95% interval")
        axes.spines["left"].set_visible(False)
        if ruled:
            legend(axes)

    return svg(draw, WIDE, 0.6 + 0.42 * len(rows) + 0.25 * ruled)


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
        legend(axes, columns=3)

    return svg(draw, WIDE, 3.6)


def step_reliability(curve: Sequence[Numbers]) -> str:
    """Draw the share of right steps against the probability given to them, by bins; a point's area shows its steps."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.9, linestyle="--", alpha=0.6, label="perfect")
        x, y = ([100 * row[name] for row in curve] for name in ("confidence", "accuracy"))
        axes.plot(x, y, color=MODEL, linewidth=1.4, label="the model")
        most = max(row["n"] for row in curve)
        axes.scatter(x, y, s=[6 + 90 * row["n"] / most for row in curve], color=MODEL, alpha=0.75)
        axes.set_xlim(-1, 101)
        axes.set_xlabel("probability that the step is right (%)")
        axes.set_ylabel("steps right (%)")
        legend(axes)

    return svg(draw, WIDE, 3.6)


def differences(counts: Sequence[int], edges: Sequence[float]) -> str:
    """Draw a histogram of score differences: the pairs left of 0 are wrong."""

    def draw(axes: Axes) -> None:
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            color = WRONG if (low + high) / 2 < 0 else MODEL
            axes.bar(low, count, width=0.94 * (high - low), align="edge", color=color)
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_xlabel("score of the preferred response - the other's (left of 0: wrong)")
        axes.set_ylabel("pairs")

    return svg(draw, WIDE, 3.0)


def score_and_length(characters: Sequence[int], scores: Sequence[float]) -> str:
    """Draw a point per response."""

    def draw(axes: Axes) -> None:
        axes.scatter(characters, scores, s=9, color=MODEL, alpha=0.35, linewidths=0)
        axes.set_xlabel("response length (characters)")
        axes.set_ylabel("score")

    return svg(draw, WIDE, 3.0)


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
        axes.set_xlabel("% of pairs in which more of it is preferred")
        legend(axes)
        axes.grid(visible=False, axis="y")

    return svg(draw, WIDE, 1.2 + 0.3 * len(shown)) if shown else ""


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
        legend(axes)

    return svg(draw, WIDE, 3.8)


def _label(text: str) -> str:
    """Shorten a label and escape what matplotlib would read as mathematics."""
    return short(text, 40).replace("$", r"\$")
