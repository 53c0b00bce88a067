"""Encoder trunks for reward models (BERT, RoBERTa, DeBERTa, ModernBERT ...), where they differ from decoders.

An encoder reads the whole conversation at once and scores it with its family's own classification head, from
the first token, a pooler or a mean. It has no language head, so no policy and no value model starts from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TEMPLATE = (
    "{{ cls_token }}"
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + sep_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""``[CLS]user: ...[SEP]assistant: ...[SEP]``: plain words and the encoder's own control tokens, as in pretraining."""


def is_encoder(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is an encoder's: its family has a masked language model and no decoder."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Set TEMPLATE as chat template of an encoder's tokenizer that has none, in place; it adds no tokens."""
    if is_encoder(config) and not tokenizer.chat_template and tokenizer.cls_token and tokenizer.sep_token:
        tokenizer.chat_template = TEMPLATE


def encoder_scores(
    model: nn.Module, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """Compute raw scores of whole sequences by the family's own head, in float32.

    Real tokens are moved to the front, where the family's positions start, so that padding on either side gives the
    same scores."""
    mask = attention_mask.long()
    order = (1 - mask).argsort(dim=1, stable=True)
    ids, mask = input_ids.gather(1, order), mask.gather(1, order)
    return model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float()


def head_modules(plain: PreTrainedModel) -> dict[str, nn.Module]:
    """Return an encoder's modules outside its trunk, by name; the last one computes the score."""
    trunk = plain.base_model_prefix
    return {name: m for name, m in plain.named_children() if name != trunk and next(m.parameters(), None) is not None}


def new_modules(plain: PreTrainedModel) -> list[str]:
    """Return the names of modules that a pretrained trunk may lack, so that an adapter has to save them.

    These are the head, and the trunk's pooler, without which masked language models are often published."""
    pooler = getattr(getattr(plain, plain.base_model_prefix), "pooler", None)
    return [*head_modules(plain), *(["pooler"] if isinstance(pooler, nn.Module) else [])]


def last_linear(plain: PreTrainedModel) -> nn.Linear:
    """Return the linear layer that computes the score."""
    head = list(head_modules(plain).values())[-1]
    return [module for module in head.modules() if isinstance(module, nn.Linear)][-1]


def position_limit(model: nn.Module) -> int | None:
    """Return the largest number of tokens for learned position embeddings; None if positions are relative or rotary."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa's first position
            return module.num_embeddings - first
    return None


def shortened(ids: Sequence[int], limit: int) -> list[int]:
    """Cut ids to at most `limit` tokens: keep the first ([CLS]) and the last ones, which hold the response."""
    return list(ids) if len(ids) <= limit else [ids[0], *ids[len(ids) - limit + 1 :]]


@torch.no_grad()
def draw_head(head: nn.Linear, seed: int) -> None:
    """Draw a head's weights from N(0, 1/sqrt(d + 1)) (Stiennon et al. 2020), and set its bias to 0."""
    generator = torch.Generator().manual_seed(seed)
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1))
    if head.bias is not None:
        head.bias.zero_()
