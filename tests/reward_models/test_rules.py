"""Rules against answers by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from reward_models.rules import ExactAnswer, Forbidden, Format, Found, JsonSchema, Length, Rules
from rlhf.errors import InputError

ALL = [Format("a"), Found("a"), Length(1, 2, 3), Forbidden(["a"]), ExactAnswer(), JsonSchema({"type": "object"})]


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def of(rule, *texts, **columns):
    prompts = ["?"] * len(texts)
    scores = rule(prompts, list(texts), **columns)
    assert rule(prompts=prompts, completions=said(*texts), trainer_state=None, **columns) == scores
    return scores


def test_format_is_the_whole_response():
    rule = Format(r"<think>.*</think>\s*<answer>\d+</answer>")
    good = "<think>\n1 + 1\n</think>\n<answer>2</answer>"
    assert of(rule, good, f" {good}\n", f"{good} so", "<answer>2</answer>") == [1.0, 1.0, 0.0, 0.0]


def test_found_is_anywhere():
    assert of(Found(r"\bplease\b"), "do it, please.", "pleased", "Please") == [1.0, 0.0, 0.0]


def test_length_falls_off_smoothly():
    rule = Length(4, 6, fall_off=4)
    words = [" ".join(["w"] * n) for n in (0, 2, 3, 4, 6, 7, 8, 9, 10, 50)]
    quarter = (1 + math.sqrt(0.5)) / 2  # one word of four outside: (1 + cos 45 degrees) / 2
    assert of(rule, *words) == pytest.approx([0, 0.5, quarter, 1, 1, quarter, 0.5, 1 - quarter, 0, 0])


def test_length_in_characters_leaves_outer_space_out():
    assert of(Length(2, 3, 2, unit="characters"), " ab \n", "äöü", "abcd", "abcde") == [1.0, 1.0, 0.5, 0.0]


def test_forbidden_sees_through_disguises():
    rule = Forbidden([r"as an AI\b", "idiot"])
    texts = ["fine", "As an ai, I", "you IDIOT", "ｉｄｉｏｔ", "id\u200biot", "as an aim"]
    assert of(rule, *texts) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("text", ["…", "™", "№", "²", "½", "ﬁ", "e\u0301", "👨\u200d👩\u200d👧"])
def test_forbidden_finds_what_a_plainer_text_lacks(text):
    assert of(Forbidden([text]), f"so {text} it is", "so it is") == [0.0, 1.0]


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("Paris", "paris", 1.0),
        (" PARIS. ", "Paris", 1.0),
        ("Paris, France", "Paris", 0.0),
        ("the  Hague", "The Hague", 1.0),
        ("1,200", 1200, 1.0),
        ("1200.0", "1200", 1.0),
        ("$5", 5, 1.0),
        ("-5", 5, 0.0),
        ("\u22125", -5, 1.0),
        (".5", 0.5, 1.0),
        (".5", 5, 0.0),
        ("1,2", 12, 0.0),
        ("", "7", 0.0),
        ("two", ["2", "two"], 1.0),
        ("three", ["2", "two"], 0.0),
        ("anything", None, None),
        ("anything", [], None),
        ("anything", " ", None),
        ("0", 0, 1.0),
    ],
)
def test_exact_answer(response, answer, expected):
    assert of(ExactAnswer(), response, answer=[answer]) == [expected]


def test_exact_answer_inside():
    rule = ExactAnswer("solution", inside=r"<answer>(.*?)</answer>")
    texts = ["<answer>1</answer> no: <answer>7</answer>", "<answer>7</answer> no: <answer>1</answer>", "7"]
    assert of(rule, *texts, solution=[7, 7, 7]) == [1.0, 0.0, 0.0]


def test_exact_answer_names_the_missing_column():
    with pytest.raises(InputError, match="ExactAnswer: the prompts have no column 'answer'; columns: solution"):
        ExactAnswer()(["p"], ["r"], solution=["7"], trainer_state=None, log_metric=None, completion_ids=[[1]])


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def test_json_schema():
    texts = ['{"n": 1}', ' {"n": 1}\n', '{"n": 1.5}', "{}", '{"n": 1, "m": 2}', '{"n": 1} ok', "{n: 1}", ""]
    assert of(JsonSchema(SCHEMA), *texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert of(JsonSchema({}), "NaN", "[" * 100_000, "9" * 5000, "3") == [0.0, 0.0, 0.0, 1.0]


def test_json_schema_is_never_fetched():
    rule = JsonSchema({"properties": {"n": {"$ref": "http://127.0.0.1:9/schema.json"}}})
    with pytest.raises(InputError, match=r"\$ref 'http://127.0.0.1:9/schema.json' leads outside"):
        rule(["?"], ['{"n": 1}'])
    inside = JsonSchema({"$defs": {"whole": {"type": "integer"}}, "items": {"$ref": "#/$defs/whole"}})
    assert of(inside, "[1, 2]", "[1.5]") == [1.0, 0.0]


def test_rules_are_a_weighted_sum_with_parts_logged():
    rules = Rules({"clean": (2.0, Forbidden(["bad"])), "answer": (-0.5, ExactAnswer()), "last": (1, Found(r"\.$"))})
    metrics, extra = [], {}
    scores = rules(
        ["?"] * 3, said("bad", "7.", "8"), answer=[7, 7, None],
        log_metric=lambda name, value: metrics.append((name, value)), log_extra=extra.__setitem__,
    )  # fmt: skip
    assert scores == [0.0 - 0.0 + 0, 2.0 - 0.5 + 1, 2.0]
    assert extra == {"score/clean": [0.0, 1.0, 1.0], "score/answer": [0.0, 1.0, None], "score/last": [0.0, 1.0, 0.0]}
    answers = [value for name, value in metrics if name == "score/answer"]
    assert answers == [0.0, 1.0]  # what does not apply is in no mean


def test_rules_of_which_none_applies():
    assert Rules({"answer": (1.0, ExactAnswer())})(["?"], ["7"], answer=[None]) == [None]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Format("("), lambda: Found(None), lambda: Forbidden("bad"), lambda: Forbidden([]),
        lambda: Forbidden(["("]), lambda: Length(3, 2, 1), lambda: Length(-1, 2, 1), lambda: Length(1, 2, 0),
        lambda: Length(1, 2, 1, unit="tokens"), lambda: ExactAnswer(inside="no group"), lambda: JsonSchema("{}"),
        lambda: JsonSchema({"type": "thing"}), lambda: Rules({}), lambda: Rules({"a": Found("a")}),
        lambda: Rules({"a": (float("nan"), Found("a"))}), lambda: Rules({"a": (1.0, Found)}),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_one_line(make):
    with pytest.raises(InputError) as told:
        make()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: type(rule).__name__)
def test_rules_are_frozen(rule):
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.anything = 1


def test_a_part_of_the_wrong_length():
    with pytest.raises(InputError, match="short returned 1 scores for 2 responses"):
        Rules({"short": (1.0, lambda prompts, completions, **c: [1.0])})(["?"] * 2, ["a", "b"])
