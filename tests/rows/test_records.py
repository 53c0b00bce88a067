"""rlhf.rows.records: rows in the shapes of common data sets, one-line errors for bad rows, splits by prompt."""

from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from dataclasses import FrozenInstanceError

import pytest

from rlhf.errors import InputError
from rlhf.rows import records
from rlhf.rows.records import (
    Demonstration,
    Prompt,
    Ranking,
    StepLabels,
    check_disjoint,
    prompt_key,
    read_demonstrations,
    read_prompts,
    read_rankings,
    split_by_prompt,
    split_key,
    write_jsonl,
)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


Q = [user("Why is it?")]
PAIR = Ranking(Q, ("Yes.", "No."), (1, 2))
MULTI = [user("one"), bot("two"), user("three")]
HH = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Why is it?", "chosen": "Yes.", "rejected": "No."}, PAIR),
        ({"prompt": Q, "chosen": [bot("Yes.")], "rejected": [bot("No.")]}, PAIR),
        ({"chosen": [*Q, bot("Yes.")], "rejected": [*Q, bot("No.")]}, PAIR),
        # UltraFeedback: the prompt as text, the responses as whole conversations
        ({"prompt": "Why is it?", "chosen": [*Q, bot("Yes.")], "rejected": [*Q, bot("No.")]}, PAIR),
        ({"prompt": Q, "chosen": "Yes.", "rejected": "No."}, PAIR),
        ({"chosen": "Why is it? Yes.", "rejected": "Why is it? No."}, PAIR),
        ({"chosen": "The sky is blue.", "rejected": "The sky is bright."}, Ranking([user("The sky is")], ("blue.", "bright."), (1, 2))),  # noqa: E501
        ({"chosen": HH + " a", "rejected": HH + " b"}, Ranking(MULTI, ("a", "b"), (1, 2))),
        ({"prompt": HH, "chosen": " a", "rejected": " b"}, Ranking(MULTI, ("a", "b"), (1, 2))),
        ({"prompt": HH, "chosen": HH + " a", "rejected": HH + " b"}, Ranking(MULTI, ("a", "b"), (1, 2))),
        ({"chosen": HH + " same", "rejected": HH + " same"}, Ranking(MULTI, ("same", "same"), (1, 1))),
        ({"prompt": "Why is it?", "responses": ["Yes.", "No.", "It is."], "ranks": [1, 2, 1]}, Ranking(Q, ("Yes.", "No.", "It is."), (1, 2, 1))),  # noqa: E501
        ({"prompt": "Why is it?", "responses": None, "chosen": "Yes.", "rejected": "No."}, PAIR),
    ],
)  # fmt: skip
def test_shapes_of_rankings(row, expected):
    assert records._to_ranking({**row, "source": "me"}) == Ranking(
        expected.prompt, expected.responses, expected.ranks, {"source": "me"}
    )


