"""What every server here does with strangers: whom it listens to, what it takes from them, what its answers carry.

`Guard` stands before an application: it checks Host and Origin, then the token, gives every answer the headers that
keep browsers from doing more with it, and answers what an application fails at. `read_body` bounds a request's body.
`rlhf.run.connections` bounds connections and runs the server. A server's settings extend `HttpConfig`.
"""

from __future__ import annotations

import asyncio
import hmac
import importlib.util
import ipaddress
import json
import logging
import os
import re
import socket
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import InputError, short

if TYPE_CHECKING:
    from starlette.requests import Request

log = logging.getLogger("rlhf")

TOKEN_VARIABLE = "RLHF_SERVER_TOKEN"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer that doesn't bring its own: a page with styles of its own brings its own policy."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """Where a server listens, and what it takes from its clients."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every network of this machine."""
    port: int = 8000
    """Port to listen on; 0: any free one, told when it is up."""
    token_file: str | None = None
    """File whose content clients must send as bearer token; default: the environment's RLHF_SERVER_TOKEN."""
    allow_no_token: bool = False
    """Let everybody in who reaches a host other than this machine itself."""
    allowed_hosts: list[str] | None = None
    """Domain names by which clients may address the server, besides IP addresses and names without a dot."""
    max_connections: int = 1024
    """Connections at a time (fewer where the limit of open files asks for it). More wait; those whose request doesn't
    arrive make room first."""
    max_head_seconds: float = 10.0
    """Seconds that a client may take to send a request's head, or to be idle."""
    max_body_bytes: int = 16 * 1024 * 1024
    """Bytes in one request."""
    max_body_seconds: float = 30.0
    """Seconds that a client may take to send its request's body, or to stop taking the answer."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"port={self.port} must be 0 to 65535")
        for name in ("max_connections", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_head_seconds", "max_body_seconds"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} must be above 0")
        for name in self.allowed_hosts or ():
            if not _HOST.fullmatch(name.lower()):
                raise InputError(f"allowed_hosts: {short(name)!r}: write a name such as scores.example.org")


class Refused(Exception):
    """An answer other than status 200: its status and one line of text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(short(message, 500))
        self.status = status


# ---------------------------------------------------------------- who may ask

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::\d{1,5})?")


def is_expected(host: str, allowed: Collection[str]) -> bool:
    """Return whether a request to this Host is meant for a server here, and not sent by a page of another site.

    A page whose own name was made to point here (DNS rebinding) has a name with a dot, and sends it.
    """
    found = _HOST.fullmatch(host.lower())
    if not found:
        return False
    name = found[1].strip("[]").rstrip(".")
    return "." not in name or name.endswith(".localhost") or _is_address(name) or name in allowed


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether only this machine itself reaches an address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def holds_token(header: str, token: str) -> bool:
    """Check an Authorization header, in a time that doesn't depend on how much of its token is right."""
    scheme, _, sent = header.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), token.encode())


def checked_token(text: str, where: str) -> str:
    """Return a token without outer white space. Raises InputError, which doesn't show it, unless it is one word."""
    token = text.strip()
    if not (token.isascii() and token.isprintable() and token and " " not in token):
        raise InputError(f"{where}: a token is one word of ASCII characters, for example from: openssl rand -hex 32")
    return token


def server_token(config: HttpConfig) -> str | None:
    """Return the token that clients must send. Raises InputError where a server open to others would have none."""
    if config.token_file is not None:
        try:
            text: str | None = Path(config.token_file).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise InputError(f"token_file={config.token_file}: {what}; write the token into it") from None
    else:
        text = os.environ.get(TOKEN_VARIABLE)
    if text is not None:
        return checked_token(text, config.token_file or TOKEN_VARIABLE)
    if config.allow_no_token or is_loopback(config.host):
        return None
    raise InputError(
        f"host={config.host} is open to other machines, and there is no token; name a --token_file or set "
        f"{TOKEN_VARIABLE} (or, if all may come in: --allow_no_token true)"
    )


