"""What the store holds, as frozen records: items, candidates, tasks, answers, judgments, annotators."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.errors import InputError, short
from rlhf.rows.records import Messages
from rlhf.rows.sources import show

Kind = Literal["person", "model", "simulated"]
KINDS: tuple[Kind, ...] = ("person", "model", "simulated")
Line = Literal["calibration", "first", "main", "gold"]
"""The queues of items, in the order in which an annotator meets them; gold is mixed into the others."""


class HandedOn(InputError):
    """An answer that came after its lease had ended and the item had gone to others; it was not stored."""


@dataclass(frozen=True)
class Candidate:
    """One response to an item's prompt, and where it came from."""

    text: str
    policy: str = ""
    """The policy's name, which annotators never see."""
    fingerprint: str = ""
    """Of the policy's weights."""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    """Temperature, top_p and the like."""
    seed: int | None = None
    id: int = 0
    """The store's; 0 before it is stored."""


@dataclass(frozen=True)
class Item:
    """A prompt and the candidates that are to be ranked."""

    prompt: Messages
    candidates: tuple[Candidate, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the row, kept for labelers that are functions and for exports."""
    source: str = ""
    """The file, data set or round that it is from."""
    tags: tuple[str, ...] = ()
    """What it may be used for."""
    person: str | None = None
    """Whose conversation it was made from: erasing that person erases it."""
    gold_ranks: tuple[float, ...] | None = None
    """The known right ranks of a gold item, in the order of its candidates."""
    id: int = 0

    @property
    def key(self) -> str:
        """Return the item's identity: a hash of the prompt and of the candidates' texts in any order."""
        texts = sorted(candidate.text for candidate in self.candidates)
        return hashlib.sha256(json.dumps([self.prompt, texts]).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Shown:
    """A candidate as an annotator sees it: nothing says which policy wrote it."""

    id: int
    text: str


@dataclass(frozen=True)
class Task:
    """An item in the hands of one annotator. Whether it is a gold item is not told."""

    assignment: int
    item: int
    prompt: Messages
    candidates: tuple[Shown, ...]
    """In the order drawn for this annotator."""
    lease_until: float
    """Seconds since 1970; afterwards the item may go to somebody else."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    answer: Answer | None = None
    """What the annotator has answered; another answer supersedes it."""

    @property
    def stored(self) -> tuple[Shown, ...]:
        """Return the candidates in the order in which they were stored."""
        return tuple(sorted(self.candidates, key=lambda shown: shown.id))

    def to_json(self) -> dict[str, Any]:
        """Write the task as a JSON object, which `from_json` reads."""
        answer = None if self.answer is None else self.answer.to_json()
        return {**vars(self), "candidates": [vars(c) for c in self.candidates], "answer": answer}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Task:
        """Read what `to_json` wrote."""
        candidates = tuple(Shown(shown["id"], shown["text"]) for shown in content["candidates"])
        answer = None if content["answer"] is None else Answer.from_json(content["answer"])
        return cls(**{**content, "candidates": candidates, "answer": answer})


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an annotator says of a task: ranks, or at least ratings, a rewrite or a flag."""

    assignment: int
    submission: str
    """Drawn by the client once for this submission, such as a UUID: a repeat is answered with what was stored."""
    ranks: Mapping[int, float] | None = None
    """Candidate's id -> rank: a smaller rank is better, equal ranks are a tie."""
    ratings: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Candidate's id -> criterion -> rating."""
    rewrite: str | None = None
    """A better response, written by the annotator."""
    rewrite_of: int | None = None
    """The id of the candidate that the rewrite began from."""
    flags: tuple[str, ...] = ()
    comment: str = ""
    seconds: float | None = None
    """Time spent on the item, as the client measured it."""
    guideline: str | None = None
    """Hash of the guideline that the annotator had before them."""

    def __post_init__(self) -> None:
        if not isinstance(self.submission, str) or not 8 <= len(self.submission) <= 100:
            raise InputError(f"submission: got {show(self.submission)}; send 8 to 100 characters drawn once, a UUID")
        for name in ("rewrite", "comment", "guideline", "submission"):
            check_storable(getattr(self, name), name)
        check_whole(self.assignment, "assignment")
        for flag in self.flags:
            check_storable(flag, "flags")
        if self.seconds is not None and not (is_number(self.seconds) and 0 <= self.seconds < 1e8):
            raise InputError(f"seconds: got {show(self.seconds)}; send a number from 0 up, or null")
        for rank in (self.ranks or {}).values():
            if not is_number(rank):
                raise InputError(f"ranks: got {show(rank)}; send a number per candidate, smaller is better")
        for ratings in self.ratings.values():
            for criterion, rating in ratings.items():
                check_storable(criterion, "ratings")
                if not is_number(rating):
                    raise InputError(f"ratings.{short(criterion)}: got {show(rating)}; send a number")
        if self.ranks is None and not (any(self.ratings.values()) or (self.rewrite or "").strip() or self.flags):
            raise InputError(
                "answer: neither ranks, ratings, a rewrite nor a flag; rank the candidates, or skip the item"
            )

    @classmethod
    def from_json(cls, content: object) -> Answer:
        """Read an answer from a JSON object, whose candidates' ids are text. Raises InputError."""
        if not isinstance(content, dict):
            raise InputError(f"answer: got {show(content)}; send an object")
        known = {name: kind for name, kind in _ANSWER.items() if name in content}
        for name in content.keys() - _ANSWER.keys():
            raise InputError(f"answer: unknown field {short(str(name))!r}; known: {', '.join(_ANSWER)}")
        for name, kinds in known.items():
            if not isinstance(content[name], kinds) or isinstance(content[name], bool):
                raise InputError(f"answer.{name}: got {show(content[name])}; send {_EXPECTED[name]}")
        for name in ("assignment", "submission"):
            if name not in content:
                raise InputError(f"answer.{name}: missing; send {_EXPECTED[name]}")
        fields = {name: content[name] for name in known}
        if content.get("ranks") is not None:
            fields["ranks"] = _by_id(content["ranks"], "ranks")
        fields["ratings"] = _by_id(content.get("ratings") or {}, "ratings")
        if not all(isinstance(ratings, dict) for ratings in fields["ratings"].values()):
            raise InputError(f"answer.ratings: send {_EXPECTED['ratings']}")
        fields["flags"] = tuple(content.get("flags") or ())
        if not all(isinstance(flag, str) for flag in fields["flags"]):
            raise InputError(f"answer.flags: got {show(content['flags'])}; send {_EXPECTED['flags']}")
        fields["comment"] = content.get("comment") or ""
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """Write the answer as a JSON object, which `from_json` reads."""
        ranks = None if self.ranks is None else {str(n): rank for n, rank in self.ranks.items()}
        ratings = {str(n): dict(rated) for n, rated in self.ratings.items()}
        return {**vars(self), "ranks": ranks, "ratings": ratings, "flags": list(self.flags)}


_NONE = type(None)
_ANSWER: dict[str, tuple[type, ...]] = {
    "assignment": (int,), "submission": (str,), "ranks": (dict, _NONE), "ratings": (dict, _NONE),
    "rewrite": (str, _NONE), "rewrite_of": (int, _NONE), "flags": (list, _NONE), "comment": (str, _NONE),
    "seconds": (int, float, _NONE), "guideline": (str, _NONE),
}  # fmt: skip
_EXPECTED = {
    "assignment": "the task's assignment, a whole number", "submission": "text drawn once for this submission",
    "ranks": "an object of candidate's id to rank, or null", "rewrite": "text or null",
    "ratings": "an object of candidate's id to {criterion: number}", "rewrite_of": "a candidate's id or null",
    "flags": "a list of texts", "comment": "text", "seconds": "a number or null", "guideline": "a hash or null",
}  # fmt: skip


@dataclass(frozen=True)
class Judgment:
    """One stored judgment. An edit is another judgment, which supersedes it."""

    id: int
    submission: str
    assignment: int
    item: int
    annotator: str
    order: tuple[int, ...]
    """The candidates' indices in the order shown."""
    ranks: tuple[float, ...] | None
    """In the order of the item's candidates; None: the annotator did not rank."""
    ratings: tuple[Mapping[str, float], ...]
    """Per candidate: criterion -> rating."""
    rewrite: str | None
    rewrite_of: int | None
    """The index of the candidate that the rewrite began from."""
    flags: tuple[str, ...]
    comment: str
    seconds: float | None
    guideline: str | None
    created: float
    supersedes: int | None
    """The id of the judgment that this one replaces."""


@dataclass(frozen=True)
class Annotator:
    """A person, a model or a simulated labeler."""

    id: int
    name: str
    kind: Kind
    created: float
    invited: bool
    """Whether a token lets them in."""


@dataclass(frozen=True)
class Guideline:
    """What annotators are told, and its hash."""

    hash: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How items are handed out; kept in the store, so that all processes do alike."""

    seed: int = 0
    """Decides the order of candidates and where gold items come."""
    lease_seconds: float = 1800.0
    """How long an annotator may keep an item before it goes to somebody else."""
    gold_share: float = 0.1
    """Share of an annotator's tasks that are gold items, as long as there are any."""

    def __post_init__(self) -> None:
        if not 0 < self.lease_seconds < math.inf:
            raise InputError(f"lease_seconds={self.lease_seconds} must be above 0, and finite")
        if not 0 <= self.gold_share < 1:
            raise InputError(f"gold_share={self.gold_share} must be a share from 0 up to, not including, 1")


@dataclass(frozen=True)
class Progress:
    """How far one annotator is."""

    done: int
    skipped: int
    left: int
    """Places still open in the whole store, for anybody."""


@dataclass(frozen=True)
class Outlook:
    """What is left for one annotator."""

    mine: int
    """Items that they hold or can get, without gold items, which are mixed in."""
    held: int
    """Items that others hold now, and that may come back to this annotator."""


# --- checks ---------------------------------------------------------------------------------------------------------


def check_storable(text: object, name: str) -> None:
    """Raise InputError for a text that UTF-8 can't hold; None passes."""
    if text is None:
        return
    if not isinstance(text, str):
        raise InputError(f"{name}: got {show(text)}; send text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: half a character at {error.start} (a lone surrogate); repair the text") from None


def storable_json(value: object, name: str) -> str:
    """Return a value as JSON. Raises InputError for one that JSON can't hold."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: JSON can't hold it ({error}); write texts, numbers, lists and objects") from None


def check_whole(value: int | None, name: str) -> None:
    """Raise InputError for a whole number of more than 64 bits; None passes."""
    if value is not None and not -(2**63) <= value < 2**63:
        raise InputError(f"{name}: got {show(value)}; use a whole number of at most 64 bits, with its sign")


def is_number(value: object) -> bool:
    """Return whether a value is a finite number, and neither true nor false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # not NaN


def _by_id(given: Mapping[str, Any], name: str) -> dict[int, Any]:
    try:
        return {int(key): value for key, value in given.items()}
    except ValueError:
        raise InputError(f"answer.{name}: send {_EXPECTED[name]}") from None
