"""Work that the main process shares out to those that wait for it in `by_main`: sampling, scoring.

The main process runs the recipe alone: it reads, draws seeds, judges and writes. Only what costs time on a GPU it cuts
into parts, of which every process works on its share; the results are those of one process, in their order. So the
others need only load the models that a share needs, which they do themselves, on their own devices, from where the main
process says it has loaded them (`remember`).
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rlhf.run import owner

Part = TypeVar("Part")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Copy:
    """How a process that waits makes its own of something that the main one has: by calling `load` with `given`."""

    number: int
    load: Callable[..., Any]
    given: tuple[Any, ...]

    def here(self) -> Any:
        """Return this process's own, made when it is first needed."""
        if self.number not in owner.held:
            given = [thing.here() if isinstance(thing, Copy) else thing for thing in self.given]
            with _loading_whole():
                owner.held[self.number] = self.load(*given)
        return owner.held[self.number]

    def numbers(self) -> Iterator[int]:
        """Yield its number, and those of what it is made of."""
        yield self.number
        for thing in self.given:
            if isinstance(thing, Copy):
                yield from thing.numbers()


@contextmanager
def _loading_whole() -> Iterator[None]:
    """Let transformers load weights inside the context, whatever accelerate's file says for training: by
    `fsdp_cpu_ram_efficient_loading` models stay empty on all processes but the first, which fills them later."""
    before = os.environ.get(EMPTY)
    if before is not None:
        os.environ[EMPTY] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[EMPTY] = before


EMPTY = "FSDP_CPU_RAM_EFFICIENT_LOADING"

_copies: dict[int, Copy] = {}
"""Of what has been remembered and is still there, by its id."""
_numbers = itertools.count()


def remember(made: Any, load: Callable[..., Any], *given: Any) -> None:
    """Remember that ``load(*given)`` makes the same as ``made``, so that other processes can have it too.

    ``load`` and ``given`` must be something pickle can hold; what is itself remembered may stand in ``given``."""
    _copies[id(made)] = Copy(next(_numbers), load, tuple(_copies.get(id(thing), thing) for thing in given))
    weakref.finalize(made, _copies.pop, id(made), None).atexit = False


def can_share(*needed: Any) -> bool:
    """Return whether other processes wait to work for this one, and can have all that is ``needed``."""
    return owner.waited_for() and all(id(thing) in _copies for thing in needed)


def share(work: Callable[..., Sequence[Result]], parts: Sequence[Part], *needed: Any) -> list[Result]:
    """Call ``work(its parts, *needed)``, which returns one result per part, on every process that waits for this one
    with its share of the parts; return the results of all parts, in order.

    Where nobody waits, or one of ``needed`` was not remembered, this process does all of it. ``work``, parts and
    results must be something pickle can hold."""
    if len(parts) < 2 or not can_share(*needed):
        return list(work(parts, *needed)) if parts else []
    copies = [_copies[id(thing)] for thing in needed]
    known = frozenset(number for copy in list(_copies.values()) for number in copy.numbers())
    shares = owner.by_all(partial(_by_copies, work, list(parts), copies, known), lambda: _share(work, parts, needed))
    results: list[Any] = [None] * len(parts)
    for process, found in enumerate(shares):
        results[process :: len(shares)] = found
    return results


def _by_copies(
    work: Callable[..., Sequence[Result]], parts: Sequence[Any], copies: Sequence[Copy], known: frozenset[int]
) -> list[Result]:
    """Work on the share of a process that waits; what the main one has no more it forgets, too."""
    for number in owner.held.keys() - known:
        del owner.held[number]
    return _share(work, parts, (copy.here() for copy in copies))


def _share(work: Callable[..., Sequence[Result]], parts: Sequence[Any], needed: Iterable[Any]) -> list[Result]:
    """Work on this process's share; where it has no part, nothing is loaded."""
    own = parts[owner.place() :: owner.processes()]
    return list(work(own, *needed)) if own else []
