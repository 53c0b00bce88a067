"""Computations that need nothing of each other at the same time on a CPU: each in a thread, on its share of the cores.

Where all cores work on one operator, each operator ends with the slowest of them, and between operators one core works
and the others wait. Policy and value model side by side keep all of them busy: SmolLM2-135M on two cores, forward and
backward of both: 2.5 s instead of 3.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Barrier
from typing import TypeVar

import torch

Result = TypeVar("Result")


class SideBySide:
    """Runs tasks, so many at once; 1: one after the other, where they are asked for.

    A task sees the caller's context variables and whether gradients are wanted, and must not change what another one
    reads. Whatever they do, results are those of running one after the other with as few of torch's threads.
    """

    def __init__(self, at_once: int = 1):
        self.at_once = at_once
        self._pool: ThreadPoolExecutor | None = None

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Their results, in their order; the first of their errors, once all have ended."""
        if self.at_once == 1:
            return [task() for task in tasks]
        if self._pool is None:
            self._pool = _threads(self.at_once)
        gradients = torch.is_grad_enabled()
        futures = [self._pool.submit(copy_context().run, _with_gradients, task, gradients) for task in tasks]
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]


def cores() -> int:
    """How many of torch's threads there are to share."""
    return torch.get_num_threads()


def _with_gradients(task: Callable[[], Result], wanted: bool) -> Result:
    with torch.set_grad_enabled(wanted):
        return task()


def _threads(count: int) -> ThreadPoolExecutor:
    """A pool whose threads are all there, each with an equal share of torch's."""
    whole, ready = torch.get_num_threads(), Barrier(count)
    share = max(1, whole // count)

    def take_share() -> None:
        torch.set_num_threads(share)
        torch.get_num_threads()  # settles it: at a thread's first question, it takes what any thread set last
        ready.wait()

    pool = ThreadPoolExecutor(count, "side_by_side", initializer=take_share)
    for started in [pool.submit(cores) for _ in range(count)]:
        started.result()
    torch.set_num_threads(whole)  # for the threads that come after
    return pool
