"""A served reward model as verl's custom reward function.

    reward.custom_reward_function.path=pkg://reward_models.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.url=http://127.0.0.1:8000

verl calls it once per response, from several threads; the server joins such requests. It hands over the response alone,
so the data's column `extra_info` must hold the prompt's messages: {"prompt": [{"role": "user", "content": ...}]}.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from reward_models.client import RewardClient
from rlhf.errors import InputError


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str,
    timeout: float = 180.0,
    **others: Any,
) -> float:
    """Return the served reward model's score of a response. url, timeout: from verl's reward_kwargs.

    Raises InputError where extra_info holds no prompt, and what `RewardClient` raises."""
    prompt = (extra_info or {}).get("prompt")
    if prompt is None or not len(prompt):
        raise InputError("extra_info: no prompt; write the prompt's messages into the column extra_info of verl's data")
    asked = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    return client(url, timeout)([asked], [solution_str])[0]


@cache
def client(url: str, timeout: float) -> RewardClient:
    """Return the one client of a server."""
    return RewardClient(url, timeout=timeout)
