"""Servers that answer with given bytes: cut, dripped, endless, or none."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def answering(*answers: bytes | None) -> Iterator[tuple[str, list[int]]]:
    """Start a server that answers with these bytes, one after the other (None: silence), and counts its calls."""
    calls: list[int] = []
    done = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.05)

    def loop():
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    answer = answers[min(len(calls), len(answers) - 1)]
                    calls.append(1)
                    if answer is None:
                        done.wait(5)
                    else:
                        connection.sendall(answer)
                        hang_up(connection)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", calls
    finally:
        done.set()
        thread.join(10)
        listening.close()


def hang_up(connection: socket.socket) -> None:
    """End an answer, and read what the client still sends: closed before that, what it has not read yet is lost."""
    connection.settimeout(1)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


def reply(text: str, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n{more}Connection: close\r\n\r\n{text}".encode()


@contextlib.contextmanager
def sending(pieces, pause: float) -> Iterator[str]:
    """Start a server that answers every request with these pieces, and waits between two of them."""
    done = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.05)

    def loop():
        while not done.is_set():
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    for piece in pieces():
                        connection.sendall(piece)
                        if done.wait(pause):
                            break

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        done.set()
        thread.join(10)
        listening.close()


def one_by_one(text: bytes):
    return lambda: (text[n : n + 1] for n in range(len(text)))


def endless(start: bytes, piece: bytes):
    return lambda: itertools.chain([start], itertools.repeat(piece))
