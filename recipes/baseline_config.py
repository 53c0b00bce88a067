"""Settings of `rlhf baseline`. The string under a field is its help text on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, get_args

from rlhf.config import require_divides
from rlhf.errors import InputError
from rlhf.rows.mixed import Sources
from rlhf.run.settings import settle
from rlhf_recipes.stage import check_kept

Method = Literal["dpo", "kto", "grpo", "rloo"]
METHODS: tuple[str, ...] = get_args(Method)
FROM_RANKINGS = ("dpo", "kto")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Settings of DPO or KTO, which learn from rankings."""

    beta: float = 0.1
    """The cost of leaving the reference, trl's beta: more keeps the policy nearer to it."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW (trl's default)."""
    epochs: float = 1.0
    """Passes over the pairs, or over the labelled responses."""
    batch_size: int = 32
    """Pairs (KTO: responses) per optimizer step."""
    microbatch_size: int = 8
    """Pairs (KTO: responses, whose neighbours estimate the KL, so that it changes the result) per forward."""
    save_steps: int = 0
    """Optimizer steps between two checkpoints to resume from; 0: only after SIGTERM."""

    def __post_init__(self) -> None:
        settle(self)
        _check_sizes(self, "batch_size", "microbatch_size")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Settings of GRPO or RLOO, which sample, as PPO does, and compare the responses to one prompt."""

    beta: float = 0.05
    """Weight of the KL to the reference (PPO's kl_coef; trl's default is 0 for GRPO, 0.05 for RLOO)."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW (trl's default)."""
    updates: int = 100
    """Rollouts, each followed by its inner epochs."""
    rollout_size: int = 512
    """Responses sampled and scored per update: updates * rollout_size is the number of score calls."""
    generations: int = 8
    """Responses to each prompt, which are compared with each other; divides rollout_size."""
    batch_size: int = 64
    """Responses per optimizer step; divides rollout_size."""
    microbatch_size: int = 8
    """Responses per forward."""
    inner_epochs: int = 1
    """Passes over each rollout."""
    clip_ratio: float = 0.2
    """The policy's ratio is clipped to 1 +- this."""
    save_steps: int = 0
    """Updates between two checkpoints to resume from; 0: only after SIGTERM."""

    def __post_init__(self) -> None:
        settle(self)
        _check_sizes(self, "updates", "rollout_size", "batch_size", "microbatch_size", "inner_epochs")
        if self.generations < 2:
            raise InputError(f"generations={self.generations} must be at least 2: responses are compared")
        for name in ("generations", "batch_size"):
            require_divides(name, getattr(self, name), "rollout_size", self.rollout_size)

    @property
    def steps_per_update(self) -> int:
        """Return the optimizer steps on one rollout."""
        return self.rollout_size // self.batch_size * self.inner_epochs


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """DPO, KTO, GRPO or RLOO on the files of a run."""

    MOST_USED = ("method", "model", "train_data", "reward_model", "output_dir")

    method: Method
    """dpo or kto: from rankings; grpo or rloo: from scores."""
    output_dir: str = "runs/baseline"
    """Where the policy goes; in a config: the run's folder of the method's name."""
    seed: int = 0
    """Decides new LoRA weights, the order of the data and the sampling."""

    "Model and data"

    model: str | None = None
    """Policy to start from, and the reference; default: the run's `sft`."""
    train_data: Sources | None = None
    """dpo, kto: rankings or pairs; kto also rows of prompt, completion and label; default: the run's
    rankings/train.jsonl. grpo, rloo: prompts; default: the run's rankings/prompts.jsonl."""
    columns: dict[str, str] | None = None
    """Our names of columns and what the files named here call them, as {prompt: question}; null: the same."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """A row that can't be read, or that the chat template refuses: refuse: stop and name it; drop: leave it out, and
    count it in the log."""
    reward_model: str | None = None
    """grpo, rloo: what scores: a reward model's or an ensemble's folder; default: the run's `reward_model`; none: not
    even that, where functions score."""
    reward_functions: list[str] | None = None
    """grpo, rloo: further scores, as path/to/file.py:function or package.module:function."""
    reward_weights: list[float] | None = None
    """One weight per score, in this order: reward model, functions; null: 1 for each."""

    "Lengths and sampling"

    max_length: int = 1024
    """dpo, kto: longest prompt and response in tokens; longer ones are left out and counted, never cut."""
    max_prompt_tokens: int = 512
    """grpo, rloo: longer prompts are left out and counted."""
    max_new_tokens: int = 128
    """grpo, rloo: longest response."""
    temperature: float = 1.0
    """grpo, rloo: divides every logit."""
    missing_eos: Literal["replace", "subtract", "off"] = "replace"
    """grpo, rloo: score of a response without a stop token, as in PPO."""
    missing_eos_penalty: float = 1.0
    """The penalty of missing_eos."""

    "Methods"

    dpo: PreferenceConfig | None = field(default_factory=PreferenceConfig)
    kto: PreferenceConfig | None = field(default_factory=PreferenceConfig)
    grpo: OnlineConfig | None = field(default_factory=OnlineConfig)
    rloo: OnlineConfig | None = field(default_factory=OnlineConfig)

    "Optimization"

    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls from its peak to 0; constant: not at all."""
    warmup_fraction: float = 0.0
    """Share of the steps over which it rises to its peak."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it; 0 turns clipping off."""

    "LoRA"

    lora_rank: int = 0
    """Rank of a new LoRA adapter; 0: train all weights, or, where the model is an adapter, train that on."""
    lora_alpha: float = 32.0
    """The LoRA update is scaled by lora_alpha / lora_rank."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get LoRA weights, as in q_proj,v_proj; null or all-linear: every linear one but the
    head."""

    "Memory and speed"

    bf16: bool | None = None
    """Compute in bfloat16; null: where the hardware is fast at it; the log says."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""

    "Checkpoints and logs"

    logging_steps: int = 10
    """Optimizer steps (grpo, rloo: updates) between two logged lines."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    on_alarm: Literal["warn", "save", "stop"] = "warn"
    """When a metric leaves its healthy range: warn: log it once; save: also write a checkpoint; stop: also end the
    run."""
    report_to: list[str] | None = None
    """Trackers besides metrics.jsonl; none: no other."""
    keep_checkpoint: bool = False
    """Keep the last checkpoint once the stage is complete; needs save_steps."""
    overwrite: bool = False
    """Replace another run's output in output_dir."""

    def __post_init__(self) -> None:
        settle(self)
        names = ("max_length", "max_prompt_tokens", "max_new_tokens", "logging_steps", "save_total_limit")
        _check_sizes(self, *names)
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature} must be positive")
        if self.own is None:
            raise InputError(f"{self.method} is null; give its settings, or leave it out")
        if self.method == "kto" and self.own.microbatch_size < 2:
            raise InputError("kto.microbatch_size=1 must be at least 2: KTO estimates the KL from a row's neighbours")
        if self.method in FROM_RANKINGS and self.reward_weights:
            raise InputError(f"{self.method} learns from rankings: leave out reward_weights")
        check_kept(SimpleNamespace(keep_checkpoint=self.keep_checkpoint, save_steps=self.own.save_steps))

    @property
    def own(self) -> Any:
        """Return the settings of the method."""
        return {"dpo": self.dpo, "kto": self.kto, "grpo": self.grpo, "rloo": self.rloo}[self.method]


def _check_sizes(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)} must be at least 1")
    for name in ("beta", "learning_rate"):
        if not getattr(config, name, 1.0) >= 0:
            raise InputError(f"{name}={getattr(config, name)} must be 0 or more")
    if hasattr(config, "microbatch_size"):
        require_divides("microbatch_size", config.microbatch_size, "batch_size", config.batch_size)
