"""Encode demonstrations as token ids with labels, and as padded batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.positions import Positions
from rlhf.padding import IGNORED, pad
from rlhf.rows.records import BadRows, Demonstration, OnBadRow

logger = logging.getLogger("rlhf")


class EncodedDemonstration(TypedDict):
    """A conversation as token ids, and a label for each: IGNORED where there is no loss."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Collator:
    """Collates rows into right-padded ``input_ids``, ``attention_mask`` and ``labels [B, T]`` (-100: no loss)."""

    pad_id: int

    def __call__(self, rows: Sequence[EncodedDemonstration]) -> dict[str, Tensor]:
        input_ids, mask = pad([row["input_ids"] for row in rows], self.pad_id)
        labels, _ = pad([row["labels"] for row in rows], IGNORED)
        return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}


def is_accepted(tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration) -> bool:
    """Return whether the chat template accepts a demonstration."""
    try:
        chat.encode_demonstration(tokenizer, demonstration.messages, demonstration.trained_from, demonstration.columns)
    except InputError:
        return False
    return True


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    max_length: int,
    name: str,
    on_bad_row: OnBadRow = "refuse",
    positions: Positions | None = None,
) -> Dataset:
    """Encode demonstrations as columns ``input_ids`` and ``labels`` (-100 outside what the assistant writes itself).

    Left out, counted and named in the log are demonstrations of more than ``max_length`` tokens, since a cut one would
    teach never to stop, and those whose turns all say ``train: False``. on_bad_row: what becomes of those that the chat
    template refuses. Raises InputError when none remains, or one that remains is longer than `positions`.
    """
    rows: list[EncodedDemonstration] = []
    too_long: dict[int, int] = {}
    untrained = []
    refused = BadRows(name, on_bad_row)
    for index, demonstration in enumerate(demonstrations):
        try:
            ids, mask = chat.encode_demonstration(
                tokenizer, demonstration.messages, demonstration.trained_from, demonstration.columns
            )
        except InputError as error:
            refused.add(demonstration.where, error)
            continue
        if len(ids) > max_length:
            too_long[index] = len(ids)
        elif not any(mask):
            untrained.append(index)
        else:
            if positions is not None:
                what, remedy = f"{name}: demonstration {index + 1} has", f"max_length={positions.limit} leaves such out"
                positions.check(len(ids), what, remedy)
            rows.append({"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]})
    refused.tell(len(rows) + len(too_long) + len(untrained))
    if not rows:
        if untrained:
            raise InputError(f"{name}: no turn is trained (train, weight); let the answers be trained")
        if not too_long:
            raise InputError(f"{name}: no demonstrations; give at least one")
        raise InputError(
            f"{name}: none of {len(demonstrations)} demonstrations fits max_length={max_length}; the shortest has "
            f"{min(too_long.values())} tokens: raise max_length or shorten them"
        )
    if too_long:
        named = ", ".join(str(index + 1) for index in list(too_long)[:10])
        logger.warning(
            f"{name}: {len(too_long)} of {len(demonstrations)} demonstrations are longer than "
            f"max_length={max_length} tokens and left out; the longest has {max(too_long.values())}; "
            f"demonstrations {named}{', ...' if len(too_long) > 10 else ''} (counted from 1)"
        )
    if untrained:
        numbers = ", ".join(str(index + 1) for index in untrained[:10])
        logger.warning(
            f"{name}: left out {len(untrained)} of {len(demonstrations)} demonstrations without a trained turn "
            f"(train, weight): {numbers}{', ...' if len(untrained) > 10 else ''}"
        )
    return Dataset.from_list(rows)
