"""What a store holds, and how far its annotators agree: `agreement`'s measures over one state of the store.

Every number comes with n; where there is too little to compute it from, the value is None and a note says why. Gold
items measure annotators, and count for nothing else.
"""

from __future__ import annotations

import sqlite3
import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from rlhf.collection import agreement as agree
from rlhf.collection import content, personal
from rlhf.collection.agreement import Compared, Ranked
from rlhf.collection.personal import Conversation, Feedback
from rlhf.collection.records import Annotator, Item, Judgment
from rlhf.collection.store import Store
from rlhf.intervals import Estimate, clustered_mean

Said = TypeVar("Said", Ranked, Judgment)


@dataclass(frozen=True)
class Measure:
    """A number with its 95% interval and how many values it is from."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Write it as the metrics of every command are written."""
        return {name: value for name, value in asdict(self).items() if name != "note" or value}


@dataclass(frozen=True)
class Snapshot:
    """One state of a store."""

    items: dict[int, Item]
    judgments: list[Judgment]
    """Those that no edit superseded, by item and annotator."""
    annotators: dict[str, Annotator]
    feedback: list[tuple[Feedback, Conversation]]
    """What may be used for training."""
    counts: dict[str, int]
    progress: dict[str, dict[str, int]]
    """Annotator -> state of their tasks -> how many."""

    def ranked(self, gold: bool = False) -> list[Ranked]:
        """Return the judgments with ranks: of the gold items, or of all others."""
        return [
            Ranked(said.item, said.annotator, said.ranks, said.order)
            for said in self.judgments
            if said.ranks is not None and (self.items[said.item].gold_ranks is not None) == gold
        ]


_COUNTS = {
    "edits": "SELECT count(*) FROM judgments WHERE supersedes IS NOT NULL",
    "skipped": "SELECT count(*) FROM assignments WHERE state = 'skipped'",
    "leased": "SELECT count(*) FROM assignments WHERE state = 'leased'",
    "open_places": "SELECT coalesce(sum(places), 0) FROM items WHERE line IN ('first', 'main')",
    "open_items": "SELECT count(*) FROM items WHERE line IN ('first', 'main') AND places > 0",
    "gold_items": "SELECT count(*) FROM items WHERE gold_ranks IS NOT NULL",
    "conversations": "SELECT count(*) FROM conversations",
    "feedback": "SELECT count(*) FROM feedback",
}


def snapshot(store: Store) -> Snapshot:
    """Read a store's items, judgments, annotators and usable feedback, all of one moment."""
    now = store.clock()
    with store.reading() as db:
        talks = {talk.id: talk for talk in personal.conversations(db, now, usable=True)}
        said = [(one, talks[str(one.conversation)]) for one in personal.feedback(db, now, usable=True)]
        return Snapshot(
            {item.id: item for item in content.items(db)},
            list(content.judgments(db, superseded=False)),
            {annotator.name: annotator for annotator in content.annotators(db)},
            said,
            {name: db.execute(query).fetchone()[0] for name, query in _COUNTS.items()},
            _progress(db),
        )


def _progress(db: sqlite3.Connection) -> dict[str, dict[str, int]]:
    progress: dict[str, dict[str, int]] = {}
    for name, state, count in db.execute(
        "SELECT n.name, a.state, count(a.id) FROM annotators n LEFT JOIN assignments a ON a.annotator = n.id"
        " GROUP BY n.id, a.state ORDER BY n.name"
    ):
        progress.setdefault(name, dict.fromkeys(("done", "leased", "skipped", "expired"), 0))
        if state is not None:
            progress[name][state] = count
    return progress


def status(taken: Snapshot) -> dict[str, Measure]:
    """Count what there is."""
    counts = {
        "items": len(taken.items),
        "items_judged": len({said.item for said in taken.judgments}),
        "annotators": len(taken.annotators),
        "judgments": len(taken.judgments),
        "judgments_ranked": sum(said.ranks is not None for said in taken.judgments),
        "rewrites": sum(bool(said.rewrite) for said in taken.judgments),
        "flagged": sum(bool(said.flags) for said in taken.judgments),
        **taken.counts,
        "feedback_usable": len(taken.feedback),
    }
    return {name: Measure(count, None, None, count) for name, count in counts.items()}


