"""A client of the scoring server: a reward function whose model runs in another process or on another machine.

    trainer = PPOTrainer(model, [RewardClient("http://127.0.0.1:8000")], ...)

Only the standard library is imported, and no text is encoded here: the server knows its model's tokenizer.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import socket
import sys
import time
from typing import Any

from reward_models.functions import Texts
from rlhf.errors import InputError, RunStopped, short
from rlhf.rows.messages import Messages
from rlhf.run.http import TOKEN_VARIABLE, checked_token
from rlhf.urls import http_address

LONGEST_PAUSE = 8.0  # seconds between two attempts
PIECE = 65536  # bytes
LARGEST = sys.float_info.max


class RewardClient:
    """A reward function (trl's signature) that asks `recipes/serve_reward_model.py` for scores.

    One call is one request. Its scores equal those of a local `RewardModel` to the last bit, unless the server joins
    the request with another one (see reward_models.server).

    url: http://host:port, with a path if the server is behind a proxy that adds one. The environment's proxy
        settings are not used, and a redirect is not followed.
    token: by default the environment's RLHF_SERVER_TOKEN.
    timeout: seconds that a call may take, from the first attempt to the answer's last byte.
    retries: further attempts, with growing pauses, after a failed connection or a full queue (503).

    A call raises InputError for what the server refuses (4xx), and RunStopped for a server that cannot be reached,
    is too slow, fails, or answers anything but one finite number per completion.
    """

    def __init__(
        self, url: str, token: str | None = None, timeout: float = 30.0, retries: int = 3, name: str = "reward_client"
    ) -> None:
        self._secure, self._host, self._port, self._path = http_address(url, "url")
        if timeout <= 0 or retries < 0:
            raise InputError(f"timeout={timeout} must be above 0, and retries={retries} 0 or more")
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        where, given = ("token", token) if token is not None else (TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE))
        self._token = checked_token(given, where) if given else None
        self._random = random.Random()  # not the global generator, on which the run's results may depend
        self.__name__ = name  # trainers log a reward function under this name

    def __call__(self, prompts: Texts, completions: Texts, **columns: object) -> list[float]:
        """Return normalised scores. Further columns are not sent to the server."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; give one of each per score")
        if not prompts:
            return []
        asked = {"prompts": [_plain(p) for p in prompts], "completions": [_plain(c) for c in completions]}
        status, text = self._ask(json.dumps(asked).encode(), 65536 + 64 * len(completions))
        if status != 200:
            self._refused(status, text)
        return self._scores(text, len(completions))

    def _ask(self, body: bytes, most: int) -> tuple[int, str]:
        """Return status and text of the answer, of at most `most` bytes, trying up to `retries` + 1 times."""
        until = time.monotonic() + self.timeout
        for attempt in range(self.retries + 1):
            pause, wait, refused = min(0.1 * 2**attempt, LONGEST_PAUSE) * self._random.uniform(0.5, 1.5), 0.0, None
            try:
                status, text, wait = self._attempt(body, most, until)
                if status != 503:
                    return status, text
                refused = status, text
            except (OSError, http.client.HTTPException) as error:
                what = f"{type(error).__name__}: {error}".removesuffix(": ")
            pause += min(wait, LONGEST_PAUSE)
            if attempt == self.retries or time.monotonic() + pause > until:
                if refused:
                    return refused
                what = short(self._without_token(what), 300)
                raise RunStopped(
                    f"{self.url}: no answer in {attempt + 1} attempts ({what}); is the server up? "
                    f"{self.url}/health tells"
                )
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _attempt(self, body: bytes, most: int, until: float) -> tuple[int, str, float]:
        """Send one request; return status, text and Retry-After (seconds).

        Raises RunStopped where the time is up while the server works, and for an answer that is too large: the request
        is not tried again.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=max(until - time.monotonic(), 0.001))
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        connection.connect()
        timed: Any = _TimedSocket(connection.sock, until)
        connection.sock = timed
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused early: read the answer
                connection.request("POST", f"{self._path}/score", body, headers)
            response = connection.getresponse()
            text = response.read(most + 1)
        except TimeoutError as error:
            heard = "no whole answer within" if timed.heard else "silent for"
            raise RunStopped(
                f"{self.url}: {heard} timeout={self.timeout:g} seconds; raise it, or send fewer conversations"
            ) from error
        finally:
            timed.sock.close()
        if len(text) > most:
            raise RunStopped(f"{self.url}: the answer has more than {most} bytes; is it a scoring server?")
        if response.length:  # cut short
            raise http.client.IncompleteRead(text, response.length)
        return response.status, text.decode("utf-8", "replace"), _seconds(response.getheader("Retry-After"))

    def _without_token(self, text: str) -> str:
        """Return a server's text without the token, which it may send back."""
        return text.replace(self._token, "***") if self._token else text

    def _refused(self, status: int, text: str) -> None:
        try:
            reason = json.loads(text)["error"]
        except (ValueError, KeyError, TypeError, RecursionError):
            reason = text
        reason = short(self._without_token(str(reason)), 300)
        message = f"{self.url}: {status}: {reason or http.client.responses.get(status, 'no reason')}"
        if status == 401:
            raise InputError(f"{message}; set {TOKEN_VARIABLE} to the server's token")
        if 400 <= status < 500:
            raise InputError(message)
        if 300 <= status < 400:
            raise InputError(f"{message}; texts and token go to this address only, no redirect is followed: correct it")
        raise RunStopped(message)

    def _scores(self, text: str, count: int) -> list[float]:
        try:
            scores = json.loads(text)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = short(self._without_token(text), 80)
            raise RunStopped(f"{self.url}: no scores in the answer {text!r}") from None
        if not isinstance(scores, list) or len(scores) != count:
            size = len(scores) if isinstance(scores, list) else f"{type(scores).__name__} instead of"
            raise RunStopped(f"{self.url}: {size} scores for {count} completions")
        for row, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, int | float) or not -LARGEST <= score <= LARGEST:
                raise RunStopped(f"{self.url}: score {row} is {short(repr(score))}; scores must be finite numbers")
        return [float(score) for score in scores]


class _TimedSocket:
    """A socket that http.client uses until a time only, however slowly the other side sends bytes or takes them."""

    def __init__(self, sock: socket.socket, until: float) -> None:
        self.sock, self.until = sock, until
        self.heard = False
        """Whether the other side has sent anything."""

    def wait(self) -> None:
        """Let the next operation take the time that is left. Raises TimeoutError if there is none."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)

    def sendall(self, data: bytes) -> None:
        """Send all of the data, in pieces."""
        for start in range(0, len(data), PIECE):
            self.wait()
            self.sock.sendall(data[start : start + PIECE])

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return a file that reads from the socket."""
        return io.BufferedReader(_Received(self))

    def close(self) -> None:
        """Do nothing: http.client closes before it has read an answer; its caller closes `sock`."""


class _Received(io.RawIOBase):
    """What a socket receives."""

    def __init__(self, timed: _TimedSocket) -> None:
        self.timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.timed.wait()
        count = self.timed.sock.recv_into(buffer)
        self.timed.heard |= count > 0
        return count


def _plain(text: str | Messages) -> str | Messages:
    """Return a prompt or completion without the further fields that a dataset may keep in its messages."""
    return text if isinstance(text, str) else [{"role": m["role"], "content": m["content"]} for m in text]


def _seconds(header: str | None) -> float:
    return float(header) if header and header.isdecimal() else 0.0
