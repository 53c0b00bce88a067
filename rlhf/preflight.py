"""The checks that refuse a run that cannot be right, before it spends its time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf import InputError, chat
from rlhf.actor_critic import ActorCritic
from rlhf.records import Prompt
from rlhf.rollout import make_batch

log = logging.getLogger("rlhf")


def check_logits(actor_critic: ActorCritic, prompt_ids: list[int], tolerance: float) -> None:
    """Our log-probabilities of one prompt's own tokens against the model's own logits.

    They differ where a family does something after its head that `logits_function` does not know.
    """
    half = max(1, len(prompt_ids) // 2)
    if half == len(prompt_ids):
        return
    device = next(actor_critic.parameters()).device
    batch = make_batch([prompt_ids[:half]], [prompt_ids[half:]], 0, device)
    with torch.no_grad():
        ours = actor_critic(batch, 1.0, ("policy",)).logprobs[0]
        with actor_critic.active("policy") as policy:
            logits = policy(input_ids=batch.input_ids, use_cache=False).logits[0, half - 1 : -1].float()
    theirs = logits.log_softmax(-1).gather(-1, batch.targets[0][:, None]).squeeze(-1)
    worst = float((ours - theirs).abs().max())
    if worst > tolerance:
        raise InputError(
            f"preflight: log-probabilities differ from the model's own by {worst:.3g} nats (> {tolerance}); "
            "its family changes logits after the head in a way rlhf.actor_critic.logits_function doesn't know"
        )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_prompt_tokens: int, name: str
) -> tuple[list[Prompt], list[list[int]]]:
    """Prompts with their ids; over-long ones are left out, counted and named in the log, never cut."""
    kept: list[Prompt] = []
    ids: list[list[int]] = []
    long: list[tuple[int, Prompt]] = []
    for prompt in prompts:
        encoded = chat.encode_prompt(tokenizer, prompt.messages)
        if len(encoded) > max_prompt_tokens:
            long.append((len(encoded), prompt))
        else:
            kept.append(prompt)
            ids.append(encoded)
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


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Do both turn every conversation into the same ids?"""
    return one.get_vocab() == other.get_vocab() and chat.template_hash(one) == chat.template_hash(other)


def value_start(value_model: Any, functions: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """What the value model starts from: `value_model`, else the first reward model among `functions` that
    reads the policy's tokens, else None (the policy's trunk under a zero head)."""
    from rlhf.models import load_tokenizer

    if isinstance(value_model, torch.nn.Module):
        return value_model
    candidates = [value_model] if value_model is not None else list(functions)
    for candidate in candidates:
        if isinstance(candidate, str) or hasattr(candidate, "__fspath__"):
            theirs = load_tokenizer(candidate)
        elif hasattr(candidate, "normalizer") and hasattr(candidate, "tokenizer"):
            theirs = candidate.tokenizer
        else:
            continue
        if same_tokenizer(tokenizer, theirs):
            return candidate
        log.warning("the reward model reads other tokens than the policy: the value model starts from the policy")
    return None
