"""Find eval items in training data, as the GPT-4 report does (appendix C), by every window, and by words.

| method | an item counts as contaminated where |
|---|---|
| `sampled` | one of three random substrings of 50 letters and digits is in the training data (GPT-4's) |
| `windows` | any substring of 50 letters and digits is |
| `words` | 70% of its words lie in a run of 8 words that is in the training data, in small letters (after PaLM) |

Boilerplate, what many items of an eval share, is neither sought nor counted among an item's letters and words.

What none of them finds: a paraphrase, a translation, the same numbers in other words. Clean by these means that nobody
copied the text, not that nobody taught to the test.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.errors import InputError
from rlhf.evals.windows import Sought, chunks, join, letters_of, owners, prefix_sums, words_of
from rlhf.intervals import Estimate, clustered_mean, student_mean, unpaired_difference

METHODS = ("sampled", "windows", "words")
BLIND = "a paraphrase, a translation or the same question with other numbers is not found by any of these methods"
FEWEST_WORDS = 4
MOST_LETTERS = 20_000_000
"""Letters of all eval items together: some 110 bytes of memory each, 200 while the search is prepared."""


@dataclass(frozen=True)
class Rules:
    """What counts as found."""

    chars: int = 50
    samples: int = 3
    words: int = 8
    coverage: float = 0.7
    min_chars: int = 25
    """An item with fewer letters and digits is in too many texts by chance: it is not checked."""
    seed: int = 0


@dataclass(frozen=True)
class Item:
    """An eval item: its text, the eval it is of, where it stands, its score if there is one."""

    text: str
    eval: str
    where: str
    score: float | None = None


@dataclass(frozen=True)
class Found:
    """What was found of a text; None: too short to tell, or nothing but what many items of its eval share."""

    sampled: bool | None = None
    windows: bool | None = None
    words: bool | None = None
    letters_covered: float = 0.0
    """The share of its letters and digits that lie in a window that was found, of those that are no boilerplate."""
    words_covered: float = 0.0
    train: str | None = None
    """Where in the training data the first window of it stands first."""


# ------------------------------------------------------------------------------------------------- what is read


ASKED = ("prompt", "input", "question", "problem", "instruction", "messages")
"""Columns that hold what an eval item asks, the first that is there; else an item's text is all its texts."""


def texts_in(value: object) -> Iterator[str]:
    """Yield every text in a row: prompts, responses, messages, whatever its columns are called."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def item_of(row: Mapping[str, Any], name: str, where: str) -> Item:
    """Make an item of an eval's row: what it asks (of messages, the user's), and its score, if it has one.

    A score is the column `score` or `correct`, or, in the items.jsonl of run_evals, the mean of each trial's first
    number. Raises InputError for a row without text."""
    asked = next((row[name] for name in ASKED if row.get(name)), row)
    if isinstance(asked, list) and all(isinstance(turn, Mapping) for turn in asked):
        asked = [turn for turn in asked if turn.get("role") == "user"] or asked
        asked = [turn.get("content", turn) for turn in asked]
    text = "\n".join(texts_in(asked))
    if not text.strip():
        raise InputError(f"{where}: no text; an eval's row has a prompt, input or question")
    return Item(text, str(row.get("eval") or name), where, _score(row, where))


def _score(row: Mapping[str, Any], where: str) -> float | None:
    trials = row.get("trials")
    if isinstance(trials, list) and trials:
        firsts = [next(iter(trial["numbers"].items())) for trial in trials if trial.get("numbers")]
        values = [
            value for name, value in firsts if not name.startswith("choice_")
        ]  # a choice is not better than others
        return float(np.mean(values)) if values else None
    value = row.get("score", row.get("correct"))
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or not np.isfinite(value):
        raise InputError(f"{where}: score is {value!r}; write a number, or true and false")
    return float(value)


# ------------------------------------------------------------------------------------------------- the search


def search(
    stream: Iterable[tuple[str, str]], texts: Sequence[str], rules: Rules, evals: Sequence[str] | None = None
) -> list[Found]:
    """Look for `texts` in a stream of (where, text), which is read once; equal texts of an eval are looked for once.

    evals: the name of each text's eval; None: all are of one. A window that more than a twentieth of an eval's texts
    share (and more than ten) is boilerplate there, such as its instructions, and neither sought nor sampled: so what is
    found of an eval does not depend on the others. Raises InputError where the texts are too many for memory.
    """
    given = list(zip(["" for _ in texts] if evals is None else evals, texts, strict=True))
    distinct = list(dict.fromkeys(given))
    if sum(len(text) for _, text in distinct) > MOST_LETTERS:
        raise InputError(f"eval data: more than {MOST_LETTERS:,} letters; check fewer evals at a time")
    letters = _sought(distinct, letters_of, rules.chars, rules.min_chars)
    long = {text for one in letters for text in np.unique(one.owner).tolist()}
    words = _sought(distinct, words_of, rules.words, FEWEST_WORDS, long)
    for wheres, joined in chunks(stream):
        for sought, of in ((letters, letters_of), (words, words_of)):
            symbols = of(joined)
            sums, text_of = prefix_sums(symbols.values), owners(symbols, np.arange(len(wheres)))
            for one in sought:
                one.look(symbols, sums, text_of, wheres)
    by_letters = {text: (one, rows) for one in letters for text, rows in _windows_of(one)}
    by_words = {text: (one, rows) for one in words for text, rows in _windows_of(one)}
    found = {
        one: _found(one[1], by_letters.get(number), by_words.get(number), rules) for number, one in enumerate(distinct)
    }
    return [found[one] for one in given]


def holding(texts: Sequence[str], items: Sequence[str], rules: Rules) -> set[int]:
    """Return the numbers of those texts that hold a window of an item, or most of its words: of every text, where
    several hold the same."""
    left, held = dict(enumerate(texts)), set[int]()
    while items and left:
        found = search(((str(number), text) for number, text in left.items()), items, rules)
        hits = {int(one.train) for one in found if one.train is not None and (one.windows or one.words)}
        if not hits:
            break
        held |= hits
        left = {number: text for number, text in left.items() if number not in hits}
    return held


def _sought(
    given: Sequence[tuple[str, str]], symbols_of: Any, size: int, fewest: int, allowed: set[int] | None = None
) -> list[Sought]:
    """Return the windows of all (eval, text): of `size` symbols, or of as many as a shorter text has; those with less
    than `fewest` are left out."""
    if not given:
        return []
    texts = [text for _, text in given]
    _, group, items = np.unique([name for name, _ in given], return_inverse=True, return_counts=True)
    symbols = symbols_of(join(texts))
    owner = owners(symbols, np.arange(len(texts)))
    counts = np.bincount(owner[owner >= 0], minlength=len(texts))
    sizes = np.where(counts >= size, size, counts)
    most = np.maximum(10, items // 20)
    found = []
    for one in np.unique(sizes[sizes >= min(fewest, size)]).tolist():
        numbers = [n for n in np.flatnonzero(sizes == one).tolist() if allowed is None or n in allowed]
        if numbers:
            own = symbols_of(join([texts[n] for n in numbers]))
            found.append(Sought(own, owners(own, np.array(numbers)), int(one), group, most))
    return found


def _windows_of(sought: Sought) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each text's number and the rows of its windows."""
    cuts = np.flatnonzero(np.diff(sought.owner)) + 1
    for rows in np.split(np.arange(len(sought.owner)), cuts):
        yield int(sought.owner[rows[0]]), rows


