"""An ASGI application on a port of its own, in a thread, and requests to it that no client of ours sends."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rlhf.run.connections import Server
from rlhf.run.http import App, HttpConfig, bind


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


@contextlib.contextmanager
def served(app: App, limits: HttpConfig, port: int = 0) -> Iterator[str]:
    """Serve an application, on any free port by default; yield its URL."""
    server, listening = Server(app, limits), bind("127.0.0.1", port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def call(url: str, path: str, body: Any = None, method: str = "", **headers: str) -> tuple[int, Any, Any]:
    """Send one request; return status, content (JSON where it is JSON) and headers. An object goes as JSON."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if isinstance(body, dict | list):
        body, named = json.dumps(body).encode(), {"Content-Type": "application/json", **named}
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, named)
        response = connection.getresponse()
        text = response.read().decode()
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text, response.headers
    finally:
        connection.close()
