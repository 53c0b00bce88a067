"""Settings of supervised fine-tuning. The string under a field is its help text on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.errors import InputError, require_divides


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
    PPO starts from."""
    batch_size: int = 32
    """Demonstrations per optimizer step, over all processes."""
    microbatch_size: int = 8
    """Demonstrations per forward pass on one process: a memory setting that does not change the result."""
    max_length: int = 1024
    """Longest demonstration in tokens; longer ones are left out and counted, never cut."""

    "Optimization"

    learning_rate: float = 1e-5
    """Peak learning rate of AdamW. InstructGPT: 9.65e-6 (1.3B). LoRA wants about ten times more."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """cosine: to 10% of the peak, as in InstructGPT; linear: to 0; constant."""
    warmup_fraction: float = 0.0
    """Share of the optimizer steps in which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it; 0 turns that off."""
    dropout: float | None = None
    """Probability of every dropout that the model's architecture has (InstructGPT: 0.2, residual); None keeps the
    model's own."""

    "LoRA"

    lora_rank: int = 0
    """Rank of a new LoRA adapter; 0 trains all weights, or continues the adapter that the model is."""
    lora_alpha: float = 32.0
    """The LoRA update is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout on the input of the LoRA layers."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get LoRA weights; None: every linear layer but the head."""

    "Memory and speed"

    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about 20% slower."""
    bf16: bool | None = None
    """Compute in bfloat16 (weights that are trained stay float32); null: where the hardware is fast at it (GPUs, CPUs
    with AVX512-BF16 or AMX); the log says."""

    "Evaluation, checkpoints and logs"

    logging_steps: int = 10
    """Optimizer steps between two logged lines."""
    eval_steps: int = 0
    """Optimizer steps between two evaluations; 0: after every epoch."""
    save_steps: int = 200
    """Optimizer steps between two checkpoints that a killed run goes on from; 0: none (but after SIGTERM)."""
    save_total_limit: int = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    on_alarm: Literal["warn", "save", "stop"] = "warn"
    """When a metric leaves its healthy range: say so once; also write a checkpoint; also end the run there."""
    report_to: list[str] | None = None
    """Where metrics go besides metrics.jsonl: trackio, tensorboard, wandb."""
    preflight: bool = True
    """Check model, tokenizer and data before the first step, and refuse what cannot be right."""

    def __post_init__(self) -> None:
        require_divides("microbatch_size", self.microbatch_size, "batch_size", self.batch_size)
        for name in ("epochs", "learning_rate", "max_length", "logging_steps", "save_total_limit"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "max_grad_norm", "lora_rank", "eval_steps", "save_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")
        for name in ("warmup_fraction", "lora_dropout", "dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise InputError(f"{name}={getattr(self, name)} must lie in [0, 1)")