def test_two_turns_of_one_speaker_become_one():
    (ranking,) = read_rankings([{"chosen": HH + " a\n\nAssistant: more", "rejected": HH + " b"}])
    assert ranking.prompt == MULTI
    assert ranking.responses == ("a\n\nmore", "b")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [*MULTI, bot("four")]}, Demonstration([*MULTI, bot("four")], 0)),
        ({"prompt": "Why is it?", "completion": "So."}, Demonstration([*Q, bot("So.")], 1)),
        ({"prompt": MULTI, "completion": [bot("four")]}, Demonstration([*MULTI, bot("four")], 3)),
        ({"prompt": "Why is it?", "chosen": "Yes.", "rejected": "No."}, Demonstration([*Q, bot("Yes.")], 1)),
        ({"prompt": "Why is it?", "responses": ["No.", "Yes."], "ranks": [2, 0.5]}, Demonstration([*Q, bot("Yes.")], 1)),  # noqa: E501
        ({"chosen": HH + " a", "rejected": HH + " b"}, Demonstration([*MULTI, bot("a")], 3)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Why is it?"}]}, bot("So.")]}, Demonstration([*Q, bot("So.")], 0)),  # noqa: E501
    ],
)  # fmt: skip
def test_shapes_of_demonstrations(row, expected):
    (demonstration,) = read_demonstrations([row])
    assert demonstration == expected
    assert [*demonstration.prompt, bot(demonstration.response)] == demonstration.messages


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Why is it?", "answer": 3}, Prompt(Q, {"answer": 3}, text=True)),
        ({"prompt": MULTI}, Prompt(MULTI)),
        ({"prompt": HH}, Prompt(MULTI)),
        ({"prompt": "Why is it?", "chosen": "Yes.", "rejected": "No."}, Prompt(Q, {"chosen": "Yes.", "rejected": "No."}, text=True)),  # noqa: E501
        ({"chosen": HH + " a", "rejected": HH + " b", "id": 7}, Prompt(MULTI, {"chosen": HH + " a", "rejected": HH + " b", "id": 7})),  # noqa: E501
        ({"messages": [*MULTI, bot("four")]}, Prompt(MULTI, {"messages": [*MULTI, bot("four")]})),
        ({"messages": MULTI}, Prompt(MULTI, {"messages": MULTI})),
        (PAIR, Prompt(Q)),
        (Demonstration([*Q, bot("So.")], columns={"a": 1}), Prompt(Q, {"a": 1})),
    ],
)  # fmt: skip
def test_shapes_of_prompts(row, expected):
    assert read_prompts([row]) == [expected]


def test_pairs_drop_ties_and_identical_texts():
    ranking = Ranking(Q, ("a", "b", "c", "a"), (2, 1, 2, 3))
    assert ranking.pairs() == [(1, 0), (1, 2), (1, 3), (2, 3)]
    assert Ranking(Q, ("a", "b"), (1, 1)).pairs() == []


def thought(content, thinking):
    return bot(content) | {"reasoning_content": thinking}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "chosen": [thought("4", "Two and two.")], "rejected": [bot("5")]},
        {"chosen": [*Q, bot("4") | {"thinking": "Two and two."}], "rejected": [*Q, bot("5")]},
        {"prompt": Q, "responses": ["5", [thought("4", "Two and two.")]], "ranks": [2, 1]},
        {"messages": Q, "chosen": thought("4", "Two and two."), "rejected": bot("5")},  # axolotl's
        {"input": {"messages": Q}, "preferred_output": [thought("4", "Two and two.")],
         "non_preferred_output": [bot("5")]},
        {"messages": [*Q, thought("4", "Two and two.")], "rejected_response": "5"},  # ms-swift's
        {"context": Q, "completions": [{"rank": 1, "completion": [bot("5")]},
                                       {"rank": 0, "completion": [thought("4", "Two and two.")]}]},
        {"conversation_a": [*Q, bot("5")], "conversation_b": [*Q, thought("4", "Two and two.")], "winner": "model_b"},
    ],
)  # fmt: skip
def test_thinking_is_not_compared_and_is_imitated(row, tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", [row])
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        (ranking,) = read_rankings(tmp_path / "a.jsonl")
    assert f"{tmp_path}/a.jsonl: 1 of 1 rankings have thinking; answers alone are compared" in caplog.text
    assert sorted(ranking.responses) == ["4", "5"]
    assert sorted(ranking.thinking) == ["", "Two and two."]
    for rows in ([row], [ranking]):
        assert read_demonstrations(rows)[0].messages == [*Q, thought("4", "Two and two.")]
    assert read_prompts([row])[0].messages == Q


def test_thinking_alone_makes_no_pair():
    rows = [{"prompt": Q, "chosen": [thought("4", "Good.")], "rejected": [thought("4", "Bad.")]}]
    assert read_rankings([*rows, PAIR])[0].ranks == (1, 1)
    assert read_demonstrations(rows)[0].messages[-1] == thought("4", "Good.")


CALLING = bot("Let me see.") | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": Q, "chosen": [CALLING], "rejected": [bot("5")]}, "chosen"),
        ({"prompt": Q, "chosen": [bot("5")], "rejected": [CALLING]}, "rejected"),
        ({"prompt": Q, "responses": ["5", [CALLING]], "ranks": [1, 2]}, r"responses\[1\]"),
        ({"messages": Q, "chosen": CALLING, "rejected": bot("5")}, r"responses\[0\]"),
        ({"conversation_a": [*Q, CALLING], "conversation_b": [*Q, bot("5")], "winner": "tie"}, r"responses\[0\]"),
    ],
)
def test_answers_that_call_tools_are_not_compared(row, name):
    for read in (read_rankings, read_demonstrations):
        with pytest.raises(InputError, match=rf"row 0: {name}: it calls tools \(tool_calls\); only one assistant turn"):
            read([row])
    assert read_prompts([row])[0].messages == Q


