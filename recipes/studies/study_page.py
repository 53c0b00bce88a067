"""The files of a study, made of its result alone: NAME.json, a picture per panel, NAME.html; its tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.run import page as html
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.tables import duration
from rlhf_recipes.studies.verdicts import RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]
"""What `study.result_of` makes."""
COLORS = [html.FIRST, html.SECOND, "#0f9d76", "#7c3aed", html.WRONG, "#6b7280"]


def write(result: Result, folder: Path) -> Path:
    """Write a study's files into a folder; return the page's path."""
    write_result(result, folder)
    return html.write(folder / f"{result['name']}.html", page(result))


def write_result(result: Result, folder: Path) -> None:
    """Write what is committed of a study: its result, and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / f"{result['name']}.json", result)
    for panel, picture in pictures(result).items():
        html.write(folder / file_of(result, panel), picture)


def file_of(result: Result, panel: str) -> str:
    """Return the name of a panel's picture."""
    first = result["panels"][0]["name"]
    return f"{result['name']}.svg" if panel == first else f"{result['name']}_{panel.replace(' ', '_')}.svg"


def page(result: Result) -> str:
    """Write the page: verdict, claim, source, miniature, plots, checks, all numbers."""
    seeds = ", ".join(map(str, result["seeds"]))
    about = [("claim", "claim"), ("source", "source"), ("our miniature", "miniature")]
    parts = [
        html.verdict(f"Does it come out? {result['verdict'].capitalize()}."),
        html.table((["", ""], [[label, result[name]] for label, name in about])),
        "<div class=grid>",
        *(f"<figure>{picture}<figcaption>{html.text(panel)}</figcaption></figure>"
          for panel, picture in pictures(result).items()),
        "</div>",
        html.note(f"Bars and bands: 95% over the seeds {seeds} (Student's t)."),
        html.table((CHECKED, check_rows(result))),
        html.note(RULE),
        "<h2>Numbers</h2>",
        *(html.table(table) for table in tables(result)),
        html.note("Over seeds: what another seed would give. Over prompts: of these seeds alone."),
        html.note(made(result)),
    ]  # fmt: skip
    return html.page(result["title"], "\n".join(parts))


def made(result: Result) -> str:
    """Say how long it took, on what."""
    seconds = ", ".join(f"{seed}: {duration(value)}" for seed, value in result["seconds"].items())
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    parts = [f"Time by seed, without stages that were complete before: {seconds}", result["machine"], settings]
    return ". ".join(part for part in parts if part) + "."


# ---------------------------------------------------------------- tables

CHECKED = ["check", "says", "mean", "over seeds", "by seed"]


def check_rows(result: Result) -> list[list[str]]:
    return [
        [check["text"], check["says"] if check["n"] > 1 else "one seed", digits(check["value"]),
         interval(None if check["low"] is None else [check["low"], check["high"]]),
         ", ".join(digits(value) for value in check["by_seed"])]
        for check in result["checks"]
    ]  # fmt: skip


def tables(result: Result) -> list[tuple[list[str], list[list[str]]]]:
    """Make a table per panel: a row per point."""
    made = []
    for panel in result["panels"]:
        found = [point for point in result["points"] if point["panel"] == panel["name"]]
        with_x = any(point["x"] is not None for point in found)
        head = [panel["name"] or "of", *([panel["x"]] if with_x else []), panel["y"], "over seeds", "over prompts"]
        rows = [
            [named(point, len(result["seeds"])), *([digits(point["x"])] if with_x else []), digits(point["value"]),
             interval(point["seeds"]), interval(point["prompts"])]
            for point in found
        ]  # fmt: skip
        made.append((head, rows))
    return made


def by_seed(result: Result, without: str | None = None) -> str:
    """Write the values without x, but for those of one panel, as one table in Markdown, panel by panel: a column per
    seed, then their mean with its intervals."""
    names = {panel["name"]: panel["y"] for panel in result["panels"]}
    points = sorted(result["points"], key=lambda point: [*names].index(point["panel"]))
    head = ["", *(f"seed {seed}" for seed in result["seeds"]), "mean", "over seeds", "over prompts"]
    rows = [
        [f"{names[point['panel']]}: {point['series']}", *map(digits, point["by_seed"]), digits(point["value"]),
         interval(point["seeds"]), interval(point["prompts"])]
        for point in points if point["x"] is None and point["panel"] != without
    ]  # fmt: skip
    return markdown((head, rows))


def by_series(result: Result, bare: Collection[str] = ()) -> str:
    """Write the values without x as one table in Markdown: a row per series, a column per panel, with intervals over
    seeds. bare: panels without intervals."""
    of = {(point["series"], point["panel"]): point for point in result["points"] if point["x"] is None}

    def cell(series: str, panel: str) -> str:
        point = of.get((series, panel))
        if point is None:
            return ""
        return f"{digits(point['value'])} {'' if panel in bare else interval(point['seeds'])}".strip()

    panels = {panel["name"]: panel["y"] for panel in result["panels"] if panel["name"] in {name for _, name in of}}
    rows = [[series, *(cell(series, name) for name in panels)] for series in dict.fromkeys(series for series, _ in of)]
    return markdown((["", *panels.values()], rows))


