"""A process model's report card as one HTML file that opens without a network. All texts are inserted as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reward_models.card import plots
from reward_models.card.pairs import Numbers
from reward_models.card.report import made
from rlhf.intervals import needed
from rlhf.run import page as html
from rlhf.run.tables import number, percent, with_interval

PAGE = "process_report.html"
LABELS = {1: "right", 0: "neutral", -1: "wrong", None: "unknown"}


def save_process_report(report: Numbers, folder: str | Path, about: Mapping[str, str | None]) -> Path:
    """Write `process_report.html` into a folder and return its path. about: names for the page's header."""
    source = " · ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items() if value)
    parts = [html.verdict(verdict(report)), html.note(source)]
    parts += [section(report) for section in (_first_errors, _steps, _certainty, _solutions, _most_wrong, _made)]
    kind = "Process" if report["kind"] == "process" else "Outcome"
    title = f"{kind} report card of {about.get('process_model') or Path(folder).name}"
    return html.write(Path(folder) / PAGE, html.page(title, "\n".join(filter(None, parts))))


def verdict(report: Numbers) -> str:
    """Write what the model is better than, not told from, or worse than, in one or two sentences."""
    if report["kind"] == "outcome":
        found = report["outcomes"].get("last")
        if found is None:
            return "No held-out solution has a known outcome."
        share = max(report["outcomes"]["right_share"], 1 - report["outcomes"]["right_share"])
        facts = f"{with_interval(found, 'accuracy')} of {found['n']:,} held-out solutions"
        return f"Says rightly of {facts} whether they are right; always the more frequent answer: {percent(share)}."
    errors = report["first_errors"]
    if not errors["n"]:
        return f"Right on {with_interval(report['steps'], 'accuracy')} of {report['steps']['n']:,} labelled steps."
    leads = errors["against"]
    better = [name for name, lead in leads.items() if lead["difference_ci"][0] > 0]
    worse = [name for name, lead in leads.items() if lead["difference_ci"][1] < 0]
    facts = f"{with_interval(errors, 'accuracy')} of {errors['n']:,} held-out solutions"
    than = f": better than {_listed(better)}" if better else ""
    parts = [f"Finds the first error, or that there is none, in {facts}{than}."]
    if worse:
        parts.append(f"It is worse than {_listed(worse)}.")
    for name, lead in leads.items():
        if name not in better and name not in worse:
            count = needed(errors["n"], lead["difference"], 0.0, lead["difference_ci"])
            tell = f"about {count:,} solutions would tell" if count else "no lead to be seen"
            parts.append(f"Not told from {name!r} ({_points(lead)}; {tell}).")
    return " ".join(parts)


def _first_errors(report: Numbers) -> str:
    errors = report.get("first_errors")
    if not errors or not errors["n"]:
        return ""
    rows = [{**errors, "name": "process model"}, *errors["baselines"]]
    forest = plots.forest(rows, plots.limits(rows), first=1, of="first errors")
    table = [
        [row["name"], with_interval(row, "accuracy"), *(_part(row[part]) for part in ("wrong", "right")),
         "" if row["f1"] is None else percent(row["f1"]), _points(errors["against"][row["name"]]) if n else ""]
        for n, row in enumerate(rows)
    ]  # fmt: skip
    headers = ["", "all", "solutions with an error", "solutions without", "F1", "the model's lead"]
    text = (
        "The answer is the most probable index of the first wrong step, or none, by the steps' probabilities. F1 is "
        "the harmonic mean of the two kinds of solutions. Leads are paired over problems."
    )
    left = f"{errors['unknown']:,} solutions have an unknown step before any wrong one, or are alternatives of a step."
    note = html.note(text) + (html.note(left) if errors["unknown"] else "")
    return f"<h2>First errors</h2><div class=wide>{forest}</div>{html.table((headers, table))}{note}"


def _steps(report: Numbers) -> str:
    if "steps" not in report:
        return ""
    steps = report["steps"]
    right = f"{with_interval(steps, 'accuracy')} of {steps['n']:,} labelled steps"
    lines = [f"{right} (always right: {percent(steps['right_share'])}); a neutral step counts as right."]
    if steps["auc"] is not None:
        lines.append(f"A right step has a higher probability than a wrong one in {percent(steps['auc'])} of cases.")
    table = [
        [row["name"], f"{row['n']:,}", with_interval(row, "accuracy"), percent(row["wrong_share"]),
         number(row["mean_probability"])]
        for row in report["by_position"]
    ]  # fmt: skip
    headers = ["", "steps", "right", "wrong by the labels", "mean probability"]
    return f"<h2>Steps</h2>{html.items(lines, 'short')}<h3>by place</h3>{html.table((headers, table))}"


def _certainty(report: Numbers) -> str:
    if "calibration" not in report:
        return ""
    found = report["calibration"]
    low, high = (f"{100 * bound:.1f}" for bound in found["ece_ci"])
    text = f"Probabilities are off by {100 * found['ece']:.1f} [{low}, {high}] points on average (ECE); Brier score "
    text += f"{found['brier']:.3f}, loss {found['nll']:.3f} nats."
    return f"<h2>Calibration</h2>{html.note(text)}<figure>{plots.step_reliability(found['curve'])}</figure>"


def _solutions(report: Numbers) -> str:
    found = report["outcomes"]
    if not found["n"]:
        return ""
    names = {"min": "lowest step", "product": "product of the steps", "last": "last step"}
    names = {"last": "the solution"} if report["kind"] == "outcome" else names
    rows = [
        [label, with_interval(found[name], "accuracy"), percent(found[name]["auc"])] for name, label in names.items()
    ]
    note = f"{found['n']:,} solutions of known outcome, {percent(found['right_share'])} of them right."
    table = html.table((["scored by", "right at 0.5", "AUC"], rows))
    return f"<h2>Whole solutions</h2>{table}{html.note(note)}"


def _most_wrong(report: Numbers) -> str:
    cards = []
    for row in report.get("most_wrong", ()):
        asked = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
        steps = [
            f"{place}. [{percent(p)} right; label: {LABELS[label]}] {step}"
            for place, (step, label, p) in enumerate(
                zip(row["steps"], row["labels"], row["probabilities"], strict=True), start=1
            )
        ]
        cards.append(html.compared(asked, [html.Answer("Solution", "", "\n".join(steps))]))
    if not cards:
        return ""
    note = "The solutions with the labels that the model finds least probable, one per problem. Wrong labels show, too."
    return f"<h2>Most surely wrong</h2>{html.note(note)}{''.join(cards)}"


def _made(report: Numbers) -> str:
    return f"<h2>How it was made</h2>{html.table((['', ''], [[n, v] for n, v in made().items() if v]))}"


def _part(row: Numbers | None) -> str:
    return "" if row is None else f"{with_interval(row, 'accuracy')} of {row['n']:,}"


def _points(lead: Numbers) -> str:
    low, high = (f"{100 * bound:+.1f}" for bound in lead["difference_ci"])
    return f"{100 * lead['difference']:+.1f} [{low}, {high}] points"


def _listed(names: Sequence[str]) -> str:
    quoted = [repr(name) if name.startswith("always") else f"a {name}" for name in names]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), *quoted[-1:]]))
