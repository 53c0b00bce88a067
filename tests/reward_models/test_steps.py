"""Labelled steps: every shape that is read, labels counted by hand, text that splits again, tokens that end steps."""

from __future__ import annotations

import logging
import random
from collections import Counter

import pytest
from reference.joining import joining_tokenizer

from reward_models.steps import (
    first_error,
    outcome,
    read_steps,
    solution_text,
    step_ends,
    step_spans,
)
from rlhf import chat
from rlhf.errors import InputError
from rlhf.rows.records import StepLabels, check_disjoint, split_by_prompt

Q = [{"role": "user", "content": "What is 1 + 1 + 1?"}]
OURS = {"prompt": "What is 1 + 1 + 1?", "steps": ["1 + 1 = 2", "2 + 1 = 4"], "labels": [1, -1]}


def labels_of(row: dict) -> list[tuple]:
    return [record.labels for record in read_steps([row])]


# ------------------------------------------------------------------------------------------------ shapes


def test_our_own_rows() -> None:
    row = OURS | {"steps": ["a", "b", "c", "d"], "labels": [1, 0, -1, None], "labeler": "ann"}
    (record,) = read_steps([row])
    assert (record.prompt, record.steps, record.labels) == (Q, ("a", "b", "c", "d"), (1, 0, -1, None))
    assert record.columns == {"labeler": "ann"}
    assert labels_of(OURS | {"labels": [True, False]}) == [(1, -1)]
    assert labels_of(OURS | {"prompt": Q}) == [(1, -1)]
    assert read_steps([record]) == [record]


def test_trls_former_stepwise_rows() -> None:
    row = {"prompt": "Why?", "completions": ["a", "b", "c"], "labels": [True, False, None]}
    (record,) = read_steps([row])
    assert (record.steps, record.labels) == (("a", "b", "c"), (1, -1, None))
    with pytest.raises(InputError, match=r"row 0: labels: got 1; trl's are true or false; for 1, 0 and -1 rename"):
        read_steps([row | {"labels": [1, 0, 1]}])


def alternative(text: str, rating: int | None) -> dict:
    return {"text": text, "rating": rating, "flagged": False}


def step(*completions: dict, chosen: int | None = None, human: str | None = None) -> dict:
    written = human and {"text": human, "rating": None, "source": "human", "flagged": False}
    return {"completions": list(completions) or None, "human_completion": written, "chosen_completion": chosen}


def test_prm800k_keeps_the_path_and_every_alternative() -> None:
    steps = [
        step(alternative("a", 1), chosen=0),
        step(alternative("no", -1), alternative("so so", 0), alternative("b", 1), chosen=2),
        step(alternative("worse", -1), human="written"),
        step(human="by hand alone"),
        step(alternative("wrong", -1), alternative("also wrong", -1), alternative("not rated", None)),
        step(alternative("never reached", 1), chosen=0),
    ]
    row = {"labeler": "x", "question": {"problem": "P"}, "label": {"steps": steps, "finish_reason": "found_error"}}
    records = read_steps([row])
    path = ("a", "b", "written", "by hand alone")
    assert [(r.steps, r.labels) for r in records] == [
        ((*path, "wrong"), (1, 1, None, None, -1)),
        (("a", "no"), (None, -1)),
        (("a", "so so"), (None, 0)),
        (("a", "b", "worse"), (None, None, -1)),
        ((*path, "also wrong"), (None, None, None, None, -1)),
        ((*path, "not rated"), (None, None, None, None, None)),
    ]
    assert [bool(r.columns.get("alternative")) for r in records] == [False] + [True] * 5
    assert all(r.columns["labeler"] == "x" for r in records)


def test_math_shepherd() -> None:
    row = {"input": "Why?  Step 1: a = <<1+1=2>>2 ки\nStep 2: b. The answer is: 3 ки", "task": "GSM8K"}
    (record,) = read_steps([row | {"label": "Why?  Step 1: a = <<1+1=2>>2 +\nStep 2: b. The answer is: 3 -"}])
    assert record.prompt == [{"role": "user", "content": "Why?"}]
    assert record.steps == ("Step 1: a = <<1+1=2>>2", "Step 2: b. The answer is: 3")
    assert (record.labels, record.columns) == ((1, -1), {"task": "GSM8K"})
    for label, seen in [("Why?  Step 1: a = <<1+1=2>>2 +\nStep 2: b. The answer is: 3 ки", "step 2 ends with 'к'"),
                        ("Why?  Step 1: a = <<1+1=2>>2 +\nStep 2: c. The answer is: 3 -", "step 2"),
                        ("", "step 1 ends with ''")]:  # fmt: skip
        with pytest.raises(InputError, match=seen):
            read_steps([row | {"label": label}])
    with pytest.raises(InputError, match=r"'Step 1: \.\.\.' and 'ки' behind each step"):
        read_steps([{"input": "Why? Step 1: a", "label": "Why? Step 1: a"}])


