"""The page of a contamination check: what each method found, scores with and without it, the items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.evals.contamination import METHODS
from rlhf.intervals import by_chance
from rlhf.run import page as html

WHAT = {
    "sampled": "{samples} random substrings of {chars} letters and digits, one is there (GPT-4's method)",
    "windows": "any substring of {chars} letters and digits is there",
    "words": "{coverage:.0%} of its words lie in runs of {words} words that are there",
}
SCORES = ("score_all", "score_clean", "score_contaminated", "contaminated_less_clean")
MOST_SHOWN = 200


def page(result: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> str:
    """Write the page. items: rows of items.jsonl."""
    rules = result["rules"]
    parts = [
        html.verdict(_sentence(result)),
        html.note(f"{result['rows']:,} training rows of {', '.join(result['train_data'])}"),
        html.note(f"An item counts as contaminated where, by method: {_methods(rules)}."),
        html.note(f"Not found: {result['not_found_by_these']}."),
    ]
    for name, entry in result["evals"].items():
        there = [method for method in METHODS if method in entry]
        rows = [[method, _percent(entry[method]["share"]), f"{entry[method]['share']['n']:,}"] for method in there]
        parts += [f"<h2>{html.text(name)}</h2>", html.table((["method", "contaminated", "items checked"], rows))]
        if entry["unchecked"]:
            parts.append(html.note(f"{entry['unchecked']:,} of {entry['items']:,} items are too short, or boilerplate"))
        scored = [method for method in there if "score_all" in entry[method]]
        if scored:
            headers = ["without what this method found", *(measure.replace("_", " ") for measure in SCORES)]
            cells = [[method, *(_number(entry[method].get(measure)) for measure in SCORES)] for method in scored]
            parts += [html.table((headers, cells)), html.note(by_chance(len(scored)))]
    hit = sorted((row for row in items if row["windows"] or row["words"]), key=lambda row: -row["letters_covered"])
    if hit:
        parts.append("<h2>Items that were found, the most covered first</h2>")
    for row in hit[:MOST_SHOWN]:
        facts = f"{row['letters_covered']:.0%} of its letters, {row['words_covered']:.0%} of its words"
        answer = html.Answer(f"in {row['train']}", facts, "sampled" if row["sampled"] else "not sampled")
        parts.append(html.compared(row["text"], [answer], tag=str(row["eval"])))
    if len(hit) > MOST_SHOWN:
        parts.append(html.note(f"{len(hit) - MOST_SHOWN:,} more are in items.jsonl"))
    return html.page("Contamination", "\n".join(parts))


def _methods(rules: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {what.format(**rules)}" for name, what in WHAT.items())


def _sentence(result: Mapping[str, Any]) -> str:
    found = {name: entry["sampled"]["share"] for name, entry in result["evals"].items() if "sampled" in entry}
    if not found:
        return "No item is long enough to be checked"
    shown = [f"{name} {100 * share['value']:.1f}% of {share['n']:,}" for name, share in found.items()]
    return f"Contaminated by GPT-4's method: {', '.join(shown)} items"


def _percent(metric: Mapping[str, float]) -> str:
    return f"{100 * metric['value']:.1f}% [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"


def _number(metric: Mapping[str, float] | None) -> str:
    return (
        "" if metric is None else f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}] n {metric['n']:,}"
    )