# --- agreement ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnnotatorMeasures:
    """One annotator: how much, how alike the others, how right on gold items, how fast."""

    name: str
    kind: str
    judgments: int
    agreement: Measure
    gold_accuracy: Measure
    position_bias: Measure
    seconds: dict[str, Measure]


@dataclass(frozen=True)
class PairMeasures:
    """Two annotators who judged the same items."""

    annotators: tuple[str, str]
    items: int
    agreement: Measure
    decided: Measure
    kappa: Measure


@dataclass(frozen=True)
class PositionMeasures:
    """What was shown in one position, the first being 1."""

    position: int
    scaled_rank: Measure
    """Mean rank from 0 (best) to 1 (worst); 1/2 without a bias."""


@dataclass(frozen=True)
class CriterionMeasures:
    """The ratings of one criterion: alpha over all rated candidates; n counts their items."""

    criterion: str
    ratings: int
    alpha_nominal: Measure
    alpha_ordinal: Measure
    alpha_interval: Measure


@dataclass(frozen=True)
class Agreement:
    """All that is measured of a store's annotators."""

    metrics: dict[str, Measure]
    annotators: list[AnnotatorMeasures] = field(default_factory=list)
    pairs: list[PairMeasures] = field(default_factory=list)
    positions: list[PositionMeasures] = field(default_factory=list)
    criteria: list[CriterionMeasures] = field(default_factory=list)


def measure(taken: Snapshot, seed: int = 0) -> Agreement:
    """Measure agreement, position bias, accuracy on gold items and time. seed: of alpha's intervals."""
    judged = taken.ranked()
    pairs = agree.compared(judged)
    taus, tau_items = agree.kendall_taus(judged)
    ranks, outcomes = agree.rank_units(judged), agree.pair_units(judged)
    metrics = {
        "agreement": _share(pairs),
        "agreement_decided": _share(agree.decided(pairs)),
        "alpha_nominal": _alpha(outcomes, agree.nominal, seed),
        "alpha_ordinal": _alpha(ranks, agree.ordinal, seed),
        "alpha_interval": _alpha(ranks, agree.interval, seed),
        "kendall_tau_b": _mean(taus, tau_items, (-1.0, 1.0), "item judged by two annotators"),
        "position_bias": _bias(judged),
        "gold_accuracy": _gold(taken, taken.ranked(gold=True)),
        **_seconds(taken.judgments),
    }  # fmt: skip
    tables = _annotators(taken, judged, pairs), _pairs(pairs), _positions(judged), _criteria(taken, seed)
    return Agreement(metrics, *tables)


def _annotators(taken: Snapshot, judged: list[Ranked], pairs: list[Compared]) -> list[AnnotatorMeasures]:
    rest: dict[str, list[Compared]] = {}
    for pair in pairs:
        for name in pair.annotators:
            rest.setdefault(name, []).append(pair)
    own = _by_annotator(taken.judgments)
    ranked, gold = _by_annotator(judged), _by_annotator(taken.ranked(gold=True))
    return [
        AnnotatorMeasures(
            name, annotator.kind, len(own.get(name, ())), _share(rest.get(name, ())), _gold(taken, gold.get(name, ())),
            _bias(ranked.get(name, ())), _seconds(own.get(name, ())),
        )
        for name, annotator in sorted(taken.annotators.items())
    ]  # fmt: skip


def _by_annotator(said: Iterable[Said]) -> dict[str, list[Said]]:
    apart: dict[str, list[Said]] = {}
    for one in said:
        apart.setdefault(one.annotator, []).append(one)
    return apart


def _pairs(pairs: Iterable[Compared]) -> list[PairMeasures]:
    """Measure each two annotators; those with most items in common first."""
    apart: dict[tuple[str, str], list[Compared]] = {}
    for pair in pairs:
        apart.setdefault(pair.annotators, []).append(pair)
    found = []
    for names, own in apart.items():
        items, kappa = len({pair.item for pair in own}), agree.pair_kappa(own)
        note = "" if kappa is not None else "one outcome only: kappa is not defined"
        measured = Measure(kappa, None, None, len(own), note)
        found.append(PairMeasures(names, items, _share(own), _share(agree.decided(own)), measured))
    return sorted(found, key=lambda pair: (-pair.items, pair.annotators))


