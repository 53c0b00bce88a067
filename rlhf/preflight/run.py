"""Run the checks that refuse a run that cannot be right.

Every stage runs them before its first step, on its own model, tokenizer and data: `check_ppo`, `check_sft`,
`check_reward_model`. They leave weights, gradients and every random state as they were, so a run's result does not
depend on them; `preflight: off` skips them. (A reward function gets one call more, which matters to one that keeps a
state.) The checks of texts are in `rlhf.preflight.text`, those of models in `rlhf.ppo.preflight_checks`,
`rlhf.sft.preflight` and `reward_models.preflight`.

A row must give the same numbers in every batch, the policy must start equal to its reference, and the log-probabilities
that responses were sampled with must equal those that PPO computes: most bugs in released PPO trainers break one of
these on the first batch.
"""

from __future__ import annotations

import logging
import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerState

from rlhf.errors import InputError, short
from rlhf.preflight.measure import Finding

log = logging.getLogger("rlhf")

Check = Callable[[], Finding]


class Checked(Protocol):
    """The parts of a transformers trainer that the checks read. (`Any`: transformers' own types are too wide.)"""

    @property
    def model(self) -> Any: ...
    @property
    def processing_class(self) -> Any: ...
    @property
    def train_dataset(self) -> Any: ...
    @property
    def data_collator(self) -> Any: ...

    accelerator: Accelerator
    state: TrainerState


# Findings come in phases, since a failure in a later phase often follows from one in an earlier phase.


def run_checks(*checks: tuple[str, Check]) -> list[Finding]:
    """Run every check; one that raises an exception counts as a failure."""
    findings = []
    for name, check in checks:
        try:
            findings.append(check())
        except Exception as error:
            findings.append(broken(name, error))
    return findings


def broken(name: str, error: Exception) -> Finding:
    if isinstance(error, InputError):
        return Finding(name, str(error).removeprefix("preflight: "), False)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    measured = f"{short(f'{type(error).__name__}: {error}', 300)} ({frame.filename}:{frame.lineno})"
    return Finding(name, measured, False, "the run would break there, too", "repair it")


def conclude(accelerator: Accelerator, phases: Iterator[list[Finding]]) -> list[Finding]:
    """Raise InputError on all processes if a check failed on any, so that none waits for another; return the
    findings."""
    started, findings = time.perf_counter(), []
    for phase in phases:
        findings += phase
        failed = list(dict.fromkeys(gather_object([str(f) for f in phase if not f.ok])))
        if failed:
            raise InputError(f"preflight: {' | '.join(failed)}")
    notes = [f"{f.check}: {f.measured}" for f in findings if f.note]
    level = logging.INFO if notes and accelerator.is_main_process else logging.DEBUG
    passed = f"preflight: {len(findings)} checks passed in {time.perf_counter() - started:.1f} s"
    log.log(level, "%s", "; ".join([passed, *notes]))
    return findings


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Restore, on exit, every random state and the train or eval mode of every module of `model`."""
    states, modes = (random.getstate(), np.random.get_state()), {m: m.training for m in model.modules()}
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, mode in modes.items():
            module.training = mode
