"""Preflight checks of PPO's reward functions and reward models.

A reward model is recognised by what it has (`model`, `tokenizer`, `normalizer`), never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf import scores
from rlhf.ppo.preflight_trial import Trial
from rlhf.ppo.protocol import Trainer
from rlhf.preflight.measure import (
    COPIED,
    Finding,
    range_of,
    same_after_reload,
)

LEAST_SPREAD = 1e-4  # of scores; below it they are one number


def check_functions(trainer: Trainer, trial: Trial) -> Finding:
    """Every reward function answers on sampled responses, with finite numbers. Its log calls go nowhere."""
    said, _ = _scores(trainer, trial, trainer.reward_funcs, trainer.reward_weights)
    return Finding("reward functions", f"scores {range_of(said)} on {len(said)} sampled responses", True)


def reward_model_checks(trainer: Trainer, trial: Trial) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Two checks for every reward model among the reward functions."""
    for function in trainer.reward_funcs:
        if all(hasattr(function, name) for name in ("model", "tokenizer", "normalizer")):
            yield "score spread", partial(check_spread, trainer, trial, function)
            yield "reload", partial(check_reload, trainer, trial, function)


def check_spread(trainer: Trainer, trial: Trial, function: Any) -> Finding:
    """A reward model tells different responses apart, in units that its normaliser was measured in."""
    said, _ = _scores(trainer, trial, [function], [1.0])
    std, distinct = function.normalizer.std, len(set(zip(map(tuple, trial.prompt_ids), trial.texts, strict=True)))
    spread = float(said.std(correction=0))
    constant = distinct > 1 and spread < LEAST_SPREAD
    return Finding(
        "score spread",
        f"{distinct} different responses score {range_of(said)}, spread {spread:.3g}; normaliser's std {std:.3g}",
        not constant and std >= LEAST_SPREAD and float(said.abs().max()) < 1e3,
        "the reward model gives one score to everything, or its normaliser was measured on another model",
        "look at its accuracy on held-out pairs, and train it again",
    )


def check_reload(trainer: Trainer, trial: Trial, function: Any) -> Finding:
    """A reward model that came from a folder scores as the same folder loaded anew: head and normaliser are there."""
    folder = getattr(function, "folder", None) or ("" if hasattr(function.model, "peft_config") else
                                                   getattr(function.model, "name_or_path", ""))  # fmt: skip
    if not folder or not Path(folder).is_dir() or not hasattr(type(function), "load"):
        return Finding("reload", "not measured: the reward model's folder is not known", True)
    if sum(p.numel() for p in function.model.parameters()) > COPIED:
        return Finding("reload", "not measured: the reward model is too large to load twice", True)
    weight = next(function.model.parameters())
    torch.seed()  # what a load has to invent for want of weights is then never the same twice
    fresh = type(function).load(folder, device=weight.device, dtype=weight.dtype)
    ours, theirs = (_scores(trainer, trial, [f], [1.0])[0] for f in (function, fresh))
    return same_after_reload(ours, theirs, str(folder))


def _scores(trainer: Trainer, trial: Trial, functions: Any, weights: Any) -> tuple[Tensor, dict[str, Tensor]]:
    failures: list[str] | None = None if trainer.args.on_score_failure == "error" else []
    said, own = scores.score_responses(
        functions,
        weights,
        trial.prompts,
        trial.texts,
        trial.responses.ids,
        timeout_seconds=trainer.args.score_timeout_seconds,
        failures=failures,
        trainer_state=trainer.loop.state,
        log_metric=lambda name, value: None,
        log_extra=lambda name, values: None,
    )
    scores.require_some(float((~said.isnan()).sum()), failures or [])
    return said[~said.isnan()], own
