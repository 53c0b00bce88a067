"""The attributes of `PPOTrainer` that the files around it (run, preflight) may use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypedDict

import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.ppo.actor_critic import ActorCritic
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.logged import Clock
from rlhf.ppo.plan import Draws
from rlhf.ppo.pretraining_mix import PretrainingMix
from rlhf.ppo.saved import Origin
from rlhf.rows.records import Prompt
from rlhf.run.loop import CallbackLoop
from rlhf.sampling.engine import Engine, Responses
from rlhf.scores import RewardFunction


class InHandState(TypedDict, total=False):
    """What `rollouts_ahead: 1` adds to the state: every process's responses for the update that follows."""

    ahead: list[dict[str, Any] | None]


class State(InHandState):
    """The state that a resumed PPO run continues from, besides its log and the global random states."""

    trained: dict[str, Tensor]
    """The trained tensors by name; frozen ones are loaded from the models that the run began with."""
    optimizer: dict[str, Any]
    kl_coef: float
    moments: dict[str, Any]
    """The fields of the running score normaliser (`scores.RunningMoments`)."""
    update_index: int


class Trainer(Protocol):
    """The part of `PPOTrainer` that other files use."""

    args: PPOConfig
    accelerator: Accelerator
    device: torch.device
    processing_class: PreTrainedTokenizerBase
    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    eval_prompts: list[Prompt]
    eval_prompt_ids: list[list[int]]
    reward_funcs: list[RewardFunction]
    reward_weights: list[float]
    actor_critic: ActorCritic
    module: Any
    """`actor_critic` after accelerate's `prepare`."""
    optimizer: torch.optim.Optimizer
    engine: Engine
    stop_ids: tuple[int, ...]
    pad_id: int
    reference_given: bool
    origin: Origin
    given: Mapping[str, Any]
    """Fingerprints of the data, models and reward functions (`rlhf.run.fingerprint.of_run`)."""
    peft_config: LoraConfig | None
    update_index: int
    draws: Draws
    pretraining: PretrainingMix
    loop: CallbackLoop
    clock: Clock

    def generate(self, prompt_ids: list[list[int]], generator: torch.Generator) -> Responses: ...

    def evaluate(self) -> dict[str, float]: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...
