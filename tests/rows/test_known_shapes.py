"""Rows of the sets that people have: one made by hand for each shape, and what must never happen silently to them."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset

from rlhf.errors import InputError
from rlhf.rows import bad_rows, foreign
from rlhf.rows.conversations import ANSWERS
from rlhf.rows.records import (
    Ranking,
    read_demonstrations,
    read_judged,
    read_prompts,
    read_rankings,
    split_key,
    write_jsonl,
)
from rlhf.rows.shapes import SHAPES


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


ASKED = "Which gas do plants take in?"
RIGHT, WRONG, HALF = "Carbon dioxide.", "Helium, mostly.", "A gas of carbon."
Q = [user(ASKED)]
PARTS = [{"type": "text", "text": ASKED, "image": None}]


def battle(winner, one=RIGHT, two=WRONG, **more):
    return {"conversation_a": [*Q, bot(one)], "conversation_b": [*Q, bot(two)], "winner": winner, **more}


def table_battle(flags, asked=(ASKED,), one=(RIGHT,), two=(WRONG,)):
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    turns = {"prompt": asked, "response_a": one, "response_b": two}
    return {**{name: json.dumps(texts) for name, texts in turns.items()}, **dict(zip(names, flags, strict=True))}


def rated(response, **scores):
    return {"prompt": ASKED, "response": response, **scores}


SYSTEM = {"role": "system", "content": "Be brief."}
ABOUT = {"system": "Be brief.", "weight": 0.5, "labeler": "ann", "split_group": "g", "tools": None}
POST = {"id": "t3", "subreddit": "plants", "title": "Gas?", "post": ASKED}
SUMMED = f"SUBREDDIT: r/plants\n\nTITLE: Gas?\n\nPOST: {ASKED}\n\nTL;DR:"

# One row (or several that belong together): the shape's name, the rows, and the prompt, responses and ranks they give.
COMPARED = [
    ("LMArena", [battle("model_b", WRONG, RIGHT)], Q, (WRONG, RIGHT), (2, 1)),
    ("LMArena", [{**battle("model_a"), "conversation_a": [{"role": "user", "content": PARTS}, bot(RIGHT)]}],
     Q, (RIGHT, WRONG), (1, 2)),
    ("LMArena", [battle("tie")], Q, (RIGHT, WRONG), (1, 1)),
    ("LMArena (lists of turns)", [table_battle((1, 0, 0))], Q, (RIGHT, WRONG), (1, 2)),
    ("LMArena (lists of turns)", [table_battle((0, 0, 1))], Q, (RIGHT, WRONG), (1, 1)),
    ("PPE", [{"prompt": ASKED, "response_1": WRONG, "response_2": RIGHT, "winner": "model_b"}],
     Q, (WRONG, RIGHT), (2, 1)),
    ("JudgeBench", [{"question": ASKED, "response_A": WRONG, "response_B": RIGHT, "label": "B>A"}],
     Q, (WRONG, RIGHT), (2, 1)),
    ("PKU-SafeRLHF", [{"prompt": ASKED, "response_0": WRONG, "response_1": RIGHT, "better_response_id": 1}],
     Q, (WRONG, RIGHT), (2, 1)),
    ("HelpSteer2 preferences",
     [{"prompt": ASKED, "response_1": RIGHT, "response_2": WRONG, "preference_strength": -3}],
     Q, (RIGHT, WRONG), (1, 2)),
    ("HelpSteer2 preferences",
     [{"prompt": f"Hello<extra_id_1>Assistant\nYes?\n<extra_id_1>User\n{ASKED}", "response_1": RIGHT,
       "response_2": WRONG, "preference_strength": 0}],
     [user("Hello"), bot("Yes?"), *Q], (RIGHT, WRONG), (1, 1)),
    ("HelpSteer3", [{"context": [user("Hello"), bot("Yes?"), *Q], "response1": RIGHT, "response2": WRONG,
                     "overall_preference": 1}], [user("Hello"), bot("Yes?"), *Q], (RIGHT, WRONG), (2, 1)),
    ("SHP", [{"history": ASKED, "human_ref_A": RIGHT, "human_ref_B": WRONG, "labels": 1}],
     Q, (RIGHT, WRONG), (1, 2)),
    ("WebGPT", [{"question": {"full_text": ASKED, "id": "7"}, "answer_0": WRONG, "score_0": -0.5, "answer_1": RIGHT,
                 "score_1": 0.5}], Q, (WRONG, RIGHT), (0.5, -0.5)),
    ("StackExchange pairs", [{"question": ASKED, "response_j": RIGHT, "response_k": WRONG}],
     Q, (RIGHT, WRONG), (1, 2)),
    ("summarize-from-feedback", [{"info": POST, "summaries": [{"text": WRONG}, {"text": RIGHT}], "choice": 1}],
     [user(SUMMED)], (WRONG, RIGHT), (2, 1)),
    ("OpenAI preferences", [{"input": {"messages": Q}, "preferred_output": [bot(RIGHT)],
                             "non_preferred_output": [bot(WRONG)]}], Q, (RIGHT, WRONG), (1, 2)),
    ("ShareGPT pairs", [{"conversations": [{"from": "human", "value": ASKED}],
                         "chosen": {"from": "gpt", "value": RIGHT}, "rejected": {"from": "gpt", "value": WRONG}}],
     Q, (RIGHT, WRONG), (1, 2)),
    ("axolotl pairs", [{"messages": Q, "chosen": bot(RIGHT), "rejected": bot(WRONG)}], Q, (RIGHT, WRONG), (1, 2)),
    ("ms-swift pairs", [{"messages": [*Q, bot(RIGHT)], "rejected_response": WRONG}], Q, (RIGHT, WRONG), (1, 2)),
    ("Nectar", [{"prompt": f"\n\nHuman: {ASKED}\n\nAssistant: ", "num_responses": 3,
                 "answers": [{"answer": HALF, "rank": 2.0}, {"answer": RIGHT, "rank": 1.0},
                             {"answer": WRONG, "rank": 3.0}]}], Q, (HALF, RIGHT, WRONG), (2, 1, 3)),
    ("StackExchange", [{"question": ASKED, "answers": [{"text": RIGHT, "pm_score": 4},
                                                       {"text": WRONG, "pm_score": 0}]}], Q, (RIGHT, WRONG), (-4, 0)),
    ("UltraFeedback", [{"instruction": ASKED, "completions": [
        {"response": WRONG, "overall_score": 2.5, "custom_system_prompt": "Be a friend."},
        {"response": RIGHT, "overall_score": 9.0, "custom_system_prompt": "Be exact."}]}],
     Q, (WRONG, RIGHT), (-2.5, -9)),
    ("NeMo-RL", [{"context": Q, "completions": [{"rank": 1, "completion": [bot(WRONG)]},
                                                {"rank": 0, "completion": [bot(RIGHT)]}]}], Q, (WRONG, RIGHT), (1, 0)),
    ("RewardBench 2 or RM-Bench",
     [{"prompt": ASKED, "chosen": [RIGHT, "CO2."], "rejected": [WRONG], "subset": "Ties"}],
     Q, (RIGHT, "CO2.", WRONG), (1, 1, 2)),
    ("HelpSteer2", [rated(WRONG, helpfulness=1), rated(RIGHT, helpfulness=4), rated(HALF, helpfulness=4)],
     Q, (WRONG, RIGHT, HALF), (-1, -4, -4)),
    ("rated responses", [rated(WRONG, score=0.2), rated(RIGHT, score=0.9)], Q, (WRONG, RIGHT), (-0.2, -0.9)),
    ("OASST trees", [{"message_tree_id": "t", "prompt": {"message_id": "t", "role": "prompter", "text": ASKED,
                      "replies": [{"role": "assistant", "text": WRONG, "rank": 1, "replies": []},
                                  {"role": "assistant", "text": RIGHT, "rank": 0, "replies": []}]}}],
     Q, (WRONG, RIGHT), (1, 0)),
    ("OASST messages", [
        {"message_id": "b", "parent_id": "a", "message_tree_id": "a", "text": RIGHT, "role": "assistant", "rank": 0},
        {"message_id": "a", "parent_id": None, "message_tree_id": "a", "text": ASKED, "role": "prompter"},
        {"message_id": "c", "parent_id": "a", "message_tree_id": "a", "text": WRONG, "role": "assistant", "rank": 1}],
     Q, (RIGHT, WRONG), (0, 1)),
    ("Label Studio", [{"id": 3, "data": {"prompt": ASKED, "answer1": WRONG, "answer2": RIGHT}, "annotations": [
        {"completed_by": 5, "result": [{"type": "pairwise", "value": {"selected": "right"}}]}]}],
     Q, (WRONG, RIGHT), (2, 1)),
    ("Label Studio", [{"id": 3, "data": {"prompt": ASKED, "items": [
        {"id": "x", "body": WRONG}, {"id": "y", "body": RIGHT}, {"id": "z", "body": HALF}]}, "annotations": [
        {"completed_by": {"id": 5, "email": "ann@x"},
         "result": [{"type": "ranker", "value": {"ranker": {"rank": ["y", "z", "x"]}}}]}]}],
     Q, (RIGHT, HALF, WRONG), (1, 2, 3)),
    ("Label Studio", [{"data": {"prompt": ASKED, "system": "Be brief.", "answer1": WRONG, "answer2": RIGHT},
                       "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "right"}}]}]}],
     [SYSTEM, *Q], (WRONG, RIGHT), (2, 1)),
    ("HelpSteer2", [rated(WRONG, helpfulness=1, **ABOUT), rated(RIGHT, helpfulness=4, **ABOUT)],
     [SYSTEM, *Q], (WRONG, RIGHT), (-1, -4)),
    ("rated responses", [rated(WRONG, score=1, **ABOUT), rated(RIGHT, score=2, **ABOUT)],
     [SYSTEM, *Q], (WRONG, RIGHT), (-1, -2)),
    ("PPE", [{"prompt": ASKED, "response_1": WRONG, "response_2": RIGHT, "winner": "model_b", **ABOUT}],
     [SYSTEM, *Q], (WRONG, RIGHT), (2, 1)),
]  # fmt: skip

# One row: the shape's name, the row, the whole conversation, and the first turn that is trained.
IMITATED = [
    ("ShareGPT", {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": ASKED},
                                    {"from": "gpt", "value": RIGHT}]},
     [{"role": "system", "content": "Be brief."}, *Q, bot(RIGHT)], 0),
    ("ShareGPT", {"conversations": [*Q, bot(RIGHT)]}, [*Q, bot(RIGHT)], 0),
    ("conversations", {"conversation": [*Q, bot(RIGHT)], "model": "m"}, [*Q, bot(RIGHT)], 0),
    ("Guanaco", {"text": f"### Human: Hello### Assistant: Yes?### Human: {ASKED}\n### Assistant: {RIGHT}"},
     [user("Hello"), bot("Yes?"), *Q, bot(RIGHT)], 0),
    ("ChatML", {"text": f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{ASKED}<|im_end|>\n"
                        f"<|im_start|>assistant\n{RIGHT}\n\nReally.<|im_end|>"},
     [{"role": "system", "content": "Be brief."}, *Q, bot(f"{RIGHT}\n\nReally.")], 0),
    ("Alpaca", {"instruction": "Correct it.", "input": "Plants eats gas.", "output": "Plants eat gas."},
     [user("Correct it.\n\nPlants eats gas."), bot("Plants eat gas.")], 1),
    ("Alpaca", {"instruction": ASKED, "input": "", "output": RIGHT, "system": "Be brief.",
                "history": [["Hello", "Yes?"]]},
     [{"role": "system", "content": "Be brief."}, user("Hello"), bot("Yes?"), *Q, bot(RIGHT)], 4),
    ("Dolly", {"instruction": ASKED, "context": "It is about leaves.", "response": RIGHT, "category": "closed_qa"},
     [user(f"{ASKED}\n\nIt is about leaves."), bot(RIGHT)], 1),
    ("ms-swift", {"query": ASKED, "response": RIGHT, "history": [["Hello", "Yes?"]]},
     [user("Hello"), bot("Yes?"), *Q, bot(RIGHT)], 3),
    ("questions and answers", {"system_prompt": "Be brief.", "question": ASKED, "response": RIGHT},
     [{"role": "system", "content": "Be brief."}, *Q, bot(RIGHT)], 2),
    ("questions and answers", {"problem": ASKED, "solution": RIGHT}, [*Q, bot(RIGHT)], 1),
    ("Label Studio", {"data": {"dialogue": [{"author": "user", "text": ASKED}]}, "annotations": [
        {"result": [{"type": "textarea", "value": {"text": [RIGHT]}}]}]}, [*Q, bot(RIGHT)], 1),
]  # fmt: skip


@pytest.fixture
def told(caplog):
    """The lines of the log, each of which is written once per process."""
    foreign._tell_once.cache_clear()
    bad_rows.warn_once.cache_clear()
    caplog.set_level(logging.INFO, logger="rlhf")
    return caplog


def lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("name", "rows", "prompt", "responses", "ranks"), COMPARED)
def test_comparisons(tmp_path, told, name, rows, prompt, responses, ranks):
    decided = {"prompt": "q", "chosen": "a", "rejected": "b"}
    file = lines(tmp_path / "rows.jsonl", rows)
    if len(set(ranks)) > 1:
        (ranking,) = read_rankings(file)
    else:  # a source of ties alone is refused
        ranking, _ = read_rankings([{"path": str(file)}, {"path": str(lines(tmp_path / "more.jsonl", [decided]))}])
    assert (ranking.prompt, ranking.responses, ranking.ranks) == (prompt, responses, ranks)
    assert f"{file}: {len(rows)} rows of {name} give 1 rankings" in told.text
    assert ("of which 1 are ties" in told.text) == (len(set(ranks)) == 1)
    best = responses[ranks.index(min(ranks))]
    assert [d.messages for d in read_demonstrations(file)] == [[*prompt, bot(best)]]
    assert read_prompts(file)[0].messages == prompt
    assert split_key(read_prompts(file)[0]) == split_key(ranking)
    if ABOUT.items() <= rows[0].items():
        assert ranking.columns == ABOUT
    write_jsonl(tmp_path / "ours.jsonl", [ranking])
    if len(set(ranks)) > 1:
        assert read_rankings(tmp_path / "ours.jsonl") == [ranking]


@pytest.mark.parametrize(("name", "row", "messages", "trained_from"), IMITATED)
def test_demonstrations(tmp_path, told, name, row, messages, trained_from):
    file = lines(tmp_path / "rows.jsonl", [row, row])
    first, second = read_demonstrations(file)
    assert (first.messages, first.trained_from) == (messages, trained_from)
    assert first == second
    assert f"{file}: 2 rows of {name} give 2 demonstrations" in told.text
    assert [prompt.messages for prompt in read_prompts(file)] == [messages[:-1]] * 2
    with pytest.raises(InputError, match=r"no comparison; write prompt, chosen and rejected|no rows; left out 2 of 2"):
        read_rankings(file)


def test_every_shape_of_the_table_is_here():
    seen = {case[0] for case in (*COMPARED, *IMITATED)} | {"Open WebUI feedback", "Open WebUI chats"}
    assert {shape.name for shape in SHAPES} == seen - {"questions and answers"}


def test_what_a_shape_does_not_use_stays_a_column():
    row = {"prompt": ASKED, "response_0": WRONG, "response_1": RIGHT, "better_response_id": 1, "safer_response_id": 0}
    assert read_rankings([row])[0].columns == {"safer_response_id": 0}
    assert read_prompts([row])[0].columns == {name: value for name, value in row.items() if name != "prompt"}
    assert read_rankings([{"path": "rows", **row}])  # a row, not a source
    turns = {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": RIGHT}], "id": "s"}
    prompt = read_prompts([turns])[0]
    assert (prompt.messages, prompt.columns["id"], prompt.columns["conversations"]) == (Q, "s", turns["conversations"])


# -- ties, and what people called bad ----------------------------------------------------------------------


def test_summaries_of_posts_and_articles_in_one_table():
    """A table fills the fields of a struct that a row lacks with null, so every row has a post."""
    both = [{"text": WRONG}, {"text": RIGHT}]
    article = {"title": "Gas", "article": "Plants take in gas."}
    table = [{"info": info, "summaries": both, "choice": 1} for info in (POST, article)]
    posts, articles = (record.prompt[0]["content"] for record in read_rankings(Dataset.from_list(table)))
    assert posts == SUMMED
    assert articles == "TITLE: Gas\n\nARTICLE: Plants take in gas.\n\nTL;DR:"
    neither = [{"info": {"title": "Gas"} | dict.fromkeys(("post", "article")), "summaries": both, "choice": 1}]
    with pytest.raises(InputError, match="info: neither a post nor an article"):
        read_rankings(neither)


@pytest.mark.parametrize("winner", ["both_bad", "tie (bothbad)"])
def test_two_bad_responses_are_a_tie_and_no_demonstration(told, winner):
    rows = [battle("model_a"), battle(winner, HALF, WRONG)]
    good, bad = read_rankings(rows)
    assert (bad.ranks, bad.pairs(), bad.columns["label"]) == ((1, 1), [], False)
    assert len(good.pairs()) == 1
    assert [d.response for d in read_demonstrations(rows)] == [RIGHT]
    assert "left out 1 of 2 rows for label false" in told.text
    again = [
        {"prompt": ASKED, "responses": list(r.responses), "ranks": list(r.ranks), **r.columns} for r in (good, bad)
    ]
    assert [d.response for d in read_demonstrations(again)] == [RIGHT]  # also after they were written


def test_a_value_that_names_no_outcome():
    for row, message in (
        (battle("gpt-4"), "winner: got 'gpt-4'; write one of model_a, model_b, tie"),
        (table_battle((1, 1, 0)), r"winner_tie: got \[1, 1, 0\]; one of them is 1"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2}, "better_response_id: got 2"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": True}, "id: got True"),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0.5}, "labels: got 0.5; write one of 1, 0"),
        ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": None}]}, "rank: got None"),
        ({"instruction": "q", "completions": [{"response": "a", "overall_score": "5"}] * 2}, "overall_score: got '5'"),
    ):
        with pytest.raises(InputError, match=f"row 0: .*{message}"):
            read_rankings([row])


def test_rows_that_compare_nothing_are_counted(told):
    longer = [*Q, bot(HALF), user("And?")]
    rows = [
        battle("model_a"),
        battle("model_a", two=" "),
        battle("model_a") | {"conversation_b": [*Q, bot("Hm."), user("And?"), bot(WRONG)]},
        battle("model_a") | {name: [*longer, bot(text)] for name, text in
                             (("conversation_a", RIGHT), ("conversation_b", WRONG))},
    ]  # fmt: skip
    assert [r.prompt for r in read_rankings(rows)] == [Q, longer]
    assert "left out 1 of 4 rows for an empty reply: row 1" in told.text
    assert "left out 1 of 4 rows for conversations that part before their last answer: row 2" in told.text
    with pytest.raises(InputError, match="left out 1 of 1 rows for a response without a second one"):
        read_rankings([rated(RIGHT, helpfulness=4)])
    two = {"asked": (ASKED, "And?"), "one": (HALF, RIGHT), "two": (HALF, WRONG)}
    assert read_rankings([table_battle((1, 0, 0), **two)])[0].prompt == longer
    with pytest.raises(InputError, match="left out 1 of 1 rows for an empty reply"):
        read_rankings([table_battle((1, 0, 0), one=(None,))])


def test_ratings_of_one_prompt_stand_together():
    other = {"prompt": "And at night?", "response": "Oxygen.", "helpfulness": 3}
    rows = [rated(RIGHT, helpfulness=4), rated(WRONG, helpfulness=1), other, {**other, "response": "None.",
            "helpfulness": 2}]  # fmt: skip
    assert [r.ranks for r in read_rankings(rows)] == [(-4, -1), (-3, -2)]
    assert len(read_prompts(rows)) == 4
    alone = rated("Nitrogen.", helpfulness=1) | {"prompt": "And which do they give?"}
    assert [r.ranks for r in read_rankings([*rows, alone])] == [(-4, -1), (-3, -2)]
    assert [d.response for d in read_demonstrations([*rows, alone])] == [RIGHT, "Oxygen.", "Nitrogen."]
    rows[1]["helpfulness"] = None
    with pytest.raises(InputError, match="row 1: helpfulness: "):
        read_rankings(rows)
    marked = f"Hello<extra_id_1>Assistant\nYes?\n<extra_id_1>User\n{ASKED}"
    assert read_prompts([{**rated(RIGHT, helpfulness=4), "prompt": marked}])[0].messages[1:] == [bot("Yes?"), *Q]


def test_ratings_keep_what_their_rows_agree_in():
    rows = [rated(RIGHT, score=2, model="x", section="s"), rated(WRONG, score=1, model="y", section="s")]
    assert read_rankings(rows)[0].columns == {"section": "s"}
    alone = read_demonstrations([rated(RIGHT, score=1, **ABOUT)])[0]
    assert (alone.messages, alone.trained_from, alone.columns) == ([SYSTEM, *Q, bot(RIGHT)], 2, ABOUT)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        *((name, "Be brief.", "Be long.") for name in ("system", "system_prompt", "system_message")),
        ("tools", [{"type": "function", "function": {"name": "add"}}], None),
        ("chat_template_kwargs", {"enable_thinking": True}, {"enable_thinking": False}),
        ("question", "gas", "plants"),  # both stand in the prompt
        ("context", "gas", "plants"),
        ("labeler", "ann", "bob"),
    ],
)
def test_ratings_are_compared_where_they_answer_the_same(name, one, other):
    rows = [rated(text, score=n, **{name: value}) for value in (one, other) for n, text in enumerate((WRONG, RIGHT))]
    rankings = read_rankings(rows)
    assert [(r.ranks, r.columns[name]) for r in rankings] == [((0, -1), one), ((0, -1), other)]
    assert {split_key(ranking) for ranking in rankings} == {split_key(prompt) for prompt in read_prompts(rows)}
    with pytest.raises(InputError, match="left out 2 of 2 rows for a response without a second one"):
        read_rankings(rows[1:3])


@pytest.mark.parametrize(("name", "one", "other"), [("weight", 0, 1), ("split_group", 1, 2)])
def test_ratings_that_disagree_on_their_ranking_are_refused(told, name, one, other):
    rows = [rated(text, score=n, **{name: one}) for n, text in enumerate((WRONG, RIGHT))]
    rows.append(rated(HALF, score=5, **{name: other}))
    for read in (read_rankings, read_demonstrations):
        with pytest.raises(InputError, match=f"row 2: {name}: got {other!r}, and {one!r} in row 0, which has the same"):
            read(rows)
    (ranking,) = read_rankings(rows, on_bad_row="drop")
    assert (ranking.responses, ranking.columns) == ((WRONG, RIGHT), {name: one})
    assert "left out: 1 of 2 rows can't be used, the first row 2" in told.text


def test_ratings_with_a_false_label_are_no_demonstrations(told):
    rows = [rated(WRONG, score=9, label=False), rated(RIGHT, score=2, label=True), rated(HALF, score=1, label=True)]
    assert [d.response for d in read_demonstrations(rows)] == [RIGHT]
    assert "left out 1 of 2 rows for label false, which says not to imitate it:" in told.text
    assert read_rankings(rows)[0].ranks == (-9, -2, -1)
    with pytest.raises(InputError, match="left out 1 of 1 rows for label false"):
        read_demonstrations(rows[:1])
    with pytest.raises(InputError, match="row 0: label: got 3; write true or false"):
        read_demonstrations([rated(RIGHT, score=1, label=3)])


# -- trees and exports -------------------------------------------------------------------------------------

NODES = [
    ("a", None, "prompter", ASKED, None, {}),
    ("b", "a", "assistant", RIGHT, 1, {}),
    ("c", "a", "assistant", WRONG, 0, {}),
    ("d", "a", "assistant", "Spam", 2, {"deleted": True}),
    ("e", "b", "prompter", "And at night?", 0, {}),
    ("f", "e", "assistant", "Oxygen.", None, {}),
    ("g", "c", "prompter", "Sure?", 0, {}),
    ("h", "g", "assistant", "No.", 0, {}),
    ("i", "g", "assistant", "Yes.", 1, {}),
    ("j", "g", "assistant", "Perhaps.", None, {}),
]
OASST = [{"message_id": own, "parent_id": parent, "message_tree_id": "a", "role": role, "text": text, "rank": rank,
          **more} for own, parent, role, text, rank, more in NODES]  # fmt: skip


def tree(own: str) -> dict:
    node = next(node for node in OASST if node["message_id"] == own)
    return {**node, "replies": [tree(n["message_id"]) for n in OASST if n["parent_id"] == own]}


@pytest.mark.parametrize("rows", [OASST, OASST[::-1], [{"message_tree_id": "a", "prompt": tree("a")}]])
def test_a_tree_gives_a_ranking_for_every_turn_with_several_replies(told, rows):
    first, second = sorted(read_rankings(rows), key=lambda ranking: len(ranking.prompt))
    assert (first.prompt, dict(zip(first.responses, first.ranks, strict=True))) == (Q, {RIGHT: 1, WRONG: 0})
    assert second.prompt == [*Q, bot(WRONG), user("Sure?")]
    assert dict(zip(second.responses, second.ranks, strict=True)) == {"No.": 0, "Yes.": 1}
    for flaw in ("a deleted or refused message", "a reply without a rank", "a response without a second one"):
        assert f"for {flaw}" in told.text
    best = {d.response: len(d.messages) for d in read_demonstrations(rows)}
    assert best == {WRONG: 2, "Oxygen.": 4, "No.": 4}
    assert len(read_prompts(rows)) == 3


def test_a_message_whose_parent_is_missing(told):
    read_rankings([node for node in OASST if node["message_id"] != "g"])
    assert "left out 3 of" in told.text
    assert "for a message whose parent is not there" in told.text


def test_label_studio_has_several_annotators(told):
    def by(who, **value):
        kind = "pairwise" if "selected" in value else "choices"
        return {"completed_by": who, "result": [{"type": kind, "value": value}]}

    task = {"id": 1, "data": {"prompt": ASKED, "answer1": RIGHT, "answer2": WRONG}}
    rows = [{**task, "annotations": [by(1, selected="left"), by(2, selected="right"), by(3, choices=["x"]),
                                     {"was_cancelled": True, "result": []}]}]  # fmt: skip
    rankings = read_rankings(rows)
    assert [(r.ranks, r.columns["labeler"]) for r in rankings] == [((1, 2), "1"), ((2, 1), "2")]
    assert "left out 1 of 4 rows for a skipped task" in told.text
    assert "left out 1 of 4 rows for a task without a choice" in told.text
    with pytest.raises(InputError, match="data: no two responses among prompt, one; call them answer1 and answer2"):
        read_rankings([{"data": {"prompt": ASKED, "one": RIGHT}, "annotations": [by(1, selected="left")]}])
    with pytest.raises(InputError, match="selected: got 'both'; write left or right"):
        read_rankings([{**task, "annotations": [by(1, selected="both")]}])


def rating(value, of="r", siblings=None, deep=True):
    messages = {
        "q": {"id": "q", "parentId": None, "childrenIds": ["r", "s"], "role": "user", "content": ASKED},
        "r": {"id": "r", "parentId": "q", "childrenIds": [], "role": "assistant", "content": RIGHT},
        "s": {"id": "s", "parentId": "q", "childrenIds": [], "role": "assistant", "content": WRONG},
    }
    chat = {"history": {"messages": messages, "currentId": "r"}}
    return {
        "id": "f", "user_id": "ann", "type": "rating", "meta": {"message_id": of, "arena": bool(siblings)},
        "data": {"rating": value, "sibling_model_ids": siblings},
        "snapshot": {"chat": {"chat": chat}} if deep else chat,
    }  # fmt: skip


def test_open_webui_feedback(told):
    up, down = read_rankings([rating(1, siblings=["m"]), rating("-1", siblings=["m"], deep=False)])
    assert (up.prompt, up.responses, up.ranks, up.columns["labeler"]) == (Q, (RIGHT, WRONG), (1, 2), "ann")
    assert down.ranks == (2, 1)
    thumbs = [rating(1), rating(-1, of="s"), rating(None)]
    assert [d.messages for d in read_demonstrations(thumbs)] == [[*Q, bot(RIGHT)]]
    assert "left out 1 of 3 rows for label false" in told.text
    assert "left out 1 of 3 rows for a comment without a rating" in told.text
    with pytest.raises(InputError, match="left out 2 of 3 rows for a response without a second one"):
        read_rankings(thumbs)
    with pytest.raises(InputError, match=r"meta.message_id: the snapshot has no such message"):
        read_demonstrations([rating(1, of="x")])
    assert read_demonstrations([{"title": "t", "chat": rating(1)["snapshot"]["chat"]["chat"]}])[0].messages == [
        *Q,
        bot(RIGHT),
    ]


def test_a_chat_whose_messages_go_round_ends():
    row = rating(1)
    row["snapshot"]["chat"]["chat"]["history"]["messages"]["q"]["parentId"] = "r"
    with pytest.raises(InputError):
        read_rankings([row])


# -- what is ambiguous, mixed or unknown -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "q", "output": "a", "response": "b"},
         r"the row may be Alpaca \(instruction, output\) or Dolly \(instruction, response\); take out"),
        ({"problem": "q", "solution": "a", "answer": "b"},
         r"answer, solution: each of them may be the completion; name one of them, as in columns: {completion: "),
        ({"question": "q", "input": "r", "answer": "b"}, "question, input: each of them may be the prompt"),
        ({"prompt": "q", "response": "a", "helpfulness": 1, "score": 2}, "may be HelpSteer2 .* or rated responses"),
    ],
)  # fmt: skip
def test_ambiguous_rows_are_refused_with_the_candidates(row, message):
    for read in (read_demonstrations, read_rankings):
        with pytest.raises(InputError, match=message) as caught:
            read([row])
        assert "\n" not in str(caught.value)
    if "prompt" in row or "problem" in row:
        assert read_prompts([row])[0].text


@pytest.mark.parametrize("name", ANSWERS)
def test_a_row_of_kto_may_have_a_reference_beside_it(name):
    rows = [{"prompt": ASKED, "completion": text, "label": text == RIGHT, name: "4"} for text in (RIGHT, WRONG)]
    judged = [(one.messages, one.columns) for one in read_judged(rows)]
    assert judged == [([*Q, bot(text)], {"label": text == RIGHT, name: "4"}) for text in (RIGHT, WRONG)]
    with pytest.raises(InputError, match="prompt, completion, label: a KTO row; write prompt, chosen"):
        read_rankings(rows)


def test_the_rows_of_a_file_are_of_one_shape(tmp_path):
    alpaca = {"instruction": "q", "output": "a"}
    turns = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    ours = {"prompt": "q", "completion": "a"}
    for first, second, names in (
        (alpaca, turns, r"ShareGPT \(conversations\) in a file of Alpaca \(instruction, output\)"),
        (alpaca, ours, r"our own fields in a file of Alpaca \(instruction, output\)"),
        (ours, alpaca, r"Alpaca \(instruction, output\) in a file of our own fields"),
    ):
        file = lines(tmp_path / "rows.jsonl", [first, first, second])
        with pytest.raises(InputError, match=rf"rows\.jsonl:3: a row of {names}; write rows of one shape"):
            read_demonstrations(file)
        assert len(read_demonstrations(file, on_bad_row="drop")) == 2
    with pytest.raises(InputError, match=r"row 1: output: got null, and the rows before are Alpaca; add 'output'"):
        read_demonstrations([alpaca, {"instruction": "q", "output": None}])
    with pytest.raises(InputError, match=r"row 1: .*completion"):
        read_demonstrations([alpaca, {"instruction": "q", "output": 3}])
    assert len(read_demonstrations([{"instruction": "q", "output": None}, alpaca, alpaca], on_bad_row="drop")) == 2
    graded = [{"prompt": "q", "answer": "4"}, {"prompt": "r", "answer": None}, {"question": "s", "answer": 5}]
    assert len(read_prompts(graded)) == 3  # of prompts, an answer is a column like others
    folder = tmp_path / "folder"
    folder.mkdir()
    lines(folder / "train-1.jsonl", [alpaca]), lines(folder / "train-2.jsonl", [turns])
    assert len(read_demonstrations(folder)) == 2  # a shape for each file


def test_what_is_no_shape_is_told_the_nearest_one():
    for row, near in (({"instructions": "q", "outputs": "a"}, "Alpaca (instruction, output)"),
                      ({"foo": 1}, None), ({"human_ref_a": "x", "histories": "y"}, "SHP")):  # fmt: skip
        for read in (read_demonstrations, read_rankings):
            with pytest.raises(InputError) as caught:
                read([row])
            told = str(caught.value)
            assert "name its column (columns: {" in told
            assert "the shapes that are read: LMArena, " in told
            assert (f"the nearest is {near}" in told) if near else ("nearest" not in told)
            assert "\n" not in told


def test_rows_that_are_not_as_their_set_has_them():
    for row in (
        {"info": {"post": "q"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 5},
        {"question": {"id": 3}, "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": -1},
        {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "q", "replies": [{"rank": 0}, {"rank": "1"}]}},
        {"data": {"prompt": "q", "answer1": "a", "answer2": "b"}, "annotations": [{"result": [3]}]},
        {"history": {"a": 1}, "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        {"conversation_a": [3], "conversation_b": [4], "winner": "tie"},
    ):
        with pytest.raises(InputError, match=r"row 0: .*; ") as caught:
            read_rankings([row])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="text: 'and more' stands outside the turns"):
        read_demonstrations([{"text": "<|im_start|>user\nq<|im_end|>and more"}])
    with pytest.raises(InputError, match=r"history: got \['Hi'\]; write pairs"):
        read_demonstrations([{"instruction": "q", "output": "a", "history": ["Hi"]}])


def test_lists_in_a_table_are_json(tmp_path):
    rows = [battle("model_b"), {"instruction": ASKED, "completions": COMPARED[21][1][0]["completions"]}]
    for row, best in zip(rows, (WRONG, RIGHT), strict=True):
        with (tmp_path / "a.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(
                {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
            )
        assert read_demonstrations(tmp_path / "a.csv")[0].response == best


# -- the rows that were refused ----------------------------------------------------------------------------

ASKED_THERE = ("Name a red fruit.", "How do I boil an egg?", "What is 7 + 5?", "Give a synonym of quick.")
RIGHT_THERE = (
    "An apple is a red fruit.", "Put it into boiling water for eight minutes.", "7 + 5 = 12.", "Fast.",
)  # fmt: skip
TIES_THERE = {"arena140k.jsonl": {2, 3}, "arena33k.jsonl": {2, 3}, "arena55k.csv": {2}, "ppe.jsonl": {2, 3}}
SECOND_WINS = {"arena140k.jsonl": {1}, "arena33k.jsonl": {1}, "arena55k.csv": {1}, "ppe.jsonl": {1},
               "judgebench.jsonl": {1}}  # fmt: skip


def test_every_case_is_read(shared_cases):
    for file in sorted(shared_cases.glob("27/*")):
        rows = read_demonstrations(file)
        firsts = [next(m["content"] for m in row.messages if m["content"] in ASKED_THERE) for row in rows]
        assert tuple(firsts) == ASKED_THERE, file
        assert all(right in [m["content"] for m in row.messages] for row, right in zip(rows, RIGHT_THERE, strict=True))
        assert rows[0].messages[0]["content"] in ("Be brief.", ASKED_THERE[0]), file
    for file in sorted([*shared_cases.glob("28/*"), *shared_cases.glob("29/*"), *shared_cases.glob("30/*")]):
        rankings = read_rankings(file)
        assert len(rankings) == 4, file
        for n, ranking in enumerate(rankings):
            assert ASKED_THERE[n] in " ".join(m["content"] for m in ranking.prompt), file
            best = {r for r, rank in zip(ranking.responses, ranking.ranks, strict=True) if rank == min(ranking.ranks)}
            tie = n in TIES_THERE.get(file.name, ())
            assert (not ranking.pairs()) == tie, file
            assert (RIGHT_THERE[n] in best) == (n not in SECOND_WINS.get(file.name, ())), (file, n)
        more = {"nectar.jsonl": 3, "rewardbench2.jsonl": 4, "rmbench.jsonl": 6}.get(file.name, 2)
        assert {len(r.responses) for r in rankings} == {more}, file
    for file in sorted(shared_cases.glob("31/*")):
        if file.name == "text_parts_null.jsonl":
            with pytest.raises(InputError, match="got a part of type 'image'; only text is read"):
                read_demonstrations(file)
        else:
            sums = file.name.startswith("tools")
            firsts = {"developer.jsonl": ["Be brief."], "empty_system.jsonl": [""]}.get(file.name, [])
            asked, right = (["1+2?"] * 4, ["3"] * 4) if sums else (ASKED_THERE, RIGHT_THERE)
            found = [[turn["content"] for turn in row.messages] for row in read_demonstrations(file)]
            if sums:  # between the two: the call, and what the tool says
                assert {turns[2] for turns in found} == {"3"}, file
                found = [[turns[0], turns[3]] for turns in found]
            assert found == [[*firsts, *two] for two in zip(asked, right, strict=True)], file


def test_what_is_exported_is_read_again(tmp_path):
    """Rankings, pairs, KTO rows and demonstrations, as a store of judgments writes them."""
    about = {"labeler": "ann", "item": "i1", "seconds": 4.5}
    ranking = Ranking(Q, (RIGHT, HALF, WRONG), (1, 1, 2), about)
    assert read_rankings(lines(tmp_path / "r.jsonl", [
        {"prompt": Q, "responses": [RIGHT, HALF, WRONG], "ranks": [1, 1, 2], **about}])) == [ranking]  # fmt: skip
    assert read_rankings(lines(tmp_path / "p.jsonl", [
        {"prompt": Q, "chosen": [bot(RIGHT)], "rejected": [bot(WRONG)], **about}]
    ))[0].responses == (RIGHT, WRONG)  # fmt: skip
    kto = [{"prompt": Q, "completion": [bot(text)], "label": text == RIGHT} for text in (RIGHT, WRONG)]
    assert [d.response for d in read_demonstrations(lines(tmp_path / "k.jsonl", kto))] == [RIGHT]
    assert read_demonstrations(lines(tmp_path / "d.jsonl", [{"messages": [*Q, bot(RIGHT)]}]))[0].response == RIGHT