def test_a_right_and_a_wrong_solution_of_one_problem(caplog) -> None:
    row = {"problem": "P", "reference_solution": "a\n\n b\n 2", "student_incorrect_solution": [" x", "y", "z", " 4"]}
    rows = [row | {"incorrect_index": 1}, row | {"incorrect_index": 3}]
    with caplog.at_level(logging.INFO, logger="rlhf"):
        records = read_steps(rows)
    assert [(r.steps, r.labels) for r in records] == [
        (("a", "b", "2"), (1, 1, 1)),
        (("x", "y", "z", "4"), (1, -1, None, None)),
        (("x", "y", "z", "4"), (1, 1, 1, -1)),
    ]
    assert "1 reference solutions stand there more than once" in caplog.text
    for index in (4, -1, None, "1", True):
        with pytest.raises(InputError, match=r"incorrect_index|steps, labels"):
            read_steps([row | {"incorrect_index": index}])
    train, held_out = split_by_prompt(records + read_steps([OURS]), 0.5, 0)
    check_disjoint(train, held_out)
    assert {len(train), len(held_out)} == {3, 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (5, "row 0: got 5; write an object with prompt, steps and labels"),
        ({"prompt": "P", "answer": "x"}, "row 0: steps, labels: missing; the fields are prompt, answer; write prompt"),
        (OURS | {"labels": [1]}, "row 0: labels: got 1 for 2 steps; write one label per step"),
        (OURS | {"labels": [1, 2]}, r"row 0: labels: got 2; use 1 \(right\), 0 \(neutral\), -1 \(wrong\) or null"),
        (OURS | {"labels": [None, None]}, "labels: none in 1 solutions; label some steps"),
        (OURS | {"steps": "one text"}, "row 0: steps: got 'one text'; write a list"),
        (OURS | {"steps": ["a", " "]}, r"row 0: steps\[1\]: got empty text"),
        (OURS | {"prompt": None}, "row 0: prompt: missing; add 'prompt' to the row"),
        ({"question": "P", "label": {"steps": []}}, "row 0: labelled steps in another form"),
        ({"question": {"problem": "P"}, "label": {"steps": [{"completions": [{}]}]}}, "labelled steps in another form"),
        ({"question": {"problem": "P"}, "label": {"steps": []}}, r"label.steps: no step; take the row out"),
    ],
)
def test_a_mistake_is_one_line(row, says) -> None:
    with pytest.raises(InputError, match=says) as error:
        read_steps([row])
    assert "\n" not in str(error.value)


def test_bad_rows_may_be_left_out(caplog) -> None:
    assert len(read_steps([OURS, {"prompt": "P"}, OURS], on_bad_row="drop")) == 2


# -------------------------------------------------------------------------------- published rows, by hand


def test_prm800k_as_published(shared_data) -> None:
    records = read_steps(shared_data / "samples_prm800k.jsonl")
    whole = [record for record in records if not record.columns.get("alternative")]
    assert [record.labels for record in whole] == [
        (1, None, 1, 1, 1, 1),  # five wrong alternatives, then the labeler's own step
        (1, 0, 1, 1, 1, 1, -1),
        (1, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 1, 1, None),
        (1,) * 12,
    ]
    # 9 alternatives in the first row (5 wrong; 0, 1, 1, 1), then 3, 6, 6, 6 and none
    assert len(records) - len(whole) == 9 + 3 + 6 + 6 + 6
    assert Counter(label for record in records for label in record.labels if label is not None) == {1: 55, 0: 3, -1: 15}
    for record in records:
        own = next(r for r in whole if r.prompt == record.prompt)
        if record not in whole:
            assert record.labels[:-1] == (None,) * (len(record.steps) - 1)
            assert record.steps[:-1] == own.steps[: len(record.steps) - 1]


def test_math_shepherd_as_published(shared_data) -> None:
    records = read_steps(shared_data / "samples_math-shepherd.jsonl")
    signs = ["".join("+" if label == 1 else "-" for label in record.labels) for record in records]
    assert signs == ["++++-", "---", "--", "-----", "+----", "--", "---"]
    assert records[0].prompt[0]["content"].endswith("than clarinet lessons in a year?")
    assert records[0].steps[4].startswith("Step 5: She spends 260 * 52")
    assert records[0].steps[4].endswith("The answer is: 13520")


def test_student_steps_as_published(shared_data) -> None:
    records = read_steps(shared_data / "student_steps.jsonl.gz")
    errors = Counter(first_error(record.labels) for record in records if outcome(record) == -1)
    assert errors == {0: 112, 1: 132, 2: 132, 3: 89, 4: 36, 5: 10, 6: 10, 7: 3, 8: 2}
    assert sum(errors.values()) == 526
    assert sum(outcome(record) == 1 for record in records) == 316 == len(records) - 526


# ------------------------------------------------------------------------------------------------ labels


