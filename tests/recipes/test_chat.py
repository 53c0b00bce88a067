"""`rlhf chat` in the terminal: a folder and a server, commands, Ctrl-C, hostile text."""

from __future__ import annotations

import io
import sys

import pytest
from reference import recipe
from reference.policy_server import ScriptedEngine, serving
from reference.tiny_chain import save_base

from rlhf.client import Client
from rlhf.serving.app import Service
from rlhf.serving.config import ServingConfig


@pytest.fixture
def typed(monkeypatch):
    """Type lines, then Ctrl-D."""

    def lines(*words: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{word}\n" for word in words)))

    return lines


def test_a_chat_with_a_server(typed):
    engine = ScriptedEngine()
    with serving(Service(engine, ServingConfig())) as url:
        typed("Hello", "", "/regenerate", "Why?", "/reset", "/regenerate", "/what", "/quit", "never")
        result = recipe.run("chat", url, "--model", "ppo", "--seed", 5, "--system", "Be kind.", "--temperature", 0)
    assert result.code == 0, result.err
    assert result.out.count("ppo heard: Hello") == 2
    assert "a new conversation" in result.out
    assert "there is nothing to answer yet" in result.out
    assert "/regenerate answers again" in result.out
    assert "never" not in result.out
    assert [asked.sampling.seed for asked in engine.asked] == [5, 6, 7]
    assert engine.asked[1].messages == engine.asked[0].messages  # the same question
    assert [message["content"] for message in engine.asked[2].messages] == [
        "Be kind.", "Hello", "ppo heard: Hello", "Why?"
    ]  # fmt: skip


def test_a_chat_with_a_folder_is_what_its_server_says(typed, tmp_path, tiny_model, tiny_tokenizer):
    from rlhf.serving.engine import LocalEngine
    from rlhf.serving.policies import load_policies

    base = save_base(tmp_path, tiny_model, tiny_tokenizer)
    config = ServingConfig()
    with serving(Service(LocalEngine(load_policies({"base": str(base)}, None, "cpu"), config), config)) as url:
        (expected,) = Client(url).chat([{"role": "user", "content": "Hello"}], seed=3, max_tokens=12, temperature=0.7)
    typed("Hello")
    result = recipe.run("chat", base, "--seed", 3, "--max_tokens", 12, "--temperature", 0.7, "--bf16", "false")
    assert result.code == 0, result.err
    from rlhf.errors import visible

    assert visible(expected.text) in result.out


def test_ctrl_c_stops_the_answer_and_not_the_chat(typed, monkeypatch):
    interrupted = []
    plain = Client.stream

    def stream(self, *args, **kwargs):
        for piece in plain(self, *args, **kwargs):
            yield piece
            if not interrupted:
                interrupted.append(piece)
                raise KeyboardInterrupt

    monkeypatch.setattr(Client, "stream", stream)
    engine = ScriptedEngine(names=("ppo",), pause=0.01)
    with serving(Service(engine, ServingConfig())) as url:
        typed("Hello", "Again")
        result = recipe.run("chat", url)
    assert result.code == 0, result.err
    assert "stopped" in result.out
    assert "ppo heard: Again" in result.out
    assert [message["content"] for message in engine.asked[1].messages] == ["Hello", "ppo", "Again"]


def test_what_a_model_writes_moves_no_cursor(typed):
    hostile = "\x1b[2J\x1b]0;owned\x07 a\rb \u202e end"
    with serving(Service(ScriptedEngine(("ppo",), lambda *_: hostile), ServingConfig())) as url:
        typed("Hello")
        result = recipe.run("chat", url)
    assert "\\x1b[2J\\x1b]0;owned\\x07 a\\rb \\u202e end" in result.out
    assert "\x1b[2J" not in result.out


def test_a_server_that_refuses_is_told_and_the_chat_goes_on(typed):
    def speak(policy, question, seed):
        raise ZeroDivisionError

    with serving(Service(ScriptedEngine(("ppo",), speak), ServingConfig())) as url:
        typed("Hello", "/quit")
        result = recipe.run("chat", url, "--timeout", 5)
    assert result.code == 0
    assert "500: the server failed: ZeroDivisionError" in " ".join(result.out.split())
    assert "an empty answer" not in result.out


def test_a_question_without_an_answer_gives_way_to_the_next_one(typed):
    """Templates that want turns of user and assistant by turns refuse two questions in a row."""
    asked = []

    def speak(policy, question, seed):
        asked.append(question)
        if len(asked) < 3:
            raise ZeroDivisionError
        return "Yes."

    engine = ScriptedEngine(("ppo",), speak)
    with serving(Service(engine, ServingConfig())) as url:
        typed("Hello", "/regenerate", "Why?", "So?")
        result = recipe.run("chat", url, "--timeout", 5, "--system", "Be kind.")
    assert result.code == 0
    assert asked == ["Hello", "Hello", "Why?", "So?"]
    assert [message["content"] for message in engine.asked[-1].messages] == ["Be kind.", "Why?", "Yes.", "So?"]


def test_mistakes(tmp_path):
    with serving(Service(ScriptedEngine(), ServingConfig())) as url:
        for words, line in [
            ((), "name a policy's folder or a server first: rlhf chat FOLDER"),
            ((tmp_path / "none",), "no such model folder"),
            ((url,), "serves sft, ppo; name one"),
            ((url, "--model", "sfd"), "did you mean sft?"),
            ((url, "--temperature", 3), "temperature=3.0 must be 0, or from 0.001 to 2"),
            (("http://me:pw@127.0.0.1",), "holds a user or password"),
        ]:
            result = recipe.run("chat", *words)
            assert result.code == 2, words
            assert line in result.err
            assert result.err.count("\n") == 1
