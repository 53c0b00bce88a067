"""Columns that change a row's meaning: labels, questions and system texts; near names; rows that a template refuses."""

from __future__ import annotations

import json
import logging

import pytest

from rlhf.errors import InputError
from rlhf.rows.records import BadRows, read_demonstrations, read_prompts, read_rankings


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


Q, BRIEF = user("Where is it?"), system("Be brief.")
TEXTS = {"chosen": "The Louvre is in Paris.", "rejected": "The Louvre is in Lyon."}
TURNS = {"chosen": [bot("In Paris.")], "rejected": [bot("In Lyon.")]}
WHOLE = {"chosen": [Q, bot("In Paris.")], "rejected": [Q, bot("In Lyon.")]}
MULTI = [Q, bot("Hm?"), user("Please.")]
LONG = {"chosen": [*MULTI, bot("In Paris.")], "rejected": [*MULTI, bot("In Lyon.")]}


# -- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no", [False, 0, 0.0, -1, "false", "False", "0", "no", "undesirable", " Rejected "])
@pytest.mark.parametrize("yes", [True, 1, "true", "1", "chosen", None])
def test_a_completion_labelled_false_is_no_demonstration(no, yes):
    rows = [{"prompt": "q", "completion": f"{yes}{no}", "label": yes}, {"prompt": "q", "completion": "b", "label": no}]
    source = [*rows, {"messages": [Q, bot("c")], "label": no}, {"messages": [Q, bot("d")], "label": yes}]
    assert [d.response for d in read_demonstrations(source)] == [f"{yes}{no}", "d"]
    assert len(read_prompts(source)) == 4  # its prompt is one like others


def test_a_ranking_that_weighs_nothing_is_no_demonstration(tmp_path, caplog):
    rows = [{"prompt": "q", "chosen": f"a{n}", "rejected": "b", "weight": n % 2} for n in range(4)]
    file = tmp_path / "rankings.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.response for row in read_demonstrations(file)] == ["a1", "a3"]
    assert "left out 2 of 4 rows for weight 0, which says not to learn from the ranking: 1, 3" in caplog.text


def test_rows_left_out_by_their_label_are_counted(caplog, tmp_path):
    file = tmp_path / "kto.jsonl"
    rows = [{"prompt": f"q{n}", "completion": "a", "label": n % 3 > 0} for n in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        assert len(read_demonstrations(file)) == 4
    assert f"{file}: left out 2 of 6 rows for label false, which says not to imitate it: 1, 4" in caplog.text
    with pytest.raises(InputError, match=r"no rows; left out 1 of 1 rows for label false"):
        read_demonstrations([rows[0]])


def test_other_labels():
    assert read_demonstrations([{"prompt": "q", "completion": "a", "label": "geography"}])
    for label in (3, 0.5, [1]):
        with pytest.raises(InputError, match=r"label: got .*; write true or false \(KTO\)"):
            read_demonstrations([{"prompt": "q", "completion": "a", "label": label}])
    with pytest.raises(InputError, match="a KTO row; write prompt, chosen and rejected"):
        read_rankings([{"prompt": "q", "completion": "a", "label": True}])


# -- questions and system texts ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["question", "instruction", "query", "problem", "input", "request"])
@pytest.mark.parametrize("texts", [TEXTS, TURNS])
def test_a_question_in_its_own_column_is_the_prompt(name, texts):
    row = {name: Q["content"], "input": None, "context": "", **texts} | {name: Q["content"]}
    assert read_rankings([row])[0].prompt == [Q]
    assert read_demonstrations([row])[0].prompt == [Q]
    assert read_prompts([row])[0].messages == [Q]
    for column in ("system", "system_prompt", "system_message"):
        assert read_rankings([row | {column: "Be brief."}])[0].prompt == [BRIEF, Q]
        assert read_demonstrations([row | {column: "Be brief."}])[0].messages[:2] == [BRIEF, Q]
        assert read_prompts([row | {column: "Be brief."}])[0].messages == [BRIEF, Q]
    assert read_prompts([row])[0].text == (texts is TEXTS)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": Q["content"], "system": "Be brief.", **TEXTS}, [BRIEF, Q]),
        ({"prompt": [Q], "system": "Be brief.", **TURNS}, [BRIEF, Q]),
        ({"prompt": [BRIEF, Q], "system": "Be  brief.", **TURNS}, [BRIEF, Q]),  # it is there already
        (
            {"prompt": [{**BRIEF, "content": "Be brief. Be kind."}, Q], "system": "Be brief.", **TURNS},
            [{**BRIEF, "content": "Be brief. Be kind."}, Q],
        ),
        (
            {"prompt": "Be  brief.\n\nWhere is it?", "system": "Be brief.", **TEXTS},
            [user("Be  brief.\n\nWhere is it?")],
        ),
        ({"prompt": "Where is it?", "system": "Where", **TEXTS}, [{**BRIEF, "content": "Where"}, Q]),
        ({"prompt": "Where is it?", "system": "is it?", **TEXTS}, [{**BRIEF, "content": "is it?"}, Q]),
        ({"system": "Be brief.", **WHOLE}, [BRIEF, Q]),
        ({"system": "", "history": [], **WHOLE}, [Q]),
        ({"prompt": Q["content"], "question": "Where  is it?", **TEXTS}, [Q]),
        ({"question": Q["content"], "system": "Be brief.", "responses": ["a", "b"], "ranks": [1, 2]}, [BRIEF, Q]),
        ({"question": Q["content"], "chosen": [BRIEF, bot("a")], "rejected": [BRIEF, bot("b")]}, [BRIEF, Q]),
        ({"question": "metadata of a conversation", **WHOLE}, [Q]),
        ({"instruction": [user("one"), bot("two"), Q], **TEXTS}, [user("one"), bot("two"), Q]),
    ],
)
def test_prompts_of_rankings(row, prompt):
    assert read_rankings([row])[0].prompt == prompt
    assert read_demonstrations([row])[0].messages == [*prompt, bot(read_rankings([row])[0].responses[0])]
    assert read_prompts([row])[0].messages == prompt


