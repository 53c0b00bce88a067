"""A trained reward model behind HTTP: many clients, one model, one thread that scores.

    POST /score   {"conversations": [[{"role": ..., "content": ...}, ...], ...]}, or trl's
                  {"prompts": [...], "completions": [...]}  ->  {"scores": [...]}
    GET /health   {"status": "ok", "model": ..., "queue": ...}, without the token

Every refusal is `{"error": "one line"}`. Scores are float32 written so that they read back to the same bits.

A request is never split, and is joined with others only while all of them fit one forward of `max_batch_tokens`
padded tokens. A request scored by itself gets the bits that `RewardModel.score` gives to the same list in one
process. Where it was joined, matrix products of another shape round differently (below 1e-5 in float32): for scores
that never depend on who else is asking, start the server with `--join_requests false`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reward_models.functions import conversation
from rlhf import chat
from rlhf.chat import Messages
from rlhf.errors import InputError, short
from rlhf.records import ROLES
from rlhf.sources import show

if TYPE_CHECKING:
    from reward_models.scoring import RewardModel

logger = logging.getLogger(__name__)

Scorer = Callable[[list[Messages]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What a scoring server takes on."""

    max_queue: int = 256
    """Requests taken on at a time (being read, waiting, being scored); one more is answered 503."""
    max_conversations: int = 1024
    """Conversations in one request."""
    max_body_bytes: int = 16 * 1024 * 1024
    """Size of one request; max_queue times as much memory may be needed."""
    max_body_seconds: float = 30.0
    """How long a client may take to send its request."""
    max_batch_tokens: int = 16384
    """Padded tokens per forward: a memory setting, and the longest conversation."""
    join_requests: bool = True
    """Score requests of several clients in one forward; false: a score never depends on other requests, by no bit."""

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_conversations", "max_body_bytes", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.max_body_seconds > 0:
            raise InputError(f"max_body_seconds={self.max_body_seconds} must be above 0")


