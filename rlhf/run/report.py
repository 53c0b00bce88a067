"""A run's report: report.html (one file, no network: tables, curves, samples) and a short report.md.

Both are made from the content of ``summary.json``, ``ppo/metrics.jsonl`` and ``evaluation/samples.jsonl``. Parts that a
run doesn't have are left out. Text from models and users is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import InputError
from rlhf.metrics import METRICS, left_healthy_range, read_metrics
from rlhf.run import page as html
from rlhf.run.page import FIRST, INK, SECOND, Table, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Json = Mapping[str, Any]
"""An object of summary.json or samples.jsonl."""

CURVES = ("score", "kl_nats", "entropy_nats", "clip_fraction", "response_tokens", "explained_variance")
FROM_ZERO = ("kl_nats", "entropy_nats", "clip_fraction", "response_tokens")
SAMPLES = 12


def write_report(run_folder: str | Path, summary: Json) -> Path:
    """Write ``report.html`` and ``report.md`` into ``run_folder``; return the path of ``report.html``."""
    folder = Path(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = folder / "ppo" / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    title = f"RLHF run {folder.resolve().name}"
    advice = left_healthy_range(rows)
    samples = _read_samples(folder / "evaluation" / "samples.jsonl")
    (folder / "report.md").write_text(_markdown(title, summary, advice), encoding="utf-8")
    path = folder / "report.html"
    path.write_text(_page(title, summary, rows, advice, samples), encoding="utf-8")
    return path


# ---------------------------------------------------------------- numbers as text


def headline(summary: Json) -> Table:
    """Make the table of the policies' evaluations, a row per policy, without columns that no policy has."""
    columns: list[tuple[str, Callable[[Json], str]]] = [
        ("score", lambda entry: number(entry.get("score"))),
        ("gold score", lambda entry: number(entry.get("gold_score"))),
        ("win rate vs SFT", lambda entry: with_interval(entry, "win_rate_vs_sft", "win_rate_ci")),
        ("vs best-of-n", lambda entry: with_interval(entry, "win_rate_vs_best_of_n")),
        ("KL nats", lambda entry: number(entry.get("kl_nats"))),
        ("tokens", lambda entry: number(entry.get("response_tokens"))),
        ("EOS rate", lambda entry: percent(entry.get("eos_rate"))),
    ]
    policies = _policies(summary)
    table = [[_label(name, entry), *(show(entry) for _, show in columns)] for name, entry in policies.items()]
    return _without_empty(["policy", *(name for name, _ in columns)], table)


def notes(summary: Json) -> list[str]:
    """Write lines about the judge and its accuracy, the reward model's accuracy, and the time taken."""
    lines = []
    judge = _evaluation(summary).get("judge")
    if judge:
        kind = {"gold": "gold score", "reward_model": "reward model that PPO never saw"}
        text = f"Judge: {kind.get(judge.get('kind'), judge.get('kind') or '')}"
        text += f" ({judge['name']})" if judge.get("name") else ""
        if judge.get("accuracy") is not None:
            text += f", right on {with_interval(judge, 'accuracy')} of held-out pairs"
        lines.append(text + ". Ties count half.")
    model = summary.get("stages", {}).get("reward_model", {})
    if model.get("accuracy") is not None:
        pairs = f" of {model['n']:,} held-out pairs" if model.get("n") else " of held-out pairs"
        text = f"Reward model: right on {with_interval(model, 'accuracy')}{pairs}"
        if model.get("length_baseline") is not None:
            rule = model.get("length_rule", "longer")
            text += f"; always taking the {rule} response: {with_interval(model, 'length_baseline')}"
        if model.get("gold_accuracy") is not None:
            text += f"; against the gold score's sign: {with_interval(model, 'gold_accuracy')}"
        lines.append(f"{text}.")
    seconds = summary.get("seconds", {})
    if seconds:
        parts = [f"{stage} {_time(value)}" for stage, value in seconds.items()]
        lines.append(f"Time: {_time(sum(seconds.values()))} ({', '.join(parts)}).")
    return lines


