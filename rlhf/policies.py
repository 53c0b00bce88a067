"""Policies that are only sampled: loading one, and the engine with which all processes of a run sample from it.

What the recipes sample, they sample by `SharedEngine`. In a run of several processes the main one runs the recipe, and
the others sample their share of the responses (`rlhf.run.sharing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from rlhf.models import loading
from rlhf.models.positions import check_responses
from rlhf.run import owner, sharing
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.engine import Responses, RowGenerator, row_seeds

Policy: TypeAlias = PreTrainedModel | PeftModel
Row = tuple[list[int], int]
"""A prompt's tokens, and the seed of its response."""


def load(path: str | Path, dtype: torch.dtype) -> Policy:
    """Load a policy to sample from it: a folder (full weights or adapter) or hub id, on this process's device."""
    model = _load(str(path), dtype)
    sharing.remember(model, _load, str(path), dtype)
    return model


def _load(path: str, dtype: torch.dtype) -> Policy:
    model = loading.load_policy(path, dtype=dtype)
    device = loading.default_device() if torch.cuda.is_available() else torch.device("cpu")
    return cast(Policy, model.to(device).eval())  # type: ignore[arg-type]


class SharedEngine:
    """An engine that samples with a policy of `load`; of several processes each samples a part of the rows.

    A response depends on its own prompt and seed, not on the number of processes (but for rounding: the rows beside it
    may move its logits in their last bits), and the generator goes on as in one process. A family that transformers'
    own `generate` samples, whose rows have no seeds of their own, is sampled by the main process."""

    def __init__(self, policy: Policy, stop_ids: Sequence[int], pad_id: int, rows_per_batch: int = 256):
        self.model = cast(PreTrainedModel, policy)
        self.alone = TransformersEngine(self.model, stop_ids, pad_id, rows_per_batch)
        self.stop_ids = self.alone.stop_ids
        sharing.remember(self.alone, TransformersEngine, self.model, self.stop_ids, pad_id, rows_per_batch)

    @property
    def rows_at_once(self) -> int:
        """Return how many rows all processes that sample have in hand at a time."""
        return self.alone.rows_per_batch * (owner.processes() if sharing.can_share(self.alone) else 1)

    def generate(
        self, prompt_ids: Sequence[list[int]], max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Responses:
        """Sample one response per prompt, in the prompts' order. Raises InputError where the model lacks positions."""
        if not sharing.can_share(self.alone) or not self.alone.has_own_loop():
            return self.alone.generate(prompt_ids, max_new_tokens, temperature, generator)
        check_responses(self.model, prompt_ids, max_new_tokens)
        seeds = row_seeds(generator, len(prompt_ids))
        order = sorted(range(len(prompt_ids)), key=lambda i: (len(prompt_ids[i]), prompt_ids[i]))
        parts = slices([(prompt_ids[i], seeds[i]) for i in order], owner.processes())
        drawn = sharing.share(partial(_respond, max_new_tokens, temperature), parts, self.alone)
        ids: list[list[int]] = [[] for _ in prompt_ids]
        for row, response in zip(order, (response for part in drawn for response in part), strict=True):
            ids[row] = response
        return Responses(ids, [response[-1] in self.stop_ids for response in ids])


def slices(rows: Sequence[Row], count: int) -> list[Sequence[Row]]:
    """Cut rows into `count` slices, or fewer where there are fewer rows, whose lengths differ by one at the most. A
    prompt's responses stay together, as far as that goes: it is then read once."""
    count = min(count, len(rows))
    return [rows[len(rows) * n // count : len(rows) * (n + 1) // count] for n in range(count)]


def _respond(
    max_new_tokens: int, temperature: float, parts: Sequence[Sequence[Row]], engine: TransformersEngine
) -> list[list[list[int]]]:
    """Sample the responses to each part's rows."""
    found = []
    for rows in parts:
        prompt_ids, seeds = zip(*rows, strict=True)
        generator = RowGenerator.of(list(seeds), seeds[0], engine.model.device)
        found.append(engine.generate(prompt_ids, max_new_tokens, temperature, generator).ids)
    return found
