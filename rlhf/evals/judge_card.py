"""A judge's report card: its verdicts against people's on the same pairs.

Kappa comes first: agreement alone is high wherever one answer is usual. Beside it stands what people reach among
themselves, where several judged a pair; no judge can be asked for more.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rlhf.errors import InputError
from rlhf.evals.judge import Judge, Metrics, Pair, Verdict, longer, measured, position_bias
from rlhf.intervals import Estimate, by_chance, clustered_mean, paired_difference
from rlhf.rows.records import Ranking, prompt_key
from rlhf.run import page as html

Entry = dict[str, Any]

CATEGORIES = ("category", "subset", "section", "family", "task", "domain", "topic", "source", "dataset", "language")
"""Columns by which the card is split where the data has them."""
MOST_GROUPS = 40


@dataclass(frozen=True)
class Labelled:
    """A pair with people's labels of it: 1 where the first response is better, 0 the second, 0.5 a tie."""

    pair: Pair
    labels: tuple[float, ...]


def labelled_pairs(rankings: Sequence[Ranking], models_column: str = "models") -> list[Labelled]:
    """Return every pair of different responses with its labels, those of several rankings together, in the order in
    which the pairs first appear. A column that lists a model per response is cut to the pair's two."""
    pairs: dict[tuple[str, frozenset[str]], tuple[Pair, list[float]]] = {}
    for ranking in rankings:
        models = ranking.columns.get(models_column)
        fits = isinstance(models, list | tuple) and len(models) == len(ranking.responses)
        for i, j in combinations(range(len(ranking.responses)), 2):
            first, second = ranking.responses[i], ranking.responses[j]
            if first == second:
                continue
            columns = ranking.columns | ({models_column: [models[i], models[j]]} if fits and models else {})
            pair = Pair(ranking.prompt, first, second, columns)
            kept, labels = pairs.setdefault((prompt_key(pair.prompt), frozenset((first, second))), (pair, []))
            better, worse = (i, j) if kept.first == first else (j, i)
            ranks = ranking.ranks[better], ranking.ranks[worse]
            labels.append(0.5 if ranks[0] == ranks[1] else float(ranks[0] < ranks[1]))
    return [Labelled(pair, tuple(labels)) for pair, labels in pairs.values()]


def kappa(decisions: Sequence[float], labels: Sequence[float], keys: Sequence[Hashable]) -> tuple[Estimate, Estimate]:
    """Compute Cohen's kappa of two raters' decisions (1, 0.5, 0) on pairs, and their agreement, over prompts.

    Which response of a pair stands first means nothing, so every pair counts in both orders. With a the agreement, and
    t and t' the raters' shares of ties, chance agrees on ``c = (1 - t) (1 - t') / 2 + t t'``, and
    ``kappa = (a - c) / (1 - c)``. The interval is the agreement's, carried through this with c as it is (Cohen 1960).
    """
    agreement = clustered_mean([float(one == other) for one, other in zip(decisions, labels, strict=True)], keys)
    ties = [sum(value == 0.5 for value in of) / len(of) for of in (decisions, labels)]
    chance = (1 - ties[0]) * (1 - ties[1]) / 2 + ties[0] * ties[1]
    if chance > 1 - 1e-12:  # both call everything a tie
        return Estimate(0.0, -1.0, 1.0), agreement
    return Estimate(*((bound - chance) / (1 - chance) for bound in agreement)), agreement


