"""Answers to a question with a few choices: their probabilities, read from tokens or parsed from a text."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from rlhf.errors import short

LITTLE = 0.1
"""Below this probability of all choices together, a model has hardly answered."""


class NoAnswer(ValueError):
    """A reply that names none of the choices, or several."""


class Answered(NamedTuple):
    """The answer to one question."""

    probabilities: tuple[float, ...]
    """Of each choice, scaled to sum 1; 1 for the choice that a parsed text names."""
    together: float
    """The sum before scaling; 1 where a text was parsed."""
    text: str | None = None
    """The reply, where one was written."""

    @property
    def best(self) -> int:
        """The index of the most probable choice, the first of equals."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)


@dataclass
class Spent:
    """What asking has cost so far."""

    calls: int = 0
    tokens: int | None = 0
    """Read and written; None where nobody counts them."""
    seconds: float = 0.0
    """Summed over calls, side by side or not."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, calls: int, tokens: int | None, seconds: float) -> None:
        """Note some calls, from any thread."""
        with self._lock:
            self.calls, self.seconds = self.calls + calls, self.seconds + seconds
            self.tokens = None if tokens is None or self.tokens is None else self.tokens + tokens


def answered(shares: Sequence[float], text: str | None = None) -> Answered | NoAnswer:
    """Scale the choices' shares of probability to sum 1; a `NoAnswer` where they have none."""
    together = sum(shares)
    if together <= 0:
        return NoAnswer(f"the choices have probability {together:g}")
    return Answered(tuple(share / together for share in shares), min(1.0, together), text)


class Token(Protocol):
    """A token that a server wrote (`rlhf.client.Token`): its text, log-probability, and those of the likeliest here."""

    @property
    def text(self) -> str: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top(self) -> Mapping[str, float]: ...


def read_tokens(tokens: Sequence[Token], choices: Sequence[str]) -> list[float]:
    """Return each choice's probability, as far as the likeliest tokens along a written answer show it.

    A token counts for the choice that it begins, if it is the only one: "Y" for Yes. One that begins several ("1" of 1
    and 10, "[[" of [[A]] and [[B]]) is followed where the answer goes that way, and left out elsewhere: the sum is a
    lower bound of what the choices have together. White space before a choice is ignored.
    """
    choices = list(choices)
    shares, path, reach = [0.0] * len(choices), "", 1.0
    for token in tokens:
        onward = 0.0
        for text, logprob in {**token.top, token.text: token.logprob or 0.0}.items():
            begun = _begun(path + text, choices)
            if begun:
                onward += math.exp(logprob)
            if len(begun) == 1:
                shares[begun[0]] += reach * math.exp(logprob)
        if path.strip() in choices:  # what does not go on as a longer choice ends it here
            shares[choices.index(path.strip())] += reach * max(0.0, 1.0 - onward)
        path, reach = path + token.text, reach * math.exp(token.logprob or 0.0)
        if len(_begun(path, choices)) <= 1:
            return shares
    if path.strip() in choices:
        shares[choices.index(path.strip())] += reach
    return shares


def _begun(text: str, choices: Sequence[str]) -> list[int]:
    """Return the choices that a text, white space aside, is or begins."""
    start = text.lstrip()
    return [index for index, choice in enumerate(choices) if choice.startswith(start) or choice == start.rstrip()]


def parsed(text: str, choices: Sequence[str]) -> Answered:
    """Read a reply by `named_letter`. Raises NoAnswer."""
    letter = named_letter(text, choices)
    return Answered(tuple(float(letter == choice) for choice in choices), 1.0, text)


def named_letter(reply: str, letters: Sequence[str]) -> str:
    """Return the letter, or other choice, that a reply names: ``B``, ``(B)``, ``B. It refused``, ``Answer: B``.

    Raises NoAnswer for a reply that names none in one of these ways, or goes on to a second one (``A or B``).
    """
    one = "|".join(re.escape(letter) for letter in sorted(letters, key=len, reverse=True))
    one = rf"(?<![\w.+-])({one})(?!\s*(?:[,/&+]|\bor\b|\band\b)\s*(?:{one})(?!\w))"
    found = re.match(rf"\W*?{one}(?:\W*$|[\s\"'*]*(?:[).:,;\-–](?!\w)|\n))", reply) or re.search(
        rf"(?i:\banswer(?: is)?)\W*?{one}(?!\w|\.\d|\s+\w)", reply
    )
    if found is None:
        raise NoAnswer(f"the grader's reply names none of {', '.join(letters)}: {short(reply, 80)!r}")
    return found.group(1)
