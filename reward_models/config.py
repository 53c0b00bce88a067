"""Settings of reward-model training, and how trl's trainer receives them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf.errors import InputError, require_divides
from rlhf.run.settings import settle
from rlhf.run.trl_arguments import LEARNING_RATE, batch_arithmetic, training_arguments

if TYPE_CHECKING:
    import trl


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Settings of reward-model training. Batch sizes count prompts."""

    ROWS = "prompts_per_batch"  # the setting that holds an optimizer step's rows
    COMPARES = True  # the loss sees only differences of scores, so the bias of a head stays as it is

    "Run"

    output_dir: str = "reward_model"
    """Folder for checkpoints and metrics, and for the model that `save_model()` writes."""
    seed: int = 0
    """Seed of the new head's weights and of the order of the prompts."""
    init_seed: int | None = None
    """Seed of all new weights (head, adapter, new tokens); null: seed. With one for several seeds the models begin
    alike, as averaging their weights needs (WARM)."""

    "Batch sizes and lengths"

    epochs: float = 1.0
    """Passes over the training rankings. More than one overfits, most of all with many responses per prompt."""
    prompts_per_batch: int = 16
    """Prompts per optimizer step, over all processes; all responses to a prompt are in the same step."""
    microbatch_size: int = 4
    """Prompts per forward on one process. A memory setting: it changes no gradient."""
    max_length: int = 1024
    """Tokens of prompt and response together. A prompt with a longer response is left out, counted and named."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """A row that can't be read, or that the chat template refuses: refuse: stop and name it; drop: leave it out, and
    count it in the log."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Settings that the chat template gets wherever it is used, such as {enable_thinking: false}; they are saved with
    the tokenizer. null: those in the model's folder."""

    "Optimization"

    learning_rate: float | None = None
    """Peak learning rate of AdamW; null: 1e-5, or 1e-4 where an adapter is trained. InstructGPT: 9e-6 (6B)."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to 0 (`constant`: it does not)."""
    warmup_fraction: float = 0.03
    """Share of the steps over which the learning rate rises to its peak."""
    optimizer: str = "adamw"
    """adamw, or one of transformers' names: adamw_8bit, paged_adamw_8bit, lion_8bit, adafactor, sgd ... (8 bits need
    bitsandbytes)."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it; 0 turns clipping off."""

    "Loss and scores"

    label_smoothing: float = 0.0
    """Assumed probability that a pair's label is wrong (below 0.5), for noisy labels."""
    center_rewards_coefficient: float = 0.0
    """Weight in the loss of (better score + worse score)^2, which keeps scores around 0 (0.01 is usual); 0: off."""
    labeler_weights: dict[str, float] | None = None
    """Weight of each labeler's rankings, {name: weight}, found by the column `labeler` and multiplied by the column
    `weight`; null: all labelers count the same."""
    normalizer_samples: int = 2048
    """Responses (by default training ones) whose scores are normalised after training to mean 0 and standard deviation
    1; 0: scores stay raw."""

    "LoRA"

    lora_rank: int = 0
    """Rank of a new LoRA adapter; 0: train all weights, or, where the model is an adapter, train that on."""
    lora_alpha: float = 32.0
    """LoRA scale: the update is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout on the input of a new LoRA adapter. Every other dropout is off."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get an adapter, as in q_proj,v_proj; null or all-linear: every linear layer but the
    head."""

    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits while its adapter trains (QLoRA: NF4, double quantization); needs a GPU and
    bitsandbytes. What is saved is an ordinary adapter."""

    "Memory and speed"

    packing: Literal["auto", "on", "off"] = "auto"
    """Compute rows of different lengths as one long row, without padding. auto: where attention takes it apart (on
    CPUs; on GPUs in bfloat16 by flash attention, flash-attn's or torch's own); on: on GPUs by SDPA too, for batches of
    up to 2048 tokens; off: never. Only rounding differs (and what dropout draws)."""
    bf16: bool | None = None
    """Compute in bfloat16 (weights stay float32); null: where the hardware is fast at it (GPUs, CPUs with AVX512-BF16
    or AMX); the log says."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a fifth slower."""

    "Evaluation, checkpoints and logs"

    eval_steps: int = 0
    """Optimizer steps between two evaluations; 0: evaluate only when `evaluate()` is called."""
    keep_best: bool = False
    """End with the weights that had the lowest held-out loss, measured every eval_steps and after the last step."""
    max_eval_prompts: int = 0
    """Prompts to evaluate on, drawn with the seed; 0: all."""
    logging_steps: int = 10
    """Optimizer steps between two logged lines."""
    save_steps: int = 500
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
        for name in ("epochs", "learning_rate", "max_length", "logging_steps", "save_total_limit"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:  # NaN is refused too
                raise InputError(f"{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "max_grad_norm", "lora_rank", "eval_steps", "save_steps", "normalizer_samples"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.normalizer_samples == 1:
            raise InputError("normalizer_samples=1: one score has no spread; take more, or 0 for raw scores")
        for name, limit in (("label_smoothing", 0.5), ("warmup_fraction", 1), ("lora_dropout", 1)):
            if not 0 <= getattr(self, name) < limit:
                raise InputError(f"{name}={getattr(self, name)} must be at least 0 and below {limit}")
        for name, weight in (self.labeler_weights or {}).items():
            if not 0 <= weight < math.inf:
                raise InputError(f"labeler_weights: {name}: {weight} must be a number from 0 up")
        if not self.center_rewards_coefficient >= 0:
            raise InputError(
                f"center_rewards_coefficient={self.center_rewards_coefficient} must be 0 or more, say 0.01"
            )
        if self.keep_best and not self.eval_steps:
            raise InputError(
                "keep_best needs held-out losses to choose by: set eval_steps, say to a tenth of all steps"
            )
        require_divides("microbatch_size", self.microbatch_size, self.ROWS, self.rows_per_batch)

    @property
    def rows_per_batch(self) -> int:
        """Return the rows of the encoded data in an optimizer step."""
        return self.prompts_per_batch

    @property
    def labels(self) -> int:
        """Return how many numbers the head gives."""
        return 1

    def full_learning_rate(self, encoder: bool) -> float:
        """Return the default learning rate of full weights."""
        return LEARNING_RATE


@dataclass(frozen=True, kw_only=True)
class ProcessConfig(RewardConfig):
    """Settings of training a process or outcome reward model. Batch sizes count solutions."""

    ROWS = "solutions_per_batch"
    COMPARES = False

    "The model"

    output_dir: str = "process_reward"
    """Folder for checkpoints and metrics, and for the model that `save_model()` writes."""
    kind: Literal["process", "outcome"] = "process"
    """process: a probability at the end of each step; outcome: one for the whole solution, which is wrong where one of
    its steps is."""
    head: Literal["scalar", "three_class"] = "scalar"
    """scalar: the probability that a step is not wrong (a neutral one counts as right); three_class: those of wrong,
    neutral and right. process only."""
    separator: str = "\n"
    """Text between two steps. Within a step it becomes a space."""

    "Batch sizes and lengths"

    epochs: float = 3.0
    """Passes over the training solutions."""
    solutions_per_batch: int = 16
    """Labelled solutions per optimizer step, over all processes. Another alternative of a step is one more solution."""
    microbatch_size: int = 4
    """Solutions per forward on one process. A memory setting: it changes no gradient."""
    max_length: int = 1024
    """Tokens of prompt and solution together. A longer solution is left out, counted and named."""

    "Optimization"

    learning_rate: float | None = None
    """Peak learning rate of AdamW; null: 1e-5, 5e-5 for an encoder, or 1e-4 where an adapter is trained."""

    "Loss"

    label_smoothing: float = 0.0
    """Assumed probability that a step's label is wrong (below 0.5), for noisy labels."""
    labeler_weights: dict[str, float] | None = None
    """Weight of each labeler's solutions, {name: weight}, found by the column `labeler` and multiplied by the column
    `weight`; null: all labelers count the same."""

    prompts_per_batch: ClassVar[int] = 0  # type: ignore[misc]
    """Of rankings; here solutions are counted."""
    center_rewards_coefficient: ClassVar[float] = 0.0  # type: ignore[misc]
    """Of rankings: probabilities have a level of their own."""
    normalizer_samples: ClassVar[int] = 0  # type: ignore[misc]
    """Of rankings: probabilities are not normalised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.separator:
            raise InputError("separator is empty; write the text between two steps, say a line break")
        if self.kind == "outcome" and self.head == "three_class":
            raise InputError("head=three_class: an outcome is right or wrong; set head to scalar, or kind to process")

    @property
    def rows_per_batch(self) -> int:
        """Return the rows of the encoded data in an optimizer step."""
        return self.solutions_per_batch

    @property
    def labels(self) -> int:
        """Return how many numbers the head gives."""
        return 3 if self.head == "three_class" else 1

    def full_learning_rate(self, encoder: bool) -> float:
        """Return the default learning rate of full weights; encoders are small."""
        return 5e-5 if encoder else LEARNING_RATE


@dataclass(frozen=True, kw_only=True)
class ModerationConfig(RewardConfig):
    """Settings of training a moderation model: a probability per category. Batch sizes count texts."""

    ROWS = "texts_per_batch"
    COMPARES = False

    "The model"

    output_dir: str = "moderation"
    """Folder for checkpoints and metrics, and for the model that `save_model()` writes."""
    categories: list[str] | None = None
    """Columns that hold the labels; null: those of train_data that hold nothing but 0, 1, true, false and null."""
    trains: Literal["head", "all"] = "head"
    """head: the trunk stays as it is, and a head is fitted to its states, which takes one forward over the texts; all:
    from that head on, all weights (or an adapter) are trained for `epochs` passes."""
    reads: Literal["trunk", "trunk_and_words"] = "trunk_and_words"
    """trunk: a text's logits are the trunk's; trunk_and_words: the mean of these and of a bag of words', which is
    fitted to the same texts in seconds and knows rare words that few texts cannot teach a trunk."""

    "Batch sizes and lengths"

    epochs: float = 3.0
    """Passes over the training texts, with trains=all."""
    texts_per_batch: int = 16
    """Texts per optimizer step, over all processes."""
    microbatch_size: int = 16
    """Texts per forward on one process. A memory setting: it changes no gradient."""
    max_length: int = 256
    """Tokens that are read at once. A longer text is read in overlapping windows of so many, of which the highest
    logit of each category counts, in training and scoring alike: no text is cut."""

    "Optimization"

    learning_rate: float | None = None
    """Peak learning rate of AdamW, with trains=all; null: 1e-5, 2e-4 for an encoder, or 1e-4 where an adapter is
    trained."""

    "Loss"

    label_smoothing: float = 0.0
    """Assumed probability that a label is wrong (below 0.5), for noisy labels, with trains=all."""
    labeler_weights: dict[str, float] | None = None
    """Weight of each labeler's texts, {name: weight}, found by the column `labeler` and multiplied by the column
    `weight`; null: all labelers count the same."""

    prompts_per_batch: ClassVar[int] = 0  # type: ignore[misc]
    """Of rankings; here texts are counted."""
    center_rewards_coefficient: ClassVar[float] = 0.0  # type: ignore[misc]
    """Of rankings: probabilities have a level of their own."""
    normalizer_samples: ClassVar[int] = 0  # type: ignore[misc]
    """Of rankings: probabilities are calibrated instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.categories is not None and (not self.categories or len(set(self.categories)) < len(self.categories)):
            raise InputError(f"categories={self.categories}: name one or more columns, each once; or leave it out")
        for name in ("lora_rank", "keep_best", "eval_steps", "label_smoothing"):
            if self.trains == "head" and getattr(self, name):
                raise InputError(f"{name}={getattr(self, name)}: with trains=head no step is taken; set trains to all")
        if self.max_length < 16:
            raise InputError(f"max_length={self.max_length} must be 16 or more: a window holds some words")

    @property
    def rows_per_batch(self) -> int:
        """Return the rows of the encoded data in an optimizer step."""
        return self.texts_per_batch

    @property
    def labels(self) -> int:
        """Return how many numbers the head gives."""
        return len(self.categories or ())

    def full_learning_rate(self, encoder: bool) -> float:
        """Return the default learning rate of full weights; encoders are small."""
        return 2e-4 if encoder else LEARNING_RATE


def trl_arguments(config: RewardConfig, *, evaluate: bool) -> trl.RewardConfig:
    """Convert our settings to the TrainingArguments that trl's trainer and the callbacks receive."""
    import trl

    schedules = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    return training_arguments(
        config,
        trl.RewardConfig,
        **batch_arithmetic(config.rows_per_batch, config.microbatch_size, config.ROWS),
        lr_scheduler_type=schedules[config.lr_schedule],
        eval_strategy="steps" if evaluate and config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        max_length=None,  # over-long rankings are counted and left out by encode_rankings
        disable_dropout=False,  # prepare_model does it, and keeps a LoRA adapter's dropout
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