def _positions(judged: Sequence[Ranked]) -> list[PositionMeasures]:
    ranks: dict[int, list[float]] = {}
    items: dict[int, list[Hashable]] = {}
    for ranked in judged:
        scaled = agree.scaled_ranks(ranked.ranks)
        for position, candidate in enumerate(ranked.order, start=1):
            ranks.setdefault(position, []).append(scaled[candidate])
            items.setdefault(position, []).append(ranked.item)
    return [
        PositionMeasures(position, _mean(ranks[position], items[position], (0.0, 1.0), "item"))
        for position in sorted(ranks)
    ]


def _criteria(taken: Snapshot, seed: int) -> list[CriterionMeasures]:
    """Measure each criterion's ratings, as they were given; a unit is one candidate of an item that is no gold item."""
    given: dict[str, dict[int, dict[int, list[float]]]] = {}
    for said in taken.judgments:
        if taken.items[said.item].gold_ranks is None:
            for candidate, ratings in enumerate(said.ratings):
                for criterion, rating in ratings.items():
                    units = given.setdefault(criterion, {}).setdefault(said.item, {})
                    units.setdefault(candidate, []).append(rating)
    found = []
    for criterion, items in sorted(given.items()):
        clusters = [[*units.values()] for units in items.values()]
        alphas = (_alpha(clusters, distance, seed) for distance in (agree.nominal, agree.ordinal, agree.interval))
        found.append(CriterionMeasures(criterion, sum(len(u) for units in clusters for u in units), *alphas))
    return found


# --- one measure ----------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float], items: Sequence[Hashable], bounds: tuple[float, float], of: str) -> Measure:
    count = len(set(items))
    if count < 2:
        return Measure(None, None, None, len(values), f"too few: {count} {of}")
    return _measure(clustered_mean(values, items, bounds), len(values))


def _measure(estimate: Estimate, n: int) -> Measure:
    return Measure(float(estimate.value), float(estimate.low), float(estimate.high), n)


def _share(pairs: Sequence[Compared]) -> Measure:
    same, items = agree.alike(pairs)
    return _mean(same, items, (0.0, 1.0), "item judged by two annotators")


def _alpha(clusters: Sequence[Sequence[agree.Unit]], distance: agree.Distance, seed: int) -> Measure:
    shared = sum(any(len(unit) > 1 for unit in units) for units in clusters)
    estimate = agree.alpha_interval(clusters, distance, seed) if shared > 1 else None
    if estimate is None:
        return Measure(None, None, None, shared, f"too few: {shared} item judged by two annotators, or one value only")
    if shared < agree.FEWEST:
        note = f"too few for an interval: {shared} items judged by two annotators, {agree.FEWEST} are needed"
    elif estimate.low == estimate.high:
        note = "no interval: redrawn items say nothing else"
    else:
        return _measure(estimate, shared)
    return Measure(float(estimate.value), None, None, shared, note)


def _bias(judged: Sequence[Ranked]) -> Measure:
    won, items = agree.earlier_wins(judged)
    found = _mean(won, items, (0.0, 1.0), "item with a pair that is no tie, its order known")
    if found.value is None or found.low is None or found.high is None:
        return found
    return Measure(found.value - 0.5, found.low - 0.5, found.high - 0.5, found.n)


def _gold(taken: Snapshot, judged: Sequence[Ranked]) -> Measure:
    gold = {item.id: item.gold_ranks for item in taken.items.values() if item.gold_ranks is not None}
    right, items = agree.gold_accuracy(judged, gold)
    return _mean(right, items, (0.0, 1.0), "judged gold item")


def _seconds(judgments: Iterable[Judgment]) -> dict[str, Measure]:
    """Return the median and the quartiles of the time per item."""
    given = sorted(said.seconds for said in judgments if said.seconds is not None)
    names = ("seconds_quartile_1", "seconds_median", "seconds_quartile_3")
    if len(given) < 2:
        return {name: Measure(None, None, None, len(given), f"too few: {len(given)} timed judgment") for name in names}
    cuts = statistics.quantiles(given, n=4, method="inclusive")
    return {name: Measure(cut, None, None, len(given)) for name, cut in zip(names, cuts, strict=True)}
