"""What DPO and KTO learn from in `rlhf baseline`: rankings, and KTO's rows of its own, in trl's formats."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from reward_models.encoding import weight_of
from rlhf import chat
from rlhf.errors import InputError
from rlhf.rows.messages import Messages, check_prompt
from rlhf.rows.records import BadRows, Demonstration, Ranking
from rlhf_recipes.baseline_config import BaselineConfig

log = logging.getLogger("rlhf")

Judged = Ranking | Demonstration
"""What KTO learns from; DPO from rankings alone."""


def weighing(judged: Sequence[Judged]) -> list[Judged]:
    """Return the rows whose column `weight` is not 0; the others are counted. One warning says where rows have other
    weights that differ, or a ranking a `margin`: trl has neither. Raises InputError where no row remains."""
    weights = [weight_of(cast(Any, row), None, row.where or f"train_data: row {n}") for n, row in enumerate(judged, 1)]
    kept = [row for row, weight in zip(judged, weights, strict=True) if weight]
    if not kept:
        raise InputError(f"train_data: weight: all {len(judged)} rows weigh 0; nothing can be learnt")
    if len(kept) < len(judged):
        log.warning("train_data: %d of %d rows have weight 0: left out", len(judged) - len(kept), len(judged))
    unread = ["weight"] if len(set(weights) - {0.0}) > 1 else []
    unread += ["margin"] if any(isinstance(row, Ranking) and row.columns.get("margin") for row in kept) else []
    if unread:
        log.warning("train_data: %s: trl has none; all rows are trained alike", ", ".join(unread))
    return kept


def fitting(judged: Sequence[Judged], tokenizer: PreTrainedTokenizerBase, config: BaselineConfig) -> list[Any]:
    """Return the rows whose prompt fits max_length with each of their responses; the others are counted, as are those
    that the chat template refuses."""
    kept, refused, long = [], BadRows("train_data", config.on_bad_row), 0
    for row in judged:
        if isinstance(row, Demonstration):
            turns = [row.messages]
        else:
            turns = [[*row.prompt, *answer(text)] for text in row.responses]
        try:
            if isinstance(row, Demonstration):
                check_completion(row)
            encoded = [chat.encode_conversation(tokenizer, turn, len(turn) - 1, row.columns)[0] for turn in turns]
        except InputError as error:
            refused.add(row.where, error)
            continue
        long += max(map(len, encoded)) > config.max_length
        kept += [row] if max(map(len, encoded)) <= config.max_length else []
    refused.tell(len(kept) + long)
    if long:
        log.warning("train_data: %d of %d rows exceed max_length=%d: left out", long, len(judged), config.max_length)
    if not any(isinstance(row, Demonstration) or row.pairs() for row in kept):
        raise InputError(f"train_data: no pair fits max_length={config.max_length}; raise it")
    return kept


def check_completion(row: Demonstration) -> None:
    """Raise InputError where the last turn is not all that is trained, since trl's KTO trains whole completions, or
    where no prompt ends before it."""
    completion = row.messages[row.trained_from :]
    trained = [turn["role"] == "assistant" and chat.is_trained(turn) for turn in completion]
    if any(trained[:-1]) or not trained[-1]:
        seen = f"{sum(trained)} of {len(trained)} turns are trained"
        raise InputError(f"completion: {seen}; trl's KTO trains whole completions: end with one assistant turn")
    check_prompt(row.prompt, "prompt")


def pairs(rankings: Sequence[Ranking], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[dict[str, Any]]:
    """Return every pair of every ranking in trl's preference format; ties give none."""
    rows = []
    for one in rankings:
        given = [answer(text) for text in one.responses]
        for i, j in one.pairs():
            rows += [trl_row(tokenizer, one.prompt, one.columns, chosen=given[i], rejected=given[j])]
    return rows


def labelled(judged: Sequence[Judged], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[dict[str, Any]]:
    """Return every response that won more of its pairs than it lost, or lost more, and every row that has a label, in
    trl's unpaired format, shuffled: trl's KTO takes the rows in their order."""
    rows, balanced = [], 0
    for row in judged:
        if isinstance(row, Demonstration):
            completion = row.messages[-1:]  # `check_completion`: all that is trained
            label = {"label": row.columns["label"]}
            rows += [trl_row(tokenizer, row.prompt, row.columns, completion=completion) | label]
            continue
        won = [0] * len(row.responses)
        for i, j in row.pairs():
            won[i], won[j] = won[i] + 1, won[j] - 1
        balanced += won.count(0)
        rows += [
            trl_row(tokenizer, row.prompt, row.columns, completion=answer(text)) | {"label": balance > 0}
            for text, balance in zip(row.responses, won, strict=True)
            if balance
        ]
    if balanced:
        log.info("train_data: %d responses that won as many pairs as they lost have no label: left out", balanced)
    random.Random(seed).shuffle(rows)
    return rows


def answer(text: str) -> Messages:
    """Return a response as messages."""
    return [{"role": "assistant", "content": text}]


def trl_row(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, columns: dict[str, Any], **answers: Messages
) -> dict[str, Any]:
    """Return a prompt and its answers in trl's format, with the tools and the template's settings that hold for it."""
    turns, tools, settings = chat.template_arguments(tokenizer, prompt, columns)
    made = {name: chat.template_arguments(tokenizer, messages)[0] for name, messages in answers.items()}
    return {"prompt": turns, "tools": tools, "chat_template_kwargs": settings, **made}
