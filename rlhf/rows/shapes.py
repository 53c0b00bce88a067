"""The shapes of the sets that people have: each one's name, the columns that tell it, and the function that reads it.

A row is of a shape if all its columns are there, of the types that `fits` wants; of two shapes the one with more
columns counts, if it has all of the other's. `foreign` reads rows by this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, partial
from typing import Any

from rlhf.errors import InputError
from rlhf.rows import comparisons, conversations, exports
from rlhf.rows.exports import Found
from rlhf.rows.fields import Row

Reader = Callable[[Row], Row | Iterable[Found]]
Gatherer = Callable[[Sequence[tuple[str, Row]]], Iterator[tuple[str, Found]]]


def anything(row: Row) -> bool:
    return True


@dataclass(frozen=True)
class Shape:
    """One shape of rows. Where one row alone is no record, `gather` reads all rows of a file together, and `read` gives
    a row's prompt, if it can."""

    name: str
    columns: tuple[str, ...]
    read: Reader | None = None
    compares: bool = True
    """Whether a row compares responses; one that doesn't gives a demonstration."""
    fits: Callable[[Row], bool] = anything
    uses: tuple[str, ...] = ()
    """Further columns that are read, where they are there."""
    gather: Gatherer | None = None


def texts(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row[name], str) for name in names)


def lists(*names: str, of: type = dict) -> Callable[[Row], bool]:
    """Return a test whether the columns hold lists (not empty) of dicts, or of another type."""
    return lambda row: all(
        isinstance(row[name], list | tuple) and bool(row[name]) and all(isinstance(part, of) for part in row[name])
        for name in names
    )


def parts(name: str, *keys: str) -> Callable[[Row], bool]:
    """Return a test whether a column is a list of objects (maybe empty) with these keys."""
    return lambda row: (
        isinstance(row[name], list | tuple)
        and all(isinstance(part, dict) and part.keys() >= set(keys) for part in row[name])
    )


def objects(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row[name], dict) for name in names)


