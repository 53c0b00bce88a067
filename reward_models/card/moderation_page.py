"""A moderation model's report card as one HTML file that opens without a network. All texts are inserted as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reward_models.card.pairs import Numbers
from reward_models.card.report import made
from rlhf.run import page as html
from rlhf.run.tables import percent

PAGE = "moderation_report.html"
FEWEST = 10
"""Texts of either label below which resampling them says too little."""


def save_moderation_report(report: Numbers, folder: str | Path, about: Mapping[str, str | None]) -> Path:
    """Write `moderation_report.html` into a folder and return its path. about: names for the page's header."""
    source = " · ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items() if value)
    parts = [html.verdict(verdict(report)), html.note(source)]
    parts += [section(report) for section in (_categories, _thresholds, _groups, _certainty, _most_wrong, _made)]
    title = f"Moderation report card of {about.get('moderation_model') or Path(folder).name}"
    return html.write(Path(folder) / PAGE, html.page(title, "\n".join(filter(None, parts))))


def verdict(report: Numbers) -> str:
    """Write in how many categories the model is better than a bag of words, and in how many that is told."""
    rows = [row for row in report["categories"] if row.get("lead")]
    if not rows:
        if not any(row["n"] for row in report["categories"]):
            return f"Nothing is measured: no label is known of the {report['texts']:,} texts."
        measured = sum(row["auprc"] is not None for row in report["categories"])
        return f"{measured} of {len(report['categories'])} categories measured on {report['texts']:,} texts."
    better = [row["name"] for row in rows if row["lead"]["value"] > 0]
    told = [row for row in rows if row["name"] not in few(report)]
    surely = [row["name"] for row in told if row["lead"]["low"] > 0]
    surely_worse = [row["name"] for row in told if row["lead"]["high"] < 0]
    text = f"Better than a bag of words in {len(better)} of {len(rows)} categories"
    text += f", surely so in {len(surely)} ({', '.join(surely)})." if surely else "; no single lead is sure."
    return text + (f" Surely worse in {', '.join(surely_worse)}." if surely_worse else "")


def few(report: Numbers) -> list[str]:
    """Name the categories of which too few held-out texts have either label for an interval to be believed."""
    measured = [row for row in report["categories"] if row["auprc"]]
    return [row["name"] for row in measured if min(row["positives"], row["n"] - row["positives"]) < FEWEST]


def _categories(report: Numbers) -> str:
    beside = any(row.get("auprc_bag_of_words") for row in report["categories"])
    headers = ["", "known", "with it", "AUPRC", *(["bag of words", "lead"] if beside else []),
               "found at 1% false positives"]  # fmt: skip
    rows = [
        [row["name"], f"{row['n']:,}", f"{row['positives']:,}", _shown(row["auprc"]),
         *([_shown(row["auprc_bag_of_words"]), _shown(row["lead"], "+")] if beside else []),
         _shown(row["tpr_at_low_fpr"])]
        for row in report["categories"]
    ]  # fmt: skip
    mean = report["mean"].get("auprc")
    text = "AUPRC: area under the precision-recall curve; a coin has the share of texts with the category."
    text += f" Mean over categories: {_shown(mean)}." if mean else ""
    if names := few(report):
        text += f" Fewer than {FEWEST} texts have, or have not, {', '.join(names)}: intervals are too narrow there."
    return f"<h2>Categories</h2>{html.table((headers, rows))}{html.note(text)}"


def _thresholds(report: Numbers) -> str:
    rows = []
    for row in report["categories"]:
        chosen = row["chosen_on"]
        on = f"{chosen['flagged']} of {chosen['negatives']:,}" if chosen["negatives"] else "not chosen"
        rows.append([row["name"], f"{row['threshold']:.3f}", on, _shown(row["false_positive_rate"], "%"),
                     _shown(row["true_positive_rate"], "%")])  # fmt: skip
    headers = ["", "flagged from", "chosen: negatives flagged", "false positives, held out", "found, held out"]
    wanted = report["wanted_false_positive_rate"]
    text = "" if wanted is None else f"Chosen on other texts, for a false-positive rate of {percent(wanted)}. "
    if report["flagged"]:
        text += f"Some category flags {_shown(report['flagged'], '%')} of the texts."
    return f"<h2>Thresholds</h2>{html.table((headers, rows))}{html.note(text)}"


def _groups(report: Numbers) -> str:
    parts = []
    for title, groups in (("By length", report["by_length"]), ("By source", report["by_source"])):
        rows = [
            [row["name"], f"{row['texts']:,}", f"{row['positives']:,}",
             "" if row["auprc"] is None else f"{row['auprc']:.3f}", _shown(row["false_positive_rate"], "%"),
             _shown(row["true_positive_rate"], "%")]
            for row in groups
        ]  # fmt: skip
        headers = ["", "texts", "labels with it", "AUPRC", "false positives", "found"]
        parts += [f"<h3>{title}</h3>{html.table((headers, rows))}"] if rows else []
    note = html.note("All known labels together, whatever their category.")
    return f"<h2>Where it fails</h2>{''.join(parts)}{note}" if parts else ""


def _certainty(report: Numbers) -> str:
    rows = [[f"{100 * row['probability']:.0f}%", f"{100 * row['share']:.0f}%", f"{row['n']:,}"]
            for row in report["calibration"]]  # fmt: skip
    table = html.table((["said", "so by the labels", "labels"], rows))
    errors = [[row["name"], _shown(row["calibration_error"]), f"{row['scale']:.2f}", f"{row['shift']:+.2f}"]
              for row in report["categories"] if row["calibration_error"]]  # fmt: skip
    each = html.table((["", "calibration error (ECE)", "scale", "shift"], errors))
    return f"<h2>Calibration</h2>{table}{each}"


def _most_wrong(report: Numbers) -> str:
    cards = []
    for row in report["most_wrong"]:
        said = ", ".join(f"{name} {percent(p)}" for name, p in row["probabilities"].items())
        known = ", ".join(f"{name} {'yes' if label else 'no'}" for name, label in row["labels"].items())
        label = "has it" if row["label"] else "has it not"
        head = f"{row['category']}: the label says it {label}, the model {percent(row['probability'])}"
        cards.append(
            html.compared(row["text"], [html.Answer("Labels", "", known), html.Answer("Model", "", said)], head)
        )
    if not cards:
        return ""
    note = "The texts with the labels that the model finds least probable. Wrong labels show, too."
    return f"<h2>Worst mistakes</h2>{html.note(note)}{''.join(cards)}"


def _made(report: Numbers) -> str:
    return f"<h2>How it was made</h2>{html.table((['', ''], [[n, v] for n, v in made().items() if v]))}"


def _shown(estimate: Numbers | None, form: str = "") -> str:
    """Write an estimate with its interval: as a number, with its sign (+), or as a percentage (%)."""
    if estimate is None:
        return "-"
    numbers: Sequence[float] = [estimate[name] for name in ("value", "low", "high")]
    if form == "%":
        value, low, high = (f"{100 * number:.1f}" for number in numbers)
        return f"{value}% [{low}, {high}]"
    value, low, high = (f"{number:{form}.3f}" for number in numbers)
    return f"{value} [{low}, {high}]"
