"""Code that only makes CPUs faster, behind a few functions. On other devices they do nothing; plain torch and peft run.

`lora`, `gated` and `norms` give layers a forward and a backward with fewer passes over memory; `attention` computes
short rows as plain matrix products, also those that `models.packing` has joined into one row; `drawing` draws
a token with one random number. Results differ from the plain path at most by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from rlhf.cpu import attention, drawing, gated, lora, norms
from rlhf.models import encoders, memory, packing, waiting

__all__ = ["draw", "for_scoring", "for_training", "give_way", "prepare", "restore"]

draw = drawing.draw
give_way = waiting.give_way
_SCORING: WeakKeyDictionary[Any, tuple[bool, int]] = WeakKeyDictionary()
"""Of a model in `for_scoring`: whether it computed so before, and how many are inside."""
_LOCK = Lock()


class Models(Protocol):
    """PPO's three models, as `rlhf.ppo.actor_critic.ActorCritic` holds them."""

    policy: Any
    reference: Any
    value: Any
    packable: bool | None
    packs: bool


def prepare(models: Models, device: torch.device | None = None) -> None:
    """Make the models faster if they compute on a CPU, and allow packed rows if they compute the same with them.

    device: where they will compute, if not where they are: models that FSDP2 has yet to cut wait on the CPU."""
    parts = [part for part in (models.policy, models.reference, models.value) if part is not None]
    if (device or parts[0].device).type != "cpu" or any(part.device.type != "cpu" for part in parts):
        return
    for part in parts:
        _fuse(part)
    if models.packable is None:  # asked once, before their weights may be spread over processes
        models.packable = all(attention.uses_short_rows(part) and packing.can_pack(part) for part in parts)
    models.packs = models.packable


def restore(models: Models) -> None:
    """Undo `prepare`: the models are plain objects again, which can be pickled and run anywhere."""
    parts = [part for part in (models.policy, models.reference, models.value) if part is not None]
    if any(part.device.type != "cpu" for part in parts):
        return
    models.packs = False
    for part in parts:
        _separate(part)


@contextmanager
def for_training(model: Any) -> Iterator[None]:
    """Make one model faster inside the context, as `prepare` makes PPO's, if it is on a CPU and no encoder."""
    if model.device.type != "cpu" or encoders.is_encoder(model.config):
        yield
        return
    _fuse(model)
    try:
        yield
    finally:
        _separate(model)


@contextmanager
def for_scoring(model: Any) -> Iterator[bool]:
    """Let one model compute attention by `short_rows` inside the context, if it is on a CPU and no encoder; yields
    whether it does. Threads may share the model: the last to leave puts its attention back."""
    if encoders.is_encoder(model.config):
        yield False
        return
    with _LOCK:
        before, inside = _SCORING.get(model, (attention.uses_short_rows(model), 0))
        _SCORING[model] = before, inside + 1
        attention.use_short_rows(model)
    try:
        yield attention.uses_short_rows(model)
    finally:
        with _LOCK:
            before, inside = _SCORING.pop(model)
            if inside > 1:
                _SCORING[model] = before, inside - 1
            elif not before:
                attention.use_sdpa(model)


def _fuse(model: Any) -> None:
    give_way(torch.device("cpu"))
    memory.release_freed_memory()
    attention.use_short_rows(model)
    lora.fuse(model)
    norms.fuse(model)
    gated.fuse(model)


def _separate(model: Any) -> None:
    attention.use_sdpa(model)
    lora.separate(model)
    norms.lengthen(model)  # and what `gated` changed