def test_a_system_text_beside_a_demonstration():
    assert read_demonstrations([{"messages": [Q, bot("a")], "system": "Be brief."}])[0].messages == [BRIEF, Q, bot("a")]
    (demonstration,) = read_demonstrations([{"prompt": "Where is it?", "completion": "a", "system": "Be brief."}])
    assert (demonstration.messages, demonstration.trained_from) == ([BRIEF, Q, bot("a")], 2)
    assert read_prompts([{"prompt": "Where is it?", "system": "Be brief."}])[0].messages == [BRIEF, Q]
    with pytest.raises(InputError, match=r"system: 'Be kind\.', but the messages begin with 'Be brief\.'; keep one"):
        read_demonstrations([{"messages": [BRIEF, Q, bot("a")], "system": "Be kind."}])
    with pytest.raises(InputError, match=r"system: 'brief', but the messages begin with 'Be brief\.'; keep one"):
        read_demonstrations([{"messages": [BRIEF, Q, bot("a")], "system": "brief"}])
    with pytest.raises(InputError, match="system, system_prompt: two different system texts; keep one"):
        read_prompts([{"prompt": "q", "system": "a", "system_prompt": "b"}])
    with pytest.raises(InputError, match=r"system: got \['a'\]; write text"):
        read_prompts([{"prompt": "q", "system": ["a"]}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Sum up.", "input": "A text."}, "there is none, and instruction, input hold text; write them"),
        ({"question": "Who?", "context": "A text."}, "there is none, and question, context hold text"),
        ({"instruction": "Go on.", "history": [["Hi", "Hello."]]}, "there is none, and instruction, history hold text"),
        ({"system": "Be brief."}, "there is none, but there is 'system' \\('Be brief.'\\); write it as prompt"),
        ({"context": "A text."}, "there is none, but there is 'context'"),
        ({"history": [["Hi", "Hello."]]}, "there is none, but there is 'history'"),
        ({"trajectory": [{"from": "human", "value": "q"}]}, "an UltraInteract pair; write the trajectory as prompt"),
        ({"conversation": [user("q")]}, "there is none, but there is 'conversation'"),
        ({"dialog": "q"}, "there is none, but there is 'dialog'"),
        ({"post": "q"}, "there is none, but there is 'post'"),
        ({"user_question": "q"}, "there is none, but there is 'user_question'"),
        ({"original_prompt": "q"}, "there is none, but there is 'original_prompt'"),
        ({"whatever": [user("q")]}, "there is none, but there is 'whatever'"),
        ({"prompt": "Sum up.", "input": "A text."}, "input: 'A text.' is not in the prompt; write it into the prompt"),
        ({"prompt": "Who?", "context": "A text."}, "context: 'A text.' is not in the prompt"),
        ({"prompt": "Who?", "history": [["Hi", "Hello."]]}, "history: .* is not in the prompt"),
    ],
)
def test_a_prompt_that_would_be_the_answers_common_beginning_is_refused(row, message):
    for read in (read_rankings, read_demonstrations):
        with pytest.raises(InputError, match=message) as caught:
            read([row | TEXTS])
        assert "\n" not in str(caught.value)
    if "prompt" in row:
        assert read_prompts([row | TEXTS])[0].messages == [user(row["prompt"])]  # a column for reward functions
        with pytest.raises(InputError, match="is not in the prompt"):
            read_demonstrations([row | {"completion": "a"}])


