"""Freed memory, which glibc keeps by default."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`; its bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "free", "top")
    ]


def release_freed_memory(at_least: int = 0) -> None:
    """Return freed memory to the system; at_least: only where it is so many bytes, which takes microseconds to read.

    After loading, glibc keeps as much as the models' own size. And torch asks for aligned blocks, whose gaps glibc
    often fails to fill: a forward pass takes new memory though the pass before has freed as much."""
    libc = _libc()
    trim, heap = getattr(libc, "malloc_trim", None), getattr(libc, "mallinfo2", None)
    if heap is not None:
        heap.restype = _Heap
    if trim is not None and (at_least == 0 or (heap is not None and heap().free >= at_least)):  # glibc 2.33 has both
        trim(0)


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
