"""The client of OpenAI's HTTP against servers that answer badly: bounded in time and size, one line for each mistake.

`tests/serving` holds it against good ones; what it shares with the reward model's client is tested there.
"""

from __future__ import annotations

import json
import time

import pytest
from reference.broken_server import answering, endless, one_by_one, reply, sending

from rlhf.client import Client, Completion, Token
from rlhf.errors import InputError, RunStopped

ASKED = [{"role": "user", "content": "Hello"}]


def chosen(**choice) -> bytes:
    return reply(json.dumps({"choices": [{"index": 0, "finish_reason": "stop", **choice}]}))


def message(text: str) -> dict:
    return {"message": {"role": "assistant", "content": text}}


def events(*data: str) -> bytes:
    body = "".join(f"data: {line}\n\n" for line in data)
    return f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n{body}".encode()


def delta(text: str) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply("[1]"), "no JSON object in the answer '.1.'"),
        (reply("<html>\nhello"), "no JSON object in the answer '<html> hello'"),
        (reply("[" * 60000), "no JSON object"),
        (reply("{}"), "the answer has no choices"),
        (reply('{"choices": []}'), "0 choices instead of 1"),
        (reply('{"choices": [{"index": 3}]}'), "1 choices instead of 1|choices"),
        (chosen(), "a choice without a message"),
        (chosen(message={"content": 5}), "a choice without a message"),
        (reply("Internal\nError", "500 Oh"), "500: Internal Error"),
        (reply('{"error": {"message": "too hot"}}', "500 Oh"), "500: too hot"),
        (None, "silent for timeout=0.3 seconds"),
    ],
)
def test_answers_that_are_none_are_refused_at_once(answer, reason):
    with answering(answer) as (url, calls), pytest.raises(RunStopped, match=reason) as told:
        Client(url, model="m", timeout=0.3).chat(ASKED)
    assert len(calls) == 1
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (None, "a choice without log-probabilities"),
        ([{"token": 5, "logprob": -1}], "as a token"),
        ([{"token": "a", "logprob": None}], "None as a log-probability"),
        ([{"token": "a", "logprob": 0.5}], "0.5 as a log-probability"),
        ([{"token": "a", "logprob": "-1"}], "'-1' as a log-probability"),
        ([{"token": "a", "logprob": -1, "top_logprobs": [3]}], "3 as a token"),
    ],
)
def test_log_probabilities_that_are_none(rows, reason):
    answer = chosen(**message("a"), logprobs={"content": rows})
    with answering(answer) as (url, _), pytest.raises(RunStopped, match=reason):
        Client(url, model="m").chat(ASKED, logprobs=True)


def test_completions_are_read():
    """Choices in any order; log-probabilities of an echo, whose first token has none."""
    second = {"index": 1, "text": "b", "finish_reason": "length", "logprobs": None}
    first = {
        "index": 0, "text": "a b", "finish_reason": "stop",
        "logprobs": {"tokens": ["a", " b"], "token_logprobs": [None, -0.5], "top_logprobs": [None, {" b": -0.5}]},
    }  # fmt: skip
    with answering(reply(json.dumps({"choices": [first]}))) as (url, _):
        found = Client(f"{url}/v1/", model="m").complete("a", echo=True, logprobs=1)
    assert found == [Completion("a b", "stop", (Token("a", None, {}), Token(" b", -0.5, {" b": -0.5})))]
    with answering(reply(json.dumps({"choices": [second, first]}))) as (url, _):
        assert [one.text for one in Client(url, model="m").complete("a", n=2)] == ["a b", "b"]
    broken = first | {"logprobs": {"tokens": ["a", " b"], "token_logprobs": [-0.5]}}
    with (
        answering(reply(json.dumps({"choices": [broken]}))) as (url, _),
        pytest.raises(RunStopped, match="without log-probabilities"),
    ):
        Client(url, model="m").complete("a", logprobs=1)


def test_thinking_that_a_server_keeps_apart():
    answer = chosen(message={"content": None, "reasoning_content": "hm"})
    with answering(answer) as (url, _):
        assert Client(url, model="m").chat(ASKED) == [Completion("", "stop", (), "hm")]


def test_what_is_asked():
    """Temperature and top_p are always sent: a server's own defaults may be a hub model's."""
    from reference.policy_server import ScriptedEngine, serving

    from rlhf.serving.app import Service
    from rlhf.serving.config import ServingConfig

    engine = ScriptedEngine()
    with serving(Service(engine, ServingConfig())) as url:
        Client(url, model="sft").chat(ASKED, stop="END")
        Client(url, model="sft").complete([1, 2], seed=0, echo=True, max_tokens=0)
    chat, plain = engine.asked
    assert (chat.sampling.temperature, chat.sampling.top_p, chat.sampling.stop) == (1.0, 1.0, ("END",))
    assert (plain.prompts, plain.sampling.seed, plain.echo, plain.logprobs) == (((1, 2),), 0, True, None)


