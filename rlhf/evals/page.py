"""The page of a run of evals: its numbers, what could not be run, what flipped, and every item.

The browser's own search finds any word of any item; the buttons above the items leave those with one outcome. There is
no script: a choice of a button is CSS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.evals.classes import Excludes
from rlhf.evals.compare import Compared, Earlier, Row, chance
from rlhf.run import page as html
from rlhf.run.tables import number

MOST = 5000
"""Items on one page; with more, every eval's items have a page of their own."""

_OUTCOMES = ("right", "wrong", "partly", "gained", "lost")
_STYLE = "".join(f"body:has(#{name}:checked) .item:not(.{name}) {{ display: none }}\n" for name in _OUTCOMES) + (
    ".show { position: sticky; top: 0; background: Canvas; padding: .5rem 0; } .show label { margin-right: 1rem; }\n"
    ".right .tag { border-color: #15803d; } .wrong .tag { border-color: #c2410c; }\n"
)


def write_page(
    folder: Path, content: Mapping[str, Any], rows: Sequence[Row], compared: Sequence[Compared], earlier: Earlier | None
) -> Path:
    """Write run_evals.html, and a page per eval where there are very many items; return the first one's path.

    content: what run_evals.json holds."""
    several = len(rows) > MOST
    parts = [html.note(f"Model: {content['model']}"), _numbers(content), _not_run(content["not_run"])]
    parts.append(_differences(compared, earlier))
    if several:
        names = list(dict.fromkeys(row["eval"] for row in rows))
        pages = {name: f"items/{place}.html" for place, name in enumerate(names, 1)}
        (folder / "items").mkdir(exist_ok=True)
        for name, page in pages.items():
            own = [row for row in rows if row["eval"] == name]
            body = html.links([("all evals", "../run_evals.html")]) + _items(own, content["evals"], compared, earlier)
            html.write(folder / page, html.page(f"Items of {name}", body, _STYLE))
        parts.append(f"<h2>Items</h2>{html.links(pages.items())}")
    else:
        parts.append(_items(rows, content["evals"], compared, earlier))
    return html.write(folder / "run_evals.html", html.page("Evals", "\n".join(filter(None, parts)), _STYLE))


def _numbers(content: Mapping[str, Any]) -> str:
    cells = []
    for name, metric in content["metrics"].items():
        ends = (
            "no interval"
            if metric["low"] is None
            else f"[{number(metric['low'])}, {number(metric['high'])}]"
        )  # fmt: skip
        cells.append([name, number(metric["value"]), ends, f"{metric['n']:,}"])
    return html.table((["metric", "value", "95% interval", "items"], cells), "headline") if cells else ""


def _not_run(reasons: Mapping[str, str]) -> str:
    return html.warning("Not run", [f"{name}: {reason}" for name, reason in reasons.items()]) if reasons else ""


def _differences(compared: Sequence[Compared], earlier: Earlier | None) -> str:
    if earlier is None:
        return ""
    cells = [
        [one.name, one.metric, one.sentence, str(len(one.gained)), str(len(one.lost)), str(one.apart)]
        for one in compared
    ]  # fmt: skip
    headers = ["eval", "metric", "this run against the other", "gained", "lost", "in one run only"]
    parts = [f"<h2>Against {html.text(earlier.model)}</h2>", html.note(earlier.file)]
    parts.append(html.table((headers, cells)) if cells else html.note("No eval is in both runs with the same metric."))
    parts.append(html.note(said) if (said := chance(compared)) else "")
    return "".join(parts)


def _items(
    rows: Sequence[Row],
    evals: Mapping[str, Mapping[str, Any]],
    compared: Sequence[Compared],
    earlier: Earlier | None,
) -> str:
    if not rows:
        return ""
    flips = {(one.name, key): "gained" for one in compared for key in one.gained}
    flips |= {(one.name, key): "lost" for one in compared for key in one.lost}
    before = {(row["eval"], row["key"]): row for row in earlier.rows} if earlier else {}
    outcomes = [_outcome(row, evals.get(row["eval"], {})) for row in rows]
    counts = {name: outcomes.count(name) for name in _OUTCOMES[:3]}
    counts |= {name: sum(flip == name for flip in flips.values()) for name in _OUTCOMES[3:]}
    shown = [
        _item(row, evals.get(row["eval"], {}), outcome, flips.get((row["eval"], row["key"]), ""),
              before.get((row["eval"], row["key"])))
        for row, outcome in zip(rows, outcomes, strict=True)
    ]  # fmt: skip
    buttons = [_button("all", f"all {len(rows):,}", True)]
    buttons += [_button(name, f"{name} {count:,}") for name, count in counts.items() if count]
    find = html.note("Search the page (Ctrl F) for any word of a prompt, an answer, an ideal or a forbidden text.")
    return f"<h2>Items</h2>{find}<div class=show>{''.join(buttons)}</div>{''.join(shown)}"


def _button(name: str, label: str, checked: bool = False) -> str:
    on = " checked" if checked else ""
    return f"<input type=radio name=show id={name}{on}> <label for={name}>{html.text(label)}</label>"


def _outcome(row: Row, about: Mapping[str, Any]) -> str:
    """Return whether all trials earned the most (right), the least (wrong), or something between (partly), which is
    also said where nothing is known to be good."""
    low, high = about.get("bounds") or (0.0, 1.0)
    earned = {trial["numbers"].get(about.get("metric")) for trial in row["trials"]}
    return "right" if earned == {high} else "wrong" if earned == {low} else "partly"


def _item(row: Row, about: Mapping[str, Any], outcome: str, flip: str, before: Row | None) -> str:
    answers = list(_answers(row, "" if not flip else "now"))
    if flip and before is not None:
        answers += _answers(before, "before")
    asked = "\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
    ideal, name = " | ".join(row.get("ideal") or ()), "forbidden" if about.get("class") == Excludes.name else "ideal"
    asked += f"\n\n{name}: {ideal}" if ideal else ""
    tag = " · ".join(filter(None, (str(row["eval"]), outcome, flip, str(row.get("where", "")))))
    return f'<div class="item {outcome} {flip}">{html.compared(asked, answers, tag)}</div>'


def _answers(row: Row, when: str) -> Iterable[html.Answer]:
    for number_of, trial in enumerate(row["trials"], 1):
        facts = ", ".join(f"{name} {number(value)}" for name, value in trial["numbers"].items() if value)
        texts = dict(trial["answers"]) | ({"judge": trial["reply"]} if trial.get("reply") else {})
        for name, text in texts.items():
            again = f" {number_of}" if len(row["trials"]) > 1 else ""
            yield html.Answer(f"{when} {name}{again}".strip(), facts, str(text))
