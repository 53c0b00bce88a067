"""A client of servers that speak OpenAI's HTTP: `rlhf serve_policy`, vLLM, llama.cpp, hosted models.

    client = Client("http://127.0.0.1:8000")
    [answer] = client.chat([{"role": "user", "content": "What is 2 + 2?"}], seed=1, max_tokens=64)
    print(answer.text, answer.finish_reason)

Only the standard library is imported.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.caller import Caller
from rlhf.errors import InputError, RunStopped, short, unknown

MOST_BYTES = 64 * 1024 * 1024
"""Bytes of one answer."""
LONGEST_LINE = 1024 * 1024
"""Bytes of one line of a streamed answer."""
FULL_SOFTMAX: dict[str, dict[str, float]] = {
    "vllm": {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
}
"""By a server's name for itself (`owned_by` of its models): what it would fill in by its own or a hub model's defaults
where a request leaves it out. Others refuse these fields (OpenAI, ours) or aren't known to read them."""

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Token:
    """A token of a completion and its log-probability in nats, as the server's distribution before temperature and
    top_p has it. `logprob` is None for the first token of an echoed prompt."""

    text: str
    logprob: float | None
    top: Mapping[str, float]
    """The likeliest tokens here with their log-probabilities, as many as were asked for."""


@dataclass(frozen=True)
class Completion:
    """One answer. `tokens` is empty unless log-probabilities were asked for; with echo, the prompt's come first. Our
    server tells the token that ends an answer, too, whose text is no part of `text`."""

    text: str
    finish_reason: str
    """stop, or length: it was cut at max_tokens."""
    tokens: tuple[Token, ...] = ()
    reasoning: str = ""
    """The thinking before the answer, where the server keeps it apart."""


