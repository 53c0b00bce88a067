"""What a PPO run goes on from, besides its log: gathered from a trainer, written, put back."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from rlhf import scores
from rlhf.errors import InputError
from rlhf.run import distributed as sharding
from rlhf.run.checkpoint import random_state, restore_random_state

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer

log = logging.getLogger("rlhf")


def gathered(trainer: PPOTrainer) -> dict[str, Any]:
    """The state between two updates, called on every process. No rollout is in hand then; prompts, sampling and
    minibatches follow from the seed and `update_index`. The global random states are kept for reward functions that
    draw from them."""
    return {
        "trained": trainer.actor_critic.trained_state(),
        "optimizer": sharding.full(trainer.optimizer.state_dict()),
        "kl_coef": trainer.kl_coef,
        "moments": asdict(trainer.moments),
        "update_index": trainer.update_index,
        "random": gather_object([random_state()]),
    }


def write(trainer: PPOTrainer, state: dict[str, Any], folder: Path) -> None:
    torch.save(state, folder / "ppo.pt")
    trainer.loop.save_state(folder / "trainer_state.json")


def load(trainer: PPOTrainer, folder: Path) -> None:
    """Raises InputError where the folder holds no state of a PPO run, or one of other models."""
    if not (folder / "ppo.pt").is_file():
        raise InputError(f"{folder}: no ppo.pt; resume from a checkpoint-<update> folder of a PPO run")
    state = torch.load(folder / "ppo.pt", map_location="cpu", weights_only=True)
    trainer.actor_critic.load_trained_state(state["trained"])
    sharding.load_optimizer_state(trainer.optimizer, state["optimizer"])
    trainer.kl_coef = state["kl_coef"]
    trainer.moments = scores.RunningMoments(**state["moments"])
    trainer.update_index = state["update_index"]
    trainer.loop.load_state(folder / "trainer_state.json")
    processes, now = len(state["random"]), trainer.accelerator.num_processes
    if processes == now:
        restore_random_state(state["random"][trainer.accelerator.process_index])
    else:
        log.warning("%s was made by %d processes, now %d: goes on, but not bit for bit", folder, processes, now)
