"""What a policy server's log says of the policy in use: rates, lengths and thumbs against a reference, with alarms.

Only numbers leave the log: neither report nor page holds a text, which would outlive its retention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rlhf.errors import InputError
from rlhf.intervals import proportion
from rlhf.metrics import Metric
from rlhf.safety.drift import (
    Counted,
    RateChart,
    chance_limit,
    counts_in,
    edges_of,
    kolmogorov_smirnov,
    rate_chart,
    shares_apart,
)
from rlhf.safety.logged import Log, Request, mix_of

Numbers = dict[str, Any]

SIGNALS = {
    metric.name: metric
    for metric in (
        Metric("flag_rate", "share of answers", "answers that the moderator flags, each with its prompt", advice=(
            "what people ask or what the policy answers has changed: `rlhf label` the review queue, compare the "
            "policies' rates on the page, and red-team the newest one")),
        Metric("refusal_rate", "share of answers", "answers that refuse, in full or in part", advice=(
            "rising, the policy refuses what it answered before; falling, it answers what it refused: compare the "
            "policies' rates on the page, and ask an over-refusal suite")),
        Metric("thumbs_up_rate", "share of thumbs", "thumbs that are up", advice=(
            "people like the answers less: read their reasons and better answers, `rlhf collected status`")),
        Metric("length_psi", "nats", "population stability index of the answers' lengths", None, 0.25, (
            "answers have become shorter or longer: look at the policy, the system prompt and max_tokens"), 1),
        Metric("length_ks_p", "probability", "Kolmogorov-Smirnov test of the answers' lengths", advice=(
            "answers have become shorter or longer: look at the policy, the system prompt and max_tokens")),
    )
}  # fmt: skip
SHARES_OF_ALARMS = 6
"""Charts and tests that may alarm: each gets an equal part of `false_alarms`."""
BINS, KEPT_LENGTHS = 10, 1000


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When a change is told."""

    reference_requests: int = 500
    """The first answers of the log, that the others are compared with."""
    window: int = 200
    """Answers whose lengths are compared at a time."""
    factor: float = 4.0
    """The change of a rate's odds that is to be found soonest."""
    false_alarms: float = 0.02
    """Probability of any alarm in `horizon` quiet answers."""
    horizon: int = 2000
    seed: int = 0

    @property
    def each(self) -> float:
        """Return the part of `false_alarms` of one chart or test."""
        return self.false_alarms / SHARES_OF_ALARMS


# ------------------------------------------------------------------------------------------ the reference


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What answers were like: counts, and lengths. It holds no text, so it may be kept when the log has expired."""

    until: float
    """When its last answer was; later ones are compared with it."""
    last: str
    """That answer's id."""
    flagged: Counted | None
    refused: Counted
    thumbs_up: Counted
    lengths: list[float]
    mix: dict[str, int] = field(default_factory=dict)
    """Answers per policy, fingerprint and sampler."""
    read_by: Mapping[str, str] = field(default_factory=dict)
    """As in `Log`; an older reference has none, and is compared with everything."""

    def differs(self, log: Log, name: str) -> bool:
        """Return whether another source, moderator or function of refusals read the reference than the log."""
        before, now = self.read_by.get(name), log.read_by.get(name)
        return None not in (before, now) and before != now

    def to_json(self) -> Numbers:
        """Write what `from_json` reads."""
        return {**vars(self), "flagged": None if self.flagged is None else list(self.flagged),
                "refused": list(self.refused), "thumbs_up": list(self.thumbs_up),
                "read_by": dict(self.read_by)}  # fmt: skip

    @classmethod
    def from_json(cls, content: Any, where: str) -> Reference:
        """Read a reference. Raises InputError."""
        try:
            read: dict[str, Any] = {name: None if content[name] is None else Counted(*map(int, content[name]))
                    for name in ("flagged", "refused", "thumbs_up")}  # fmt: skip
            lengths, mix = [float(n) for n in content["lengths"]], {str(k): int(n) for k, n in content["mix"].items()}
            when, last = float(content["until"]), str(content["last"])
            read_by = {str(name): str(by) for name, by in content.get("read_by", {}).items()}
            made = cls(until=when, last=last, lengths=lengths, mix=mix, read_by=read_by, **read)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{where}: holds no reference; name a monitor.json of an earlier run") from None
        if not made.lengths or made.refused is None or made.thumbs_up is None:
            raise InputError(f"{where}: its reference is empty; name a monitor.json of an earlier run")
        return made


