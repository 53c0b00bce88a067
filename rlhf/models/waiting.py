"""Let threads that wait for one another give their cores away soon where other programs need them.

GNU OpenMP's threads wait by spinning, for milliseconds. On a quiet machine that is the fastest. Beside a busy process
they hold a core that the thread they wait for needs, and training is several times slower. GNU OpenMP spins a thousand
times shorter while more of its threads exist than cores, and looks at every wait: so one more team of threads, which
sleeps, switches the long spinning off (`Crowd`), and its end switches it on again. No result depends on it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import torch

SECONDS = 0.5  # between two looks
BUSY, QUIET = 0.3, 0.15  # seconds per second that our threads, together, wait for a core: crowd above, spin below
SET_BY_USERS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

_started = threading.Lock()


def give_way(device: torch.device) -> None:
    """Watch from now on, in a thread of its own, whether other programs compete for our cores; starts one per process.

    Does nothing on another device than a CPU, where a user has set GOMP_SPINCOUNT or OMP_WAIT_POLICY, with one thread,
    with threads for at most half of the cores, without GNU OpenMP, or outside Linux.
    """
    if device.type == "cpu" and _applies() and _started.acquire(blocking=False):
        threading.Thread(target=_watch, name="rlhf-waiting", daemon=True).start()


def _applies() -> bool:
    threads = torch.get_num_threads()
    if threads < 2 or any(name in os.environ for name in SET_BY_USERS):
        return False
    try:
        cores = len(os.sched_getaffinity(0))
        return 2 * threads - 1 > cores and "libgomp" in Path("/proc/self/maps").read_text()
    except (AttributeError, OSError):  # not Linux
        return False


def _watch() -> None:
    crowd = Crowd()
    clock, before = threading.Event(), waited_seconds()
    while True:
        clock.wait(SECONDS)
        now = waited_seconds()
        crowd.decide((now - before) / SECONDS)
        before = now


def waited_seconds() -> float:
    """Return how long this process's threads, together, have been ready to run without a core to run on."""
    total = 0
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError, IndexError):  # it has ended
            total += int((thread / "schedstat").read_text().split()[1])
    return total / 1e9


class Crowd:
    """A team of OpenMP's threads that sleeps while it is there."""

    def __init__(self) -> None:
        self._over: threading.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def there(self) -> bool:
        return self._thread is not None

    def decide(self, waited: float) -> None:
        """Come if the other threads waited for cores (seconds per second), go if they hardly did, else leave it so."""
        if not self.there and waited > BUSY:
            self.come()
        elif self.there and waited < QUIET:
            self.go()

    def come(self) -> None:
        self._over = over = threading.Event()

        def stay() -> None:
            torch.ones(2**20).neg_()  # large enough to be shared out: the team lives as long as this thread
            over.wait()

        self._thread = threading.Thread(target=stay, name="rlhf-crowd", daemon=True)
        self._thread.start()

    def go(self) -> None:
        if self._over is not None and self._thread is not None:
            self._over.set()
            self._thread.join()
        self._over = self._thread = None
