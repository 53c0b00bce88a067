"""OpenAI's HTTP: requests as typed records, read from JSON, and answers written as JSON.

A field that this server does not know is refused by its name; one that OpenAI has and this server lacks passes as long
as it asks for nothing (null, a penalty of 0). `rlhf.serving.pieces` are what answers are made of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from rlhf.errors import InputError, short
from rlhf.rows.messages import Messages, as_messages, check_prompt
from rlhf.run.http import Refused

MOST_CHOICES = 256
"""Answers in one request: its prompts times n."""
MOST_LOGPROBS = 20
MOST_STOPS = 16
LOWEST_TEMPERATURE = 0.001
"""The lowest above 0."""

Value = TypeVar("Value")


class Wrong(Refused):
    """A refused request: its status, one line, and the field that is at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(status, message)
        self.param = param


KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Write a refusal as OpenAI does."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


# ---------------------------------------------------------------- requests


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn."""

    n: int = 1
    seed: int | None = None
    """The choice of index i is drawn as a single answer with seed + i would be."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Only the likeliest tokens that have this probability together are drawn."""
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A request for /v1/chat/completions."""

    messages: Messages
    sampling: Sampling
    model: str | None = None
    stream: bool = False
    usage: bool = False
    """Whether a stream ends with the numbers of tokens."""
    logprobs: bool = False
    top_logprobs: int = 0
    user: str | None = None
    """A name of the client's for whoever asks."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A request for /v1/completions: texts or token ids to go on with."""

    prompts: tuple[str | tuple[int, ...], ...]
    sampling: Sampling
    model: str | None = None
    stream: bool = False
    usage: bool = False
    echo: bool = False
    logprobs: int | None = None
    user: str | None = None


@dataclass(frozen=True, kw_only=True)
class Moderation:
    """A request for /v1/moderations."""

    inputs: tuple[str, ...]
    model: str | None = None


def read_chat(body: bytes) -> Chat:
    """Read a request for a chat answer. Raises Wrong."""
    fields = Fields(body, {*_COMMON, "messages", "max_completion_tokens", "logprobs", "top_logprobs"})
    stream, usage = _stream(fields)
    logprobs, top = fields.truth("logprobs"), fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS)
    if top and not logprobs:
        raise Wrong("top_logprobs: only with logprobs: true", "top_logprobs")
    return Chat(
        messages=_messages(fields), sampling=_sampling(fields, 1), model=fields.text("model"), stream=stream,
        usage=usage, logprobs=logprobs, top_logprobs=top or 0, user=fields.text("user"),
    )  # fmt: skip


def read_completion(body: bytes) -> Completion:
    """Read a request for continuations. Raises Wrong."""
    fields = Fields(body, {*_COMMON, "prompt", "echo", "logprobs"})
    stream, usage = _stream(fields)
    echo = fields.truth("echo")
    sampling = _sampling(fields, 0 if echo else 1)
    prompts = _prompts(fields)
    if len(prompts) * sampling.n > MOST_CHOICES:
        raise Wrong(f"prompt: {len(prompts)} prompts times n={sampling.n}; at most {MOST_CHOICES} in one request")
    if stream and echo:
        raise Wrong("echo: not in a stream; leave out stream or echo", "echo")
    return Completion(
        prompts=prompts, sampling=sampling, model=fields.text("model"), stream=stream, usage=usage, echo=echo,
        logprobs=fields.whole("logprobs", None, 0, MOST_LOGPROBS), user=fields.text("user"),
    )  # fmt: skip


def read_moderation(body: bytes) -> Moderation:
    """Read a request for a moderation. Raises Wrong."""
    fields = Fields(body, {"input", "model"})
    given = fields.content.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Wrong(f"input: got {seen(given)}; send a text or a list of texts", "input")
    if len(texts) > MOST_CHOICES:
        raise Wrong(f"input: {len(texts)} texts; at most {MOST_CHOICES} in one request", "input", 413)
    return Moderation(inputs=tuple(storable(text, "input") for text in texts), model=fields.text("model"))


_COMMON = (
    "model", "n", "seed", "temperature", "top_p", "max_tokens", "stop", "stream", "stream_options", "user",
)  # fmt: skip
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "suffix": ("",),
    "store": (False,), "metadata": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "parallel_tool_calls": (False, True), "response_format": ({"type": "text"},), "service_tier": ("auto", "default"),
    "modalities": (["text"],), "reasoning_effort": ("none",),
}  # fmt: skip
"""Fields of OpenAI's that this server lacks, and the values that ask for nothing."""


def _stream(fields: Fields) -> tuple[bool, bool]:
    stream, options = fields.truth("stream"), fields.content.get("stream_options")
    if options is None:
        return stream, False
    if not isinstance(options, dict) or options.keys() - {"include_usage"} or not stream:
        raise Wrong('stream_options: only {"include_usage": true or false}, with stream: true', "stream_options")
    usage = options.get("include_usage", False)
    if not isinstance(usage, bool):
        raise Wrong(f"stream_options.include_usage: got {seen(usage)}; send true or false", "stream_options")
    return stream, usage


