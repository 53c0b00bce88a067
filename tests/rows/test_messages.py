"""Messages as rows bring them: names of roles and fields, parts, tool calls, marks of what is trained."""

from __future__ import annotations

import json

import pytest

from rlhf.chat.rendering import parsed, schemas_of
from rlhf.errors import InputError
from rlhf.rows.arrow import _loaded
from rlhf.rows.comparisons import _texts
from rlhf.rows.messages import as_messages, as_prompt

USER, ANSWER = {"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "An apple."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("role", "known"),
    [("developer", "system"), ("human", "user"), ("gpt", "assistant"), ("model", "assistant"),
     ("Assistant", "assistant"), ("function", "tool"), ("ipython", "tool")],
)  # fmt: skip
def test_roles_under_other_names(role, known):
    assert as_messages([{"role": role, "content": "x"}], "messages") == [{"role": known, "content": "x"}]


@pytest.mark.parametrize(
    "content",
    ["An apple.", ["An apple."], [{"type": "text", "text": "An apple.", "image": None}],
     [{"type": "output_text", "text": "An "}, {"text": "apple."}]],
)  # fmt: skip
def test_contents_in_parts(content):
    assert as_messages([ANSWER | {"content": content, "id": 3, "tool_calls": None}], "messages") == [ANSWER]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_under_its_names(name):
    wanted = [ANSWER | {"reasoning_content": "Hm."}]
    assert as_messages([ANSWER | {name: "Hm."}], "messages") == wanted
    assert as_messages([ANSWER | {"reasoning_content": None, name: "Hm.", "thinking": "Hm."}], "messages") == wanted
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "An apple."}]
    assert as_messages([ANSWER | {"content": parts}], "messages") == wanted
    with pytest.raises(InputError, match=r"messages\[0\].*different texts"):
        as_messages([ANSWER | {name: "Hm.", "content": [{"type": "thinking", "thinking": "Oh."}, "x"]}], "messages")


@pytest.mark.parametrize(
    ("mark", "trained"),
    [({"weight": 0}, False), ({"train": False}, False), ({"loss": False}, False), ({"weight": 0.0}, False),
     ({"weight": 1}, True), ({"train": True}, True), ({"weight": None}, True), ({}, True)],
)  # fmt: skip
def test_marks_of_what_is_trained(mark, trained):
    assert as_messages([ANSWER | mark], "messages") == [ANSWER if trained else ANSWER | {"train": False}]


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"train": "no"}, {"loss": 2}])
def test_other_marks_are_refused(mark):
    with pytest.raises(InputError, match=f"messages\\[0\\].{next(iter(mark))}: got .*; write 0 or 1"):
        as_messages([ANSWER | mark], "messages")


@pytest.mark.parametrize(
    "calls",
    [{"tool_calls": [CALL]}, {"tool_calls": [CALL["function"]]}, {"function_call": CALL["function"]},
     {"tool_calls": json.dumps([CALL])}],
)  # fmt: skip
def test_tool_calls(calls):
    row = [
        USER,
        {"role": "assistant", "content": None, **calls},
        {"role": "tool", "name": "add", "content": ""},
        ANSWER,
    ]
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert as_messages(row, "messages") == [USER, called, row[2], ANSWER]
    assert as_messages(json.dumps(row), "messages") == [USER, called, row[2], ANSWER]
    assert as_prompt(row[:3]) == [USER, called, row[2]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([{"type": "image", "image": "x.png", "text": None}], r"\[0\]: got a part of type 'image'; only text is read"),
        ([{"type": "image_url", "image_url": {}}], "'image_url'"),
        ([{"type": "text", "text": None}], "only text is read"),
        (None, "got None; write text"),
        ([], "got empty text"),
    ],
)
def test_contents_that_are_refused(row, said):
    with pytest.raises(InputError, match=r"^messages\[0\].content.*" + said):
        as_messages([{"role": "user", "content": row}], "messages")


def test_fields_of_another_role_and_broken_json():
    with pytest.raises(InputError, match=r"messages\[0\].reasoning_content: the role is 'user'"):
        as_messages([USER | {"thinking": "Hm."}], "messages")
    with pytest.raises(InputError, match=r"messages\[0\].tool_calls\[0\]: got .*write"):
        as_messages([ANSWER | {"tool_calls": [{"function": {}}]}], "messages")
    with pytest.raises(InputError, match="write a list, or JSON text of one"):
        as_messages('[{"role": "user"', "messages")
    with pytest.raises(InputError, match="use one of system, user, assistant, tool"):
        as_messages([{"role": "critic", "content": "x"}], "messages")


def test_brackets_a_thousand_deep_are_a_mistake_or_text():
    deep = "[" * 100_000
    with pytest.raises(InputError, match=r"messages\[0\].tool_calls: .*recursion.*write a list"):
        as_messages([ANSWER | {"tool_calls": deep}], "messages")
    with pytest.raises(InputError, match=r"generations: .*recursion.*write a JSON list"):
        _texts(deep, "generations")
    with pytest.raises(InputError, match=r"tools: .*recursion.*write a list"):
        schemas_of(deep)
    assert parsed(deep) == deep == _loaded(deep)


def turn(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


ASKED, SUM = turn("user", "Name a red fruit."), turn("user", "1+2?")
APPLE = "An apple is a red fruit."
TWO = [ASKED, turn("assistant", APPLE)]
ADDS = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
WRITTEN = turn("assistant", "<tool_call>{}</tool_call>")
FIRST_ROWS = {
    "05/reasoning_content": [ASKED, turn("assistant", APPLE, reasoning_content="Let me think about it.")],
    "05/thinking_key": [ASKED, turn("assistant", APPLE, reasoning_content="Let me think.")],
    "31/developer": [turn("system", "Be brief."), *TWO],
    "31/empty_system": [turn("system", ""), *TWO],
    "31/gemma_roles": TWO,
    "31/human_gpt_roles": TWO,
    "31/parts_strings": TWO,
    "31/tools": [SUM, turn("assistant", "", tool_calls=[ADDS]), turn("tool", "3", name="add"), turn("assistant", "3")],
    "31/tools_str": [SUM, WRITTEN, turn("tool", "3"), turn("assistant", "3")],
    "31/uuid_row": TWO,
}


@pytest.mark.parametrize(("name", "first"), FIRST_ROWS.items())
def test_cases_are_read(shared_cases, name, first):
    lines = (shared_cases / f"{name}.jsonl").read_text("utf-8").splitlines()
    found = [as_messages(json.loads(line)["messages"], "messages") for line in lines]
    assert found[0] == first
    assert [[one["role"] for one in turns] for turns in found] == [[one["role"] for one in first]] * 4
