"""Rows of a data set that can't be used: refused, or left out and counted in the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Literal

from rlhf.errors import InputError
from rlhf.rows.sources import show, wrong

logger = logging.getLogger("rlhf")

OnBadRow = Literal["refuse", "drop"]
"""What becomes of rows that can't be used: the first is an error, or they are left out and counted in the log."""


class BadRows:
    """Rows of a data set that can't be used: the first is an error, or they are left out and counted (OnBadRow)."""

    def __init__(self, name: str, rule: OnBadRow):
        if rule not in ("refuse", "drop"):
            raise wrong("on_bad_row", f"got {show(rule)}", "write refuse or drop")
        self.name, self.rule = name, rule
        self.rows: list[tuple[str, str]] = []

    def add(self, where: str, error: InputError) -> None:
        """Raise an error that names the row, or note it."""
        if self.rule == "refuse":
            raise InputError(f"{where}: {error}" if where else str(error)) from None
        self.rows.append((where, str(error)))

    def tell(self, remaining: int) -> None:
        """Count the rows in the log, the first of them by its error. Raises InputError where no row remains."""
        if not self.rows:
            return
        where, error = self.rows[0]
        seen = f"{len(self.rows)} of {len(self.rows) + remaining} rows can't be used, the first {where}: {error}"
        if not remaining:
            raise InputError(f"{self.name}: {seen}")
        warn_once(f"{self.name}: on_bad_row=drop: left out: {seen}; {numbers([w for w, _ in self.rows])}")


def numbers(there: Sequence[str]) -> str:
    """Return the numbers of the first few rows, by line or row."""
    return ", ".join(where.rpartition(":")[2].strip() for where in there[:8]) + " ..." * (len(there) > 8)


@cache
def warn_once(message: str) -> None:
    logger.warning(message)
