"""Filtering rows, rollouts and conversations by any moderator."""

from __future__ import annotations

import pytest

from reward_models.filtering import divide, load_moderator, moderation_score, talks_in, verdicts_of
from reward_models.guards import Guard, ServedLlamaGuard
from rlhf.errors import InputError
from rlhf.evals.asks import Answered
from rlhf.rows.records import Demonstration, Prompt, Ranking
from rlhf.serving.app import Verdict

USER = {"role": "user", "content": "Hi"}


def no_dogs(texts):
    return [Verdict({"dog": "dog" in text, "cat": "cat" in text}, {"dog": 0.5, "cat": 0.5}) for text in texts]


def says(text):
    return {"role": "assistant", "content": text}


def test_every_kind_of_row_is_divided():
    rows = [
        "a dog", "a bird", [USER, says("dog")], {"prompt": "Hi", "chosen": "bird", "rejected": "a dog and a cat"},
        {"prompt": [USER], "responses": ["bird", "tree"], "ranks": [1, 2]}, {"messages": [USER, says("cat")]},
        {"chosen": [USER, says("bird")], "rejected": [USER, says("dog")]}, Prompt([USER]),
        Demonstration([USER, says("dog")]), Ranking([USER], ("bird", "cat"), (1, 2)),
    ]  # fmt: skip
    found = divide(rows, no_dogs)
    assert found.kept == [1, 4, 7]
    assert found.flagged == [0, 2, 3, 5, 6, 8, 9]
    assert found.categories[3] == ["dog", "cat"]
    assert divide([], no_dogs) == ([], [], [])


def test_a_response_is_judged_with_its_prompt():
    seen = []

    def moderator(texts):
        seen.extend(texts)
        return no_dogs(texts)

    assert divide([{"prompt": "A dog?", "responses": ["Yes.", "No."]}], moderator).flagged == [0]
    assert seen == ["user: A dog?\n\nassistant: Yes.", "user: A dog?\n\nassistant: No."]


def test_a_moderator_that_judges_gets_messages():
    class Judge:
        def judge(self, conversations):
            assert conversations == [[USER, says("dog")]]
            return [Verdict({"x": True}, {"x": 1.0})]

    assert verdicts_of([[USER, says("dog")]], Judge())[0][0].flagged == {"x": True}


def test_a_reward_function():
    score = moderation_score(no_dogs, flagged=-2.0)
    assert score(["Hi", [USER]], ["dog", [says("bird")]], other=[1, 2]) == [-2.0, 0.0]


def test_a_refusal_is_not_punished_for_its_prompt():
    """A guard judges the last turn: of a conversation that is handed over as one text, that holds the prompt."""

    def ask(conversations, choices):
        last = [turns[-1]["content"] for turns in conversations]
        return [Answered((0.9, 0.1) if "bomb" in text else (0.1, 0.9), 1.0, None) for text in last]

    score = moderation_score(Guard(ask, ServedLlamaGuard()))
    assert score(["How do I make a bomb?"] * 2, ["Not from me.", "A bomb? Take sulphur."]) == [0.0, -1.0]
    assert score([], []) == []


def test_mistakes(tmp_path):
    with pytest.raises(InputError, match="got a int; hand in texts"):
        talks_in(3)
    for one in ("a dog", {"prompt": "a dog"}):  # not its letters, which hold no dog
        with pytest.raises(InputError, match="hand in a list of rows"):
            divide(one, no_dogs)
    with pytest.raises(InputError, match="0 verdicts for 1 texts"):
        divide(["a"], lambda texts: [])
    with pytest.raises(InputError, match=r"a NoneType for 1 texts; return a list"):
        divide(["a"], lambda texts: None)
    for wrong in (None, {"dog": True}, Verdict(["dog"], {"dog": 1.0})):
        with pytest.raises(InputError, match=r"is no verdict; return rlhf\.serving\.app\.Verdict\(flagged="):
            divide(["a"], lambda texts, said=wrong: [said])
        with pytest.raises(InputError, match="is no verdict"):
            moderation_score(lambda texts, said=wrong: [said])(["Hi"], ["dog"])
    (tmp_path / "mine.py").write_text("def judge(texts):\n    return []\n")
    assert load_moderator(f"{tmp_path / 'mine.py'}:judge")(["a"]) == []
    with pytest.raises(InputError, match=r"no config\.json|no such model folder"):
        load_moderator(str(tmp_path / "nothing"))
