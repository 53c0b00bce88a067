"""The checks that refuse a run that cannot be right, before it spends its time.

Every stage runs them before its first step, on its own model, tokenizer and data: `check_ppo`, `check_sft`,
`check_reward_model`. They leave weights, gradients and every random state as they were, so a run's result does not
depend on them; `preflight: off` skips them. (A reward function is called once more; one that counts its calls, or keeps
a state of its own, sees that.) What is checked of texts is in `rlhf.preflight.text`, of models in
`rlhf.ppo.preflight_checks`, `rlhf.sft.preflight` and `reward_models.preflight`.

The same row must give the same numbers whatever it is computed beside, the policy must start as its reference, the
log-probabilities that responses were drawn with must be those that PPO computes: most bugs that PPO trainers shipped
break one of these on the first batch.
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
    """What the checks look at of a trainer of transformers, whose own types allow too much for the first four."""

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


# Findings come in phases: what is wrong in a later one often follows from what is wrong in an earlier one.


def run_checks(*checks: tuple[str, Check]) -> list[Finding]:
    """Make every check; one that breaks is a failure, with its exception."""
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
    return Finding(name, measured, False, "the run would break there, too", "mend it")


def conclude(accelerator: Accelerator, phases: Iterator[list[Finding]]) -> list[Finding]:
    """Raise what failed on any process, on all of them together, so that none waits for another for ever."""
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
    """Puts back every random state and the train or eval mode of every module of `model`."""
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
