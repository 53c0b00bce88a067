"""List what is measured: the cases (model, batch, lengths) and the runs (ours and trl's, each with its settings).

Every run of a case has the same model, prompts, reward, batch sizes and inner epochs. Responses never stop early:
ours samples without stop ids and trl without a stop token, so both always write `new_tokens` tokens per response.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rlhf.config import require_divides
from rlhf.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Case:
    """Describe a model and one update's size. `shape` makes a model with random weights; None: the benchmark's
    --model."""

    shape: dict[str, Any] | None
    rollout_size: int
    prompt_tokens: tuple[int, int]  # the shortest and the longest; the others lie evenly between them
    new_tokens: int
    inner_epochs: int
    minibatches: int
    tokens_per_microbatch: int = 16384  # of ours; a whole minibatch's in every case, as trl's micro-batch is

    def __post_init__(self) -> None:
        require_divides("minibatches", self.minibatches, "rollout_size", self.rollout_size)
        if not 5 < self.prompt_tokens[0] <= self.prompt_tokens[1]:
            raise InputError(f"prompt_tokens={self.prompt_tokens} must rise from at least 6: the chat template has 5")

    @property
    def prompt_lengths(self) -> list[int]:
        low, high = self.prompt_tokens
        return [low + round(i * (high - low) / max(1, self.rollout_size - 1)) for i in range(self.rollout_size)]

    @property
    def minibatch_size(self) -> int:
        return self.rollout_size // self.minibatches

    def as_job(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_job(cls, values: dict[str, Any]) -> Case:
        return cls(**{**values, "prompt_tokens": tuple(values["prompt_tokens"])})


def llama_shape(hidden: int, layers: int, heads: int, vocabulary: int, intermediate: int | None = None) -> dict:
    """Return the sizes of a Llama with tied embeddings and one key-value head per head."""
    return {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate or 4 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
    }  # fmt: skip


CASES = {
    "tiny": Case(
        shape=llama_shape(256, 4, 4, 49152, 704),
        rollout_size=32, prompt_tokens=(8, 47), new_tokens=48, inner_epochs=4, minibatches=2,
        tokens_per_microbatch=1536,
    ),
    "smollm2": Case(
        shape=None, rollout_size=16, prompt_tokens=(8, 47), new_tokens=48, inner_epochs=4, minibatches=2,
        tokens_per_microbatch=768,
    ),
}  # fmt: skip

TOY = Case(
    shape=llama_shape(128, 4, 4, 704, 256), rollout_size=256, prompt_tokens=(12, 36), new_tokens=16, inner_epochs=2,
    minibatches=4,
)  # fmt: skip
"""An update of recipes/configs/toy.yaml, and the model of all its stages."""

LORA = {"lora_rank": 16, "lora_alpha": 32.0}

OURS: dict[str, dict[str, Any]] = {
    "ours_adapter": {"bf16": True, **LORA},
    "ours_shared_trunk": {"bf16": True, "value_model": "shared_trunk", **LORA},
    "ours_full": {"bf16": False},
}
"""Settings of our PPOConfig. With LoRA, policy, reference and value model are adapters on one backbone, and so is the
reward model on its own; without, they are four full models, as trl's are."""

TRL: dict[str, dict[str, Any]] = {
    "trl_defaults": {"autocast": False, "frozen_dtype": "float32", "lora_rank": 0},
    "trl_lora": {"autocast": True, "frozen_dtype": "float32", **LORA},
    "trl_lora_bf16": {"autocast": True, "frozen_dtype": "bfloat16", **LORA},
}
"""trl's PPOTrainer at its defaults (its bf16=True reaches no forward pass: it is float32), under bf16 autocast with a
LoRA policy whose reference is the policy with adapters off, and that with the frozen weights held in bf16 too. The
value model is always trained whole: trl has no adapter for it. `ours_full` and `trl_defaults` are the same work."""


AGILERL: dict[str, dict[str, Any]] = {"agilerl_lora": {"bf16": True, **LORA}}
"""AgileRL's PPO for language models, which trains adapters only: policy, reference and critic on one backbone."""


def settings_here(run: str, hardware: str | bool | None) -> dict[str, Any]:
    """Return a run's settings on this machine; both sides use bfloat16 only where the hardware multiplies it fast."""
    settings = (OURS | TRL | AGILERL)[run]
    if hardware:
        return settings
    plain = {"bf16": False, "autocast": False, "frozen_dtype": "float32"}
    return settings | {name: value for name, value in plain.items() if name in settings}


def runs_here(runs: list[str], hardware: str | bool | None) -> dict[str, dict[str, Any]]:
    """Return the settings of these runs here; of runs that are equal without bfloat16, only the first."""
    chosen: dict[str, dict[str, Any]] = {}
    for run in runs:
        settings = settings_here(run, hardware)
        if not any(settings == other and (run in OURS) == (name in OURS) for name, other in chosen.items()):
            chosen[run] = settings
    return chosen


def precision(settings: dict[str, Any]) -> str:
    """Return the precision in which a run computes its matrix products."""
    return "bfloat16" if settings.get("bf16") or settings.get("autocast") else "float32"


SPEED_SETTINGS = {
    "learning_rate": 1e-6, "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "temperature": 1.0, "clip_ratio": 0.2,
    "clip_value": 0.2, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "seed": 0,
}  # fmt: skip
"""The same on both sides; they don't change the work."""


def trl_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Translate settings of our PPOConfig to trl's names; leave out what trl's PPO has no setting for."""
    renamed = {
        "clip_ratio": "cliprange", "clip_value": "cliprange_value", "inner_epochs": "num_ppo_epochs",
        "max_new_tokens": "response_length", "lr_schedule": "lr_scheduler_type",
    }  # fmt: skip
    same = ("learning_rate", "kl_coef", "gamma", "lam", "temperature", "seed")
    same += ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    return {renamed.get(name, name): value for name, value in settings.items() if name in renamed or name in same}
