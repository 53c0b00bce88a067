"""The policy's server: OpenAI's HTTP, feedback, and the chat page.

    GET  /                        the chat page
    GET  /v1/models               the policies
    POST /v1/chat/completions     answers to a conversation; with stream: true, as server-sent events
    POST /v1/completions          continuations of texts or token ids
    POST /v1/moderations          the moderator's verdicts, where the server has one
    POST /v1/feedback             a thumb, a better answer or a comparison (`rlhf.serving.feedback`)
    GET  /health                  without the token

Every refusal is one line in OpenAI's form. Neither texts nor tokens are written to the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from rlhf.errors import InputError
from rlhf.run.http import RETRY, Guard, Receive, Refused, Send, read_body
from rlhf.run.page import STYLE
from rlhf.run.slots import Slots
from rlhf.serving.config import ServingConfig
from rlhf.serving.feedback import TAGS, read_feedback
from rlhf.serving.wire import Chat, Completion, Wrong, error_body, read_chat, read_completion, read_moderation

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from rlhf.serving.keeping import Keeper

Value = TypeVar("Value")
SMALL = 65536  # bytes whose JSON is read in about a millisecond
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The chat page's content security policy: scripts and styles from files of ours, and no way to make markup of text."""
PARTS = ("chat.css", "chat.js", "feedback.js", "server.js", "text.js", "tree.js")
PAGE = {"/": "chat.html"} | {f"/page/{name}": name for name in PARTS}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


class Engine(Protocol):
    """What answers: `rlhf.serving.engine.LocalEngine` or `rlhf.serving.upstream.Upstream`."""

    @property
    def models(self) -> Mapping[str, str]: ...
    @property
    def counts(self) -> Mapping[str, int]: ...
    def start(self) -> None: ...
    def close(self) -> None: ...
    async def whole(self, request: Chat | Completion) -> dict[str, Any]: ...
    def stream(self, request: Chat | Completion) -> AsyncGenerator[dict[str, Any]]: ...


class Verdict(NamedTuple):
    """What a moderator says of one text: by category, whether it is flagged, and how likely that is right."""

    flagged: Mapping[str, bool]
    scores: Mapping[str, float]


Moderator = Callable[[Sequence[str]], Sequence[Verdict]]


@dataclass(eq=False)
class Service:
    """What requests are answered with.

    keeper: where feedback (and, with `log`, every conversation) is kept. moderator: a function from texts to verdicts,
    called by one thread.
    """

    engine: Engine
    config: ServingConfig
    keeper: Keeper | None = None
    moderator: Moderator | None = None
    answered: int = 0
    """Requests for an answer that got it."""

    def __post_init__(self) -> None:
        self.slots = Slots(self.config.max_queue, self.config.max_body_seconds, full=429)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="reading")  # one: JSON of megabytes holds up all threads
        self.judging = ThreadPoolExecutor(1, thread_name_prefix="moderating")

    async def read(self, request: Request, parse: Callable[[bytes], Value]) -> Value:
        """Receive a request's body and read it."""
        with self.slots.arriving() as until:
            body = await read_body(request, self.config, until)
        if len(body) <= SMALL:  # never waits for others' megabytes
            return parse(body)
        return await asyncio.get_running_loop().run_in_executor(self.reader, parse, body)

    # -- what is asked -----------------------------------------------------------------------------------------

    async def chat(self, request: Request, send: Send) -> None:
        """Answer /v1/chat/completions."""
        await self._answer(request, send, read_chat)

    async def completion(self, request: Request, send: Send) -> None:
        """Answer /v1/completions."""
        await self._answer(request, send, read_completion)

    async def _answer(self, request: Request, send: Send, parse: Callable[[bytes], Chat | Completion]) -> None:
        with self.slots.slot():
            asked = await self.read(request, parse)
            if asked.stream:
                await unless_gone(request, self._stream(asked, send))
                return
            answer = await unless_gone(request, self.engine.whole(asked))
            if answer is None:
                return
            await self._log(asked, [answer])
            await reply(send, answer)
            self.answered += 1

    async def _stream(self, asked: Chat | Completion, send: Send) -> None:
        """Send an answer as server-sent events. A refusal before the first one is a plain answer.

        What was written is logged, also where the client hangs up or the engine fails before the end."""
        async with contextlib.aclosing(self.engine.stream(asked)) as chunks:
            received, cut = [await anext(chunks)], True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
            try:
                try:
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    await _event(send, received[0])
                    async for chunk in chunks:
                        received.append(chunk)
                        await _event(send, chunk)
                    cut = False
                finally:
                    await asyncio.shield(self._log(asked, received, cut))
                self.answered += 1
            except Refused as problem:  # the status is out already
                await _event(send, error_body(problem.status, str(problem)))
            else:
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _log(self, asked: Chat | Completion, answers: list[dict[str, Any]], cut: bool = False) -> None:
        if self.keeper is None or not self.config.log:
            return
        from rlhf.serving.keeping import texts_of

        first = answers[0]
        await self.keeper.logged(asked, first["id"], first["seed"], first["model"], texts_of(answers), cut)

    async def moderation(self, request: Request, send: Send) -> None:
        """Answer /v1/moderations."""
        with self.slots.slot():
            asked = await self.read(request, read_moderation)
            if self.moderator is None:
                raise Wrong("no moderation model is here", status=404)
            work = asyncio.get_running_loop().run_in_executor
            verdicts = await work(self.judging, self.moderator, asked.inputs)
            results = [
                {"flagged": any(v.flagged.values()), "categories": dict(v.flagged), "category_scores": dict(v.scores)}
                for v in verdicts
            ]
            await reply(send, {"id": "modr", "model": asked.model or "moderation", "results": results})

    async def feedback(self, request: Request, send: Send) -> None:
        """Answer /v1/feedback."""
        with self.slots.slot():
            given = await self.read(request, read_feedback)
            if self.keeper is None:
                raise Wrong("this server keeps no feedback; start it with --store FILE", status=404)
            await reply(send, await self.keeper.feedback(given))

    # -- what is told ------------------------------------------------------------------------------------------

    async def models(self, request: Request, send: Send) -> None:
        """Answer /v1/models, and /v1/models/NAME."""
        rows = {
            name: {"id": name, "object": "model", "created": 0, "owned_by": "rlhf", "fingerprint": fingerprint}
            for name, fingerprint in self.engine.models.items()
        }
        name = request.path_params.get("name")
        if name is None:
            await reply(send, {"object": "list", "data": list(rows.values())})
        elif name in rows:
            await reply(send, rows[name])
        else:
            raise Wrong(f"no policy {name!r:.60} is here; choose one of {', '.join(rows)}", "model", 404)

    async def settings(self, request: Request, send: Send) -> None:
        """Tell the page what it needs to know."""
        told = {
            "models": list(self.engine.models), "compare_share": self.config.compare_share, "tags": list(TAGS),
            "feedback": self.keeper is not None, "log": self.config.log, "retention_days": self.config.retention_days,
            "system_prompt": self.config.system_prompt, "max_tokens": self.config.max_answer_tokens,
        }  # fmt: skip
        await reply(send, told)

    async def health(self, request: Request, send: Send) -> None:
        """Tell that the server is up, and how full."""
        counts = {"queue": self.slots.taken, "max_queue": self.config.max_queue, **self.engine.counts}
        await reply(send, {"status": "ok"} | counts)


