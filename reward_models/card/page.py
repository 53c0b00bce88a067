"""The report card as one HTML file that opens without a network, and its main numbers as lines of text.

Text from models and users is escaped. `plots` draws the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

from reward_models.card import disagreement, plots
from reward_models.card.lengths import decided
from reward_models.card.pairs import Numbers
from reward_models.card.sensitivity import PADDING
from reward_models.card.verdict import verdict
from rlhf.run import page as html
from rlhf.run.tables import number, percent, with_interval

BIAS = 0.1
"""A feature is listed as a bias if the model's and the labels' preference for it differ by more (share of pairs)."""
FLIPS, PADDING_CHANGE, MISCALIBRATED = 0.05, 0.01, 0.1
MATTERS = 50
"""With fewer pairs, a share is too uncertain for a warning."""
SEEN, NAMED = 0.02, 6
"""A length rule by group is told of where it gains more than the first; at most so many groups are named."""


def headlines(report: Numbers) -> list[str]:
    """Write the main numbers, a sentence each."""
    accuracy = with_interval(report, "accuracy")
    lines = [f"Right on {accuracy} of {_pairs(report)} of {report['prompts']:,} prompts; a coin gets 50%."]
    rule, chosen_on = report["length_rule"], report["length_rule_chosen_on"]
    gain = _points(report["over_length_rule"])
    length = with_interval(report, "length_baseline")
    lines.append(f"Always the {rule} response (rule chosen on {chosen_on}): {length}. The model's lead: {gain}.")
    words = report["bag_of_words"]
    if words:
        text = f"Bag of words trained on the same pairs: {with_interval(words, 'accuracy')}"
        lines.append(f"{text}. The model's lead: {_points(words)}.")
    else:
        lines.append("No bag of words to compare with: name the training data (--train_data).")
    for name, bench in _benches(report):
        sections = ", ".join(f"{section} {percent(value)}" for section, value in bench["sections"].items())
        lines.append(f"{name}: {percent(bench['mean'])} ({sections}).")
    for column, rule in report["length_by_group"].items():
        if rule["accuracy"] > report["length_baseline"] + SEEN:
            lead = f"The model's lead: {_points(rule)}"
            lines.append(f"The longer or the shorter by {column}: {with_interval(rule, 'accuracy')}. {lead}.")
    matched = report["surface"]["length_matched"]
    if matched:
        lines.append(f"Pairs of like length (within 10%): {with_interval(matched, 'accuracy')} of {matched['n']:,}.")
    calibration = report["calibration"]
    text = f"Calibration: its confidence is off by {100 * calibration['ece']:.1f} points on average (ECE)"
    if helps(calibration):
        fitted = 100 * calibration["calibrated"]["ece"]
        text += f", {fitted:.1f} with differences divided by {number(calibration['temperature'])}"
    lines.append(f"{text}.")
    return lines


def helps(calibration: Numbers) -> bool:
    """Return whether a temperature mends the probabilities of prompts that it was not fitted on: ECE and loss both."""
    if not calibration["temperature"]:
        return False
    fitted = calibration["calibrated"]
    return bool(fitted["ece"] < calibration["ece"] and fitted["nll"] < calibration["nll"])


def advice(report: Numbers) -> list[str]:
    """List what is wrong, or may be, and what to do about it."""
    found = []
    if report["accuracy_ci"][0] <= 0.5:
        found.append(
            "No better than a coin, as far as these pairs can tell: PPO would climb noise. Try more pairs, cleaner "
            "labels, another trunk or learning rate."
        )
    for name, lead in ((f"always taking the {report['length_rule']} response", report["over_length_rule"]),
                       ("a bag of words", report["bag_of_words"])):  # fmt: skip
        if lead and lead["difference_ci"][0] <= 0:
            found.append(f"Not clearly better than {name}: a lead of {_points(lead)}.")
    for column, rows in report["groups"].items():
        if by_length := decided(rows):
            names = [
                f"{row['name']} (the {row['length_rule']}: {with_interval(row, 'length_baseline')})"
                for row in by_length
            ]
            found.append(
                f"Length alone decides {len(names)} of {len(rows)} by {column}, where being right says little: "
                f"{', '.join(names[:NAMED])}{' ...' * (len(names) > NAMED)}."
            )
        lead = report["length_by_group"].get(column)
        if lead and lead["difference_ci"][0] <= 0 and lead["accuracy"] > report["length_baseline"] + SEEN:
            found.append(f"Not clearly better than the length rule of each {column}: a lead of {_points(lead)}.")
        bad = [row["name"] for row in rows if row["accuracy_ci"][1] < 0.5]
        if bad:
            found.append(f"Worse than a coin on {column}: {', '.join(bad)}.")
    found += _biases(report["surface"]["features"])
    calibration = report["calibration"]
    if calibration["ece"] > MISCALIBRATED:
        todo = f"; divide differences by {number(calibration['temperature'])}" if helps(calibration) else ""
        found.append(f"Confidence is off by {100 * calibration['ece']:.0f} points on average{todo}.")
    for row in (report["sensitivity"] or {"changes": []})["changes"]:
        if row["name"] == PADDING and row.get("mean_change", 0) > PADDING_CHANGE:
            found.append("Padding changes scores: the model reads tokens that the attention mask should hide.")
        elif row.get("flips", 0) > FLIPS:
            found.append(f"{row['name'][0].upper()}{row['name'][1:]} turns {percent(row['flips'])} of the pairs round.")
    if report["best_of_n"]:
        found += _over_optimised(report["best_of_n"])
    return found


def page(report: Numbers, links: Sequence[tuple[str, str]] = ()) -> str:
    """Write the whole page. report: what `reward_report` returns, with `about` (see `save_reward_report`);
    links: (label, path) of pages that belong to it."""
    about = report["about"]
    title = f"Report card of {about['reward_model']}"
    source = " · ".join(
        f"{name.replace('_', ' ')}: {value}" for name, value in about.items() if value and name != "made"
    )
    parts = [html.verdict(verdict(report)), html.links(links), html.note(source)]
    parts.append(html.items(headlines(report), "short"))
    if found := advice(report):
        parts.append(html.warning("Look at", found))
    sections = (
        _accuracy, _groups, _certainty, disagreement.section, _surface, _sensitivity, _best_of_n, _most_wrong, _made,
    )  # fmt: skip
    return html.page(title, "\n".join(filter(None, parts + [show(report) for show in sections])))


# ----------------------------------------------------------------------------------------------- sections


def _accuracy(report: Numbers) -> str:
    rows = [{**report, "name": "reward model"}]
    rule = {"accuracy": report["length_baseline"], "accuracy_ci": report["length_baseline_ci"], "n": report["n"]}
    rows.append({**rule, "name": f"always the {report['length_rule']} response"})
    if report["bag_of_words"]:
        rows.append({**report["bag_of_words"], "name": "bag of words"})
    left = [f"{report['responses']:,} responses in {report['rankings']:,} rows."]
    if report["ties_dropped"]:
        empty = f"{report['rankings_without_a_pair']:,} of {report['rankings']:,} rows hold nothing else"
        left.append(f"{report['ties_dropped']:,} ties (equal ranks or the same text) are left out; {empty}.")
    if report["equal_scores"]:
        left.append(f"{report['equal_scores']:,} pairs score the same and count half.")
    if report["auc"] is not None:
        left.append(
            f"A preferred response outscores a rejected one of any prompt in {percent(report['auc'])} of cases."
        )
    note = "Intervals are over prompts, leads are paired."
    plot = plots.forest(rows, _ends(report), first=1)
    body = f"<div class=wide>{plot}</div>{html.note(note)}{html.note(' '.join(left))}"
    return f"<h2>Accuracy</h2>{body}"


def _benches(report: Numbers) -> list[tuple[str, Numbers]]:
    benches = {"RewardBench": report["rewardbench"], "RewardBench 2": report.get("rewardbench2")}
    return [(name, bench) for name, bench in benches.items() if bench]


def _groups(report: Numbers) -> str:
    parts = []
    for name, rows in {**report["groups"], **report["labelers"]}.items():
        if rows:
            plot = plots.forest(rows, _ends(report))
            parts.append(f"<h3>by {html.text(name.replace('_', ' '))}</h3><div class=wide>{plot}</div>")
    for title, bench in _benches(report):
        table = [[name, percent(value)] for name, value in bench["sections"].items()]
        parts.append(
            f"<h3>{title}</h3>{html.table((['section', 'score'], [*table, ['mean', percent(bench['mean'])]]))}"
        )
    for heading, key, note in (
        (
            "by score difference",
            "by_margin",
            "It should rise: where the scores are further apart, the model should be right more often.",
        ),
        ("by length", "by_length_difference", "A model that is right on one side only goes by length."),
    ):
        plot = plots.forest(report[key], _ends(report))
        parts.append(f"<h3>{heading}</h3><div class=wide>{plot}</div>{html.note(note)}")
    return "<h2>Where it is right</h2>" + "".join(parts)


def _certainty(report: Numbers) -> str:
    numbers, spread, points = report["calibration"], report["spread"], report["points"]
    temperature = numbers["temperature"]  # shown even where it does not help, and said so
    columns = [("as it is", numbers)] + ([("with the temperature", numbers["calibrated"])] if temperature else [])
    coin = {"ece": "", "brier": "0.250", "nll": "0.693"}
    names = {"ece": "ECE (points)", "brier": "Brier score", "nll": "loss (nats)"}
    rows = [
        [label, *(f"{100 * c[key]:.1f}" if key == "ece" else f"{c[key]:.3f}" for _, c in columns), coin[key]]
        for key, label in names.items()
    ]
    fitted = numbers["calibrated"] if temperature else None
    curve = plots.reliability(numbers, fitted)
    histogram = plots.differences(points["difference_counts"], points["difference_edges"])
    found = "No temperature makes it better: it is right no more often than wrong, or never wrong."
    if temperature:
        found = "In the middle column each half of the prompts has the temperature that fits the other half best. "
        good = f"Divide score differences by {number(temperature)}, which fits all of these labels best."
        found += good if helps(numbers) else "It does not make ECE and loss both smaller: leave the scores as they are."
    share = spread["within_prompt_share"]
    lines = [
        f"Scores: mean {number(spread['mean'])}, standard deviation {number(spread['std'])}, "
        f"from {number(spread['quantiles']['0'])} to {number(spread['quantiles']['1'])}"
        + ("." if share is None else f"; {percent(share)} of the variance lies between responses to the same prompt."),
    ]
    if numbers["confidence_auc"] is not None:
        lines.append(f"A pair that it gets right has a wider margin than one that it gets wrong in "
                     f"{percent(numbers['confidence_auc'])} of cases (50%: margins carry no information).")  # fmt: skip
    figures = f"<div class=grid><figure>{curve}</figure><figure>{histogram}</figure></div>"
    table = html.table((["", *(name for name, _ in columns), "a coin"], rows))
    first = "The model claims to prefer a response with probability sigmoid(raw score difference)."
    return f"<h2>Calibration</h2>{html.note(first)}{figures}{table}{html.note(found)}" + "".join(map(html.note, lines))


def _surface(report: Numbers) -> str:
    features, points = report["surface"]["features"], report["points"]
    rows = [
        [row["feature"], number(row["spearman"]), percent(row["model_prefers_more"]),
         percent(row["labels_prefer_more"]), f"{row['n']:,}"]
        for row in features
    ]  # fmt: skip
    headers = ["more ...", "rank correlation with score", "model prefers it", "labels prefer it", "pairs"]
    table = html.table((headers, rows))
    matched = report["surface"]["length_matched"]
    text = "No pair has responses of like length (within 10%)."
    if matched:
        text = f"On the {matched['n']:,} pairs of like length (within 10%): {with_interval(matched, 'accuracy')} right."
    note = html.note(
        f"Over pairs that differ in the feature. A model far above its labels rewards the feature itself. {text}"
    )
    scatter = plots.score_and_length(points["characters"], points["scores"])
    return (
        f"<h2>Surface features</h2><div class=wide>{plots.preferences(features)}</div>{note}"
        f"<div class=grid><figure>{scatter}</figure><div>{table}</div></div>"
    )


def _sensitivity(report: Numbers) -> str:
    if not report["sensitivity"]:
        return ""
    rows = []
    for row in report["sensitivity"]["changes"]:
        if "note" in row:
            rows.append([row["name"], f"not done: {row['note']}", "", "", ""])
        else:
            moved = [number(row[name]) for name in ("mean_change", "max_change")]
            rows.append([row["name"], *moved, percent(row["flips"]), f"{row['pairs']:,}"])
    table = html.table((["change", "mean move", "largest move", "pairs turned round", "pairs tried"], rows))
    note = "Changes that keep the meaning. Moves are in standard deviations of the score; all should be near 0."
    return f"<h2>Sensitivity to irrelevant changes</h2>{html.note(note)}{table}"


def _best_of_n(report: Numbers) -> str:
    curve = report["best_of_n"]
    heading = "<h2>Over-optimisation: best of n</h2>"
    if not curve:
        text = "Not measured: name a second model, trained on other data (--second_model)."
        return f"{heading}{html.note(text)}"
    rows = [
        [kind, number(row["n"]), f"{row['kl_nats']:.2f}", f"{row['proxy']:.2f}", f"{row['second']:.2f}"]
        for kind, key in (("a prompt's own responses", "per_prompt"), ("pool of all responses", "pool"))
        for row in curve[key]
    ]
    table = html.table((["best of", "n", "KL nats", "this model", "second model"], rows))
    second = curve["second_model"]
    note = (
        "The response that this model scores highest among n, and a second model's score of it. Where both climb, the "
        "second model confirms what this one rewards. Where the second levels off or falls, more optimisation raises "
        f"this model's score only. The second model is right on {with_interval(second, 'accuracy')} of the pairs. "
        f"Scores are in standard deviations; prompts with enough responses: {curve['per_prompt_prompts']:,}. The pool "
        "subtracts each prompt's mean and ignores which prompt a response answers."
    )
    return f"{heading}<div class=wide>{plots.best_of_n(curve)}</div>{html.note(note)}{table}"


def _most_wrong(report: Numbers) -> str:
    cards = []
    for row in report["most_wrong"]:
        turns = row["prompt"]
        asked = turns[-1]["content"] if len(turns) == 1 else "\n\n".join(f"{t['role']}: {t['content']}" for t in turns)
        answers = [
            html.Answer(label, f"score {row[f'score_{key}']:.2f}", row[key])
            for label, key in (("Labels prefer", "preferred"), ("Model prefers", "rejected"))
        ]
        cards.append(html.compared(asked, answers))
    found = "".join(cards) or html.note("None: every pair is right.")
    note = "The widest margins on the wrong side, at most one per prompt. Wrong labels show here too."
    return f"<h2>Most confidently wrong</h2>{html.note(note) if cards else ''}{found}"


# ------------------------------------------------------------------------------------------------- pieces


def _made(report: Numbers) -> str:
    rows = [[name, value] for name, value in report["about"].get("made", {}).items() if value]
    return f"<h2>How it was made</h2>{html.table((['', ''], rows))}" if rows else ""


def _ends(report: Numbers) -> tuple[float, float]:
    groups = [row for rows in (*report["groups"].values(), *report["labelers"].values()) for row in rows]
    return plots.limits([report, *groups, *report["by_margin"], *report["by_length_difference"]])


def _biases(features: Sequence[Numbers]) -> list[str]:
    lines = []
    for row in features:
        if row["model_prefers_more"] is None or row["n"] < MATTERS:
            continue
        gap = row["model_prefers_more"] - row["labels_prefer_more"]
        if abs(gap) > BIAS:
            more, side = ("more", 1) if gap > 0 else ("fewer", -1)
            model, labels = (
                percent(share if side > 0 else 1 - share)
                for share in (row["model_prefers_more"], row["labels_prefer_more"])
            )
            lines.append(f"Prefers {more} {row['feature']} in {model} of the pairs, the labels in {labels}.")
    return lines


def _over_optimised(curve: Numbers) -> list[str]:
    rows = max(curve["per_prompt"], curve["pool"], key=len)
    best = max(rows, key=lambda row: row["second"])
    if best is rows[-1]:
        return []
    return [f"The second model's score peaks at best of {best['n']} and falls after: stop early, raise kl_coef."]


def _points(lead: Numbers) -> str:
    low, high = (f"{100 * bound:+.1f}" for bound in lead["difference_ci"])
    return f"{100 * lead['difference']:+.1f} [{low}, {high}] points"


def _pairs(report: Numbers) -> str:
    return f"{report['n']:,} held-out pairs"
