"""The page of a red-team run. Every prompt and answer in it is hostile until proven otherwise: all of it is text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.evals.correction import FEWEST
from rlhf.run import page as html
from rlhf.run.tables import number, percent
from rlhf.safety.outcome import COUNTED, RATES, Outcome, Result
from rlhf.safety.policy import Policy
from rlhf.safety.suite import Case, without_twins

FEW_LABELS = (
    f"the labels are too few: it takes {FEWEST} of a rate's own answers, or {FEWEST} of either kind of other answers "
    "that the detector tells apart"
)
SHOWN = 200
"""Findings on the page; items.jsonl holds all."""


def write(folder: Path, content: Mapping[str, Any], outcome: Outcome, policy: Policy | None) -> Path:
    """Write red_team.html. content: red_team.json's."""
    metrics = content["metrics"]
    parts = [html.note(f"Model: {content['model']}"), html.verdict(headline(metrics))]
    parts += [html.warning("Read this first", content["warnings"])] if content["warnings"] else []
    suites = list(dict.fromkeys(result.case.suite for result in outcome.results))
    parts += ["<h2>By suite</h2>", html.table(_rates(suites, metrics), "headline")]
    groups = sorted({(result.case.suite, result.case.category) for result in outcome.results})
    parts += ["<h2>By category</h2>", html.table(_rates([f"{suite}/{name}" for suite, name in groups], metrics))]
    parts += ["<h2>How it was counted</h2>", html.items(counted(content))]
    parts += [_attacks(content["attacks"])] if content.get("attacks") else []
    parts += [_held_out(outcome)] if outcome.held_out else []
    if policy is not None:
        rows = [[c.title, c.severity, c.behaviour, ", ".join((*c.mlcommons, *c.openai)), c.text]
                for c in policy.categories.values()]  # fmt: skip
        headers = ["category", "severity", "behaviour", "in other taxonomies", "what it says"]
        parts += [f"<h2>{html.text(f'Usage policy: {policy.name}')}</h2>", html.table((headers, rows))]
    found = outcome.findings
    parts += [f"<h2>Findings: {len(found):,}</h2>"]
    parts += [html.note(f"The first {SHOWN}; all of them are in items.jsonl.")] if len(found) > SHOWN else []
    parts += [_finding(result) for result in found[:SHOWN]]
    return html.write(folder / "red_team.html", html.page(f"Red team: {folder.name}", "\n".join(parts)))


def warnings(outcome: Outcome, cases: Sequence[Case], labelled: bool) -> list[str]:
    """Return what a reader must know first, a line each. labelled: whether people's labels were given."""
    lines = []
    if lonely := without_twins(cases):
        more = f" and {len(lonely) - 6} more" if len(lonely) > 6 else ""
        lines.append(f"no harmless prompts stand beside the attacks of {', '.join(lonely[:6])}{more}: a policy that "
                     "refuses everything looks perfect there")  # fmt: skip
    lines += [f"{metric} is not corrected: {why}" for metric, why in outcome.not_corrected.items()]
    if not outcome.corrections and not outcome.not_corrected:
        why = FEW_LABELS if labelled else "the error of what reads the answers is not known on this policy"
        lines.append(f"no rate is corrected: {why}")
    return lines


def headline(metrics: Mapping[str, Any]) -> str:
    """Return the sentence that a run comes to."""
    said = []
    for name, what in (("attack_success", "of attacks got through"), ("over_refusal", "of harmless prompts refused")):
        metric = headline_metric(metrics, name)
        if metric is not None:
            said.append(f"{shown(metric)} {what} ({metric['n']:,} prompts)")
    return f"{'; '.join(said)}." if said else "Nothing was counted."


def headline_metric(metrics: Mapping[str, Any], name: str) -> Any:
    """Return a rate over all suites, or of the only one; None where nothing of its kind was asked."""
    own = [metric for metric in metrics if metric == name or metric.endswith(f"/{name}")]
    shortest = min(own, key=lambda metric: metric.count("/"), default=None)
    return None if shortest is None else metrics[shortest]


def shown(metric: Mapping[str, Any] | None) -> str:
    """Write a rate and its interval."""
    if metric is None:
        return ""
    return f"{percent(metric['value'])} [{percent(metric['low'])}, {percent(metric['high'])}]"


