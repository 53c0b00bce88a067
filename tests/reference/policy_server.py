"""A policy's server in a thread, and an engine that answers with given texts."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from rlhf.run.connections import Server, quiet_logs
from rlhf.run.http import bind
from rlhf.serving import pieces
from rlhf.serving.app import Service, create_app
from rlhf.serving.pieces import About, Piece
from rlhf.serving.wire import Chat, Completion

Speaker = Callable[[str, str, int], str]
"""From the policy's name, the last message and a seed to an answer."""


def echoing(policy: str, question: str, seed: int) -> str:
    return f"{policy} heard: {question}"


class ScriptedEngine:
    """Answers with what `speak` returns, word by word."""

    def __init__(self, names: tuple[str, ...] = ("sft", "ppo"), speak: Speaker = echoing, pause: float = 0.0) -> None:
        self.models = {name: f"fingerprint of {name}" for name in names}
        self.counts = {"writing": 0, "waiting": 0}
        self.speak, self.pause = speak, pause
        self.asked: list[Chat | Completion] = []
        self.left = 0
        """Answers that were given up before their end."""

    def start(self) -> None: ...

    def close(self) -> None: ...

    def _about(self, request: Chat | Completion) -> About:
        self.asked.append(request)
        seed = 7 if request.sampling.seed is None else request.sampling.seed
        return About(f"id-{len(self.asked)}", 1, request.model or next(iter(self.models)), "fp", seed)

    async def whole(self, request: Chat | Completion) -> dict[str, Any]:
        about = self._about(request)
        chat, n = isinstance(request, Chat), request.sampling.n
        asked = [request.messages[-1]["content"]] if isinstance(request, Chat) else [str(p) for p in request.prompts]
        texts = [self.speak(about.model, text, about.seed + k) for k, text in enumerate(asked * n)]
        parts = [Piece(place, text, (), "stop", len(text.split())) for place, text in enumerate(texts)]
        self.left += 1
        await asyncio.sleep(self.pause * 10)
        self.left -= 1
        write = pieces.chat_answer if chat else pieces.text_answer
        return write(about, parts, False, pieces.usage(3, parts))

    async def stream(self, request: Chat | Completion) -> AsyncIterator[dict[str, Any]]:
        assert isinstance(request, Chat)
        about, self.left = self._about(request), self.left + 1
        words = self.speak(about.model, request.messages[-1]["content"], about.seed).split(" ")
        for place, word in enumerate(words):
            text = word if place == 0 else f" {word}"
            yield pieces.chat_chunk(about, Piece(0, text), False, place == 0)
            await asyncio.sleep(self.pause)
        yield pieces.chat_chunk(about, Piece(0, "", (), "stop", len(words)), False, False)
        self.left -= 1


@contextlib.contextmanager
def serving(service: Service, token: str | None = None) -> Iterator[str]:
    """Start the server in a thread; yield its URL."""
    server = Server(create_app(service, token), service.config)
    listening = bind("127.0.0.1", 0)

    def run() -> None:
        with quiet_logs():
            server.run(sockets=[listening])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    end = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(happened: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)