def test_records_are_frozen():
    with pytest.raises(FrozenInstanceError):
        PAIR.ranks = (2, 1)


BAD_ROWS = [
    (read_rankings, {"promt": "a b", "chosen": "a b c", "rejected": "a b d"}, "prompt: missing, but there is 'promt'"),
    (read_rankings, {"prompt": "q", "choosen": "x", "rejected": "y"}, "chosen: missing, but there is 'choosen'"),
    (read_rankings, {"prompt": "q", "response": ["x", "y"]}, "responses: missing, but there is 'response'"),
    (read_rankings, {"prompt": "q", "chosen": "x"}, "rejected: missing; the fields are prompt, chosen; add"),
    (read_rankings, {"prompt": "q", "chosen": "x", "rejected": None}, "rejected: got null"),
    (read_rankings, {"prompt": " ", "chosen": "x", "rejected": "y"}, "prompt: got empty text ' '"),
    (read_rankings, {"prompt": "q", "chosen": "", "rejected": "y"}, "chosen: got empty text"),
    (read_rankings, {"prompt": "q", "chosen": 3, "rejected": "y"}, "rejected: got 'y'; write it as chosen is"),
    (read_rankings, {"prompt": "q", "chosen": 3, "rejected": 4}, "chosen: got 3; write a list of messages"),
    (read_rankings, {"prompt": {"a": 1}, "chosen": "x", "rejected": "y"}, "prompt: got {'a': 1}"),
    (read_rankings, {"chosen": "x", "rejected": "y"}, "prompt: there is none and chosen and rejected begin diff"),
    (read_rankings, {"chosen": "same text", "rejected": "same text"}, "prompt: there is none"),
    (read_rankings, {"chosen": [user("a"), bot("b")], "rejected": [user("c"), bot("d")]}, "chosen: 2 turns after"),
    (read_rankings, {"chosen": HH + " a", "rejected": "plain"}, "rejected: got 'plain'; begin it with"),
    (read_rankings, {"chosen": HH + " a\n\nHuman: b", "rejected": HH + " c"}, "chosen: the last turn is Human's"),
    (read_rankings, {"prompt": "q", "responses": ["x"], "ranks": [1]}, "responses: got 1; a ranking compares"),
    (read_rankings, {"prompt": "q", "responses": ["x", "y"], "ranks": [1]}, "ranks: got 1 ranks for 2 responses"),
    (read_rankings, {"prompt": "q", "responses": ["x", "y"], "ranks": [1, "2"]}, "ranks: got '2'"),
    (read_rankings, {"prompt": "q", "responses": ["x", "y"], "ranks": [1, float("nan")]}, "ranks: got nan"),
    (read_rankings, {"prompt": "q", "responses": ["x", "y"], "ranks": [1, 10**400]}, "ranks: got 1000"),
    (read_rankings, {"prompt": "q", "responses": ["x", "y"], "ranks": [1, True]}, "ranks: got True"),
    (read_rankings, {"prompt": "q", "responses": ["x", " "], "ranks": [1, 2]}, "responses[1]: got empty text ' '"),
    (read_rankings, {"prompt": "q", "responses": "xy", "ranks": [1, 2]}, "responses: got 'xy'; write a list"),
    (read_rankings, ["q", "x"], "got ['q', 'x']; write an object with prompt, chosen"),
    (read_demonstrations, {"prompt": "q", "completions": "x"}, "completion: missing, but there is 'completions'"),
    (read_demonstrations, {"message": [user("q")]}, "messages: missing, but there is 'message'"),
    (read_demonstrations, {"messages": []}, "messages: got []"),
    (read_demonstrations, {"messages": [user("q")]}, "messages: the last turn is 'user'"),
    (read_demonstrations, {"messages": [user("q"), {"role": "asistant", "content": "x"}]}, "messages[1].role: got 'asistant'; did you mean 'assistant'?"),  # noqa: E501
    (read_demonstrations, {"messages": [user("q"), {"from": "gpt", "value": "x"}]}, "messages[1]: got {'from'"),
    (read_demonstrations, {"messages": [user("q"), {"role": "assistant", "content": None}]}, "messages[1].content: got None; write text"),  # noqa: E501
    (read_demonstrations, {"prompt": [user("q"), bot("a")], "completion": "x"}, "prompt: the last turn is 'assistant'"),
    (read_prompts, {"promptt": "q"}, "prompt: missing, but there is 'promptt'"),
    (read_prompts, {}, "prompt: missing; the fields are (none)"),
    (read_prompts, {"prompt": "half \ud83d"}, "prompt: half a character at 5"),
    (read_prompts, "just text", "got 'just text'; write an object with prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("read", "row", "message"), BAD_ROWS)
def test_bad_rows_say_file_line_and_field(tmp_path, read, row, message):
    file = tmp_path / "rows.jsonl"
    good = {"prompt": "q", "chosen": "x", "rejected": "y", "completion": "x"}
    file.write_text(json.dumps(good) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError) as caught:
        read(file)
    text = str(caught.value)
    assert text.startswith(f"{file}:3: {message}")
    assert "\n" not in text
    assert "; " in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", ": the file is empty; "),
        ("a.jsonl", b"\n  \n", ": the file is empty; "),
        ("a.json", b"[]", ": no rows; "),
        ("a.jsonl", b'{"prompt": "q"}\n{"prompt": "q"\n', ":2: broken JSON at column "),
        ("a.jsonl", b'[\n{"prompt": "q"}\n]\n', ":1: broken JSON"),
        ("a.json", b'[\n{"prompt": "q"}\n{"prompt": "r"}]\n', ":3: broken JSON"),
        ("a.jsonl", b'{"prompt": "q"}\n{"prompt": "caf\xe9"}\n', ":2: byte 15 isn't UTF-8"),
        ("a.json", b'[{"prompt": "q"},\n{"prompt": "caf\xe9"}]\n', ":2: byte "),
        ("a.jsonl.gz", b'{"prompt": "q"}\n', ": not a gzip file; "),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "q"}\n' * 50, mtime=0)[:-9], ": a damaged gzip file"),
        ("a.jsonl.gz", b"\x1f\x8b" + b"nonsense" * 9, ": a damaged gzip file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_prompts(file)
    assert str(caught.value).startswith(f"{file}{message}")
    assert "\n" not in str(caught.value)


def test_missing_sources(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "q"}')
    for source, message in [
        (tmp_path / "trian.jsonl", f"no such file or folder; did you mean {tmp_path / 'train.jsonl'}"),
        ("nowhere/at/all.jsonl", "no such file or folder; check the path"),
        ("someone/dataset", "neither a file nor a data set that can be loaded"),
        ("", "data: got ''; name a file"),
        (3, "data: got 3; hand in a path"),
        ([], "the list: no rows"),
    ]:
        with pytest.raises(InputError) as caught:
            read_prompts(source)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nothing_to_learn_from_a_source_of_ties():
    rows = [
        {"prompt": "q", "chosen": "x", "rejected": "x"},
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]},
    ]
    with pytest.raises(InputError, match="all 2 rows are ties or identical texts"):
        read_rankings(rows)
    assert len(read_rankings([*rows, {"prompt": "q", "chosen": "x", "rejected": "y"}])) == 3