Windows = tuple[Sought, np.ndarray]


def _found(text: str, letters: Windows | None, words: Windows | None, rules: Rules) -> Found:
    if letters is None:
        return Found()
    sought, rows = letters
    place = sought.place_of(rows)
    own = np.flatnonzero(place != -2)
    if not len(own):
        return Found()
    drawn = random.Random(f"{rules.seed} {text}").sample(own.tolist(), min(rules.samples, len(own)))
    hits = place >= 0
    first = sought.places[int(place[np.argmax(hits)])] if hits.any() else None
    covered, by_words = _covered(place, sought.size), None
    if words is not None:
        seen = words[0].place_of(words[1])
        if (seen != -2).any():
            by_words = _covered(seen, words[0].size)
            hit = np.argmax(seen >= 0)
            first = first or (words[0].places[int(seen[hit])] if seen[hit] >= 0 else None)
    return Found(
        sampled=bool(hits[drawn].any()),
        windows=bool(hits.any()),
        words=None if by_words is None else by_words >= rules.coverage,
        letters_covered=covered,
        words_covered=by_words or 0.0,
        train=first,
    )


def _covered(place: np.ndarray, size: int) -> float:
    """Return the share of a text's own symbols that lie in a window that was found; place [n - size + 1] as in Sought.
    Its own are those in no boilerplate window, or where there are none, those in windows that are sought."""
    own = ~_inside(place == -2, size)
    if not own.any():
        own = _inside(place != -2, size)
    return float(_inside(place >= 0, size)[own].mean())


def _inside(windows: np.ndarray, size: int) -> np.ndarray:
    """Return [n] whether each symbol lies in one of the windows [n - size + 1]."""
    edges = np.zeros(len(windows) + size, dtype=np.int64)
    edges[: len(windows)] += windows
    edges[size:] -= windows
    return np.cumsum(edges)[:-1] > 0


# ------------------------------------------------------------------------------------------- what it comes to


def summary(items: Sequence[Item], found: Sequence[Found]) -> dict[str, dict[str, Any]]:
    """Return per eval how many items each method counts, of those that it could check, and the scores with and without
    them."""
    result: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(item.eval for item in items):
        rows = [n for n, item in enumerate(items) if item.eval == name]
        entry: dict[str, Any] = {"items": len(rows), "unchecked": sum(found[n].windows is None for n in rows)}
        for method in METHODS:
            checked = [n for n in rows if getattr(found[n], method) is not None]
            if not checked:
                continue
            hit = [bool(getattr(found[n], method)) for n in checked]
            share = clustered_mean([float(value) for value in hit], [items[n].text for n in checked])
            entry[method] = {"share": _metric(share, len(checked)), **_scores([items[n] for n in checked], hit)}
        result[name] = entry
    return result


def _scores(items: Sequence[Item], hit: Sequence[bool]) -> dict[str, dict[str, float | int]]:
    """Return the mean score of the checked items that have one, of the clean and of the contaminated ones, and their
    difference."""
    scored = [(item.score, item.text, value) for item, value in zip(items, hit, strict=True) if item.score is not None]
    bounded = all(0 <= score <= 1 for score, _, _ in scored)

    def mean(of: Sequence[tuple[float, str, bool]]) -> Estimate:
        values, keys = [score for score, _, _ in of], [text for _, text, _ in of]
        return clustered_mean(values, keys) if bounded else student_mean(values)

    parts = {
        "score_all": scored,
        "score_clean": [one for one in scored if not one[2]],
        "score_contaminated": [one for one in scored if one[2]],
    }
    estimates = {name: mean(of) for name, of in parts.items() if of}
    scores = {name: _metric(estimate, len(parts[name])) for name, estimate in estimates.items()}
    if len(estimates) == len(parts):
        apart = unpaired_difference(estimates["score_contaminated"], estimates["score_clean"])
        scores["contaminated_less_clean"] = _metric(apart, len(scored))
    return scores


def _metric(estimate: Estimate, n: int) -> dict[str, float | int]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": n}
