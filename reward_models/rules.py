"""Rules about a response's form and content, each a small record that scores, and `Rules`, their weighted sum.

::

    # my_rules.py, for PPO as  reward_functions: [my_rules.py:rules]
    from reward_models.rules import ExactAnswer, Format, Length, Rules

    rules = Rules({
        "format": (0.5, Format(r"<think>.*</think>\\s*<answer>.*</answer>")),
        "length": (0.2, Length(20, 120, fall_off=60)),
        "answer": (1.0, ExactAnswer("answer", inside=r"<answer>(.*?)</answer>")),
    })

A rule scores 1 where it is kept, 0 where it is broken (`Length`: also values between) and None where it does not apply;
a penalty is a negative weight. All have trl's reward-function signature and may also be used alone. White space around
a response never counts. Python cannot interrupt a regular expression, so no time-out helps against one that runs for
ever: avoid nested repetitions such as ``(a+)+``.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, NoReturn

from reward_models.functions import Texts, column_values, response_text
from rlhf.calls import call
from rlhf.errors import InputError
from rlhf.rows.messages import Messages

Rule = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Format:
    """Scores 1 where the whole response matches the regular expression `pattern`, else 0; ``.`` matches line breaks."""

    pattern: str

    def __post_init__(self) -> None:
        _compiled("Format", self.pattern)

    def __call__(self, prompts: Texts, completions: Texts, **columns: object) -> list[float]:
        pattern = _compiled("Format", self.pattern)
        return [float(pattern.fullmatch(_text(c)) is not None) for c in completions]


@dataclass(frozen=True)
class Found:
    """Scores 1 where the regular expression `pattern` matches somewhere in the response, else 0; ``.`` matches line
    breaks."""

    pattern: str

    def __post_init__(self) -> None:
        _compiled("Found", self.pattern)

    def __call__(self, prompts: Texts, completions: Texts, **columns: object) -> list[float]:
        pattern = _compiled("Found", self.pattern)
        return [float(pattern.search(_text(c)) is not None) for c in completions]


@dataclass(frozen=True)
class Length:
    """Scores 1 from `low` to `high` words (or characters), and ``(1 + cos(pi * d / fall_off)) / 2`` at a distance d
    outside: smooth at both ends, 1/2 at half of `fall_off`, 0 from `fall_off` on."""

    low: int
    high: int
    fall_off: float
    unit: Literal["words", "characters"] = "words"

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise InputError(f"Length: low={self.low}, high={self.high}; give 0 <= low <= high")
        if not self.fall_off > 0:
            raise InputError(f"Length: fall_off={self.fall_off} must be positive")
        if self.unit not in ("words", "characters"):
            raise InputError(f"Length: unit={self.unit!r} must be 'words' or 'characters'")

    def __call__(self, prompts: Texts, completions: Texts, **columns: object) -> list[float]:
        texts = [_text(c) for c in completions]
        return [self._share(len(text.split() if self.unit == "words" else text)) for text in texts]

    def _share(self, count: int) -> float:
        distance = max(self.low - count, count - self.high, 0) / self.fall_off
        return 0.0 if distance >= 1 else (1 + math.cos(math.pi * distance)) / 2


@dataclass(frozen=True)
class Forbidden:
    """Scores 0 where one of the regular expressions `patterns` matches somewhere in the response, else 1.

    Ignores case, Unicode's wide, small or stylised forms of a letter (NFKC), and invisible characters in a word.
    """

    patterns: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.patterns, str) or not self.patterns:
            raise InputError(f"Forbidden: patterns={self.patterns!r}; give a list of at least one regular expression")
        object.__setattr__(self, "patterns", tuple(self.patterns))
        for pattern in self.patterns:
            _compiled("Forbidden", pattern)

    def __call__(self, prompts: Texts, completions: Texts, **columns: object) -> list[float]:
        patterns = [_compiled("Forbidden", pattern) for pattern in self.patterns]
        both = [(text, _plain(text)) for text in map(_text, completions)]  # a pattern may hold what `_plain` replaces
        return [float(not any(p.search(text) for p in patterns for text in texts)) for texts in both]


@dataclass(frozen=True)
class ExactAnswer:
    """Scores 1 where the response is the answer in the dataset's `column`, else 0; None where that column is empty.

    The column holds a text or a number, or a list of equally right ones. Numbers are compared by value (``1,200`` is
    ``1200.0``), other texts without case, outer punctuation and runs of white space. inside: a regular expression whose
    first group holds the answer (its last match counts); without it, the whole response is the answer.
    """

    column: str = "answer"
    inside: str | None = None

    def __post_init__(self) -> None:
        if self.inside is not None and _compiled("ExactAnswer", self.inside).groups < 1:
            raise InputError(f"ExactAnswer: inside={self.inside!r} has no group; put the answer's part in (...)")

    def __call__(self, prompts: Texts, completions: Texts, **columns: object) -> list[float | None]:
        answers = column_values("ExactAnswer", self.column, columns)
        return [self._score(_text(c), answer) for c, answer in zip(completions, answers, strict=True)]

    def _score(self, text: str, answer: object) -> float | None:
        accepted = answer if isinstance(answer, list | tuple) else [answer]
        wanted = [normalised(str(a)) for a in accepted if a is not None and str(a).strip()]
        if not wanted:
            return None
        if self.inside is not None:
            matches = list(_compiled("ExactAnswer", self.inside).finditer(text))
            if not matches:
                return 0.0
            text = matches[-1].group(1) or ""
        return float(normalised(text) in wanted)


@dataclass(frozen=True)
class JsonSchema:
    """Scores 1 where the whole response is one JSON value that `schema` (JSON Schema) allows, else 0.

    Needs the package jsonschema. A schema is never fetched from the network: a ``$ref`` to an address is refused.
    """

    schema: Mapping[str, object]

    def __post_init__(self) -> None:
        jsonschema = _jsonschema()
        if not isinstance(self.schema, Mapping):
            raise InputError(f"JsonSchema: schema is a {type(self.schema).__name__}; give a dict")
        try:
            jsonschema.validators.validator_for(self.schema, jsonschema.Draft202012Validator).check_schema(self.schema)
        except jsonschema.SchemaError as error:
            raise InputError(f"JsonSchema: the schema is not valid at {error.json_path}: {error.message}") from None

    def __call__(self, prompts: Texts, completions: Texts, **columns: object) -> list[float]:
        import referencing

        jsonschema = _jsonschema()
        kind = jsonschema.validators.validator_for(self.schema, jsonschema.Draft202012Validator)
        validator = kind(self.schema, registry=referencing.Registry())
        try:
            return [self._score(validator, _text(c)) for c in completions]
        except referencing.exceptions.Unresolvable as error:
            raise InputError(f"JsonSchema: $ref {error.ref!r} leads outside the schema; copy it into $defs") from None

    @staticmethod
    def _score(validator: Any, text: str) -> float:
        try:
            return float(validator.is_valid(json.loads(text, parse_constant=_no_json)))
        except (ValueError, RecursionError):  # no JSON, or brackets a thousand deep
            return 0.0


@dataclass(frozen=True)
class Rules:
    """The weighted sum of several rules (or any reward functions), each part logged on its own.

    parts: name -> (weight, rule). With ``log_metric`` and ``log_extra`` from the trainer (ours or trl's), every part is
    logged before its weight as ``score/<name>``: its mean in the metrics, its score of each response in the samples. A
    part that scores a response None is left out of that response's sum; where all do, the score is None.
    """

    parts: Mapping[str, tuple[float, Rule]]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Mapping) or not self.parts:
            raise InputError('Rules: give at least one part: Rules({"name": (weight, rule)})')
        for name, part in self.parts.items():
            if not (isinstance(part, tuple | list) and len(part) == 2):
                raise InputError(f"Rules: {name}: give a pair (weight, rule), got {part!r}")
            weight, rule = part
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise InputError(f"Rules: {name}: weight {weight!r} must be a finite number")
            if not callable(rule) or isinstance(rule, type):
                raise InputError(f"Rules: {name}: {rule!r} is no rule; give an object such as Length(20, 120, 60)")

    def __call__(
        self,
        prompts: Texts,
        completions: Texts,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[float | None]], None] | None = None,
        **columns: object,
    ) -> list[float | None]:
        logs = {name: f for name, f in (("log_metric", log_metric), ("log_extra", log_extra)) if f is not None}
        sums: list[float | None] = [None] * len(completions)
        for name, (weight, rule) in self.parts.items():
            scores = list(call(rule, {"prompts": prompts, "completions": completions, **logs, **columns}))
            if len(scores) != len(completions):
                raise InputError(f"Rules: {name} returned {len(scores)} scores for {len(completions)} responses")
            if log_extra is not None:
                log_extra(f"score/{name}", scores)
            for row, score in enumerate(scores):
                if score is None:
                    continue
                if log_metric is not None:
                    log_metric(f"score/{name}", score)  # row by row: the mean is over all processes' responses
                sums[row] = (sums[row] or 0.0) + weight * score
        return sums


def normalised(text: str) -> str | Decimal:
    """Return a text as `ExactAnswer` compares it: a number's value, else without case, outer punctuation, extra
    space."""
    text = " ".join(unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-").split())
    number = text.rstrip(".!? ").lstrip("$€£").strip()
    if _NUMBER.fullmatch(number):
        return Decimal(number.replace(",", ""))
    return text.casefold().strip(" .,;:!?\"'`*()[]“”‘’")


_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))", re.ASCII)


def _text(completion: str | Messages) -> str:
    return response_text(completion).strip()


def _plain(text: str) -> str:
    """Replace compatibility letters by plain ones and drop invisible characters (Unicode's category Cf)."""
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")


def _compiled(rule: str, pattern: str) -> re.Pattern[str]:
    """Compile a pattern. A repeated call is cheap, since Python caches the last few hundred compiled patterns."""
    try:
        return re.compile(pattern, re.DOTALL | (re.IGNORECASE if rule == "Forbidden" else 0))
    except (re.error, TypeError) as error:
        raise InputError(f"{rule}: {pattern!r} is no regular expression: {error}") from None


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _jsonschema() -> Any:
    try:
        import jsonschema
    except ImportError:
        raise InputError("JsonSchema needs the package jsonschema: pip install 'rlhf-recipes[rules]'") from None
    return jsonschema
