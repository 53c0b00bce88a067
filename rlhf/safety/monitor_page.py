"""The monitor's page. Names of policies and categories are inserted as text; there are no texts of conversations."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rlhf.run import page as html
from rlhf.run.page import FIRST, SECOND, svg
from rlhf.run.tables import number, percent
from rlhf.safety.monitor import SIGNALS, Numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "flag_rate": "flag rate", "refusal_rate": "refusal rate", "thumbs_up_rate": "rate of thumbs up",
    "length_psi": "lengths (PSI)", "length_ks_p": "lengths (KS test)",
}  # fmt: skip
COUNTS = {"flag_rate": "flagged", "refusal_rate": "refused", "thumbs_up_rate": "thumbs_up"}
"""Where a reference holds what a rate is made of."""
WIDTH = 4.6  # inches: legible on a telephone, too


def page(report: Numbers, store: str, review: Mapping[str, Any] | None = None) -> str:
    """Write the page. review: the metrics of people's decisions."""
    parts = [html.verdict(verdict(report)), html.note(_read(report, store))]
    if report["alarms"]:
        parts.append(html.warning("Alarms", [f"{_time(a['when'])}, number {a['at']:,}: {a['line']}"
                                             for a in report["alarms"]]))  # fmt: skip
    if report["not_compared"]:
        parts.append(html.warning("Not compared", report["not_compared"]))
    parts += [_rates(report), _windows(report), _policies(report), _review(review or {}), _how(report)]
    return html.page(f"Monitor of {store}", "\n".join(filter(None, parts)))


def verdict(report: Numbers) -> str:
    """Write what the page comes to."""
    count = f"{report['answers']:,} answers since the reference"
    if not report["alarms"]:
        return f"No alarm in {count}."
    names = ", ".join(dict.fromkeys(NAMES[alarm["signal"]] for alarm in report["alarms"]))
    return f"Changed against the reference: {names}. {count}."


def _read(report: Numbers, store: str) -> str:
    text = f"Read from {store}; {len(report['reference']['lengths']):,} lengths and all rates of the reference."
    if report["unscrubbed"]:
        text += f" {report['unscrubbed']:,} conversations were not read: personal data were not looked for in them."
    if report["expired"]:
        text += f" {report['expired']:,} had expired."
    return text


def _rates(report: Numbers) -> str:
    rows = []
    for chart in report["charts"]:
        name = chart["signal"]
        way = chart["highest"] / chart["level"] if chart["level"] else 0.0  # a level of 0: of the rarest events
        state = "alarm" if chart["highest"] > chart["level"] else f"{100 * way:.0f}%"
        happened, n = report["reference"][COUNTS[name]]
        rows.append([f"{NAMES[name]}, {chart['direction']}", percent(happened / n), _shown(report[name]),
                     percent(chart["after"]), state])  # fmt: skip
    headers = ["", "reference", "since", "found soonest", "of the way to an alarm, at most"]
    meant = html.items([f"{NAMES[name]}: {metric.meaning}" for name, metric in SIGNALS.items()], "short")
    flagged = report["categories"]
    told = html.note("Flagged for: " + ", ".join(f"{name} {n:,}" for name, n in flagged.items())) if flagged else ""
    return f"<h2>Rates</h2>{html.table((headers, rows))}{told}{meant}"


def _windows(report: Numbers) -> str:
    rows = [
        [f"{row['first']:,} to {row['first'] + row['answers'] - 1:,}", _time(row["until"]), _shown(row["flag_rate"]),
         _shown(row["refusal_rate"]), number(row["median_characters"]), f"{row['length_psi']:.3f}",
         f"{row['length_ks_p']:.3g}", f"{row['mix_psi']:.2f}"]
        for row in report["windows"]
    ]  # fmt: skip
    if not rows:
        return ""
    headers = ["answers", "until", "flagged", "refused", "median characters", "length PSI", "length KS, p", "mix PSI"]
    picture = f"<figure class=wide>{svg(lambda axes: _draw(axes, report), WIDTH, 3.0)}</figure>"
    text = "PSI: population stability index against the reference, in nats; mix: policies, fingerprints and samplers."
    return f"<h2>Windows</h2>{picture}{html.table((headers, rows))}{html.note(f'Dashed: the reference. {text}')}"


def _draw(axes: Axes, report: Numbers) -> None:
    middle = [row["first"] + row["answers"] / 2 for row in report["windows"]]
    for name, color in (("flag_rate", SECOND), ("refusal_rate", FIRST)):
        points = [(x, row[name]) for x, row in zip(middle, report["windows"], strict=True) if row[name]]
        if not points:
            continue
        values = [100 * point["value"] for _, point in points]
        spread = [[max(0.0, v - 100 * p["low"]) for v, (_, p) in zip(values, points, strict=True)],
                  [max(0.0, 100 * p["high"] - v) for v, (_, p) in zip(values, points, strict=True)]]  # fmt: skip
        label = "flagged" if name == "flag_rate" else "refused"
        axes.errorbar([x for x, _ in points], values, yerr=spread, fmt="o-", color=color, markersize=4, label=label)
        reference = report["reference"][COUNTS[name]]
        if reference is not None and any(chart["signal"] == name for chart in report["charts"]):
            happened, n = reference
            axes.axhline(100 * happened / n, color=color, linestyle="--", linewidth=0.9)
    axes.set_xlabel("answers since the reference")
    axes.set_ylabel("% of answers, 95% interval")
    axes.set_ylim(bottom=0)
    html.legend(axes)


def _policies(report: Numbers) -> str:
    rows = [
        [row["policy"] or "-", row["fingerprint"][:12] or "-", row["sampler"], _time(row["first"]),
         f"{row['answers']:,}", _shown(row["flag_rate"]), _shown(row["refusal_rate"]), number(row["median_characters"])]
        for row in report["policies"]
    ]  # fmt: skip
    headers = ["policy", "fingerprint", "sampler", "first", "answers", "flagged", "refused", "median characters"]
    return f"<h2>Policies</h2>{html.table((headers, rows))}" if rows else ""


def _review(metrics: Mapping[str, Any]) -> str:
    meaning = {
        "review_precision": "of the flagged conversations, those that people flag",
        "review_missed": "of the others, those that people flag, as far as the drawn ones tell",
        "review_recall": "of what people would flag, the part that was flagged",
    }
    rows = [[meaning[name], _shown(metrics[name]), f"{metrics[name]['n']:,}"] for name in meaning if name in metrics]
    return f"<h2>People's decisions</h2>{html.table((['', '', 'decisions'], rows))}" if rows else ""


def _how(report: Numbers) -> str:
    rules = report["rules"]
    text = (
        f"Charts are cumulative sums of log-likelihood ratios for odds that change by {rules['factor']:g}. Together "
        f"with the windows' tests they alarm in {percent(rules['false_alarms'])} of quiet runs of {rules['horizon']:,} "
        "answers, as simulated; each alarms once."
    )
    return f"<h2>How alarms are set</h2>{html.note(text)}"


def _shown(share: Numbers | None) -> str:
    if share is None:
        return "-"
    value, low, high = (
        f"{100 * share[name]:.1f}" if share[name] is not None else "" for name in ("value", "low", "high")
    )
    return f"{value}% [{low}, {high}]" if low else f"{value}%"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
