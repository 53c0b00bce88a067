"""What a larger run will come to, by smaller ones.

    rlhf predict_capability --data runs.jsonl --at 1e21 \\
        --register predictions/loss.json
    rlhf predict_capability --compare predictions/loss.json --observed 2.31

A row of the data is one run: {"compute": 1e18, "loss": 3.1}, or for pass rates {"compute": 1e18,
"mean_log_pass_rate": -2.4} or {"compute": 1e18, "passes": [3, 0, 12], "samples": 20}, one number per problem. Any
measure of size does for compute, the same for all rows. Writes predict_capability.json and a page.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.sources import rows
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.owner import by_main
from rlhf.run.stages import Manifest
from rlhf_recipes.stage import SECTIONS

console.quiet()


@dataclass(frozen=True, kw_only=True)
class PredictionConfig:
    """Fitting a scaling law, registering what it predicts, comparing it with a run."""

    MOST_USED = ("data", "at", "quantity", "register", "compare", "observed", "run", "output_dir")

    data: str | None = None
    """The smaller runs: a row each, with compute and loss or pass rates."""
    at: float | None = None
    """The compute of the run to predict, in the data's unit."""
    quantity: Literal["loss", "mean_log_pass_rate"] = "loss"
    """What is predicted: a loss, a C^b + c, or the mean log pass rate, whose negative is a C^-k."""
    register: str | None = None
    """File to write the prediction to before that run: with data, fit, time and hash; never replaced."""
    compare: str | None = None
    """A registered prediction to compare with what was observed."""
    observed: float | None = None
    """What the run came to."""
    run: str | None = None
    """The finished run's stage folder: says whether the prediction was registered before it began."""
    output_dir: str = "runs/prediction"
    """Where predict_capability.json and its page go."""
    seed: int = 0
    """Decides the bootstrap."""

    def __post_init__(self) -> None:
        if (self.compare is None) == (self.data is None):
            raise InputError("predict_capability: give --data and --at to predict, or --compare and --observed")
        if self.data is not None and self.at is None:
            raise InputError("at is missing: the compute of the run to predict")
        if self.compare is not None and self.observed is None:
            raise InputError("observed is missing: what the run came to")
        for name in ("at", "register"):
            if self.compare is not None and getattr(self, name) is not None:
                raise InputError(f"{name} belongs to a new prediction, compare to an old one; leave one of them out")
        for name in ("observed", "run"):
            if self.data is not None and getattr(self, name) is not None:
                raise InputError(f"{name} is compared with a registered prediction: name its file with --compare")


def predict(config: PredictionConfig) -> dict[str, Any]:
    """Fit, predict, register; returns predict_capability.json's content."""
    from rlhf.evals import prediction as laws

    compute, values = _runs(config)
    made = laws.prediction(config.quantity, compute, values, float(config.at or 0.0), config.seed)
    digest = laws.register(config.register, made) if config.register else None
    metric = {"value": made.value, "low": made.low, "high": made.high, "n": made.law.runs}
    result = {"metrics": {config.quantity: metric}, "registered": config.register, "sha256": digest, **asdict(made)}
    folder = Path(config.output_dir)
    write_json_atomic(folder / "predict_capability.json", result)
    from rlhf.evals.prediction_page import page
    from rlhf.run import page as html

    written = html.write(folder / "predict_capability.html", page(made, digest))
    console.stage_line("prediction", made.sentence)
    if digest is not None:
        console.stage_line("", f"registered in {config.register}, sha256 {digest}: publish or commit it before the run")
    console.stage_line("", str(written))
    return result


def compare(config: PredictionConfig) -> dict[str, Any]:
    """Compare a registered prediction with what was observed; returns predict_capability.json's content."""
    from rlhf.evals import prediction as laws
    from rlhf.evals.prediction_page import compared_page
    from rlhf.run import page as html

    made = Manifest.read(config.run) if config.run is not None else None
    began = datetime.fromisoformat(made.began) if made is not None and made.began else None
    found = laws.compare(str(config.compare), float(config.observed or 0.0), began)
    metric = {"value": found.observed, "low": found.low, "high": found.high, "n": 1}
    result = {"metrics": {"observed": metric}, **asdict(found)}
    folder = Path(config.output_dir)
    write_json_atomic(folder / "predict_capability.json", result)
    written = html.write(folder / "predict_capability.html", compared_page(found))
    where = "inside" if found.inside else "OUTSIDE"
    console.stage_line(
        "prediction",
        f"observed {found.observed:.4g} is {where} the predicted {found.value:.4g} [{found.low:.4g}, {found.high:.4g}]",
    )
    told = {True: ", before that run began", False: ", AFTER that run began: it proves nothing"}.get(
        found.before, "" if made is None else "; when that run began is not known"
    )
    console.stage_line("", f"registered {found.registered}{told}; sha256 {found.sha256}")
    console.stage_line("", str(written))
    return result


def _runs(config: PredictionConfig) -> tuple[list[float], list[float]]:
    """Return compute and quantity of every row. Raises InputError."""
    from rlhf.evals.prediction import mean_log_pass_rate

    compute, values, before = list[float](), list[float](), None
    for where, row in rows(str(config.data), "train"):
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with compute and {config.quantity}")
        compute.append(_number(row, "compute", where))
        if config.quantity == "mean_log_pass_rate" and "passes" in row:
            passes, samples = row["passes"], _number(row, "samples", where)
            if not isinstance(passes, list) or not all(type(count) is int for count in passes):
                raise InputError(f"{where}: passes: write a list of whole numbers, one per problem")
            counted = (len(passes), samples)
            before = before or counted
            if len(passes) != before[0]:
                seen = f"{len(passes)} problems, and {before[0]} in the rows before"
                raise InputError(f"{where}: passes: {seen}; count the same ones at every size")
            if samples != before[1]:  # the lowest rate that so many can show would look like a trend
                seen = f"{samples:g} per problem, and {before[1]:g} in the rows before"
                raise InputError(f"{where}: samples: {seen}; draw as many at every size")
            values.append(mean_log_pass_rate(passes, int(samples)))
        else:
            values.append(_number(row, config.quantity, where))
    return compute, values


def _number(row: dict[str, Any], name: str, where: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: {name} is {value!r}; write a number")
    return float(value)


def main(argv: list[str]) -> None:
    config = configs.load(
        PredictionConfig, argv, section="predict_capability", known_sections=SECTIONS, description=__doc__ or ""
    )
    by_main(lambda: predict(config) if config.compare is None else compare(config))


if __name__ == "__main__":
    configs.run(main)