@pytest.mark.parametrize(
    ("owner", "further"),
    [
        ("vllm", {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("llamacpp", {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}),
        ("openai", {}),
        (None, {}),
    ],
)
def test_what_a_server_would_fill_in_is_sent_where_it_is_known(owner, further):
    """vLLM takes top_k, min_p and repetition_penalty from the model's generation_config, llama.cpp from its command
    line (top_k 40, min_p 0.05); OpenAI refuses such fields."""
    listed = reply(json.dumps({"data": [{"id": "m", "owned_by": owner}, {"id": "adapter", "owned_by": owner}]}))
    with answering(listed) as (url, _):
        client, bodies = Client(url).named("m"), []
    heard = {"choices": [{"index": 0, **message("hi"), "text": "hi"}]}
    client.asked = lambda path, body: bodies.append(body) or heard
    client.events = lambda path, body: bodies.append(body) or iter(())
    client.chat(ASKED)
    client.complete("a")
    list(client.stream(ASKED))
    usual = {"model", "temperature", "top_p", "messages", "prompt", "max_tokens", "echo", "stream"}
    assert [{name: value for name, value in body.items() if name not in usual} for body in bodies] == [further] * 3


def test_the_only_model_is_the_default():
    listed = reply('{"object": "list", "data": [{"id": "only"}]}')
    with answering(listed) as (url, calls):
        client = Client(url)
        assert (client.model, client.model) == ("only", "only")
        assert len(calls) == 1
    for text in ('{"data": [{"name": "x"}]}', '{"data": 3}', "{}"):
        with answering(reply(text)) as (url, _), pytest.raises(RunStopped, match="lists no models"):
            Client(url).models()


@pytest.mark.parametrize("status", ["429 Many", "502 Bad", "503 Full", "504 Late"])
def test_a_busy_server_is_asked_again(status):
    with answering(reply("{}", status), reply("{}", status), chosen(**message("hi"))) as (url, calls):
        assert Client(url, model="m").chat(ASKED)[0].text == "hi"
        assert len(calls) == 3
    with answering(reply("{}", status), events(delta("hi"), "[DONE]")) as (url, calls):
        assert list(Client(url, model="m").stream(ASKED)) == ["hi"]
        assert len(calls) == 2


def test_a_stream_is_read_piece_by_piece():
    first = json.dumps({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    counts = json.dumps({"choices": [], "usage": {}})
    with answering(events(first, delta("H\u00e9"), delta("llo\n"), counts, "[DONE]")) as (url, _):
        assert list(Client(url, model="m").stream(ASKED)) == ["H\u00e9", "llo\n"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (events(delta("a")), "the answer broke off"),
        (events("{"), "no JSON object in the answer"),
        (events('{"error": {"message": "no more", "type": "server_error"}}'), "500: no more"),
        (events("x" * 2**20), "a line of the answer has more than 1048576 bytes"),
        (reply("{}", "500 Oh"), "500: "),
    ],
)
def test_a_stream_that_breaks_is_told(answer, reason):
    with answering(answer) as (url, _), pytest.raises(RunStopped, match=reason):
        list(Client(url, model="m", retries=0, timeout=5).stream(ASKED))


def test_refusals_are_input_errors():
    with answering(reply('{"error": {"message": "n: got 0"}}', "400 Bad")) as (url, _):
        for call in (lambda: Client(url, model="m").chat(ASKED), lambda: list(Client(url, model="m").stream(ASKED))):
            with pytest.raises(InputError, match="400: n: got 0"):
                call()


@pytest.mark.parametrize(
    ("pieces", "pause"),
    [
        (one_by_one(b"HTTP/1.1 200 OK\r\nX-Drip: " + b"a" * 999), 0.05),
        (endless(b"HTTP/1.1 200 OK\r\n\r\n", b"data: {}\n\n"), 0.05),
        (endless(b"HTTP/1.1 200 OK\r\n\r\n", b": wait\n\n"), 0.01),
    ],
)
def test_one_deadline_holds_for_a_whole_stream(pieces, pause):
    with sending(pieces, pause) as url:
        before = time.monotonic()
        with pytest.raises(RunStopped, match=r"no whole answer within timeout=0\.6 seconds"):
            list(Client(url, model="m", timeout=0.6).stream(ASKED))
        assert time.monotonic() - before < 2
