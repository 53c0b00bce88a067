"""What a moderator judges of a row: every response of every shape of rows, each behind its prompt."""

from __future__ import annotations

import json

import pytest

from reward_models.filtering import divide
from reward_models.labelled_texts import read_labelled
from reward_models.talks import conversations_in
from rlhf.errors import InputError
from rlhf.serving.app import Verdict


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


Q, Y, N = "Is 2 even?", "Yes.", "BAD"
ONE, OTHER = [user(Q), bot(Y)], [user(Q), bot(N)]
SYSTEM = {"role": "system", "content": "Be brief."}

# A row, and its conversations.
ROWS = [
    # our fields
    ({"prompt": Q, "messages": OTHER}, [OTHER]),
    ({"text": f"<user>{Q}<bot>BAD", "messages": OTHER}, [OTHER]),
    ({"prompt": Q, "messages": json.dumps(OTHER)}, [OTHER]),
    ({"messages": OTHER, "response": N}, [OTHER]),
    ({"messages": ONE, "system": "Be brief."}, [[SYSTEM, *ONE]]),
    ({"prompt": Q, "chosen": ONE, "rejected": OTHER, "messages": ONE}, [ONE, OTHER]),
    ({"prompt": [user(Q)], "responses": [Y, N], "ranks": [1, 2]}, [ONE, OTHER]),
    ({"prompt": Q, "responses": [{"text": Y}, {"text": N}]}, [ONE, OTHER]),
    ({"prompt": Q, "responses": [[bot(Y)], bot(N)]}, [ONE, OTHER]),
    ({"prompt": Q, "responses": ["", N]}, [[user(Q), bot("")], OTHER]),
    ({"prompt": Q, "steps": ["It", "is BAD"], "labels": [1, -1]}, [[user(Q), bot("It\nis BAD")]]),
    ({"prompt": Q, "completions": ["It", "is BAD"], "labels": [True, False]}, [[user(Q), bot("It\nis BAD")]]),
    ({"chosen": f"\n\nHuman: {Q}\n\nAssistant: {Y}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: BAD"}, [ONE, OTHER]),
    # a column of its own for each of two, with and without the choice that tells the set
    ({"prompt": Q, "response_0": Y, "response_1": N, "better_response_id": 0}, [ONE, OTHER]),
    ({"prompt": Q, "response_0": Y, "response_1": N, "is_response_0_safe": True}, [ONE, OTHER]),
    ({"prompt": Q, "response_a": Y, "response_b": N}, [ONE, OTHER]),
    ({"question": Q, "answer_0": Y, "answer_10": N}, [ONE, OTHER]),
    ({"history": Q, "human_ref_A": Y, "human_ref_B": N, "labels": 1}, [ONE, OTHER]),
    ({"messages": ONE, "rejected_response": N}, [ONE, OTHER]),
    # several in one column
    ({"prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": [{"answer": Y, "rank": 1}, {"answer": N, "rank": 2}]},
     [ONE, OTHER]),
    ({"prompt": Q, "answers": [{"answer": Y}, {"answer": N}]}, [ONE, OTHER]),
    ({"instruction": Q, "completions": [{"response": Y, "overall_score": 9}, {"response": N, "overall_score": 1}]},
     [ONE, OTHER]),
    ({"prompt": Q, "chosen": [Y, "Sure."], "rejected": [N]}, [ONE, [user(Q), bot("Sure.")], OTHER]),
    # a question and its answer
    ({"prompt": Q, "output": N}, [OTHER]),
    ({"prompt": Q, "answer": N}, [OTHER]),
    ({"prompt": Q, "completion": Y, "answer": N}, [ONE, OTHER]),
    ({"problem": Q, "solution": N, "difficulty": "hard"}, [OTHER]),
    ({"instruction": Q, "response": N}, [OTHER]),
    ({"instruction": "Say.", "input": Q, "output": N, "text": "Below is"}, [[user(f"Say.\n\n{Q}"), bot(N)]]),
    ({"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": N}]}, [OTHER]),
    # no response
    ({"text": "<|im_start|>BAD", "source": "web"}, [[user("<|im_start|>BAD")]]),
    ({"text": "BAD", "target": "men", "num_responses": 3}, [[user("BAD")]]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "talks"), ROWS)
def test_every_response_is_judged_behind_its_prompt(row, talks):
    assert conversations_in(row) == talks


def test_a_row_with_a_flagged_response_is_not_kept():
    def moderator(texts):
        return [Verdict({"bad": "BAD" in text}, {"bad": 0.5}) for text in texts]

    rows = [row for row, talks in ROWS if "BAD" in str(talks)]
    assert divide(rows, moderator).kept == []
    assert divide([json.loads(json.dumps(row).replace("BAD", "fine")) for row in rows], moderator).flagged == []


def test_a_label_is_of_one_response():
    (record,) = read_labelled([{"instruction": Q, "output": N, "rude": 1}])
    assert (record.prompt, record.labels) == (OTHER, {"rude": True})
    with pytest.raises(InputError, match="row 0: response: 2 in one row; a label is of one: write a row for each"):
        read_labelled([{"prompt": Q, "chosen": Y, "rejected": N, "rude": 1}])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"human_ref_A": Y, "human_ref_B": N}, "text: missing; the fields are human_ref_A, human_ref_B; write text"),
        ({"prompt": Q, "output": {"tokens": [1, 2]}}, "output: no text is known in .*; write the text alone"),
        ({"prompt": Q, "response_0": Y, "response_1": N, "better_response_id": 5}, "better_response_id: got 5"),
        ({"data": {"prompt": Q}, "annotations": [{"result": []}]}, "data, annotations: a task without a choice"),
        ({"data": {"prompt": Q}, "annotations": []}, "text: missing; the fields are data, annotations"),
        (
            {"question": Q, "context": "Numbers.", "answer": N},
            "question, context hold text; write them into one prompt",
        ),
    ],
)
def test_a_row_whose_texts_are_not_known_is_refused(row, told):
    with pytest.raises(InputError, match=told):
        conversations_in(row)
