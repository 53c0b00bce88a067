"""ModelBasedClassify of OpenAI Evals: a judge reads the policy's answer in a prompt and chooses.

The specs (registry/modelgraded/*.yaml) and the parser of a judge's reply are those of the public package
(github.com/openai/evals, evals/elsuite/modelgraded, MIT), written anew. Two things differ. A judge that is to answer
with its choice alone (`classify`) is asked by `rlhf.evals.asks`, which reads the choices' probabilities where it can.
And braces in a sample stay as they are, where the package doubles them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlhf.errors import InputError, unknown
from rlhf.evals.classes import Verdict
from rlhf.evals.samples import Sample, asked
from rlhf.rows.files import show, wrong
from rlhf.rows.messages import Messages, as_messages

INVALID = "__invalid__"
"""The choice of a reply that names none."""

ANSWER_PROMPTS = {
    "classify": "Answer with one of {choices} and nothing else, without quotes or punctuation.",
    "classify_cot": "Begin with one of {choices}, without quotes or punctuation, on a line of its own. Then explain, "
    "step by step, what speaks for it.",
    "cot_classify": "Reason first, step by step, before you name an answer. Then write one of {choices}, without "
    "quotes or punctuation, on a line of its own, and repeat it alone on the last line.\n\nReasoning:",
    "cot_classify_jp": "まず、答えを言わずに、理由を順を追って書いてください。次に、{choices} のうち一つだけを、引用"
    "符も句読点も付けずに単独の行に書き、最後の行にもう一度それだけを書いてください。\n\n理由：",
}
"""What is added to a spec's prompt where the eval, and not the spec, says how the judge is to answer."""

MATCHES: dict[str, Callable[[str, str], bool]] = {
    "include": lambda line, choice: choice in line,
    "exact": lambda line, choice: line == choice,
    "endswith": lambda line, choice: line.endswith(choice),
    "starts_or_endswith": lambda line, choice: line.startswith(choice) or line.endswith(choice),
}
"""When a line of a reply, without its punctuation, names a choice."""

