"""A trained reward model over HTTP: many clients, one model, one thread that scores.

    POST /score        {"conversations": [[{"role": ..., "content": ...}, ...], ...]}, or trl's
                       {"prompts": [...], "completions": [...]}  ->  {"scores": [...]}
    POST /get_reward   OpenRLHF's {"query": [prompt + response], "prompts": [prompt], "labels": [...]}, texts
                       ->  {"rewards": [...], "scores": [...], "extra_logs": {}}
    GET /health        {"status": "ok", "model": ..., "queue": ...}, without the token

Every refusal is `{"error": "one line"}`. Scores are float32, written so that they read back to the same bits.

A request is never split. It is joined with others only while all of them fit one forward of `max_batch_tokens` padded
tokens. A request scored by itself gets the same bits as a local `RewardModel.score` of its list. In a joined request,
matrix products have another shape and round differently (below 1e-5 in float32). To make scores independent of other
requests, start the server with `--join_requests false`.

What a server does with strangers (Host, Origin, token, deadlines, limits) is in `rlhf.run.http`; `rlhf.run.connections`
runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from reward_models.functions import conversation
from reward_models.scoring_queue import Scorer, ScoringQueue, ServerConfig
from rlhf import chat
from rlhf.errors import InputError, short
from rlhf.rows.messages import ROLES, Messages
from rlhf.run.http import Guard, Refused, read_body

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    from reward_models.rendered import ReadText
    from reward_models.scoring import RewardModel

SMALL = 65536  # bytes whose JSON is read in about a millisecond

__all__ = ["Refused", "ServerConfig", "create_app", "read_queries", "read_request", "token_counter"]


def token_counter(model: RewardModel, most: int | None = None) -> Callable[[Messages], int]:
    """Make the function that counts a conversation's tokens.

    It raises Refused for more tokens than the model has positions (on a GPU, a forward of such a conversation would
    break the process for good), for a text of megabytes before it is encoded; and InputError where the chat template
    refuses the roles. most: the most tokens that the server takes.
    """
    from rlhf.preflight.measure import max_positions

    window = max_positions(model.model)
    per_token = max(map(len, model.tokenizer.get_vocab()), default=1)
    longest = min(window, most or window) * per_token

    def count(messages: Messages) -> int:
        letters = sum(len(message["content"]) for message in messages)
        if letters > longest:
            raise Refused(
                413, f"{letters} characters; this model reads {window} tokens, of at most {per_token} characters each"
            )
        tokens = len(chat.encode_conversation(model.tokenizer, messages)[0])
        if tokens > window:
            raise Refused(413, f"{tokens} tokens; this model reads {window}")
        return tokens

    return count


# ---------------------------------------------------------------- requests


def _shown(value: object) -> str:
    """Show a value of a request without looking at all of it: it may be megabytes."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return short(repr(value[:200] if isinstance(value, str) else value))


def _json_of(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}") from None


def read_request(body: bytes, max_conversations: int) -> list[Messages]:
    """Read the conversations of a request's JSON, in either form. Raises Refused."""
    return _conversations(_json_of(body), max_conversations)


def read_queries(body: bytes, max_conversations: int, read_text: ReadText) -> list[Messages]:
    """Read the conversations of OpenRLHF's request: texts, which `read_text` takes apart. Raises Refused.

    Its `labels` (answers to compare with) and other fields say nothing to a reward model."""
    asked = _json_of(body)
    if not isinstance(asked, dict) or not {"query", "prompts"} <= asked.keys():
        raise Refused(400, 'write {"query": [prompt + response, ...], "prompts": [...]}')
    lists = {name: _rows(asked, name, max_conversations) for name in ("query", "prompts")}
    if len(lists["query"]) != len(lists["prompts"]):
        raise Refused(400, f"{len(lists['prompts'])} prompts but {len(lists['query'])} query")
    talks = []
    for number, (prompt, query) in enumerate(zip(lists["prompts"], lists["query"], strict=True)):
        for name, text in (("prompts", prompt), ("query", query)):
            if not isinstance(text, str):
                raise Refused(400, f"{name}[{number}]: a text is needed, got {_shown(text)}")
        try:
            talks.append(read_text(str(prompt), str(query)))
        except InputError as error:
            raise Refused(400, f"query[{number}]: {error}") from None
    return talks


def _rows(asked: dict[str, object], name: str, max_conversations: int) -> list[object]:
    rows = asked.get(name)
    if not isinstance(rows, list):
        raise Refused(400, f"{name}: a list is needed, got {_shown(rows)}")
    if len(rows) > max_conversations:
        raise Refused(413, f"{name}: {len(rows)}; this server takes {max_conversations} in one request")
    return rows


