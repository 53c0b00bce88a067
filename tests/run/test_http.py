"""What a server does with strangers, over real sockets: deadlines, a limit of connections, Host, Origin, token."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from rlhf.errors import InputError
from rlhf.run.connections import OnePerKind, Server, quiet_logs
from rlhf.run.http import HEADERS, Guard, HttpConfig, bind, checked_token, is_expected, read_body, server_token

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


def application(config: HttpConfig, token: str | None = None) -> Guard:
    """Answer with the number of bytes that came; /fails raises."""

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        if scope["path"] == "/fails":
            raise ZeroDivisionError("the client's own words")
        size = len(await read_body(Request(scope, receive), config))
        await PlainTextResponse(str(size))(scope, receive, send)

    return Guard(app, config, token)


@contextlib.contextmanager
def serving(token: str | None = None, **limits) -> Iterator[int]:
    """Start a server in a thread; yield its port."""
    config = HttpConfig(**limits)
    server = Server(application(config, token), config)
    listening = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    end = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.005)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def send(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(data)
    return connection


def answer(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    received = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


def ask(port: int, path: str = "/", method: str = "GET", body: bytes | None = None, **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


# -- deadlines and limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begun", "size"), [(HEAD + b"X-A: ", 150), (b"", 150), (HEAD + b"Content-Length: 9\r\n\r\n{", 40)]
)
def test_an_honest_request_is_answered_while_many_send_nothing(begun, size, caplog):
    with serving(max_connections=20) as port:
        crowd = [send(port, begun) for _ in range(size)]
        before = time.monotonic()
        assert ask(port, method="POST", body=b"three")[:2] == (200, b"5")
        assert time.monotonic() - before < 2  # 8 rounds of 0.1 s, or 2 of 0.5 s
        for connection in crowd:
            connection.close()
    assert {record.getMessage() for record in caplog.records} == {
        "connections are at their limit: those whose request doesn't arrive are closed"
    }


def test_a_head_has_a_deadline_that_drips_do_not_move():
    with serving(max_head_seconds=0.4) as port:
        before = time.monotonic()
        silent, partial, dripping = send(port, b""), send(port, HEAD), send(port, HEAD + b"X-A: ")
        with contextlib.suppress(OSError):
            while time.monotonic() - before < 3:
                dripping.sendall(b"a")
                time.sleep(0.05)
        assert time.monotonic() - before < 1.5
        assert answer(silent) == b""
        assert answer(partial).startswith(b"HTTP/1.1 408 ")


def test_a_connection_serves_several_requests_and_is_closed_when_idle():
    with serving(max_head_seconds=0.4) as port:
        before = time.monotonic()
        kept = send(port, (HEAD + b"Content-Length: 2\r\n\r\nab") * 2)  # the second before the first is answered
        time.sleep(0.2)
        kept.sendall(HEAD + b"Content-Length: 1\r\n\r\na")
        received = answer(kept)
        assert 0.5 < time.monotonic() - before < 3
    assert received.count(b"200 OK") == 3
    assert [part.splitlines()[-1][:1] for part in received.split(b"HTTP/1.1 200 OK")[1:]] == [b"2", b"2", b"1"]


def test_a_body_has_a_deadline_and_a_size():
    with serving(max_body_seconds=0.3, max_body_bytes=1000, max_head_seconds=0.4) as port:
        said = answer(send(port, HEAD + b"Content-Length: 9\r\n\r\n{"))
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b'{"error": "the body did not arrive in 0.3 seconds"}' in said
        before = time.monotonic()
        refused = answer(send(port, HEAD + b"Content-Length: 1001\r\n\r\n{"))  # the rest never comes
        assert refused.startswith(b"HTTP/1.1 413 ")
        assert time.monotonic() - before < 3
        endless = send(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(20):
                endless.sendall(b"64\r\n" + b"a" * 100 + b"\r\n")
        assert answer(endless).startswith(b"HTTP/1.1 413 ")
        assert ask(port, method="POST", body=b"a" * 1000)[:2] == (200, b"1000")


def test_malformed_requests_are_refused_and_logged_once(caplog):
    with serving() as port, quiet_logs():
        for garbage in (b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", HEAD * 2000) * 20:
            with contextlib.suppress(OSError):  # closed before all of it is sent
                said = answer(send(port, garbage))
                assert said.startswith(b"HTTP/1.1 400 ") or len(garbage) > 1000
        assert ask(port)[0] == 200
    assert [record.getMessage() for record in caplog.records] == ["Invalid HTTP request received."]


# -- who may ask -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True), ("LOCALHOST:8000", True), ("127.0.0.1:8000", True), ("[::1]:80", True), ("[::1]", True),
        ("10.0.0.7", True), ("gpu-node-3:8000", True), ("app.localhost", True), ("scores.example.org", True),
        ("scores.example.org.:80", True), ("evil.example", False), ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("1.2.3", False), ("", False),
        ("evil.example@127.0.0.1", False), ("127.0.0.1/evil.example", False), ("a b", False), ("[::1].evil.c", False),
        ("localhost:80:80", False), ("scores.example.org.evil.example", False),
    ],
)  # fmt: skip
def test_hosts(host, expected):
    assert is_expected(host, {"scores.example.org"}) == expected


def test_requests_of_other_sites_are_refused_with_and_without_a_token():
    for token in (None, "s3cret"):
        with serving(token, allowed_hosts=["scores.example.org"]) as port:
            own, given = f"localhost:{port}", {"Authorization": f"Bearer {token}"} if token else {}
            for path in ("/", "/health", "/nowhere/"):
                status, said, headers = ask(port, path, Host=f"evil.example:{port}", **given)
                assert (status, headers["Location"]) == (403, None)
                assert "--allowed_hosts" in json.loads(said)["error"]
                for origin in ("https://evil.example", "null", "http://localhost:1", f"http://{own}.evil.example", ""):
                    status, said, headers = ask(port, path, "POST", Host=own, Origin=origin, **given)
                    assert (status, headers["Access-Control-Allow-Origin"]) == (403, None), origin
                    assert "may not ask" in json.loads(said)["error"]
            assert ask(port, method="OPTIONS", Host=own, Origin="https://evil.example", **given)[0] == 403
            for host, origin in [(own, f"http://{own}"), ("scores.example.org", "https://scores.example.org")]:
                assert ask(port, method="POST", Host=host, Origin=origin, **given)[0] == 200
                assert ask(port, Host=host, **given)[0] == 200
            assert answer(send(port, b"GET / HTTP/1.0\r\n\r\n"))[9:12] == (b"401" if token else b"200")


def test_the_token():
    with serving("s3cret") as port:
        for wrong in (None, "s3cret", "Basic s3cret", "Bearer", "Bearer s3cre", "Bearer s3crets", "Bearer \xe9"):
            status, said, headers = ask(port, **({} if wrong is None else {"Authorization": wrong}))
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer"), wrong
            assert b"s3cret" not in said
        assert ask(port, Authorization="bearer s3cret")[0] == ask(port, "/health")[0] == 200


def test_every_answer_keeps_browsers_from_doing_more_with_it(caplog):
    with serving("s3cret", max_body_bytes=10) as port:
        token = {"Authorization": "Bearer s3cret"}
        answers = [ask(port, **token), ask(port), ask(port, Host="evil.example"), ask(port, "/fails", **token)]
        answers.append(ask(port, method="POST", body=b"a" * 11, **token))
        raw = answer(send(port, b"GARBAGE\r\n\r\n")).decode()
    assert [status for status, _, _ in answers] == [200, 401, 403, 500, 413]
    for _, _, headers in answers:
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; frame-ancestors 'none'")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Server"] is None
    for name, value in HEADERS.items():
        assert f"{name.lower()}: {value}" in raw.lower().replace(value.lower(), value)
    assert json.loads(answers[3][1]) == {"error": "the server failed: ZeroDivisionError"}


def test_neither_texts_nor_paths_nor_tokens_are_logged(caplog):
    with serving("s3cret") as port:
        assert ask(port, "/fails?of=mine", Authorization="Bearer s3cret")[0] == 500
        assert ask(port, "/other%0Aplace", Authorization="Bearer wr0ng")[0] == 401
    (record,) = caplog.records
    assert record.getMessage().startswith("a request failed: ZeroDivisionError in test_http.py:")
    assert record.exc_info is None


# -- logs --------------------------------------------------------------------------------------------------


def test_one_line_of_a_kind(caplog):
    shown = OnePerKind(seconds=0.2)
    logger = logging.getLogger("test_http")
    logger.addFilter(shown)
    try:
        for n in range(1000):
            logger.warning("line %d", n)
            if n == 500:
                try:
                    raise KeyError("the client's own words")
                except KeyError:
                    logger.exception("failed")
        time.sleep(0.3)
        for _ in range(2):
            logger.warning("another kind")
        for n in range(1000, 1002):
            if n == 1001:
                time.sleep(0.3)
            logger.warning("later")
    finally:
        logger.removeFilter(shown)
    assert [record.getMessage() for record in caplog.records] == [
        "line 0",
        caplog.records[1].getMessage(),
        "another kind",
        "later",
        "later",
    ]
    assert caplog.records[1].getMessage().startswith("failed: KeyError in test_http.py:")


def test_what_was_left_out_is_counted(caplog):
    shown = OnePerKind(seconds=0.2)
    logger = logging.getLogger("test_http")
    logger.addFilter(shown)
    try:
        for n in range(6):
            time.sleep(0.3 if n == 5 else 0)
            logger.warning("line %d", n)
    finally:
        logger.removeFilter(shown)
    assert [record.getMessage() for record in caplog.records] == ["line 0", "line 5 (4 more like it since the last)"]


# -- settings ----------------------------------------------------------------------------------------------


def test_settings(tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_SERVER_TOKEN", raising=False)
    for wrong, match in [
        ({"port": -1}, "port=-1 must be 0 to 65535"),
        ({"max_connections": 0}, "max_connections=0 must be at least 1"),
        ({"max_head_seconds": 0}, "max_head_seconds=0 must be above 0"),
        ({"allowed_hosts": ["http://x"]}, "allowed_hosts: 'http://x': write a name"),
    ]:
        with pytest.raises(InputError, match=match):
            HttpConfig(**wrong)
    for open_to_all in ("0.0.0.0", "::", "gpu-node-3", "10.0.0.7"):
        with pytest.raises(InputError, match="open to other machines, and there is no token"):
            server_token(HttpConfig(host=open_to_all))
        assert server_token(HttpConfig(host=open_to_all, allow_no_token=True)) is None
    assert [server_token(HttpConfig(host=host)) for host in ("localhost", "127.0.0.9", "::1")] == [None] * 3
    (tmp_path / "token").write_text(" s3cret\n")
    assert server_token(HttpConfig(token_file=str(tmp_path / "token"))) == "s3cret"
    with pytest.raises(InputError, match=r"token_file=.*: Is a directory; write the token into it"):
        server_token(HttpConfig(token_file=str(tmp_path)))
    monkeypatch.setenv("RLHF_SERVER_TOKEN", "fr0m the environment")
    with pytest.raises(InputError, match="RLHF_SERVER_TOKEN: a token is one word") as told:
        server_token(HttpConfig())
    assert "fr0m" not in str(told.value)
    for wrong in ("", "a b", "a\nb", "\xe9", "\x1b[31m"):
        with pytest.raises(InputError, match="here: a token is one word"):
            checked_token(wrong, "here")


def test_ports_and_hosts_that_cannot_be_bound():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, number in [("127.0.0.1", port), ("no.such.host.invalid", 0), ("a" * 100, 0), ("192.0.2.1", 0)]:
            with pytest.raises(InputError, match=f"host={host} port={number}: .*choose another --port or --host"):
                bind(host, number)
