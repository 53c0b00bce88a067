"""The page of `rlhf collected`: what a store holds, how far annotators agree, what position and time do.

Names of annotators are inserted as text. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rlhf.collection.measured import Agreement, AnnotatorMeasures, Measure, PositionMeasures
from rlhf.errors import short
from rlhf.run import page as html
from rlhf.run.page import FIRST, INK, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 4.6  # inches: legible on a telephone, too
PAIRS_SHOWN = 40
MEANING = {
    "agreement": "two annotators say the same of a pair: first, second or tie",
    "agreement_decided": "the same, of the pairs that neither ties",
    "alpha_nominal": "Krippendorff's alpha of the three outcomes of a pair",
    "alpha_ordinal": "Krippendorff's alpha of the ranks, by their order",
    "alpha_interval": "Krippendorff's alpha of the ranks, by their distance",
    "kendall_tau_b": "Kendall's tau-b of two annotators' rankings of an item, on average",
    "position_bias": "by how much the response shown earlier wins more than half of the pairs",
    "gold_accuracy": "pairs of gold items in the known order; a tie counts half",
    "seconds_quartile_1": "a quarter of the judgments took less",
    "seconds_median": "half of the judgments took less",
    "seconds_quartile_3": "three quarters of the judgments took less",
}
_STYLE = ".meanings :is(th, td):last-child { text-align: left; white-space: normal; }"
SHARES = ("agreement", "agreement_decided", "gold_accuracy")


def shown(name: str, measure: Measure) -> str:
    """Write a measure with its interval and n, or why there is none."""
    if measure.value is None:
        return f"{measure.note} (n {measure.n:,})"
    if measure.low is None or measure.high is None:
        return _number(name, measure.value) + (f" ({measure.note})" if measure.note else "")
    ends = f"[{_number(name, measure.low)}, {_number(name, measure.high)}]"
    unit = " points" if name == "position_bias" else ""
    return f"{_number(name, measure.value)} {ends}{unit} (n {measure.n:,})"


def _number(name: str, value: float) -> str:
    if name in SHARES:
        return f"{100 * value:.1f}%"
    if name == "position_bias":
        return f"{100 * value:+.1f}"
    if name.startswith("seconds"):
        return f"{value:.1f} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def page(
    store: str,
    counts: Mapping[str, Measure],
    progress: Mapping[str, Mapping[str, int]],
    agreement: Agreement | None,
    notes: Sequence[str],
) -> str:
    """Write the whole page. progress: annotator -> state of their tasks -> how many; notes: what the command did, a
    line each."""
    parts = [html.verdict(_verdict(counts)), *(html.note(line) for line in notes)]
    rows = [[name.replace("_", " "), shown(name, measure)] for name, measure in counts.items()]
    parts += ["<h2>What the store holds</h2>", html.table((["", "count"], rows))]
    if progress:
        states = ("done", "leased", "skipped", "expired")
        rows = [[name, *(f"{counted[state]:,}" for state in states)] for name, counted in progress.items()]
        parts += ["<h2>Tasks by annotator</h2>", html.table((["annotator", *states], rows))]
    if agreement is not None:
        parts += _agreement(agreement)
    return html.page(f"Collected in {store}", "\n".join(parts), _STYLE)


def _verdict(counts: Mapping[str, Measure]) -> str:
    said = {name: measure.n for name, measure in counts.items()}
    return (
        f"{said['judgments']:,} judgments of {said['items_judged']:,} of {said['items']:,} items by"
        f" {said['annotators']:,} annotators; {said['open_places']:,} places on {said['open_items']:,} items are open."
    )


def _agreement(agreement: Agreement) -> Iterator[str]:
    yield "<h2>Agreement</h2>"
    rows = [[name.replace("_", " "), shown(name, m), MEANING[name]] for name, m in agreement.metrics.items()]
    yield html.table((["", "value, 95% interval over items", "meaning"], rows), "meanings")
    yield html.note("Gold items count for gold accuracy and time alone. Krippendorff (2004) asks for an alpha of .800, "
                    "and of .667 for tentative conclusions.")  # fmt: skip
    yield "<h2>Annotators</h2><div class=grid>"
    for title, name in (("Agreement with the others", "agreement"), ("Right on gold items", "gold_accuracy"),
                        ("Position bias", "position_bias")):  # fmt: skip
        picture = _forest(agreement.annotators, name)
        yield f"<figure><figcaption>{html.text(title)}</figcaption>{picture}</figure>" if picture else ""
    yield _seconds(agreement.annotators)
    yield "</div>"
    heads = ["annotator", "kind", "judgments", "with the others", "gold accuracy", "position bias", "median time"]
    rows = [
        [who.name, who.kind, f"{who.judgments:,}", shown("agreement", who.agreement),
         shown("gold_accuracy", who.gold_accuracy), shown("position_bias", who.position_bias),
         shown("seconds_median", who.seconds["seconds_median"])]
        for who in agreement.annotators
    ]  # fmt: skip
    yield html.table((heads, rows))
    if agreement.pairs:
        yield "<h2>Two by two</h2>"
        rows = [
            [" and ".join(pair.annotators), f"{pair.items:,}", shown("agreement", pair.agreement),
             shown("agreement_decided", pair.decided), shown("kappa", pair.kappa)]
            for pair in agreement.pairs[:PAIRS_SHOWN]
        ]  # fmt: skip
        yield html.table((["annotators", "items", "agreement", "without ties", "kappa"], rows))
        if len(agreement.pairs) > PAIRS_SHOWN:
            yield html.note(f"The {PAIRS_SHOWN} with most items of {len(agreement.pairs)}; all are in collected.json.")
    if agreement.criteria:
        yield "<h2>Ratings</h2>"
        alphas = ("alpha_nominal", "alpha_ordinal", "alpha_interval")
        rows = [
            [rated.criterion, f"{rated.ratings:,}", *(shown(name, getattr(rated, name)) for name in alphas)]
            for rated in agreement.criteria
        ]
        yield html.table((["criterion", "ratings", *(name.replace("_", " ") for name in alphas)], rows))
    if len(agreement.positions) > 1:
        caption = "Mean rank by the position shown, 0 best and 1 worst; 1/2 without a bias."
        yield f"<h2>Position</h2><figure>{_positions(agreement.positions)}<figcaption>{caption}</figcaption></figure>"


# --- pictures -------------------------------------------------------------------------------------------------------


def _forest(annotators: Sequence[AnnotatorMeasures], name: str) -> str:
    """Draw one measure of every annotator who has it, with its interval; "" where none has it."""
    rows = [(who.name, m) for who in annotators if (m := getattr(who, name)).value is not None]

    def draw(axes: Axes) -> None:
        for line, (who, measure) in enumerate(rows):
            low, value, high = (100 * end for end in (measure.low, measure.value, measure.high))
            axes.plot([low, high], [line, line], color=FIRST, linewidth=2, solid_capstyle="butt")
            axes.plot([value], [line], "o", color=FIRST, markersize=6, clip_on=False)
            text = f"{_label(who)}: {shown(name, measure)}"
            axes.text(0, line - 0.25, text, transform=axes.get_yaxis_transform(), va="bottom", fontsize=9)
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.6, -0.85)
        if name == "position_bias":
            axes.axvline(0, color=INK, linewidth=0.9, linestyle="--", alpha=0.6)
        else:
            axes.set_xlim(0, 101)
        axes.set_xlabel("points" if name == "position_bias" else "% of pairs, 95% interval")
        axes.spines["left"].set_visible(False)

    return svg(draw, WIDTH, 0.6 + 0.42 * len(rows)) if rows else ""


def _seconds(annotators: Sequence[AnnotatorMeasures]) -> str:
    """Draw every annotator's median and quartiles of the time per item; "" where nobody's was measured."""
    times = [(who.name, [m.value for m in who.seconds.values() if m.value is not None]) for who in annotators]
    rows = [(name, ends) for name, ends in times if ends]

    def draw(axes: Axes) -> None:
        for line, (who, (first, median, third)) in enumerate(rows):
            axes.plot([first, third], [line, line], color=FIRST, linewidth=2, solid_capstyle="butt")
            axes.plot([median], [line], "o", color=FIRST, markersize=6, clip_on=False)
            text = f"{_label(who)}: {median:.1f} s"
            axes.text(0, line - 0.25, text, transform=axes.get_yaxis_transform(), va="bottom", fontsize=9)
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.6, -0.85)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds per item: quartiles and median")
        axes.spines["left"].set_visible(False)

    if not rows:
        return ""
    return f"<figure><figcaption>Time per item</figcaption>{svg(draw, WIDTH, 0.6 + 0.42 * len(rows))}</figure>"


def _positions(positions: Sequence[PositionMeasures]) -> str:
    measured = [(at.position, at.scaled_rank) for at in positions]
    rows = [(n, m.value, m.low or 0.0, m.high or 0.0) for n, m in measured if m.value is not None]

    def draw(axes: Axes) -> None:
        axes.axhline(0.5, color=INK, linewidth=0.9, linestyle="--", alpha=0.6)
        for position, value, low, high in rows:
            axes.plot([position] * 2, [low, high], color=FIRST, linewidth=2, solid_capstyle="butt")
            axes.plot([position], [value], "o", color=FIRST, markersize=6)
        axes.set_xticks([row[0] for row in rows])
        axes.set_xlabel("position shown")
        axes.set_ylabel("mean rank, 0 best")
        axes.invert_yaxis()

    return svg(draw, WIDTH, 2.6)


def _label(name: str) -> str:
    """Write a name for a picture, in which a dollar sign would begin a formula."""
    return short(name, 24).replace("$", r"\$")
