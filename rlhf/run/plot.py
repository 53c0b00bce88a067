"""What a trainer logged as a figure: a small plot per metric over the steps.

matplotlib is imported when one is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf import metrics
from rlhf.errors import InputError, unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Figure  # the trainers name it

COLUMNS, WIDTH, HEIGHT = 3, 3.6, 2.2  # plots beside one another; inches of each


def __getattr__(name: str) -> Any:
    if name != "Figure":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from matplotlib.figure import Figure

    return Figure  # for whoever asks what a trainer's plot returns


def plot(log_history: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> Figure:
    """Draw the metrics of a trainer's `state.log_history`: those that are named, or all.

    A notebook shows the figure by itself; `.savefig("run.png")` writes it.
    `eval_loss` is drawn with `loss`, and so on. Dashed lines are the bounds of a metric's healthy range. Raises
    InputError where nothing was logged yet, or not under that name.
    """
    from matplotlib.figure import Figure

    class Plot(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    curves: dict[str, list[tuple[float, float]]] = {}
    for line in log_history:
        for name, value in metrics.from_logs(line).items():
            if name not in ("step", "epoch"):
                curves.setdefault(name, []).append((line["step"], value))
    panels: dict[str, list[str]] = {}
    for name in curves:
        panels.setdefault(name.removeprefix("eval_"), []).append(name)
    if not panels:
        raise InputError("plot: nothing was logged yet; train first")
    for name in names:
        if name not in panels:
            unknown(name, panels, "plot", "metric")
    shown = list(names) or list(panels)
    rows = -(-len(shown) // COLUMNS)
    figure = Plot(figsize=(COLUMNS * WIDTH, rows * HEIGHT), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for name, axis in zip(shown, axes, strict=False):
        for curve in panels[name]:
            axis.plot(*zip(*curves[curve], strict=True), marker="." if len(curves[curve]) < 20 else "", label=curve)
        _finish(axis, name, several=len(panels[name]) > 1)
    for axis in axes:  # the iterator goes on behind the last plot
        axis.set_axis_off()
    return figure


def _finish(axis: Any, name: str, several: bool) -> None:
    metric = metrics.METRICS.get(name)
    low, high = axis.get_ylim()
    for bound in (metric.healthy_low, metric.healthy_high) if metric else ():
        if bound is not None and low <= bound <= high:
            axis.axhline(bound, color="grey", linestyle="--", linewidth=0.8)
    axis.set_title(name, fontsize=9, loc="left")
    axis.set_ylabel(metric.unit if metric else "", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    if several:
        axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)  # off the points