class Client:
    """A server that speaks OpenAI's HTTP.

    base_url: http://host:port, with or without `/v1` at its end. token: by default the environment's RLHF_SERVER_TOKEN.
    model: the name to ask for; by default the server's only one. timeout: seconds that a call may take, from the first
    attempt to the answer's last byte. retries: further attempts, with growing pauses, after a failed connection or a
    full queue or a gateway's failure (429, 502 to 504). Sampling is by temperature and top_p alone; where vLLM or
    llama.cpp answers, that takes `models()` to be known (it is read where `model` is left out, and by `named`).

    A call raises InputError for what the server refuses (4xx), and RunStopped for a server that cannot be reached, is
    too slow, fails, or answers something else.
    """

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        model: str | None = None,
        timeout: float = 120.0,
        retries: int = 3,
    ) -> None:
        url = base_url.rstrip("/")
        remedy = "ask for fewer tokens or choices"
        self.caller = Caller(url.removesuffix("/v1"), token, timeout, retries, "a server of OpenAI's HTTP", remedy)
        self.url = self.caller.url
        self._model = model
        self.full_softmax: Mapping[str, float] = {}
        """Fields that each request needs besides temperature and top_p, as `FULL_SOFTMAX` has them."""

    @property
    def model(self) -> str:
        """Return the name of the model that is asked. Raises InputError where the server has several, and none was
        named."""
        if self._model is None:
            names = self.models()
            if len(names) != 1:
                raise InputError(f"{self.url}: serves {', '.join(map(short, names)) or 'no model'}; name one: model=")
            self._model = names[0]
        return self._model

    def named(self, model: str) -> Client:
        """Return a client of another model of the same server. Raises InputError where it has none of that name."""
        names = self.models()
        if model not in names:
            unknown(model, names, self.url, "model")
        timeout, retries = self.caller.timeout, self.caller.retries
        found = Client(self.url, self.caller.token, model, timeout, retries)
        found.full_softmax = self.full_softmax
        return found

    def models(self) -> list[str]:
        """Return the names of the server's models."""
        found = self.asked("/v1/models", None)
        rows = found.get("data")
        if not isinstance(rows, list) or not all(isinstance(r, dict) and isinstance(r.get("id"), str) for r in rows):
            raise RunStopped(f"{self.url}/v1/models: lists no models; is it a server of OpenAI's HTTP?")
        owners = {str(row.get("owned_by")) for row in rows}
        self.full_softmax = FULL_SOFTMAX.get(owners.pop(), {}) if len(owners) == 1 else {}
        return [row["id"] for row in rows]

    def chat(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        seed: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        top_logprobs: int = 0,
    ) -> list[Completion]:
        """Return `n` answers to a conversation.

        seed: makes the answers repeatable, where the server can; the choice of index i draws as a single one would with
        seed + i. max_tokens: by default the server's own limit. logprobs: also return each token's log-probability, and
        those of the `top_logprobs` likeliest.
        """
        asked = _sampling(n, seed, temperature, top_p, max_tokens, stop) | {"messages": [dict(m) for m in messages]}
        if logprobs or top_logprobs:
            asked |= {"logprobs": True, "top_logprobs": top_logprobs}
        found = self.asked("/v1/chat/completions", self._body(asked))
        return [self._chat_choice(choice, bool(logprobs or top_logprobs)) for choice in self._choices(found, n)]

    def stream(
        self,
        messages: Sequence[Message],
        *,
        seed: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Generator[str]:
        """Yield an answer's text piece by piece, as it is written. Closing the iterator cancels the answer."""
        asked = _sampling(1, seed, temperature, top_p, max_tokens, stop) | {"messages": [dict(m) for m in messages]}
        for event in self.events("/v1/chat/completions", self._body(asked | {"stream": True})):
            for choice in event.get("choices") or ():
                piece = (choice.get("delta") or {}).get("content") if isinstance(choice, dict) else None
                if isinstance(piece, str) and piece:
                    yield piece

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        n: int = 1,
        seed: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 16,
        stop: Sequence[str] = (),
        echo: bool = False,
        logprobs: int | None = None,
    ) -> list[Completion]:
        """Return `n` continuations of a text or of token ids, without a chat template.

        echo: the prompt comes first, in `text` and in `tokens`; with max_tokens=0 a prompt is only scored. logprobs:
        None, or how many of the likeliest tokens to return beside each token's own log-probability.
        """
        asked = _sampling(n, seed, temperature, top_p, max_tokens, stop)
        asked |= {"prompt": prompt if isinstance(prompt, str) else list(prompt), "echo": echo}
        if logprobs is not None:
            asked["logprobs"] = logprobs
        found = self.asked("/v1/completions", self._body(asked))
        return [self._text_choice(choice, logprobs is not None) for choice in self._choices(found, n)]

    def _body(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return a request's body; the model's name is read first, and with it what server this is."""
        return {"model": self.model, **self.full_softmax, **asked}

    # -- answers -----------------------------------------------------------------------------------------------

    def asked(self, path: str, body: object) -> dict[str, Any]:
        """Send JSON (None: a GET) and return the answer's object."""
        status, text = self.caller.ask(path, body, MOST_BYTES)
        if status != 200:
            self.caller.refused(status, text)
        return self._json(text)

    def events(self, path: str, body: object) -> Generator[dict[str, Any]]:
        """Send JSON that asks for a stream and yield the objects of its events. Closing the iterator hangs up."""
        with contextlib.closing(self.caller.lines(path, body, LONGEST_LINE)) as lines:
            for line in lines:
                kind, _, data = line.strip().partition(":")
                if kind != "data":  # a comment that keeps the connection open, or the empty line after an event
                    continue
                if data.strip() == "[DONE]":
                    return
                event = self._json(data)
                if "error" in event:
                    self.caller.refused(500, data)
                yield event
        raise RunStopped(f"{self.url}: the answer broke off")

    def _json(self, text: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise RunStopped(f"{self.url}: no JSON object in the answer {self.caller.shown(text)!r}")
        return found

    def _choices(self, found: dict[str, Any], n: int) -> list[dict[str, Any]]:
        choices = found.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise self._wrong("no choices")
        places = [choice.get("index", place) for place, choice in enumerate(choices)]
        if sorted(place for place in places if isinstance(place, int)) != list(range(n)) or len(places) != n:
            raise self._wrong(f"{len(choices)} choices instead of {n}")
        return [choice for _, choice in sorted(zip(places, choices, strict=True), key=lambda pair: pair[0])]

    def _chat_choice(self, choice: dict[str, Any], logprobs: bool) -> Completion:
        message = choice.get("message")
        if not isinstance(message, dict) or not isinstance(message.get("content") or "", str):
            raise self._wrong("a choice without a message")
        tokens: tuple[Token, ...] = ()
        if logprobs:
            rows = (choice.get("logprobs") or {}).get("content")
            if not isinstance(rows, list):
                raise self._wrong("a choice without log-probabilities")
            tokens = tuple(self._token(row) for row in rows)
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        return Completion(message.get("content") or "", str(choice.get("finish_reason") or ""), tokens, str(thought))

    def _token(self, row: Any) -> Token:
        if not isinstance(row, dict) or not isinstance(row.get("token"), str):
            raise self._wrong(f"{short(repr(row))} as a token")
        top = {}
        for other in row.get("top_logprobs") or ():
            likely = self._token({**other, "top_logprobs": None} if isinstance(other, dict) else other)
            top[likely.text] = likely.logprob or 0.0
        return Token(row["token"], self._logprob(row.get("logprob")), top)

    def _text_choice(self, choice: dict[str, Any], logprobs: bool) -> Completion:
        text, tokens = choice.get("text"), []
        if not isinstance(text, str):
            raise self._wrong("a choice without text")
        if logprobs:
            found = choice.get("logprobs")
            names = ("tokens", "token_logprobs", "top_logprobs")
            texts, values, tops = (found.get(name) if isinstance(found, dict) else None for name in names)
            if not isinstance(texts, list) or not isinstance(values, list) or len(texts) != len(values):
                raise self._wrong("a choice without log-probabilities")
            tops = tops or [None] * len(texts)
            for place, (token, value, top) in enumerate(zip(texts, values, tops, strict=False)):
                own = None if place == 0 and value is None else self._logprob(value)
                likely = {str(name): self._logprob(number) for name, number in (top or {}).items()}
                tokens.append(Token(str(token), own, likely))
        return Completion(text, str(choice.get("finish_reason") or ""), tuple(tokens))

    def _logprob(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value < 1e-3):
            raise self._wrong(f"{short(repr(value))} as a log-probability")
        return min(float(value), 0.0)

    def _wrong(self, what: str) -> RunStopped:
        return RunStopped(f"{self.url}: the answer has {what}; is it a server of OpenAI's HTTP?")


def _sampling(
    n: int, seed: int | None, temperature: float, top_p: float, max_tokens: int | None, stop: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of a request. Temperature and top_p are always among them: a server's own defaults may be a hub
    model's."""
    stops = [stop] if isinstance(stop, str) else list(stop)
    fields: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    further = {"n": n if n > 1 else None, "seed": seed, "max_tokens": max_tokens, "stop": stops or None}
    return fields | {name: value for name, value in further.items() if value is not None}
