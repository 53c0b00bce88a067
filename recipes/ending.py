"""The end of a chain: evals, judge cards, contamination, the system card; each where its section stands in the YAML.

The commands of the same names do the same by hand, and replace what lies in their folder; here they are stages of the
run, with its models and data, and a stage that is complete is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.rows.sources import require_there
from rlhf.run.owner import by_main
from rlhf_recipes import contamination as contamination_command
from rlhf_recipes import judge_card as judge_command
from rlhf_recipes import run_evals as evals_command
from rlhf_recipes.contamination import ContaminationConfig
from rlhf_recipes.judge_card import JudgeCardConfig
from rlhf_recipes.run_evals import RunEvalsConfig, run_evals
from rlhf_recipes.stage import Step, as_outputs, open_stage
from rlhf_recipes.system_card import SystemCardConfig, system_card


@dataclass(frozen=True, kw_only=True)
class JudgeStageConfig(JudgeCardConfig):
    """A judge against the run's labels."""

    overwrite: bool = False
    """Replace another run's output in output_dir."""


@dataclass(frozen=True, kw_only=True)
class ContaminationStageConfig(ContaminationConfig):
    """Looking for the run's evals in its training data."""

    overwrite: bool = False
    """Replace another run's output in output_dir."""


def evals_steps(run: Path, config: RunEvalsConfig) -> Iterator[Step]:
    """Yield the evals' stages: the SFT model's, then the policy's, paired with it; a config that names a model or a
    comparison asks that alone."""
    if config.model is None and config.compare is None:
        before = replace(config, model=str(run / "sft"), output_dir=str(run / "run_evals_sft"))
        yield Step("run_evals_sft", before, partial(run_evals, name="run_evals_sft"), evals_command.inputs)
        config = replace(config, compare=str(run / "run_evals_sft" / "run_evals.json"))
    yield Step("run_evals", config, run_evals, evals_command.inputs)


def judge_steps(run: Path, config: JudgeStageConfig) -> Iterator[Step]:
    """Yield the judges' stages: the run's reward model, and the judge that the config names beside it."""
    if config.judge is not None:
        folder = str(run / "judge_card_reward_model")
        asked = {name: getattr(JudgeStageConfig, name) for name in ("template", "served_as", "least_probability")}
        own = replace(config, judge=None, own_model=None, output_dir=folder, **asked)
        yield Step("judge_card_reward_model", own, partial(judge_card, "judge_card_reward_model"), judge_command.inputs)
    yield Step("judge_card", config, partial(judge_card, "judge_card"), judge_command.inputs)


def contamination_steps(config: ContaminationStageConfig, named: Sequence[str]) -> Iterator[Step]:
    """Yield the stage that looks for the evals in the run's training data, and in what else it was told to train on."""
    inputs = partial(contamination_command.inputs, also=named)
    yield Step("contamination", config, partial(contamination, named), inputs)


def judge_card(name: str, config: JudgeStageConfig) -> dict[str, Any]:
    """The stage of a judge's card. Of several processes only the first works."""
    return by_main(lambda: _judge_card(name, config))


def _judge_card(name: str, config: JudgeStageConfig) -> dict[str, Any]:
    config, sources = judge_command.inputs(config)
    stage = open_stage(name, config, sources)
    if stage.complete:
        return stage.outputs
    card, verdicts = judge_command.measured(config)
    stage.begin()
    judge_command.write(config, card, verdicts)
    return stage.finish({**as_outputs(card["metrics"]), "pairs": card["pairs"], "labels": card["labels"]})


def contamination(named: Sequence[str], config: ContaminationStageConfig) -> dict[str, Any]:
    """The stage that looks for evals in training data. Of several processes only the first works."""
    return by_main(lambda: _contamination(named, config))


def _contamination(named: Sequence[str], config: ContaminationStageConfig) -> dict[str, Any]:
    config, sources = contamination_command.inputs(config, named)
    stage = open_stage("contamination", config, sources)
    if stage.complete:
        return stage.outputs
    found, items = contamination_command.searched(config)
    stage.begin()
    contamination_command.write(config, found, items)
    return stage.finish({**as_outputs(found["metrics"]), "items": len(items), "rows": found["rows"]})


def card(run: Path, config: SystemCardConfig) -> dict[str, Any]:
    """Write the system card of what the run holds now, at every call, as its report; what the summary says of it."""
    content = by_main(lambda: system_card(replace(config, run=str(run))))
    numbers = {"facts": len(content["facts"]), "files": len(content["artefacts"])}
    return {**numbers, "parts_not_measured": len(content["not_measured"])}


def check(
    run: Path,
    evals: RunEvalsConfig | None,
    judge: JudgeStageConfig | None,
    contaminated: ContaminationStageConfig | None,
) -> None:
    """Raise InputError, before anything is trained, for what would stop the run at its end."""

    def outside(place: str) -> bool:  # what is in the run, a stage may yet write
        return not Path(place).absolute().is_relative_to(run)

    sets = [source for source in evals.eval_data or () if outside(source)] if evals else []
    if evals and (sets or evals.registry or evals.lm_eval):
        evals_command.read_evals(replace(evals, eval_data=sets), {})
    if judge:
        from reward_models.judges import is_function
        from rlhf.evals.questions import read_template

        if judge.template:
            read_template(judge.template)
        for spec in (judge.judge, judge.labeler):
            if spec and is_function(spec):
                configs.import_function(spec)
    given: list[str | None] = [judge.human] if judge else []
    given += [*(contaminated.train_data or ()), *(contaminated.eval_data or ())] if contaminated else []
    for place in filter(None, given):
        if outside(place):
            require_there(place)
