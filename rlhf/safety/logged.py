"""A policy server's log as numbers: what answered, how long the answer is, whether it is flagged, whether it refuses.

A conversation that has expired is not read, nor one whose personal data were not looked for and removed. Texts are
judged where they lie; what is made of them holds none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlhf.calls import function_name
from rlhf.collection.store import Conversation, Store
from rlhf.errors import InputError, short
from rlhf.rows.messages import Messages
from rlhf.safety.refusals import rule

Flags = Callable[[Sequence[Messages]], Sequence[Sequence[str]]]
"""The categories that each conversation is flagged for."""
Source = Literal["log", "playground"]


def refuses(answer: str) -> bool:
    """Return whether an answer refuses, in full or in part, by the rule of `rlhf.safety.refusals`."""
    return rule(answer) in ("full", "partial")


@dataclass(frozen=True)
class Request:
    """One logged answer, without its text."""

    id: str
    created: float
    policy: str
    fingerprint: str
    sampler: str
    """Its settings, as JSON."""
    seed: int | None
    characters: int
    refused: bool
    flagged: tuple[str, ...] | None = None
    """None: there is no moderator."""


@dataclass(frozen=True)
class Log:
    """What was read: answers and thumbs in their order, and what was left out."""

    requests: tuple[Request, ...]
    thumbs: tuple[tuple[float, bool], ...]
    """When, and whether it is up."""
    unscrubbed: int = 0
    expired: int = 0
    read_by: Mapping[str, str] = field(default_factory=dict)
    """Of the log's source, moderator and function of refusals: a name or fingerprint."""


def readable(store: Store, source: Source) -> tuple[list[Conversation], int, int]:
    """Return the conversations that may be read, and how many were left out as not scrubbed, and as expired."""
    now, there = (
        store.clock(),
        [c for c in store.conversations(usable=False) if (c.source == "log") == (source == "log")],
    )
    alive = [c for c in there if c.expires is None or c.expires > now]
    clean = [c for c in alive if c.scrubbed and c.messages and c.messages[-1]["role"] == "assistant"]
    return clean, len([c for c in alive if not c.scrubbed]), len(there) - len(alive)


def read_log(
    store: Store,
    source: Source = "log",
    flags: Flags | None = None,
    refused: Callable[[str], bool] = refuses,
    read_by: Mapping[str, str] | None = None,
) -> Log:
    """Read a server's log. source: log: what `serve_policy --log true` keeps; playground: what people agreed to keep.

    flags: None: nothing is flagged, nor counted as not flagged. read_by: fingerprints of `moderator` and `refusals`, by
    which what another one read is told from this."""
    found, unscrubbed, expired = readable(store, source)
    flagged = [None] * len(found) if flags is None else [tuple(names) for names in flags([c.messages for c in found])]
    requests = tuple(
        Request(
            c.id, float(c.created or 0.0), c.policy, c.fingerprint, json.dumps(dict(c.sampler), sort_keys=True), c.seed,
            len(c.messages[-1]["content"]), _refused(refused, c.messages[-1]["content"]), names,
        )
        for c, names in zip(found, flagged, strict=True)
    )  # fmt: skip
    now = store.clock()
    thumbs = tuple(
        (float(given.created or 0.0), given.thumb == 1)
        for given in store.feedback(usable=False)
        if given.kind == "thumb" and (given.expires is None or given.expires > now)
    )
    return Log(requests, thumbs, unscrubbed, expired, {"source": source, **(read_by or {})})


def _refused(refused: Callable[[str], bool], answer: str) -> bool:
    said = refused(answer)
    if said is None or not hasattr(said, "__bool__"):  # a list of them, say
        seen = f"{function_name(refused)} returned {short(repr(said))} for an answer"
        raise InputError(f"refusals: {seen}; return True where it refuses, else False")
    return bool(said)


def mix_of(request: Request) -> str:
    """Return what answered a request: policy, fingerprint and sampler."""
    return f"{request.policy} {request.fingerprint[:12]} {request.sampler}".strip()
