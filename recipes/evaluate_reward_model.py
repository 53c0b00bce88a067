"""A reward model's report card on held-out pairs.

    rlhf evaluate_reward_model --reward_model runs/my/reward_model \\
        --data held_out.jsonl
    rlhf evaluate_reward_model --reward_model runs/my/reward_model \\
        --data held_out.jsonl --train_data train.jsonl \\
        --second_model runs/my/judge --output_dir runs/my/report

How good it is, what it goes by, where it fails. Writes reward_report.json and reward_report.html (one file, no
network) beside the model, or into --output_dir. The data are pairs or K ranked responses; files of RewardBench and of
RewardBench 2 (lists of chosen and rejected answers, the subset Ties) work as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.mixed import Sources, paths_of
from rlhf.rows.records import HELD_OUT, check_disjoint, read_rankings
from rlhf.run import console
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype
from rlhf_recipes.stage import SCORERS, SECTIONS, check_model, with_columns

console.quiet()


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """A reward model's report card."""

    reward_model: str
    """The reward model: a folder that training wrote (an ensemble's, too), or a hub id."""
    data: Sources
    """Held-out rankings or preference pairs."""
    train_data: Sources | None = None
    """What it was trained on: chooses the length rule, fits the bag of words; a prompt in both is an error."""
    columns: dict[str, str] | None = None
    """Our names of columns and what the files named here call them, as {prompt: question}; null: the same."""
    second_model: str | None = None
    """Judges best-of-n by the first: a reward model trained on other data, or a function as file.py:name."""
    output_dir: str | None = None
    """Where the report goes; default: the reward model's folder."""
    seed: int = 0
    """Decides bootstraps and samples."""
    group_by: list[str] | None = None
    """Columns to split the accuracy by; null: section, subset, category and the like, where they are there."""
    sensitivity_pairs: int = 200
    """Pairs that are scored again with changes that mean nothing; 0: none."""
    tokens_per_microbatch: int = 16384
    """Memory only."""
    bf16: bool | None = None
    """Score in bfloat16; null: where the hardware is fast at it."""

    def __post_init__(self) -> None:
        if self.sensitivity_pairs < 0:
            raise InputError(f"sensitivity_pairs={self.sensitivity_pairs} must be 0 or more")
        if self.tokens_per_microbatch < 1:
            raise InputError(f"tokens_per_microbatch={self.tokens_per_microbatch} must be at least 1")


def report(config: ReportConfig) -> dict[str, Any]:
    """Read, score, measure, write; returns the report. Inside `by_main` what a reward model computes is shared out."""
    if config.output_dir is None and not Path(config.reward_model).is_dir():
        raise InputError(f"--output_dir is missing, and {config.reward_model} is no folder; name one for the report")
    check_model(config.reward_model, SCORERS)
    folder = Path(config.output_dir or config.reward_model)
    config = with_columns(config, "data", "train_data")
    rankings = read_rankings(config.data, HELD_OUT)
    train = read_rankings(config.train_data) if config.train_data else None
    if train is not None:
        check_disjoint(train, rankings, ("train_data", "data"))
    from reward_models.card.page import headlines
    from reward_models.card.report import reward_report, save_reward_report

    scorer, second = _scorer(config.reward_model, config), None
    if config.second_model:
        second = _scorer(config.second_model, config)
    result = reward_report(
        scorer, rankings, train=train, second=second, seed=config.seed, group_by=config.group_by,
        sensitivity_pairs=config.sensitivity_pairs,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    about = {name: getattr(config, name) for name in ("reward_model", "second_model")}
    about |= {name: ", ".join(paths_of(getattr(config, name))) or None for name in ("data", "train_data")}
    page = save_reward_report(result, folder, about)
    for line in headlines(result):
        console.console().print(line, markup=False, soft_wrap=True)
    console.console().print(str(page), markup=False, soft_wrap=True)
    return result


def _scorer(spec: str, config: ReportConfig) -> Any:
    if ":" in spec and not Path(spec).exists():
        return configs.import_function(spec)
    check_model(spec, SCORERS)
    from reward_models.ensemble import load_scorer

    return load_scorer(spec, dtype=compute_dtype(config.bf16), tokens_per_microbatch=config.tokens_per_microbatch)


def main(argv: list[str]) -> None:
    config = configs.load(
        ReportConfig, argv, section="evaluate_reward_model", known_sections=SECTIONS, description=__doc__ or ""
    )
    by_main(lambda: report(config))


if __name__ == "__main__":
    configs.run(main)
