"""Settings of supervised fine-tuning. The string under a field is its help text on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.errors import InputError, require_divides
from rlhf.run.settings import settle


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Settings of supervised fine-tuning. Batch sizes count demonstrations."""

    "Run"

    output_dir: str = "runs/sft"
    """Folder for checkpoints and the trained model."""
    seed: int = 0
    """Seed of the order of demonstrations, of new LoRA weights and of dropout."""

    "Batch sizes and lengths"

    epochs: float = 2.0
    """Passes over the demonstrations. InstructGPT: 16, with the checkpoint chosen by a reward model; 2 for the model
    that PPO starts from."""
    batch_size: int = 32
    """Demonstrations per optimizer step, over all processes."""
    microbatch_size: int = 8
    """Demonstrations per forward pass on one process: a memory setting that does not change the result."""
    max_length: int = 1024
    """Longest demonstration in tokens; longer ones are left out and counted, never cut."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """A row that can't be read, or that the chat template refuses: refuse: stop and name it; drop: leave it out, and
    count it in the log."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Settings that the chat template gets wherever it is used, such as {enable_thinking: false}; they are saved with
    the tokenizer. null: those in the model's folder."""

    "Optimization"

    learning_rate: float | None = None
    """Peak learning rate of AdamW; null: 1e-5, or 1e-4 where an adapter is trained. InstructGPT: 9.65e-6 (1.3B)."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak: cosine: to 10% of it, as in InstructGPT; linear: to 0; constant: not
    at all."""
    warmup_fraction: float = 0.0
    """Share of the optimizer steps in which the learning rate rises linearly from 0."""
    optimizer: str = "adamw"
    """adamw, or one of transformers' names: adamw_8bit, paged_adamw_8bit, lion_8bit, adafactor, sgd ... (8 bits need
    bitsandbytes)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it; 0 turns clipping off."""
    dropout: float | None = None
    """Probability of every dropout in the model's architecture (InstructGPT: 0.2, residual); null: the model's own."""

    "LoRA"

    lora_rank: int = 0
    """Rank of a new LoRA adapter; 0: train all weights, or, where the model is an adapter, train that on."""
    lora_alpha: float = 32.0
    """The LoRA update is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout on the input of the LoRA layers."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get LoRA weights, as in q_proj,v_proj; null or all-linear: every linear one but the
    head."""

    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits while its adapter trains (QLoRA: NF4, double quantization); needs a GPU and
    bitsandbytes. What is saved is an ordinary adapter."""

    "Memory and speed"

    packing: Literal["auto", "on", "off"] = "auto"
    """Compute rows of different lengths as one long row, without padding. auto: where attention takes it apart (on
    CPUs; on GPUs in bfloat16 by flash attention, flash-attn's or torch's own); on: on GPUs by SDPA too, for batches of
    up to 2048 tokens; off: never. Only rounding differs (and what dropout draws)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 20% slower."""
    bf16: bool | None = None
    """Compute in bfloat16 (trained weights stay float32); null: only where the hardware is fast at it (GPUs, CPUs with
    AVX512-BF16 or AMX); the log shows the choice."""

    "Evaluation, checkpoints and logs"

    logging_steps: int = 10
    """Optimizer steps between two logged lines."""
    eval_steps: int = 0
    """Optimizer steps between two evaluations; 0: after every epoch."""
    save_steps: int = 200
    """Optimizer steps between two checkpoints to resume from; 0: write one only after SIGTERM, or where
    a callback ends the run early."""
    metric_for_best_model: str | None = None
    """Held-out metric that transformers' EarlyStoppingCallback watches; null: eval_loss."""
    greater_is_better: bool | None = None
    """Whether more of metric_for_best_model is better; null: yes, unless its name ends in loss."""
    save_total_limit: int = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    on_alarm: Literal["warn", "save", "stop"] = "warn"
    """When a metric leaves its healthy range: warn: log it once; save: also write a checkpoint; stop: also end the
    run."""
    report_to: list[str] | None = None
    """Trackers besides metrics.jsonl: tensorboard, wandb, trackio, ... or all that are installed; none: no other."""
    run_name: str | None = None
    """The run's name in a tracker; null: the last two folders of output_dir, as in toy/ppo."""
    project: str | None = None
    """The project in wandb and trackio; null: that of WANDB_PROJECT, else transformers' own name."""
    preflight: bool = True
    """Check model, tokenizer and data before the first step, and refuse a run that cannot be right."""

    def __post_init__(self) -> None:
        settle(self)
        require_divides("microbatch_size", self.microbatch_size, "batch_size", self.batch_size)
        for name in ("epochs", "learning_rate", "max_length", "logging_steps", "save_total_limit"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:  # NaN is refused too
                raise InputError(f"{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "max_grad_norm", "lora_rank", "eval_steps", "save_steps"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")
        for name in ("warmup_fraction", "lora_dropout", "dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise InputError(f"{name}={getattr(self, name)} must lie in [0, 1)")
