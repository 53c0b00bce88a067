"""Solutions worked out in steps: their labelled rows, their text, and the tokens that end their steps.

Rows of these shapes are read (further columns are kept):

* ours: ``{"prompt", "steps", "labels"}``, a label 1 (right), 0 (neutral), -1 (wrong) or null (unknown);
* trl's former stepwise: ``{"prompt", "completions", "labels"}``, a label true or false;
* PRM800K: the chosen path, and each other alternative of a step as a solution of its own behind the same steps, which
  have no label there, since the path has them;
* Math-Shepherd: ``{"input", "label"}``, with + and - in `label` where `input` has its mark;
* a right solution and a wrong one with the index of its first wrong step: ``{"problem", "reference_solution",
  "student_incorrect_solution", "incorrect_index"}``; what follows that step is unknown.

The text of a solution is its steps, joined by a separator. `step_ends` finds, in tokens, where steps end; training,
scoring and PPO all call it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf import chat
from rlhf.errors import InputError, reason
from rlhf.rows.messages import Messages, as_prompt
from rlhf.rows.records import BadRows, OnBadRow, StepLabels, prompt_key
from rlhf.rows.sources import Source, name_of, rows, show, wrong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger("rlhf")

MARK = "ки"
"""Math-Shepherd's mark at the end of a step."""
REFERENCE = {"solution": "reference"}
"""The column of a right solution that stands beside a wrong one."""


# ------------------------------------------------------------------------------------------------ rows


def read_steps(source: Source, split: str = "train", on_bad_row: OnBadRow = "refuse") -> list[StepLabels]:
    """Read labelled solutions. A reference solution that stands beside several wrong ones counts once.

    Raises InputError, also for a source without a single label."""
    records: list[StepLabels] = []
    bad, seen, repeated = BadRows(name_of(source), on_bad_row), set[object](), 0
    for where, row in rows(source, split):
        try:
            found = _records(row, where)
        except InputError as error:
            bad.add(where, error)
            continue
        except (AttributeError, KeyError, TypeError) as error:
            what = f"labelled steps in another form ({reason(error)})"
            bad.add(where, InputError(f"{what}; write the row as its data set is published"))
            continue
        for record in found:
            key = (prompt_key(record.prompt), record.steps)
            if record.columns.get("solution") == "reference" and key in seen:
                repeated += 1
                continue
            seen.add(key)
            records.append(record)
    bad.tell(len(records))
    if repeated:
        logger.info("%s: %d reference solutions stand there more than once; each counts once", source, repeated)
    if not any(label is not None for record in records for label in record.labels):
        raise wrong(f"{name_of(source)}: labels", f"none in {len(records)} solutions", "label some steps")
    return records


def _records(row: object, where: str) -> list[StepLabels]:
    """Return the labelled solutions of a row."""
    if isinstance(row, StepLabels):
        return [row]
    if not isinstance(row, Mapping):
        raise InputError(f"got {show(row)}; write an object with prompt, steps and labels")
    has = {str(name) for name, value in row.items() if value is not None}
    shapes: dict[tuple[str, ...], Callable[[Any], list[tuple[Any, ...]]]] = {
        ("steps", "labels"): _ours,
        ("completions", "labels"): _stepwise,
        ("question", "label"): _prm800k,
        ("input", "label"): _math_shepherd,
        ("student_incorrect_solution", "incorrect_index"): _student,
    }
    for names, read in shapes.items():
        if has.issuperset(names):
            return [StepLabels(as_prompt(p), tuple(s), tuple(labels), c, where) for p, s, labels, c in read(row)]
    seen = f"missing; the fields are {', '.join(map(str, row)) or '(none)'}"
    raise wrong("steps, labels", seen, "write prompt, steps and labels: 1 (right), 0, -1 (wrong) or null per step")


def _ours(row: Any) -> list[tuple[Any, ...]]:
    labels = [_truth(label) if isinstance(label, bool) else label for label in _listed(row, "labels")]
    return [(_need(row, "prompt"), _listed(row, "steps"), labels, _others(row, "prompt", "steps", "labels"))]


