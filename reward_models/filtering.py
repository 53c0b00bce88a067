"""Filter data, rollouts and conversations by a moderator: any function from texts to verdicts.

A row is kept where none of its texts is flagged. Its texts are the conversation up to each of its responses, so a
harmless answer to a bad request is judged beside that request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reward_models.functions import Texts, conversation
from reward_models.talks import conversations_in
from rlhf.config import import_function
from rlhf.errors import InputError, short
from rlhf.rows.messages import Messages, text_of
from rlhf.rows.records import Demonstration, Prompt, Ranking, StepLabels
from rlhf.serving.app import Moderator, Verdict


class Divided(NamedTuple):
    """The indices of the rows that are kept and of those that are not, and each row's flagged categories."""

    kept: list[int]
    flagged: list[int]
    categories: list[list[str]]


def divide(rows: Sequence[Any], moderator: Moderator) -> Divided:
    """Divide rows into those without a flagged text and the others.

    rows: texts, conversations (lists of messages), records of `rlhf.rows.records`, or mappings: rows of a data file, of
    rollouts, of exports, as `talks` reads them. Raises InputError for anything else."""
    categories = [flagged_by(verdicts) for verdicts in verdicts_of(rows, moderator)]
    kept = [number for number, names in enumerate(categories) if not names]
    return Divided(kept, [number for number, names in enumerate(categories) if names], categories)


def verdicts_of(rows: Sequence[Any], moderator: Moderator) -> list[list[Verdict]]:
    """Return the verdicts of each row's conversations. A moderator with a method `judge` gets them as messages, any
    other as texts."""
    if isinstance(rows, str | Mapping):  # else its letters, or its keys, would be judged, and let through
        raise InputError(f"filter: got one {type(rows).__name__}; hand in a list of rows")
    talks = [talks_in(row) for row in rows]
    flat = [talk for own in talks for talk in own]
    judge = getattr(moderator, "judge", None)
    texts = [text_of(talk) for talk in flat] if judge is None else []
    found = iter(_checked(judge(flat) if judge is not None else moderator(texts), len(flat)) if flat else ())
    return [[next(found) for _ in own] for own in talks]


def _checked(verdicts: Any, count: int) -> Sequence[Verdict]:
    """Return what a moderator said of `count` texts. Raises InputError where that is no verdict for each."""
    if not isinstance(verdicts, list | tuple) or len(verdicts) != count:
        seen = f"{len(verdicts)} verdicts" if isinstance(verdicts, list | tuple) else f"a {type(verdicts).__name__}"
        raise InputError(f"moderator: {seen} for {count} texts; return a list with one for each")
    for verdict in verdicts:
        if not all(isinstance(getattr(verdict, name, None), Mapping) for name in Verdict._fields):
            seen = f"{short(repr(verdict))} is no verdict; return rlhf.serving.app.Verdict"
            raise InputError(f"moderator: {seen}(flagged={{category: True}}, scores={{category: 0.9}}) for each text")
    return verdicts


def flagged_by(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the categories that some verdict flags, in their order."""
    return list(dict.fromkeys(name for verdict in verdicts for name, flag in verdict.flagged.items() if flag))


def talks_in(row: Any) -> list[Messages]:
    """Return the conversations of a row that are judged: one per response, or the only one."""
    if isinstance(row, str):
        return [[{"role": "user", "content": row}]]
    if isinstance(row, Prompt | Demonstration):
        return [list(row.messages)]
    if isinstance(row, Ranking):
        return [_answered(row.prompt, response) for response in row.responses]
    if isinstance(row, StepLabels):
        return [_answered(row.prompt, "\n".join(row.steps))]
    if isinstance(row, Mapping):
        return conversations_in(row)
    if isinstance(row, Sequence) and row and all(isinstance(turn, Mapping) and "role" in turn for turn in row):
        return [[dict(turn) for turn in row]]
    raise InputError(f"filter: got a {type(row).__name__}; hand in texts, conversations, records or rows")


def _answered(prompt: Messages, response: str) -> Messages:
    return [dict(turn) for turn in (*prompt, {"role": "assistant", "content": response})]


def moderation_score(moderator: Moderator, flagged: float = -1.0) -> Callable[..., list[float]]:
    """Make a reward function (trl's signature): `flagged` for a response that is flagged together with its prompt, else
    0. A guard gets the two as messages, as from `divide`."""

    def moderation(prompts: Texts, completions: Texts, **columns: object) -> list[float]:
        talks = [conversation(p, c) for p, c in zip(prompts, completions, strict=True)]
        return [flagged if flagged_by(verdicts) else 0.0 for verdicts in verdicts_of(talks, moderator)]

    return moderation


def load_moderator(named: str, bf16: bool | None = None) -> Moderator:
    """Load a moderator: the folder of a moderation model, or a function as file.py:name.

    bf16: as in a recipe's settings; None: where the hardware is fast at it."""
    if re.fullmatch(r".+\.py:\w+", named) and not Path(named).exists():
        function: Moderator = import_function(named)
        return function
    from reward_models.moderation import ModerationModel
    from rlhf.run.precision import compute_dtype

    return ModerationModel.load(named, dtype=compute_dtype(bf16))
