"""The interface of an engine that samples responses, the record that it returns, and the tokens that stop it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf import chat
from rlhf.models.adapters import base_model


def model_stop_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end a response of this model: the chat template's, eos, and those at which the model's own
    `generate` stops. Ids beyond its embeddings, which it cannot write, are left out."""
    generation = getattr(base_model(model), "generation_config", None)
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    own = getattr(generation, "eos_token_id", None)
    listed = [own] if isinstance(own, int) else list(own or [])
    return chat.stop_ids(tokenizer, [i for i in listed if 0 <= i < rows])


@dataclass(frozen=True)
class Responses:
    """An engine's responses: token ids (including the stop token, if there is one), and whether each one stopped.

    logprobs: each token's log-probability in nats under the distribution that the engine drew it from (at the
    temperature); None if the engine computes as the trainer does, so that its draws need no correction.
    """

    ids: list[list[int]]
    stopped: list[bool]
    logprobs: list[list[float]] | None = None

    def padded_logprobs(self) -> Float[Tensor, "N T"] | None:
        """Return `logprobs` as a tensor [N, T], 0 on padding; None if there are none."""
        if self.logprobs is None:
            return None
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in self.logprobs], batch_first=True)


class RowGenerator(torch.Generator):
    """A generator that brings a seed of its own for each row, so that a response depends on no other row.

    Engines read the seeds with `row_seeds`; to an engine that doesn't, it is a plain generator."""

    seeds: list[int]

    @classmethod
    def of(cls, seeds: list[int], seed: int, device: torch.device | str) -> RowGenerator:
        """Make one for rows with these seeds; `seed` is the generator's own."""
        generator = cls(device)
        generator.manual_seed(seed)
        generator.seeds = seeds
        return generator


def row_seeds(generator: torch.Generator, rows: int) -> list[int]:
    """Return a seed for each row: those that a `RowGenerator` brings, or numbers drawn from another generator."""
    if isinstance(generator, RowGenerator):
        return generator.seeds
    drawn: list[int] = torch.randint(2**62, (rows,), generator=generator, device=generator.device).tolist()
    return drawn


class Engine(Protocol):
    """An engine: it samples one response per prompt from the full softmax (no top-k, no top-p, no penalties)."""

    def generate(
        self, prompt_ids: Sequence[list[int]], max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Responses: ...


@runtime_checkable
class Follower(Engine, Protocol):
    """An engine with its own copy of the weights.

    The trainer passes the policy, whose current weights each `generate` must use, and the ids that end a response."""

    def follow(self, policy: Any, stop_ids: Sequence[int]) -> None: ...


@runtime_checkable
class Gatherer(Follower, Protocol):
    """A follower for which a sharded policy need not be whole on any process, where `gathers` says so.

    On every process alike it then reads the weights one by one, each whole only as long as it is read, and runs the
    same forwards of the policy, each of which gathers a layer for as long as the layer runs."""

    @property
    def gathers(self) -> bool: ...