def test_first_errors_and_outcomes_by_hand() -> None:
    for labels, error, whole in [
        ((1, 1), 2, 1), ((1, 0), 2, 1), ((-1, None), 0, -1), ((1, -1, 1), 1, -1), ((None, -1), None, -1),
        ((1, None), None, None), ((1, None, -1), None, -1),
    ]:  # fmt: skip
        record = StepLabels(Q, ("a",) * len(labels), labels)
        assert (first_error(labels), outcome(record)) == (error, whole)
        assert outcome(StepLabels(Q, record.steps, labels, {"alternative": True})) is None


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("separator", ["\n", "\n\n", " ки", "##"])
def test_a_solution_splits_into_its_steps_again(separator) -> None:
    rng = random.Random(0)
    parts = ["a", "b c", " d", "e ", "\n", "\n\n", separator, "ä", "1 + 1 = 2.", "🙂"]
    for _ in range(300):
        steps = ["".join(rng.choices(parts, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 5))]
        steps = [step for step in steps if step.replace(separator, "").strip()]
        if not steps:
            continue
        text = solution_text(steps, separator)
        found = [text[start:end] for start, end in step_spans(text, separator)]
        assert len(found) == len(steps)
        assert solution_text(found, separator) == text
        for own, given in zip(found, steps, strict=True):
            assert "".join(own.split()) == "".join(given.replace(separator, " ").split())


def test_spans_by_hand() -> None:
    assert solution_text(["a\n\nb", " c "], "\n") == "a b\nc"
    assert step_spans("  one \n\n two\n", "\n") == [(2, 5), (9, 12)]
    assert step_spans("", "\n") == step_spans(" \n ", "\n") == []


# ------------------------------------------------------------------------------------------------ tokens


def ends_by_hand(tokenizer, ids: list[int], steps: list[str]) -> list[int]:
    """The token that holds each step's last character, by the bytes of the single tokens."""
    pieces = [raw_bytes(tokenizer, i) for i in ids]
    text, ends, place = b"".join(pieces), [], 0
    for step_text in steps:
        place = text.index(step_text.encode(), place) + len(step_text.encode())
        total = 0
        for number, piece in enumerate(pieces):
            total += len(piece)
            if total >= place:
                ends.append(number)
                break
    return ends


def raw_bytes(tokenizer, token: int) -> bytes:
    """A byte-level token's bytes: its characters are the bytes' names in GPT-2's table."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {chr(b): b for b in visible} | {
        chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in visible)
    }
    piece = tokenizer.convert_ids_to_tokens(token)
    return bytes(names[c] for c in piece) if all(c in names for c in piece) else piece.encode()


@pytest.mark.parametrize("kind", ["usual", "joining"])
def test_the_token_that_holds_a_steps_last_character(kind, tiny_tokenizer) -> None:
    tokenizer = joining_tokenizer() if kind == "joining" else tiny_tokenizer
    chat.prepare_tokenizer(tokenizer)
    for steps in (["one.", "Then two.", "Then three."], ["ends with an emoji 🙂", "ä", "4"], ["one."]):
        text = solution_text(steps, "\n")
        ids = chat.encode_response(tokenizer, text)
        assert step_ends(tokenizer, ids, text, "\n") == ends_by_hand(tokenizer, ids, steps)
    text = "one.\nThen two.\nThen three."
    ids = chat.encode_response(tokenizer, text)
    made = [len(chat.decode_response(tokenizer, ids[: end + 1])) for end in step_ends(tokenizer, ids, text, "\n")]
    beyond = [length > last for length, (_, last) in zip(made, step_spans(text, "\n"), strict=True)]
    assert beyond == [kind == "joining"] * 2 + [False]  # a token that holds a step's end and what follows


def test_thinking_before_the_answer_is_no_step(tiny_tokenizer) -> None:
    chat.prepare_tokenizer(tiny_tokenizer)
    thought, answer = "<think>one\ntwo\nthree</think>\n\n", "four\nfive"
    ids = chat.encode_response(tiny_tokenizer, thought + answer)
    assert step_ends(tiny_tokenizer, ids, answer, "\n") == ends_by_hand(tiny_tokenizer, ids, ["four", "five"])


def test_bytes_that_are_no_character(tiny_tokenizer) -> None:
    """A policy may sample any bytes; a step that they end has its last of them."""
    chat.prepare_tokenizer(tiny_tokenizer)
    byte = {n: tiny_tokenizer.convert_tokens_to_ids(chr(n)) for n in (0xC3, 0xA9)}  # two bytes, together an e acute
    one, two, line = (tiny_tokenizer(text)["input_ids"] for text in ("a", "b", "\n"))
    ids = [*one, byte[0xC3], *line, *two, byte[0xC3], byte[0xA9]]
    text = chat.decode_response(tiny_tokenizer, ids)
    assert text == "a\N{REPLACEMENT CHARACTER}\nbé"
    assert step_ends(tiny_tokenizer, ids, text, "\n") == [1, 5]
    assert step_ends(tiny_tokenizer, ids[:5], chat.decode_response(tiny_tokenizer, ids[:5]), "\n") == [1, 4]
