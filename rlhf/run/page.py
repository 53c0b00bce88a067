"""One HTML page: its stylesheet, tables and plots. Text is escaped before it is inserted."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from typing import Any

Table = tuple[list[str], list[list[str]]]


INK, FIRST, SECOND = "#010203", "#3b82f6", "#e07b2e"  # INK becomes the page's own text colour


def text(value: Any) -> str:
    return html.escape(str(value))


def html_table(table: Table, kind: str = "") -> str:
    headers, rows = table
    if not rows:
        return "<p class=note>No evaluation yet.</p>" if kind else ""
    head = "".join(f"<th>{text(cell)}</th>" for cell in headers)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class=scroll><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def svg(draw: Callable[[Any], None], width: float, height: float) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    inked = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "rlhf", "font.size": 9, **dict.fromkeys(inked, INK)}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        written = io.StringIO()
        canvas.print_svg(written, metadata={"Date": None, "Creator": None})
    picture = written.getvalue()
    return picture[picture.index("<svg") :].replace(INK, "currentColor")


SHELL = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #8881; --dim: #777; --hot: #c2410c; }}
@media (prefers-color-scheme: dark) {{ :root {{ --dim: #9a9a9a; --hot: #fb923c; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
.scroll {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }}
th, td {{ text-align: right; white-space: nowrap; }}
th {{ color: var(--dim); font-weight: 500; }} th:first-child, td:first-child {{ text-align: left; }}
:is(th, td):last-child:nth-child(2) {{ text-align: left; white-space: normal; }}
.headline {{ font-size: 1.05rem; }} .headline td:first-child {{ font-weight: 600; }}
.note {{ margin: .3rem 0; color: var(--dim); }}
.warning {{ border-left: 4px solid var(--hot); background: var(--soft); }}
.warning {{ padding: .6rem 1rem; margin: 1rem 0; }}
.warning ul {{ margin: .3rem 0; padding-left: 1.2rem; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} .wide {{ max-width: 760px; }}
svg {{ width: 100%; height: auto; font-family: inherit; }}
figcaption, small {{ color: var(--dim); font-size: .82rem; font-weight: 400; }}
figcaption strong {{ color: CanvasText; }}
article {{ border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; padding: .2rem 1rem .6rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: .3rem 0; }}
.prompt {{ font-weight: 500; }} h4 {{ margin: .5rem 0 0; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; border-top: 1px solid var(--line); }}
.tag {{ font-size: .78rem; background: var(--soft); border: 1px solid var(--line); border-radius: 4px; }}
.tag {{ padding: 0 .4rem; margin-right: .5rem; }}
@media (max-width: 700px) {{ .pair {{ grid-template-columns: 1fr; }} }}
</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
