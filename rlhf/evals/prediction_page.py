"""The page of a prediction: the runs, the law through them, and the interval for the run to come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlhf.evals.prediction import Comparison, Prediction
from rlhf.run import page as html

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def page(made: Prediction, digest: str | None) -> str:
    """Write the page. digest: the hash under which the prediction is registered, if it is."""
    law, sign = made.law, -1.0 if made.quantity == "mean_log_pass_rate" else 1.0
    name = made.quantity.replace("_", " ")

    def draw(axes: Axes) -> None:
        low, high = min(*made.compute, made.at), max(*made.compute, made.at)
        x = np.geomspace(low, high, 200)
        axes.plot(x, [law.at(float(c)) for c in x], color=html.FIRST, linewidth=1.2, label="law")
        axes.plot(made.compute, [sign * value for value in made.values], "o", color=html.INK, ms=4, label="runs")
        ends = sorted((sign * made.low, sign * made.high))
        centre = sign * made.value
        if np.isfinite(ends).all():
            error = np.maximum([[centre - ends[0]], [ends[1] - centre]], 0.0)
            axes.errorbar([made.at], [centre], error, fmt="s", color=html.SECOND, ms=4, label="predicted")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("compute")
        axes.set_ylabel(name if sign > 0 else f"-{name}")
        html.legend(axes, 3)

    equation = f"{law.a:.4g} (C / {law.unit:.4g})^{law.b:.4g}" + (f" + {law.c:.4g}" if law.c else "")
    rows = [[f"{c:.4g}", f"{v:.4g}", f"{sign * law.at(c):.4g}"] for c, v in zip(made.compute, made.values, strict=True)]
    facts = [
        f"Law: {name if sign > 0 else f'-({name})'} = {equation}; runs scatter around it by {100 * law.spread:.2g}%",
        f"The interval is for one run, at 95%. Simulated from this law at these {law.runs} sizes, such intervals hold "
        f"{100 * made.coverage:.0f}% of runs; if the law bends beyond them, they hold nothing.",
        "Not registered." if digest is None else f"Registered, sha256 {digest}",
    ]
    parts = [html.verdict(made.sentence), *map(html.note, facts), f"<figure>{html.svg(draw, 6.2, 3.4)}</figure>"]
    parts += ["<h2>Runs</h2>", html.table((["compute", name, "law"], rows))]
    return html.page("Prediction", "\n".join(parts))


def compared_page(found: Comparison) -> str:
    """Write the page of a registered prediction beside what was observed."""
    where = "inside" if found.inside else "outside"
    told = f"Observed {found.observed:.4g}: {where} the predicted {found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"
    when = {True: "before that run began", False: "after that run began: it proves nothing"}
    began = "whether before the run began is not known" if found.before is None else when[found.before]
    facts = [f"Registered {found.registered}, {began}.", f"sha256 {found.sha256}"]
    return html.page("Prediction and observation", "\n".join([html.verdict(told), *map(html.note, facts)]))