def either(*tests: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: any(test(row) for test in tests)


def both(*tests: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: all(test(row) for test in tests)


def begins(name: str, start: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row[name], str) and row[name].lstrip().startswith(start)


SHAPES = (
    # two responses
    Shape("LMArena", ("conversation_a", "conversation_b", "winner"), comparisons.lmarena,
          fits=lists("conversation_a", "conversation_b")),
    Shape("LMArena (lists of turns)", ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b",
                                       "winner_tie"), comparisons.lmarena_lists),
    Shape("PPE", ("prompt", "response_1", "response_2", "winner"), comparisons.ppe),
    Shape("JudgeBench", ("question", "response_A", "response_B", "label"), comparisons.judgebench),
    Shape("PKU-SafeRLHF", ("prompt", "response_0", "response_1", "better_response_id"), comparisons.pku),
    Shape("HelpSteer2 preferences", ("prompt", "response_1", "response_2", "preference_strength"),
          comparisons.helpsteer2_preference),
    Shape("HelpSteer3", ("context", "response1", "response2", "overall_preference"), comparisons.helpsteer3),
    Shape("SHP", ("history", "human_ref_A", "human_ref_B", "labels"), comparisons.shp),
    Shape("WebGPT", ("question", "answer_0", "answer_1", "score_0", "score_1"), comparisons.webgpt),
    Shape("StackExchange pairs", ("question", "response_j", "response_k"), comparisons.stack_exchange_pair),
    Shape("summarize-from-feedback", ("info", "summaries", "choice"), comparisons.summaries,
          fits=both(objects("info"), lists("summaries"), lambda row: len(row["summaries"]) == 2)),
    Shape("OpenAI preferences", ("input", "preferred_output", "non_preferred_output"), comparisons.openai_preference,
          fits=both(objects("input"), lambda row: "messages" in row["input"])),
    Shape("ShareGPT pairs", ("conversations", "chosen", "rejected"), comparisons.sharegpt_pair,
          fits=both(lists("conversations"), either(objects("chosen", "rejected"), lists("chosen", "rejected")))),
    Shape("axolotl pairs", ("messages", "chosen", "rejected"), comparisons.axolotl_pair,
          fits=both(lists("messages"), objects("chosen", "rejected"))),
    Shape("ms-swift pairs", ("messages", "rejected_response"), comparisons.ms_swift_pair, fits=lists("messages")),
    # K responses
    Shape("Nectar", ("prompt", "answers"), comparisons.nectar, fits=parts("answers", "answer", "rank")),
    Shape("StackExchange", ("question", "answers"), comparisons.stack_exchange,
          fits=parts("answers", "text", "pm_score")),
    Shape("UltraFeedback", ("instruction", "completions"), comparisons.ultrafeedback,
          fits=parts("completions", "response", "overall_score")),
    Shape("NeMo-RL", ("context", "completions"), comparisons.nemo_rl, fits=parts("completions", "completion", "rank")),
    Shape("RewardBench 2 or RM-Bench", ("prompt", "chosen", "rejected"), comparisons.chosen_lists,
          fits=lists("chosen", "rejected", of=str)),
    Shape("HelpSteer2", ("prompt", "response", "helpfulness"), comparisons.marked_prompt, fits=texts("response"),
          gather=partial(comparisons.rated, score="helpfulness")),
    Shape("rated responses", ("prompt", "response", "score"), comparisons.marked_prompt, fits=texts("response"),
          gather=partial(comparisons.rated, score="score")),
    Shape("OASST trees", ("message_tree_id", "prompt"), exports.oasst_tree, fits=objects("prompt")),
    Shape("OASST messages", ("message_id", "message_tree_id", "text", "role"), fits=texts("text", "role"),
          gather=exports.oasst_messages),
    Shape("Label Studio", ("data", "annotations"), exports.label_studio,
          fits=both(objects("data"), parts("annotations", "result"))),
    Shape("Open WebUI feedback", ("data", "snapshot"), exports.open_webui, fits=objects("data", "snapshot"),
          uses=("meta", "user_id")),
    # one to imitate
    Shape("Open WebUI chats", ("chat", "title"), exports.open_webui_chat, compares=False,
          fits=both(objects("chat"), lambda row: "history" in row["chat"])),
    Shape("ShareGPT", ("conversations",), conversations.sharegpt, compares=False, fits=lists("conversations")),
    Shape("conversations", ("conversation",), conversations.sharegpt, compares=False, fits=lists("conversation")),
    Shape("Guanaco", ("text",), conversations.guanaco, compares=False, fits=begins("text", "### Human:")),
    Shape("ChatML", ("text",), conversations.chatml, compares=False, fits=begins("text", "<|im_start|>")),
    Shape("Alpaca", ("instruction", "output"), conversations.instruction, compares=False, uses=("input", "history"),
          fits=texts("instruction", "output")),
    Shape("Dolly", ("instruction", "response"),
          partial(conversations.instruction, context="context", answer="response"), compares=False,
          uses=("context", "history"), fits=texts("instruction", "response")),
    Shape("ms-swift", ("query", "response"),
          partial(conversations.instruction, question="query", context="input", answer="response"), compares=False,
          uses=("history",), fits=texts("query", "response")),
)  # fmt: skip


@cache
def question_and_answer(question: str, answer: str) -> Shape:
    """Return the shape of a row that is of none of SHAPES, and has one column for a question and one for its answer."""
    reader = partial(conversations.question_and_answer, question=question, answer=answer)
    return Shape("questions and answers", (question, answer), reader, compares=False)


def recognised(row: Mapping[str, Any]) -> Shape | None:
    """Return the shape of a row, one of SHAPES or a question and its answer. Raises InputError where it may be of
    several."""
    if shape := named(row):
        return shape
    columns = conversations.question_columns(row)
    return question_and_answer(*columns) if columns else None


def named(row: Mapping[str, Any]) -> Shape | None:
    """Return the one of SHAPES that a row has. Raises InputError where it may have several."""
    given = {name for name, value in row.items() if value is not None}
    found = [shape for shape in SHAPES if given.issuperset(shape.columns) and shape.fits(dict(row))]
    found = [shape for shape in found if not any(set(shape.columns) < set(other.columns) for other in found)]
    if len(found) > 1:
        named = " or ".join(f"{shape.name} ({', '.join(shape.columns)})" for shape in found)
        raise InputError(f"the row may be {named}; take out the columns of the others")
    return found[0] if found else None


def nearest(row: Mapping[str, Any]) -> Shape | None:
    """Return the shape whose columns' names are most like a row's; None where they are like none."""

    def likeness(shape: Shape) -> float:
        ratios = (
            max(SequenceMatcher(None, name, str(other).lower()).ratio() for other in row) for name in shape.columns
        )
        return sum(ratios) / len(shape.columns)

    best = max((*SHAPES, question_and_answer("question", "answer")), key=likeness) if row else None
    return best if best and likeness(best) > 0.6 else None
