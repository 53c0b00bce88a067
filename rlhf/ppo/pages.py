"""A whole update as web pages: a page per response, each with links to its neighbours, and an index of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import short
from rlhf.ppo.view import Sort, response_page, response_view, row_cells, sorted_rows
from rlhf.run import page as html

if TYPE_CHECKING:
    from rlhf.ppo.rollout import ReadyRollout


def write_pages(
    rollout: ReadyRollout,
    tokenizer: Any,
    title: str,
    folder: Path,
    sort: Sort | None = None,
    report: Path | None = None,
) -> Path:
    """Write `row-<k>.html` for every response, in the order of `sort`, and `index.html`; return the index's path.

    report: the run's page, to which the index leads if it is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = sorted_rows(rollout, sort)
    for place, row in enumerate(order):
        before = [("previous", _name(order[place - 1]))] if place else []
        after = [("next", _name(order[place + 1]))] if place + 1 < len(order) else []
        links = [*before, ("index", "index.html"), *after]
        page = response_page(response_view(rollout, row, tokenizer), f"{title}, row {row}", links)
        html.write(folder / _name(row), page)
    above = [("the run's report", os.path.relpath(report, folder))] if report is not None and report.is_file() else []
    return html.write(folder / "index.html", html.page(title, html.links(above) + _index(rollout, order, sort), _STYLE))


def _index(rollout: ReadyRollout, order: list[int], sort: Sort | None) -> str:
    cells = {row: row_cells(rollout, row) for row in order}
    headers = ["row", *cells[order[0]]] if order else ["row"]
    rows = [[f"row {row}", *(short(cell, 80) for cell in cells[row].values())] for row in order]
    note = f"{len(order)} responses{f', highest {sort} first' if sort else ', in the order of the rollout'}."
    return html.note(note) + html.table((headers, rows), "index", [_name(row) for row in order])


def _name(row: int) -> str:
    return f"row-{row}.html"


_STYLE = """
.index :is(th, td):is(:nth-child(2), :nth-child(3)) { text-align: left; white-space: normal; min-width: 14rem; }
"""