def _conversations(asked: object, max_conversations: int) -> list[Messages]:
    if not isinstance(asked, dict) or not ("conversations" in asked) ^ ("prompts" in asked or "completions" in asked):
        raise Refused(400, 'write {"conversations": [...]}, or {"prompts": [...], "completions": [...]}')
    names = ("conversations",) if "conversations" in asked else ("prompts", "completions")
    lists = {name: _rows(asked, name, max_conversations) for name in names}
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


def _messages(value: object, where: str, ends: bool = False) -> Messages:
    if not isinstance(value, list) or not value:
        raise Refused(400, f"{where}: a list of messages is needed, got {_shown(value)}")
    for n, message in enumerate(value):
        if isinstance(message, dict) and message.get("tool_calls"):
            raise Refused(400, f"{where}[{n}]: tool_calls are not taken here; score with a local RewardModel")
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise Refused(400, f'{where}[{n}]: write {{"role": ..., "content": "text"}}, got {_shown(message)}')
        if message.get("role") not in ROLES:
            raise Refused(400, f"{where}[{n}]: role {_shown(message.get('role'))}; use one of {', '.join(ROLES)}")
    if ends and value[-1]["role"] != "assistant":
        raise Refused(400, f"{where} ends with {value[-1]['role']}; a score is of an assistant's response")
    return [{"role": message["role"], "content": message["content"]} for message in value]


async def _unless_gone(request: Request, queue: ScoringQueue, conversations: list[Messages]) -> list[float]:
    """Wait for the scores, and drop the work if the client hangs up. Raises Refused."""

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
    read_text: ReadText | None = None,
    name: str = "reward_model",
    token: str | None = None,
) -> FastAPI:
    """Make the FastAPI application. Raises InputError where FastAPI is not installed.

    scorer: function from conversations to finite scores, such as `RewardModel(...).score`; only one thread calls it.
    count_tokens: function that returns a conversation's length; an exception of it refuses that conversation (400).
    read_text: function that takes a prompt and a response apart (`rendered.RenderedReader`); None: no /get_reward.
    name: shown by /health. token: what clients must send as `Authorization: Bearer ...`; None: no token is needed.
    """
    try:
        from fastapi import FastAPI
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse
    except ImportError as missing:
        raise InputError(f"the scoring server needs {missing.name}: pip install 'rlhf-recipes[server]'") from None

    queue = ScoringQueue(scorer, count_tokens, config)
    reader = ThreadPoolExecutor(1, thread_name_prefix="reading")  # one: JSON of megabytes holds up all threads

    @contextlib.asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(queue.work())
        yield
        worker.cancel()
        reader.shutdown(wait=False)

    async def no_such_thing(request: Request, problem: HTTPException) -> JSONResponse:
        message = {"error": f"{request.method} {request.url.path}: {problem.detail}"}
        return JSONResponse(message, problem.status_code, problem.headers)

    async def scores_of(request: Request, read: Callable[[bytes], list[Messages]]) -> list[float]:
        with queue.slots.slot():
            with queue.slots.arriving() as until:
                body = await read_body(request, config, until)
            if len(body) <= SMALL:  # never waits for others' megabytes
                conversations = read(body)
            else:
                conversations = await asyncio.get_running_loop().run_in_executor(reader, read, body)
            return await _unless_gone(request, queue, conversations)

    async def score(request: Request) -> JSONResponse:
        read = partial(read_request, max_conversations=config.max_conversations)
        return JSONResponse({"scores": await scores_of(request, read)})

    async def get_reward(request: Request) -> JSONResponse:
        assert read_text is not None
        read = partial(read_queries, max_conversations=config.max_conversations, read_text=read_text)
        scores = await scores_of(request, read)
        return JSONResponse({"rewards": scores, "scores": scores, "extra_logs": {}})

    async def health(request: Request) -> JSONResponse:
        counts = {"queue": queue.slots.taken, "waiting": queue.waiting, "max_queue": config.max_queue}
        return JSONResponse({"status": "ok", "model": name} | counts)

    # no redirect to a path with or without a slash: it would lead to whatever the Host header names
    app = FastAPI(
        lifespan=running, exception_handlers={HTTPException: no_such_thing}, openapi_url=None, redirect_slashes=False
    )
    app.add_middleware(Guard, config=config, token=token)
    app.add_route("/score", score, methods=["POST"])
    if read_text is not None:
        app.add_route("/get_reward", get_reward, methods=["POST"])
    app.add_route("/health", health, methods=["GET"])
    return app
