"""A queue of requests before the one thread that scores: first come, first served, joined while they fit one
forward."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rlhf.errors import InputError
from rlhf.rows.messages import Messages
from rlhf.run.http import HttpConfig, Refused, place_of
from rlhf.run.slots import Slots

logger = logging.getLogger(__name__)

Scorer = Callable[[list[Messages]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class ServerConfig(HttpConfig):
    """Limits of a scoring server."""

    max_queue: int = 256
    """Requests in the server at a time (being read, waiting or being scored); a further one gets status 503. The server
    may need max_queue times max_body_bytes of memory."""
    max_conversations: int = 1024
    """Conversations in one request."""
    max_batch_tokens: int = 16384
    """Padded tokens per forward (a memory setting), and so the length of the longest conversation."""
    join_requests: bool = True
    """Score requests of several clients in one forward; false: other requests don't change a score by a single bit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_queue", "max_conversations", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")


class _Job:
    """One request that waits for the scoring thread."""

    def __init__(self, conversations: list[Messages]) -> None:
        self.conversations = conversations
        self.lengths: list[int] = []
        self.scores: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()


class ScoringQueue:
    """Requests, first come, first served, in batches for one thread. Everything else runs on the event loop."""

    def __init__(self, scorer: Scorer, count_tokens: Callable[[Messages], int], config: ServerConfig) -> None:
        self._scorer, self._count_tokens, self._config = scorer, count_tokens, config
        self._waiting: list[_Job] = []
        self._news = asyncio.Event()
        self.slots = Slots(config.max_queue, config.max_body_seconds, full=503)

    @property
    def waiting(self) -> int:
        """Number of requests that have been read and are waiting or being scored."""
        return len(self._waiting)

    async def score(self, conversations: list[Messages]) -> list[float]:
        """Wait for the conversations' scores. A call that is cancelled while it waits is never scored."""
        if not conversations:
            return []
        job = _Job(conversations)
        self._waiting.append(job)
        self._news.set()
        return await job.scores

    async def work(self) -> None:
        """Score what fits one forward, again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="scoring") as thread:
            while True:
                self._waiting = [job for job in self._waiting if not job.scores.done()]  # drop hung-up clients' jobs
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
        """Return the first jobs that fit one forward together (at least one), and the refusals of invalid ones."""
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
            except Exception as error:  # only this client's text can be the cause
                raise Refused(400, f"conversation {number} cannot be encoded: {error}") from error
            if tokens > most:
                raise Refused(413, f"conversation {number}: {tokens} tokens; this server takes {most}")
            lengths.append(tokens)
        return lengths

    def _score(self, batch: list[_Job]) -> list[list[float] | Refused]:
        """Return the scores of each job, or why there are none. A job that fails does not fail the others."""
        conversations = [messages for job in batch for messages in job.conversations]
        try:
            scores = [float(score) for score in self._scorer(conversations)]
            if len(scores) != len(conversations):
                raise ValueError(f"{len(scores)} scores for {len(conversations)} conversations")
        except Exception as error:
            if len(batch) > 1:
                return [self._score([job])[0] for job in batch]
            # to the client only: the error may quote its text
            logger.error("scoring failed: %s in %s", type(error).__name__, place_of(error))
            return [Refused(500, f"scoring failed: {type(error).__name__}: {error}")]
        answers: list[list[float] | Refused] = []
        for job in batch:
            own, scores = scores[: len(job.conversations)], scores[len(job.conversations) :]
            bad = next((n for n, score in enumerate(own) if not math.isfinite(score)), None)
            if bad is None:
                answers.append(own)
                continue
            logger.error("a conversation scored %s, no finite number", own[bad])
            answers.append(Refused(500, f"conversation {bad + 1} scored {own[bad]}, no finite number"))
        return answers
