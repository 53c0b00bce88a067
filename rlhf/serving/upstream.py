"""Another server of OpenAI's HTTP (vLLM) as the engine: requests are checked here and passed on, answers come back.

What is kept of the conversations, who may ask and how much, is this server's business; what a seed repeats is the other
one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from rlhf.client import Client
from rlhf.errors import InputError, RunStopped, short
from rlhf.rows.messages import Messages
from rlhf.run.http import Refused
from rlhf.serving.wire import Chat, Completion, Wrong

log = logging.getLogger("rlhf")

Value = TypeVar("Value")

TOKEN_VARIABLE = "RLHF_UPSTREAM_TOKEN"
"""The environment variable with the token that the other server wants: clients of this one never send theirs there."""


class Upstream:
    """The models of another server. at_once: requests that are passed on at a time."""

    def __init__(self, client: Client, at_once: int) -> None:
        self.client = client
        self.models = {name: f"{client.url} {name}" for name in client.models()}
        self._at_once, self._passing = at_once, set[Future[Any]]()
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="upstream")

    def start(self) -> None:
        """Do nothing: the other server runs already."""

    def close(self) -> None:
        """Wait for no answer any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def counts(self) -> dict[str, int]:
        """Return how many requests have been passed on and are not answered, whether or not their clients wait."""
        self._passing = {passing for passing in self._passing if not passing.done()}
        return {"writing": len(self._passing), "waiting": 0}

    async def whole(self, request: Chat | Completion) -> dict[str, Any]:
        """Pass a request on and return its answer."""
        path, body = self._passed_on(request)
        try:
            answer: dict[str, Any] = await asyncio.wrap_future(self._begin(self.client.asked, path, body))
        except (InputError, RunStopped) as error:
            raise _refusal(error) from None
        return {"seed": body["seed"]} | answer

    async def stream(self, request: Chat | Completion) -> AsyncGenerator[dict[str, Any]]:
        """Pass a request on and yield its answer's chunks. An iterator that is closed hangs up at the next chunk."""
        path, body = self._passed_on(request)
        loop, gone = asyncio.get_running_loop(), False
        chunks: asyncio.Queue[dict[str, Any] | Refused | None] = asyncio.Queue()

        def hand_over(chunk: dict[str, Any] | Refused | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        def read() -> None:
            with contextlib.closing(self.client.events(path, body)) as events:
                for event in events:
                    if gone:
                        return
                    hand_over(event)

        def ended(reading: Future[None]) -> None:
            error = None if reading.cancelled() else reading.exception()
            hand_over(None if error is None else _refusal(error))

        self._begin(read).add_done_callback(ended)
        try:
            while (chunk := await chunks.get()) is not None:
                if isinstance(chunk, Refused):
                    raise chunk
                yield {"seed": body["seed"]} | chunk
        finally:
            gone = True

    def _begin(self, work: Callable[..., Value], *values: Any) -> Future[Value]:
        """Start a thread that passes a request on. The other server's work goes on when a client hangs up, so the
        thread counts until it ends. Raises Refused where there are as many as may be."""
        if self.counts["writing"] >= self._at_once:
            raise Refused(429, f"the other server is still at work on {self._at_once} requests; try again")
        passing = self._threads.submit(work, *values)
        self._passing.add(passing)
        return passing

    def _passed_on(self, request: Chat | Completion) -> tuple[str, dict[str, Any]]:
        """Return the path and the body of a request, with a seed of ours where it has none."""
        name = request.model or (next(iter(self.models)) if len(self.models) == 1 else None)
        if name not in self.models:
            raise Wrong(f"model: no {short(repr(name))} is here; choose one of {', '.join(self.models)}", "model", 404)
        sampling = request.sampling
        seed = secrets.randbelow(2**31) if sampling.seed is None else sampling.seed
        body: dict[str, Any] = {
            "model": name, "n": sampling.n, "seed": seed, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "stream": request.stream, **self.client.full_softmax,
        }  # fmt: skip
        body |= {"max_tokens": sampling.max_tokens} if sampling.max_tokens is not None else {}
        body |= {"stop": list(sampling.stop)} if sampling.stop else {}
        body |= {"stream_options": {"include_usage": True}} if request.stream and request.usage else {}
        if isinstance(request, Chat):
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs} if request.logprobs else {}
            return "/v1/chat/completions", body | {"messages": openai_messages(request.messages)}
        body |= {"prompt": list(request.prompts) if len(request.prompts) > 1 else request.prompts[0]}
        body |= {"echo": True} if request.echo else {}
        body |= {} if request.logprobs is None else {"logprobs": request.logprobs}
        return "/v1/completions", body


def openai_messages(messages: Messages) -> Messages:
    """Write messages as OpenAI's HTTP has them: the arguments of tool calls as JSON text."""

    def written(call: dict[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        if not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"])
        return call | {"function": function}

    return [
        message | {"tool_calls": [written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _refusal(error: BaseException) -> Refused:
    if isinstance(error, InputError):
        return Wrong(f"upstream: {error}")
    if not isinstance(error, RunStopped):
        log.error("passing on failed: %s", type(error).__name__)
        return Refused(500, f"passing on failed: {type(error).__name__}")
    return Refused(502, f"upstream: {error}")
