"""Folders as a chain leaves them, made at once from a tiny model: base, SFT and reward model, LoRA or full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from rlhf import chat
from rlhf.models.adapters import lora_config
from rlhf.models.loading import load_policy
from rlhf.models.scalar import ScoreNormalizer, new_scalar_model

TARGETS = ["q_proj", "v_proj", "up_proj"]
NORMALIZER = ScoreNormalizer(mean=0.7, std=2.5, count=100)


@torch.no_grad()
def shake(model: torch.nn.Module, seed: int, size: float = 0.1, only: str = "") -> None:
    """Add noise to the parameters whose name contains `only`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter += torch.randn(parameter.shape, generator=generator) * size


def save_base(folder: Path, model, tokenizer) -> Path:
    chat.prepare_tokenizer(tokenizer)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def save_encoder(folder: Path, known: Sequence[str]) -> Path:
    """An encoder that knows these words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *known, "user", "assistant", ":", "[", "]", "sep", "a"]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **size, max_position_embeddings=96))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, tokenizer, seed: int = 1) -> Path:
    """An SFT adapter that is not the base: its LoRA weights are noise."""
    config = lora_config(4, 8.0, dropout=0.3, target_modules=TARGETS)
    policy = load_policy(base, lora=config, seed=seed)
    shake(policy, seed, only="lora_")
    policy.save_pretrained(str(folder / "sft"))
    tokenizer.save_pretrained(folder / "sft")
    return folder / "sft"


def save_reward_model(folder: Path, start: Path, tokenizer, seed: int = 2) -> Path:
    scalar = new_scalar_model(start, seed=seed)
    shake(scalar, seed, only="lora_" if isinstance(scalar, PeftModel) else "")
    scalar.config.pad_token_id = chat.pad_id(tokenizer)
    scalar.save_pretrained(str(folder / "reward_model"))
    tokenizer.save_pretrained(folder / "reward_model")
    NORMALIZER.save(folder / "reward_model")
    return folder / "reward_model"


def chain(folder: Path, model, tokenizer, lora: bool) -> tuple[Path, Path]:
    """(policy, reward model) folders of a chain in LoRA or full weights."""
    shake(model, 0, 0.05)
    base = save_base(folder, model, tokenizer)
    policy = save_adapter(folder, base, tokenizer) if lora else base
    return policy, save_reward_model(folder, policy, tokenizer)
