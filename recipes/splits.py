"""What a reward model's stage trains on, measures on and chooses by: no prompt is in two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

from rlhf.rows.records import HELD_OUT, Record, check_disjoint, split_by_prompt


@dataclass(frozen=True)
class Splits(Generic[Record]):
    """Records in two or three parts."""

    train: list[Record]
    held_out: list[Record]
    selection: list[Record] | None
    """What the best weights are chosen by; None where nothing is chosen."""


def read_splits(config: Any, read: Callable[..., list[Record]], chooses: bool) -> Splits[Record]:
    """Read a stage's train_data, eval_data and selection_data; without a file, a tenth of the prompts is set aside.

    read: called with a source, the name of its split and on_bad_row. chooses: whether a selection is needed. Raises
    InputError where a prompt is in two files."""
    train, selection = read(config.train_data, "train", config.on_bad_row), None
    if config.eval_data:
        held_out = read(config.eval_data, HELD_OUT, config.on_bad_row)
        check_disjoint(train, held_out, ("train_data", "eval_data"))
    else:
        train, held_out = split_by_prompt(train, 0.1, config.seed)
    if config.selection_data:
        selection = read(config.selection_data, HELD_OUT, config.on_bad_row)
        check_disjoint(train, selection, ("train_data", "selection_data"))
        check_disjoint(held_out, selection, ("eval_data", "selection_data"))
    elif chooses:
        train, selection = split_by_prompt(train, 0.1, config.seed + 1)
    return Splits(train, held_out, selection)
