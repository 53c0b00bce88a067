"""The interface of an engine that samples responses, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Responses:
    """What an engine wrote: token ids (with the stop token where there is one), and whether each stopped.

    logprobs: each token's log-probability in nats under the distribution that the engine drew it from (at the
    temperature); None from an engine that computes as the trainer does, whose draws need no correction.
    """

    ids: list[list[int]]
    stopped: list[bool]
    logprobs: list[list[float]] | None = None

    def padded_logprobs(self) -> Float[Tensor, "N T"] | None:
        """`logprobs` in a rectangle, 0 on padding."""
        if self.logprobs is None:
            return None
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in self.logprobs], batch_first=True)


class Engine(Protocol):
    """Samples one response per prompt from the full softmax (no top-k, no top-p, no penalties)."""

    def generate(
        self, prompt_ids: Sequence[list[int]], max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Responses: ...


@runtime_checkable
class Follower(Engine, Protocol):
    """An engine with weights of its own: the trainer hands it the policy whose weights each `generate` must sample
    with, and the ids that end a response."""

    def follow(self, policy: Any, stop_ids: Sequence[int]) -> None: ...
