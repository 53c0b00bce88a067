"""The policy's server with an engine of given texts, over real sockets: who may ask, limits, streams, clients that
leave."""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import pytest
from reference.policy_server import ScriptedEngine, serving, wait_for

from rlhf.client import Client
from rlhf.errors import InputError, RunStopped
from rlhf.serving.app import PAGE, Service, Verdict
from rlhf.serving.config import ServingConfig

HELLO = [{"role": "user", "content": "Hello"}]
ASKED = {"model": "ppo", "messages": HELLO}


def call(url: str, path: str, body: object = None, method: str | None = None, **headers: str):
    """Return status, JSON (or text) and headers of one request, sent without our client."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, sent, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    return answer.status, json.loads(text) if text.startswith("{") else text, answer.headers


def test_a_client_of_ours_asks_in_every_way():
    with serving(Service(ScriptedEngine(), ServingConfig())) as url:
        client = Client(f"{url}/v1", model="ppo")
        assert client.models() == ["sft", "ppo"]
        assert [c.text for c in client.chat(HELLO, n=2)] == ["ppo heard: Hello"] * 2
        assert "".join(client.stream(HELLO)) == "ppo heard: Hello"
        assert client.complete("Once", seed=3)[0].text == "ppo heard: Once"
        assert client.named("sft").chat(HELLO)[0].text == "sft heard: Hello"
        with pytest.raises(InputError, match="serves sft, ppo; name one"):
            Client(url).chat(HELLO)
        with pytest.raises(InputError, match=r"unknown model sfd; did you mean sft\?"):
            client.named("sfd")


def test_a_stream_is_server_sent_events():
    with serving(Service(ScriptedEngine(), ServingConfig())) as url:
        status, text, headers = call(url, "/v1/chat/completions", {**ASKED, "stream": True})
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        *events, last, empty = text.split("\n\n")
        assert (last, empty) == ("data: [DONE]", "")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert {chunk["seed"] for chunk in chunks} == {7}
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "ppo heard: Hello"
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_no_token_no_entry():
    config = ServingConfig()
    with serving(Service(ScriptedEngine(), config), token="s3cret") as url:
        closed = ["/v1/models", "/v1/models/ppo", "/page/settings"]
        for path in closed:
            status, answer, headers = call(url, path)
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
            assert headers["www-authenticate"] == "Bearer"
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/moderations", "/v1/feedback"):
            assert call(url, path, ASKED)[0] == 401
            assert call(url, path, ASKED, Authorization="Bearer wrong")[0] == 401
        for path in ("/health", *PAGE):  # the page holds nothing; it asks for the token
            assert call(url, path)[0] == 200
        assert call(url, "/v1/models", Authorization="Bearer s3cret")[0] == 200
        with pytest.raises(InputError, match="401"):
            Client(url, "wrong", model="ppo").chat(HELLO)


def test_pages_of_other_sites_may_not_ask():
    with serving(Service(ScriptedEngine(), ServingConfig())) as url:
        status, answer, _ = call(url, "/v1/chat/completions", ASKED, Origin="http://evil.example")
        assert (status, answer["error"]["type"]) == (403, "permission_error")
        assert call(url, "/v1/models", Host="evil.example")[0] == 403
        assert call(url, "/v1/models", Origin=url)[0] == 200


def test_the_page_has_a_policy_without_inline_script():
    with serving(Service(ScriptedEngine(), ServingConfig())) as url:
        status, page, headers = call(url, "/")
        assert status == 200
        policy = headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "<script>" not in page
        assert " style=" not in page
        assert " on" not in page.replace(" on ", " ").partition("<body>")[2]  # no onclick and the like
        for file in resources.files("rlhf.serving").joinpath("page").iterdir():
            assert file.name == "chat.html" or call(url, f"/page/{file.name}")[0] == 200, file.name
        settings = call(url, "/page/settings")[1]
        assert settings["models"] == ["sft", "ppo"]
        assert settings["feedback"] is False


@pytest.mark.parametrize(
    ("path", "body", "status", "line"),
    [
        ("/v1/chat/completions", b"{", 400, "the body is no JSON"),
        ("/v1/chat/completions", b"\xff", 400, "the body is no JSON"),
        ("/v1/chat/completions", {"modle": "x"}, 400, "unknown field 'modle'; did you mean model?"),
        ("/v1/completions", {"prompt": 3}, 400, "prompt: got 3"),
        ("/v1/moderations", {"input": "x"}, 404, "no moderation model is here"),
        ("/v1/feedback", {"id": "12345678", "kind": "thumb", "consent": False, "thumb": 1}, 404, "keeps no feedback"),
        ("/v1/chat", {}, 404, "POST /v1/chat: Not Found"),
        ("/v1/models", {}, 405, "POST /v1/models: Method Not Allowed"),
        ("/v1/chat/completions", b"x" * 5000, 413, "the body has more than 4096 bytes"),
    ],
)
def test_a_refusal_is_one_line_in_openais_form(path, body, status, line):
    with serving(Service(ScriptedEngine(), ServingConfig(max_body_bytes=4096))) as url:
        found, answer, _ = call(url, path, body)
    assert found == status
    assert list(answer["error"]) == ["message", "type", "param", "code"]
    assert answer["error"]["message"].startswith(line) or line in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


def test_a_full_queue_is_told_and_the_client_comes_again():
    engine = ScriptedEngine(pause=0.05)
    service = Service(engine, ServingConfig(max_queue=1))
    with serving(service) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(call, url, "/v1/chat/completions", ASKED)
        wait_for(lambda: engine.left == 1)
        status, answer, headers = call(url, "/v1/chat/completions", ASKED)
        assert (status, headers["retry-after"]) == (429, "1")
        assert answer["error"]["message"] == "the queue is full (1 requests); try again"
        with pytest.raises(RunStopped, match="429"):
            Client(url, model="ppo", retries=0).chat(HELLO)
        assert Client(url, model="ppo").chat(HELLO)[0].text == "ppo heard: Hello"
        assert first.result()[0] == 200
        wait_for(lambda: (service.answered, service.slots.taken) == (2, 0), 2)  # counted once an answer has left


def test_a_client_that_hangs_up_frees_its_slot():
    engine = ScriptedEngine(pause=0.3)
    service = Service(engine, ServingConfig())
    with serving(service) as url:
        pieces = Client(url, model="ppo").stream(HELLO)
        assert next(pieces) == "ppo"
        pieces.close()
        wait_for(lambda: service.slots.taken == 0, 2)
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:  # and one that waits for a whole answer
            body = json.dumps(ASKED).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            wait_for(lambda: len(engine.asked) == 2)
        wait_for(lambda: service.slots.taken == 0, 2)
        assert engine.left == 2  # both were given up before their end
        assert service.answered == 0


def test_two_hundred_clients_at_once():
    engine = ScriptedEngine(pause=0.001)
    service = Service(engine, ServingConfig())
    with serving(service) as url:
        start = threading.Barrier(200)

        def ask(number: int) -> str:
            start.wait(30)
            asked = [{"role": "user", "content": f"number {number}"}]
            client = Client(url, model="sft", timeout=60, retries=50)
            return "".join(client.stream(asked)) if number % 2 else client.chat(asked)[0].text

        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(ask, range(200)))
    assert answers == [f"sft heard: number {number}" for number in range(200)]
    assert service.slots.taken == 0


def test_a_failure_is_told_without_its_words_in_the_log(caplog):
    def speak(policy, question, seed):
        raise ZeroDivisionError("the client's own words")

    with serving(Service(ScriptedEngine(speak=speak), ServingConfig())) as url:
        status, answer, _ = call(url, "/v1/chat/completions", ASKED)
        assert (status, answer["error"]["message"]) == (500, "the server failed: ZeroDivisionError")
        assert "client's own" not in caplog.text
        assert "Hello" not in caplog.text


def test_a_moderator_answers_for_moderations():
    def judge(texts):
        return [Verdict({"insult": "fool" in text}, {"insult": 0.9 if "fool" in text else 0.1}) for text in texts]

    with serving(Service(ScriptedEngine(), ServingConfig(), moderator=judge)) as url:
        found = call(url, "/v1/moderations", {"input": ["you fool", "hello"]})[1]["results"]
    assert found == [
        {"flagged": True, "categories": {"insult": True}, "category_scores": {"insult": 0.9}},
        {"flagged": False, "categories": {"insult": False}, "category_scores": {"insult": 0.1}},
    ]


def test_a_slow_reader_does_not_hold_others_up():
    engine = ScriptedEngine(speak=lambda policy, question, seed: "word " * 20 if question == "Hello" else "quick")
    with serving(Service(engine, ServingConfig())) as url:
        slow = Client(url, model="ppo").stream(HELLO)
        next(slow)
        before = time.monotonic()
        assert Client(url, model="ppo").chat([{"role": "user", "content": "?"}])[0].text == "quick"
        assert time.monotonic() - before < 2
        slow.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_rows", 0),
        ("compare_share", 1.5),
        ("retention_days", 0),
        ("retention_days", math.inf),
        ("max_answer_tokens", 0),
        ("log", True),
    ],
)
def test_settings_that_cannot_be(field, value):
    with pytest.raises(InputError, match=f"{field}"):
        ServingConfig(**{field: value})
