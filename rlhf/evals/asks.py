"""Ask a model to choose: a question, a few choices, and the probability of each as the answer.

`LocalModel` reads next-token probabilities of a model in this process, `OverTheWire` those that a server sends
(`top_logprobs`), and `Service` the reply of any function from text to text. Where there are no probabilities, a strict
parser reads the reply, and a reply that names no choice, or two, is a `NoAnswer`: an abstention, never a guess.

Every answer says how much probability the choices had together: where that is little, the model would have written
something else, and what the choices share out is noise.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.errors import InputError, RunStopped
from rlhf.evals.answers import LITTLE, Answered, NoAnswer, Spent, answered, named_letter, parsed, read_tokens
from rlhf.evals.local import LocalModel, Question, choice_tokens
from rlhf.rows.messages import Messages

if TYPE_CHECKING:
    import torch

    from rlhf.client import Client, Completion

__all__ = [
    "LITTLE",
    "Answered",
    "Asks",
    "LocalModel",
    "NoAnswer",
    "OverTheWire",
    "Question",
    "Service",
    "Spent",
    "choice_tokens",
    "load",
    "named_letter",
    "read_tokens",
]

TOP = 20
"""Tokens whose probabilities a server is asked for: the most that OpenAI's HTTP allows."""


class Asks(Protocol):
    """A function that answers questions by one of the choices: per question an `Answered`, or the exception that the
    question failed with (`NoAnswer` for a reply outside the choices)."""

    def __call__(self, questions: Sequence[Any], choices: Sequence[str]) -> Sequence[Answered | Exception]: ...


def load(
    model: str | Path | Callable[[str], str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tokens_per_microbatch: int = 16384,
    served_as: str | None = None,
) -> LocalModel | OverTheWire | Service:
    """Load what answers.

    model: a causal language model's folder or hub id; the address of a server that speaks OpenAI's HTTP
    (http://host:port, with the model's name there in `served_as` where it serves several); or a callable that takes a
    text and returns one. device: by default the accelerator, where there is one. dtype: by default float32. Raises
    InputError.
    """
    if not isinstance(model, str | Path):
        return Service(model)
    if re.match(r"https?://", str(model)):
        from rlhf.client import Client

        return OverTheWire(Client(str(model), model=served_as))
    import torch
    from torch import nn

    from rlhf.models import loading

    tokenizer = loading.load_tokenizer(model)
    loaded = loading.load_policy(model, dtype=dtype or torch.float32)
    nn.Module.to(loaded, loading.default_device() if device is None else torch.device(device))
    return LocalModel(loaded, tokenizer, tokens_per_microbatch)


class OverTheWire:
    """Asks a server that speaks OpenAI's HTTP, several questions at a time, in threads.

    client: `rlhf.client.Client`. The likeliest answer is asked for (temperature 0), with the probabilities of the 20
    likeliest tokens. Where the choices have less than `LITTLE` of them, or the server has none to give, the reply's
    text is parsed. max_tokens: of a reply; a model that thinks first needs more.
    """

    def __init__(self, client: Client, at_once: int = 8, max_tokens: int = 16) -> None:
        self.client, self.at_once, self.max_tokens = client, at_once, max_tokens
        self.probabilities = True
        """Whether the server sends probabilities, as far as is known."""
        self.spent = Spent()

    def __call__(self, questions: Sequence[Question], choices: Sequence[str]) -> list[Answered | Exception]:
        def one(question: Question) -> Answered | Exception:
            turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
            started = time.perf_counter()
            reply = self._reply(turns)
            self.spent.add(1, None, time.perf_counter() - started)
            shares = read_tokens(reply.tokens, choices)
            if sum(shares) >= LITTLE:
                return answered(shares, reply.text)
            return parsed(reply.text, choices)

        return _side_by_side(one, questions, self.at_once)

    def _reply(self, turns: Messages) -> Completion:
        settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": self.max_tokens}
        if self.probabilities:
            try:
                return self.client.chat(turns, **settings, logprobs=True, top_logprobs=TOP)[0]
            except (InputError, RunStopped) as error:
                if "logprob" not in str(error) and "log-prob" not in str(error):
                    raise
                self.probabilities = False
        return self.client.chat(turns, **settings)[0]


class Service:
    """Gets answers from a callable that takes a text and returns one; asks several questions at a time, in threads."""

    def __init__(self, reply: Callable[[str], str], at_once: int = 8) -> None:
        if not callable(reply):
            raise InputError(f"the grader model is a {type(reply).__name__}; give a folder, a hub id or a callable")
        self.reply = reply
        self.at_once = at_once
        self.spent = Spent()

    def __call__(self, questions: Sequence[str], choices: Sequence[str]) -> list[Answered | Exception]:
        def one(question: str) -> Answered:
            started = time.perf_counter()
            text = self.reply(question)
            self.spent.add(1, None, time.perf_counter() - started)
            return parsed(text, choices)

        return _side_by_side(one, questions, self.at_once)


def _side_by_side(
    one: Callable[[Any], Answered | Exception], questions: Sequence[Any], at_once: int
) -> list[Answered | Exception]:
    failed: list[RunStopped] = []  # since the last answer

    def caught(question: Any) -> Answered | Exception:
        last = failed[:at_once]  # a copy: another thread may get an answer meanwhile
        if len(last) == at_once:  # the server is gone: each further question would wait for it as long
            return last[0]
        try:
            answer = one(question)
        except Exception as error:  # of this row alone; the caller decides what follows
            failed.extend([error] if isinstance(error, RunStopped) else [])
            return error
        failed.clear()
        return answer

    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(caught, questions))
