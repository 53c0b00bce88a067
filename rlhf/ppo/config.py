"""PPO's settings. The string under a field is its help text on the command line."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.config import require_divides
from rlhf.errors import InputError
from rlhf.run.settings import settle

log = logging.getLogger("rlhf")

SCHEDULES = ("linear", "cosine", "constant")
MISSING_EOS = ("replace", "subtract", "off")
ON_SCORE_FAILURE = ("error", "drop")
ON_ALARM = ("warn", "save", "stop")
ON_BAD_ROW = ("refuse", "drop")
VALUE_MODELS = ("separate", "adapter", "shared_trunk", None)


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of `PPOTrainer`. Sizes are counted in responses; KL in nats per response."""

    "Run"

    output_dir: str = "runs/ppo"
    """Folder for checkpoints, metrics and samples."""
    seed: int = 0
    """Decides the order of prompts, the sampling and the minibatches."""

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
    """Responses sampled at once on one process; memory and speed. A run that goes on keeps it."""
    max_prompt_tokens: int = 512
    """Longer prompts are left out, counted and named in the log."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """A row that can't be read, or that the chat template refuses: refuse: stop and name it; drop: leave it out, and
    count it in the log."""
    max_new_tokens: int = 128
    """Longest response, its stop token included."""
    rollouts_ahead: int = 0
    """0: every rollout is sampled from the weights that it trains. 1: while a rollout trains, a thread samples the next
    one, from a copy of the trained weights (4 bytes each: of the whole policy, or of its adapter); it is one update
    old, and importance weights correct for that."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Settings that the chat template gets wherever it is used, such as {enable_thinking: false}; they are saved with
    the tokenizer. null: those in the model's folder."""
    temperature: float = 1.0
    """Divides every logit: in sampling, the policy, the reference and the entropy alike."""

    "Optimization"

    learning_rate: float = 1e-5
    """Peak learning rate of the policy."""
    value_learning_rate: float | None = None
    """Peak learning rate of the value model; null: learning_rate."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of both rates' fall to 0 over the updates; constant: they stay at their peak."""
    warmup_updates: int = 0
    """Updates over which both rates rise from 0 to their peak."""
    optimizer: str = "adamw"
    """adamw, or one of transformers' names: adamw_8bit, paged_adamw_8bit, lion_8bit, adafactor, sgd ... (8 bits need
    bitsandbytes)."""
    adam_beta1: float = 0.9
    """Adam's first decay rate."""
    adam_beta2: float = 0.95
    """Adam's second decay rate (InstructGPT: 0.95)."""
    adam_epsilon: float = 1e-5
    """Adam's epsilon (2403.17031, detail 21)."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Largest gradient norm; policy and value model are clipped separately unless they share a trunk."""

    "Value model"

    value_model: Literal["separate", "adapter", "shared_trunk"] | None = None
    """separate: a model of its own; adapter: an adapter on the policy's backbone (needs LoRA, of the reward model that
    it starts from too); shared_trunk: a head on the policy's own hidden states, one forward for both; null: adapter
    where it can be, else separate."""
    value_loss_coef: float = 0.1
    """Weight of the value loss on a shared trunk. Elsewhere it has no effect, because Adam cancels a constant factor:
    set value_learning_rate there."""
    value_warmup_updates: int = 0
    """First updates in which only the value model is trained (PPO-max, 2307.04964)."""

    "KL penalty, advantages and clipping"

    kl_coef: float = 0.05
    """beta: the cost of one nat of KL to the reference, in units of the normalised score."""
    kl_target_nats: float | None = None
    """Adapt kl_coef, from its value above 0, towards this KL per response (Ziegler et al. 2019), once
    value_warmup_updates are over; null: it is fixed."""
    kl_horizon: int = 10000
    """Time scale of the adaptive kl_coef, in responses; larger is slower. Above a fifth of rollout_size."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """lambda of generalised advantage estimation."""
    clip_ratio: float = 0.2
    """The policy's ratio is clipped to 1 +- this."""
    importance_cap: float = 2.0
    """Upper limit of the importance weight per token, which corrects an engine's probabilities (vLLM's), or those of
    older weights (rollouts_ahead), to the trainer's; .inf in YAML: no limit. The built-in engine needs no correction
    without rollouts_ahead."""
    clip_value: float = 0.2
    """New values are clipped to the old ones +- this; .inf in YAML: no clipping."""

    "Scores"

    normalize_scores: bool = False
    """Standardize scores by their running mean and spread (PPO-max)."""
    clip_scores: float | None = None
    """Clip scores to +- this after normalising; null: no clipping."""
    missing_eos: Literal["replace", "subtract", "off"] = "replace"
    """Score of a response without a stop token: -missing_eos_penalty, the score minus the penalty, or unchanged."""
    missing_eos_penalty: float = 1.0
    """The penalty of missing_eos, in units of the normalised score."""
    rescale_rewards: bool = False
    """Scale rewards to unit variance over the rollout, mean kept (2403.17031, detail 18)."""
    reward_weights: list[float] | None = field(default=None)
    """One weight per reward function; null: 1 for each."""
    step_score_coef: float = 0.0
    """Weight of step scores at the last token of each step, beside the score at the response's end, for a function that
    gives them (a process reward model); 0: none are asked for."""
    on_score_failure: Literal["error", "drop"] = "error"
    """When a reward function fails on a response (an exception, a time-out, NaN): end the run, or leave the response
    out of the update and count it in dropped_responses. If all responses fail, the run ends."""
    score_timeout_seconds: float | None = None
    """Time limit of each reward function for one process's responses of a rollout; null: no limit."""

    "Pretraining mix (PPO-ptx)"

    pretraining_data: str | None = None
    """Texts (a column text) or conversations, on which the policy also learns as a language model (InstructGPT, section
    3.5); null: none."""
    pretraining_coef: float = 27.8
    """Weight of that loss, a mean over tokens, beside the policy loss (InstructGPT: 27.8); 0: only measure it on the
    held-out rows."""
    pretraining_rows: int = 64
    """Rows of it per optimizer step, over all processes (InstructGPT: 8 per response of the minibatch)."""
    pretraining_length: int = 512
    """Tokens of a row; longer texts are cut into several rows, longer conversations are left out and counted."""
    pretraining_held_out: int = 64
    """Documents of it that are never trained on, a tenth of them at most: their loss before and after PPO is the
    alignment tax."""

    "LoRA"

    lora_rank: int = 0
    """Rank of a new adapter; 0 trains all weights, or continues the adapter if the model is one."""
    lora_alpha: float = 32.0
    """Numerator of LoRA's scale, lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Recorded in the adapter; PPO itself runs without dropout."""
    lora_target_modules: list[str] | None = None
    """Names of the adapted modules, as in q_proj,v_proj; null or all-linear: every linear layer of the trunk."""

    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits while its adapters train (QLoRA: NF4, double quantization); needs a GPU and
    bitsandbytes. What is saved is an ordinary adapter."""

    "Memory and speed"

    packing: Literal["auto", "on", "off"] = "auto"
    """Compute rows of different lengths as one long row, without padding. auto: where attention takes it apart (on
    CPUs; on GPUs in bfloat16 by flash attention, flash-attn's or torch's own); on: on GPUs by SDPA too, whose mask
    limits a long row to 2048 tokens; off: never. Only rounding differs."""
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
    """Checkpoint every so many updates and at the end; 0: only after SIGTERM, or where the run ends early."""
    metric_for_best_model: str | None = None
    """Held-out metric that transformers' EarlyStoppingCallback watches; null: eval_score."""
    greater_is_better: bool | None = None
    """Whether more of metric_for_best_model is better; null: yes, unless its name ends in loss."""
    save_total_limit: int = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    on_alarm: Literal["warn", "save", "stop"] = "warn"
    """When a metric leaves its healthy range: warn once; also write a checkpoint; or also end the run."""
    stop_kl_nats: float | None = None
    """End training when a rollout's KL to the reference exceeds this; null: never."""
    stop_approx_kl_nats: float | None = None
    """End an update's inner epochs when approx_kl_nats, averaged over one of them, exceeds this; null: never."""
    save_rollouts: int = 0
    """Every so many updates, keep the rollout and the trainer's state before it (as big as a checkpoint) in rollouts/,
    for recipes/inspect_rollout.py; 0: never."""
    samples_logged: int = 4
    """Responses written to samples.jsonl per update."""
    report_to: list[str] | None = None
    """Trackers besides metrics.jsonl: tensorboard, wandb, trackio, ... or all that are installed; none: no other."""
    run_name: str | None = None
    """The run's name in a tracker; null: the last two folders of output_dir, as in toy/ppo."""
    project: str | None = None
    """The project in wandb and trackio; null: that of WANDB_PROJECT, else transformers' own name."""
    preflight: bool = True
    """Check model, tokenizer, data and scores before the first update; a failed check ends the run."""

    def __post_init__(self) -> None:
        settle(self)
        for name in ("updates", "rollout_size", "minibatch_size", "inner_epochs", "tokens_per_microbatch"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("generation_batch_size", "max_prompt_tokens", "max_new_tokens", "kl_horizon", "save_total_limit"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name, choices in (
            ("lr_schedule", SCHEDULES), ("missing_eos", MISSING_EOS), ("on_alarm", ON_ALARM),
            ("on_bad_row", ON_BAD_ROW), ("on_score_failure", ON_SCORE_FAILURE), ("value_model", VALUE_MODELS),
        ):  # fmt: skip
            fine = ", ".join(str(choice or "null") for choice in choices)
            _require(name, repr(getattr(self, name)), getattr(self, name) in choices, f"one of {fine}")
        _require("pretraining_rows", self.pretraining_rows, self.pretraining_rows >= 1, "at least 1")
        _require("pretraining_length", self.pretraining_length, self.pretraining_length >= 2, "at least 2")
        _require("rollouts_ahead", self.rollouts_ahead, self.rollouts_ahead in (0, 1), "0 or 1")
        require_divides("minibatch_size", self.minibatch_size, "rollout_size", self.rollout_size)
        if self.kl_target_nats is not None:
            _require("kl_coef", self.kl_coef, self.kl_coef > 0, "positive with kl_target_nats, which multiplies it")
            least = 0.2 * self.rollout_size  # at most a fifth off per horizon: from here on kl_coef would fall below 0
            what = f"above {least:g}, a fifth of rollout_size={self.rollout_size}: it is counted in responses"
            _require("kl_horizon", self.kl_horizon, self.kl_horizon > least, what)
        _require("temperature", self.temperature, self.temperature > 0, "positive: PPO needs a distribution to sample")
        for name in ("learning_rate", "max_grad_norm", "clip_ratio", "clip_value", "adam_epsilon"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        for name in (
            "kl_coef", "value_loss_coef", "missing_eos_penalty", "step_score_coef", "lora_rank", "lora_alpha",
            "weight_decay", "value_warmup_updates", "warmup_updates", "eval_steps", "save_steps", "save_rollouts",
            "samples_logged", "pretraining_coef", "pretraining_held_out",
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
        """Return the value model's peak learning rate."""
        return self.learning_rate if self.value_learning_rate is None else self.value_learning_rate

    def learning_rates(self, update: int) -> tuple[float, float]:
        """Return the learning rates of policy and value model at an update, counted from 0."""
        factor = self.lr_factor(update)
        if factor == 0:
            log.warning(
                "update %d of %d: the learning rate has fallen to 0 and nothing is learned; raise updates, or set "
                "lr_schedule=constant", update + 1, self.updates,
            )  # fmt: skip
        return self.learning_rate * factor, self.value_lr * factor

    def lr_factor(self, update: int) -> float:
        """Return the share of the peak learning rate at an update, counted from 0; after the last one, still 0."""
        if update < self.warmup_updates:
            return (update + 1) / self.warmup_updates
        if self.lr_schedule == "constant":
            return 1.0
        done = min(1.0, (update - self.warmup_updates) / max(1, self.updates - self.warmup_updates))
        return 1.0 - done if self.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def weights_for(self, functions: int) -> list[float]:
        """Return one weight per reward function. Raises InputError if reward_weights has another length."""
        weights = self.reward_weights or [1.0] * functions
        if len(weights) != functions:
            raise InputError(
                f"reward_weights has {len(weights)} numbers for {functions} reward functions; give one each"
            )
        return weights

    def check_processes(self, processes: int) -> None:
        """Raise InputError unless the number of processes divides minibatch_size (and pretraining_rows, if used)."""
        require_divides("number of processes", processes, "minibatch_size", self.minibatch_size)
        if self.pretraining_data is not None:
            require_divides("number of processes", processes, "pretraining_rows", self.pretraining_rows)


def _require(name: str, value: object, fine: bool, what: str) -> None:
    if not fine:
        raise InputError(f"{name}={value} must be {what}")
