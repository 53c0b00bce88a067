"""Preflight checks of PPO's reward functions and reward models.

A reward model is recognised by its attributes (`model`, `tokenizer`, `normalizer`); `reward_models` is not imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf import scores
from rlhf.ppo.preflight_trial import Trial
from rlhf.ppo.protocol import Trainer
from rlhf.ppo.scoring import answers_of
from rlhf.preflight.measure import (
    COPIED,
    Finding,
    range_of,
    same_after_reload,
)

LEAST_SPREAD = 1e-4  # standard deviation of scores; below it they count as one number


def check_functions(trainer: Trainer, trial: Trial) -> Finding:
    """Check that every reward function returns finite numbers for sampled responses. Its log calls are ignored."""
    values, _ = _scores(trainer, trial, trainer.reward_funcs, trainer.reward_weights)
    return Finding("reward functions", f"scores {range_of(values)} on {len(values)} sampled responses", True)


def reward_model_checks(trainer: Trainer, trial: Trial) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Yield two checks, with their names, for every reward model among the reward functions."""
    for function in trainer.reward_funcs:
        if all(hasattr(function, name) for name in ("model", "tokenizer", "normalizer")):
            yield "score spread", partial(check_spread, trainer, trial, function)
            yield "reload", partial(check_reload, trainer, trial, function)


def check_spread(trainer: Trainer, trial: Trial, function: Any) -> Finding:
    """Check that a reward model scores different responses differently, within the range of its normaliser."""
    values, _ = _scores(trainer, trial, [function], [1.0])
    std, distinct = function.normalizer.std, len(set(zip(map(tuple, trial.prompt_ids), trial.texts, strict=True)))
    spread = float(values.std(correction=0))
    constant = distinct > 1 and spread < LEAST_SPREAD
    return Finding(
        "score spread",
        f"{distinct} different responses score {range_of(values)}, spread {spread:.3g}; normaliser's std {std:.3g}",
        not constant and std >= LEAST_SPREAD and float(values.abs().max()) < 1e3,
        "the reward model gives one score to everything, or its normaliser was measured on another model",
        "look at its accuracy on held-out pairs, and train it again",
    )


def check_reload(trainer: Trainer, trial: Trial, function: Any) -> Finding:
    """Check that a reward model scores like the weights in its folder, so that trunk and head were loaded.

    How it reads and normalises may have been set anew in memory."""
    folder = getattr(function, "folder", None)
    if not folder or not Path(folder).is_dir() or not hasattr(type(function), "load"):
        return Finding("reload", "not measured: the reward model's folder is not known", True)
    if sum(p.numel() for p in function.model.parameters()) > COPIED:
        return Finding("reload", "not measured: the reward model is too large to load twice", True)
    weight = next(function.model.parameters())
    torch.seed()  # weights that are missing in the folder are drawn at random: let them differ from the first load's
    fresh = copy.copy(function)
    fresh.model = type(function).load(folder, device=weight.device, dtype=weight.dtype).model
    before, after = (_scores(trainer, trial, [f], [1.0])[0] for f in (function, fresh))
    return same_after_reload(before, after, str(folder))


def _scores(trainer: Trainer, trial: Trial, functions: Any, weights: Any) -> tuple[Tensor, dict[str, Tensor]]:
    failures: list[str] | None = None if trainer.args.on_score_failure == "error" else []
    values, by_function = scores.score_responses(
        functions,
        weights,
        trial.prompts,
        trial.texts,
        trial.responses.ids,
        columns=scores.columns_of(trainer.prompts),
        answers=answers_of(trainer, trial.prompts, trial.texts),
        processing_class=trainer.processing_class,
        stop_ids=trainer.stop_ids,
        timeout_seconds=trainer.args.score_timeout_seconds,
        failures=failures,
        trainer_state=trainer.loop.state,
        log_metric=lambda name, value: None,
        log_extra=lambda name, values: None,
    )
    scores.require_some(float((~values.isnan()).sum()), failures or [])
    return values[~values.isnan()], by_function
