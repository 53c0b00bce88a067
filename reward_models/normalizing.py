"""The responses whose scores a reward model's normaliser is measured on, and those scores, shared over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reward_models.encoding import responses_of
from reward_models.scoring import length_batches, score_sequences
from rlhf import chat
from rlhf.errors import InputError
from rlhf.padding import pad
from rlhf.rows.records import Demonstration
from rlhf.run import distributed

if TYPE_CHECKING:
    from datasets import Dataset

TOKENS_PER_MICROBATCH = 16384


def sampled_responses(
    data: Dataset,
    demonstrations: Sequence[Demonstration] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    count: int,
    seed: int,
) -> list[list[int]]:
    """Draw at most `count` encoded conversations: from `demonstrations`, or else from the training rankings `data`."""
    generator = np.random.default_rng(seed)
    if demonstrations is None:
        rows = generator.permutation(len(data))[:count].tolist()  # enough: 2 responses each, or more
        sequences = [ids for row in data.select(rows) for ids in responses_of(row)]
        return [sequences[i] for i in generator.permutation(len(sequences))[:count]]
    shuffled = (demonstrations[i] for i in generator.permutation(len(demonstrations)).tolist())
    encoded = (chat.encode_conversation(tokenizer, row.messages, row=row.columns)[0] for row in shuffled)
    fitting = list(islice((ids for ids in encoded if len(ids) <= max_length), count))
    if not fitting:
        raise InputError(f"normalizer_dataset: every row is longer than max_length={max_length}; raise it")
    return fitting


@torch.no_grad()
def shared_scores(
    accelerator: Accelerator, model: Any, read: Callable[[Any, Any], Tensor], sequences: list[list[int]], pad_id: int
) -> list[float]:
    """Return the raw scores of token sequences; each process scores its share, and all get all of them.

    read: the trainer's `scores`, through which FSDP2 gathers a sharded model's parameters."""
    own = accelerator.unwrap_model(model)

    def score(share: Sequence[list[int]]) -> list[float]:
        if not distributed.is_sharded(model):
            return score_sequences(own, share, pad_id, TOKENS_PER_MICROBATCH).tolist()
        scores = torch.empty(len(share))
        batches = list(length_batches([len(ids) for ids in share], TOKENS_PER_MICROBATCH))
        for rows in distributed.even_plan([batches], model)[0]:
            input_ids, mask = pad([share[i] for i in rows], pad_id, accelerator.device)
            scores[rows] = read(model, {"input_ids": input_ids, "attention_mask": mask.long()}).cpu()
        return scores.tolist()

    return distributed.shared(accelerator, sequences, score)
