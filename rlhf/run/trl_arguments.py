"""Convert our settings to the TrainingArguments of transformers' and trl's trainers."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, TypeVar, cast

from rlhf.errors import require_divides
from rlhf.run.precision import compute_dtype

Arguments = TypeVar("Arguments")
Config = TypeVar("Config", bound=Any)

log = logging.getLogger("rlhf")

LEARNING_RATE, ADAPTERS_LEARNING_RATE = 1e-5, 1e-4
"""Where a config says none: at the first, an adapter's weights, half of which start at 0, hardly move."""

_SAME_NAME = (
    "output_dir", "seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "max_steps", "max_grad_norm", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "logging_steps", "save_steps", "report_to", "gradient_checkpointing", "metric_for_best_model",
    "greater_is_better",
)  # fmt: skip


_RENAMED = {
    "epochs": "num_train_epochs",
    "lr_schedule": "lr_scheduler_type",
    "warmup_fraction": "warmup_steps",
    "optimizer": "optim",
}


def with_learning_rate(config: Config, adapter: bool, full: float = LEARNING_RATE) -> Config:
    """Return a config with its learning rate; where it has none, the default of what is trained, which is logged.

    full: the default of full weights."""
    if config.learning_rate is not None:
        return config
    rate = ADAPTERS_LEARNING_RATE if adapter else full
    log.info("learning_rate: %g, the default of %s", rate, "an adapter" if adapter else "full weights")
    return dataclasses.replace(config, learning_rate=rate)


def training_arguments(config: Any, cls: type[Arguments], **extra: Any) -> Arguments:
    """Convert our config to TrainingArguments (or trl's SFTConfig, RewardConfig).

    ``batch_size`` counts rows per optimizer step over all processes, ``microbatch_size`` rows per forward on one
    process; their ratio gives the gradient accumulation steps (`batch_arithmetic`). A ``warmup_fraction`` below 1 is a
    share of all steps (transformers reads ``warmup_steps`` that way). ``extra`` overrides anything.
    """
    import torch

    values = {name: getattr(config, name) for name in _SAME_NAME if hasattr(config, name)}
    values |= {new: getattr(config, name) for name, new in _RENAMED.items() if hasattr(config, name)}
    if hasattr(config, "batch_size"):
        values |= batch_arithmetic(config.batch_size, getattr(config, "microbatch_size", None))
    if values.get("optim") == "adamw":
        del values["optim"]  # transformers' default: AdamW, fused
    if "save_steps" in values:
        values["save_strategy"] = "steps" if values["save_steps"] else "no"
        values["save_steps"] = values["save_steps"] or 500
        values["save_total_limit"] = None  # our callback deletes older ones once the newest is complete
    if "report_to" in values:
        values["report_to"] = list(values["report_to"] or [])
        values["run_name"] = getattr(config, "run_name", None) or "/".join(Path(config.output_dir).resolve().parts[-2:])
    if project := getattr(config, "project", None):
        values["project"] = project  # trackio's
        os.environ["WANDB_PROJECT"] = project  # the only way to tell wandb's callback
    on_cuda = torch.cuda.is_available()
    values |= {
        "bf16": compute_dtype(getattr(config, "bf16", None)) == torch.bfloat16,
        "use_cpu": not on_cuda,
        "dataloader_pin_memory": on_cuda,
        "disable_tqdm": True,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
    }
    if "gradient_checkpointing" in values:  # newer versions of transformers warn of this name
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        values[name] = values.pop("gradient_checkpointing")
        values[f"{name}_kwargs"] = {"use_reentrant": False} if values[name] else None
    arguments: Any = cls(**(values | extra))
    if arguments.n_gpu > 1:  # one process uses one GPU; transformers would copy the model to all that it sees
        arguments._n_gpu = 1
    return cast(Arguments, arguments)


def batch_arithmetic(batch_size: int, microbatch_size: int | None, name: str = "batch_size") -> dict[str, int]:
    """Divide an optimizer step's rows over processes and micro-batches.

    With several processes a micro-batch may get smaller than asked for, so that it divides a process's share: that
    changes memory and speed only. name: the setting that holds the step's rows."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    require_divides("number of processes", processes, name, batch_size)
    share = batch_size // processes
    rows = share if microbatch_size is None else microbatch_size
    if processes == 1:
        require_divides("microbatch_size", rows, name, batch_size)
    while share % rows:
        rows -= 1
    return {
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "gradient_accumulation_steps": share // rows,
    }