def test_columns_that_are_remarks_are_kept():
    row = {
        "prompt_id": "a b", "question_id": "q 1", "question_type": "who is", "context_length": 3, "input_tokens": 7,
        "source": "a set", "prompt_source": "web pages", "num_turns": 2, "is_question": True, "chat_hash": "x y",
    }  # fmt: skip
    (ranking,) = read_rankings([row | TEXTS])
    assert ranking.prompt == [user("The Louvre is in")]
    assert ranking.columns == row


# -- a prompt as text beside whole conversations -----------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "pair", "expected"),
    [
        ("Where is it?", LONG, MULTI),
        ("Please.", LONG, MULTI),
        ("Where  is it?\n", {k: [BRIEF, *v] for k, v in LONG.items()}, [BRIEF, *MULTI]),
        ([Q], {k: [BRIEF, *v] for k, v in WHOLE.items()}, [BRIEF, Q]),
        ([BRIEF, Q], WHOLE, [BRIEF, Q]),
        (MULTI[:2] + MULTI[2:], LONG, MULTI),
        (MULTI, {k: [MULTI[2], *v] for k, v in TURNS.items()}, MULTI),
        (MULTI, TURNS, MULTI),
        ("Where is it?", {k: f"\n\nHuman: Where is it?\n\nAssistant: {k}" for k in TEXTS}, [Q]),
    ],
)
def test_shared_turns_are_the_prompt(prompt, pair, expected):
    row = {"prompt": prompt, **pair}
    (ranking,) = read_rankings([row])
    assert ranking.prompt == expected
    assert len(ranking.pairs()) == 1
    assert read_demonstrations([row])[0].prompt == expected
    if isinstance(pair["chosen"], list):
        assert read_prompts([row])[0].messages == expected


def test_a_prompt_that_is_no_shared_turn():
    with pytest.raises(InputError, match="prompt: 'Who\\?' is no turn that chosen and rejected share; take it out"):
        read_rankings([{"prompt": "Who?", **LONG}])
    with pytest.raises(InputError, match="chosen: 3 turns after the 1 that both share"):
        read_rankings(
            [{"prompt": "Where is it?", **LONG, "rejected": [Q, bot("No."), user("Please."), bot("In Lyon.")]}]
        )


def test_a_plain_prompt_stays_plain_beside_one_turn():
    assert read_prompts([{"prompt": "Where is it?", **WHOLE}])[0].text
    assert not read_prompts([{"prompt": "Please.", **LONG}])[0].text


def test_hh_without_its_leading_line_breaks():
    for lead in ("", "\n", "\n\n", " "):
        row = {
            k: f"{lead}Human: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: {k}" for k in ("chosen", "rejected")
        }
        (ranking,) = read_rankings([row])
        assert ranking.prompt == [user("one"), bot("two"), user("three")]
        assert ranking.responses == ("chosen", "rejected")
        assert read_prompts([{"prompt": f"{lead}Human: one\n\nAssistant:"}])[0].messages == [user("one")]
    assert read_prompts([{"prompt": "Human: a word?"}])[0].messages == [user("Human: a word?")]


# -- near names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (read_prompts, {"prompt_id": "x", "messages": [Q, bot("a")]}),
        (read_rankings, {"prompt_id": "x", **WHOLE}),
        (read_rankings, {"prompts_hash": 3, **WHOLE}),
        (read_rankings, {"promptId": "x", "chosen_id": 1, "rejected_rating": 2, "num_responses": 2, **TEXTS}),
    ],
)
def test_a_near_name_is_a_column(read, row):
    assert read([row])


@pytest.mark.parametrize(
    ("read", "row", "unsaid"),
    [
        (read_prompts, {"prompt_id": "x"}, "prompt_id"),
        (read_prompts, {"prompts": 3}, "rename"),
        (read_rankings, {"prompt": "q", "response_2": "x", "response_1": "y"}, "rename"),
        (read_rankings, {"prompt": "q", "num_responses": 3}, "rename"),
        (read_rankings, {"prompt": "q", "response": "x"}, "rename"),
        (read_rankings, {"prompt": "q", "chosen_rating": 3, "rejected": "x"}, "rename"),
        (read_rankings, {"prompt": "q", "chosen_id": "7", "rejected": "x"}, "rename"),
        (read_demonstrations, {"prompt": "q", "completion_tokens": "7"}, "rename"),
        (read_demonstrations, {"prompt": "q", "completions": ["a", "b"]}, "rename"),
        (read_demonstrations, {"message_id": "7", "message": "text"}, "rename"),
    ],
)
def test_no_false_advice(read, row, unsaid):
    with pytest.raises(InputError) as caught:
        read([row])
    assert unsaid not in str(caught.value).partition("the fields are")[0]
    assert "; " in str(caught.value)