def judge_card(
    judge: Judge,
    labelled: Sequence[Labelled],
    *,
    own_model: str | None = None,
    models_column: str = "models",
    group_by: Sequence[str] | None = None,
) -> Entry:
    """Ask a judge about every pair and measure it against the labels.

    `verdicts` has a row per pair. own_model: the judge's own model, where some responses are its own: the card then
    says how much further than people it goes to them. group_by: columns to split by; default: `CATEGORIES`. Raises
    InputError where there is nothing to compare.
    """
    if not labelled:
        raise InputError("labels: no pair of different responses; hand in rankings with two responses or more")
    columns = _grouping([row.pair for row in labelled], group_by)
    if own_model is not None and all(_mine(row.pair, own_model, models_column) is None for row in labelled):
        raise InputError(
            f"own_model={own_model}: no pair has one response of it and one of another model; the column "
            f"{models_column!r} lists a model for each response"
        )
    started = time.perf_counter()
    verdicts = judge.compare([row.pair for row in labelled])
    seconds = time.perf_counter() - started
    there = [(row, verdict) for row, verdict in zip(labelled, verdicts, strict=True) if verdict.win is not None]
    if not there:
        raise InputError(f"judge: abstains from all {len(labelled)} pairs; does the model answer with a letter?")
    metrics = _against_people(there)
    abstained = [float(verdict.win is None) for verdict in verdicts]
    metrics["abstentions"] = measured(clustered_mean(abstained, [row.pair.key for row in labelled]), len(labelled))
    if own_model is not None and (own := _self_preference(there, own_model, models_column)) is not None:
        metrics["self_preference"] = own
    spent = judge.spent
    together = [verdict.together for _, verdict in there if verdict.together is not None]
    return {
        "metrics": metrics,
        "pairs": len(labelled),
        "labels": sum(len(row.labels) for row in labelled),
        "prompts": len({prompt_key(row.pair.prompt) for row in labelled}),
        "together": sum(together) / len(together) if together else None,
        "groups": {name: _groups(there, name) for name in columns},
        "cost": {
            "calls": spent.calls, "calls_per_pair": spent.calls / len(labelled), "tokens": spent.tokens,
            "seconds": seconds, "seconds_per_pair": seconds / len(labelled),
        },
        "disagreements": _disagreements(there),
        "verdicts": [_row(row, verdict) for row, verdict in zip(labelled, verdicts, strict=True)],
    }  # fmt: skip


def _row(row: Labelled, verdict: Verdict) -> Entry:
    pair = row.pair
    return {"prompt": pair.prompt, "first": pair.first, "second": pair.second, "labels": row.labels, **vars(verdict)}


def _votes(there: Sequence[tuple[Labelled, Verdict]]) -> tuple[list[float], list[float], list[Hashable]]:
    """Return a decision, a label and a prompt for each label."""
    rows = [(verdict.decision or 0.0, label, row.pair.key) for row, verdict in there for label in row.labels]
    decisions, labels, keys = zip(*rows, strict=True)
    return list(decisions), list(labels), list(keys)


def _against_people(there: Sequence[tuple[Labelled, Verdict]]) -> Metrics:
    decisions, labels, keys = _votes(there)
    agrees, agreement = kappa(decisions, labels, keys)
    metrics = {"kappa": measured(agrees, len(labels)), "agreement": measured(agreement, len(labels))}
    decided = [number for number, label in enumerate(labels) if label != 0.5]
    if decided:
        right = [0.5 if decisions[n] == 0.5 else float(decisions[n] == labels[n]) for n in decided]
        metrics["accuracy"] = measured(clustered_mean(right, [keys[n] for n in decided]), len(decided))
    twice = [(one, other, row.pair.key) for row, _ in there for one, other in combinations(row.labels, 2)]
    if twice:
        one, other, theirs = (list(column) for column in zip(*twice, strict=True))
        among, same = kappa(one, other, theirs)
        metrics |= {"human_kappa": measured(among, len(twice)), "human_agreement": measured(same, len(twice))}
    pairs = [row.pair.key for row, _ in there]
    given = [verdict for _, verdict in there]
    metrics["ties"] = measured(clustered_mean([float(v.decision == 0.5) for v in given], pairs), len(given))
    if any(verdict.together is not None for verdict in given):
        flips = clustered_mean([float(v.flipped) for v in given], pairs)
        metrics["flip_rate"] = measured(flips, len(given))
        metrics["position_bias"] = measured(position_bias(given, pairs), len(given))
    return metrics | _length(there)


