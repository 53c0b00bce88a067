"""What exists only to make CPUs fast, behind four functions. On other devices plain torch and peft run.

`lora`, `gated` and `norms` give layers a forward and a backward in fewer passes over memory; `attention` computes short
rows as plain matrix products, row by row where `rlhf.packing` has put them into one; `memory` sets glibc's habits;
`drawing` draws a token with one random number. Results differ from the plain path by rounding at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from rlhf import packing
from rlhf.cpu import attention, drawing, gated, lora, memory, norms

__all__ = ["draw", "for_sampling", "prepare", "release_memory"]

draw = drawing.draw
release_memory = memory.release_freed_memory


class Models(Protocol):
    """PPO's three models, as `rlhf.ppo.actor_critic.ActorCritic` holds them."""

    policy: Any
    reference: Any
    value: Any
    packs: bool


def prepare(models: Models) -> None:
    """Make the models fast where they are on a CPU, and let rows be packed where they compute the same packed."""
    parts = [part for part in (models.policy, models.reference, models.value) if part is not None]
    if any(part.device.type != "cpu" for part in parts):
        return
    memory.release_freed_memory()
    memory.keep_large_blocks()
    for part in parts:
        attention.use_short_rows(part)
        lora.fuse(part)
        norms.fuse(part)
        gated.fuse(part)
    models.packs = all(attention.uses_short_rows(part) and packing.can_pack(part) for part in parts)


@contextmanager
def for_sampling(model: nn.Module) -> Iterator[None]:
    """Inside, LoRA layers that `prepare` has seen multiply by one merged weight: decoding is bound by such products."""
    with torch.no_grad(), lora.merged(model) as layers:
        yield
    if layers:
        memory.release_freed_memory()  # what is trained next would not fit into the holes that their weights leave
