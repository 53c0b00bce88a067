"""The scoring server and its client: equal scores, full queues, broken clients, broken servers, broken requests."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from reference import recipe
from reference.broken_server import answering, endless, one_by_one, reply, sending
from reference.served import served
from reference.tiny_chain import chain

from reward_models import RewardModel
from reward_models.client import RewardClient
from reward_models.functions import conversation
from reward_models.server import Refused, ServerConfig, create_app, read_request, token_counter
from rlhf.errors import InputError, RunStopped
from rlhf.ppo.trainer import PPOConfig, PPOTrainer

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["What is the capital of France?", "Count to ten", "Hello?", "Say something long, please, and then more"]
COMPLETIONS = ["Paris", "one two three four five six seven eight nine ten", "Hi", "word " * 30 + "end"]


def words(conversations):
    """Score by the number of the response's words."""
    return [float(len(messages[-1]["content"].split())) for messages in conversations]


def letters(messages):
    return len(messages[-1]["content"])


@contextlib.contextmanager
def serving(scorer=words, token=None, count_tokens=letters, **limits) -> Iterator[str]:
    """Start a server on a port of its own, in a thread; yield its URL."""
    config = ServerConfig(**limits)
    app = create_app(scorer, config, count_tokens=count_tokens, token=token, name="words")
    with served(app, config) as url:
        yield url


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def call(url: str, body=None, path: str = "/score", method: str = "POST", headers=None, **kwargs):
    """Return status, JSON and headers of one request, sent without our client."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        body = json.dumps(body).encode() if isinstance(body, dict | list) else body
        connection.request(method, path, body, headers or {}, **kwargs)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def queued(url: str, what: str = "queue") -> int:
    return call(url, path="/health", method="GET")[1][what]


class Gate:
    """A scorer that waits for a signal and records every batch."""

    def __init__(self, scorer=words):
        self.scorer, self.open, self.batches = scorer, threading.Event(), []

    def __call__(self, conversations):
        self.batches.append([messages[-1]["content"] for messages in conversations])
        assert self.open.wait(30)
        return self.scorer(conversations)


@pytest.fixture
def reward_model(tmp_path, tiny_model, tiny_tokenizer):
    return RewardModel.load(chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)[1], device="cpu")


def of(model: RewardModel) -> dict:
    return {"scorer": lambda rows: model.score(rows).tolist(), "count_tokens": token_counter(model)}


# -- scores ------------------------------------------------------------------------------------------------


def test_a_request_by_itself_gets_the_local_bits(reward_model):
    local = reward_model(PROMPTS, COMPLETIONS)
    rows = [conversation(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with serving(**of(reward_model)) as url:
        client = RewardClient(url + "/")
        assert client(PROMPTS, COMPLETIONS, completion_ids=[[1]] * 4, answer=["x"] * 4) == local
        assert client([row[:1] for row in rows], [row[1:] for row in rows]) == local
        assert call(url, {"conversations": rows})[1] == {"scores": local}
        alone = [client([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        assert alone == [reward_model([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        assert client([], []) == []
        assert call(url, {"conversations": []})[1] == {"scores": []}
        with pytest.raises(ValueError, match="2 prompts but 1 completions"):
            client(["a", "b"], ["c"])
    assert len({round(score, 4) for score in local}) == 4


@pytest.mark.parametrize("join", [True, False])
def test_joined_requests_move_a_score_by_rounding_only(reward_model, join):
    gate = Gate(lambda rows: reward_model.score(rows).tolist())
    with (
        serving(gate, count_tokens=token_counter(reward_model), join_requests=join) as url,
        ThreadPoolExecutor(9) as pool,
    ):
        first = pool.submit(RewardClient(url), ["first"], ["one"])
        wait_for(lambda: gate.batches)
        asked = [(PROMPTS[i % 4 :], COMPLETIONS[i % 4 :]) for i in range(8)]
        answers = [pool.submit(RewardClient(url), *pair) for pair in asked]
        wait_for(lambda: queued(url, "waiting") == 9)
        gate.open.set()
        assert first.result() == reward_model(["first"], ["one"])
        said, local = [answer.result() for answer in answers], [reward_model(*pair) for pair in asked]
    assert len(gate.batches) == (2 if join else 9)
    for one, other in zip(said, local, strict=True):
        assert one == (pytest.approx(other, abs=1e-5) if join else other)


def test_batches_by_hand():
    """Budget 20: 4 + 4 letters make 2 x 4; with 6 they make 3 x 6 = 18; with 1 more 4 x 6 = 24, too many."""
    gate = Gate()
    with serving(gate, max_batch_tokens=20) as url, ThreadPoolExecutor(9) as pool:
        answers = []
        for n, texts in enumerate([["first"], ["aaaa", "bbbb"], ["cccccc"], ["d"], ["e" * 20], ["f"]]):
            answers.append(pool.submit(RewardClient(url), ["?"] * len(texts), texts))
            wait_for(lambda n=n: queued(url, "waiting") == n + 1)
            if n == 0:
                wait_for(lambda: gate.batches)
        gate.open.set()
        assert [len(answer.result()) for answer in answers] == [1, 2, 1, 1, 1, 1]
    assert gate.batches == [["first"], ["aaaa", "bbbb", "cccccc"], ["d"], ["e" * 20], ["f"]]


def test_the_client_has_what_the_local_model_reads_scored(reward_model):
    """Columns that change what is read do so here, too; what cannot reach the server is refused, and never left out."""
    fixed = [{"role": "user", "content": "Say something."}]
    columns = {"scored_prompt": [fixed, "Hello?", None, None], "scored_prefix": ["One ", None, "two ", None]}
    prompts, texts = [fixed, "Hello?", *PROMPTS[2:]], ["One Paris", COMPLETIONS[1], "two Hi", COMPLETIONS[3]]
    with serving(**of(reward_model)) as url:
        client = RewardClient(url)
        assert client(PROMPTS, COMPLETIONS, **columns) == reward_model(prompts, texts)
        nothing = {"tools": [None, [], "", None], "chat_template_kwargs": [None, {}, None, None]}
        assert client(PROMPTS, COMPLETIONS, **nothing) == reward_model(PROMPTS, COMPLETIONS)
        talk = [HELLO, CALL, {"role": "tool", "content": "sunny"}]
        for prompt, further, named in (
            ("a", {"tools": [[{"type": "function", "function": {"name": "weather"}}]]}, "column tools"),
            ("a", {"chat_template_kwargs": [{"enable_thinking": True}]}, "column chat_template_kwargs"),
            (talk, {}, "messages with tool_calls"),
            ("a", {"scored_prompt": [talk]}, "messages with tool_calls"),
        ):
            with pytest.raises(InputError, match=f"reward_client: {named}: .* score with a local RewardModel"):
                client([prompt], ["b"], **further)


def test_ppo_through_the_server_is_ppo_with_the_model_to_the_last_bit(tmp_path, tiny_model, tiny_tokenizer):
    policy, folder = chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)
    rows = [{"prompt": f"Count to {word}", "answer": word} for word in ("two", "three", "four", "five")]
    states, metrics = [], []

    def run(name: str, function):
        config = PPOConfig(
            output_dir=str(tmp_path / name), updates=2, rollout_size=8, minibatch_size=4, inner_epochs=2,
            max_new_tokens=8, learning_rate=1e-3, tokens_per_microbatch=150, bf16=False,
        )  # fmt: skip
        trainer = PPOTrainer(str(policy), function, config, rows, value_model=str(folder))
        metrics.append(trainer.train()["score"])
        states.append(trainer.accelerator.unwrap_model(trainer.module).trained_state())

    model = RewardModel.load(folder, device="cpu")
    # As texts, which is what a server gets: a random policy's ids are not those of its decoded text.
    run("local", lambda prompts, completions, **columns: model(prompts, completions))
    with serving(**of(RewardModel.load(folder, device="cpu"))) as url:
        run("remote", RewardClient(url))
    assert metrics[0] == metrics[1] != 0
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


# -- many clients, and clients that leave ------------------------------------------------------------------


def test_a_full_queue_is_told_and_the_client_comes_again():
    gate = Gate()
    with serving(gate, max_queue=2) as url, ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(RewardClient(url), ["?"], ["one two"]) for _ in range(2)]
        wait_for(lambda: queued(url) == 2)
        status, said, headers = call(url, {"prompts": ["?"], "completions": ["one"]})
        assert (status, headers["Retry-After"]) == (503, "1")
        assert said == {"error": "the queue is full (2 requests); try again"}
        with pytest.raises(RunStopped, match="503: the queue is full"):
            RewardClient(url, retries=0)(["?"], ["one"])
        later = pool.submit(RewardClient(url), ["?"], ["one"])
        time.sleep(0.2)
        gate.open.set()
        assert later.result() == [1.0]
        assert [answer.result() for answer in taken] == [[2.0], [2.0]]
        assert queued(url) == 0


def test_work_of_a_client_that_hung_up_is_dropped():
    gate = Gate()
    with serving(gate, max_queue=3) as url, ThreadPoolExecutor(2) as pool:
        host, port = url.removeprefix("http://").split(":")
        first = pool.submit(RewardClient(url), ["?"], ["first"])
        wait_for(lambda: gate.batches)
        body = json.dumps({"prompts": ["?"], "completions": ["gone"]}).encode()
        for sent in (body, body[:10]):  # one waits for its scores, one is in the middle of its request
            with socket.create_connection((host, int(port))) as leaving:
                leaving.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + sent)
                wait_for(lambda: queued(url) == 2)
            wait_for(lambda: queued(url) == 1)
        last = pool.submit(RewardClient(url), ["?"], ["last"])
        wait_for(lambda: queued(url) == 2)
        gate.open.set()
        assert first.result() == last.result() == [1.0]
    assert gate.batches == [["first"], ["last"]]


# -- requests that are refused -----------------------------------------------------------------------------

HELLO = {"role": "user", "content": "Hello"}
HI = {"role": "assistant", "content": "Hi"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "weather"}}]}
MALFORMED = [
    (b"", 400, "no JSON"),
    (b"{", 400, "no JSON"),
    (b"\xff\xfe\xfa", 400, "no JSON"),
    (b"[" * 100_000, 400, "no JSON"),
    (b'{"conversations": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "list of messages|no JSON|write"),
    (b"9" * 5000, 400, "no JSON"),
    ([], 400, "write {"),
    ({}, 400, "write {"),
    ({"conversations": [], "prompts": [], "completions": []}, 400, "write {"),
    ({"prompts": ["a"]}, 400, "completions: a list is needed, got None"),
    ({"conversations": "text"}, 400, "conversations: a list is needed, got 'text'"),
    ({"prompts": ["a", "b"], "completions": ["c"]}, 400, "2 prompts but 1 completions"),
    ({"prompts": [3], "completions": ["c"]}, 400, r"prompts\[0\]: a list of messages is needed, got 3"),
    ({"conversations": [[HELLO, HI], []]}, 400, r"conversations\[1\]: a list of messages is needed"),
    ({"conversations": [[HELLO]]}, 400, r"conversations\[0\] ends with user"),
    ({"conversations": [[HELLO, {"role": "assistant"}]]}, 400, r"conversations\[0\]\[1\]: write"),
    ({"conversations": [[HELLO, {"role": "assistant", "content": None}]]}, 400, r"conversations\[0\]\[1\]: write"),
    ({"conversations": [[HELLO, {"role": "robot", "content": "x"}]]}, 400, "role 'robot'; use one of"),
    ({"conversations": [[HELLO, {"role": [], "content": "x"}]]}, 400, "role"),
    ({"conversations": [[HELLO, CALL, HI]]}, 400, r"conversations\[0\]\[1\]: tool_calls are not taken here"),
    ({"prompts": ["a"], "completions": ["half \ud800"]}, 400, "conversation 1 cannot be encoded"),
    ({"prompts": ["a"], "completions": ["word " * 2000]}, 413, "conversation 1: .* this model reads 512"),
    ({"prompts": ["a"], "completions": ["word " * 90]}, 413, "conversation 1: .* this server takes 300"),
    ({"conversations": [[HELLO, HI]] * 9}, 413, "conversations: 9; this server takes 8"),
]


def test_malformed_requests_are_refused_in_one_line(reward_model):
    with serving(**of(reward_model), max_conversations=8, max_batch_tokens=300) as url:
        for body, wanted, reason in MALFORMED:
            status, said, _ = call(url, body)
            assert status == wanted, (str(body)[:60], said)
            assert list(said) == ["error"]
            assert "\n" not in said["error"]
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(said["error"])
        assert call(url, path="/scores")[:2] == (404, {"error": "POST /scores: Not Found"})
        assert call(url, method="GET")[:2] == (405, {"error": "GET /score: Method Not Allowed"})
        assert RewardClient(url)(PROMPTS, COMPLETIONS) == reward_model(PROMPTS, COMPLETIONS)
        with pytest.raises(InputError, match="413: conversations: 9; this server takes 8"):
            RewardClient(url)(["a"] * 9, ["b"] * 9)


def test_messages_are_read_down_to_role_and_content():
    rows = read_request(json.dumps({"conversations": [[HELLO, HI | {"name": "Bob"}]], "answer": [3]}).encode(), 8)
    assert rows == [[HELLO, HI]]
    with pytest.raises(Refused):
        read_request(b"null", 8)


def test_oversized_and_slow_bodies_are_refused():
    def endless():
        for _ in range(1000):
            yield b" " * 1000

    with serving(max_body_bytes=1000, max_body_seconds=0.5) as url:
        fits = {"prompts": ["?"], "completions": ["w " * 450]}
        assert call(url, fits)[:2] == (200, {"scores": [450.0]})
        large = {"prompts": ["?"], "completions": ["w " * 600]}
        for body in (json.dumps(large).encode(), endless()):
            status, said, _ = call(url, body, encode_chunked=not isinstance(body, bytes), headers=chunked(body))
            assert (status, said) == (413, {"error": "the body has more than 1000 bytes; send fewer conversations"})
        with pytest.raises(InputError, match="413: the body has more than 1000 bytes"):
            RewardClient(url)(["?"], ["word " * 1_000_000])
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert queued(url) == 0


def chunked(body) -> dict[str, str]:
    return {} if isinstance(body, bytes) else {"Transfer-Encoding": "chunked"}


def test_nothing_without_the_token(monkeypatch):
    monkeypatch.delenv("RLHF_SERVER_TOKEN", raising=False)
    gate = Gate()
    gate.open.set()
    body = {"prompts": ["?"], "completions": ["one"]}
    with serving(gate, token="s3cret") as url:
        for header in (None, "s3cret", "Basic s3cret", "Bearer", "Bearer s3cre", "Bearer s3crets", "Bearer \xe9"):
            status, said, headers = call(url, body, headers={"Authorization": header} if header else {})
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer"), header
            assert said == {"error": "send the token: Authorization: Bearer TOKEN"}
        with pytest.raises(InputError, match=r"401: send the token.*RLHF_SERVER_TOKEN") as told:
            RewardClient(url, "wrong")(["?"], ["one"])
        assert "\n" not in str(told.value)
        assert gate.batches == []
        assert call(url, path="/health", method="GET")[:2] == (
            200,
            {"status": "ok", "model": "words", "queue": 0, "waiting": 0, "max_queue": 256},
        )
        assert RewardClient(url, "s3cret")(["?"], ["one"]) == [1.0]
        monkeypatch.setenv("RLHF_SERVER_TOKEN", "s3cret")
        assert RewardClient(url)(["?"], ["one"]) == [1.0]


LONG = "w " * 7_500_000


def test_texts_of_megabytes_are_refused_by_length_and_nobody_waits(reward_model):
    """15 MB: as a response, as white space, where messages are expected, in many small values."""
    hostile = [
        json.dumps({"prompts": ["?"], "completions": [LONG]}).encode(),
        json.dumps({"prompts": ["?"], "completions": [" " * 15_000_000]}).encode(),
        json.dumps({"conversations": " " * 15_000_000}).encode(),
        json.dumps({"conversations": [[{"role": LONG, "content": "x"}]]}).encode(),
        json.dumps({"conversations": [{LONG: " \n" * 100}]}).encode(),
        b'{"conversations": [[' + b"{}," * 4_999_000 + b"{}]]}",
    ]
    counted, count = [], token_counter(reward_model)

    def counting(messages):
        began = time.monotonic()
        try:
            return count(messages)
        finally:
            counted.append(time.monotonic() - began)

    scorer = {"scorer": lambda rows: [1.0] * len(rows), "count_tokens": counting}
    with serving(**scorer) as url, ThreadPoolExecutor(len(hostile)) as pool:
        refused = [pool.submit(call, url, body) for body in hostile]
        slowest = 0.0
        while not all(future.done() for future in refused):
            for ask in (lambda: queued(url), lambda: RewardClient(url)(["?"], ["one"])):
                before = time.monotonic()
                ask()
                slowest = max(slowest, time.monotonic() - before)
        statuses = [future.result()[0] for future in refused]
    assert statuses == [413, 413, 400, 400, 400, 400]
    assert max(counted) < 0.5  # encoding 15 MB takes seconds
    assert slowest < 3  # a second where nothing else runs on the machine; this test is a client, too


def test_requests_that_do_not_arrive_leave_the_queue_to_others():
    with serving(max_queue=5) as url:
        host, port = url.removeprefix("http://").split(":")
        crowd = [socket.create_connection((host, int(port))) for _ in range(20)]
        for connection in crowd:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        wait_for(lambda: queued(url) == 5)
        before = time.monotonic()
        assert RewardClient(url)(["?"], ["one two"]) == [2.0]
        assert time.monotonic() - before < 3
        for connection in crowd:
            connection.close()


def test_no_redirect_to_what_the_host_header_names():
    with serving() as url:
        for path in ("/score/", "//evil.example/score", "/health/", "/docs", "/openapi.json"):
            for method in ("GET", "POST"):
                status, _, headers = call(url, {}, path=path, method=method)
                assert (status, headers["Location"]) == (404, None)
        assert call(url, {"prompts": [], "completions": []}, headers={"Host": "evil.example"})[0] == 403
        assert call(url, {}, headers={"Origin": "https://evil.example", "Content-Type": "text/plain"})[0] == 403


def test_neither_texts_nor_tokens_are_logged(caplog):
    def scorer(conversations):
        raise ValueError(conversations[0][-1]["content"])

    def count(messages):
        if "encode" in messages[-1]["content"]:
            raise KeyError(messages[-1]["content"])
        return 1

    with serving(scorer, token="s3cret", count_tokens=count) as url:
        for text in ("my own words", "encode my own words"):
            with pytest.raises((RunStopped, InputError), match="my own words"):
                RewardClient(url, "s3cret")(["?"], [text])
        with pytest.raises(InputError, match="401"):
            RewardClient(url, "an0ther")(["?"], ["my own words"])
        call(url, b"{my own words", headers={"Authorization": "Bearer s3cret"})
    (record,) = caplog.records
    assert record.getMessage().startswith("scoring failed: ValueError in test_server.py:")
    assert record.exc_info is None


def test_a_scorer_that_fails_harms_nobody_else():
    def scorer(conversations):
        texts = [messages[-1]["content"] for messages in conversations]
        if "raise" in texts:
            raise ZeroDivisionError("two\nlines")
        lost = texts.count("lose")
        return [math.nan if text == "nan" else 1.0 for text in texts][lost:]

    gate = Gate(scorer)
    with serving(gate) as url, ThreadPoolExecutor(8) as pool:
        first = pool.submit(RewardClient(url), ["?"], ["first"])
        wait_for(lambda: gate.batches)
        texts = ["fine", "raise", "nan", "lose", "fine"]
        answers = [pool.submit(call, url, {"prompts": ["?"] * 2, "completions": ["x", text]}) for text in texts]
        wait_for(lambda: queued(url, "waiting") == 6)
        gate.open.set()
        said = [answer.result()[:2] for answer in answers]
        assert first.result() == [1.0]
        assert said == [
            (200, {"scores": [1.0, 1.0]}),
            (500, {"error": "scoring failed: ZeroDivisionError: two lines"}),
            (500, {"error": "conversation 2 scored nan, no finite number"}),
            (500, {"error": "scoring failed: ValueError: 1 scores for 2 conversations"}),
            (200, {"scores": [1.0, 1.0]}),
        ]
        with pytest.raises(RunStopped, match="500: conversation 1 scored nan"):
            RewardClient(url)(["?"], ["nan"])
        assert RewardClient(url)(["?"], ["fine"]) == [1.0]


# -- servers that a client refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply('{"scores": [1.0]}'), "1 scores for 2 completions"),
        (reply('{"scores": 1.0}'), "float instead of scores for 2 completions"),
        (reply('{"scores": [1.0, NaN]}'), "score 1 is nan; scores must be finite"),
        (reply('{"scores": [1.0, Infinity]}'), "score 1 is inf"),
        (reply('{"scores": [null, 1.0]}'), "score 0 is None"),
        (reply('{"scores": [true, 1.0]}'), "score 0 is True"),
        (reply('{"scores": [1' + "0" * 400 + ", 1.0]}"), r"score 0 is 10000.*; scores must be finite"),
        (reply("[" * 60000), "no scores in the answer"),
        (reply("<html>\nhello"), "no scores in the answer '<html> hello'"),
        (reply("[]"), "no scores in the answer"),
        (reply("Internal\nError", "500 Oh"), "500: Internal Error"),
        (None, r"silent for timeout=0.3 seconds"),
    ],
)
def test_answers_that_are_no_scores_are_refused_at_once(answer, reason):
    with answering(answer) as (url, calls), pytest.raises(RunStopped, match=reason) as told:
        RewardClient(url, timeout=0.3, retries=3)(["a", "b"], ["c", "d"])
    assert len(calls) == 1
    assert "\n" not in str(told.value)


def test_only_a_full_queue_and_broken_connections_are_tried_again():
    good = reply('{"scores": [0.5]}')
    cut = reply('{"scores": [0.5]}')[:-5]
    with answering(reply("{}", "503 Full"), b"", cut, good) as (url, calls):
        assert RewardClient(url, retries=3)(["a"], ["b"]) == [0.5]
    assert len(calls) == 4
    with (
        answering(b"") as (url, calls),
        pytest.raises(RunStopped, match=r"no answer in 2 attempts.*is the server up") as told,
    ):
        RewardClient(url, retries=1)(["a"], ["b"])
    assert len(calls) == 2
    assert "\n" not in str(told.value)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "pause", "reason"),
    [
        (one_by_one(b"HTTP/1.1 200 OK\r\nX-Drip: " + b"a" * 999), 0.05, "no whole answer within timeout=0.6 seconds"),
        (endless(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" "), 0.05, "no whole answer within"),
        (endless(CHUNKED, b"1\r\n \r\n"), 0.05, "no whole answer within"),
        (endless(CHUNKED, b"0"), 0.05, "no whole answer within"),
        (endless(GO_ON, GO_ON), 0.05, "no whole answer within"),
        (endless(CHUNKED, b"1000\r\n" + b" " * 4096 + b"\r\n"), 0, "the answer has more than 65664 bytes"),
        (endless(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536), 0, "the answer has more than 65664 bytes"),
    ],
)
def test_an_answer_is_bounded_in_time_and_size(pieces, pause, reason):
    with sending(pieces, pause) as url:
        before = time.monotonic()
        with pytest.raises(RunStopped, match=reason):
            RewardClient(url, timeout=0.6, retries=5)(["a", "b"], ["c", "d"])
        assert time.monotonic() - before < 2


def test_one_time_limit_holds_for_all_attempts():
    full = reply("{}", "503 Full", "Retry-After: 8\r\n")
    for answer, reason in [(full, "503"), (b"", "no answer in . attempts")]:
        with answering(answer) as (url, calls):
            before = time.monotonic()
            with pytest.raises(RunStopped, match=reason):
                RewardClient(url, timeout=0.7, retries=50)(["a"], ["b"])
            assert time.monotonic() - before < 2
            assert len(calls) < 8


def test_a_redirect_is_not_followed_and_the_token_is_not_shown(monkeypatch):
    """Also where the server sends the token back."""
    with answering(reply("{}", "307 Temporary", "Location: http://127.0.0.1:1/score\r\n")) as (url, calls):
        with pytest.raises(InputError, match=r"307.*no redirect is followed"):
            RewardClient(url, "s3cret")(["a"], ["b"])
        assert len(calls) == 1
    for status in ("400 Bad", "500 Oh", "200 OK"):
        with answering(reply('{"error": "Bearer s3cret \x1b[2J"}', status)) as (url, _):
            with pytest.raises((InputError, RunStopped)) as told:
                RewardClient(url, "s3cret", retries=0)(["a"], ["b"])
            assert "s3cret" not in str(told.value)
            assert "\x1b" not in str(told.value)
    for wrong in ("s3cret\nX-Injected: 1", "s3cr\xe9t", "s3cret and more"):
        with pytest.raises(InputError, match=r"^token: a token is one word") as told:
            RewardClient("http://127.0.0.1:1", wrong)
        assert "s3cr" not in str(told.value)
    monkeypatch.setenv("RLHF_SERVER_TOKEN", "s3cret\n")
    assert RewardClient("http://127.0.0.1:1").caller.token == "s3cret"


@pytest.mark.parametrize("url", ["http://me:pw@127.0.0.1:8000", "http://pw@h", "http://h/?token=pw", "http://h:p/pw@h"])
def test_a_password_in_an_address_is_refused_and_not_shown(url):
    with pytest.raises(InputError, match="set an environment variable") as told:
        RewardClient(url)
    assert "pw" not in str(told.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://h:8000/?a=b",
        "http://h h",
        "127.0.0.1:8000",
        "ftp://x",
        "http://",
        "http://x:port",
        "http://x:99999",
    ],
)
def test_what_is_no_url(url):
    with pytest.raises(InputError, match="write http://host:port"):
        RewardClient(url)
    with pytest.raises(InputError, match="timeout=0"):
        RewardClient("http://x", timeout=0)


# -- the recipe --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recipe_serving(
    folder: Path, *flags: object, program: tuple[str, ...] = ()
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Start recipes/serve_reward_model.py as a process of its own; yield its URL."""
    command = [
        sys.executable,
        *program,
        "recipes/serve_reward_model.py",
        "--reward_model",
        folder,
        "--port",
        "0",
        *flags,
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert " on http://" in line, line + process.stderr.read()
        url = line.split(" on ")[1].split(",")[0]
        wait_for(lambda: is_up(url))
        yield url, process
    finally:
        process.kill()
        process.communicate()


def is_up(url: str) -> bool:
    with contextlib.suppress(OSError):
        return call(url, path="/health", method="GET")[0] == 200
    return False


@pytest.mark.slow
def test_a_thousand_clients_at_once_then_an_orderly_end(tmp_path, reward_model):
    (tmp_path / "token").write_text("s3cret\n")
    texts = [f"{'very ' * (n % 7)}good answer {n}" for n in range(1000)]
    local = reward_model(["What?"] * 1000, texts)
    flags = ("--token_file", tmp_path / "token", "--max_queue", 256, "--bf16", "false")
    with recipe_serving(reward_model.folder, *flags) as (url, server):
        start = threading.Barrier(1000)

        def ask(text: str) -> float:
            start.wait(60)
            return RewardClient(url, "s3cret", timeout=60, retries=60)(["What?"], [text])[0]

        with ThreadPoolExecutor(1000) as pool:
            assert list(pool.map(ask, texts)) == pytest.approx(local, abs=1e-5)
        assert RewardClient(url, "s3cret")(["What?"] * 1000, texts) == local  # one request, nobody beside it
        wait_for(lambda: queued(url) == 0)

        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(RewardClient(url, "s3cret", timeout=60, retries=0), ["What?"] * 1000, texts)
            wait_for(lambda: queued(url) == 1)
            server.send_signal(signal.SIGTERM)
            assert last.result() == local
        assert server.wait(20) == 0
        with pytest.raises(RunStopped, match="is the server up"):
            RewardClient(url, "s3cret", retries=1)(["What?"], ["one"])
        out, err = server.communicate()
        assert "ended" in out
        assert err == ""


def test_the_recipe_refuses(tmp_path, reward_model, monkeypatch):
    monkeypatch.delenv("RLHF_SERVER_TOKEN", raising=False)
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, reason in [
            (("--host", "0.0.0.0"), "open to other machines, and there is no token"),
            (("--token_file", tmp_path / "none"), "no such file; write the token"),
            (("--token_file", tmp_path / "empty"), "a token is one word"),
            (("--port", port), f"port={port}: .*choose another"),
            (("--port", 123456), "port=123456 must be 0 to 65535"),
            (("--max_queue", 0), "max_queue=0 must be at least 1"),
        ]:
            result = recipe.run("serve_reward_model", "--reward_model", reward_model.folder, *flags)
            assert result.code == 2, flags
            assert result.err.count("\n") == 1
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(result.err)


@pytest.mark.long
@pytest.mark.parametrize("files", [4096, 300])
def test_the_recipe_under_attack(reward_model, files):
    """900 unfinished heads, then 15 MB texts one after the other: an honest request is answered within a second.

    Whether there are few open files or many; nothing of a text is logged, and no more than a line of a kind.
    """
    slow = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files})); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    with recipe_serving(reward_model.folder, program=("-c", slow)) as (url, server):
        host, port = url.removeprefix("http://").split(":")

        def honest() -> float:
            before = time.monotonic()
            assert RewardClient(url)(["?"], ["one"]) == local
            return time.monotonic() - before

        local = RewardClient(url)(["?"], ["one"])
        crowd = []
        for _ in range(900):
            crowd.append(socket.create_connection((host, int(port)), timeout=10))
            crowd[-1].sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nX-A: ")
        body = json.dumps({"prompts": ["?"], "completions": ["secretive " * 1_500_000]}).encode()
        with ThreadPoolExecutor(1) as pool:
            times, texts = [honest()], [pool.submit(call, url, body) for _ in range(5)]
            while not all(text.done() for text in texts):
                times.append(honest())
            assert {text.result()[0] for text in texts} == {413}
        time.sleep(11)  # past the deadline of the heads
        times.append(honest())
        assert queued(url) == 0
        for connection in crowd:
            connection.close()
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=20)
    assert max(times) < 1, times
    assert "secretive" not in out + err
    assert len(out + err) < 2000
