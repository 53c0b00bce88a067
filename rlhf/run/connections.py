"""Run a server whose connections are bounded: in number, and in the time that a client may let it wait.

uvicorn speaks HTTP; it waits for ever for a request's head, and accepts until no file can be opened any more. Here a
connection has a deadline for each request's head and for taking an answer, and connections are accepted one by one,
below the limit of open files. At the limit, those whose request hasn't arrived make room, the oldest first: a client
that sends its request is served while many others send nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf.run.http import HEADERS, App, HttpConfig, place_of

log = logging.getLogger("rlhf")

HEAD_PATIENCE, BODY_PATIENCE = 0.1, 0.5  # seconds that a client has to send a head or a body while others wait
BACKLOG = 2048
SPARE_FILES = 64  # for everything but connections


class Connection(H11Protocol):
    """A connection with deadlines."""

    def __init__(self, limits: HttpConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.limits = limits
        self.since = time.monotonic()
        self.deadline: asyncio.TimerHandle | None = None
        self.stalled: asyncio.TimerHandle | None = None

    @property
    def owes_head(self) -> bool:
        """Return whether the next request's head has not arrived: nothing is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def overdue(self, now: float) -> float:
        """Return how long its client has kept it waiting, in units of what is patient; 0 while it is the server's
        turn."""
        if self.owes_head:
            return (now - self.since) / HEAD_PATIENCE
        return (now - self.since) / BODY_PATIENCE if self.cycle.more_body else 0.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.deadline, self.stalled):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._head_is_here()

    def on_response_complete(self) -> None:
        before = self.cycle
        self._await_head()
        super().on_response_complete()  # it goes on with a request that has arrived already
        if self.cycle is not before:
            self._head_is_here()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(self.limits.max_body_seconds, self._end_stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stalled is not None:
            self.stalled.cancel()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def make_room(self) -> None:
        """End the connection, because others wait."""
        log.warning("connections are at their limit: those whose request doesn't arrive are closed")
        self.transport.abort()

    def _await_head(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        self.since = time.monotonic()
        self.deadline = self.loop.call_later(self.limits.max_head_seconds, self._end_unfinished)

    def _head_is_here(self) -> None:
        self.since = time.monotonic()
        if self.deadline is not None and not self.owes_head:
            self.deadline.cancel()

    def _end_unfinished(self) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:  # it has begun to send a head
            log.warning("requests did not arrive in time: their connections are closed")
            self._refuse(408, f"the request's head did not arrive in {self.limits.max_head_seconds:g} seconds")
        self.transport.abort()

    def _end_stalled(self) -> None:
        log.warning("answers were not taken in time: their connections are closed")
        self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        headers = [(name, value) for name, value in HEADERS.items()]
        headers += [("Content-Type", "text/plain; charset=utf-8"), ("Connection", "close")]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=message.encode()),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server with connections that are accepted here."""

    def __init__(self, app: App, limits: HttpConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                interface="asgi3",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
            )
        )
        self.limits = limits
        self.most = _connections(limits.max_connections)
        self.accepting: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept connections."""
        asyncio.get_running_loop().set_exception_handler(_log_loop_error)
        for listening in sockets or []:
            listening.setblocking(False)
            listening.listen(BACKLOG)
        await super().startup(sockets=[])
        self.accepting = [asyncio.create_task(self._accept(listening)) for listening in sockets or []]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more; what was taken on by then is answered."""
        for task in self.accepting:
            task.cancel()
        await asyncio.gather(*self.accepting, return_exceptions=True)
        await super().shutdown(sockets)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while len(self.server_state.connections) >= self.most:
                await self._make_room()
            try:
                client, _ = await loop.sock_accept(listening)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("no connection can be accepted: %s", error.strerror)
                    await self._make_room()
                continue
            try:
                await loop.connect_accepted_socket(self._connection, client)
            except OSError:
                client.close()

    async def _make_room(self) -> None:
        """Close the connection that has kept the server waiting longest, or wait a moment."""
        now = time.monotonic()
        connections: Any = self.server_state.connections
        slowest = max(connections, key=lambda one: one.overdue(now), default=None)
        if slowest is None or slowest.overdue(now) < 1:
            await asyncio.sleep(HEAD_PATIENCE / 4)
            return
        slowest.make_room()
        await asyncio.sleep(0)  # it is closed in the loop's next turn

    def _connection(self) -> Connection:
        return Connection(
            self.limits, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def _connections(most: int) -> int:
    """Return how many connections the limit of open files allows, which is raised as far as it goes."""
    try:
        import resource
    except ImportError:  # Windows
        return most
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + SPARE_FILES + _open_files()
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = min(most, soft - SPARE_FILES - _open_files())
    return max(most, 8)


def _open_files() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(folder))
    return 64


# ---------------------------------------------------------------- quiet logs


class OnePerKind(logging.Filter):
    """Let one line of a kind through in `seconds`, and say in the next one how many were left out.

    A kind is the place in the code that logs it. Of an exception only its type and place are kept: its message may hold
    a client's text.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.kinds: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown; it may come by a logger and by its handler."""
        if getattr(record, "is_shown", False):
            return True
        kind, now = (record.pathname, record.lineno), time.monotonic()
        last, left_out = self.kinds.get(kind, (-self.seconds, 0))
        if now - last < self.seconds:
            self.kinds[kind] = last, left_out + 1
            return False
        self.kinds[kind] = now, 0
        text = record.getMessage().strip()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {type(record.exc_info[1]).__name__} in {place_of(record.exc_info[1])}"
        record.msg = text + (f" ({left_out} more like it since the last)" if left_out else "")
        record.args, record.exc_info, record.exc_text, record.is_shown = (), None, None, True
        return True


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    what = f"{type(error).__name__} in {place_of(error)}" if isinstance(error, BaseException) else "no exception"
    log.error("the event loop: %s: %s", context["message"], what)


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Log one line per kind, of whatever a server runs on."""
    loggers = [logging.getLogger(name) for name in ("", "rlhf", "reward_models", "uvicorn.error", "asyncio")]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    places = [*loggers[1:], *handlers, *([logging.lastResort] if logging.lastResort else [])]
    quiet = OnePerKind()
    for place in places:
        place.addFilter(quiet)
    try:
        yield
    finally:
        for place in places:
            place.removeFilter(quiet)


def run(app: App, limits: HttpConfig, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; what was taken on by then is still answered."""
    server = Server(app, limits)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn repeats the signal once all is answered
    with quiet_logs(), contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
