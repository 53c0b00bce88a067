"""Make the reward model to train: add a scalar head, rows for the tokenizer's tokens, and an adapter if wanted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.config import RewardConfig
from rlhf.errors import InputError
from rlhf.models import encoders
from rlhf.models.adapter_check import check_held
from rlhf.models.adapters import is_adapter, lora_config
from rlhf.models.loading import disable_dropout, held_in_4_bits, in_float32, with_adapter
from rlhf.models.scalar import freeze_bias, is_scalar, new_modules, new_scalar_model
from rlhf.run.precision import compute_dtype


def prepare_model(
    model: str | Path | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RewardConfig,
    peft_config: LoraConfig | None = None,
) -> PreTrainedModel | PeftModel:
    """Make the model to train, with a head of `config.labels` numbers. All dropout is off except a LoRA adapter's
    own."""
    seed = config.seed if config.init_seed is None else config.init_seed
    adapter = copy.deepcopy(peft_config) or lora_config(
        config.lora_rank,
        config.lora_alpha,
        config.lora_dropout,
        config.lora_target_modules,
        task_type=TaskType.SEQ_CLS,
    )
    continued = not isinstance(model, nn.Module) and is_adapter(model)
    dtype = compute_dtype(config.bf16) if adapter is not None or continued else None  # of a frozen trunk
    how = held_in_4_bits(model, dtype or torch.float32, dtype is not None) if config.load_in_4bit else {}
    if isinstance(model, nn.Module) and is_scalar(model, config.labels):
        scalar = model
        if adapter is None:
            in_float32(scalar)
        if isinstance(model, PeftModel):
            check_held(model)
    else:
        lora = adapter if continued else None
        scalar = new_scalar_model(model, seed=seed, dtype=dtype, lora=lora, labels=config.labels, how=how)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # what the trainer would set, with a warning
        setattr(scalar.config, name, getattr(tokenizer, name))
    new_tokens = _grow_vocabulary(scalar, tokenizer, seed)
    if adapter is not None and not continued:
        if isinstance(scalar, PeftModel):
            raise InputError(
                "the model is already an adapter: to train it further, leave lora_rank and peft_config out"
            )
        scalar = _new_adapter(scalar, adapter, new_tokens, seed)
    if config.COMPARES:
        freeze_bias(scalar)
    disable_dropout(scalar)
    if isinstance(scalar, PeftModel):
        for name, module in scalar.named_modules():
            if isinstance(module, nn.Dropout) and "lora_dropout" in name:
                module.p = cast(LoraConfig, scalar.peft_config["default"]).lora_dropout
    return scalar


def _grow_vocabulary(scalar: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[int]:
    """Add embeddings for tokens that the model has none for; return their ids."""
    rows = cast(nn.Embedding, scalar.get_input_embeddings()).weight.shape[0]
    if len(tokenizer) > rows:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # new rows are drawn from the global generator
            scalar.resize_token_embeddings(len(tokenizer))
    return list(range(rows, len(tokenizer)))


def _new_adapter(scalar: PreTrainedModel, adapter: LoraConfig, new_tokens: list[int], seed: int) -> PeftModel:
    """Add a new adapter that also trains and saves the head and the embeddings of new tokens."""
    if not scalar.name_or_path:
        raise InputError("LoRA needs a base that can be loaded again: save the model and pass its folder")
    adapter.task_type = TaskType.SEQ_CLS
    heads = new_modules(scalar)
    adapter.modules_to_save = sorted({*heads, *(adapter.modules_to_save or [])})
    if encoders.is_encoder(scalar.config) and adapter.exclude_modules is None:
        adapter.exclude_modules = rf".*\.?({'|'.join(heads)})(\..*)?"  # trained in full, without an adapter
    if new_tokens and adapter.trainable_token_indices is None:
        adapter.trainable_token_indices = new_tokens
    return with_adapter(scalar, adapter, seed)
