"""A desk over HTTP: models and simulated labelers judge at a server of `rlhf label` as they would in its process.

    label(HttpDesk("http://127.0.0.1:8000", token), my_labeler, seed=0)

The token is the annotator's own, as `rlhf label --annotators '[name:simulated]'` prints it.
"""

from __future__ import annotations

import json
from typing import Any

from rlhf.caller import Caller, reason_of
from rlhf.collection.records import Answer, HandedOn, Task
from rlhf.errors import InputError, RunStopped

MOST_BYTES = 256 * 1024 * 1024
"""Bytes of one answer: many tasks of long responses."""


class HttpDesk:
    """The desk of the annotator whom a token lets in.

    timeout: seconds that a call may take in all. retries: further attempts after a failed connection; a repeated lease
    or submission changes nothing. A call raises InputError for what the server refuses, RunStopped where it can't be
    reached.
    """

    def __init__(self, url: str, token: str, timeout: float = 60.0, retries: int = 5) -> None:
        remedy = "take fewer tasks at a time"
        self.caller = Caller(url, token, timeout, retries, "a server of `rlhf label`", remedy)

    def lease(self, count: int = 1) -> tuple[Task, ...]:
        """Return up to `count` tasks; none when all is done."""
        said = self._ask("/api/next", {"count": count})
        try:
            return tuple(Task.from_json(task) for task in said["tasks"])
        except (KeyError, TypeError) as error:
            raise self._wrong(f"no tasks ({type(error).__name__}: {error})") from None

    def submit(self, answer: Answer) -> int:
        """Store an answer and return its judgment's id; a repeat returns the first one's."""
        said = self._ask("/api/judgments", answer.to_json()).get("judgment")
        if not isinstance(said, int):
            raise self._wrong("no judgment's number")
        return said

    def skip(self, assignment: int, reason: str = "") -> None:
        """Hand a task back unjudged."""
        self._ask("/api/skip", {"assignment": assignment, "reason": reason})

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        status, text = self.caller.ask(path, body, MOST_BYTES)
        if status == 401:
            raise InputError(f"{self.caller.url}: the token lets nobody in; take the one that `rlhf label` printed")
        if status == 409:
            raise HandedOn(self.caller.shown(reason_of(text), 300))
        if status != 200:
            self.caller.refused(status, text)
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise self._wrong("no JSON object")
        return said

    def _wrong(self, what: str) -> RunStopped:
        return RunStopped(f"{self.caller.url}: the answer has {what}; is it a server of `rlhf label`?")
