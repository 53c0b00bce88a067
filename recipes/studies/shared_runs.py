"""The chain that studies share: one per seed, whose complete stages are skipped, and further stages beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rlhf import config as configs
from rlhf_recipes import chain as whole
from rlhf_recipes.evaluate_policy import EvaluationConfig, evaluation
from rlhf_recipes.stage import SECTIONS
from rlhf_recipes.studies.study import StudyConfig

GOLD = "data/toy/toy_gold.py:gold"
WATCHED: dict[str, Any] = {"reward_functions": [GOLD], "reward_weights": [1.0, 0.0]}
"""Settings with which gold watches PPO: its weight is 0."""
Config = TypeVar("Config")


def chain(config: StudyConfig, last: str = "evaluation", **changes: Mapping[str, Any]) -> Path:
    """Run a seed's chain up to a stage, as far as it is not there yet; its folder. Where the toy world's gold judges
    the chain, it watches a PPO that has no reward functions of its own. changes: settings to replace, by section."""
    argv = ["--config", config.chain, "--seed", str(config.seed), "--output_dir", str(config.shared)]
    own = configs.load(whole.ChainConfig, [*argv, *config.chain_flags], known_sections=SECTIONS)
    if own.evaluation.judge == GOLD and not own.ppo.reward_functions:
        own = replace(own, ppo=replace(own.ppo, **WATCHED))
    own = replace(own, **{name: replace(getattr(own, name), **values) for name, values in changes.items()})
    steps = whole.steps_of(own)
    whole.check(own)
    whole.require_same(config.shared, steps)
    for step in steps:
        step.run(step.config)
        if step.name == last:
            break
    return config.shared


def stage(
    config: StudyConfig,
    recipe: Callable[[Config], dict[str, Any]],
    config_class: type[Config],
    section: str,
    out: str,
    **settings: Any,
) -> Path:
    """Run one more stage of the seed in the folder `out` of the shared run, unless it is complete there; that folder.
    Its settings are those of the section in the chain's config and flags, but for these."""
    argv = ["--config", config.chain, "--seed", str(config.seed), "--output_dir", str(config.shared / out)]
    argv += of_section(config.chain_flags, section)
    own = configs.load(config_class, argv, section=section, known_sections=SECTIONS)
    recipe(replace(own, **settings))  # type: ignore[type-var]
    return config.shared / out


def of_section(flags: Sequence[str], section: str) -> list[str]:
    """Return a chain's flags of one section as its recipe reads them: --ppo.kl_coef is PPO's --kl_coef."""
    found, own = [], False
    for word in flags:
        name = word.removeprefix("--")
        if name != word:
            own = name.replace("-", "_").startswith(f"{section}.")
            word = f"--{name[len(section) + 1 :]}"
        found += [word] if own else []
    return found


def compared(config: StudyConfig, out: str, **settings: Any) -> Path:
    """Compare policies of the seed on the chain's evaluation prompts, without best-of-n; the folder, with every
    response in samples.jsonl."""
    return stage(config, evaluation, EvaluationConfig, "evaluation", out, samples=10**6, best_of=0, **settings)
