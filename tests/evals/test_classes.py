"""Verdicts of the classes against slow versions written from their definitions, on 500 made items each."""

from __future__ import annotations

import json
import random
import string

import pytest

from rlhf.errors import InputError
from rlhf.evals.classes import Excludes, FuzzyMatch, Includes, JsonMatch, Match, f1_score
from rlhf.evals.modelgraded import INVALID, MATCHES, ModelBasedClassify, Spec, named_choice

ITEMS = 500
WORDS = [
    "the",
    "a",
    "an",
    "cat",
    "Cat",
    "cats",
    "The",
    "dog.",
    "42",
    "4",
    "",
    " ",
    "and",
    "then",
    "é",
    "A",
    "no!",
    "x,y",
]


def texts(rng: random.Random, most: int) -> str:
    return rng.choice(["", " "]).join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))


def made(seed: int) -> list[tuple[str, list[str]]]:
    """Answers and right answers that often share beginnings, parts or words."""
    rng, rows = random.Random(seed), []
    for _ in range(ITEMS):
        answer = texts(rng, 8)
        ideal = [texts(rng, 3) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.5 and answer:
            start = rng.randrange(len(answer))
            ideal[0] = answer[start : start + rng.randint(1, 6)]
            ideal[0] = ideal[0].swapcase() if rng.random() < 0.3 else ideal[0]
        if rng.random() < 0.3:
            answer = ideal[-1] + answer
        rows.append((answer, ideal))
    return rows


def both(outcomes: list[bool]) -> None:
    assert 20 < sum(outcomes) < len(outcomes) - 20, "the items do not tell right from wrong"


def begins(text: str, start: str) -> bool:
    return len(start) <= len(text) and all(text[i] == start[i] for i in range(len(start)))


def holds(text: str, part: str) -> bool:
    return any(begins(text[i:], part) for i in range(len(text) + 1))


def test_match():
    outcomes = []
    for answer, ideal in made(1):
        slow = any(begins(answer, one) for one in ideal)
        verdict = Match().verdict(answer, ideal)
        assert verdict.numbers == {"accuracy": float(slow)}, (answer, ideal)
        assert (verdict.picked is not None) == slow
        outcomes.append(slow)
    both(outcomes)


@pytest.mark.parametrize("ignore_case", [False, True])
def test_includes(ignore_case):
    outcomes = []
    for answer, ideal in made(2):
        pairs = [(answer.lower(), one.lower()) if ignore_case else (answer, one) for one in ideal]
        slow = any(holds(text, part) for text, part in pairs)
        assert Includes(ignore_case).verdict(answer, ideal).numbers == {"accuracy": float(slow)}, (answer, ideal)
        outcomes.append(slow)
    both(outcomes)


def slow_words(text: str) -> list[str]:
    """Normalise character by character: an article is a run of word characters that is one of three."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    words, run = [], ""
    for c in kept + " ":
        if c.isalnum() or c == "_":
            run += c
            continue
        words.append(" " if run in ("a", "an", "the") else run)
        words.append(c)
        run = ""
    return "".join(words).split()


def slow_f1(answer: str, ideal: list[str]) -> float:
    best = 0.0
    for one in ideal:
        said, right = slow_words(answer), slow_words(one)
        left, shared = list(right), 0
        for word in said:
            if word in left:
                left.remove(word)
                shared += 1
        if shared:
            precision, recall = shared / len(said), shared / len(right)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def test_fuzzy_match():
    outcomes = []
    for answer, ideal in made(3):
        said, slow = " ".join(slow_words(answer)), False
        for one in ideal:
            right = " ".join(slow_words(one))
            slow |= said == right if not said or not right else holds(said, right) or holds(right, said)
        numbers = FuzzyMatch().verdict(answer, ideal).numbers
        assert numbers["accuracy"] == float(slow), (answer, ideal)
        assert abs(numbers["f1_score"] - slow_f1(answer, ideal)) < 1e-12
        outcomes.append(slow)
    both(outcomes)


def test_f1_by_hand():
    """2 of 3 words of the answer are among the 4 of the right one: P 2/3, R 1/2, F1 4/7."""
    assert abs(f1_score("The red cat sat", ["cat sat on mats"]) - 4 / 7) < 1e-12


def value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.random()
    if depth < 3 and kind < 0.3:
        return {rng.choice("abc"): value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    if depth < 3 and kind < 0.5:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return rng.choice([None, True, False, 0, 1, 1.0, 2, "a", "b", ""])


def changed(rng: random.Random, one: object) -> object:
    if isinstance(one, dict) and one:
        key = rng.choice(sorted(one))
        return (
            {**one, key: changed(rng, one[key])} if rng.random() < 0.7 else {k: v for k, v in one.items() if k != key}
        )
    if isinstance(one, list) and one:
        place = rng.randrange(len(one))
        return [*one[:place], changed(rng, one[place]), *one[place + 1 :]] if rng.random() < 0.7 else one[:place]
    return value(rng, 3)


def slow_json(said: object, right: object) -> bool:
    """Flatten both into paths and leaves, and compare them: null is no leaf that could agree."""

    def leaves(one: object, path: tuple = ()) -> list[tuple]:
        if isinstance(one, dict):
            return [(path, "object"), *(row for k, v in one.items() for row in leaves(v, (*path, k)))]
        if isinstance(one, list):
            return [(path, f"list {len(one)}"), *(row for n, v in enumerate(one) for row in leaves(v, (*path, n)))]
        return [(path, ("leaf", one))]

    a, b = leaves(said), leaves(right)
    if any(row[1] == ("leaf", None) for row in a + b):
        return False
    return len(a) == len(b) and all(any(p == q and x == y for q, y in b) for p, x in a)


def test_json_match():
    rng, outcomes = random.Random(4), []
    for _ in range(ITEMS):
        right = [value(rng) for _ in range(rng.randint(1, 2))]
        said = rng.choice(right) if rng.random() < 0.6 else changed(rng, rng.choice(right))
        answer = json.dumps(said, indent=rng.choice([None, 2]))
        if rng.random() < 0.1:
            answer = rng.choice(["", "{", answer + "}", "yes", "```json\n1\n```", "[" * 5000])
        try:
            parsed = json.loads(answer)
        except (ValueError, RecursionError):
            slow = False
        else:
            slow = any(slow_json(parsed, one) for one in right)
        assert JsonMatch().verdict(answer, [json.dumps(one) for one in right]).numbers["accuracy"] == slow, answer
        outcomes.append(slow)
    both(outcomes)


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ('{"a": 1}', '{"a": 1.0}', True),
        ('{"a": null}', '{"a": null}', False),
        ('{"a": null}', "{}", False),
        ("[1, 2]", "[1, 2, 3]", False),
        ("1", "true", True),
        ('"1"', "1", False),
        ("1" + "0" * 5000, "1", False),
    ],
)
def test_json_match_by_hand(said, right, expected):
    assert JsonMatch().verdict(said, [right]).numbers["accuracy"] == expected


def test_excludes():
    forbidden = ["555-0134", "{email}"]
    for answer, leaked in (
        ("Call 555 0134.", "555-0134"),
        ("It is 5550134", "555-0134"),
        ("Write to a.b@example.org!", "{email}"),
        ("I keep that private.", None),
        ("Call 555-0135.", None),
        ("", None),
    ):
        verdict = Excludes().verdict(answer, forbidden)
        assert (verdict.picked, verdict.numbers["accuracy"]) == (leaked, float(leaked is None)), answer
    for answer, number in (("(555) 010-0199", True), ("+1 555 010 0199", True), ("in 2024", False), ("12:30", False)):
        assert (Excludes().verdict(answer, ["{phone}"]).picked is not None) == number, answer


def test_right_answers_that_a_class_cannot_use_are_refused():
    for kind, ideal in ((Match(), [""]), (Includes(), ["a", ""]), (JsonMatch(), ["{a: 1}"]), (Excludes(), ["ab"])):
        with pytest.raises(InputError, match="here: "):
            kind.check(ideal, "here")
    FuzzyMatch().check([""], "here")


# ---------------------------------------------------------------- ModelBasedClassify

CHOICES = ("Yes", "No", "Not sure", "Y")


def slow_choice(reply: str, eval_type: str, match: str) -> str:
    lines = reply.strip().split("\n")
    order = range(len(lines) - 1, -1, -1) if eval_type.startswith("cot") else range(len(lines))
    for n in order:
        bare = "".join(c for c in lines[n].strip() if c not in string.punctuation)
        for choice in CHOICES if bare else ():
            here = {
                "include": holds(bare, choice),
                "exact": bare == choice,
                "endswith": bare[max(0, len(bare) - len(choice)) :] == choice,
            }
            here["starts_or_endswith"] = here["endswith"] or begins(bare, choice)
            if here[match]:
                return choice
    return INVALID


@pytest.mark.parametrize("match", sorted(MATCHES))
def test_choice_parser(match):
    rng, seen = random.Random(5), set()
    pieces = [
        "Yes",
        "No",
        "Not sure",
        "yes",
        "Y",
        ".",
        "(Yes)",
        "The answer is No.",
        "because",
        "!",
        "",
        "  No  ",
        "Yes No",
    ]
    for _ in range(ITEMS):
        lines = [rng.choice(pieces) + rng.choice(["", ".", " " + rng.choice(pieces)]) for _ in range(rng.randint(1, 4))]
        reply, kind = "\n".join(lines), rng.choice(["classify", "classify_cot", "cot_classify"])
        slow = slow_choice(reply, kind, match)
        assert named_choice(reply, kind, match, CHOICES) == slow, (reply, kind)
        seen.add(slow)
    assert {"Yes", "No", INVALID} <= seen


def test_verdict_of_a_choice():
    """Numbers by hand: a choice's score, the lowest one for a reply without a choice, shares, metascore."""
    from rlhf.evals.samples import Sample

    spec = Spec([{"role": "user", "content": "{completion}"}], ("A", "B"), {"input": "completion"}, "cot_classify",
                {"A": 1.0, "B": -0.5})  # fmt: skip
    sample = Sample([], (), {"choice": "B"})
    numbers = ModelBasedClassify(spec).verdict(sample, "A").numbers
    assert numbers == {"score": 1.0, "choice_A": 1.0, "choice_B": 0.0, "invalid": 0.0}
    numbers = ModelBasedClassify(spec, metaeval=True).verdict(sample, INVALID).numbers
    assert numbers == {"metascore": 0.0, "score": -0.5, "choice_A": 0.0, "choice_B": 0.0, "invalid": 1.0}
    assert ModelBasedClassify(spec, metaeval=True).verdict(sample, "B").numbers["metascore"] == 1.0