def stage_results(summary: Json) -> Table:
    """Make the table of all numbers in the summary's stages, a row per stage."""
    rows = []
    for stage, result in summary.get("stages", {}).items():
        shown = [
            f"{_words(name)} {with_interval(result, name)}"
            for name, value in result.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        if shown:
            rows.append([_words(stage), " · ".join(shown)])
    return ["stage", "results"], rows


def gold_parts(summary: Json) -> Table:
    """Make the table of the mean of each part of the gold score, a column per policy."""
    policies = {name: entry for name, entry in _policies(summary).items() if entry.get("gold_parts")}
    parts = list(dict.fromkeys(part for entry in policies.values() for part in entry["gold_parts"]))
    columns = [entry["gold_parts"] for entry in policies.values()]
    rows = [[_words(part), *(number(column.get(part)) for column in columns)] for part in parts]
    return ["part of the gold score", *(_label(name, entry) for name, entry in policies.items())], rows


def families(summary: Json) -> Table:
    """Make the table that compares SFT and PPO, a row per family of prompts."""
    policies = _policies(summary)
    before, after = (policies.get(name, {}).get("families", {}) for name in ("sft", "ppo"))
    gold = any(entry.get("gold_score") is not None for entry in after.values())
    measure, word = ("gold_score", "gold") if gold else ("score", "score")
    headers = ["family", "prompts", f"{word} SFT", f"{word} PPO", "win rate", "refusals SFT", "refusals PPO"]
    rows = []
    for family, entry in after.items():
        old = before.get(family, {})
        scores = [number(old.get(measure)), number(entry.get(measure))]
        refusals = [percent(old.get("refusal_rate")), percent(entry.get("refusal_rate"))]
        won = percent(entry.get("win_rate_vs_sft"))
        rows.append([family, number(entry.get("n")), *scores, won, *refusals])
    return _without_empty(headers, rows)


def number(value: float | None) -> str:
    """Write a number in few digits; "" for None."""
    if value is None:
        return ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def percent(value: float | None) -> str:
    """Write a share as a percentage; "" for None."""
    return "" if value is None else f"{100 * value:.1f}%"


def with_interval(entry: Json, name: str, interval: str | None = None) -> str:
    """Write a value, with its interval where there is one; shares as percentages."""
    value, bounds = entry.get(name), entry.get(interval or f"{name}_ci")
    if value is None:
        return ""
    shares = ("win_rate", "eos_rate", "refusal_rate", "accuracy", "baseline")
    show = percent if any(word in name for word in shares) else number
    low, high = (show(bound).removesuffix("%") for bound in bounds) if bounds else ("", "")
    return f"{show(value)} [{low}, {high}]" if bounds else show(value)


def _without_empty(headers: list[str], rows: list[list[str]]) -> Table:
    used = [column for column in range(len(headers)) if column == 0 or any(row[column] for row in rows)]
    return [headers[column] for column in used], [[row[column] for column in used] for row in rows]


def _evaluation(summary: Json) -> Json:
    return dict(summary.get("evaluation") or {})


def _policies(summary: Json) -> dict[str, Json]:
    entries = _evaluation(summary)
    return {name: entry for name, entry in entries.items() if name != "judge" and isinstance(entry, Mapping)}


def _label(name: str, entry: Json) -> str:
    if name == "best_of_n":
        return f"best of {entry['n']}" if entry.get("n") else "best of n"
    return {"sft": "SFT", "ppo": "PPO"}.get(name, name)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _read_samples(path: Path) -> list[Json]:
    """Read some rows of samples.jsonl, taking the families in turn."""
    if not path.exists():
        return []
    by_family: dict[str, list[Json]] = {}
    for line_number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{line_number}: broken JSON: {error}") from None
        by_family.setdefault(str(row.get("family", "")), []).append(row)
    longest = max(map(len, by_family.values()), default=0)
    turns = [rows[turn] for turn in range(longest) for rows in by_family.values() if turn < len(rows)]
    return turns[:SAMPLES]


# ---------------------------------------------------------------- report.md


def _markdown(title: str, summary: Json, advice: Sequence[str]) -> str:
    parts = [f"# {title}", _markdown_table(headline(summary))]
    parts.append("\n".join(f"- {line}" for line in notes(summary)))
    if advice:
        parts.append("## Look at these\n" + "\n".join(f"- {line}" for line in advice))
    for heading, table in (("Stages", stage_results(summary)), ("Gold score", gold_parts(summary)),
                           ("Families of prompts", families(summary))):  # fmt: skip
        if table[1]:
            parts.append(f"## {heading}\n{_markdown_table(table)}")
    parts.append("Curves and samples: report.html")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table) -> str:
    headers, rows = table
    if not rows:
        return ""
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---------------------------------------------------------------- report.html


