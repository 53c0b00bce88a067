"""The interface of an engine that samples responses, and the record that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


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
