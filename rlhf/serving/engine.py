"""The engine that answers with models in this process: requests in, OpenAI's JSON out, whole or as a stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rlhf.errors import InputError, short
from rlhf.serving import pieces
from rlhf.serving.config import ServingConfig
from rlhf.serving.decoder import Row
from rlhf.serving.pieces import About, Piece
from rlhf.serving.policies import Policy
from rlhf.serving.scheduler import Choice, Job, Scheduler
from rlhf.serving.wire import Chat, Completion, Sampling, Wrong

COMPLETION_TOKENS = 16
"""What /v1/completions writes where the request names no number, as OpenAI's does."""


@dataclass(frozen=True)
class Prepared:
    """A request that is ready to be written."""

    about: About
    job: Job
    choices: list[Choice]
    prompt_tokens: int


class LocalEngine:
    """Policies in this process, behind one thread that decodes."""

    def __init__(self, policies: Mapping[str, Policy], config: ServingConfig) -> None:
        self.policies, self.config = policies, config
        self.scheduler = Scheduler(policies, config.max_rows, config.max_cache_tokens)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="encoding")

    def start(self) -> None:
        """Begin to decode."""
        self.scheduler.start()

    def close(self) -> None:
        """End the thread that decodes."""
        self.scheduler.close()
        self._reader.shutdown(wait=False)

    @property
    def models(self) -> dict[str, str]:
        """Return the policies' names and fingerprints."""
        return {name: policy.fingerprint for name, policy in self.policies.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Return how many answers are being written, and how many wait."""
        return self.scheduler.counts

    async def whole(self, request: Chat | Completion) -> dict[str, Any]:
        """Answer a request. A call that is cancelled is not written any further."""
        ready = await self._prepared(request)
        try:
            self.scheduler.submit(ready.choices)
            received = [piece async for piece in _until_done(ready.job)]
        finally:
            ready.job.gone = True
        parts = pieces.joined(received)
        counts = pieces.usage(ready.prompt_tokens, parts)
        if isinstance(request, Chat):
            return pieces.chat_answer(ready.about, parts, request.logprobs, counts)
        return pieces.text_answer(ready.about, parts, request.logprobs is not None, counts)

    async def stream(self, request: Chat | Completion) -> AsyncGenerator[dict[str, Any]]:
        """Yield an answer's chunks. An iterator that is closed ends the writing."""
        ready = await self._prepared(request)
        written: dict[int, int] = {}  # characters of each choice
        last: dict[int, Piece] = {}
        try:
            self.scheduler.submit(ready.choices)
            async for piece in _until_done(ready.job):
                first, offset = piece.index not in written, written.get(piece.index, 0)
                written[piece.index], last[piece.index] = offset + len(piece.text), piece
                if isinstance(request, Chat):
                    yield pieces.chat_chunk(ready.about, piece, request.logprobs, first)
                else:
                    yield pieces.text_chunk(ready.about, piece, request.logprobs is not None, offset)
        finally:
            ready.job.gone = True
        if request.usage:
            kind = "chat.completion.chunk" if isinstance(request, Chat) else "text_completion"
            yield pieces.usage_chunk(ready.about, kind, pieces.usage(ready.prompt_tokens, [*last.values()]))

    # -- requests ----------------------------------------------------------------------------------------------

    def policy(self, name: str | None) -> Policy:
        """Return the policy of a name; without a name the only one. Raises Wrong (404)."""
        if name is None and len(self.policies) == 1:
            return next(iter(self.policies.values()))
        if name is None or name not in self.policies:
            known = ", ".join(self.policies)
            raise Wrong(f"model: no policy {short(repr(name))} is here; choose one of {known}", "model", 404)
        return self.policies[name]

    async def _prepared(self, request: Chat | Completion) -> Prepared:
        policy = self.policy(request.model)
        work = asyncio.get_running_loop().run_in_executor
        if isinstance(request, Chat):
            prompts = [await work(self._reader, _encode_chat, policy, request)]
        else:
            prompts = await work(self._reader, _encode_prompts, policy, request)
        job, sampling = Job(policy.name), request.sampling
        seed = secrets.randbelow(2**31) if sampling.seed is None else sampling.seed
        choices: list[Choice] = []
        for prompt in prompts:
            most = self._most_tokens(policy, prompt, request)
            for _ in range(sampling.n):
                row = _row(prompt, most, sampling, seed + len(choices), request)
                choices.append(_choice(policy, job, len(choices), row, request))
        kind = "chatcmpl" if isinstance(request, Chat) else "cmpl"
        about = About(
            f"{kind}-{secrets.token_hex(12)}", int(time.time()), policy.name, f"fp_{policy.fingerprint[:16]}", seed
        )
        return Prepared(about, job, choices, sum(map(len, prompts)))

    def _most_tokens(self, policy: Policy, prompt: list[int], request: Chat | Completion) -> int:
        """Return how many tokens an answer may have. Raises Wrong where there is no room for them."""
        field = "messages" if isinstance(request, Chat) else "prompt"
        room = min(policy.most_tokens, self.config.max_cache_tokens) - len(prompt)
        asked, most = request.sampling.max_tokens, self.config.max_answer_tokens
        if asked is None:
            asked = min(most, max(room, 1)) if isinstance(request, Chat) else min(most, COMPLETION_TOKENS)
        if asked > most:
            raise Wrong(f"max_tokens={asked}: this server writes at most {most} tokens", "max_tokens")
        if asked > room:
            total = room + len(prompt)
            raise Wrong(
                f"{field}: {len(prompt)} tokens, and {asked} to be written; {policy.name} has room for {total} in all",
                field,
            )
        return asked


async def _until_done(job: Job) -> AsyncIterator[Piece]:
    while (piece := await job.next()) is not None:
        yield piece


def _row(prompt: list[int], most: int, sampling: Sampling, seed: int, request: Chat | Completion) -> Row:
    top = request.logprobs
    if isinstance(request, Chat):
        top = request.top_logprobs if request.logprobs else None
    return Row(prompt, most, sampling.temperature, sampling.top_p, seed, top)


def _choice(policy: Policy, job: Job, index: int, row: Row, request: Chat | Completion) -> Choice:
    stops, stream = request.sampling.stop, request.stream
    if isinstance(request, Chat):
        return Choice(job, index, row, policy.chat_writing(stops, at_once=not stream), stream)
    writing = policy.text_writing(row.prompt, stops, at_once=not stream)
    given = request.prompts[index // request.sampling.n]
    echo = (given if isinstance(given, str) else policy.prompt_text(row.prompt)) if request.echo else ""
    return Choice(job, index, row, writing, stream, request.echo and row.top is not None, echo)


def _encode_chat(policy: Policy, request: Chat) -> list[int]:
    _check_letters(policy, sum(len(message["content"]) for message in request.messages), "messages")
    try:
        return policy.encode(request.messages)
    except InputError as error:
        raise Wrong(f"messages: {error}", "messages") from None


def _encode_prompts(policy: Policy, request: Completion) -> list[list[int]]:
    encoded = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            _check_letters(policy, len(prompt), "prompt")
            ids: list[int] = policy.tokenizer.encode(prompt)
        else:
            ids = list(prompt)
            if max(ids) >= policy.vocabulary:
                raise Wrong(f"prompt: token {max(ids)}; {policy.name} has {policy.vocabulary} tokens", "prompt")
        if not ids:
            raise Wrong("prompt: no token; send some text", "prompt")
        encoded.append(ids)
    return encoded


def _check_letters(policy: Policy, letters: int, field: str) -> None:
    """Refuse a text of megabytes before it is encoded."""
    if letters > policy.most_tokens * policy.longest_token:
        raise Wrong(f"{field}: {letters} characters; {policy.name} reads {policy.most_tokens} tokens", field, 413)
