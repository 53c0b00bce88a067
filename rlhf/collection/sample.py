"""Sample the candidates of items from policies: model folders with our own sampler, or servers of OpenAI's HTTP.

Every response has a seed of its own, a function of the run's seed, the policy's place among the policies, the prompt
and its number alone, so that it can be drawn again, in another folder, too; it is stored with the policy's fingerprint
and the sampler's settings.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rlhf.collection.incoming import FEWEST, MOST, comparable
from rlhf.collection.store import Candidate, Item
from rlhf.config import require_divides
from rlhf.errors import InputError
from rlhf.rows.fields import further_columns
from rlhf.rows.records import Prompt, prompt_key
from rlhf.urls import is_url

AT_ONCE = 8
"""Requests at a time to a server."""
LARGEST_SEED = 2**31
"""Of a request: not all servers take longer ones."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How candidates are drawn."""

    candidates_per_prompt: int
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64
    bf16: bool | None = None


def check_sampling(policies: Sequence[str], sampling: Sampling) -> None:
    """Raise InputError for settings that give no items the page could show."""
    count = sampling.candidates_per_prompt
    if not FEWEST <= count <= MOST:
        raise InputError(f"candidates_per_prompt={count}: the page ranks {FEWEST} to {MOST}")
    if not policies:
        raise InputError("policies: got none; name folders or addresses, as in --policies '[runs/my/sft]'")
    twice = next((name for n, name in enumerate(policies) if name in policies[:n]), None)
    if twice is not None:
        raise InputError(f"policies: {twice} is given twice; raise candidates_per_prompt instead")
    require_divides("policies", len(policies), "candidates_per_prompt", count)


def sample_items(prompts: Sequence[Prompt], policies: Sequence[str], sampling: Sampling, source: str) -> list[Item]:
    """Sample an item's candidates, as many of every policy, for each prompt.

    With several policies the candidates' order is drawn, so that it says nothing about who wrote which. Empty responses
    and repeated ones are left out (`comparable`). Raises InputError where nothing is left to compare."""
    check_sampling(policies, sampling)
    each = sampling.candidates_per_prompt // len(policies)
    drawn = [(_of_url if is_url(name) else _of_folder)(name, place, prompts, each, sampling)
             for place, name in enumerate(policies)]  # fmt: skip
    items = []
    for prompt, *of_policies in zip(prompts, *drawn, strict=True):
        candidates = [candidate for of_policy in of_policies for candidate in of_policy]
        if len(policies) > 1:
            random.Random(f"{sampling.seed}|{prompt_key(prompt.messages)}").shuffle(candidates)
        items.append(Item(list(prompt.messages), tuple(candidates), further_columns(prompt.columns), source))
    return comparable(items, source)


def seed_of(seed: int, place: int, prompt: Prompt, number: int, below: int) -> int:
    """Return the seed of one response."""
    text = f"{seed}|{place}|{prompt_key(prompt.messages)}|{number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % below


def _of_folder(
    policy: str, place: int, prompts: Sequence[Prompt], each: int, sampling: Sampling
) -> list[list[Candidate]]:
    from rlhf import chat, evaluate, policies
    from rlhf.models import loading
    from rlhf.models.positions import check_responses
    from rlhf.run.fingerprint import of_path
    from rlhf.run.precision import compute_dtype
    from rlhf.sampling.engine import RowGenerator, model_stop_ids

    tokenizer = loading.load_tokenizer(policy)
    model = policies.load(policy, compute_dtype(sampling.bf16))
    encoded = [chat.encode_prompt(tokenizer, prompt.messages, prompt.columns) for prompt in prompts]
    check_responses(model, encoded, sampling.max_new_tokens)
    stops = model_stop_ids(model, tokenizer)
    engine = policies.SharedEngine(model, stops, chat.pad_id(tokenizer), sampling.batch_size)
    seeds = [seed_of(sampling.seed, place, prompt, n, 2**62) for prompt in prompts for n in range(each)]
    samples = evaluate.sample_policy(
        prompts, tokenizer, engine, max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, n=each,
        generator=RowGenerator.of(seeds, sampling.seed, model.device),
    )  # fmt: skip
    fingerprint, settings = of_path(policy), _settings(sampling)
    made = [Candidate(text, policy, fingerprint, settings, seed)
            for text, seed in zip(samples.responses, seeds, strict=True)]  # fmt: skip
    return [made[start : start + each] for start in range(0, len(made), each)]


def _of_url(url: str, place: int, prompts: Sequence[Prompt], each: int, sampling: Sampling) -> list[list[Candidate]]:
    from rlhf.client import Client

    client = Client(url)
    settings = {**_settings(sampling), "model": client.model}

    def ask(prompt: Prompt) -> list[Candidate]:
        first = seed_of(sampling.seed, place, prompt, 0, LARGEST_SEED - each)
        answers = client.chat(
            prompt.messages, n=each, seed=first, temperature=sampling.temperature, max_tokens=sampling.max_new_tokens
        )
        # the choice of index n draws as a single one would with the seed first + n
        return [Candidate(answer.text, url, "", settings, first + n) for n, answer in enumerate(answers)]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, prompts))


def _settings(sampling: Sampling) -> dict[str, Any]:
    return {"temperature": sampling.temperature, "top_p": 1.0, "max_new_tokens": sampling.max_new_tokens}