def _stepwise(row: Any) -> list[tuple[Any, ...]]:
    labels = _listed(row, "labels")
    for label in labels:
        if not isinstance(label, bool) and label is not None:
            todo = "trl's are true or false; for 1, 0 and -1 rename completions to steps"
            raise wrong("labels", f"got {show(label)}", todo)
    steps = _listed(row, "completions")
    others = _others(row, "prompt", "completions", "labels")
    return [(_need(row, "prompt"), steps, [_truth(label) for label in labels], others)]


def _truth(label: bool | None) -> int | None:
    return None if label is None else 1 if label else -1


def _prm800k(row: Any) -> list[tuple[Any, ...]]:
    """Read the path that the labeler chose, and every other alternative. A step that the labeler wrote has no label.

    Where nothing is chosen the solution ends, with the first of the alternatives, which is the one at hand."""
    problem, columns = _need(row["question"], "problem"), _others(row, "question", "label")
    steps: list[str] = []
    labels: list[int | None] = []
    others = []
    for n, step in enumerate(_listed(row["label"], "steps")):
        alternatives, chosen = step.get("completions") or [], step.get("chosen_completion")
        written = step.get("human_completion")
        if chosen is not None and not 0 <= chosen < len(alternatives):
            raise wrong(f"label.steps[{n}].chosen_completion", f"got {chosen} of {len(alternatives)}", "name one")
        path = chosen if chosen is not None else None if written else 0 if alternatives else None
        for number, alternative in enumerate(alternatives):
            if number != path:
                known = [*([None] * len(labels)), alternative.get("rating")]
                others.append((problem, [*steps, alternative["text"]], known, {**columns, "alternative": True}))
        if path is not None:
            steps.append(alternatives[path]["text"])
            labels.append(alternatives[path].get("rating"))
        elif written:
            steps.append(written["text"])
            labels.append(written.get("rating"))
        if chosen is None and not written:
            break
    if not steps:
        raise wrong("label.steps", "no step", "take the row out")
    return [(problem, steps, labels, columns), *others]


def _math_shepherd(row: Any) -> list[tuple[Any, ...]]:
    text, signed, place = str(row["input"]), str(row["label"]), 0
    *pieces, rest = text.split(MARK)
    labels: list[int | None] = []
    for n, piece in enumerate(pieces):
        place += len(piece)
        sign = signed[place : place + 1]
        if signed[place - len(piece) : place] != piece or sign not in ("+", "-"):
            raise wrong("label", f"step {n + 1} ends with {show(sign)} or has another text than input", "write + or -")
        labels.append(1 if sign == "+" else -1)
        place += 1
    begins = [*re.finditer(r"\s*\bStep 1:", pieces[0] if pieces else text)]
    if not begins or not pieces:
        raise wrong("input", f"got {show(text)}", f"write the problem, 'Step 1: ...' and {MARK!r} behind each step")
    start = begins[-1].start()
    steps = [text[start : len(pieces[0])], *pieces[1:]]
    if rest.strip():
        steps, labels = [*steps, rest], [*labels, None]
    return [(text[:start].strip(), [step.strip() for step in steps], labels, _others(row, "input", "label"))]


def _student(row: Any) -> list[tuple[Any, ...]]:
    steps, index = _listed(row, "student_incorrect_solution"), row["incorrect_index"]
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(steps):
        seen = f"got {show(index)} of {len(steps)} steps"
        raise wrong("incorrect_index", seen, "write the first wrong step's, counted from 0")
    problem = row["prompt"] if row.get("problem") is None else row["problem"]
    labels = [1] * index + [-1] + [None] * (len(steps) - index - 1)
    fields = ("problem", "prompt", "reference_solution", "student_incorrect_solution", "incorrect_index")
    columns = _others(row, *fields)
    found: list[tuple[Any, ...]] = [(problem, [step.strip() for step in steps], labels, columns)]
    if row.get("reference_solution") is not None:
        right = [line.strip() for line in str(row["reference_solution"]).split("\n") if line.strip()]
        found.insert(0, (problem, right, [1] * len(right), columns | REFERENCE))
    return found


