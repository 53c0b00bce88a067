"""Settings of glibc's allocator, whose defaults cost a training program time and memory."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names for them, from malloc.h


def release_freed_memory() -> None:
    """Return freed memory to the system; after loading, glibc keeps as much as the models' own size."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_large_blocks() -> None:
    """Keep large freed blocks in the process, for the next micro-batch; a setting of the whole process.

    By default glibc returns the activations of every backward to the system, which then provides zeroed pages again:
    a tenth of the time of forward and backward, measured on two cores.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 2**30)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
