"""Programmatic scores against answers by hand."""

import inspect

import pytest

from reward_models.functions import final_answer, length_penalty, matches, repetition_penalty, response_text
from rlhf.errors import InputError


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_a_completion_is_text_or_messages():
    assert response_text("hello") == "hello"
    assert response_text([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]) == "b"


def test_length_penalty_begins_at_its_target():
    score = length_penalty(3, per_word=0.5)
    assert score([""] * 4, ["", "a b c", "a b c d", "a b c d e"]) == [0.0, 0.0, -0.5, -1.0]
    assert score([""], said("a b  c\nd")) == [-0.5]


def test_matches_the_whole_response():
    score = matches(r"<think>.*</think>\s*<answer>.*</answer>")
    good, bad = "<think>\n1 + 1\n</think>\n<answer>2</answer>\n", "well: <think>1</think><answer>2</answer>"
    assert score(["", ""], said(good, bad)) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("3 + 4 = 7", 7, 1.0),
        ("3 + 4 = 7", "8", 0.0),
        ("it costs 1,200 dollars.", "1200", 1.0),
        ("that is -2.50", -2.5, 1.0),
        ("The capital is Paris.", "Paris", 1.0),
        ("Paris is the capital", "Paris", 0.0),
        ("", "7", 0.0),
        ("anything", None, None),
        ("anything", " ", None),
    ],
)
def test_final_answer(response, answer, expected):
    assert final_answer()([""], [response], answer=[answer]) == [expected]


def test_final_answer_names_the_missing_column():
    with pytest.raises(InputError, match="no column 'answer'; columns: solution"):
        final_answer()(["p"], ["r"], solution=["7"], completion_ids=[[1]], trainer_state=None, log_metric=print)


def test_repetition_penalty_by_hand():
    score = repetition_penalty(2)
    # a b a b a: 4 bigrams, 2 of them different
    assert score([""] * 3, ["a b a b a", "a b c d", "a"]) == [-0.5, 0.0, 0.0]


@pytest.mark.parametrize("make", [lambda: length_penalty(-1), lambda: matches("("), lambda: repetition_penalty(0)])
def test_nonsense_is_refused(make):
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize("function", [length_penalty(5), matches("a"), final_answer(), repetition_penalty()])
def test_trls_signature(function):
    assert list(inspect.signature(function).parameters) == ["prompts", "completions", "columns"]
    assert function.__name__ != "score"