def _page(
    title: str,
    summary: Json,
    rows: Sequence[Mapping[str, float]],
    advice: Sequence[str],
    samples: Sequence[Json],
) -> str:
    policies = headline(summary)
    sections = [html.table(policies, "headline") if policies[1] else html.note("No evaluation yet.")]
    sections += map(html.note, notes(summary))
    if advice:
        sections.append(html.warning("Outside the healthy range at the end", advice))
    if rows:
        curves = "".join(_curve(name, rows) for name in CURVES)
        sections.append(f"<h2>PPO, update by update</h2><div class=grid>{curves}</div>")
        sections.append(html.note("Dashed: the edge of the healthy range."))
        sections.append(f"<h2>Score against KL</h2><div class=wide>{_frontier(rows, summary)}</div>")
    for heading, content in (("Gold score", gold_parts(summary)), ("Families of prompts", families(summary)),
                             ("Stages", stage_results(summary))):  # fmt: skip
        if content[1]:
            sections.append(f"<h2>{heading}</h2>{html.table(content)}")
    if samples:
        sections.append("<h2>Samples before and after PPO</h2>" + "".join(map(_sample, samples)))
    return html.page(title, "\n".join(sections))


def _sample(row: Json) -> str:
    answers = []
    for name in ("sft", "ppo"):
        scores = {measure: row.get(f"{measure}_{name}") for measure in ("score", "gold_score", "judge_score")}
        facts = [f"{_words(measure)} {number(score)}" for measure, score in scores.items() if score is not None]
        answers.append(html.Answer(name.upper(), " · ".join(facts), str(row.get(name, ""))))
    return html.compared(str(row.get("prompt", "")), answers, str(row.get("family") or ""))


# ---------------------------------------------------------------- curves


def _curve(name: str, rows: Sequence[Mapping[str, float]]) -> str:
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    if not points:
        return ""
    metric = METRICS[name]

    def draw(axes: Axes) -> None:
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 40 else None
        axes.plot(steps, values, color=FIRST, linewidth=1.6, marker=marker, markersize=2.5, clip_on=False)
        axes.locator_params("x", integer=True)
        if name in FROM_ZERO:
            axes.set_ylim(bottom=min(0.0, *values))
        low, high = axes.get_ylim()
        for bound in (metric.healthy_low, metric.healthy_high):
            if bound is not None and low < bound < high:
                axes.axhline(bound, color=SECOND, linewidth=1, linestyle="--")
        axes.set_xlabel("update")

    unit = "" if metric.unit == name else html.text(metric.unit)
    caption = f"<figcaption><strong>{name}</strong> {unit}<br>{html.text(metric.meaning)}</figcaption>"
    return f"<figure>{svg(draw, 4.0, 2.4)}{caption}</figure>"


def _frontier(rows: Sequence[Mapping[str, float]], summary: Json) -> str:
    """Draw score against KL, a point per update, with SFT and best-of-n for comparison."""
    points = [
        (row["kl_nats"], row["score"])
        for row in rows
        if math.isfinite(row.get("kl_nats", math.nan)) and math.isfinite(row.get("score", math.nan))
    ]
    if not points:
        return ""

    def draw(axes: Axes) -> None:
        kl, score = zip(*points, strict=True)
        axes.plot(kl, score, color=FIRST, linewidth=1, alpha=0.5)
        axes.scatter(
            kl, score, s=16, label="PPO updates, darker is later",
            c=range(len(points)), cmap="Blues", edgecolors=FIRST, linewidths=0.6,
        )  # fmt: skip
        for (name, entry), marker in zip(_policies(summary).items(), "s^Dv*", strict=False):
            if entry.get("score") is not None and entry.get("kl_nats") is not None:
                label = f"{_label(name, entry)}, held out"
                at = [entry["kl_nats"]], [entry["score"]]
                axes.scatter(*at, color=SECOND, marker=marker, s=42, label=label)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
        axes.set_xlabel("KL to the reference (nats per response)")
        axes.set_ylabel("score")

    return svg(draw, 7.0, 3.6)
