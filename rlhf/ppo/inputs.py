"""Preparation of `PPOTrainer`'s arguments: the tokenizer, the prompts, and the start of the value model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf import chat
from rlhf.calls import function_name
from rlhf.errors import InputError
from rlhf.models.loading import load_tokenizer, needs_new_pad
from rlhf.models.positions import check_responses
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.protocol import Trainer
from rlhf.rows.records import HELD_OUT, BadRows, OnBadRow, Prompt, check_disjoint, read_prompts
from rlhf.scores import RewardFunction, check_columns

log = logging.getLogger("rlhf")


def prompts_of(
    name: str, dataset: Any, tokenizer: PreTrainedTokenizerBase, args: PPOConfig, on_bad_row: OnBadRow = "refuse"
) -> tuple[list[Prompt], list[list[int]]]:
    """Read a dataset's prompts and encode them; too long ones are left out, counted and named in the log, never cut.

    name: "train_dataset" or "eval_dataset"; only the first is required. on_bad_row: what becomes of rows that can't be
    read or that the chat template refuses. Raises InputError if the dataset is missing or no prompt is left.
    """
    if dataset is None and name == "eval_dataset":
        return [], []
    if dataset is None:
        raise InputError(f"{name} is missing; pass prompts: a path, a datasets.Dataset or a list of rows")
    split = "train" if name == "train_dataset" else HELD_OUT
    prompts, max_prompt_tokens = read_prompts(dataset, split, on_bad_row), args.max_prompt_tokens
    refused = BadRows(name, on_bad_row)
    kept: list[Prompt] = []
    ids: list[list[int]] = []
    long: list[tuple[int, Prompt]] = []
    for prompt in prompts:
        try:
            encoded = chat.encode_prompt(tokenizer, prompt.messages, prompt.columns)
        except InputError as error:
            refused.add(prompt.where, error)
            continue
        if len(encoded) > max_prompt_tokens:
            long.append((len(encoded), prompt))
        else:
            kept.append(prompt)
            ids.append(encoded)
    refused.tell(len(kept) + len(long))
    if not kept:
        raise InputError(
            f"{name}: all {len(long)} prompts are longer than max_prompt_tokens={max_prompt_tokens} "
            f"(shortest: {min(n for n, _ in long)} tokens); raise it"
        )
    if long:
        shown = "; ".join(f"{p.messages[-1]['content'][:40]!r} ({n} tokens)" for n, p in long[:3])
        log.warning(
            "%s: %d of %d prompts longer than max_prompt_tokens=%d left out: %s%s",
            name, len(long), len(prompts), max_prompt_tokens, shown, " ..." if len(long) > 3 else "",
        )  # fmt: skip
    return kept, ids


def check_prompts(functions: Sequence[RewardFunction], train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Raise InputError where a dataset lacks a column that a function requires; warn of prompts in both datasets.

    Those are no error, unlike in SFT: PPO learns from scores, not from the rows' own answers."""
    check_columns(functions, train, "train_dataset")
    if held_out:
        check_columns(functions, held_out, "eval_dataset")
        try:
            check_disjoint(train, held_out, ("train_dataset", "eval_dataset"))
        except InputError as error:
            log.warning("%s", error)


def check_positions(trainer: Trainer) -> None:
    """Raise InputError where one of the models, reward models that read the policy's tokens among them, lacks
    positions: a run would fail, or go on with garbage, as soon as a response gets that long."""
    prompt_ids, models = trainer.prompt_ids + trainer.eval_prompt_ids, trainer.actor_critic
    longest = trainer.args.max_new_tokens
    for role, model in (("policy", models.policy), ("reference", models.reference), ("value model", models.value)):
        if model is not None:
            check_responses(model, prompt_ids, longest, role)
    prompts = zip(trainer.prompts + trainer.eval_prompts, prompt_ids, strict=True)
    own = [ids for prompt, ids in prompts if prompt.columns.get("scored_prompt") is None]  # else another one is read
    for function in trainer.reward_funcs:
        for scorer in getattr(function, "members", [function]):  # an ensemble's
            behind = _read_behind(scorer)
            if behind is not None and same_tokenizer(trainer.processing_class, scorer.tokenizer):
                check_responses(scorer.model, own, longest, function_name(scorer), behind)


def _read_behind(scorer: Any) -> int | None:
    """Return how many tokens a reward, process or outcome model, known by its attributes, reads behind a response: the
    end of turn, or, up to the last step, none. None for another function."""
    if all(hasattr(scorer, name) for name in ("model", "tokenizer", "normalizer")):
        return 1
    return {"process": 0, "outcome": 1}.get(getattr(getattr(scorer, "about", None), "kind", ""))


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Return whether both tokenizers turn every conversation into the same ids: same vocabulary, same template."""
    return one.get_vocab() == other.get_vocab() and chat.template_hash(one) == chat.template_hash(other)


def value_start(value_model: Any, functions: Sequence[Any], tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> Any:
    """Choose the model that the value model starts from: `value_model`, else the first reward model among `functions`
    (of an ensemble, its first member) whose tokenizer is the policy's, else None (the policy's trunk with a zero
    head)."""
    if args.value_model == "shared_trunk":
        return value_model  # its head starts from zero: `build` refuses a value_model
    if isinstance(value_model, torch.nn.Module):
        return value_model
    candidates = [value_model] if value_model is not None else list(functions)
    for given in candidates:
        candidate = getattr(given, "members", [given])[0]  # of an ensemble, the first
        if isinstance(candidate, str) or hasattr(candidate, "__fspath__"):
            other = load_tokenizer(candidate)
        elif hasattr(candidate, "normalizer") and hasattr(candidate, "tokenizer"):
            other = candidate.tokenizer
        else:
            continue
        if same_tokenizer(tokenizer, other):
            return candidate
        log.warning("the reward model reads other tokens than the policy: the value model starts from the policy")
    return None


def policy_tokenizer(model: Any, given: PreTrainedTokenizerBase | None, args: PPOConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer passed, else the one in the policy's folder, with the run's chat_template_kwargs.

    Raises InputError if the passed one lacks chat tokens, since the policy never learned them."""
    if given is None:
        if not isinstance(model, str | Path):
            raise InputError("processing_class is missing; with a model object, pass its tokenizer")
        given = load_tokenizer(model)
    elif not needs_new_pad(given):  # any id can pad
        added = chat.prepare_tokenizer(given)
        if added:
            raise InputError(
                f"processing_class: the policy never learned the chat tokens {added}; fine-tune it with SFTTrainer "
                "first"
            )
    chat.set_template_kwargs(given, args.chat_template_kwargs)
    return given