async def reply(send: Send, content: object) -> None:
    """Send JSON."""
    body = _json(content)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _event(send: Send, content: object) -> None:
    await send({"type": "http.response.body", "body": b"data: " + _json(content) + b"\n\n", "more_body": True})


def _json(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Value]) -> Value | None:
    """Wait for some work, and cancel it when the client hangs up; None then."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


# ---------------------------------------------------------------- the application


class Endpoint:
    """An ASGI application that answers one path."""

    def __init__(self, answer: Callable[[Request, Send], Awaitable[None]]) -> None:
        self.answer = answer

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        from starlette.requests import Request

        await self.answer(Request(scope, receive), send)


def page_file(name: str) -> Callable[[Request, Send], Awaitable[None]]:
    """Make the answer that is a file of the chat page."""
    content = resources.files("rlhf.serving").joinpath("page", name).read_bytes()
    if name.endswith(".css"):
        content = STYLE.encode() + content
    headers = {
        "Content-Type": f"{TYPES[name.rpartition('.')[2]]}; charset=utf-8",
        "Content-Length": str(len(content)),
        "Content-Security-Policy": POLICY,
    }
    named = [(key.lower().encode(), value.encode()) for key, value in headers.items()]

    async def answer(request: Request, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": named})
        await send({"type": "http.response.body", "body": content})

    return answer


def create_app(service: Service, token: str | None = None) -> Starlette:
    """Make the application. Raises InputError where Starlette is not installed.

    token: what clients must send as `Authorization: Bearer ...`; None: no token is needed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    except ImportError as missing:
        raise InputError(f"the policy's server needs {missing.name}: pip install 'rlhf-recipes[server]'") from None

    engine, keeper = service.engine, service.keeper

    @contextlib.asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        expiring = asyncio.create_task(keeper.expire()) if keeper is not None else None
        yield
        if expiring is not None:
            expiring.cancel()
        engine.close()
        if keeper is not None:
            keeper.close()

    async def no_such_thing(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        line = f"{request.method} {request.url.path[:100]}: {problem.detail}"
        return JSONResponse(error_body(problem.status_code, line), problem.status_code, problem.headers)

    async def refused(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, Refused)
        body = error_body(problem.status, str(problem), getattr(problem, "param", None))
        return JSONResponse(body, problem.status, RETRY.get(problem.status))

    paths: dict[str, tuple[str, Callable[[Request, Send], Awaitable[None]]]] = {
        **{path: ("GET", page_file(name)) for path, name in PAGE.items()},
        "/page/settings": ("GET", service.settings),
        "/v1/models": ("GET", service.models),
        "/v1/models/{name:path}": ("GET", service.models),
        "/v1/chat/completions": ("POST", service.chat),
        "/v1/completions": ("POST", service.completion),
        "/v1/moderations": ("POST", service.moderation),
        "/v1/feedback": ("POST", service.feedback),
        "/health": ("GET", service.health),
    }
    guard = Middleware(Guard, config=service.config, token=token, public=("/health", *PAGE), refusal=error_body)
    app = Starlette(
        routes=[Route(path, Endpoint(answer), methods=[method]) for path, (method, answer) in paths.items()],
        middleware=[guard],
        exception_handlers={HTTPException: no_such_thing, Refused: refused},
        lifespan=running,
    )
    # no redirect to a path with or without a slash: it would lead to whatever the Host header names
    app.router.redirect_slashes = False
    return app
