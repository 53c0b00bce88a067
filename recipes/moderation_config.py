"""Settings of `rlhf moderation`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reward_models.config import ModerationConfig
from rlhf.errors import InputError
from rlhf.rows.mixed import Sources
from rlhf_recipes.stage import check_kept


@dataclass(frozen=True, kw_only=True)
class ModerationRecipe(ModerationConfig):
    """Training a moderation model on labelled texts, or judging texts with one."""

    MOST_USED = (
        "model", "train_data", "eval_data", "output_dir", "categories", "false_positive_rate", "trains", "epochs",
        "learning_rate", "max_length", "lora_rank",
    )  # fmt: skip

    "Model and data"

    model: str
    """The trunk to train: an encoder, or a causal model; without train_data a trained moderation model, or a guard."""
    train_data: Sources | None = None
    """Labelled texts to train on, one or several sources; null: nothing is trained, the model judges eval_data."""
    eval_data: str | None = None
    """Texts to measure on, or to judge; null: a fifth of train_data's texts."""
    calibration_data: Sources | None = None
    """Labelled texts for calibration and thresholds; null: `calibration_share` of train_data's."""
    calibration_share: float = 0.1
    """Share of the training texts that is set aside for calibration and thresholds."""
    false_positive_rate: float = 0.01
    """Share of the texts without a category that its threshold may flag, on the texts it is chosen on."""

    "Guards of others"

    guard: Literal["llama_guard", "shield_gemma", "safeguard"] | None = None
    """Judge with another's guard: `model` is its folder, hub id or http address; null: with a moderation model."""
    policy: str | None = None
    """File of a safeguard's policy, as text."""
    served_as: str | None = None
    """A guard's name at a server that serves several models."""
    threshold: float | None = None
    """Probability of unsafe from which a guard flags; null: 0.5. A moderation model has one of its own per category."""

    "Run"

    keep_checkpoint: bool = False
    """Keep the last checkpoint once the stage is complete, to train it longer later; needs save_steps."""
    overwrite: bool = False
    """Replace another run's output in output_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kept(self)
        for name in ("calibration_share", "false_positive_rate", "threshold"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                raise InputError(f"{name}={value} must be above 0 and below 1")
        for name in ("threshold", "served_as"):
            if self.guard is None and getattr(self, name) is not None:
                raise InputError(
                    f"{name}={getattr(self, name)}: it is a guard's; name the guard (--guard), or leave it out"
                )
        if self.guard is not None and self.train_data is not None:
            raise InputError("guard and train_data: a guard of others is asked, not trained; leave one out")
        if (self.guard == "safeguard") != (self.policy is not None):
            raise InputError("policy: name a safeguard's policy file with guard=safeguard, and with no other")
        if self.train_data is None and self.eval_data is None:
            raise InputError("train_data and eval_data: name one: texts to train on, or texts to judge")