def test_files_folders_and_datasets_hold_the_same(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": f"q{n}", "chosen": "x", "rejected": "y", "n": n} for n in range(5)]
    expected = read_rankings(rows)
    assert [r.columns["n"] for r in expected] == [0, 1, 2, 3, 4]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + text.replace("\n", "\r\n"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "part1.jsonl").write_text("".join(text.splitlines(True)[:2]))
    (folder / "part2.jsonl").write_text("".join(text.splitlines(True)[2:]))
    data = Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved")
    both = DatasetDict(train=data, test=data.select([0]))
    both.save_to_disk(tmp_path / "both")
    for source in ("a.jsonl", "a.jsonl.gz", "a.json", "folder", "saved", "both"):
        assert read_rankings(tmp_path / source) == read_rankings(str(tmp_path / source)) == expected, source
    assert read_rankings(data) == read_rankings(both) == read_rankings(expected) == expected
    assert read_rankings(tmp_path / "both", split="test") == expected[:1]
    with pytest.raises(InputError, match="split: no 'dev' among train, test"):
        read_rankings(both, split="dev")


def test_a_folder_of_splits(tmp_path):
    (tmp_path / "train-0.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "train-1.jsonl").write_text('{"prompt": "b"}')
    (tmp_path / "test.jsonl").write_text('{"prompt": "c"}')
    assert [p.messages[0]["content"] for p in read_prompts(tmp_path)] == ["a", "b"]
    assert [p.messages[0]["content"] for p in read_prompts(tmp_path, "test")] == ["c"]
    with pytest.raises(InputError, match="no file for split 'dev'"):
        read_prompts(tmp_path, "dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.jsonl"):
        read_prompts(tmp_path / "empty")


@pytest.mark.parametrize("name", ["rows.jsonl", "deep/rows.jsonl.gz"])
def test_what_is_written_is_read_again(tmp_path, name):
    demonstrations = [Demonstration([*MULTI, bot("é")], 0, {"a": 1}), Demonstration([*MULTI, bot("x")], 3)]
    prompts = [Prompt(Q, {"n": 1}, text=True), Prompt(MULTI)]
    rankings = [
        PAIR,
        Ranking(MULTI, ("a", "b", "c"), (1, 1, 2.5), {"n": 2}),
        Ranking(Q, ("a", "b"), (1, 2), {}, ("", "t")),
    ]
    for read, rows in (
        (read_demonstrations, demonstrations),
        (read_prompts, prompts),
        (read_rankings, rankings),
    ):
        write_jsonl(tmp_path / name, rows)
        first = (tmp_path / name).read_bytes()
        assert read(tmp_path / name) == rows
        write_jsonl(tmp_path / name, rows)
        assert (tmp_path / name).read_bytes() == first
        if name.endswith(".gz"):
            assert first[3:8] == bytes(5)  # no file name and no time in the header


def test_a_failed_write_leaves_nothing_half_written(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, [{"prompt": "q"}])
    with pytest.raises(TypeError):
        write_jsonl(file, [{"prompt": "r"}, {"prompt": object()}])
    assert file.read_text() == '{"prompt": "q"}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_split_is_by_prompt_and_by_nothing_else():
    rows = [Ranking([user(f"prompt {n % 40}")], ("a", str(n)), (1, 2)) for n in range(200)]
    rest, held = split_by_prompt(rows, 0.25, seed=0)
    assert len(held) == 10 * 5
    assert len(rest) == 30 * 5
    check_disjoint(rest, held)
    assert split_by_prompt(rows, 0.25, seed=0) == (rest, held)
    mirrored = split_by_prompt(rows[::-1], 0.25, seed=0)
    assert (mirrored[0][::-1], mirrored[1][::-1]) == (rest, held)
    assert split_by_prompt(rows, 0.25, seed=1) != (rest, held)
    assert split_by_prompt(rows, 0.0, seed=0) == (rows, [])
    assert {len(part) for part in split_by_prompt(rows, 0.001, seed=0)} == {195, 5}
    assert Counter(r.responses[1] for r in rest + held) == Counter(r.responses[1] for r in rows)
    for fraction in (-0.1, 1.0):
        with pytest.raises(InputError, match="eval fraction"):
            split_by_prompt(rows, fraction, seed=0)
    with pytest.raises(InputError, match="needs at least 2"):
        split_by_prompt(rows[:1], 0.5, seed=0)


def test_a_prompt_in_both_splits():
    train = [Prompt(Q), Prompt(MULTI)]
    held = [Demonstration([user("Why  is it?\n"), bot("So.")]), Demonstration([user("Who?"), bot("I.")])]
    with pytest.raises(InputError, match=r"pairs, eval: prompt: 1 in both, the first is 'Why  is it\?\\n'; split by"):
        check_disjoint(train, held, ("pairs", "eval"))
    check_disjoint(train, held[1:])
    assert prompt_key(Q) != prompt_key([{"role": "system", "content": "Why is it?"}, *Q])


def test_rows_of_one_prompt_are_divided_by_their_group():
    rows = [Ranking(Q, (f"Yes {n}.", "No."), (1, 2), {"split_group": n // 2}) for n in range(20)]
    rest, held_out = split_by_prompt(rows, 0.3, 0)
    groups = [{row.columns["split_group"] for row in part} for part in (rest, held_out)]
    assert [len(part) for part in (rest, held_out)] == [14, 6]
    assert not groups[0] & groups[1]
    check_disjoint(rest, held_out)
    with pytest.raises(InputError, match="1 in both"):
        check_disjoint(rest, [*held_out, rest[0]])
    assert split_key(rows[0]) != split_key(PAIR) == prompt_key(Q)
    assert split_key(Ranking(Q, ("a", "b"), (1, 2), {"split_group": 0})) == split_key(rows[0])
    assert split_key(Ranking(Q, ("a", "b"), (1, 2), {"split_group": None})) == prompt_key(Q)


def test_step_labels():
    assert StepLabels(Q, ("a", "b"), (1, -1)).labels == (1, -1)
    assert StepLabels(Q, ("a", "b"), (0, None)).labels == (0, None)  # neutral, unknown
    for steps, labels, message in [(("a",), (1, 0), "got 2 for 1 steps"), (("a",), (2,), "got 2; use 1"),
                                   (("",), (1,), r"steps\[0\]: got empty")]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            StepLabels(Q, steps, labels)


def test_hh_as_published(shared_data, caplog):
    file = shared_data / "hh_harmless.jsonl.gz"
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        rankings = read_rankings(file)
        assert len(read_prompts(file)) == len(read_demonstrations(file)) == len(rankings)
    # 1,800 rows, of which four (counted by hand) have an empty reply: named once, and left out
    assert len(rankings) == 1796
    assert [r.getMessage() for r in caplog.records] in (
        [f"{file}: left out 4 of 1800 rows for an empty reply: 87, 517, 926, 1104"],
        [],  # told before in this process
    )
    assert rankings[0].prompt[-1] == user("okay some of these do not have anything to do with pens")
    assert rankings[0].responses[0].startswith("No, sorry!  All of these")
    assert rankings[0].ranks == (1, 2)
    for ranking in rankings:
        roles = [m["role"] for m in ranking.prompt]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
    longer = [len(a) > len(b) for a, b in (r.responses for r in rankings)]
    assert sum(longer) / len(longer) == pytest.approx(0.44, abs=0.01)
    rest, held = split_by_prompt(rankings, 0.1, seed=0)
    check_disjoint(rest, held)


def test_qa_feedback_ranked_by_its_six_comparisons(shared_data):
    rows = []
    with gzip.open(shared_data / "qa_feedback.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            wins = [0] * 4
            for (a, b), choice in zip([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], row["preference"], strict=True):
                if choice:
                    wins[a if choice == 1 else b] += 1
                    wins[b if choice == 1 else a] -= 1
            responses = [row[f"prediction {n}"].strip() for n in (1, 2, 3, 4)]
            rows.append({"prompt": row["question"], "responses": responses, "ranks": [-w for w in wins], "gold": 1})
    rankings = read_rankings(rows)
    assert len(rankings) == 400
    assert all(len(r.responses) == 4 for r in rankings)
    assert sum(len(r.pairs()) for r in rankings) > 800
