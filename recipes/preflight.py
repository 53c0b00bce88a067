"""What SFT, reward model and PPO check before training.

    rlhf preflight --config toy.yaml
    rlhf preflight --config toy.yaml --stage ppo

Looks at a run's config, models, tokenizers and data without training. Prints what was measured; exits with 2 where a
check fails. A stage whose inputs an earlier one has yet to write is named and left out. Nothing is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.mixed import paths_of
from rlhf.rows.records import read_demonstrations, read_prompts, read_rankings
from rlhf.run import console
from rlhf.run.stages import POLICIES
from rlhf_recipes.chain import ChainConfig
from rlhf_recipes.ppo import score_functions, value_start
from rlhf_recipes.stage import SCORERS, SECTIONS, check_model, from_siblings, with_columns

if TYPE_CHECKING:
    from rlhf.preflight.measure import Finding

    Phases = Iterator[list[Finding]]

console.quiet()


@dataclass(frozen=True, kw_only=True)
class PreflightConfig(ChainConfig):
    """The chain's settings, and which stage to look at."""

    MOST_USED = ("stage", *ChainConfig.MOST_USED)

    stage: Literal["sft", "reward_model", "ppo"] | None = None
    """Check this stage alone; default: all whose inputs are there."""


def sft(config: Any, scratch: str) -> Phases:
    """Findings on supervised fine-tuning, as `rlhf sft` would start it."""
    config = with_columns(config, "train_data")
    demonstrations = "data/demonstrations.jsonl"
    if not (Path(config.output_dir).parent / demonstrations).exists():
        demonstrations = "rankings/train.jsonl"
    config = _inputs(config, model="base", train_data=demonstrations)
    check_model(str(config.model), POLICIES)
    from rlhf.sft.preflight import sft_findings
    from rlhf.sft.trainer import SFTTrainer

    rows = read_demonstrations(config.train_data, on_bad_row=config.on_bad_row)[: config.max_rows]
    trainer = SFTTrainer(str(config.model), args=replace(config, output_dir=scratch), train_dataset=rows)
    return sft_findings(trainer)


def reward_model(config: Any, scratch: str) -> Phases:
    """Findings on the reward model's training, as `rlhf reward_model` would start it."""
    config = _inputs(with_columns(config, "train_data"), model="sft", train_data="rankings/train.jsonl")
    check_model(str(config.model), POLICIES)
    from reward_models import RewardTrainer
    from reward_models.preflight import reward_model_findings

    train, args = read_rankings(config.train_data, on_bad_row=config.on_bad_row), replace(config, output_dir=scratch)
    return reward_model_findings(RewardTrainer(str(config.model), args=args, train_dataset=train))


def ppo(config: Any, scratch: str) -> Phases:
    """Findings on PPO, as `rlhf ppo` would start it."""
    config = _inputs(with_columns(config, "train_data"), process_model="?process_reward")
    optional = "?" if config.process_model or config.reward_functions or config.grader else ""
    config = _inputs(config, model="sft", reward_model=f"{optional}reward_model", train_data="rankings/prompts.jsonl")
    check_model(str(config.model), POLICIES)
    if config.reward_model:
        check_model(config.reward_model, SCORERS)
    from rlhf.ppo.preflight import ppo_findings
    from rlhf.ppo.trainer import PPOTrainer

    functions = score_functions(config)
    trainer = PPOTrainer(
        str(config.model),
        functions,
        args=replace(config, output_dir=scratch),
        train_dataset=read_prompts(config.train_data, on_bad_row=config.on_bad_row)[: config.max_prompts],
        value_model=value_start(config, functions),
    )
    return ppo_findings(trainer)


STAGES: dict[str, Callable[[Any, str], Any]] = {"sft": sft, "reward_model": reward_model, "ppo": ppo}


class NotThereYet(Exception):
    """A stage's input that an earlier stage has yet to write."""


def _inputs(config: Any, **places: str) -> Any:
    """The config with what earlier stages left; NotThereYet where they have still to leave it."""
    run = Path(config.output_dir).parent
    try:
        config = from_siblings(config, **places)
    except InputError as error:
        raise NotThereYet(str(error)) from None
    for name in places:
        for place in map(Path, paths_of(getattr(config, name))):
            if place.absolute().is_relative_to(run.absolute()):  # what is in the run, a stage may yet write
                stage = place if place.is_dir() else place.parent
                if not place.exists() or ((stage / "inputs.json").is_file() != (stage / "manifest.json").is_file()):
                    raise NotThereYet(f"{place} is not complete")
    return config


def check(config: PreflightConfig) -> dict[str, list[Finding]]:
    """Findings of each stage that could be checked; prints them as they come."""
    found: dict[str, list[Finding]] = {}
    for name in [config.stage] if config.stage else STAGES:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                phases = STAGES[name](getattr(config, name), scratch)
            except NotThereYet as reason:
                console.stage_line(name, f"not checked: {reason}")
                continue
            found[name] = []
            for findings in phases:
                found[name] += findings
                if not all(finding.ok for finding in findings):
                    break
        _show(name, found[name])
    return found


def _show(stage: str, findings: list[Finding]) -> None:
    from rich.table import Table

    table = Table(title=stage, title_justify="left", header_style="bold")
    for header in ("check", "measured", "verdict"):
        table.add_column(header, no_wrap=header != "measured")
    for finding in findings:
        table.add_row(finding.check, finding.measured, "ok" if finding.ok else "FAILED")
    console.console().print(table, markup=False)


def main(argv: list[str]) -> None:
    found = check(configs.load(PreflightConfig, argv, known_sections=SECTIONS, description=__doc__ or ""))
    failed = [f"{stage}: {finding}" for stage, findings in found.items() for finding in findings if not finding.ok]
    if failed:
        raise InputError(f"preflight: {' | '.join(failed)}")


if __name__ == "__main__":
    configs.run(main)
