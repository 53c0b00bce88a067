"""A client of the scoring server: a reward function whose model runs in another process or on another machine.

    trainer = PPOTrainer(model, [RewardClient("http://127.0.0.1:8000")], ...)

Only the standard library is imported, and no text is encoded here: the server knows its model's tokenizer.
"""

from __future__ import annotations

import json
import sys

from reward_models.functions import Texts
from rlhf.caller import Caller
from rlhf.errors import RunStopped, short
from rlhf.rows.messages import Messages

LARGEST = sys.float_info.max


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
        """Return normalised scores. Further columns are not sent to the server."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; give one of each per score")
        if not prompts:
            return []
        asked = {"prompts": [_plain(p) for p in prompts], "completions": [_plain(c) for c in completions]}
        status, text = self.caller.ask("/score", asked, 65536 + 64 * len(completions))
        if status != 200:
            self.caller.refused(status, text)
        return self._scores(text, len(completions))

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


def _plain(text: str | Messages) -> str | Messages:
    """Return a prompt or completion without the further fields that a dataset may keep in its messages."""
    return text if isinstance(text, str) else [{"role": m["role"], "content": m["content"]} for m in text]
