"""Send JSON to an HTTP server, within one deadline: attempts, pauses and the answer's last byte.

Only the standard library is imported. The environment's proxy settings are not used, and a redirect is not followed.
`rlhf.client` asks servers that speak OpenAI's HTTP, `reward_models.client` the scoring server.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import socket
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

from rlhf.errors import InputError, RunStopped, short
from rlhf.run.http import TOKEN_VARIABLE, checked_token
from rlhf.urls import http_address

LONGEST_PAUSE = 8.0  # seconds between two attempts
PIECE = 65536  # bytes
BUSY = (429, 502, 503, 504)
"""The statuses of a server that asks to come again, or that what stands before it did not reach."""

Content = TypeVar("Content")


class Answer(NamedTuple):
    """A server's answer."""

    status: int
    text: str


class Caller:
    """One server, as its client sees it.

    token: by default the environment's RLHF_SERVER_TOKEN. timeout: seconds that a call may take in all. retries:
    further attempts, with growing pauses, after a failed connection, a full queue or a gateway's failure (`BUSY`).
    kind: what is expected there, and `remedy`, what helps where an answer takes too long: both for errors.
    """

    def __init__(self, url: str, token: str | None, timeout: float, retries: int, kind: str, remedy: str) -> None:
        self._secure, self._host, self._port, self._path = http_address(url, "url")
        if timeout <= 0 or retries < 0:
            raise InputError(f"timeout={timeout} must be above 0, and retries={retries} 0 or more")
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.kind, self.remedy = kind, remedy
        where, given = ("token", token) if token is not None else (TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE))
        self.token = checked_token(given, where) if given else None
        self._random = random.Random()  # not the global generator, on which a run's results may depend

    def ask(self, path: str, body: object, most: int) -> Answer:
        """Send `body` as JSON (None: a GET) and return the answer, of at most `most` bytes.

        Raises RunStopped for a server that cannot be reached, is too slow or answers too much."""

        def attempt(until: float) -> tuple[int, str, float]:
            with self._opened(path, body, until) as response:
                text = self._read(response, most)
                return response.status, text, _seconds(response.getheader("Retry-After"))

        return Answer(*self._attempts(attempt))

    def lines(self, path: str, body: object, longest: int) -> Generator[str]:
        """Send `body` as JSON and yield the answer's lines as they arrive, each of at most `longest` bytes.

        Closing the iterator hangs up. Raises as `ask` does, and as `refused` for another status than 200."""
        with contextlib.ExitStack() as stack:

            def attempt(until: float) -> tuple[int, http.client.HTTPResponse | str, float]:
                with contextlib.ExitStack() as opening:
                    response = opening.enter_context(self._opened(path, body, until))
                    if response.status != 200:
                        text = self._read(response, PIECE)
                        return response.status, text, _seconds(response.getheader("Retry-After"))
                    stack.enter_context(opening.pop_all())
                    return response.status, response, 0.0

            status, answer = self._attempts(attempt)
            if isinstance(answer, str):
                self.refused(status, answer)
            while line := self._line(answer, longest):
                yield line

    def _line(self, response: http.client.HTTPResponse, longest: int) -> str:
        try:
            line = response.readline(longest + 1)
        except TimeoutError:
            raise  # `_opened` says how long it took
        except (OSError, http.client.HTTPException) as error:
            raise RunStopped(f"{self.url}: the answer broke off ({self.shown(_named(error))})") from None
        if len(line) > longest:
            raise RunStopped(f"{self.url}: a line of the answer has more than {longest} bytes; is it {self.kind}?")
        return line.decode("utf-8", "replace")

    def _attempts(self, attempt: Callable[[float], tuple[int, Content, float]]) -> tuple[int, Content]:
        """Call `attempt` with the deadline, up to `retries` + 1 times; it returns status, content and Retry-After."""
        until = time.monotonic() + self.timeout
        for number in range(self.retries + 1):
            pause, wait = min(0.1 * 2**number, LONGEST_PAUSE) * self._random.uniform(0.5, 1.5), 0.0
            refused: tuple[int, Content] | None = None
            try:
                status, content, wait = attempt(until)
                refused = status, content
                if status not in BUSY:
                    return refused
            except (OSError, http.client.HTTPException) as error:
                what = _named(error)
            pause += min(wait, LONGEST_PAUSE)
            if number == self.retries or time.monotonic() + pause > until:
                if refused:
                    return refused
                raise RunStopped(
                    f"{self.url}: no answer in {number + 1} attempts ({self.shown(what, 300)}); is the server up? "
                    f"{self.url}/health tells"
                )
            time.sleep(pause)
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _opened(self, path: str, body: object, until: float) -> Iterator[http.client.HTTPResponse]:
        """Send one request and yield the response, to be read until the deadline.

        Raises RunStopped where the time is up while the server works: the request is not tried again."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=max(until - time.monotonic(), 0.001))
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        connection.connect()
        timed: Any = _TimedSocket(connection.sock, until)
        connection.sock = timed
        sent, method = (None, "GET") if body is None else (json.dumps(body).encode(), "POST")
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused early: read the answer
                connection.request(method, f"{self._path}{path}", sent, headers)
            yield connection.getresponse()
        except TimeoutError as error:
            heard = "no whole answer within" if timed.heard else "silent for"
            raise RunStopped(f"{self.url}: {heard} {self._limit()}") from error
        finally:
            timed.sock.close()

    def _read(self, response: http.client.HTTPResponse, most: int) -> str:
        text = response.read(most + 1)
        if len(text) > most:
            raise RunStopped(f"{self.url}: the answer has more than {most} bytes; is it {self.kind}?")
        if response.length:  # cut short
            raise http.client.IncompleteRead(text, response.length)
        return text.decode("utf-8", "replace")

    def _limit(self) -> str:
        return f"timeout={self.timeout:g} seconds; raise it, or {self.remedy}"

    def shown(self, text: str, limit: int = 80) -> str:
        """Return a server's text for an error: one line, without the token, which it may send back."""
        return short(text.replace(self.token, "***") if self.token else text, limit)

    def refused(self, status: int, text: str) -> NoReturn:
        """Raise InputError for what the server refuses (4xx), RunStopped for a server that fails or is busy."""
        message = f"{self.url}: {status}: {self.shown(reason_of(text), 300) or _reason(status)}"
        if status == 401:
            raise InputError(f"{message}; set {TOKEN_VARIABLE} to the server's token")
        if status in BUSY or not 300 <= status < 500:
            raise RunStopped(message)
        if status < 400:
            raise InputError(f"{message}; texts and token go to this address only, no redirect is followed: correct it")
        raise InputError(message)


def reason_of(text: str) -> str:
    """Return why a server refused: the line under `error` (ours), its `message` (OpenAI's), or the whole text."""
    try:
        reason: Any = json.loads(text)["error"]
        return str(reason["message"] if isinstance(reason, dict) else reason)
    except (ValueError, KeyError, TypeError, RecursionError):
        return text


def _reason(status: int) -> str:
    return http.client.responses.get(status, "no reason")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _seconds(header: str | None) -> float:
    return float(header) if header and header.isdecimal() else 0.0


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
        """Do nothing: http.client closes before it has read an answer; `Caller` closes `sock`."""


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
