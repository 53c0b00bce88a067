"""Prompts in, responses out: the engine that samples, and the record of what was collected on them.

`TransformersEngine` is a plain decode loop. Another engine (vLLM, say) needs one method: `Engine.generate`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.padding import Batch, make_batch
from rlhf.records import Prompt

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Rollout:
    """One process's prompts and responses and everything collected on them; N rows, T the longest response.

    Filled stage by stage: collect (ids, logprobs, values), score (scores), advantages (rewards, returns).
    Tensors lie on the CPU. `plan` is the micro-batch plan of the first inner epoch, with which the old
    log-probabilities were computed: a list of minibatches, each a list of micro-batches of row numbers.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    texts: list[str]
    stopped: Bool[Tensor, "N"]
    mask: Bool[Tensor, "N T"]
    plan: list[list[list[int]]]
    update: int
    logprobs: Float[Tensor, "N T"]
    reference_logprobs: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    values: Float[Tensor, "N T"]
    engine_logprobs: Float[Tensor, "N T"] | None = None  # what the engine says it drew the tokens with, where it does
    raw_scores: Float[Tensor, "N"] | None = None
    own_scores: Mapping[str, Float[Tensor, "N"]] = field(
        default_factory=dict
    )  # each function's, where there are several
    scores: Float[Tensor, "N"] | None = None
    used: Bool[Tensor, "N"] | None = None  # False: scoring it failed, nothing of it is trained on; None: all are used
    rewards: Float[Tensor, "N T"] | None = None
    advantages: Float[Tensor, "N T"] | None = None
    returns: Float[Tensor, "N T"] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def kl(self) -> Float[Tensor, "N T"]:
        """k1 per token in nats, 0 on padding."""
        return torch.where(self.mask, self.logprobs - self.reference_logprobs, 0.0)

    @property
    def trained_mask(self) -> Bool[Tensor, "N T"]:
        """`mask` without the rows that are not used: what statistics, losses and metrics are over."""
        return self.mask if self.used is None else self.mask & self.used[:, None]

    @property
    def response_tokens(self) -> Int[Tensor, "N"]:
        return self.mask.sum(-1)

    def batch(self, rows: Sequence[int], pad_id: int, device: torch.device | str) -> Batch:
        return make_batch([self.prompt_ids[i] for i in rows], [self.response_ids[i] for i in rows], pad_id, device)
