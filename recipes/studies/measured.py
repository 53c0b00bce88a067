"""Measurements that are no study of a published finding: tables that `write_results.py` takes over as it does a
benchmark's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.environment import machine
from rlhf_recipes.studies.study_page import markdown

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, head, rows."""


def keep(folder: Path, settings: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """Write results.json (the settings and the machine) and tables.md into a folder, in the form of a benchmark's."""
    (folder / "tables.md").unlink(missing_ok=True)  # made with other settings
    write_json_atomic(folder / "results.json", {"config": {**settings, "machine": machine()}})
    texts = [f"### {title}\n\n{markdown((head, rows))}\n" for title, head, rows in tables]
    (folder / "tables.md").write_text("\n".join(texts), encoding="utf-8")
