"""How accelerate cuts models over processes (FSDP2, DeepSpeed): what it is asked to do, and what is refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from rlhf.errors import InputError
from rlhf.run.distributed import is_sharded
from rlhf.run.settings import OPTIMIZERS

Module = TypeVar("Module", bound=nn.Module)
logger = logging.getLogger(__name__)

KINDS = {
    DistributedType.FSDP: ("FSDP2", "pytorch_model_fsdp*"),
    DistributedType.DEEPSPEED: ("DeepSpeed", "global_step*"),
}
"""What cuts weights: its name, and what a Trainer's checkpoint holds under it alone."""


def shards(accelerator: Accelerator) -> bool:
    """Return whether accelerate shards the modules that it prepares."""
    return accelerator.distributed_type == DistributedType.FSDP


def spreads(accelerator: Accelerator) -> bool:
    """Return whether the weights are cut over processes, so that only a forward of the whole model sees them."""
    return accelerator.distributed_type in KINDS


def placed(accelerator: Accelerator, model: Module) -> Module:
    """Move a model to the device where it will compute; leave one that FSDP2 is to cut where it is, on the CPU.

    FSDP2 moves a unit's parameters and buffers to the device as it cuts them, so that no device holds a whole model."""
    return model if shards(accelerator) else model.to(accelerator.device)


def deepspeed(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed runs the modules that accelerate prepares."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def tell_if_left_out(accelerator: Accelerator) -> None:
    """Warn where accelerate was told to cut the weights and does not: on CPUs it leaves that out in silence."""
    for kind, (name, _) in KINDS.items():
        asked = os.environ.get(f"ACCELERATE_USE_{kind.value}", "false").lower() == "true"
        if asked and accelerator.distributed_type != kind and accelerator.is_main_process:
            logger.warning(
                "accelerate leaves %s out here, as it does without GPUs: every process has whole models", name
            )


def partitions(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed's ZeRO-3 leaves parameters empty outside the model's own forward and backward."""
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def configure(accelerator: Accelerator, config: Any = None) -> None:
    """Raise InputError for DeepSpeed and FSDP settings that would make PPO wrong; keep the module's outputs in float32.

    accelerate's bf16 policy for FSDP2 would round the module's outputs to bfloat16, log-probabilities included (an
    error of 0.03 nats at -8: ratios would be noise), and sum gradients in bfloat16. Call this before `prepare`.
    config: the trainer's settings.
    """
    tell_if_left_out(accelerator)
    if deepspeed(accelerator):
        raise InputError(
            "DeepSpeed: it would step inside PPO's backward passes, with gradients that nobody clips; use DDP or FSDP2 "
            "(recipes/configs/accelerate)"
        )
    if not shards(accelerator):
        return
    if OPTIMIZERS.get(getattr(config, "optimizer", "")) == "bitsandbytes":
        raise InputError(
            f"optimizer={config.optimizer}: bitsandbytes needs whole tensors, and FSDP2 cuts them; set adamw or use DDP"
        )
    if getattr(config, "load_in_4bit", False):
        raise InputError("load_in_4bit: FSDP2 leaves weights in 4 bits whole on every GPU; leave it out, or use DDP")
    plugin: Any = accelerator.state.fsdp_plugin
    if not accelerator.is_fsdp2:
        raise InputError("fsdp_version=1 is not supported; set fsdp_version: 2 (recipes/configs/accelerate/fsdp2.yaml)")
    if plugin.cpu_ram_efficient_loading:
        raise InputError(
            "fsdp_cpu_ram_efficient_loading=true leaves models empty on all processes but the first; set it to false"
        )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def configure_trainer(accelerator: Accelerator, model: Any, keeps_best: bool = False, config: Any = None) -> None:
    """Do what `configure` does for FSDP2, for a transformers Trainer: it saves by accelerate, and wraps in `train`.

    DeepSpeed is left to the Trainer. Raises InputError also where a saved folder would lack the model, and for adapters
    that train embeddings: accelerate shards embeddings and head as units of their own, and trl's loss and peft's
    wrappers read a head's weight outside its unit's forward: as parts, or whole but without the other processes'
    gradients."""
    if partitions(accelerator) and not accelerator.state.deepspeed_plugin.zero3_save_16bit_model:
        raise InputError(
            "zero3_save_16bit_model: a saved folder would lack the model; set it to true "
            "(recipes/configs/accelerate/zero3.yaml)"
        )
    if partitions(accelerator) and keeps_best:  # it would keep the parameters as they are between forwards: empty
        raise InputError("keep_best: not under DeepSpeed's ZeRO-3; leave it out, or use ZeRO-2, FSDP2 or DDP")
    if deepspeed(accelerator) and getattr(config, "packing", "") == "on":
        raise InputError("packing=on: under DeepSpeed rows are padded; leave it out, or use FSDP2 or DDP")
    if not shards(accelerator):
        tell_if_left_out(accelerator)
        return
    configure(accelerator, config)
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True  # see `distributed.no_sync`
    plugin: Any = accelerator.state.fsdp_plugin
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise InputError(
            "fsdp_state_dict_type: only parts of the model would be saved; set FULL_STATE_DICT "
            "(recipes/configs/accelerate/fsdp2.yaml)"
        )
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layer_classes([model])
    if hasattr(model, "peft_config"):
        embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
        if any(p.requires_grad for module in embeddings if module is not None for p in module.parameters()):
            raise InputError(
                "FSDP2 cannot shard an adapter that trains embeddings or the language head (as a new adapter does with "
                "chat tokens that its base never learned); use DDP, or train all weights (lora_rank: 0)"
            )


def require_trained(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise InputError where accelerate shards models, but a Trainer has not yet let it."""
    if shards(accelerator) and not is_sharded(model):
        raise InputError("evaluate: under FSDP2 the model is cut in train(); train first, or evaluate under DDP")


def check_kind(checkpoint: Path, accelerator: Accelerator) -> None:
    """Raise InputError where a Trainer cannot go on from a checkpoint, since only one of both was under FSDP2 or
    DeepSpeed: it would begin with a new optimizer, and say nothing."""
    for kind, (name, files) in KINDS.items():
        of_it = any(checkpoint.glob(files))
        if of_it != (accelerator.distributed_type == kind):
            made, now = (f"under {name}", "is not") if of_it else (f"without {name}", "is")
            raise InputError(
                f"{checkpoint}: made {made}, and this run {now}; go on with the accelerate configuration that it began "
                "with, or choose another output_dir"
            )


def layer_classes(models: Sequence[nn.Module]) -> list[str]:
    """Return the class names of the transformer layers in `models`: the units of accelerate's TRANSFORMER_BASED_WRAP.

    Only classes that are present: accelerate refuses a name that it doesn't find.
    """
    declared = {name for model in models for name in getattr(model, "_no_split_modules", None) or ()}
    present = {type(module).__name__ for model in models for module in model.modules()}
    return sorted(declared & present)