def _need(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise wrong(name, "missing", f"add {name!r} to the row")
    return row[name]


def _listed(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise wrong(name, f"got {show(value)}", "write a list")
    return list(value)


def _others(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


# ------------------------------------------------------------------------------------------------ labels


def first_error(labels: Sequence[int | None]) -> int | None:
    """Return the index of the first wrong step, or the number of steps where none is wrong; None where that is not
    known."""
    for index, label in enumerate(labels):
        if label is None:
            return None
        if label < 0:
            return index
    return len(labels)


def outcome(record: StepLabels) -> int | None:
    """Return -1 for a solution with a wrong step, 1 for one whose steps are all known and not wrong, else None; None
    too for an alternative step, with which no solution ends."""
    if record.columns.get("alternative"):
        return None
    if any(label is not None and label < 0 for label in record.labels):
        return -1
    return None if None in record.labels else 1


# ------------------------------------------------------------------------------------------------ text


def solution_text(steps: Sequence[str], separator: str) -> str:
    """Join steps to a response. White space around a step goes, and a separator within a step becomes a space, so that
    the response splits into the same steps again."""
    return separator.join(" ".join(filter(None, map(str.strip, step.split(separator)))) for step in steps)


def step_spans(text: str, separator: str) -> list[tuple[int, int]]:
    """Return the first character of each step of a response and the one behind its last, without the white space around
    it. What is blank between two separators is no step."""
    spans, place = [], 0
    for part in text.split(separator):
        inner = part.strip()
        if inner:
            start = place + len(part) - len(part.lstrip())
            spans.append((start, start + len(inner)))
        place += len(part) + len(separator)
    return spans


def conversation_of(record: StepLabels, separator: str) -> Messages:
    """Return a labelled solution as a conversation."""
    return [*record.prompt, {"role": "assistant", "content": solution_text(record.steps, separator)}]


# ------------------------------------------------------------------------------------------------ tokens


def step_ends(tokenizer: Tokenizer, ids: Sequence[int], content: str, separator: str) -> list[int]:
    """Return, for each step of a response, the index in `ids` of the token that holds the step's last character.

    Where a tokenizer joins that character with the separator (".\\n" is one token of Llama 3's), it is the token that
    holds both; none is read that begins behind the step. So the same ids have the same ends, whether they are encoded
    from text or sampled.

    ids: the response's own tokens. content: its text, without the thinking that may stand before it.
    """
    text, content = chat.decode_response(tokenizer, ids), content.strip()  # a template may trim it
    start = text.rfind(content)
    spans = step_spans(content, separator) if start >= 0 else step_spans(text, separator)

    def reached(tokens: int) -> int:
        """Return how much of the text these first tokens make, without a last character that is not whole yet."""
        made = chat.decode_response(tokenizer, ids[:tokens])
        while not text.startswith(made):
            made = made[:-1]
        return len(made)

    ends, low = [], 0
    for _, last in spans:
        high = len(ids) - 1
        while low < high:  # the first token with which the text reaches the step's last character
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle + 1) >= max(start, 0) + last else (middle + 1, high)
        ends.append(low)
    return ends


def answer_tokens(
    tokenizer: Tokenizer, messages: Messages, row: Mapping[str, Any], sampled: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation's prompt, and those of its last turn with the end of turn.

    sampled: the ids of the last turn, from the same tokenizer, without the token that ends it."""
    if sampled is None:
        whole = chat.encode(tokenizer, messages, len(messages) - 1, row)
        return whole.ids[: whole.answer_from], whole.ids[whole.answer_from :]
    return chat.encode_prompt(tokenizer, messages[:-1], row), [*sampled, chat.end_of_turn_id(tokenizer)]