def digits(value: float) -> str:
    """Write a number in three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"[{digits(bounds[0])}, {digits(bounds[1])}]"


def markdown(table: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    """Write a table in Markdown; no cell breaks it."""
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def section(result: Result, pictures_at: str) -> str:
    """Write the study's part of the results page. pictures_at: the pictures' folder, seen from that page."""
    shown = " ".join(
        f"![{result['title']}: {panel['y']}]({pictures_at}/{file_of(result, panel['name'])})"
        for panel, _ in drawn(result)
    )
    return "\n\n".join([
        f"### {result['number']}. {result['title']}: {result['verdict']}",
        f"**Claim** ({result['source']}): {result['claim']} **Here:** {result['miniature']}",
        shown,
        markdown((CHECKED, check_rows(result))),
    ])  # fmt: skip


# ---------------------------------------------------------------- pictures


def drawn(result: Result) -> list[tuple[Mapping[str, str], list[Mapping[str, Any]]]]:
    """Return the panels that are drawn, those with an axis and points, with their points."""
    of = {panel["name"]: [p for p in result["points"] if p["panel"] == panel["name"]] for panel in result["panels"]}
    return [(panel, of[panel["name"]]) for panel in result["panels"] if panel["y"] and of[panel["name"]]]


def pictures(result: Result) -> dict[str, str]:
    """Draw every such panel."""
    made = {}
    for panel, found in drawn(result):
        lonely = all(point["x"] is None for point in found)
        height = 1.0 + 0.35 * len(found) if lonely else 3.4
        seeds = len(result["seeds"])
        made[panel["name"]] = html.svg(lambda axes, p=panel, f=found, s=seeds: draw(axes, p, f, s), 4.8, height)
    return made


def draw(axes: Axes, panel: Mapping[str, str], found: Sequence[Mapping[str, Any]], seeds: int) -> None:
    """Draw a panel: curves with bands over seeds, or a value with its interval per series. A hollow point is the mean
    of fewer seeds than the study's, and no neighbour of those that are of all."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for point in found:
        curves.setdefault(point["series"], []).append(point)
    if all(point["x"] is None for point in found):
        for place, point in enumerate(reversed(found)):
            low, high = point["seeds"] or (point["value"], point["value"])
            axes.plot([low, high], [place, place], color=html.FIRST, linewidth=1.4)
            axes.plot([point["value"]], [place], "o", color=html.FIRST, markersize=5, fillstyle=fill(point, seeds))
            axes.plot(point["by_seed"], [place] * len(point["by_seed"]), "|", color=html.INK, markersize=7)
        axes.set_yticks(range(len(found)), [named(point, seeds) for point in reversed(found)])
        axes.set_xlabel(panel["y"])
        return
    for place, (name, curve) in enumerate(curves.items()):
        along = [point for point in curve if point["x"] is not None]
        whole = [point for point in along if len(point["by_seed"]) == seeds]
        few = [point for point in along if len(point["by_seed"]) < seeds]
        color, marker = COLORS[place % len(COLORS)], "o" if len(along) < 20 else None
        axes.plot(*line(whole), color=color, linewidth=1.6, marker=marker, markersize=2.5, label=name)
        if few:
            axes.plot(*line(few), "o", color=color, markersize=4.5, fillstyle="none")
        if whole and all(point["seeds"] for point in whole):
            low, high = zip(*(point["seeds"] for point in whole), strict=True)
            axes.fill_between(line(whole)[0], low, high, color=color, alpha=0.12, linewidth=0)
    if any(len(point["by_seed"]) < seeds for point in found):
        axes.plot([], [], "o", color=html.INK, markersize=4.5, fillstyle="none", label="not of all seeds")
    if panel["scale"] == "log":
        axes.set_xscale("log")
    elif panel["scale"] == "sqrt":
        axes.set_xscale("function", functions=(lambda v: abs(v) ** 0.5, lambda v: v**2))
    axes.set_xlabel(panel["x"])
    axes.set_ylabel(panel["y"])
    html.legend(axes)


def line(found: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [point["x"] for point in found], [point["value"] for point in found]


def fill(point: Mapping[str, Any], seeds: int) -> Literal["full", "none"]:
    return "full" if len(point["by_seed"]) == seeds else "none"


def named(point: Mapping[str, Any], seeds: int) -> str:
    """Return a point's series, with the number of its seeds where it lacks some."""
    few = len(point["by_seed"])
    return point["series"] if few == seeds else f"{point['series']} ({few} of {seeds} seeds)"