def reference_of(log: Log, rules: Rules) -> Reference:
    """Take the first answers of a log, and the thumbs until then, as reference. Raises InputError where it is short."""
    first = log.requests[: rules.reference_requests]
    if len(first) < rules.reference_requests:
        left = f" ({log.unscrubbed:,} may not: personal data were not looked for in them)" if log.unscrubbed else ""
        seen = f"{len(first)} answers may be read{left}, the reference needs {rules.reference_requests}"
        more = "log more (`rlhf serve_policy --log true`)"
        if log.read_by.get("source") == "playground":
            more = "wait until more people agree on the chat page (`rlhf serve_policy --store FILE`)"
        raise InputError(f"reference_requests: {seen}; {more}, or lower it")
    until = first[-1].created
    thumbs = [up for when, up in log.thumbs if when <= until]
    flags = [request.flagged for request in first if request.flagged is not None]
    step = max(1, -(-len(first) // KEPT_LENGTHS))
    mix: dict[str, int] = {}
    for request in first:
        mix[mix_of(request)] = mix.get(mix_of(request), 0) + 1
    return Reference(
        until=until, last=first[-1].id, flagged=Counted(sum(map(bool, flags)), len(flags)) if flags else None,
        refused=Counted(sum(request.refused for request in first), len(first)),
        thumbs_up=Counted(sum(thumbs), len(thumbs)), mix=mix, read_by=log.read_by,
        lengths=sorted(float(request.characters) for request in first)[::step],
    )  # fmt: skip


def after(log: Log, reference: Reference) -> list[Request]:
    """Return the answers behind the reference."""
    return [request for request in log.requests if (request.created, request.id) > (reference.until, reference.last)]


# ------------------------------------------------------------------------------------------ what has changed


@dataclass(frozen=True)
class Alarm:
    """A signal that has left what the reference leads one to expect."""

    signal: str
    at: int
    """The number of the answer (or thumb), counted from 1 behind the reference, at which it was told."""
    when: float
    value: float
    """Of a rate: since its chart was last at 0."""
    line: str


@dataclass(frozen=True)
class Watched:
    """A rate behind the reference: its chart, and the chart's path."""

    signal: str
    direction: Literal["rise", "fall"]
    chart: RateChart
    path: np.ndarray
    alarm: Alarm | None


def watched(log: Log, reference: Reference, rules: Rules) -> list[Watched]:
    """Run the charts of all rates over what came after the reference."""
    later = after(log, reference)
    thumbs = [(when, up) for when, up in log.thumbs if when > reference.until]
    when = [request.created for request in later]
    found = []
    judged = bool(later) and all(request.flagged is not None for request in later)
    if reference.flagged is not None and judged and not reference.differs(log, "moderator"):
        flags = np.array([bool(request.flagged) for request in later])
        found.append(_watch("flag_rate", "rise", reference.flagged, flags, when, rules))
    refused = np.array([request.refused for request in later], dtype=bool)
    for direction in () if reference.differs(log, "refusals") else ("rise", "fall"):
        found.append(_watch("refusal_rate", direction, reference.refused, refused, when, rules))
    if reference.thumbs_up.n:
        up = np.array([up for _, up in thumbs], dtype=bool)
        found.append(_watch("thumbs_up_rate", "fall", reference.thumbs_up, up, [when for when, _ in thumbs], rules))
    return found


def _watch(
    signal: str, direction: Any, reference: Counted, happened: np.ndarray, when: Sequence[float], rules: Rules
) -> Watched:
    factor = rules.factor if direction == "rise" else 1 / rules.factor
    chart = rate_chart(reference, factor, rules.each, rules.horizon, rules.seed)
    path, at, alarm = chart.path(happened), chart.first_alarm(happened), None
    if at is not None:
        since = int(np.flatnonzero(path[:at] == 0).max(initial=-1)) + 1  # what the alarm rests on
        value = float(happened[since : at + 1].mean())
        lower, higher = sorted((reference.happened / reference.n, chart.before))  # which a small reference has apart
        beyond, counted = ("above", lower) if direction == "rise" else ("below", higher)
        line = f"{signal}={value:.3g} is {beyond} {counted:.3g}, the reference's: {SIGNALS[signal].advice}"
        alarm = Alarm(signal, at + 1, when[at], value, line)
    return Watched(signal, direction, chart, path, alarm)


def windows(log: Log, reference: Reference, rules: Rules) -> tuple[list[Numbers], list[Alarm]]:
    """Compare windows of answers behind the reference with it: rates, lengths, and the mix of policies; a window that
    is not full yet is compared, and never alarms."""
    later = after(log, reference)
    lengths = np.array(reference.lengths)
    edges = edges_of(lengths, BINS)
    before, told, rows = counts_in(lengths, edges), set[str](), list[Numbers]()
    alarms: list[Alarm] = []
    each = rules.each * rules.window / rules.horizon
    for start in range(0, len(later), rules.window):
        part = later[start : start + rules.window]
        own = np.array([request.characters for request in part], dtype=np.float64)
        apart = kolmogorov_smirnov(lengths, own)
        psi = shares_apart(before, counts_in(own, edges))
        flags = [bool(request.flagged) for request in part if request.flagged is not None]
        rows.append({
            "first": start + 1, "answers": len(part), "until": part[-1].created,
            "median_characters": float(np.median(own)), "length_psi": psi, "length_ks": apart.distance,
            "length_ks_p": apart.p_value,
            "flag_rate": _share(flags), "refusal_rate": _share([request.refused for request in part]),
            "mix_psi": mix_psi(reference.mix, part),
        })  # fmt: skip
        if len(part) < rules.window:
            continue
        highest = max(
            float(SIGNALS["length_psi"].healthy_high or 0), chance_limit(len(lengths), len(part), len(before), each)
        )
        for signal, value, beyond, limit in (
            ("length_psi", psi, psi > highest, f"above {highest:.2g}"),
            ("length_ks_p", apart.p_value, apart.p_value < each, f"below {each:.2g}"),
        ):
            if beyond and signal not in told:
                told.add(signal)
                line = f"{signal}={value:.3g} is {limit}: {SIGNALS[signal].advice}"
                alarms.append(Alarm(signal, start + len(part), part[-1].created, value, line))
    return rows, alarms


def _share(happened: Sequence[bool]) -> Numbers | None:
    if not happened:
        return None
    share = proportion(sum(happened), len(happened))
    return {"value": share.value, "low": share.low, "high": share.high, "n": len(happened)}


def mix_psi(reference: dict[str, int], part: Sequence[Request]) -> float:
    """Compute the index of policies, fingerprints and samplers."""
    now: dict[str, int] = {}
    for request in part:
        now[mix_of(request)] = now.get(mix_of(request), 0) + 1
    names = sorted({*reference, *now})
    counts = [np.array([held.get(name, 0) for name in names]) for held in (reference, now)]
    return shares_apart(*counts)


def not_compared(log: Log, reference: Reference, rules: Rules) -> list[str]:
    """Return what could not be compared with the reference, and why, a line each."""
    later = after(log, reference)
    flagged = [request.flagged is not None for request in later]
    lines = []
    if any(flagged) and reference.flagged is None:
        lines.append("flag_rate: the reference was made without a moderator; make one with it, without --reference")
    if not all(flagged) and reference.flagged is not None:
        lines.append("flag_rate: the reference has one, and no moderator judged these answers; name --moderator")
    for signal, name in (("flag_rate", "moderator"), ("refusal_rate", "refusals")):
        if reference.differs(log, name):
            seen = f"the reference was made with another --{name}"
            lines.append(f"{signal}: {seen}; name that one, or make a reference without --reference")
    if not reference.thumbs_up.n and any(when > reference.until for when, _ in log.thumbs):
        lines.append("thumbs_up_rate: nobody gave a thumb in the time of the reference")
    if 0 < len(later) < rules.window:
        lines.append(f"lengths: {len(later):,} answers are not yet a window of {rules.window:,}")
    return lines


def monitor_report(log: Log, reference: Reference, rules: Rules) -> Numbers:
    """Compute everything on the page, as plain values."""
    charts = watched(log, reference, rules)
    rows, alarms = windows(log, reference, rules)
    alarms += [chart.alarm for chart in charts if chart.alarm is not None]
    later = after(log, reference)
    thumbs = [up for when, up in log.thumbs if when > reference.until]
    flags = [bool(request.flagged) for request in later if request.flagged is not None]
    return {
        "answers": len(later), "unscrubbed": log.unscrubbed, "expired": log.expired, "rules": vars(rules),
        "reference": reference.to_json(), "windows": rows, "policies": policies(log),
        "flag_rate": _share(flags), "refusal_rate": _share([request.refused for request in later]),
        "thumbs_up_rate": _share(thumbs), "categories": _categories(later),
        "median_characters": float(np.median([request.characters for request in later])) if later else None,
        "not_compared": not_compared(log, reference, rules),
        "charts": [
            {"signal": chart.signal, "direction": chart.direction, "before": chart.chart.before,
             "after": chart.chart.after, "level": chart.chart.level, "events": len(chart.path),
             "highest": float(chart.path.max(initial=0.0))}
            for chart in charts
        ],
        "alarms": [vars(alarm) for alarm in sorted(alarms, key=lambda alarm: alarm.when)],
    }  # fmt: skip


def _categories(requests: Sequence[Request]) -> dict[str, int]:
    """Count the answers that are flagged for each category, the most frequent first."""
    counts: dict[str, int] = {}
    for request in requests:
        for name in request.flagged or ():
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def metrics_of(report: Numbers) -> dict[str, Numbers]:
    """Return the report's main numbers as {name: {value, low, high, n}}; of windows, the last full one's."""
    found = {name: report[name] for name in ("flag_rate", "refusal_rate", "thumbs_up_rate") if report[name]}
    count = report["answers"]
    plain = {"median_characters": (report["median_characters"], count), "alarms": (len(report["alarms"]), count)}
    full = [row for row in report["windows"] if row["answers"] == report["rules"]["window"]]
    plain |= {name: (full[-1][name], full[-1]["answers"]) for name in ("length_psi", "mix_psi") if full}
    return found | {
        name: {"value": value, "low": None, "high": None, "n": n}
        for name, (value, n) in plain.items() if value is not None
    }  # fmt: skip


def policies(log: Log) -> list[Numbers]:
    """Count by policy, fingerprint and sampler, in the order of their first answers."""
    held: dict[str, list[Request]] = {}
    for request in log.requests:
        held.setdefault(mix_of(request), []).append(request)
    return [
        {
            "policy": own[0].policy, "fingerprint": own[0].fingerprint, "sampler": own[0].sampler, "answers": len(own),
            "first": own[0].created, "refusal_rate": _share([request.refused for request in own]),
            "flag_rate": _share([bool(request.flagged) for request in own if request.flagged is not None]),
            "median_characters": float(np.median([request.characters for request in own])),
        }
        for own in held.values()
    ]  # fmt: skip
