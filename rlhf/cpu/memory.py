"""What glibc does with the memory of CPU tensors: some of its habits cost this kind of program much."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names for them, from malloc.h


def release_freed_memory() -> None:
    """Give the system back what loading has freed: glibc keeps it, and that is as much as the models themselves."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_large_blocks() -> None:
    """Let large freed blocks stay in the process, for the next micro-batch.

    By itself glibc returns the activations of every backward to the system, which hands them out again page by page,
    zeroed: a tenth of the time of forward and backward, measured on two cores. For the whole process.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 2**30)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