class Guard:
    """An ASGI application that stands before another one.

    token: what clients must send as `Authorization: Bearer ...`; None: no token is needed. public: paths that need no
    token. refusal: makes the JSON of a refusal from its status and line.
    """

    def __init__(
        self,
        app: App,
        config: HttpConfig,
        token: str | None = None,
        public: Collection[str] = ("/health",),
        refusal: Callable[[int, str], Any] = lambda status, message: {"error": message},
    ) -> None:
        self.app, self.token, self.public, self.refusal = app, token, public, refusal
        self.hosts = {name.lower() for name in (socket.gethostname(), config.host, *(config.allowed_hosts or ()))}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = list(message.get("headers", ()))
                given = {name.lower() for name, _ in headers}
                own = ((name.lower().encode(), value.encode()) for name, value in HEADERS.items())
                message = {**message, "headers": [*headers, *((n, v) for n, v in own if n not in given)]}
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, receive, with_headers)
        except Refused as problem:
            await self._refuse(with_headers, problem.status, str(problem))
        except Exception as error:
            # neither the message nor the path: both may hold a client's text
            log.error("a request failed: %s in %s", type(error).__name__, place_of(error))
            if not started:
                await self._refuse(with_headers, 500, f"the server failed: {type(error).__name__}")

    def check(self, scope: Message) -> None:
        """Raise Refused for a request from another site's page, or without the token."""
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not is_expected(host, self.hosts):
            raise Refused(403, f"no server for the host {host!r:.80} is here; if it is, start it with --allowed_hosts")
        if origin is not None:
            site = origin.lower().partition("://")[2]
            found = _HOST.fullmatch(site)
            if not found or (site != (host or "").lower() and found[1] not in self.hosts):
                raise Refused(403, f"pages of {origin!r:.80} may not ask this server")
        if self.token is None or scope["path"] in self.public:
            return
        if not holds_token(headers.get("authorization", ""), self.token):
            raise Refused(401, "send the token: Authorization: Bearer TOKEN")

    async def _refuse(self, send: Send, status: int, message: str) -> None:
        body = json.dumps(self.refusal(status, message)).encode()
        headers: Mapping[str, str] = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **RETRY.get(status, {}),
        }
        named = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": named})
        await send({"type": "http.response.body", "body": body})


def place_of(error: BaseException) -> str:
    """Return the lines of code that an exception came from, the innermost first."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))


RETRY = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}
"""Further headers of a refusal, by its status."""


# ---------------------------------------------------------------- what is read


async def read_body(request: Request, config: HttpConfig, until: asyncio.Timeout | None = None) -> bytes:
    """Read a request's body. Raises Refused where it is too large (413) or too slow (408).

    until: a time-out that whoever else waits may move forward; the client is then asked to come again (503).
    """
    from starlette.requests import ClientDisconnect

    too_large = Refused(413, f"the body has more than {config.max_body_bytes} bytes; send fewer conversations")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > config.max_body_bytes:
        raise too_large
    loop, body = asyncio.get_running_loop(), bytearray()
    began = loop.time()
    try:
        async with until or asyncio.timeout(config.max_body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > config.max_body_bytes:
                    raise too_large
    except TimeoutError:
        if loop.time() - began < config.max_body_seconds:
            raise Refused(503, "others wait, and this request was still arriving; try again") from None
        raise Refused(408, f"the body did not arrive in {config.max_body_seconds:g} seconds") from None
    except ClientDisconnect:
        raise Refused(400, "the client hung up") from None  # nobody reads it
    return bytes(body)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address and doesn't listen yet.

    Raises InputError for a port in use, and where what serves it is not installed."""
    for package in ("fastapi", "uvicorn"):  # of the extra `server`
        if importlib.util.find_spec(package) is None:
            raise InputError(f"a server needs {package}: pip install 'rlhf-recipes[server]'")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, UnicodeError) as error:
        raise InputError(f"host={host} port={port}: {error}; choose another --port or --host") from None
    return listening