@pytest.mark.parametrize(
    ("read", "row", "name"),
    [
        (read_prompts, {"Prompt": "q"}, "Prompt"),
        (read_prompts, {"PROMPT": "q"}, "PROMPT"),
        (read_prompts, {"prompt ": "q"}, "prompt "),
        (read_rankings, {"prompt": "q", "chosen": "a", "Rejected": "b"}, "Rejected"),
        (read_rankings, {"promt": "The Louvre", **TEXTS}, "promt"),
        (read_demonstrations, {"mesages": [Q, bot("a")]}, "mesages"),
    ],
)
def test_a_misspelt_name_is_named(read, row, name):
    with pytest.raises(InputError, match=f"missing, but there is '{name}'; rename '{name}' to"):
        read([row])


# -- rows of other sets, which are not read ----------------------------------------------------------------

PAIR = "write prompt, chosen and rejected"
RANKED = "write prompt, responses and ranks"
OTHERS = [
    ({"text": "Once upon a time"}, "a text in one piece", "messages"),
    ({"prompt": '["q"]', "response_a": '["x"]', "response_b": '["y"]'}, "response_a, response_b: two responses", PAIR),
    ({"prompt": "q", "response_0": "x", "response_1": "y", "safer_response_id": 1}, "two responses", PAIR),
    ({"context": [Q], "response1": "x", "response2": "y", "preference": 2}, "response1, response2: two", PAIR),
    ({"question": "q", "response_A": "x", "response_B": "y", "verdict": "A>B"}, "two responses", PAIR),
    ({"question": {"full_text": "q"}, "answer_0": "x", "answer_1": "y"}, "two responses", PAIR),
    ({"prompt": "q", "answers": ["x", "y"], "num_responses": 2}, "Nectar", RANKED),
    ({"instruction": "q", "completions": ["x", "y"], "models": ["m"]}, "several completions", RANKED),
    ({"message_id": "m", "parent_id": None, "text": "q", "role": "prompter"}, "an OASST tree", RANKED),
    ({"prompt": "q", "completions": ["x", "y"], "labels": [True, False]}, "labelled steps", "prompt and completion"),
]


@pytest.mark.parametrize(("row", "seen", "todo"), OTHERS)
def test_rows_of_well_known_sets_are_named(row, seen, todo):
    for read in (read_demonstrations, read_rankings):
        with pytest.raises(InputError, match=f"{seen}.*; .*{todo}|{seen}, and no comparison; {PAIR}") as caught:
            read([row])
        assert "\n" not in str(caught.value)


def test_scores_are_no_ranks():
    with pytest.raises(InputError, match=r"ranks: missing, but there are scores; write ranks, .* minus the scores"):
        read_rankings([{"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}])


def test_advice_does_not_hide_the_fault_of_a_row_that_is_read():
    with pytest.raises(InputError, match="completion: got empty text"):
        read_demonstrations([{"prompt": "q", "completion": "", "answer": "4", "text": "x"}])
    with pytest.raises(InputError, match="prompt: got empty text"):
        read_prompts([{"prompt": " ", "answer": "4", "text": "x"}])
    with pytest.raises(InputError, match="rejected: got empty text"):
        read_rankings([{"prompt": "q", "chosen": "a", "rejected": "", "response_1": "a", "response_2": "b"}])


# -- rows that can't be used -------------------------------------------------------------------------------


def test_bad_rows_are_refused_or_dropped(tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}, {"prompt": "r"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"rows\.jsonl:2: completion: got empty text"):
        read_demonstrations(file)
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        assert len(read_demonstrations(file, on_bad_row="drop")) == 1
    message = f"{file}: on_bad_row=drop: left out: 2 of 3 rows can't be used, the first {file}:2: completion: got empty"
    assert message in caplog.text
    assert caplog.text.strip().endswith("; 2, 3")
    with pytest.raises(InputError, match=r"2 of 2 rows can't be used, the first row 0: completion: got empty text"):
        read_demonstrations(rows[1:], on_bad_row="drop")
    with pytest.raises(InputError, match="on_bad_row: got 'skip'; write refuse or drop"):
        BadRows("rows", "skip")  # type: ignore[arg-type]
