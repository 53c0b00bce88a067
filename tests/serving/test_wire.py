"""Requests of OpenAI's HTTP: every field, wrong types, unknown fields; answers as its JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rlhf.serving import pieces
from rlhf.serving.pieces import About, Piece, Scored
from rlhf.serving.wire import Wrong, error_body, read_chat, read_completion, read_moderation

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields):
    return read_chat(json.dumps({"messages": HELLO, **fields}).encode())


def completion(**fields):
    return read_completion(json.dumps({"prompt": "Once", **fields}).encode())


def test_every_field_of_a_chat():
    asked = chat(
        model="ppo", n=3, seed=-5, temperature=0.7, top_p=0.9, max_completion_tokens=20, stop=["\n\n", "END"],
        stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=4, user="someone",
    )  # fmt: skip
    assert asked.messages == HELLO
    assert (asked.model, asked.stream, asked.usage, asked.user) == ("ppo", True, True, "someone")
    assert (asked.logprobs, asked.top_logprobs) == (True, 4)
    sampling = asked.sampling
    assert (sampling.n, sampling.seed, sampling.temperature, sampling.top_p) == (3, -5, 0.7, 0.9)
    assert (sampling.max_tokens, sampling.stop) == (20, ("\n\n", "END"))


def test_defaults_are_openais():
    sampling = chat().sampling
    assert (sampling.n, sampling.seed, sampling.temperature, sampling.top_p) == (1, None, 1.0, 1.0)
    assert (sampling.max_tokens, sampling.stop) == (None, ())
    assert chat(temperature=0, stop="\n").sampling.stop == ("\n",)
    assert chat(max_tokens=5, max_completion_tokens=5).sampling.max_tokens == 5


def test_null_and_what_asks_for_nothing_pass():
    nothing = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "auto",
        "response_format": {"type": "text"}, "store": False, "n": None, "seed": None, "stop": None, "stream": None,
        "functions": None, "metadata": None, "stream_options": None, "logprobs": None, "top_logprobs": None,
    }  # fmt: skip
    assert chat(**nothing) == chat()


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"modle": "x"}, "unknown field 'modle'; did you mean model"),
        ({"top_k": 5}, "unknown field 'top_k'; did you mean top_p"),
        ({"prompt": "x"}, "unknown field 'prompt'"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: this server does not have it"),
        ({"tools": [{"type": "function"}]}, "tools: this server does not have it"),
        ({"response_format": {"type": "json_object"}}, "response_format: this server does not have it"),
        ({"n": 0}, "n: got 0; send a whole number, 1 to 256"),
        ({"n": True}, "n: got True"),
        ({"n": 1.0}, "n: got 1.0"),
        ({"n": 257}, "n: got 257"),
        ({"seed": "1"}, "seed: got '1'"),
        ({"seed": 2**63}, "seed: got"),
        ({"temperature": "hot"}, "temperature: got 'hot'; send a number from 0 to 2"),
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": 2.1}, "temperature: got 2.1"),
        ({"temperature": 1e-9}, "temperature=1e-09: send 0, or from 0.001"),
        ({"top_p": 0}, "top_p=0: send a share above 0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"max_completion_tokens": -1}, "max_completion_tokens: got -1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ; send one of them"),
        ({"stop": 5}, "stop: got 5"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"stop": ["a"] * 17}, "stop: 17 texts; at most 16"),
        ({"stop": ["\ud800"]}, "stop: half a character"),
        ({"stream": "yes"}, "stream: got 'yes'; send true or false"),
        ({"stream_options": {"include_usage": True}}, "with stream: true"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage: got 1"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options: only"),
        ({"logprobs": 3}, "logprobs: got 3; send true or false"),
        ({"top_logprobs": 3}, "only with logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: got 21"),
        ({"user": "x" * 513}, "user: got"),
        ({"model": 3}, "model: got 3"),
        ({"messages": []}, "messages: got a list of 0"),
        ({"messages": None}, "messages: got None"),
        ({"messages": "Hello"}, "messages: got 'Hello'"),
        ({"messages": ["Hello"]}, r"messages\[0\]: got 'Hello'"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a character"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is read"),
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, r"messages\[0\].colour: unknown field"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]}, "end a prompt with a user turn"),
    ],
)
def test_a_wrong_field_is_told_in_one_line(fields, line):
    with pytest.raises(Wrong, match=line) as told:
        chat(**fields)
    assert told.value.status == 400
    assert "\n" not in str(told.value)


def test_messages_in_openais_other_forms():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    sent_back = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None}
    asked = chat(
        messages=[{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}, sent_back, *HELLO]
    )
    assert asked.messages == [
        {"role": "system", "content": "Be kind."}, *HELLO, {"role": "assistant", "content": "Hi"}, *HELLO
    ]  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"3", b"\xff\xfe", b"null", b"[" * 100_000, b'{"messages": NaN}', b'{"temperature": Infinity}'],
)
def test_a_body_that_is_no_object_is_refused(body):
    for read in (read_chat, read_completion, read_moderation):
        with pytest.raises(Wrong, match="the body is") as told:
            read(body)
        assert len(str(told.value)) < 300


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("Once", ("Once",)),
        (["a", "b"], ("a", "b")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompts_are_texts_or_ids(prompt, read):
    assert completion(prompt=prompt).prompts == read


@pytest.mark.parametrize("prompt", [None, [], 3, [[]], [-1], [True], [1.5], [2**31], [["a"]], {"a": 1}, ["\ud800"]])
def test_what_is_no_prompt(prompt):
    with pytest.raises(Wrong, match="prompt: "):
        completion(prompt=prompt)


def test_completions_echo_and_logprobs():
    asked = completion(echo=True, logprobs=1, max_tokens=0, seed=1234, temperature=0)  # as lm-eval asks
    assert (asked.echo, asked.logprobs, asked.sampling.max_tokens) == (True, 1, 0)
    assert completion().logprobs is None
    for fields, line in [
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"logprobs": True}, "logprobs: got True"),
        ({"logprobs": 21}, "logprobs: got 21"),
        ({"echo": 1}, "echo: got 1"),
        ({"echo": True, "stream": True}, "echo: not in a stream"),
        ({"prompt": ["a"] * 200, "n": 2}, "200 prompts times n=2"),
        ({"suffix": "x"}, "suffix: this server does not have it"),
        ({"best_of": 4}, "best_of: this server does not have it"),
    ]:
        with pytest.raises(Wrong, match=line):
            completion(**fields)


def test_moderations():
    assert read_moderation(b'{"input": "a"}').inputs == ("a",)
    assert read_moderation(b'{"input": ["a", ""], "model": "m"}').inputs == ("a", "")
    for body in (b'{"input": []}', b'{"input": 3}', b'{"input": [1]}', b"{}", b'{"inputs": "a"}'):
        with pytest.raises(Wrong, match="input"):
            read_moderation(body)


def test_requests_are_read_without_torch():
    code = "import rlhf.serving.wire, rlhf.serving.pieces, rlhf.serving.feedback, rlhf.serving.app, rlhf.client, sys"
    probe = f"{code}; print({{'torch', 'transformers'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "set()\n"


# -- answers -----------------------------------------------------------------------------------------------

ABOUT = About("id-1", 17, "ppo", "fp_1", 3)
TOKENS = (Scored("Hé", -0.5, (("Hé", -0.5), ("Ho", -1.25))), Scored("\ufffd", -2.0, (("a", -0.125), ("a", -3.0))))


def test_a_whole_chat_answer():
    parts = pieces.joined(
        [Piece(1, "b", (), "length", 4), Piece(0, "H", TOKENS[:1]), Piece(0, "i", TOKENS[1:], "stop", 3)]
    )
    assert [(part.index, part.text, part.finish, part.count) for part in parts] == [
        (0, "Hi", "stop", 3),
        (1, "b", "length", 4),
    ]
    answer = pieces.chat_answer(ABOUT, parts, True, pieces.usage(10, parts))
    assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 7, "total_tokens": 17}
    first = answer["choices"][0]
    assert first["message"] == {"role": "assistant", "content": "Hi", "refusal": None}
    rows = first["logprobs"]["content"]
    assert rows[0] == {
        "token": "Hé", "logprob": -0.5, "bytes": list("Hé".encode()),
        "top_logprobs": [
            {"token": "Hé", "logprob": -0.5, "bytes": list("Hé".encode())},
            {"token": "Ho", "logprob": -1.25, "bytes": list(b"Ho")},
        ],
    }  # fmt: skip
    assert rows[1]["bytes"] is None  # a part of a character
    assert pieces.chat_answer(ABOUT, parts, False, {})["choices"][0]["logprobs"] is None


def test_a_completions_logprobs():
    """The first token of an echo has none; of two tokens with the same text the likelier one is told."""
    piece = Piece(0, "OnceHé\ufffd", (Scored("Once", None), *TOKENS), "length", 0)
    found = pieces.text_answer(ABOUT, [piece], True, {})["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [None, -0.5, -2.0]
    assert found["text_offset"] == [0, 4, 6]
    assert found["top_logprobs"] == [None, {"Hé": -0.5, "Ho": -1.25}, {"\ufffd": -2.0, "a": -0.125}]


def test_errors_have_openais_form():
    assert error_body(429, "full") == {
        "error": {"message": "full", "type": "rate_limit_error", "param": None, "code": None}
    }
    assert error_body(400, "n: got 0", "n")["error"]["param"] == "n"
    assert error_body(502, "x")["error"]["type"] == "server_error"