_FIELDS = (
    "prompt", "choice_strings", "input_outputs", "eval_type", "choice_scores", "output_template",
    "completion_sample_templates", "description",
)  # fmt: skip
_PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_WITHOUT = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Spec:
    """A modelgraded spec: the judge's prompt with {places}, the choices, their scores."""

    prompt: Messages
    choices: tuple[str, ...] | str
    """The choices, or "from_n", "from_n_abc", "from_n_ABC": as many as answers are compared."""
    outputs: Mapping[str, str]
    """A column that asks the policy -> the place of its answer in the prompt."""
    eval_type: str | None = None
    scores: Mapping[str, float] | str | None = None
    """The score of each choice, or "from_strings": the choices are numbers."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """By the place of an answer: how one of several answers is written there."""


def read_spec(tree: object, where: str) -> Spec:
    """Read a spec from what its YAML holds. Raises InputError that names the field."""
    if not isinstance(tree, dict):
        raise wrong(where, f"got {show(tree)}", "a modelgraded spec has prompt, choice_strings and input_outputs")
    for name in tree:
        if name not in _FIELDS:
            unknown(str(name), _FIELDS, where, "field of a modelgraded spec")
    prompt, outputs = tree.get("prompt"), tree.get("input_outputs")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt.strip() else prompt
    if not isinstance(outputs, dict) or not outputs or not all(isinstance(v, str) for v in outputs.values()):
        raise wrong(f"{where}: input_outputs", f"got {show(outputs)}", "write asking column: place of the answer")
    kind = tree.get("eval_type")
    if kind is not None:
        _known_type(kind, f"{where}: eval_type")
    template = tree.get("output_template")
    templates = tree.get("completion_sample_templates") or (
        dict.fromkeys(outputs.values(), template) if template else {}
    )
    if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
        raise wrong(f"{where}: output_template", f"got {show(templates)}", "write text with {i} and {output}")
    return Spec(
        as_messages(turns, f"{where}: prompt"),
        _choices(tree.get("choice_strings"), f"{where}: choice_strings"),
        {str(key): value for key, value in outputs.items()},
        kind,
        _scores(tree.get("choice_scores"), f"{where}: choice_scores"),
        templates,
    )


def _choices(value: object, where: str) -> tuple[str, ...] | str:
    if isinstance(value, str) and value.startswith("from_n"):
        if value not in ("from_n", "from_n_abc", "from_n_ABC"):
            raise wrong(where, f"got {value!r}", "write from_n, from_n_abc or from_n_ABC")
        return value
    found = list(value) if isinstance(value, str | list) else []
    if len(found) < 2 or len(set(map(str, found))) < len(found):
        raise wrong(where, f"got {show(value)}", "write two or more different choices")
    for choice in found:
        if not isinstance(choice, str) or not choice.strip() or choice != choice.translate(_WITHOUT):
            raise wrong(where, f"got {show(choice)}", "a choice is text without punctuation; quote Yes and No")
    return tuple(found)


def _scores(value: object, where: str) -> Mapping[str, float] | str | None:
    if value is None or value == "from_strings":
        return value  # type: ignore[return-value]
    numbers = value.values() if isinstance(value, dict) else ()
    if not numbers or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise wrong(where, f"got {show(value)}", "write choice: number lines, or from_strings")
    return {str(choice): float(number) for choice, number in value.items()}  # type: ignore[attr-defined]


def _known_type(kind: object, where: str) -> None:
    if kind not in ANSWER_PROMPTS:
        raise wrong(where, f"got {show(kind)}", f"use one of {', '.join(ANSWER_PROMPTS)}")


@dataclass(frozen=True)
class ModelBasedClassify:
    """Right is what a judge says: its choice, and the choice's score where the spec has scores.

    eval_type: how the judge answers, where the eval says it; then `ANSWER_PROMPTS` tells the judge. compared: answers
    of the policy that the judge sees side by side (multicomp_n). metaeval: the answers stand in the samples, and so
    does the right choice (`choice`): what is measured is the judge, as `metascore`.
    """

    spec: Spec
    eval_type: str | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Texts for further places of the prompt (modelgraded_spec_args)."""
    match: str = "starts_or_endswith"
    metaeval: bool = False
    compared: int = 1
    name: ClassVar[str] = "ModelBasedClassify"

    def __post_init__(self) -> None:
        if self.eval_type is not None:
            _known_type(self.eval_type, "eval_type")
        if self.spec.eval_type is None and self.eval_type is None:
            raise InputError("eval_type: neither the eval nor its spec has one; say cot_classify, for example")
        if self.match not in MATCHES:
            unknown(self.match, MATCHES, "match_fn", "name")
        if self.compared > 1 and set(self.spec.outputs.values()) - set(self.spec.templates):
            raise InputError(f"multicomp_n={self.compared}: the spec has no output_template for several answers")
        if isinstance(self.spec.choices, str) and self.compared < 2:
            raise InputError(f"choice_strings: {self.spec.choices} needs multicomp_n of 2 or more")
        missing = set(self.choices) - set(self.scores) if self.scores else set()
        if missing:
            raise InputError(f"choice_scores: has none for {', '.join(sorted(missing))}")

    @property
    def parsed_as(self) -> str:
        """Return how a reply is read: the spec's own eval_type comes first."""
        return str(self.spec.eval_type or self.eval_type)

    @property
    def by_letter(self) -> bool:
        """Return whether the judge answers with its choice alone, so that probabilities can be read."""
        return self.parsed_as == "classify"

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the choices of this eval."""
        if isinstance(self.spec.choices, tuple):
            return self.spec.choices
        names = {"from_n_abc": string.ascii_lowercase, "from_n_ABC": string.ascii_uppercase}.get(self.spec.choices)
        return tuple(names[i % 26] if names else str(i + 1) for i in range(self.compared))

    @property
    def scores(self) -> dict[str, float]:
        """Return each choice's score; {} where the spec has none."""
        if self.spec.scores == "from_strings":
            try:
                return {choice: float(choice) for choice in self.choices}
            except ValueError as error:
                raise InputError(f"choice_scores: from_strings, and {error}") from None
        return dict(self.spec.scores or {})  # type: ignore[arg-type]

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the least and the greatest score."""
        values = self.scores.values() or (0.0, 1.0)
        return min(values), max(values)

    def asks(self, sample: Sample) -> dict[str, Messages]:
        """Return what the policy is asked, by the place of its answer; {} for answers that stand in the sample. Raises
        InputError."""
        found: dict[str, Messages] = {}
        for column, place in self.spec.outputs.items():
            if place in sample.columns:
                continue
            if self.metaeval:
                raise wrong(sample.where, f"no column {place}", "a metaeval's samples hold the answers")
            if sample.columns.get(column) is None:
                raise wrong(sample.where, f"no column {column}", "the spec asks the policy what stands in it")
            turns = sample.messages if column in ("input", "prompt") else []
            found[place] = turns or asked(sample.columns[column], f"{sample.where}: {column}")
        if self.metaeval and not isinstance(sample.columns.get("choice"), str):
            raise wrong(sample.where, "no column choice", "a metaeval's samples say which choice is right")
        return found

    def question(self, sample: Sample, answers: Mapping[str, Sequence[str]]) -> Messages:
        """Write what the judge is asked about the policy's answers, `compared` of them for every place. Raises
        InputError for a place that nothing fills."""
        places = {name: as_text(value) for name, value in sample.columns.items()}
        places |= {place: self._shown(place, texts) for place, texts in answers.items()}
        places |= {"n": str(self.compared), **self.arguments}
        turns = [{**turn, "content": filled(turn["content"], places, sample.where)} for turn in self.spec.prompt]
        if self.eval_type is not None:
            listed = " or ".join(f'"{choice}"' for choice in self.choices)
            turns[-1]["content"] += "\n\n" + ANSWER_PROMPTS[self.eval_type].format(choices=listed)
        return turns

    def _shown(self, place: str, texts: Sequence[str]) -> str:
        if self.compared == 1:
            return texts[0]
        parts = [
            filled(
                self.spec.templates[place],
                {"i": str(i + 1), "i_abc": string.ascii_lowercase[i % 26], "i_ABC": string.ascii_uppercase[i % 26],
                 "output": text, "n": str(len(texts))},
                "output_template",
            )
            for i, text in enumerate(texts)
        ]  # fmt: skip
        return "".join(parts).strip()

    def chosen(self, reply: str) -> str:
        """Return the choice that a reply in words names; INVALID for none."""
        return named_choice(reply, self.parsed_as, self.match, self.choices)

    def verdict(self, sample: Sample, choice: str) -> Verdict:
        """Turn the judge's choice into numbers: score (an invalid choice earns the least), invalid, each choice's
        share, metascore."""
        numbers: dict[str, float] = {}
        if self.metaeval:
            numbers["metascore"] = float(choice == sample.columns["choice"])
        if self.scores:
            numbers["score"] = self.scores.get(choice, self.bounds[0])
        numbers |= {f"choice_{name}": float(name == choice) for name in self.choices}
        numbers["invalid"] = float(choice == INVALID)
        return Verdict(numbers, choice)


def named_choice(reply: str, eval_type: str, match: str, choices: Sequence[str]) -> str:
    """Return the choice that a reply names: of its lines, stripped of white space and ASCII punctuation, the first that
    names one (the last, where the judge reasons first); INVALID where none does (`get_choice`)."""
    lines = reply.strip().split("\n")
    for line in reversed(lines) if eval_type.startswith("cot_classify") else lines:
        bare = line.strip().translate(_WITHOUT)
        if bare:
            for choice in choices:
                if MATCHES[match](bare, choice):
                    return choice
    return INVALID


def filled(template: str, places: Mapping[str, str], where: str) -> str:
    """Fill a template's {places}; doubled braces stand for one. What is filled in is not looked at again."""

    def fill(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        if found[1] not in places:
            raise wrong(where, f"nothing for {{{found[1]}}}", "the prompt of the judge needs a column of that name")
        return places[found[1]]

    return _PLACE.sub(fill, template)


def as_text(value: Any) -> str:
    """Write a column's value as a judge reads it: messages as lines with their roles (one alone as its text), other
    values as Python writes them."""
    if not (isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value)):
        return str(value)
    if len(value) == 1:
        return str(value[0]["content"])
    names = {"example_user": "user", "example_assistant": "assistant"}
    roles = [str(message.get("name") or message.get("role")) for message in value]
    lines = [f"{names.get(role, role).capitalize()}: {m['content']}" for role, m in zip(roles, value, strict=True)]
    return "\n".join(lines)
