"""Several processes played by this one: work that is shared out is pickled, and done once per process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rlhf.run import owner


@contextmanager
def playing(processes: int) -> Iterator[list[int]]:
    """Play so many processes, of which all others wait for the first; yields how many results each exchange had."""
    exchanges: list[int] = []
    places = [0]

    def by_all(asked: Callable[[], Any], own: Callable[[], Any]) -> list[Any]:
        results = [own()]
        for place in range(1, processes):
            places.append(place)
            results.append(pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(asked))())))
            places.pop()
        exchanges.append(len(results))
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "waited_for", lambda: len(places) == 1)
        patch.setattr(owner, "processes", lambda: processes)
        patch.setattr(owner, "place", lambda: places[-1])
        patch.setattr(owner, "by_all", by_all)
        yield exchanges
    owner.held.clear()
