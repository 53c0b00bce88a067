"""Rows that compare responses, in the shapes of well-known sets, in our fields: prompt, responses, ranks.

Each function reads a row of one shape (`shapes` lists them). A tie gives equal ranks. Where people called both
responses bad, the row gets ``label: False`` beside them: neither is a demonstration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rlhf.errors import InputError
from rlhf.rows.asked import CONTEXT, QUESTIONS, SYSTEM
from rlhf.rows.fields import FIELDS, Row, Unusable
from rlhf.rows.messages import Messages, as_messages
from rlhf.rows.sources import show, wrong

EMPTY = "an empty reply"
PARTED = "conversations that part before their last answer"
ALONE = "a response without a second one to compare with"

FIRST, SECOND, TIE, BOTH_BAD = (
    {"ranks": [1, 2]},
    {"ranks": [2, 1]},
    {"ranks": [1, 1]},
    {"ranks": [1, 1], "label": False},
)
WINNERS: dict[Any, Row] = {
    "model_a": FIRST, "model_b": SECOND, "tie": TIE, "both_bad": BOTH_BAD, "bothbad": BOTH_BAD,
    "tie (bothbad)": BOTH_BAD, "tie (both_bad)": BOTH_BAD,
}  # fmt: skip
LETTERS: dict[Any, Row] = {"A>B": FIRST, "B>A": SECOND, "A=B": TIE}

_ALIKE = ("prompt", *QUESTIONS, *CONTEXT, *SYSTEM, "tools", "chat_template_kwargs", "labeler")
"""Columns that say what is asked, and who rated: responses are ranked against each other where all are the same."""


def pair(prompt: Any, one: Any, two: Any, outcome: Mapping[str, Any]) -> Row:
    """Return two responses to a prompt with the outcome of their comparison."""
    return {"prompt": prompt, "responses": [one, two], **outcome}


def outcome_of(row: Row, name: str, outcomes: Mapping[Any, Row]) -> Row:
    """Return the outcome that a column names. Raises InputError for another value."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int) or value not in outcomes:
        raise wrong(name, f"got {show(value)}", f"write one of {', '.join(map(str, outcomes))}")
    return outcomes[value]


