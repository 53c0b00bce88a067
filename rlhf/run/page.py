"""Write HTML pages that open without a network: one stylesheet, tables, notes, answers side by side, SVG pictures.

A line, a cell or an answer is inserted as text, never as markup. Every page's content security policy forbids scripts
and everything from other addresses.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""The content security policy of a page that is a file."""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headers, and rows of as many cells."""

INK, FIRST, SECOND, WRONG = "#010203", "#3b82f6", "#e07b2e", "#c2410c"  # INK becomes the page's own text colour


class Answer(NamedTuple):
    """One of several responses to a prompt: a name, facts (a score) and its text."""

    name: str
    facts: str
    text: str


def page(title: str, body: str, style: str = "") -> str:
    """Write a whole page; `style`: CSS rules of this page alone, after the common ones."""
    return _PAGE.format(policy=POLICY, title=text(title), style=f"{STYLE}{style}", body=body)


def write(path: str | Path, content: str) -> Path:
    """Write a page in one step and return its path: nobody reads half of it, and a link of its name is replaced."""
    path = Path(path)
    writing = path.with_name(f".{path.name}.writing")
    writing.unlink(missing_ok=True)
    with writing.open("x", encoding="utf-8", errors="backslashreplace") as file:  # never through a link that is there
        file.write(content)
    return writing.replace(path)


def text(value: object) -> str:
    """Escape a value, so that none of it is markup."""
    return html.escape(str(value))


def note(line: str) -> str:
    """Write a paragraph in a dim colour."""
    return f"<p class=note>{text(line)}</p>"


def verdict(line: str) -> str:
    """Write the sentence that a page comes to, in large letters."""
    return f"<p class=verdict>{text(line)}</p>"


def address(path: str) -> str:
    """Write a relative path, or an #anchor, as a link's address."""
    return text(quote(path, safe="/#.-_~"))


def links(targets: Iterable[tuple[str, str]]) -> str:
    """Write links (label, path or #anchor) in a row; "" without any. Paths are relative to the page's folder."""
    shown = [f'<a href="{address(target)}">{text(label)}</a>' for label, target in targets]
    return f"<nav>{' '.join(shown)}</nav>" if shown else ""


def items(lines: Iterable[str], kind: str = "") -> str:
    """Write a list."""
    return f'<ul class="{kind}">{"".join(f"<li>{text(line)}</li>" for line in lines)}</ul>'


def warning(heading: str, lines: Iterable[str]) -> str:
    """Write a highlighted box of lines."""
    return f"<div class=warning><strong>{text(heading)}</strong>{items(lines)}</div>"


def table(content: Table, kind: str = "", targets: Sequence[str] = ()) -> str:
    """Write a table; one that is too wide scrolls. targets: for each row, the path that its first cell leads to."""
    headers, rows = content
    head = "".join(f"<th>{text(cell)}</th>" for cell in headers)
    cells = [[text(cell) for cell in row] for row in rows]
    for row, target in zip(cells, targets, strict=False):
        row[0] = f'<a href="{address(target)}">{row[0]}</a>'
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    return f'<div class=scroll><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def compared(prompt: str, answers: Iterable[Answer], tag: str = "") -> str:
    """Write a prompt and the answers to it side by side."""
    label = f"<span class=tag>{text(tag)}</span>" if tag else ""
    sides = "".join(
        f"<div><h4>{text(answer.name)} <small>{text(answer.facts)}</small></h4>"
        f"<pre>{text(answer.text) or '<em>(empty)</em>'}</pre></div>"
        for answer in answers
    )
    return f"<article><pre class=prompt>{label}{text(prompt)}</pre><div class=pair>{sides}</div></article>"


def svg(draw: Callable[[Axes], None], width: float, height: float) -> str:
    """Draw one picture of `width` x `height` inches; equal drawings make equal text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    inked = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "rlhf", "font.size": 9, **dict.fromkeys(inked, INK)}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        written = io.StringIO()
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
    picture = written.getvalue()
    return picture[picture.index("<svg") :].replace(INK, "currentColor")


def legend(axes: Axes, columns: int = 2) -> None:
    """Name the curves above the plot, where no point can lie under the names."""
    axes.figure.legend(  # type: ignore[union-attr]
        loc="outside upper left", frameon=False, fontsize=8, labelcolor=INK, ncols=columns, handletextpad=0.5,
        columnspacing=1.2, borderpad=0,
    )  # fmt: skip


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --dim: #666; --hot: #c2410c;
  --link: #1d4ed8; }
@media (prefers-color-scheme: dark) { :root { --dim: #a3a3a3; --hot: #fb923c; --link: #93c5fd; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto 5rem; padding: 0 1rem; }
h1 { font-size: 1.45rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2.3rem 0 .6rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.2rem 0 .2rem; } h4 { margin: .5rem 0 0; }
.verdict { font-size: 1.12rem; line-height: 1.4; margin: .8rem 0; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0; overflow-wrap: anywhere; }
a { color: var(--link); } .short { padding-left: 1.2rem; }
.note { margin: .3rem 0; color: var(--dim); overflow-wrap: anywhere; }
.warning { border-left: 4px solid var(--hot); background: var(--soft); padding: .6rem 1rem; margin: 1rem 0; }
.warning ul { margin: .3rem 0; padding-left: 1.2rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem; align-items: start; }
.wide { max-width: 500px; } figure { margin: 0; max-width: 520px; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
figcaption, small { color: var(--dim); font-size: .82rem; font-weight: 400; } figcaption strong { color: CanvasText; }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--dim); font-weight: 500; vertical-align: bottom; } td { white-space: nowrap; }
:is(th, td):first-child { text-align: left; }
:is(th, td):last-child:nth-child(2) { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.card :is(th, td) { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.headline { font-size: 1.05rem; } .headline td:first-child { font-weight: 600; }
article { border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; padding: .2rem 1rem .6rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: .3rem 0; }
pre { max-height: 16rem; overflow-y: auto; } .prompt { font-weight: 500; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; border-top: 1px solid var(--line); }
.tag { font-size: .78rem; background: var(--soft); border: 1px solid var(--line); border-radius: 4px; }
.tag { padding: 0 .4rem; margin-right: .5rem; }
.warning, li { overflow-wrap: anywhere; } .grid > *, .pair > * { min-width: 0; }
@media (max-width: 700px) { .pair, .grid { grid-template-columns: minmax(0, 1fr); } .pair { gap: 0; }
  body { margin-top: 1rem; } .headline { font-size: .85rem; } .headline td { white-space: normal; }
  .headline :is(th, td) { padding-right: .4rem; }
  table:not(.headline) th { white-space: nowrap; }
  .card :is(tbody, tr, td) { display: block; } .card tr:first-child { display: none; }
  .card td { border: 0; padding: 0; } .card td:first-child { font-weight: 500; }
  .card tr { border-bottom: 1px solid var(--line); padding: .3rem 0; }
  .card td:last-child { color: var(--dim); font-size: .82rem; } }
"""
