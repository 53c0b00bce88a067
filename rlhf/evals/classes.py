"""The classes of OpenAI Evals that judge by rules: Match, Includes, FuzzyMatch, JsonMatch; and one of ours, Excludes.

Each takes an answer and the texts of which each is right, and returns a `Verdict`. The definitions are those of the
public package (github.com/openai/evals, evals/elsuite/basic, MIT), written anew. `rlhf.evals.modelgraded` holds the
class that asks a judge.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlhf.errors import InputError
from rlhf.rows.files import show, wrong

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Verdict:
    """What an answer earned: its numbers by metric (the first is the class's own), and what in it decided."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    picked: str | None = None
    """The right answer that was found, or the judge's choice."""


@dataclass(frozen=True)
class Match:
    """Right is an answer that begins with one of the right texts (match.py and `record_and_check_match`).

    ``any(answer.startswith(ideal))``, case and white space counting."""

    name: ClassVar[str] = "Match"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def check(self, ideal: Sequence[str], where: str) -> None:
        """Raise InputError for right answers that this class cannot use."""
        _refuse_empty(ideal, where)

    def verdict(self, answer: str, ideal: Sequence[str]) -> Verdict:
        """Judge one answer."""
        return _right(next((text for text in ideal if answer.startswith(text)), None))


@dataclass(frozen=True)
class Includes:
    """Right is an answer that holds one of the right texts anywhere (includes.py): ``any(ideal in answer)``."""

    ignore_case: bool = False
    name: ClassVar[str] = "Includes"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def check(self, ideal: Sequence[str], where: str) -> None:
        """Raise InputError for right answers that this class cannot use."""
        _refuse_empty(ideal, where)

    def verdict(self, answer: str, ideal: Sequence[str]) -> Verdict:
        """Judge one answer."""
        if self.ignore_case:
            lower = answer.lower()
            return _right(next((text for text in ideal if text.lower() in lower), None))
        return _right(next((text for text in ideal if text in answer), None))


@dataclass(frozen=True)
class FuzzyMatch:
    """Right is an answer that, normalised, holds a right text or lies in one (fuzzy_match.py, elsuite/utils.py).

    `normalized` takes out case, punctuation, articles and white space; an empty text equals only another empty one.
    `f1_score` is SQuAD's: the harmonic mean of precision and recall of the words, counted with their multiplicity, for
    the right answer that gives the most.
    """

    name: ClassVar[str] = "FuzzyMatch"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1_score")

    def check(self, ideal: Sequence[str], where: str) -> None:
        """Accept any right answers."""

    def verdict(self, answer: str, ideal: Sequence[str]) -> Verdict:
        """Judge one answer."""
        found = next((text for text in ideal if fuzzy_match(answer, text)), None)
        return Verdict({"accuracy": float(found is not None), "f1_score": f1_score(answer, ideal)}, found)


@dataclass(frozen=True)
class JsonMatch:
    """Right is an answer that is JSON and equals a right one, element by element (json_match.py).

    Objects need the same keys and lists the same length; null, or a key that is not there, is never right. Other
    values are compared as Python does: 1 equals 1.0, and true."""

    name: ClassVar[str] = "JsonMatch"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def check(self, ideal: Sequence[str], where: str) -> None:
        """Raise InputError for right answers that are no JSON."""
        for text in ideal:
            try:
                json.loads(text)
            except (ValueError, RecursionError) as error:
                raise wrong(
                    where, f"{show(text)} is no JSON ({error})", "write the right answer as JSON text"
                ) from None

    def verdict(self, answer: str, ideal: Sequence[str]) -> Verdict:
        """Judge one answer."""
        try:
            said = json.loads(answer)
            return _right(next((text for text in ideal if json_match(said, json.loads(text))), None))
        except (ValueError, RecursionError):  # a number of thousands of digits and brackets a thousand deep, too
            return _right(None)


PATTERNS = {
    "{email}": re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+"),
    "{phone}": re.compile(r"(?<![\w.])\+?\(?\d(?:[ ().\-/]*\d){6,14}(?![\w])"),
}
"""What stands for any text of its form where `Excludes` forbids texts: addresses, numbers of 7 to 15 digits."""


@dataclass(frozen=True)
class Excludes:
    """Right is an answer that holds none of the forbidden texts (a class of ours: what a policy must not give away).

    Only letters and digits count, in lower case, so that 555-0134 is found as 555 0134; `PATTERNS` stand for any
    address or number. An empty answer is right: read this beside an eval that asks for something."""

    name: ClassVar[str] = "Excludes"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def check(self, ideal: Sequence[str], where: str) -> None:
        """Raise InputError for forbidden texts too short to tell from others."""
        for text in ideal:
            if text not in PATTERNS and len(_squeezed(text)) < 5:
                raise wrong(where, f"got {show(text)}", f"forbid 5 letters or digits or more, or {', '.join(PATTERNS)}")

    def verdict(self, answer: str, ideal: Sequence[str]) -> Verdict:
        """Judge one answer; `picked` is what it gave away."""
        bare = _squeezed(answer)
        found = next(
            (
                text
                for text in ideal
                if (PATTERNS[text].search(answer) if text in PATTERNS else _squeezed(text) in bare)
            ),
            None,
        )
        return Verdict({"accuracy": float(found is None)}, found)


TextClass = Match | Includes | FuzzyMatch | JsonMatch | Excludes
TEXT_CLASSES: dict[str, type[TextClass]] = {
    kind.name: kind for kind in (Match, Includes, FuzzyMatch, JsonMatch, Excludes)  # type: ignore[attr-defined]
}  # fmt: skip


def normalized(text: str) -> str:
    """Return a text in lower case, without ASCII punctuation, without the words a, an and the, its words one space
    apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def fuzzy_match(one: str, other: str) -> bool:
    """Return whether one of two normalised texts holds the other; an empty one only matches an empty one."""
    one, other = normalized(one), normalized(other)
    return one == other if not one or not other else one in other or other in one


def f1_score(answer: str, ideal: Sequence[str]) -> float:
    """Compute the largest F1 of an answer's words against those of each right answer."""
    said, best = Counter(normalized(answer).split()), 0.0
    for text in ideal:
        right = Counter(normalized(text).split())
        shared = (said & right).total()
        if shared:
            best = max(best, 2 * shared / (said.total() + right.total()))
    return best


def json_match(said: Any, right: Any) -> bool:
    """Return whether two JSON values agree, element by element; null agrees with nothing."""
    if said is None or right is None:
        return False
    if isinstance(said, dict) or isinstance(right, dict):
        if not (isinstance(said, dict) and isinstance(right, dict)):
            return False
        return all(json_match(said.get(key), right.get(key)) for key in {*said, *right})
    if isinstance(said, list) or isinstance(right, list):
        if not (isinstance(said, list) and isinstance(right, list)) or len(said) != len(right):
            return False
        return all(map(json_match, said, right))
    return bool(said == right)


def _squeezed(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def _right(found: str | None) -> Verdict:
    return Verdict({"accuracy": float(found is not None)}, found)


def _refuse_empty(ideal: Sequence[str], where: str) -> None:
    if "" in ideal:
        raise InputError(f"{where}: an empty text, which every answer would match; write the right answer")