class Refused(Exception):
    """An answer other than 200: its status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(short(message, 500))
        self.status = status


def token_counter(model: RewardModel) -> Callable[[Messages], int]:
    """How many tokens a conversation has. Raises Refused where the model's positions do not reach so far (on a GPU
    it would break down for good), and InputError where its template does not take the roles."""
    from rlhf.preflight.measure import max_positions

    window = max_positions(model.model)

    def count(messages: Messages) -> int:
        tokens = len(chat.encode_conversation(model.tokenizer, messages)[0])
        if tokens > window:
            raise Refused(413, f"{tokens} tokens; this model reads {window}")
        return tokens

    return count


# ---------------------------------------------------------------- the queue and its thread


class _Job:
    """One request on its way through the thread."""

    def __init__(self, conversations: list[Messages]) -> None:
        self.conversations = conversations
        self.lengths: list[int] = []
        self.scores: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()


class ScoringQueue:
    """Requests, first come first served, in batches for one thread. All else runs on the event loop."""

    def __init__(self, scorer: Scorer, count_tokens: Callable[[Messages], int], config: ServerConfig) -> None:
        self._scorer, self._count_tokens, self._config = scorer, count_tokens, config
        self._waiting: list[_Job] = []
        self._news = asyncio.Event()
        self.taken = 0

    @property
    def waiting(self) -> int:
        """Requests that have been read and are waiting or being scored."""
        return len(self._waiting)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place among `max_queue`, before a byte of the request is read. Raises Refused (503)."""
        if self.taken >= self._config.max_queue:
            raise Refused(503, f"the queue is full ({self._config.max_queue} requests); try again")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def score(self, conversations: list[Messages]) -> list[float]:
        """Scores, when it is their turn. Cancelled while it waits, it costs the model nothing."""
        if not conversations:
            return []
        job = _Job(conversations)
        self._waiting.append(job)
        self._news.set()
        return await job.scores

    async def work(self) -> None:
        """Until cancelled: take what fits one forward, score it, answer."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="scoring") as thread:
            while True:
                self._waiting = [job for job in self._waiting if not job.scores.done()]  # less those that hung up
                if not self._waiting:
                    self._news.clear()
                    await self._news.wait()
                    continue
                batch, refused = await loop.run_in_executor(thread, self._take, list(self._waiting))
                results: list[tuple[_Job, list[float] | Refused]] = list(refused.items())
                batch = [job for job in batch if not job.scores.done()]
                if batch:
                    scored = await loop.run_in_executor(thread, self._score, batch)
                    results += zip(batch, scored, strict=True)
                for job, result in results:
                    if job.scores.done():
                        continue
                    if isinstance(result, Refused):
                        job.scores.set_exception(result)
                    else:
                        job.scores.set_result(result)

    def _take(self, jobs: list[_Job]) -> tuple[list[_Job], dict[_Job, Refused]]:
        """The first jobs that fit one forward together (the first one always), and those that cannot be scored."""
        batch: list[_Job] = []
        refused: dict[_Job, Refused] = {}
        rows = longest = 0
        for job in jobs:
            try:
                job.lengths = job.lengths or self._lengths(job.conversations)
            except Refused as error:
                refused[job] = error
                continue
            rows, longest = rows + len(job.lengths), max(longest, *job.lengths)
            if batch and (not self._config.join_requests or rows * longest > self._config.max_batch_tokens):
                break
            batch.append(job)
        return batch, refused

    def _lengths(self, conversations: list[Messages]) -> list[int]:
        lengths, most = [], self._config.max_batch_tokens
        for number, messages in enumerate(conversations, start=1):
            try:
                tokens = self._count_tokens(messages)
            except Refused as error:
                raise Refused(error.status, f"conversation {number}: {error}") from error
            except Exception as error:  # nothing but this client's text was looked at
                raise Refused(400, f"conversation {number} cannot be encoded: {error}") from error
            if tokens > most:
                raise Refused(413, f"conversation {number}: {tokens} tokens; this server takes {most}")
            lengths.append(tokens)
        return lengths

    def _score(self, batch: list[_Job]) -> list[list[float] | Refused]:
        """Of every job its scores, or why there are none. One job's failure is not another's."""
        conversations = [messages for job in batch for messages in job.conversations]
        try:
            scores = [float(score) for score in self._scorer(conversations)]
            if len(scores) != len(conversations):
                raise ValueError(f"{len(scores)} scores for {len(conversations)} conversations")
        except Exception as error:
            if len(batch) > 1:
                return [self._score([job])[0] for job in batch]
            return [_failed(f"scoring failed: {type(error).__name__}: {error}")]
        answers: list[list[float] | Refused] = []
        for job in batch:
            own, scores = scores[: len(job.conversations)], scores[len(job.conversations) :]
            bad = next((n for n, score in enumerate(own) if not math.isfinite(score)), None)
            answers.append(
                own if bad is None else _failed(f"conversation {bad + 1} scored {own[bad]}, no finite number")
            )
        return answers


def _failed(message: str) -> Refused:
    error = Refused(500, message)
    logger.error("%s", error)
    return error


# ---------------------------------------------------------------- requests


def read_request(body: bytes, max_conversations: int) -> list[Messages]:
    """The conversations of a request's JSON, in either form. Raises Refused."""
    try:
        return _conversations(json.loads(body), max_conversations)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}") from None


