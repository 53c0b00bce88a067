"""A judge's report card, against people's labels.

    rlhf judge_card --judge runs/my/judge --human labels.jsonl \\
        --output_dir runs/my/judge_card
    rlhf judge_card --judge http://127.0.0.1:8000 --template pairwise \\
        --human labels.jsonl --output_dir runs/my/judge_card

Kappa first, then agreement, what people reach among themselves, position and length bias, self-preference, categories
and cost. Every pair is asked in both orders. The labels are pairs or rankings of any accepted shape; several people's
of the same pair are several rows. Writes judge_card.json, judge_card.html and verdicts.jsonl. In a chain's YAML the
section makes two cards: the reward model's, and that of the judge it names.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.records import HELD_OUT, Prompt, Ranking, read_rankings, write_jsonl
from rlhf.run import console
from rlhf.run.checkpoint import remove, write_json_atomic
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype
from rlhf.run.settings import require_needed
from rlhf_recipes.rankings import ranked_by
from rlhf_recipes.stage import SCORERS, SECTIONS, check_model, from_siblings

console.quiet()

Config = TypeVar("Config", bound="JudgeCardConfig")


@dataclass(frozen=True, kw_only=True)
class JudgeCardConfig:
    """A judge against human labels."""

    MOST_USED = ("judge", "template", "human", "output_dir", "max_pairs", "own_model", "group_by", "served_as")

    judge: str | None = None
    """Folder of a reward model or ensemble, or a function as file.py:name; with a template, a language model's folder,
    hub id, http address, or a function that answers questions. Default: the run's `reward_model`."""
    human: str | None = None
    """People's labels: pairs or rankings; several people's of the same pair are several rows. Default: the run's
    rankings/held_out.jsonl."""
    labeler: str | None = None
    """A function that ranks the labelled responses once more, as file.py:name (data.labeler's signature): two people
    have judged each pair then."""
    output_dir: str
    """Where judge_card.json, its page and the verdicts go."""
    template: str | None = None
    """What a language model is asked: pairwise, pairwise_forced, helpful (a rubric), or a YAML file."""
    served_as: str | None = None
    """The model's name at a server that serves several."""
    own_model: str | None = None
    """The judge's own model, as the labels' column of models names it: measures self-preference."""
    models_column: str = "models"
    """Column that lists, for each response of a row, the model that wrote it."""
    group_by: list[str] | None = None
    """Columns to split by; null: category, subset, family and the like, where they are there."""
    margin: float = 0.0
    """Scores that are no further apart are a tie."""
    least_probability: float = 0.1
    """Probability that a template's letters must have together; below it a comparison is an abstention."""
    max_pairs: int = 0
    """Judge so many pairs, drawn at random; 0: all."""
    seed: int = 0
    """Decides which pairs are drawn."""
    tokens_per_microbatch: int = 16384
    """Memory only."""
    bf16: bool | None = None
    """Run a local model in bfloat16; null: where the hardware is fast at it."""

    def __post_init__(self) -> None:
        for name in ("margin", "max_pairs", "least_probability"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.tokens_per_microbatch < 1:
            raise InputError(f"tokens_per_microbatch={self.tokens_per_microbatch} must be at least 1")
        require_needed(self, "template", "served_as", "least_probability")


def inputs(config: Config) -> tuple[Config, dict[str, Any]]:
    """The config, with what it takes from the run's stages; the models and data that are read."""
    config = from_siblings(config, judge="reward_model", human="rankings/held_out.jsonl")
    return config, {name: getattr(config, name) for name in ("judge", "human", "template")}


def card(config: JudgeCardConfig) -> dict[str, Any]:
    """Read the labels, ask the judge, measure, write; returns the card."""
    config, _ = inputs(config)
    return write(config, *measured(config))


def measured(config: JudgeCardConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the labels, ask the judge, measure; returns the card and a row per pair."""
    from rlhf.evals import judge_card as cards

    labelled = cards.labelled_pairs(labels(config), config.models_column)
    if config.max_pairs and len(labelled) > config.max_pairs:
        console.stage_line("judge_card", f"max_pairs={config.max_pairs} of {len(labelled):,} pairs drawn")
        labelled = random.Random(config.seed).sample(labelled, config.max_pairs)
    if config.template is None:
        check_model(str(config.judge), SCORERS)
    from reward_models.judges import load_judge

    judge = load_judge(
        str(config.judge), config.template, served_as=config.served_as, dtype=compute_dtype(config.bf16),
        tokens_per_microbatch=config.tokens_per_microbatch, margin=config.margin,
        least=config.least_probability,
    )  # fmt: skip
    result = cards.judge_card(
        judge, labelled, own_model=config.own_model, models_column=config.models_column, group_by=config.group_by
    )
    verdicts = result.pop("verdicts")
    about = {name: getattr(config, name) for name in ("judge", "template", "human", "labeler", "own_model")}
    return {"about": about, **result}, verdicts


def labels(config: JudgeCardConfig) -> list[Ranking]:
    """Read people's rankings; with a labeler, followed by its own of the same responses."""
    ranked = read_rankings(str(config.human), HELD_OUT)
    if config.labeler is None:
        return ranked
    label = configs.import_function(config.labeler)
    prompts = [Prompt(list(one.prompt), dict(one.columns)) for one in ranked]
    seed = config.seed + 1  # another person's hand than that of the labels, which a run draws with its seed
    return ranked + ranked_by(label, prompts, [list(one.responses) for one in ranked], seed)


def write(config: JudgeCardConfig, result: dict[str, Any], verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a card, its page and the verdicts; returns the card."""
    from rlhf.evals import judge_card as cards
    from rlhf.run import page as html

    folder = Path(config.output_dir)
    remove(folder / "manifest.json")  # of a chain's stage: what it says is no longer what lies here
    write_json_atomic(folder / "judge_card.json", result)
    write_jsonl(folder / "verdicts.jsonl", verdicts)
    written = html.write(folder / "judge_card.html", cards.page(result))
    console.stage_line("judge_card", cards.headline(result))
    for line in cards.rows(result["metrics"])[1]:
        console.stage_line("", f"{line[0]:<52} {line[1]:<24} n {line[2]}")
    console.stage_line("", str(written))
    return result


def main(argv: list[str]) -> None:
    config = configs.load(
        JudgeCardConfig, argv, section="judge_card", known_sections=SECTIONS, description=__doc__ or ""
    )
    by_main(lambda: card(config))


if __name__ == "__main__":
    configs.run(main)
