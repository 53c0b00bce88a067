"""Slots for the requests that a server works on at a time, so that a queue has an end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from rlhf.run.http import Refused

PATIENCE = 0.5  # seconds that a request may take to arrive while all slots are taken


class Slots:
    """The slots of a server's event loop.

    most: requests at a time (arriving, waiting or being worked on). seconds: that a request may take to arrive. full:
    the status of the answer to one more.
    """

    def __init__(self, most: int, seconds: float, full: int) -> None:
        self.most, self.seconds, self.full = most, seconds, full
        self.taken = 0
        self._arriving: dict[asyncio.Timeout, float] = {}  # the oldest first

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one slot, taken before a byte of the request is read. Raises Refused where none is left."""
        if self.taken >= self.most and not self._make_room():
            raise Refused(self.full, f"the queue is full ({self.most} requests); try again")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    @contextlib.contextmanager
    def arriving(self) -> Iterator[asyncio.Timeout]:
        """Yield the time-out in which a request must arrive; a full queue may shorten it."""
        until = asyncio.timeout(self.seconds)
        self._arriving[until] = asyncio.get_running_loop().time()
        try:
            yield until
        finally:
            self._arriving.pop(until, None)

    def _make_room(self) -> bool:
        """Give up the request that has been arriving longest: clients that send nothing must not fill the queue."""
        now = asyncio.get_running_loop().time()
        slowest = next(iter(self._arriving), None)
        if slowest is None or now - self._arriving[slowest] < PATIENCE:
            return False
        del self._arriving[slowest]
        slowest.reschedule(now)
        return True
