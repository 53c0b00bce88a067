"""Freed memory, which glibc keeps by default."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def release_freed_memory() -> None:
    """Return freed memory to the system; after loading, glibc keeps as much as the models' own size, and little of it
    fits what comes next."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
