"""What passes from stage to stage of an update: a rollout that is collected, then scored, then ready to train on.

Each stage takes the record of the stage before it and returns its own, so a stage cannot be called too early.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.padding import Batch, make_batch
from rlhf.records import Prompt

Grown = TypeVar("Grown", bound="Rollout")
Plan = list[list[list[int]]]
"""Minibatches, each a list of micro-batches, each a list of row numbers."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One process's prompts, its responses, and what the models say of them before the update.

    N rows, T the longest response; tensors lie on the CPU. `plan` is the plan of the first inner epoch, with which the
    log-probabilities and values were computed.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    texts: list[str]
    stopped: Bool[Tensor, "N"]
    mask: Bool[Tensor, "N T"]
    plan: Plan
    update: int
    """Number of updates before this one."""
    logprobs: Float[Tensor, "N T"]
    reference_logprobs: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    values: Float[Tensor, "N T"]
    engine_logprobs: Float[Tensor, "N T"] | None = None
    """The log-probabilities that an engine drew the tokens with; None from one that computes as the trainer does."""

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> list[int]:
        """Prompt + response tokens of each row."""
        return [
            len(prompt) + len(response) for prompt, response in zip(self.prompt_ids, self.response_ids, strict=True)
        ]

    @property
    def kl(self) -> Float[Tensor, "N T"]:
        """k1 per token in nats, 0 on padding."""
        return torch.where(self.mask, self.logprobs - self.reference_logprobs, 0.0)

    @property
    def response_tokens(self) -> Int[Tensor, "N"]:
        return self.mask.sum(-1)

    def batch(self, rows: Sequence[int], pad_id: int, device: torch.device | str) -> Batch:
        """Some rows' tokens, for the models."""
        return make_batch([self.prompt_ids[i] for i in rows], [self.response_ids[i] for i in rows], pad_id, device)

    def grown(self, stage: type[Grown], **columns: Any) -> Grown:
        """This rollout as the next stage's record, with the columns that the stage has computed."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        return stage(**own | columns)


@dataclass(frozen=True, kw_only=True)
class ScoredRollout(Rollout):
    """A rollout whose responses have scores."""

    raw_scores: Float[Tensor, "N"]
    """The weighted sum of the reward functions; NaN where scoring failed and the response is dropped."""
    own_scores: Mapping[str, Float[Tensor, "N"]]
    """Each function's own, where there are several; NaN where one does not apply."""
    scores: Float[Tensor, "N"]
    """Normalised, clipped, and with the rule for responses that did not stop."""
    used: Bool[Tensor, "N"]
    """False where scoring failed: nothing of such a response is trained on."""

    @property
    def trained_mask(self) -> Bool[Tensor, "N T"]:
        """`mask` without the rows that are not used: what statistics, losses and metrics are over."""
        return self.mask & self.used[:, None]


class Columns(NamedTuple):
    """Some rows' columns [B, T] on the device of the models, as the losses take them."""

    mask: Bool[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]
    importance: Float[Tensor, "B T"] | None


@dataclass(frozen=True, kw_only=True)
class ReadyRollout(ScoredRollout):
    """A rollout with advantages: what `update` trains on."""

    rewards: Float[Tensor, "N T"]
    advantages: Float[Tensor, "N T"]
    returns: Float[Tensor, "N T"]
    importance: Float[Tensor, "N T"] | None = None
    """Weights that correct for an engine that draws from slightly other probabilities; None where it reports none."""

    def columns(self, rows: Sequence[int], device: torch.device | str) -> Columns:
        """The columns of some rows, as wide as the longest response among them."""
        index = torch.tensor(rows)
        width = int(self.response_tokens[index].max())

        def part(column: Tensor) -> Tensor:
            return column[index, :width].to(device)

        return Columns(
            mask=part(self.trained_mask),
            logprobs=part(self.logprobs),
            values=part(self.values),
            advantages=part(self.advantages),
            returns=part(self.returns),
            importance=None if self.importance is None else part(self.importance),
        )
