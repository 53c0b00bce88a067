"""One owner of a run's files: under several processes the main one decides and writes, between two barriers.

Nothing here imports torch in a run of one process: `--help` and a stage that is complete need none of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

from rlhf.errors import InputError, RunStopped

Result = TypeVar("Result")

_alone: list[bool] = []
"""Not empty while the main process acts and the others wait."""
_groups: list[tuple[Any, Any]] = []
"""The default process group, and ours for it."""


def processes() -> int:
    """Return the number of this run's processes, as torchrun or accelerate started them."""
    group = _initialized()
    return int(group.get_world_size()) if group else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this is the only process or the first of several: the one that writes."""
    group = _initialized()
    return (int(group.get_rank()) if group else int(os.environ.get("RANK", "0"))) == 0


def wait_for_all() -> None:
    """Wait until every process of the run is here."""
    by_main(lambda: None)


def by_main(action: Callable[[], Result]) -> Result:
    """Call ``action`` on the main process alone, once all processes are here; all of them return its result.

    An error of it is raised on every process. Of the result a copy is sent, so it must be something pickle can hold.
    The wait has no limit: what the main process does may take hours, a whole stage for example, whose own calls of this
    function then are plain ones.
    """
    if processes() == 1 or _alone:
        return action()
    from torch import distributed

    group = _group()
    distributed.barrier(group)
    sent: list[Any] = [None, None]
    if is_main():
        _alone.append(True)
        try:
            sent[0] = action()
        except Exception as error:
            sent[1] = str(error) if isinstance(error, InputError | RunStopped) else f"{type(error).__name__}: {error}"
            sent[0] = RunStopped if isinstance(error, RunStopped) else InputError
            distributed.broadcast_object_list(sent, src=0, group=group)
            raise
        finally:
            _alone.pop()
    distributed.broadcast_object_list(sent, src=0, group=group)
    result, message = sent
    if message is not None:
        raise result(message)
    return cast(Result, result)


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
