"""Sampling by transformers' own `generate`, for families whose state the decode loop cannot use (Mamba, MiniMax).

Such a state cannot skip padding, so rows of equal prompt length are sampled together, and finished rows stay in the
batch until the last one ends: slower than the decode loop, but it works wherever `generate` does.
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
    """Sample one response per prompt, in their order, from the full softmax (temperature 0: the most likely tokens)."""
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0 if temperature > 0 else None,  # off; the default is 50
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
    )
    run: Any = model.generate
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[int]] = [[] for _ in prompts]
    with generating_by(model, settings), _drawing_from(generator, model.device):
        for length, group in groupby(order, key=lambda i: len(prompts[i])):
            alike = list(group)
            for start in range(0, len(alike), rows_per_batch):
                rows = alike[start : start + rows_per_batch]
                ids = torch.tensor([prompts[i] for i in rows], device=model.device)
                written = run(input_ids=ids, attention_mask=torch.ones_like(ids))
                for row, tokens in zip(rows, written[:, length:].tolist(), strict=True):
                    ends = [index + 1 for index, token in enumerate(tokens) if token in stop_ids]
                    responses[row] = tokens[: ends[0]] if ends else tokens
    return responses


@torch.no_grad()
def generate_agrees(model: PreTrainedModel, pad_id: int) -> bool:
    """Return whether `generate` has the next-token probabilities of one forward without a cache.

    Compared on two short rows, over three steps."""
    embeddings: Any = model.get_input_embeddings()
    run: Any = model.generate
    vocabulary = embeddings.weight.shape[0]
    ids = torch.tensor([[7 % vocabulary, 2, 5, 1], [1, 6 % vocabulary, 4, 2]], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=3, do_sample=False, pad_token_id=pad_id, output_logits=True, return_dict_in_generate=True
    )
    try:
        with generating_by(model, settings):
            out = run(input_ids=ids, attention_mask=torch.ones_like(ids))
        whole = model(input_ids=out.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return total_variation(torch.stack(out.logits, 1), whole) <= most_apart(whole.dtype)


def total_variation(logits: Float[Tensor, "*B V"], others: Float[Tensor, "*B V"]) -> float:
    """Return the total variation (half the summed distance) of two softmax distributions, the largest over rows."""
    return float(0.5 * (logits.float().softmax(-1) - others.float().softmax(-1)).abs().sum(-1).max())


def most_apart(dtype: torch.dtype) -> float:
    """Return the largest total variation that rounding in `dtype` may cause between two computations of the logits."""
    return 1e-3 if dtype == torch.float32 else 0.25  # in half precision the batch size alone makes a difference


@contextmanager
def generating_by(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation_config inside the context, since `generate` adds its values (top-k, penalties)."""
    plain = base_model(model)
    shipped, plain.generation_config = plain.generation_config, settings
    try:
        yield
    finally:
        plain.generation_config = shipped


@contextmanager
def _drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seed torch's global generator, from which `generate` draws, from `generator`; restore it afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
