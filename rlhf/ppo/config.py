"""PPO's settings. The string under a field is its help text on the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from rlhf.config import require_divides
from rlhf.errors import InputError

SCHEDULES = ("linear", "cosine", "constant")
MISSING_EOS = ("replace", "subtract", "off")
ON_SCORE_FAILURE = ("error", "drop")
ON_ALARM = ("warn", "save", "stop")
VALUE_MODELS = ("separate", "adapter", "shared_trunk", None)


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of `PPOTrainer`. Sizes are counted in responses; KL in nats per response."""

    "Run"

    output_dir: str = "runs/ppo"
    """Where checkpoints, metrics and samples go."""
    seed: int = 0
    """Prompts, sampling and minibatches are pure functions of it."""

    "Batch sizes and lengths"

    updates: int = 100
    """Rollouts collected, each followed by its inner epochs."""
    rollout_size: int = 512
    """Responses collected per update, over all processes."""
    minibatch_size: int = 64
    """Responses per optimizer step, over all processes; divides rollout_size."""
    inner_epochs: int = 4
    """Passes over each rollout (InstructGPT 1, Stiennon et al. 4)."""
    tokens_per_microbatch: int = 16384
    """Padded prompt + response tokens in one forward pass of one process; memory only, never the result."""
    generation_batch_size: int = 256
    """Responses sampled at once on one process; memory and speed only."""
    max_prompt_tokens: int = 512
    """Longer prompts are left out, counted and named in the log."""
    max_new_tokens: int = 128
    """Longest response, its stop token included."""
    temperature: float = 1.0
    """Divides every logit: in sampling, the policy, the reference and the entropy alike."""

    "Optimization"

    learning_rate: float = 1e-5
    """Of the policy, at its peak."""
    value_learning_rate: float | None = None
    """Of the value model, at its peak; null takes learning_rate."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How both rates fall to 0 over the updates."""
    warmup_updates: int = 0
    """Updates over which both rates rise from 0 to their peak."""
    adam_beta1: float = 0.9
    """Adam's first decay rate."""
    adam_beta2: float = 0.95
    """Adam's second decay rate (InstructGPT: 0.95)."""
    adam_epsilon: float = 1e-5
    """Adam's epsilon (2403.17031, detail 21)."""
    weight_decay: float = 0.0
    """AdamW's decay."""
    max_grad_norm: float = 1.0
    """Gradients of policy and value model are clipped to this norm, each on its own."""

    "Value model"

    value_model: Literal["separate", "adapter", "shared_trunk"] | None = None
    """A model of its own; an adapter on the policy's backbone (LoRA); or a head on the policy's own hidden states, with
    one forward for both. null: adapter under LoRA, else separate."""
    value_loss_coef: float = 0.1
    """Weight of the value loss beside the policy's on a shared trunk. Elsewhere the two share no weights, and Adam does
    not feel a constant factor: value_learning_rate acts there."""
    value_warmup_updates: int = 0
    """First updates in which the policy stands still and the value model learns (PPO-max, 2307.04964)."""

    "KL penalty, advantages and clipping"

    kl_coef: float = 0.05
    """beta: what a nat of KL against the reference costs, in units of the normalised score."""
    kl_target_nats: float | None = None
    """Adapt kl_coef towards this KL per response (Ziegler et al. 2019); null keeps it fixed."""
    kl_horizon: int = 10000
    """Responses over which the adaptive coefficient moves."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """lambda of generalised advantage estimation."""
    clip_ratio: float = 0.2
    """The policy's ratio is clipped to 1 +- this."""
    importance_cap: float = 2.0
    """Largest weight of a token by which an engine's own probabilities (vLLM's) are corrected to the trainer's; .inf
    in YAML truncates nothing. Engines that don't report theirs, as the built-in one, are not corrected."""
    clip_value: float = 0.2
    """New values are clipped to the old ones +- this; .inf in YAML switches it off."""

    "Scores"

    normalize_scores: bool = False
    """Standardize scores by their running mean and spread (PPO-max)."""
    clip_scores: float | None = None
    """Clip scores to +- this after normalising; null leaves them."""
    missing_eos: Literal["replace", "subtract", "off"] = "replace"
    """A response that never stopped: its score becomes -penalty, or loses penalty, or stays."""
    missing_eos_penalty: float = 1.0
    """See missing_eos; in units of the normalised score."""
    rescale_rewards: bool = False
    """Scale rewards to unit variance over the rollout, mean kept (2403.17031, detail 18)."""
    reward_weights: list[float] | None = field(default=None)
    """One weight per reward function; null weighs each 1."""
    on_score_failure: Literal["error", "drop"] = "error"
    """A reward function fails on a response (an exception, a time-out, NaN): end the run, or leave the response out
    of the update and count it in dropped_responses. When all responses fail, the run ends."""
    score_timeout_seconds: float | None = None
    """Longest time of one reward function for one process's responses, each function on its own; null: no limit."""

    "LoRA"

    lora_rank: int = 0
    """0 trains all weights, or continues the adapter that the model is; else the rank of a fresh adapter."""
    lora_alpha: float = 32.0
    """LoRA's scale numerator."""
    lora_dropout: float = 0.0
    """Recorded in the adapter; PPO itself runs without dropout."""
    lora_target_modules: list[str] | None = None
    """Names of adapted modules; null adapts every linear layer of the trunk."""

    "Memory and speed"

    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, more time, the same result."""
    compile: bool = False
    """torch.compile of the layers in training: minutes of compiling first, then faster (recipes/guides/speed.md)."""
    bf16: bool | None = None
    """Mixed precision; null: on where the hardware is fast at it (GPUs, CPUs with AVX512-BF16 or AMX); the log says."""

    "Evaluation, checkpoints and logs"

    eval_steps: int = 0
    """Evaluate every so many updates and at the end; 0: never."""
    save_steps: int = 0
    """Checkpoint every so many updates and at the end; 0: never (but after SIGTERM)."""
    save_total_limit: int = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    on_alarm: Literal["warn", "save", "stop"] = "warn"
    """When a metric leaves its healthy range: say so once; also write a checkpoint; also end the run there."""
    stop_kl_nats: float | None = None
    """End training when a rollout's KL to the reference exceeds this; null: never."""
    stop_approx_kl_nats: float | None = None
    """End an update's inner epochs once the mean approx_kl_nats of one exceeds this; null: never."""
    save_rollouts: int = 0
    """Every so many updates, keep the rollout and the trainer's state before it (as big as a checkpoint) in rollouts/,
    for recipes/inspect_rollout.py; 0: never."""
    samples_logged: int = 4
    """Responses written to samples.jsonl per update."""
    report_to: list[str] | None = None
    """Trackers besides metrics.jsonl: trackio, tensorboard, wandb."""
    preflight: bool = True
    """Check model, tokenizer, data and scores before the first update, and refuse what cannot be right."""

    def __post_init__(self) -> None:
        for name in ("updates", "rollout_size", "minibatch_size", "inner_epochs", "tokens_per_microbatch"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("generation_batch_size", "max_prompt_tokens", "max_new_tokens", "kl_horizon", "save_total_limit"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name, choices in (
            ("lr_schedule", SCHEDULES), ("missing_eos", MISSING_EOS), ("on_alarm", ON_ALARM),
            ("on_score_failure", ON_SCORE_FAILURE), ("value_model", VALUE_MODELS),
        ):  # fmt: skip
            fine = ", ".join(str(choice or "null") for choice in choices)
            _require(name, repr(getattr(self, name)), getattr(self, name) in choices, f"one of {fine}")
        require_divides("minibatch_size", self.minibatch_size, "rollout_size", self.rollout_size)
        _require("temperature", self.temperature, self.temperature > 0, "positive: PPO needs a distribution to sample")
        for name in ("learning_rate", "max_grad_norm", "clip_ratio", "clip_value", "adam_epsilon"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        for name in (
            "kl_coef", "value_loss_coef", "missing_eos_penalty", "lora_rank", "lora_alpha", "weight_decay",
            "value_warmup_updates", "warmup_updates", "eval_steps", "save_steps", "save_rollouts", "samples_logged",
        ):  # fmt: skip
            _require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _require(
            "importance_cap", self.importance_cap, self.importance_cap >= 1, "at least 1, the weight where both agree"
        )
        for name in ("gamma", "lam"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "from 0 up to, not including, 1")
        for name in (
            "kl_target_nats", "clip_scores", "value_learning_rate", "stop_kl_nats", "stop_approx_kl_nats",
            "score_timeout_seconds",
        ):  # fmt: skip
            _require(
                name, getattr(self, name), getattr(self, name) is None or getattr(self, name) > 0, "positive or null"
            )

    @property
    def value_lr(self) -> float:
        return self.learning_rate if self.value_learning_rate is None else self.value_learning_rate

    def lr_factor(self, update: int) -> float:
        """Share of the peak learning rate at this update, counted from 0."""
        if update < self.warmup_updates:
            return (update + 1) / self.warmup_updates
        if self.lr_schedule == "constant":
            return 1.0
        done = (update - self.warmup_updates) / max(1, self.updates - self.warmup_updates)
        return 1.0 - done if self.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def weights_for(self, functions: int) -> list[float]:
        weights = self.reward_weights or [1.0] * functions
        if len(weights) != functions:
            raise InputError(
                f"reward_weights has {len(weights)} numbers for {functions} reward functions; give one each"
            )
        return weights

    def check_processes(self, processes: int) -> None:
        """Refuse batch sizes that don't divide over the processes."""
        require_divides("number of processes", processes, "minibatch_size", self.minibatch_size)


def _require(name: str, value: object, fine: bool, what: str) -> None:
    if not fine:
        raise InputError(f"{name}={value} must be {what}")