def _sampling(fields: Fields, least: int) -> Sampling:
    names = [name for name in ("max_tokens", "max_completion_tokens") if fields.content.get(name) is not None]
    if len(names) == 2 and fields.content[names[0]] != fields.content[names[1]]:
        raise Wrong("max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
    most = fields.whole(names[0], None, least, 2**31) if names else None
    temperature = fields.number("temperature", 1.0, 0.0, 2.0)
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise Wrong(f"temperature={temperature:g}: send 0, or from {LOWEST_TEMPERATURE} to 2", "temperature")
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise Wrong("top_p=0: send a share above 0, up to 1; for the most likely token, temperature: 0", "top_p")
    given = fields.content.get("stop")
    stop = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise Wrong(f"stop: got {seen(given)}; send a text or a list of texts, none of them empty", "stop")
    if len(stop) > MOST_STOPS:
        raise Wrong(f"stop: {len(stop)} texts; at most {MOST_STOPS}", "stop")
    return Sampling(
        n=fields.whole("n", 1, 1, MOST_CHOICES) or 1, seed=fields.whole("seed", None, -(2**63), 2**63 - MOST_CHOICES),
        temperature=temperature, top_p=top_p, max_tokens=most,
        stop=tuple(dict.fromkeys(storable(text, "stop") for text in stop)),
    )  # fmt: skip


_MESSAGE = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"}


def _messages(fields: Fields) -> Messages:
    given = fields.content.get("messages")
    if not isinstance(given, list) or not given:
        raise Wrong(f"messages: got {seen(given)}; send a list of messages", "messages")
    for place, message in enumerate(given):
        if not isinstance(message, dict):
            raise Wrong(f"messages[{place}]: got {seen(message)}; send an object", "messages")
        for name, value in message.items():
            if name not in _MESSAGE and value not in (None, [], {}):  # clients send back OpenAI's own empty fields
                raise Wrong(f"messages[{place}].{short(name)}: unknown field; known: {', '.join(sorted(_MESSAGE))}")
    try:
        return check_prompt(as_messages(given, "messages"), "messages")
    except InputError as error:
        raise Wrong(str(error), "messages") from None


def _prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    given = fields.content.get("prompt")
    if isinstance(given, str) or (isinstance(given, list) and given and not isinstance(given[0], str | list)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise Wrong(f"prompt: got {seen(given)}; send a text, token ids, or a list of either", "prompt")
    read: list[str | tuple[int, ...]] = []
    for prompt in given:
        if isinstance(prompt, str):
            read.append(storable(prompt, "prompt"))
        elif isinstance(prompt, list) and prompt and all(type(i) is int and 0 <= i < 2**31 for i in prompt):
            read.append(tuple(prompt))
        else:
            raise Wrong(f"prompt: got {seen(prompt)}; send a text, token ids, or a list of either", "prompt")
    return tuple(read)


# ---------------------------------------------------------------- fields


class Fields:
    """A request's JSON object, whose fields are checked as they are read. Raises Wrong, which names the field."""

    def __init__(self, body: bytes, known: set[str]) -> None:
        self.content = json_object(body)
        for name, value in list(self.content.items()):
            if name in known:
                continue
            if name not in _NEUTRAL:
                near = get_close_matches(name, known, n=1)
                advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
                raise Wrong(f"unknown field {short(name)!r}; {advice}", short(name))
            if value is not None and value not in _NEUTRAL[name]:
                raise Wrong(f"{name}: this server does not have it; leave it out", name)

    def text(self, name: str) -> str | None:
        """Read a short text; None where there is none."""
        value = self._get(
            name, lambda value: isinstance(value, str) and len(value) <= 512, "a text of at most 512 characters"
        )
        return None if value is None else storable(value, name)

    def truth(self, name: str) -> bool:
        """Read true or false; False where there is neither."""
        return bool(self._get(name, lambda value: isinstance(value, bool), "true or false"))

    def whole(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """Read a whole number."""
        found = self._get(name, lambda v: type(v) is int and least <= v <= most, f"a whole number, {least} to {most}")
        return default if found is None else int(found)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """Read a number."""
        found = self._get(
            name,
            lambda value: type(value) in (int, float) and math.isfinite(value) and least <= value <= most,
            f"a number from {least:g} to {most:g}",
        )
        return default if found is None else float(found)

    def _get(self, name: str, fits: Callable[[Any], bool], expected: str) -> Any:
        value = self.content.get(name)
        if value is not None and not fits(value):
            raise Wrong(f"{name}: got {seen(value)}; send {expected}", name)
        return value


def json_object(body: bytes) -> dict[str, Any]:
    """Read a body's JSON object. Raises Wrong."""

    def not_a_number(name: str) -> float:
        raise ValueError(f"{name} is no number of JSON's")

    try:
        content = json.loads(body, parse_constant=not_a_number)
    except (ValueError, RecursionError) as error:
        raise Wrong(f"the body is no JSON: {short(str(error), 200)}") from None
    if not isinstance(content, dict):
        raise Wrong(f"the body is {seen(content)}; send an object")
    return content


def storable(text: str, name: str) -> str:
    """Return a text, unless UTF-8 cannot hold it. Raises Wrong."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Wrong(f"{name}: half a character at {error.start} (a lone surrogate)", name) from None
    return text


def seen(value: object) -> str:
    """Show a value of a request without looking at all of it: it may be megabytes."""
    if isinstance(value, Mapping | list):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    return short(repr(value[:200] if isinstance(value, str) else value))