def number(row: Mapping[str, Any], name: str) -> float:
    """Return a column's number. Raises InputError for anything else."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, f"got {show(value)}", "write a number")
    return value


def by_strength(row: Row, name: str) -> Row:
    """Return the outcome of a strength: below 0 the first response is better, above it the second."""
    strength = number(row, name)
    return FIRST if strength < 0 else SECOND if strength > 0 else TIE


# --- two responses --------------------------------------------------------------------------------------------------


def lmarena(row: Row) -> Row:
    """Read a battle of two conversations."""
    one, two = (_turns(row[name], name) for name in ("conversation_a", "conversation_b"))
    return pair(*_parted(one, two), outcome_of(row, "winner", WINNERS))


def lmarena_lists(row: Row) -> Row:
    """Read a battle as the table of 55,000 has it: JSON lists of the turns of the user and of both models."""
    asked, *said = (_texts(row[name], name) for name in ("prompt", "response_a", "response_b"))
    one, two = (_interleaved(asked, answers) for answers in said)
    flags = {name: number(row, name) for name in ("winner_model_a", "winner_model_b", "winner_tie")}
    if sorted(flags.values()) != [0, 0, 1]:
        raise wrong(", ".join(flags), f"got {show([*flags.values()])}", "one of them is 1, the others 0")
    won = next(name for name, flag in flags.items() if flag).removeprefix("winner_")
    return pair(*_parted(one, two), WINNERS[won])


def ppe(row: Row) -> Row:
    return pair(row["prompt"], row["response_1"], row["response_2"], outcome_of(row, "winner", WINNERS))


def judgebench(row: Row) -> Row:
    return pair(row["question"], row["response_A"], row["response_B"], outcome_of(row, "label", LETTERS))


def pku(row: Row) -> Row:
    outcome = outcome_of(row, "better_response_id", {0: FIRST, 1: SECOND})
    return pair(row["prompt"], row["response_0"], row["response_1"], outcome)


def helpsteer2_preference(row: Row) -> Row:
    outcome = by_strength(row, "preference_strength")
    return pair(marked_turns(row["prompt"]), row["response_1"], row["response_2"], outcome)


def helpsteer3(row: Row) -> Row:
    return pair(row["context"], row["response1"], row["response2"], by_strength(row, "overall_preference"))


def shp(row: Row) -> Row:
    outcome = outcome_of(row, "labels", {1: FIRST, 0: SECOND})
    return pair(row["history"], row["human_ref_A"], row["human_ref_B"], outcome)


def webgpt(row: Row) -> Row:
    asked = row["question"]
    asked = asked.get("full_text") if isinstance(asked, Mapping) else asked
    ranks = {"ranks": [-number(row, "score_0"), -number(row, "score_1")]}
    return pair(asked, row["answer_0"], row["answer_1"], ranks)


def stack_exchange_pair(row: Row) -> Row:
    return pair(row["question"], row["response_j"], row["response_k"], FIRST)


def summaries(row: Row) -> Row:
    """Read a comparison of summaries; the prompt is the post as Stiennon et al. (2020) gave it to their models."""
    info = row["info"]
    one, two = (part.get("text") for part in row["summaries"])
    if not (info.get("post") or info.get("article")):
        raise wrong("info", "neither a post nor an article", "summaries are compared beside what they are of")
    if info.get("post"):
        lines = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post")]
    else:
        lines = [("TITLE: ", "title"), ("ARTICLE: ", "article")]
    parts = [f"{label}{info[name]}" for label, name in lines if info.get(name)]
    return pair("\n\n".join([*parts, "TL;DR:"]), one, two, outcome_of(row, "choice", {0: FIRST, 1: SECOND}))


def openai_preference(row: Row) -> Row:
    asked = row["input"]
    tools = {"tools": asked["tools"]} if asked.get("tools") else {}
    return {**_answers(asked["messages"], row, "preferred_output", "non_preferred_output"), **tools}


def sharegpt_pair(row: Row) -> Row:
    return _answers(with_roles(row["conversations"]), row, "chosen", "rejected")


def axolotl_pair(row: Row) -> Row:
    return _answers(row["messages"], row, "chosen", "rejected")


def ms_swift_pair(row: Row) -> Row:
    """Read a conversation, and the response that its last turn is better than."""
    better = row["messages"]
    return {"chosen": better, "rejected": [*better[:-1], {"role": "assistant", "content": row["rejected_response"]}]}


# --- K responses ----------------------------------------------------------------------------------------------------


def nectar(row: Row) -> Row:
    return _listed(row["prompt"], row["answers"], "answer", "rank", 1)


def stack_exchange(row: Row) -> Row:
    return _listed(row["question"], row["answers"], "text", "pm_score", -1)


def ultrafeedback(row: Row) -> Row:
    return _listed(row["instruction"], row["completions"], "response", "overall_score", -1)


def nemo_rl(row: Row) -> Row:
    """Read NeMo-RL's ranked completions, each one assistant turn."""
    ranked = [{**part, "completion": _one_answer(part.get("completion"), "completions")} for part in row["completions"]]
    return _listed(row["context"], ranked, "completion", "rank", 1)


def chosen_lists(row: Row) -> Row:
    """Read a list of right and one of wrong responses (RewardBench 2, RM-Bench): ranks 1 and 2."""
    ranks = [1] * len(row["chosen"]) + [2] * len(row["rejected"])
    return {"prompt": row["prompt"], "responses": [*row["chosen"], *row["rejected"]], "ranks": ranks}


def marked_prompt(row: Row) -> Row:
    return {"prompt": marked_turns(row["prompt"])}


def rated(rows: Sequence[tuple[str, Row]], score: str) -> Iterator[tuple[str, Row | InputError]]:
    """Yield a ranking for every prompt and labeler, by a score: the responses of consecutive rows that ask the same,
    with the columns in which all of them agree. A row without a score, or with another weight or split_group than the
    first of them, gives an InputError."""
    for _, group in groupby(rows, key=lambda pair: _content(pair[1], *_ALIKE)):
        members: list[tuple[str, Row]] = []
        ranks: list[float] = []
        for where, row in group:
            try:
                if members:
                    _check_agreement(row, *members[0])
                ranks.append(-number(row, score))
                members.append((where, row))
            except InputError as error:
                yield where, error
        if members:
            where, first = members[0]
            further = [name for name in first if name not in (*FIELDS, "response", score)]
            agreed = {
                name: first[name]
                for name in further
                if all(_content(row, name) == _content(first, name) for _, row in members[1:])
            }
            responses = [row["response"] for _, row in members]
            yield where, {**agreed, "prompt": marked_turns(first["prompt"]), "responses": responses, "ranks": ranks}