def _conversations(asked: Any, max_conversations: int) -> list[Messages]:
    if not isinstance(asked, dict) or not ("conversations" in asked) ^ ("prompts" in asked or "completions" in asked):
        raise Refused(400, 'write {"conversations": [...]}, or {"prompts": [...], "completions": [...]}')
    names = ("conversations",) if "conversations" in asked else ("prompts", "completions")
    lists: dict[str, Any] = {name: asked.get(name) for name in names}
    for name, rows in lists.items():
        if not isinstance(rows, list):
            raise Refused(400, f"{name}: a list is needed, got {show(rows)}")
        if len(rows) > max_conversations:
            raise Refused(413, f"{name}: {len(rows)}; this server takes {max_conversations} in one request")
    if "conversations" in asked:
        return [_messages(row, f"conversations[{n}]", ends=True) for n, row in enumerate(lists["conversations"])]
    prompts, completions = lists["prompts"], lists["completions"]
    if len(prompts) != len(completions):
        raise Refused(400, f"{len(prompts)} prompts but {len(completions)} completions")
    return [
        conversation(
            prompt if isinstance(prompt, str) else _messages(prompt, f"prompts[{n}]"),
            completion if isinstance(completion, str) else _messages(completion, f"completions[{n}]", ends=True),
        )
        for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def _messages(value: Any, where: str, ends: bool = False) -> Messages:
    if not isinstance(value, list) or not value:
        raise Refused(400, f"{where}: a list of messages is needed, got {show(value)}")
    for n, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise Refused(400, f'{where}[{n}]: write {{"role": ..., "content": "text"}}, got {show(message)}')
        if message.get("role") not in ROLES:
            raise Refused(400, f"{where}[{n}]: role {show(message.get('role'))}; use one of {', '.join(ROLES)}")
    if ends and value[-1]["role"] != "assistant":
        raise Refused(400, f"{where} ends with {value[-1]['role']}; a score is of an assistant's response")
    return [{"role": message["role"], "content": message["content"]} for message in value]


async def _body(request: Any, config: ServerConfig) -> bytes:
    """The request's bytes, as long as they are few enough and come soon enough. Raises Refused."""
    too_large = Refused(413, f"the body has more than {config.max_body_bytes} bytes; send fewer conversations")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > config.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(config.max_body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > config.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body did not arrive in {config.max_body_seconds:g} seconds") from None
    return bytes(body)


async def _unless_gone(request: Any, queue: ScoringQueue, conversations: list[Messages]) -> list[float]:
    """The scores; where the client hangs up before, its work is dropped. Raises Refused."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(queue.score(conversations)), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refused(400, "the client hung up")  # nobody reads it
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


# ---------------------------------------------------------------- the application


def create_app(
    scorer: Scorer,
    config: ServerConfig,
    *,
    count_tokens: Callable[[Messages], int],
    name: str = "reward_model",
    token: str | None = None,
) -> Any:
    """The FastAPI application. Raises InputError where FastAPI is not installed.

    scorer: conversations to finite scores, `RewardModel(...).score` for one; only one thread calls it.
    count_tokens: a conversation's length, for the batches; an error of its is an error of that conversation (400).
    name: shown by /health. token: what clients must send as `Authorization: Bearer ...`; None lets everybody in.
    """
    try:
        from fastapi import FastAPI
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse
    except ImportError as missing:
        raise InputError(f"the scoring server needs {missing.name}: pip install 'rlhf-recipes[server]'") from None

    queue = ScoringQueue(scorer, count_tokens, config)

    @contextlib.asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(queue.work())
        yield
        worker.cancel()

    def error(status: int, message: str, headers: Any = None) -> JSONResponse:
        return JSONResponse({"error": message}, status, headers)

    async def refused(request: Request, problem: Any) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
        return error(problem.status, str(problem), headers.get(problem.status))

    async def no_such_thing(request: Request, problem: Any) -> JSONResponse:
        return error(problem.status_code, f"{request.method} {request.url.path}: {problem.detail}", problem.headers)

    async def hung_up(request: Request, problem: Exception) -> JSONResponse:
        return error(400, "the client hung up")  # nobody reads it

    async def broken(request: Request, problem: Exception) -> JSONResponse:
        return error(500, f"the server failed: {type(problem).__name__}")

    async def score(request: Request) -> JSONResponse:
        if token is not None and not _holds(request.headers.get("authorization", ""), token):
            raise Refused(401, "send the token: Authorization: Bearer TOKEN")
        with queue.place():
            body = await _body(request, config)
            conversations = await asyncio.to_thread(read_request, body, config.max_conversations)
            return JSONResponse({"scores": await _unless_gone(request, queue, conversations)})

    async def health(request: Request) -> JSONResponse:
        counts = {"queue": queue.taken, "waiting": queue.waiting, "max_queue": config.max_queue}
        return JSONResponse({"status": "ok", "model": name} | counts)

    handlers: Any = {Refused: refused, HTTPException: no_such_thing, ClientDisconnect: hung_up, Exception: broken}
    app = FastAPI(lifespan=running, exception_handlers=handlers, openapi_url=None)
    app.add_route("/score", score, methods=["POST"])
    app.add_route("/health", health, methods=["GET"])
    return app


def _holds(header: str, token: str) -> bool:
    """Compared in a time that tells nothing of how much was right."""
    scheme, _, sent = header.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), token.encode())