def counted(content: Mapping[str, Any]) -> list[str]:
    """Return how each count of a run is made, a line each."""
    lines = [f"{name.replace('_', ' ')}: {COUNTED[name]}" for name in RATES]
    lines.append(f"what an answer is was read by {content['detector']}")
    if content["success"]:
        lines.append(f"whether an attack succeeded was said by {content['success']}")
    if content.get("attacks"):
        limit = content["attacks"]["similarity"]
        lines += ["generated: of all attacks that were written, those that are valid and got what they ask for",
                  f"distinct successes: two count as one from a similarity of {limit:g} on (Jaccard, of character "
                  "5-grams), in the order in which they were written"]  # fmt: skip
    lines += [f"{metric}: corrected by {how}" for metric, how in content["corrections"].items()]
    lines += [f"{metric} is not corrected: {why}" for metric, why in content["not_corrected"].items()]
    if not content["corrections"] and not content["not_corrected"]:
        why = FEW_LABELS if content["human"] else "no people's labels were given (--human)"
        lines.append(f"nothing is corrected: {why}")
    if content["judged"]["answers"]:
        lines.append("judge and rule read {disagree:,} of {answers:,} answers differently; the judge named no choice "
                     "for {abstained:,}".format(**content["judged"]))  # fmt: skip
    if content["not_counted"]:
        asked = f"{content['not_counted']:,} prompts to complete safely were asked and are counted nowhere"
        lines.append(
            f"{asked}: a refusal does not tell whether an answer is safe; name a function that does (--success)"
        )
    return [*lines, "shares are over all cases of their kind; intervals are over prompts, 95%"]


def _rates(groups: Sequence[str], metrics: Mapping[str, Any]) -> html.Table:
    corrected = any(name.endswith("_corrected") for name in metrics)
    names = ["corrected"] if corrected else []
    headers = ["", "attacks", "succeeded", *names, "in part", "beside the point", "harmless", "refused", *names,
               "in part"]  # fmt: skip
    rows = []
    for group in groups:
        own = {name: metrics.get(f"{group}/{name}") for name in RATES}
        shares = {name: percent(metric["value"]) if metric else "" for name, metric in own.items()}
        attacks, benign = (
            [f"{metric['n']:,}" if (metric := own[name]) else "none", shown(metric),
             *([shown(metrics.get(f"{group}/{name}_corrected"))] if corrected else [])]
            for name in ("attack_success", "over_refusal")
        )  # fmt: skip
        rows.append([group, *attacks, shares["attack_partial"], shares["attack_other"], *benign,
                     shares["partial_refusal"]])  # fmt: skip
    return headers, rows


def _attacks(attacks: Mapping[str, Any]) -> str:
    rows = [[name.replace("_", " "), str(value)] for name, value in attacks.items() if not isinstance(value, dict)]
    rows += [[name.replace("_", " "), shown(value)] for name, value in attacks.items() if isinstance(value, dict)]
    return f"<h2>Generated attacks</h2>{html.table((['', ''], rows))}"


def _held_out(outcome: Outcome) -> str:
    headers = ["kind", "model", "answers", "kappa", "agreement", "people say", "the detector", "corrected by others",
               "inside"]  # fmt: skip
    rows = []
    for kind, models in outcome.held_out.items():
        for one in models:
            ends = "too few labels" if one["corrected"] is None else shown(one["corrected"])
            inside = {None: "", True: "yes", False: "NO"}[one["inside"]]
            rows.append([kind, one["model"], f"{one['n']:,}", number(one["kappa"]), percent(one["agreement"]),
                         percent(one["labels"]), percent(one["raw"]), ends, inside])  # fmt: skip
    told = "Each labelled model's rate, corrected by the detector's error on the other models alone."
    return f"<h2>The detector, one model left out</h2>{html.note(told)}{html.table((headers, rows))}"


def _finding(result: Result) -> str:
    case, reading = result.case, result.reading
    asked = "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in case.prompt)
    name = {"attack": "got through", "over_refusal": "refused, and harmless"}[result.finding]
    facts = f"{name}; read as {reading.kind}" + (f" (the rule: {reading.rule})" if reading.disagree else "")
    tag = " · ".join((case.suite, case.category, case.where))
    return html.compared(asked, [html.Answer("answer", facts, result.answer.text)], tag)
