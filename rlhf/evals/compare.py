"""Two runs of the same evals, item by item: the difference with an interval, and the items whose verdict flipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.evals.measure import Metric, as_metric
from rlhf.intervals import clustered_mean, needed
from rlhf.rows.jsonl import read_object, read_rows

Row = Mapping[str, Any]
"""A row of items.jsonl."""
ITEMS = "items.jsonl"


@dataclass(frozen=True)
class Earlier:
    """Another run that is compared with: the file, its model, what it says of its evals, its items."""

    file: str
    model: str
    evals: Mapping[str, Mapping[str, Any]]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Compared:
    """An eval in both runs. The difference is this run's mean less the other's, over the items that both have."""

    name: str
    metric: str
    difference: Metric
    gained: tuple[str, ...]
    """Keys of the items that are right here and were not there."""
    lost: tuple[str, ...]
    apart: int
    """Items that only one of the runs has."""

    @property
    def sentence(self) -> str:
        """Write what the difference comes to."""
        value, low, high, n = (self.difference[name] for name in ("value", "low", "high", "n"))
        fact = f"{value:+.3f} [{low:+.3f}, {high:+.3f}] on {n:,} shared items"
        if low > 0 or high < 0:
            return f"{'better' if low > 0 else 'worse'} by {fact}"
        more = needed(n, value, 0.0, (low, high))
        return (
            f"no clear difference: {fact}; {f'about {more:,} items would' if more else 'more items would hardly'} tell"
        )


def read_earlier(path: str | Path) -> Earlier:
    """Read another run's run_evals.json, and its items.jsonl beside it. Raises InputError."""
    file = Path(path)
    if file.is_dir():
        file = file / "run_evals.json"
    content = read_object(file, "name the run_evals.json of another run")
    evals, model = content.get("evals"), content.get("model")
    if not isinstance(evals, dict) or not all(isinstance(one, dict) for one in evals.values()):
        raise InputError(f"{file}: evals: is no result of run_evals")
    items = file.parent / ITEMS
    if not items.is_file():
        raise InputError(f"{items}: no such file; it lies beside run_evals.json where run_evals wrote it")
    rows = []
    for number, row in read_rows(items):
        if not {"eval", "key", "trials"} <= row.keys():
            raise InputError(f"{items}:{number}: is no item of run_evals (it has eval, key and trials)")
        rows.append(row)
    return Earlier(str(file), str(model), evals, tuple(rows))


def compare(evals: Mapping[str, Mapping[str, Any]], rows: Iterable[Row], earlier: Earlier) -> list[Compared]:
    """Compare every eval that both runs have, with the same metric, on the items that both have."""
    found, rows = [], list(rows)
    for name, about in evals.items():
        metric, bounds = about.get("metric"), about.get("bounds")
        if metric is None or bounds is None or earlier.evals.get(name, {}).get("metric") != metric:
            continue
        items, before = _means(rows, name, metric), _means(earlier.rows, name, metric)
        shared = [key for key in items if key in before]
        if not shared:
            continue
        values = [(items[key], before[key]) for key in shared]
        span, middle = float(bounds[1]) - float(bounds[0]), (float(bounds[0]) + float(bounds[1])) / 2
        groups = {str(row["key"]): row["group"] for row in rows if row["eval"] == name and "group" in row}
        change = clustered_mean([a - b for a, b in values], [groups.get(key, key) for key in shared], (-span, span))
        found.append(
            Compared(
                name,
                metric,
                as_metric(change, len(shared)),
                tuple(key for key, (a, b) in zip(shared, values, strict=True) if a > middle >= b),
                tuple(key for key, (a, b) in zip(shared, values, strict=True) if b > middle >= a),
                len(items.keys() ^ before.keys()),
            )
        )
    return found


def chance(compared: Sequence[Compared]) -> str | None:
    """Say how many of several differences would look clear by chance; None for a single one."""
    if len(compared) < 2:
        return None
    return (
        f"{len(compared)} evals are compared, each at 95%: about {0.05 * len(compared):.2g} of them would show a "
        "difference where there is none"
    )


def _means(rows: Iterable[Row], name: str, metric: str) -> dict[str, float]:
    """Return an eval's items by key, each with the mean of a metric over its trials; an item that is asked twice is
    one."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["eval"] == name:
            values = [float(trial["numbers"][metric]) for trial in row["trials"] if metric in trial["numbers"]]
            if values:
                found.setdefault(str(row["key"]), []).extend(values)
    return {key: sum(values) / len(values) for key, values in found.items()}
