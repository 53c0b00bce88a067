"""Code that only makes CPUs faster, behind four functions. On other devices they do nothing; plain torch and peft run.

`lora`, `gated` and `norms` give layers a forward and a backward with fewer passes over memory; `attention` computes
short rows as plain matrix products, also those that `models.packing` has joined into one row; `memory` returns
freed memory; `drawing` draws a token with one random number; `waiting` shares the cores with other programs. Results
differ from the plain path at most by rounding.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from rlhf.cpu import attention, drawing, gated, lora, memory, norms, waiting
from rlhf.models import packing

__all__ = ["draw", "give_way", "prepare", "release_memory", "restore"]

draw = drawing.draw
release_memory = memory.release_freed_memory
give_way = waiting.give_way


class Models(Protocol):
    """PPO's three models, as `rlhf.ppo.actor_critic.ActorCritic` holds them."""

    policy: Any
    reference: Any
    value: Any
    packable: bool | None
    packs: bool


def prepare(models: Models) -> None:
    """Make the models faster if they are on a CPU, and allow packed rows if the models compute the same with them."""
    parts = [part for part in (models.policy, models.reference, models.value) if part is not None]
    if any(part.device.type != "cpu" for part in parts):
        return
    give_way(torch.device("cpu"))
    memory.release_freed_memory()
    for part in parts:
        attention.use_short_rows(part)
        lora.fuse(part)
        norms.fuse(part)
        gated.fuse(part)
    if models.packable is None:  # asked once, before their weights may be spread over processes
        models.packable = all(attention.uses_short_rows(part) and packing.can_pack(part) for part in parts)
    models.packs = models.packable


def restore(models: Models) -> None:
    """Undo `prepare`: the models are plain objects again, which can be pickled and run anywhere."""
    models.packs = False
    for part in (models.policy, models.reference, models.value):
        if part is not None:
            attention.use_sdpa(part)
            lora.separate(part)
            norms.lengthen(part)  # and what `gated` changed