def _length(there: Sequence[tuple[Labelled, Verdict]]) -> Metrics:
    """Compute how often people and the judge prefer the longer response, and how much more often the judge does."""
    rows = [(v.win or 0.0, _mean(r.labels), (len(r.pair.first), len(r.pair.second)), r.pair.key)
            for r, v in there if len(r.pair.first) != len(r.pair.second)]  # fmt: skip
    if not rows:
        return {}
    wins, labels, lengths, keys = (list(column) for column in zip(*rows, strict=True))
    judged, people = longer(wins, lengths), longer(labels, lengths)
    return {
        "longer_preferred": measured(clustered_mean(judged, keys), len(rows)),
        "longer_preferred_by_people": measured(clustered_mean(people, keys), len(rows)),
        "length_bias": measured(paired_difference(judged, people, keys), len(rows)),
    }


def _mine(pair: Pair, own: str, column: str) -> bool | None:
    """Return whether a pair's first response is of the model `own`; None where both or none are, or nothing says."""
    models = pair.columns.get(column)
    if not isinstance(models, list | tuple) or len(models) != 2 or (models[0] == own) == (models[1] == own):
        return None
    return bool(models[0] == own)


def _self_preference(there: Sequence[tuple[Labelled, Verdict]], own: str, column: str) -> dict[str, float | int] | None:
    """Compute how much more often than people the judge prefers its own model's response to another's."""
    judged, people, keys = [], [], []
    for row, verdict in there:
        mine = _mine(row.pair, own, column)
        if mine is not None:
            judged.append(float(verdict.win or 0.0) if mine else 1.0 - float(verdict.win or 0.0))
            people.append(_mean(row.labels) if mine else 1.0 - _mean(row.labels))
            keys.append(row.pair.key)
    return measured(paired_difference(judged, people, keys), len(keys)) if keys else None


def _grouping(pairs: Sequence[Pair], wanted: Sequence[str] | None) -> list[str]:
    """Return the columns to split by: those wanted, or the usual ones that have more than one value here."""
    known = {name for pair in pairs for name in pair.columns}
    for name in wanted or ():
        if name not in known:
            there = ", ".join(sorted(known)) or "none"
            raise InputError(f"group_by: the labels have no column {name!r}; columns: {there}")
    if wanted is not None:
        return list(wanted)
    return [name for name in CATEGORIES if len({str(pair.columns[name]) for pair in pairs if name in pair.columns}) > 1]


def _groups(there: Sequence[tuple[Labelled, Verdict]], name: str) -> list[Entry]:
    """Compute kappa, agreement and n per value of a column, the largest groups first."""
    members: dict[str, list[tuple[Labelled, Verdict]]] = {}
    for row, verdict in there:
        if row.pair.columns.get(name) is not None:
            members.setdefault(str(row.pair.columns[name]), []).append((row, verdict))
    largest = sorted(members, key=lambda value: (-len(members[value]), value))[:MOST_GROUPS]
    return [_group(value, members[value]) for value in largest]


def _group(value: str, members: Sequence[tuple[Labelled, Verdict]]) -> Entry:
    decisions, labels, keys = _votes(members)
    agrees, agreement = kappa(decisions, labels, keys)
    count = len(labels)
    return {"name": value, "kappa": measured(agrees, count), "agreement": measured(agreement, count)}


def _disagreements(there: Sequence[tuple[Labelled, Verdict]], most: int = 20) -> list[Entry]:
    """Return pairs on which judge and people are furthest apart, at most one per prompt."""
    rows: dict[str, tuple[float, Labelled, Verdict]] = {}
    for row, verdict in there:
        win = verdict.win if verdict.share is None else verdict.share
        apart = abs((win or 0.0) - _mean(row.labels))
        if apart > 0.5 and apart > rows.get(key := prompt_key(row.pair.prompt), (0.0,))[0]:
            rows[key] = (apart, row, verdict)
    worst = sorted(rows.values(), key=lambda found: -found[0])[:most]
    return [
        {
            "prompt": row.pair.prompt, "first": row.pair.first, "second": row.pair.second,
            "judge": verdict.win if verdict.share is None else verdict.share, "people": _mean(row.labels),
        }
        for _, row, verdict in worst
    ]  # fmt: skip


