"""The records that pass between the stages of an update: a rollout collected, then scored, then ready to train on.

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
from rlhf.rows.records import Prompt

Grown = TypeVar("Grown", bound="Rollout")
Plan = list[list[list[int]]]
"""Minibatches, each a list of micro-batches, each a list of row numbers."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One process's prompts and responses, with the log-probabilities and values of its models before the update.

    N is the number of responses, T the tokens of the longest; tensors are on the CPU. `plan` is the plan of the first
    inner epoch; the log-probabilities and values were computed with its micro-batches.
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
    """Log-probabilities that the engine sampled the tokens with; None if it computes exactly as the trainer does."""
    staleness: int | None = None
    """Updates between the weights that sampled the responses and those of this record; None without rollouts_ahead."""

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> list[int]:
        """Return the prompt + response tokens of each row."""
        return [
            len(prompt) + len(response) for prompt, response in zip(self.prompt_ids, self.response_ids, strict=True)
        ]

    @property
    def kl(self) -> Float[Tensor, "N T"]:
        """Return the k1 estimate per token in nats, 0 on padding."""
        return torch.where(self.mask, self.logprobs - self.reference_logprobs, 0.0)

    @property
    def response_tokens(self) -> Int[Tensor, "N"]:
        return self.mask.sum(-1)

    def batch(self, rows: Sequence[int], pad_id: int, device: torch.device | str) -> Batch:
        """Return the given rows' tokens as a padded batch for the models."""
        return make_batch([self.prompt_ids[i] for i in rows], [self.response_ids[i] for i in rows], pad_id, device)

    def grown(self, stage: type[Grown], **columns: Any) -> Grown:
        """Return the next stage's record: this rollout with the columns that the stage has computed."""
        present = {item.name: getattr(self, item.name) for item in fields(self)}
        return stage(**present | columns)


@dataclass(frozen=True, kw_only=True)
class ScoredRollout(Rollout):
    """A rollout whose responses have scores."""

    raw_scores: Float[Tensor, "N"]
    """The weighted sum of the reward functions; NaN where scoring failed and the response is dropped."""
    own_scores: Mapping[str, Float[Tensor, "N"]]
    """Each function's own scores, by name, where there are several functions; NaN where one does not apply."""
    scores: Float[Tensor, "N"]
    """The raw scores normalised and clipped, after the missing-stop rule."""
    used: Bool[Tensor, "N"]
    """False where scoring failed: such a response is not trained on."""
    step_scores: Float[Tensor, "N T"] | None = None
    """The reward functions' step scores times step_score_coef, at the steps' last tokens; None where it is 0."""

    @property
    def trained_mask(self) -> Bool[Tensor, "N T"]:
        """Return `mask` with the unused rows set to False; statistics, losses and metrics are over its tokens."""
        return self.mask & self.used[:, None]


class Columns(NamedTuple):
    """The losses' inputs for some rows of a rollout, [B, T] each, on the models' device."""

    mask: Bool[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]
    importance: Float[Tensor, "B T"] | None


@dataclass(frozen=True, kw_only=True)
class ReadyRollout(ScoredRollout):
    """A rollout with advantages, the input of `update`."""

    rewards: Float[Tensor, "N T"]
    advantages: Float[Tensor, "N T"]
    returns: Float[Tensor, "N T"]
    importance: Float[Tensor, "N T"] | None = None
    """Weights that correct for an engine's slightly different probabilities; None if it reports no probabilities."""

    def columns(self, rows: Sequence[int], device: torch.device | str) -> Columns:
        """Return the given rows' columns, cut to the longest response among them."""
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
