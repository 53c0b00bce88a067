"""What is to be labelled, read from files: rows of a prompt and its responses, and gold rows whose right order is
known."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf.collection.store import Candidate, Item
from rlhf.errors import InputError
from rlhf.rows import asked, fields
from rlhf.rows.messages import check_texts
from rlhf.rows.mixed import parts_of
from rlhf.rows.records import Ranking, prompt_key, read_rankings
from rlhf.rows.sources import Source, name_of, rows, show

log = logging.getLogger("rlhf")

FEWEST, MOST = 2, 9
"""Responses of an item: what the page's keys can rank."""
PROVENANCE = ("policy", "fingerprint", "sampling_seed")
"""Columns that say where responses came from, as our exports write them: a list with an entry for each, or one value
for all."""


def read_candidates(source: Source) -> list[Item]:
    """Read rows of `prompt` and `responses`, or rankings and pairs of any accepted shape, whose order is left aside.

    The columns `policy`, `fingerprint` and `sampling_seed` say where each response came from. Raises InputError with
    the row's place."""
    first = None if parts_of(source) else next((row for _, row in rows(source, "train")), None)
    unranked = isinstance(first, dict) and first.get("responses") is not None and first.get("ranks") is None
    found = _unranked(source) if unranked else read_rankings(source)
    return comparable([_item(ranking, name_of(source)) for ranking in found], name_of(source))


def read_gold(source: Source) -> list[Item]:
    """Read rankings whose right order is known. Raises InputError with the row's place."""
    found = read_rankings(source)
    items = [replace(_item(ranking, name_of(source)), gold_ranks=tuple(map(float, ranking.ranks))) for ranking in found]
    return comparable(items, name_of(source))


def without_repeats(item: Item) -> Item:
    """Leave out the candidates that can't be compared: empty ones, and those of the same text as an earlier one."""
    first: dict[str, int] = {}
    for place, candidate in enumerate(item.candidates):
        if candidate.text.strip():
            first.setdefault(candidate.text, place)
    places = first.values()
    gold = item.gold_ranks and tuple(item.gold_ranks[place] for place in places)
    return replace(item, candidates=tuple(item.candidates[place] for place in places), gold_ranks=gold)


def comparable(items: Sequence[Item], source: str) -> list[Item]:
    """Return the items without repeated and empty responses; the log counts these, and the items of which fewer than
    two remain, which are left out. Raises InputError where none is left."""
    kept = [without_repeats(item) for item in items]
    repeated = sum(len(item.candidates) for item in items) - sum(len(item.candidates) for item in kept)
    usable = [item for item in kept if len(item.candidates) >= FEWEST]
    if repeated:
        log.warning(
            "%s: left out %d responses that were empty or the same as another, and %d of %d prompts with fewer than "
            "two different ones", source, repeated, len(items) - len(usable), len(items),
        )  # fmt: skip
    if not usable:
        raise InputError(f"{source}: no prompt has two different responses; there is nothing to compare")
    return usable


def _unranked(source: Source) -> Iterator[Ranking]:
    """Read rows of responses without ranks; in the record all are equal."""
    for where, row in rows(source, "train"):
        try:
            responses = asked.decoded("responses", row.get("responses")) if isinstance(row, dict) else None
            if not isinstance(row, dict) or not isinstance(responses, list):
                seen = ", ".join(map(str, row)) if isinstance(row, dict) else show(row)
                raise InputError(f"no list of responses: got {seen}; write an object with prompt and responses")
            check_texts(tuple(responses), "responses")
            ranked = {**row, "ranks": [1.0] * len(responses)}
            yield Ranking(*fields.ranking_fields(ranked), where)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def _item(ranking: Ranking, source: str) -> Item:
    count = len(ranking.responses)
    try:
        if count > MOST:
            raise InputError(f"responses: got {count}; the page ranks {FEWEST} to {MOST}")
        policies, fingerprints, seeds = (_of_each(ranking.columns, name, count) for name in PROVENANCE)
        candidates = tuple(
            Candidate(text, str(policy or ""), str(fingerprint or ""), seed=_seed(seed))
            for text, policy, fingerprint, seed in zip(ranking.responses, policies, fingerprints, seeds, strict=True)
        )
    except InputError as error:
        raise InputError(f"{ranking.where}: {error}" if ranking.where else str(error)) from None
    verdict = {"label"} if isinstance(ranking.columns.get("label"), bool) else set()  # not the annotators' to come
    columns = {name: value for name, value in ranking.columns.items() if name not in {*PROVENANCE, *verdict}}
    return Item(list(ranking.prompt), candidates, columns, source)


def _of_each(row: Mapping[str, Any], name: str, count: int) -> list[Any]:
    given = row.get(name)
    if not isinstance(given, list):
        return [given] * count
    if len(given) != count:
        raise InputError(f"{name}: got {show(given)}; write a list with one entry for each of the {count} responses")
    return given


def _seed(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63):
        raise InputError(f"sampling_seed: got {show(value)}; write whole numbers from 0 up to 2^63")
    return value


def check_apart(items: Sequence[Item], gold: Sequence[Item]) -> None:
    """Raise InputError where a gold prompt is also to be labelled: its known order would count twice."""
    keys = {prompt_key(item.prompt) for item in items}
    both = [item for item in gold if prompt_key(item.prompt) in keys]
    if both:
        seen = f"{len(both)} prompts are also among the items, the first is {show(both[0].prompt[-1]['content'])}"
        raise InputError(f"gold: {seen}; take them out of one of the files")
