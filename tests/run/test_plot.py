"""A trainer's log as a figure: which curves are drawn, with what points."""

from __future__ import annotations

import sys

import pytest

from rlhf.errors import InputError
from rlhf.run.plot import plot

LOG = [
    {"loss": 3.0, "mean_token_accuracy": 0.1, "step": 1, "epoch": 0.5},
    {"loss": 2.0, "mean_token_accuracy": 0.3, "step": 2, "epoch": 1.0},
    {"eval_loss": 2.5, "eval_runtime": 3.0, "step": 2, "epoch": 1.0},
    {"train_runtime": 9.0, "train_loss": 2.5, "step": 2},
]


def curves(figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Per plot its title, and of every line with a name the points."""
    found = {}
    for axis in figure.axes:
        if axis.axison:
            lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
            found[axis.get_title(loc="left")] = {
                name: list(zip(*map(list, line.get_data()), strict=True)) for name, line in lines.items()
            }
    return found


def test_every_metric_is_drawn_over_its_steps_and_held_out_beside_trained() -> None:
    assert curves(plot(LOG)) == {
        "loss": {"loss": [(1, 3.0), (2, 2.0)], "eval_loss": [(2, 2.5)]},
        "token_accuracy": {"token_accuracy": [(1, 0.1), (2, 0.3)]},
    }
    assert list(curves(plot(LOG, ["token_accuracy"]))) == ["token_accuracy"]


def test_the_bounds_of_the_healthy_range_are_drawn_where_they_are_in_sight() -> None:
    def bounds(values: list[float]) -> list[float]:
        figure = plot([{"clip_fraction": value, "step": step} for step, value in enumerate(values)])
        return [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() == "--"]

    assert bounds([0.1, 0.3]) == [0.2]
    assert bounds([0.01, 0.02]) == []


def test_mistakes() -> None:
    with pytest.raises(InputError, match="nothing was logged yet; train first"):
        plot([])
    with pytest.raises(InputError, match="unknown metric losss; did you mean loss"):
        plot(LOG, ["losss"])


def test_a_notebook_shows_it_and_no_global_figure_is_left() -> None:
    assert plot(LOG)._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []
