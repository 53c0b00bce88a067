"""Prepare the policy to fine-tune: vocabulary, special tokens, dropout, adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.adapter_check import check_config
from rlhf.models.adapters import base_model, is_adapter, lora_config
from rlhf.models.loading import held_in_4_bits, in_float32, load_policy, set_dropouts
from rlhf.models.pretrained import fit_embeddings
from rlhf.run.precision import compute_dtype
from rlhf.sft.config import SFTConfig


def prepare_model(
    model: str | Path | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    peft_config: PeftConfig | None = None,
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """Return the policy to train, with its vocabulary grown to the tokenizer's, and the config of a new adapter, if
    any.

    A new adapter also trains and saves the embeddings that the base never learned (tokens added for chat). The stop
    tokens and padding are written to generation_config, so that plain ``generate`` stops.
    """
    adapter = copy.deepcopy(peft_config) or lora_config(
        config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_target_modules
    )
    if adapter is not None:
        check_config(adapter, "peft_config")
    frozen_base = adapter is not None or (isinstance(model, str | Path) and is_adapter(model))
    dtype = compute_dtype(config.bf16) if frozen_base else torch.float32
    how = held_in_4_bits(model, dtype, frozen_base) if config.load_in_4bit else {}
    policy = load_policy(model, dtype=dtype, how=how)
    if adapter is None:
        in_float32(policy)
    if isinstance(policy, PeftModel) and adapter is not None:
        raise InputError("the model is already an adapter: leave out lora_rank and peft_config to continue it")
    if config.dropout is not None:
        set_dropout(policy, config.dropout)
    new_tokens = grow_vocabulary(policy, tokenizer)
    if isinstance(adapter, LoraConfig) and new_tokens and adapter.trainable_token_indices is None:
        _train_tokens(policy, adapter, new_tokens)
    _set_special_tokens(policy, tokenizer)
    return policy, adapter


@torch.no_grad()
def grow_vocabulary(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Add embeddings for tokens that the model has none for; return the ids whose embeddings it never learned.

    Rows beyond the tokenizer's vocabulary stay.
    """
    rows = len(_weight(model.get_input_embeddings()))
    if len(tokenizer) <= rows:
        return _chat_tokens(tokenizer)
    fit_embeddings(base_model(model), len(tokenizer))
    return sorted({*range(rows, len(tokenizer)), *_chat_tokens(tokenizer)})


def _train_tokens(policy: PreTrainedModel | PeftModel, adapter: LoraConfig, ids: list[int]) -> None:
    """Let a new adapter train the embeddings of some tokens, in the language head too unless it is tied.

    A head with a bias is trained and saved whole, since peft's wrapper of trained rows leaves the bias out (0.21)."""
    names, saved = _embedding_names(policy), list(adapter.modules_to_save or [])
    if getattr(policy.get_output_embeddings(), "bias", None) is not None:
        if len(names) == 1:
            raise InputError(
                f"{type(policy).__name__}: its tied language head has a bias, which trained chat tokens would lose; "
                "train all weights (lora_rank 0)"
            )
        saved.append(names[1])
    adapter.modules_to_save = sorted(set(saved)) or None
    adapter.trainable_token_indices = dict.fromkeys((name for name in names if name not in saved), ids) or None


def _set_special_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = model.config.get_text_config()
    text.pad_token_id = chat.pad_id(tokenizer)
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is not None:
            setattr(text, name, getattr(tokenizer, name))
    generation = model.generation_config
    if generation is not None:
        generation.bos_token_id, generation.pad_token_id = text.bos_token_id, text.pad_token_id
        generation.eos_token_id = list(chat.stop_ids(tokenizer, generation.eos_token_id))


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of the architecture; the saved config keeps the model's own. Raises InputError without one.

    Left as they are: an adapter's own dropout, and layerdrop, which leaves out whole layers."""
    if not set_dropouts(model, probability, kept=("lora_", "layerdrop")):
        raise InputError(f"dropout={probability}: {type(model).__name__} has no dropout to set; leave it out")


def _chat_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return ChatML's ids if the model had no chat template: it never learned them, even if its vocabulary has them."""
    if tokenizer.chat_template != chat.CHATML:
        return []
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in ("<|im_start|>", "<|im_end|>"))


def show_bias(head: nn.Module) -> None:
    """Let trl's loss read ``head.bias``, which peft's wrapper of trained token rows hides (peft 0.21)."""
    if not hasattr(head, "bias"):
        vars(head)["bias"] = cast(nn.Module, head.original_module).bias


def _weight(embeddings: nn.Module) -> Tensor:
    return cast(Tensor, embeddings.weight)


def _embedding_names(model: PreTrainedModel | PeftModel) -> list[str]:
    """Return the last part of the names of the input embeddings and of a head with weights of its own."""
    modules = [model.get_input_embeddings()]
    if model.get_output_embeddings().weight is not modules[0].weight:
        modules.append(model.get_output_embeddings())
    named = model.named_modules()
    return [name.rsplit(".", 1)[-1] for name, module in named if any(module is wanted for wanted in modules)]
