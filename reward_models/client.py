"""A client of the scoring server: a reward function whose model runs in another process or on another machine.

    trainer = PPOTrainer(model, [RewardClient("http://127.0.0.1:8000")], ...)

Only the standard library is imported, and no text is encoded here: the server knows its model's tokenizer.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import random
import time
from urllib.parse import urlsplit

from reward_models.functions import Texts
from rlhf.errors import InputError, RunStopped, short
from rlhf.messages import Messages

TOKEN_VARIABLE = "RLHF_SERVER_TOKEN"
LONGEST_PAUSE = 8.0  # seconds between two attempts


class RewardClient:
    """A reward function (trl's signature) that asks `recipes/serve_reward_model.py` for scores.

    One call is one request. Its scores equal those of a local `RewardModel` to the last bit, unless the server joins
    the request with another one (see reward_models.server).

    url: http://host:port, with a path if the server is behind a proxy that adds one. The environment's proxy
        settings are not used.
    token: by default the environment's RLHF_SERVER_TOKEN.
    timeout: seconds that the server may be silent; a request that timed out is not sent again.
    retries: further attempts, with growing pauses, after a failed connection or a full queue (503).

    A call raises InputError for what the server refuses (4xx), and RunStopped for a server that cannot be reached,
    is too slow, fails, or answers anything but one finite number per completion.
    """

    def __init__(
        self, url: str, token: str | None = None, timeout: float = 30.0, retries: int = 3, name: str = "reward_client"
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url={url!r}: write http://host:port, as the server prints it")
        if timeout <= 0 or retries < 0:
            raise InputError(f"timeout={timeout} must be above 0, and retries={retries} 0 or more")
        try:
            self._port = parts.port
        except ValueError as error:
            raise InputError(f"url={url!r}: {error}; write http://host:port") from None
        self._secure, self._host, self._path = parts.scheme == "https", parts.hostname, parts.path.rstrip("/")
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self._token = token if token is not None else os.environ.get(TOKEN_VARIABLE)
        self._random = random.Random()  # not the global generator, on which the run's results may depend
        self.__name__ = name  # trainers log a reward function under this name

    def __call__(self, prompts: Texts, completions: Texts, **columns: object) -> list[float]:
        """Return normalised scores. Further columns are not sent to the server."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; give one of each per score")
        if not prompts:
            return []
        asked = {"prompts": [_plain(p) for p in prompts], "completions": [_plain(c) for c in completions]}
        status, text = self._ask(json.dumps(asked).encode())
        if status != 200:
            self._refused(status, text)
        return self._scores(text, len(completions))

    def _ask(self, body: bytes) -> tuple[int, str]:
        """Return status and text of the answer, trying up to `retries` + 1 times."""
        for attempt in range(self.retries + 1):
            last, wait = attempt == self.retries, 0.0
            try:
                status, text, wait = self._attempt(body)
                if status != 503 or last:
                    return status, text
            except (OSError, http.client.HTTPException) as error:
                if last:
                    what = f"{type(error).__name__}: {error}".removesuffix(": ")
                    raise RunStopped(
                        f"{self.url}: no answer in {self.retries + 1} attempts ({short(what, 300)}); is the server up? "
                        f"{self.url}/health tells"
                    ) from error
            pause = min(0.1 * 2**attempt, LONGEST_PAUSE) * self._random.uniform(0.5, 1.5)
            time.sleep(pause + min(wait, LONGEST_PAUSE))
        raise AssertionError("unreachable")

    def _attempt(self, body: bytes) -> tuple[int, str, float]:
        """Send one request; return status, text and Retry-After (seconds).

        Raises RunStopped on a time-out while the server works; the request is not tried again.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.connect()
            try:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused early: read the answer
                    connection.request("POST", f"{self._path}/score", body, headers)
                response = connection.getresponse()
                text = response.read().decode("utf-8", "replace")
            except TimeoutError as error:
                raise RunStopped(
                    f"{self.url}: silent for timeout={self.timeout:g} seconds; raise it, or send fewer conversations"
                ) from error
            return response.status, text, _seconds(response.getheader("Retry-After"))
        finally:
            connection.close()

    def _refused(self, status: int, text: str) -> None:
        try:
            reason = json.loads(text)["error"]
        except (ValueError, KeyError, TypeError):
            reason = text
        message = f"{self.url}: {status}: {short(str(reason), 300) or http.client.responses.get(status, 'no reason')}"
        if status == 401:
            raise InputError(f"{message}; set {TOKEN_VARIABLE} to the server's token")
        if 400 <= status < 500:
            raise InputError(message)
        raise RunStopped(message)

    def _scores(self, text: str, count: int) -> list[float]:
        try:
            scores = json.loads(text)["scores"]
        except (ValueError, KeyError, TypeError):
            raise RunStopped(f"{self.url}: no scores in the answer {short(text, 80)!r}") from None
        if not isinstance(scores, list) or len(scores) != count:
            size = len(scores) if isinstance(scores, list) else f"{type(scores).__name__} instead of"
            raise RunStopped(f"{self.url}: {size} scores for {count} completions")
        for row, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise RunStopped(f"{self.url}: score {row} is {score!r}; scores must be finite numbers")
        return [float(score) for score in scores]


def _plain(text: str | Messages) -> str | Messages:
    """Return a prompt or completion without the further fields that a dataset may keep in its messages."""
    return text if isinstance(text, str) else [{"role": m["role"], "content": m["content"]} for m in text]


def _seconds(header: str | None) -> float:
    return float(header) if header and header.isdecimal() else 0.0