# --- parts ----------------------------------------------------------------------------------------------------------


def _content(row: Row, *names: str) -> str:
    """Return what columns hold, in a form to compare; a column that is not there is like null."""
    return json.dumps([row.get(name) for name in names], default=str)


def _check_agreement(row: Row, where: str, first: Row) -> None:
    """Raise InputError where rows of one ranking differ in what is said of the ranking."""
    for name in ("weight", "split_group"):
        if _content(row, name) != _content(first, name):
            seen = f"got {show(row.get(name))}, and {show(first.get(name))} in {where}, which has the same prompt"
            raise wrong(name, seen, "write one value for all, or prompt, responses and ranks for each ranking")


def marked_turns(prompt: Any) -> Any:
    """Read a prompt of several turns as HelpSteer2 has it, with a line `<extra_id_1>Assistant` before an answer."""
    if not isinstance(prompt, str) or "<extra_id_1>" not in prompt:
        return prompt
    first, *rest = re.split(r"\n?<extra_id_1>(User|Assistant)\n", prompt)
    turns = [{"role": "user", "content": first}] if first.strip() else []
    for speaker, text in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": speaker.lower(), "content": text.strip("\n")})
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns = turns[:-1]
    return turns


def with_roles(turns: Any) -> Any:
    """Return ShareGPT's turns (from, value) with the usual names of their fields."""
    if not isinstance(turns, list | tuple):
        return turns
    names = {"from": "role", "value": "content"}
    return [
        {names.get(key, key): value for key, value in turn.items()}
        if isinstance(turn, Mapping) and "from" in turn and "role" not in turn
        else turn
        for turn in turns
    ]


def _listed(prompt: Any, parts: Sequence[Mapping[str, Any]], text: str, score: str, sign: int) -> Row:
    ranks = [sign * number(part, score) for part in parts]
    return {"prompt": prompt, "responses": [part.get(text) for part in parts], "ranks": ranks}


def _answers(turns: Any, row: Row, better: str, worse: str) -> Row:
    """Return the two answers to a conversation, each a message or a list of one."""
    prompt = list(turns)
    one, two = (_one_answer(row[name], name) for name in (better, worse))
    return pair(prompt, one, two, FIRST)


def _one_answer(value: Any, name: str) -> Messages:
    value = [value] if isinstance(value, Mapping) else value
    turns = as_messages(with_roles(value), name)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise wrong(name, f"got {show(value)}", "only one assistant turn of text can be compared")
    return turns


def _turns(value: Any, name: str) -> Messages:
    last = value[-1] if isinstance(value, list | tuple) and value else None
    said = last.get("content") if isinstance(last, Mapping) else None
    parts = said if isinstance(said, list) else [said]
    if all(_is_blank(part.get("text") if isinstance(part, Mapping) else part) for part in parts):
        raise Unusable(EMPTY)
    return as_messages(value, name)


def _is_blank(text: Any) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())


def _texts(value: Any, name: str) -> list[str]:
    """Return a list of texts, also from its JSON; a plain text alone is a list of one."""
    try:
        value = json.loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    except (ValueError, RecursionError) as error:
        raise wrong(name, f"{error} in {show(value)}", "write a JSON list of texts") from None
    return list(value) if isinstance(value, list | tuple) else [value]


def _interleaved(asked: Sequence[str], answers: Sequence[str]) -> Messages:
    if len(asked) != len(answers) or any(_is_blank(text) for text in (*asked, *answers)):
        raise Unusable(EMPTY)
    turns: Messages = []
    for question, answer in zip(asked, answers, strict=True):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def _parted(one: Messages, two: Messages) -> tuple[Messages, Messages, Messages]:
    """Return the turns that two conversations share, and the answer that each ends with. Raises Unusable where they
    differ in more: one response can't be compared then."""
    if len(one) != len(two) or one[:-1] != two[:-1]:
        raise Unusable(PARTED)
    for turns in (one, two):
        if turns[-1]["role"] != "assistant":
            raise wrong(
                "conversation_a, conversation_b", f"the last turn is {turns[-1]['role']!r}", "end with an answer"
            )
    return one[:-1], one[-1:], two[-1:]
