"""A client of the scoring server: a reward function whose model runs in another process or on another machine.

    trainer = PPOTrainer(model, [RewardClient("http://127.0.0.1:8000")], ...)

Only the standard library is imported, and no text is encoded here: the server knows its model's tokenizer.
"""

from __future__ import annotations

import json
import sys

from reward_models.functions import Texts, talks_of
from rlhf.caller import Caller
from rlhf.errors import InputError, RunStopped, short
from rlhf.rows.messages import Messages

LARGEST = sys.float_info.max
REFUSED = "a scoring server does not take them; score with a local RewardModel, or leave them out"


class RewardClient:
    """A reward function (trl's signature) that asks `recipes/serve_reward_model.py` for scores.

    One call is one request. Its scores equal those of a local `RewardModel` to the last bit, unless the server joins
    the request with another one (see reward_models.server).

    url: http://host:port, with a path if the server is behind a proxy that adds one. The environment's proxy
        settings are not used, and a redirect is not followed.
    token: by default the environment's RLHF_SERVER_TOKEN.
    timeout: seconds that a call may take, from the first attempt to the answer's last byte.
    retries: further attempts, with growing pauses, after a failed connection or a full queue.

    A call raises InputError for what the server refuses (4xx), and RunStopped for a server that cannot be reached,
    is too slow, fails, or answers anything but one finite number per completion.
    """

    def __init__(
        self, url: str, token: str | None = None, timeout: float = 30.0, retries: int = 3, name: str = "reward_client"
    ) -> None:
        self.caller = Caller(url, token, timeout, retries, "a scoring server", "send fewer conversations")
        self.url = self.caller.url
        self.__name__ = name  # trainers log a reward function under this name

    def __call__(self, prompts: Texts, completions: Texts, **columns: object) -> list[float]:
        """Return normalised scores. columns: `scored_prompt` and `scored_prefix` change what is read (`talks_of`); the
        others are not sent. Raises InputError for tools and a chat template's settings, which the server cannot use."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; give one of each per score")
        if not prompts:
            return []
        for name in ("tools", "chat_template_kwargs"):
            values = columns.get(name)
            if isinstance(values, list | tuple) and any(values):
                raise InputError(f"{self.__name__}: column {name}: {REFUSED}")
        asked = {"conversations": [self._plain(talk) for talk in talks_of(prompts, completions, columns)]}
        status, text = self.caller.ask("/score", asked, 65536 + 64 * len(completions))
        if status != 200:
            self.caller.refused(status, text)
        return self._scores(text, len(completions))

    def _plain(self, talk: Messages) -> Messages:
        """Return a conversation without the further fields that a dataset may keep in its messages."""
        if any(message.get("tool_calls") for message in talk):
            raise InputError(f"{self.__name__}: messages with tool_calls: {REFUSED}")
        return [{"role": message["role"], "content": message["content"]} for message in talk]

    def _scores(self, text: str, count: int) -> list[float]:
        try:
            scores = json.loads(text)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RunStopped(f"{self.url}: no scores in the answer {self.caller.shown(text)!r}") from None
        if not isinstance(scores, list) or len(scores) != count:
            size = len(scores) if isinstance(scores, list) else f"{type(scores).__name__} instead of"
            raise RunStopped(f"{self.url}: {size} scores for {count} completions")
        for row, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, int | float) or not -LARGEST <= score <= LARGEST:
                raise RunStopped(f"{self.url}: score {row} is {short(repr(score))}; scores must be finite numbers")
        return [float(score) for score in scores]
