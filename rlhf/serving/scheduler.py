"""One thread that owns the policies' models: requests wait in line, join between two steps, and leave when they end.

A policy's requests are admitted first come, first served; policies take turns, a step each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rlhf.run.http import Refused, place_of
from rlhf.serving.decoder import PREFILL_TOKENS, Decoder, Drawn, Row, scored_prompts
from rlhf.serving.pieces import Piece, Scored
from rlhf.serving.policies import Policy
from rlhf.serving.text import Writing

log = logging.getLogger("rlhf")


class Job:
    """One request: its pieces arrive in the event loop that made it; None is the last."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.gone = False
        """Set by whoever waits, once nobody does any more."""
        self.open = 0
        """Choices that are not yet finished."""
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | Refused | None] = asyncio.Queue()

    async def next(self) -> Piece | None:
        """Wait for the next piece; None after the last one. Raises Refused where the work failed."""
        piece = await self._pieces.get()
        if isinstance(piece, Refused):
            raise piece
        return piece

    def send(self, pieces: Iterable[Piece | Refused | None]) -> None:
        """Hand pieces over, from the thread that writes."""

        def put() -> None:
            for piece in pieces:
                self._pieces.put_nowait(piece)

        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(put)


@dataclass(eq=False)
class Choice:
    """One answer of a request, as tokens (`row`) and as text."""

    job: Job
    index: int
    row: Row
    writing: Writing
    stream: bool
    """Whether its text is sent piece by piece."""
    scored: bool = False
    """Whether the prompt's tokens are scored, too."""
    text: str = ""
    """Text that has not been sent; at first the prompt, where the answer begins with it."""
    tokens: list[Scored] = field(default_factory=list)
    """Scored tokens that have not been sent."""


class Scheduler:
    """The line before the models, and the thread. `close` ends it."""

    def __init__(self, policies: Mapping[str, Policy], most_rows: int, most_columns: int) -> None:
        self.policies = policies
        self.decoders = {
            name: Decoder(policy.model, policy.pad_id, most_rows, most_columns) for name, policy in policies.items()
        }
        self._waiting: dict[str, deque[Choice]] = {name: deque() for name in policies}
        self._active: dict[Row, Choice] = {}
        self._outbox: dict[Job, list[Piece | Refused | None]] = {}
        self._news = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; requests that are not answered by then never are."""
        with self._news:
            self._ended = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join(30)

    def submit(self, choices: list[Choice]) -> None:
        """Take on the choices of one request."""
        job = choices[0].job
        job.open = len(choices)
        with self._news:
            self._waiting[job.policy].extend(choices)
            self._news.notify()

    @property
    def counts(self) -> dict[str, int]:
        """Return how many answers are being written, and how many wait."""
        return {"writing": len(self._active), "waiting": sum(map(len, self._waiting.values()))}

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._ended or self._active or any(self._waiting.values()))
                if self._ended:
                    return
            for name in self.policies:
                try:
                    self._turn(name)
                except Exception as error:  # to the clients only: the error may quote their text
                    log.error("decoding failed: %s in %s", type(error).__name__, place_of(error))
                    self._fail(name, error)
                for job, pieces in self._outbox.items():
                    job.send(pieces)
                self._outbox = {}

    def _turn(self, name: str) -> None:
        """Let finished and abandoned rows leave, admit what fits, and write one token of every row."""
        decoder = self.decoders[name]
        for row in decoder.rows:
            if self._active[row].job.gone:
                self._end(self._active[row])
        decoder.leave()
        joining = self._taken(name)
        self._active |= {choice.row: choice for choice in joining}
        self._score(name, [choice for choice in joining if choice.scored])
        for choice in joining:
            if choice.row.max_tokens == 0:
                self._send(choice, "length")
        writing = [choice.row for choice in joining if not choice.row.done]
        if writing:
            self._write(decoder.admit(writing))
            decoder.leave()
        if decoder.rows:
            self._write(decoder.step())
            decoder.leave()

    def _taken(self, name: str) -> list[Choice]:
        """Take the first of the line that fit together: into the cache, and their prompts into one forward."""
        line = self._waiting[name]
        taken: list[Choice] = []
        prompts: dict[int, int] = {}
        while line:
            choice, row = line[0], line[0].row
            if choice.job.gone:
                line.popleft()
                continue
            prompts[id(row.prompt)] = len(row.prompt)
            padded = len(prompts) * max(prompts.values())
            if not self.decoders[name].fits(row, [one.row for one in taken]) or (taken and padded > PREFILL_TOKENS):
                break
            taken.append(line.popleft())
        return taken

    def _score(self, name: str, choices: list[Choice]) -> None:
        """Score the tokens of prompts."""
        policy = self.policies[name]
        if not choices:
            return
        top = max(choice.row.top or 0 for choice in choices)
        prompts = [choice.row.prompt for choice in choices]
        for choice, tokens in zip(choices, scored_prompts(policy.model, prompts, policy.pad_id, top), strict=True):
            choice.tokens.append(Scored(policy.token_text(choice.row.prompt[0]), None))
            choice.tokens += [self._told(policy, token, choice.row.top) for token in tokens]

    def _write(self, drawn: list[tuple[Row, Drawn]]) -> None:
        """Turn drawn tokens into text, and send what is to be sent."""
        for row, token in drawn:
            choice = self._active[row]
            policy = self.policies[choice.job.policy]
            if row.top is not None:  # of the token that ends it, too: it was drawn like the others
                choice.tokens.append(self._told(policy, token, row.top))
            if token.id in policy.stop_ids:
                choice.text += choice.writing.end(stopped=True)[0]
                self._send(choice, "stop")
                continue
            text, cut = choice.writing.add(token.id)
            choice.text += text
            if not cut and row.written == row.max_tokens:
                rest, cut = choice.writing.end(stopped=False)
                choice.text += rest
                if not cut:
                    self._send(choice, "length")
                    continue
            if cut:
                self._cut(choice)
                self._send(choice, "stop")
            elif choice.stream and choice.text:
                self._send(choice, None)

    def _told(self, policy: Policy, token: Drawn, top: int | None) -> Scored:
        likely = tuple((policy.token_text(i), logprob) for i, logprob in token.top[:top])
        return Scored(policy.token_text(token.id), token.logprob, likely)

    def _cut(self, choice: Choice) -> None:
        """Leave out the tokens that begin after the end of the text: those of the stop text."""
        place, kept = 0, 0
        for token in choice.tokens:
            if place >= len(choice.text):
                break
            place, kept = place + len(token.text), kept + 1
        del choice.tokens[kept:]

    def _send(self, choice: Choice, finish: str | None) -> None:
        piece = Piece(choice.index, choice.text, tuple(choice.tokens), finish, choice.row.written)
        choice.text, choice.tokens = "", []
        outbox = self._outbox.setdefault(choice.job, [])
        outbox.append(piece)
        if finish is not None:
            self._end(choice)
            choice.job.open -= 1
            if choice.job.open == 0:
                outbox.append(None)

    def _end(self, choice: Choice) -> None:
        choice.row.done = True
        self._active.pop(choice.row, None)

    def _fail(self, name: str, error: Exception) -> None:
        """Give up all that a policy is writing."""
        for choice in [choice for choice in self._active.values() if choice.job.policy == name]:
            if not choice.job.gone:
                problem = Refused(500, f"decoding failed: {type(error).__name__}: {error}")
                self._outbox.setdefault(choice.job, []).append(problem)
            choice.job.gone = True
            self._end(choice)
        self.decoders[name].clear()
