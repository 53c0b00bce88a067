"""One owner of a run's files: under several processes the main one decides and writes, between two barriers.

Nothing here imports torch in a run of one process: `--help` and a stage that is complete need none of it.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from threading import get_ident
from typing import Any, TypeVar, cast

from rlhf.errors import InputError, RunStopped

Result = TypeVar("Result")

_alone: list[int] = []
"""Not empty while the main process acts and the others wait: the id of the thread that acts, last 0 while it works on
its part of what all do."""
_groups: list[tuple[Any, Any]] = []
"""The default process group, and ours for it."""
held: dict[int, Any] = {}
"""What a waiting process has loaded for the work that it was asked for; nothing once the main one's action has ended
(`rlhf.run.sharing`)."""


def processes() -> int:
    """Return the number of this run's processes, as torchrun or accelerate started them."""
    group = _initialized()
    return int(group.get_world_size()) if group else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this is the only process or the first of several: the one that writes."""
    return place() == 0


def place() -> int:
    """Return this process's number among the run's, from 0 up."""
    group = _initialized()
    return int(group.get_rank()) if group else int(os.environ.get("RANK", "0"))


def wait_for_all() -> None:
    """Wait until every process of the run is here."""
    by_main(lambda: None)


def by_main(action: Callable[[], Result]) -> Result:
    """Call ``action`` on the main process alone, once all processes are here; all of them return its result.

    An error of it is raised on every process. Of the result a copy is sent, so it must be something pickle can hold.
    The wait has no limit: what the main process does may take hours, a whole stage for example, whose own calls of this
    function then are plain ones. The others, while they wait, do what ``by_all`` asks of them.
    """
    if processes() == 1 or _alone:
        return action()
    from torch import distributed

    group = _group()
    distributed.barrier(group)
    if not is_main():
        return cast(Result, _told(group))
    _alone.append(get_ident())
    try:
        result = action()
    except Exception as error:
        _tell(group, None, _message(error))
        raise
    finally:
        _alone.pop()
    _tell(group, result)
    return result


def waited_for() -> bool:
    """Return whether the other processes wait for this thread in `by_main`, so that it can ask them to work."""
    return bool(_alone) and _alone[-1] == get_ident()


def by_all(asked: Callable[[], Result], own: Callable[[], Result]) -> list[Result]:
    """Call ``asked`` on the processes that wait for this one in `by_main`, and ``own`` here meanwhile; return all
    results, this one's first.

    An error of one is raised here once all have ended. ``asked`` and its results must be something pickle can hold."""
    from torch import distributed

    group = _group()
    _tell(group, asked, WORK)
    result, failure = _worked(own)
    found: list[Any] = [None] * processes()
    distributed.gather_object((None, None), found, dst=0, group=group)
    if failure is not None:
        raise failure
    for _, message in found:
        if message is not None:
            raise message[0](message[1])
    return [result, *(pickle.loads(other) for other, _ in found[1:])]


WORK = "work"
"""Told with what is no result yet, but asked for."""


def _told(group: Any) -> Any:
    """Do what the main process asks for, until it has the result of its action, or an error, which is raised here."""
    from torch import distributed

    failure: Exception | None = None
    try:
        while True:
            told: list[Any] = [None, None]
            distributed.broadcast_object_list(told, src=0, group=group)
            given, message = told
            if message is None:
                return given
            if message != WORK:
                # one that began here is raised as it was: it knows where
                raise failure if failure and _message(failure) == message else message[0](message[1])
            result, failure = _worked(partial(_pickled, given))
            distributed.gather_object((result, failure and _message(failure)), None, dst=0, group=group)
    finally:
        held.clear()


def _pickled(work: Callable[[], Any]) -> bytes:
    """Return a result as it is sent; what pickle cannot hold is an error of the work."""
    return pickle.dumps(work())


def _tell(group: Any, given: Any, message: Any = None) -> None:
    from torch import distributed

    distributed.broadcast_object_list([given, message], src=0, group=group)


def _worked(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return this process's result, or its error. What the work calls shares nothing out, and waits for nobody."""
    _alone.append(0)
    try:
        return work(), None
    except Exception as error:
        return None, error
    finally:
        _alone.pop()


def _message(error: Exception) -> tuple[type[Exception], str]:
    """Return an error's type and text as the other processes raise it."""
    if isinstance(error, RunStopped):
        return RunStopped, str(error)
    return InputError, str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def on_each(check: Callable[[], str | None]) -> None:
    """Call ``check`` on every process; raise InputError on all of them where one returns what is wrong there."""
    found = [check()]
    if processes() > 1 and not _alone:
        from torch import distributed

        own, group = found[0], _group()
        found = [None] * processes()
        distributed.all_gather_object(found, own, group=group)
    for wrong in found:
        if wrong is not None:
            raise InputError(wrong)


def _initialized() -> Any:
    """Return torch.distributed if this process has joined the others, else None."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None


def _group() -> Any:
    """Return a group of all processes that waits without limit, on gloo: NCCL would give up after ten minutes."""
    from torch import cuda, distributed

    if not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not cuda.is_available(), timeout=timedelta(hours=2))
    world = distributed.group.WORLD
    if not _groups or _groups[0][0] is not world:  # a test's worker may leave one group and join another
        _groups[:] = [(world, distributed.new_group(backend="gloo", timeout=timedelta(days=30)))]
    return _groups[0][1]