def headline(card: Mapping[str, Any]) -> str:
    """Write what a card comes to in a sentence."""
    found = card["metrics"]
    text = f"kappa {shown(found['kappa'])} against people"
    if "human_kappa" in found:
        text += f"; people among themselves {shown(found['human_kappa'])}"
    if found["kappa"]["low"] <= 0:
        text += "; no better than chance, as far as these labels tell"
    return text


def shown(metric: Mapping[str, float]) -> str:
    """Write a metric with its interval, in two digits."""
    return f"{metric['value']:.2f} [{metric['low']:.2f}, {metric['high']:.2f}]"


def _mean(labels: Sequence[float]) -> float:
    return sum(labels) / len(labels)


# ------------------------------------------------------------------------------------------------------ the page

NAMES = {
    "kappa": "kappa against people", "human_kappa": "kappa of people among themselves",
    "agreement": "agreement with people", "human_agreement": "agreement of people among themselves",
    "accuracy": "right, where people decided (its ties count half)", "flip_rate": "pairs whose orders contradict",
    "position_bias": "first place preferred beyond half", "longer_preferred": "longer response preferred",
    "longer_preferred_by_people": "longer response preferred by people",
    "length_bias": "longer response preferred beyond people",
    "self_preference": "own model preferred beyond people", "ties": "ties", "abstentions": "abstentions",
}  # fmt: skip


def rows(metrics: Metrics) -> html.Table:
    """Return the table of a card's numbers, kappa first."""
    known = [name for name in NAMES if name in metrics]
    return ["measure", "value", "n"], [[NAMES[name], shown(metrics[name]), f"{metrics[name]['n']:,}"] for name in known]


def page(card: Entry) -> str:
    """Write the card's page."""
    about, cost = card["about"], card["cost"]
    tokens = "tokens unknown" if cost["tokens"] is None else f"{cost['tokens']:,} tokens"
    facts = [
        f"Judge: {about['judge']}" + (f", template {about['template']}" if about.get("template") else ""),
        f"{card['pairs']:,} pairs of {card['prompts']:,} prompts with {card['labels']:,} labels ({about['human']})",
        f"Cost: {cost['calls']:,} calls ({cost['calls_per_pair']:.1f} a pair), {tokens}, {cost['seconds']:.0f} s",
        "Intervals are 95% and over prompts. Both orders of a pair are asked; where they contradict each other, the "
        "verdict is a tie. An answer outside the format is an abstention and left out of everything else.",
    ]
    parts = [html.verdict(headline(card)), *map(html.note, facts), html.table(rows(card["metrics"]), "headline")]
    if card["together"] is not None:
        parts.append(
            html.note(f"Probability that the template's letters had together, on average: {card['together']:.2f}")
        )
    for name, groups in card["groups"].items():
        content = [[g["name"], shown(g["kappa"]), shown(g["agreement"]), f"{g['kappa']['n']:,}"] for g in groups]
        parts += [f"<h2>By {html.text(name)}</h2>", html.table(([name, "kappa", "agreement", "labels"], content))]
        if len(groups) > 1:
            parts.append(html.note(by_chance(len(groups))))
    if card["disagreements"]:
        parts.append("<h2>Where judge and people are furthest apart</h2>")
    for row in card["disagreements"]:
        answers = [
            html.Answer("first", f"people {row['people']:.2f}, judge {row['judge']:.2f}", row["first"]),
            html.Answer("second", f"people {1 - row['people']:.2f}, judge {1 - row['judge']:.2f}", row["second"]),
        ]
        prompt = "\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
        parts.append(html.compared(prompt, answers))
    return html.page("Judge card", "\n".join(parts))
