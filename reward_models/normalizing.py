"""The responses whose scores a reward model's normaliser is measured on, and those scores, shared over processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reward_models.config import RewardConfig
from reward_models.encoding import responses_of
from reward_models.scoring import length_batches, packs_here, score_sequences
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.positions import Positions
from rlhf.padding import pad
from rlhf.rows.records import BadRows, read_demonstrations
from rlhf.rows.sources import Source
from rlhf.run import distributed, strategy

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("rlhf")
TOKENS_PER_MICROBATCH = 16384
MANY_TOKENS = 100_000  # may take a CPU minutes, in which nothing else is shown


def sampled_responses(data: Dataset, count: int, seed: int) -> list[list[int]]:
    """Draw at most `count` encoded responses, each with its prompt, from the training rankings."""
    generator = np.random.default_rng(seed)
    rows = generator.permutation(len(data))[:count].tolist()  # enough: 2 responses each, or more
    sequences = [ids for row in data.select(rows) for ids in responses_of(row)]
    return [sequences[i] for i in generator.permutation(len(sequences))[:count]]


def demonstrated(
    source: Source, tokenizer: PreTrainedTokenizerBase, config: RewardConfig, limit: int, positions: Positions | None
) -> list[list[int]]:
    """Draw at most `normalizer_samples` demonstrations, encoded as `RewardModel` reads them: without thinking.

    Those of more than `limit` tokens, or than the model has positions for, are passed over; on_bad_row says what
    becomes of those that the chat template refuses. Raises InputError where fewer than two are left: no spread."""
    limit = limit if positions is None else min(limit, positions.limit)
    demonstrations = read_demonstrations(source, on_bad_row=config.on_bad_row)
    count, found, too_long = config.normalizer_samples, list[list[int]](), 0
    refused = BadRows("normalizer_dataset", config.on_bad_row)
    for number in np.random.default_rng(config.seed).permutation(len(demonstrations)).tolist():
        if len(found) == count:
            break
        row = demonstrations[number]
        answer = {name: value for name, value in row.messages[-1].items() if name != "reasoning_content"}
        try:
            ids, _ = chat.encode_conversation(tokenizer, [*row.prompt, answer], len(row.prompt), row.columns)
        except InputError as error:
            refused.add(row.where, error)
            continue
        if len(ids) > limit:
            too_long += 1
        else:
            found.append(ids)
    refused.tell(len(found) + too_long)
    if len(found) < min(2, count):
        seen = f"{len(found)} of {len(demonstrations)} rows can be used, {too_long} are longer than {limit} tokens"
        raise InputError(f"normalizer_dataset: {seen}; two are needed: add rows, or raise max_length")
    return found


@torch.no_grad()
def shared_scores(
    accelerator: Accelerator, model: Any, read: Callable[[Any, Any], Tensor], sequences: list[list[int]], pad_id: int
) -> list[float]:
    """Return the raw scores of token sequences; each process scores its share, and all get all of them.

    read: the trainer's `scores`, through which FSDP2 or DeepSpeed gathers the parameters of a model that is cut."""
    own = accelerator.unwrap_model(model)
    if (tokens := sum(map(len, sequences))) > MANY_TOKENS:
        logger.info("normaliser: scoring %s responses of %s tokens", f"{len(sequences):,}", f"{tokens:,}")
    cut = distributed.is_sharded(model) or strategy.partitions(accelerator)

    def score(share: Sequence[list[int]]) -> list[float]:
        if not cut:
            return score_sequences(own, share, pad_id, TOKENS_PER_MICROBATCH, packs_here(own)).tolist()
        given = share or sequences[:1]  # every process must run forwards, and as many
        scores = torch.empty(len(given))
        batches = list(length_batches([len(ids) for ids in given], TOKENS_PER_MICROBATCH))
        most = int(accelerator.gather(torch.tensor([len(batches)], device=accelerator.device)).max())
        for rows in [*batches, *batches[:1] * (most - len(batches))]:
            input_ids, mask = pad([given[i] for i in rows], pad_id, accelerator.device)
            scores[rows] = read(model, {"input_ids": input_ids, "attention_mask": mask.long()}).cpu()
        return scores[: len(share)].tolist()

    return distributed.shared(accelerator, sequences, score)
