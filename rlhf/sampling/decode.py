"""The built-in decode loop: left-padded prompts, a key-value cache, finished rows leave the batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from rlhf import cpu
from rlhf.errors import InputError
from rlhf.models.adapters import base_model
from rlhf.models.positions import check_responses
from rlhf.padding import pad
from rlhf.sampling.draw import drawn_logprobs, row_numbers, sample
from rlhf.sampling.engine import Responses, row_seeds
from rlhf.sampling.generate import generate_agrees, generate_alike, most_apart, total_variation

log = logging.getLogger("rlhf")


class TransformersEngine:
    """An engine that samples with a transformers model: left-padded prompts, a KV cache, finished rows leave the batch.

    rows_per_batch bounds memory; rows are grouped by prompt length, and a prompt that is there several times is read
    once. Each row has random numbers of its own, so the rows beside it change a response by rounding only. A hub
    model's generation_config is ignored, so the tokens come from the distribution that the trainer scores. The first
    call checks that the loop works for the model's family (`can_decode`). If not, transformers' `generate` samples
    (`rlhf.sampling.generate`); if that differs from the model's own logits too, the call raises InputError.

    reports_logprobs: report what each token was drawn with, as a run with `rollouts_ahead` needs. `generate` reports
    none.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], pad_id: int, rows_per_batch: int = 256):
        self.model = model
        self.stop_ids = tuple(stop_ids)
        self.pad_id = pad_id
        self.rows_per_batch = rows_per_batch
        # Reading which rows have finished makes the CPU wait for a GPU, so there rows leave only every 8 steps.
        self.check_every = 1 if model.device.type == "cpu" else 8
        self.reports_logprobs = False
        self._own_loop: bool | None = None  # not yet known

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Let rows leave the batch at the step that finishes them inside the context, on a GPU too."""
        every, self.check_every = self.check_every, 1
        try:
            yield
        finally:
            self.check_every = every

    @torch.no_grad()
    def has_own_loop(self) -> bool:
        """Return whether the decode loop samples, each row by its own seed, and not transformers' `generate`. The
        model, in eval mode, is asked once."""
        if self._own_loop is None:
            self._own_loop = can_decode(self.model, self.pad_id)
        return self._own_loop

    @torch.no_grad()
    def generate(
        self, prompt_ids: Sequence[list[int]], max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Responses:
        """Sample one response per prompt, in the prompts' order. Raises InputError where the model lacks positions."""
        check_responses(self.model, prompt_ids, max_new_tokens)
        order = sorted(range(len(prompt_ids)), key=lambda i: (len(prompt_ids[i]), prompt_ids[i]))
        ids: list[list[int]] = [[] for _ in prompt_ids]
        logprobs: list[list[float]] = [[] for _ in prompt_ids]
        training = self.model.training
        self.model.eval()  # in train mode, gradient checkpointing would switch the cache off
        try:
            own_loop = self.has_own_loop()
            cpu.give_way(self.model.device)
            numbers = row_numbers(row_seeds(generator, len(prompt_ids)), max_new_tokens, self.model.device)
            if not own_loop:
                settings = (max_new_tokens, temperature, generator, self.rows_per_batch)
                ids = generate_alike(self.model, prompt_ids, self.stop_ids, self.pad_id, *settings)
                order = []
            for start in range(0, len(order), self.rows_per_batch):
                rows = order[start : start + self.rows_per_batch]
                batch = self._decode([prompt_ids[i] for i in rows], max_new_tokens, temperature, numbers[rows])
                for row, response, drawn in zip(rows, *batch, strict=True):
                    ids[row], logprobs[row] = response, drawn
        finally:
            self.model.train(training)
        reported = logprobs if self.reports_logprobs and own_loop else None
        return Responses(ids, [response[-1] in self.stop_ids for response in ids], reported)

    def _decode(
        self, prompts: list[list[int]], max_new_tokens: int, temperature: float, numbers: Float[Tensor, "B T"]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return each prompt's response, and its tokens' log-probabilities (empty unless `reports_logprobs`)."""
        device = self.model.device
        place = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        input_ids, mask = pad(list(place), self.pad_id, device, side="left")
        stop = torch.tensor(self.stop_ids, device=device)
        cache: Any = DynamicCache(config=self.model.config)  # Any: its annotations demand torch.LongTensor
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        attention = mask.long()
        alive = torch.arange(len(prompts), device=device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        written = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.long, device=device)
        drawn = torch.zeros(len(prompts), max_new_tokens if self.reports_logprobs else 0, device=device)
        for step in range(max_new_tokens):
            logits = next_logits(self.model, input_ids, attention, positions, cache)
            if step == 0 and len(place) < len(prompts):  # a prompt with several responses has been read once
                rows = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
                cache.reorder_cache(rows)
                logits, attention, positions = logits[rows], attention[rows], positions[rows]
            token = sample(logits, temperature, numbers[alive, step])
            written[alive, step] = torch.where(done, -1, token)
            if self.reports_logprobs:
                drawn[alive, step] = drawn_logprobs(logits, temperature, token)
            done = done | torch.isin(token, stop)
            if (step + 1) % self.check_every == 0:
                keep = (~done).nonzero().squeeze(-1)
                if len(keep) == 0:
                    break
                if len(keep) < len(done):
                    cache.reorder_cache(keep)  # all cache layers have this method, recurrent and convolutional ones too
                    alive, token, attention, positions = alive[keep], token[keep], attention[keep], positions[keep]
                    done = done[keep]
            attention = torch.cat([attention, attention.new_ones(len(alive), 1)], dim=1)
            positions = positions[:, -1:] + 1
            input_ids = token[:, None]
        ids = [[t for t in row if t >= 0] for row in written.tolist()]
        return ids, [row[: len(response)] for row, response in zip(drawn.tolist(), ids, strict=True)]


def next_logits(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B L"],
    attention: Int[Tensor, "B S"],
    positions: Int[Tensor, "B L"],
    cache: Cache,
) -> Float[Tensor, "B V"]:
    """Return the logits of the token after `input_ids`; the cache holds the S - L tokens before them."""
    # An index, not a slice: the product of a non-contiguous slice with the head makes B copies of the head on a CPU.
    last = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)
    return model(
        input_ids=input_ids,
        attention_mask=attention,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last,
    ).logits[:, -1]


def can_decode(model: PreTrainedModel, pad_id: int) -> bool:
    """Return whether the decode loop samples from the distribution that the model scores; False if `generate` does.

    Raises InputError if neither does."""
    fault = decoding_fault(model, pad_id)
    if fault is None:
        return True
    family = type(base_model(model)).__name__
    if not generate_agrees(model, pad_id):
        raise InputError(
            f"{family}: {fault}, and transformers' generate fails or differs too; PPO needs a causal decoder with "
            "a working cache"
        )
    log.warning(
        "%s: %s; so transformers' generate samples, which is slower: one prompt length per batch", family, fault
    )
    return False


@torch.no_grad()
def decoding_fault(model: PreTrainedModel, pad_id: int) -> str | None:
    """Explain why the decode loop would sample from another distribution than the model's; None if it would not.

    Compares the next-token probabilities of two short left-padded rows, of which the longer leaves after a step, with
    those of each row alone in one forward. They differ where a family keeps its own state instead of a cache (Mamba,
    RWKV), sees later tokens (BERT), or reads padding as text (RecurrentGemma).
    """
    embeddings: Any = model.get_input_embeddings()
    vocabulary, device = embeddings.weight.shape[0], model.device
    long, short = [7 % vocabulary, 2, 5, 1], [1, 6 % vocabulary, 4]
    alone = [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0] for ids in (long, short)]
    expected = torch.stack([alone[0][-1], alone[1][-2], alone[1][-1]])
    if bool(expected.isnan().any()):
        return None  # the weights are broken: sampling stops on them with a better message
    cache: Any = DynamicCache(config=model.config)
    input_ids, mask = pad([long, short[:-1]], pad_id, device, side="left")
    attention, last = mask.long(), torch.tensor([short[-1:]], device=device)
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    try:
        first = next_logits(model, input_ids, attention, positions, cache)
        cache.reorder_cache(torch.tensor([1], device=device))
        attention = torch.cat([attention[1:], attention.new_ones(1, 1)], dim=1)
        second = next_logits(model, last, attention, positions[1:, -1:] + 1, cache)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        return f"sampling with transformers' key-value cache fails ({str(error).rstrip('.')})"
    apart, limit = total_variation(torch.cat([first, second]), expected), most_apart(expected.dtype)
    if apart <= limit:
        return None
    return (
        "next-token probabilities of a batch with left padding and a key-value cache differ from those of a row "
        f"alone by {apart:.2g} (total variation; at most {limit})"
    )
