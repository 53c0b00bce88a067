"""transformers' own `generate`, for families whose state the decode loop cannot use (Mamba, MiniMax).

Such a state has no place for padding, so rows of equal prompt length are sampled together, and finished rows stay
until the last one ends: slower than the decode loop, but it works wherever `generate` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from rlhf.models.adapters import base_model


@torch.no_grad()
def generate_alike(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    rows_per_batch: int,
) -> list[list[int]]:
    """One response per prompt, in their order, from the full softmax (temperature 0: the most likely tokens)."""
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0 if temperature > 0 else None,  # off: 50 by itself
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
    )
    run: Any = model.generate
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[int]] = [[] for _ in prompts]
    with _settings(model, settings), _drawing_from(generator, model.device):
        for length, group in groupby(order, key=lambda i: len(prompts[i])):
            alike = list(group)
            for start in range(0, len(alike), rows_per_batch):
                rows = alike[start : start + rows_per_batch]
                ids = torch.tensor([prompts[i] for i in rows], device=model.device)
                written = run(input_ids=ids, attention_mask=torch.ones_like(ids))
                for row, tokens in zip(rows, written[:, length:].tolist(), strict=True):
                    ends = [place + 1 for place, token in enumerate(tokens) if token in stop_ids]
                    responses[row] = tokens[: ends[0]] if ends else tokens
    return responses


@torch.no_grad()
def generate_agrees(model: PreTrainedModel, pad_id: int) -> bool:
    """Are `generate`'s next-token probabilities those of one forward without a cache? Two short rows, three steps."""
    embeddings: Any = model.get_input_embeddings()
    run: Any = model.generate
    vocabulary = embeddings.weight.shape[0]
    ids = torch.tensor([[7 % vocabulary, 2, 5, 1], [1, 6 % vocabulary, 4, 2]], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=3, do_sample=False, pad_token_id=pad_id, output_logits=True, return_dict_in_generate=True
    )
    try:
        with _settings(model, settings):
            out = run(input_ids=ids, attention_mask=torch.ones_like(ids))
        whole = model(input_ids=out.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return total_variation(torch.stack(out.logits, 1), whole) <= most_apart(whole.dtype)


def total_variation(logits: Float[Tensor, "*B V"], others: Float[Tensor, "*B V"]) -> float:
    """The largest, over rows, of half the summed distance between two softmax distributions."""
    return float(0.5 * (logits.float().softmax(-1) - others.float().softmax(-1)).abs().sum(-1).max())


def most_apart(dtype: torch.dtype) -> float:
    """The total variation that two ways to the same logits, computed in `dtype`, may show."""
    return 1e-3 if dtype == torch.float32 else 0.25  # in half precision, batch sizes alone make a difference


@contextmanager
def _settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Inside, `settings` are all there is: what a hub model ships (top-k, penalties) would fill the ones left out."""
    plain = base_model(model)
    shipped, plain.generation_config = plain.generation_config, settings
    try:
        yield
    finally:
        plain.generation_config = shipped


@contextmanager
def _drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """`generate` draws from torch's global generator: inside, one that is seeded from `generator`, and put back."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
