"""Rows of labelled texts: every shape, unknown labels, what is no label, what is refused."""

from __future__ import annotations

import gzip
import json

import pytest

from reward_models.labelled_texts import LabelledText, apart_from, categories_of, read_labelled
from rlhf.errors import InputError


def test_flat_and_nested_rows_say_the_same():
    flat = read_labelled(
        [{"prompt": "a", "S": 1, "H": 0}, {"prompt": "b", "S": 0, "H": None}, {"prompt": "c", "H": True}]
    )
    nested = read_labelled([
        {"text": "a", "labels": {"S": True, "H": 0.0}}, {"text": "b", "labels": {"S": 0, "H": None}},
        {"text": "c", "labels": {"H": 1}},
    ])  # fmt: skip
    assert flat == nested
    assert [dict(record.labels) for record in flat] == [{"S": True, "H": False}, {"S": False}, {"H": True}]
    assert categories_of(flat) == ["S", "H"]
    assert [record.text for record in flat] == ["a", "b", "c"]


def test_columns_that_are_no_labels_stay_columns():
    rows = [
        {"text": "a", "bad": 1, "weight": 1, "source": "web", "year": 2024, "labeler": "ann"},
        {"text": "b", "bad": 0, "weight": 0, "source": "book", "year": 1, "labeler": "bob"},
    ]
    records = read_labelled(rows)
    assert categories_of(records) == ["bad"]
    assert records[0].columns == {"weight": 1, "source": "web", "year": 2024, "labeler": "ann"}


def test_a_column_of_labels_with_a_mistake_is_named(caplog):
    rows = [{"text": f"text {n}", "bad": n % 2, "rude": "yes" if n == 7 else n % 2, "id": n} for n in range(40)]
    assert categories_of(read_labelled(rows)) == ["bad"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "column rude is no category: 'yes' stands in it beside 39 labels" in line


def test_conversations_and_answers():
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away"}]
    records = read_labelled([
        {"messages": talk, "rude": 1}, {"prompt": "Hi", "response": "Go away", "rude": 1},
        {"prompt": talk[:1], "completion": talk[1:], "rude": 1}, {"response": "Go away", "rude": 1},
    ])  # fmt: skip
    assert [record.text for record in records] == ["user: Hi\n\nassistant: Go away"] * 3 + ["assistant: Go away"]


def test_named_categories_may_have_no_label():
    assert read_labelled([{"text": "a", "x": 1}], categories=["S"])[0].labels == {}
    with pytest.raises(InputError, match=r"row 0: S: got 'yes'.*; write 1 or true"):
        read_labelled([{"text": "a", "S": "yes"}], categories=["S"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "x": 3}], "labels: no column of 0 and 1 among x"),
        ([{"text": "", "S": 1}], r"row 0: text: got empty text"),
        ([{"words": "a", "S": 1}], r"row 0: text: missing; the fields are words, S"),
        ([{"text": "a", "labels": {"S": 2}}], r"row 0: S: got 2"),
        ([{"text": "a", "S": 1}, "b"], r"row 1: got .*b"),
    ],
)
def test_mistakes_name_their_row(rows, message):
    with pytest.raises(InputError, match=message):
        read_labelled(rows)


def test_a_file_and_bad_rows_that_are_dropped(tmp_path, caplog):
    rows = [{"prompt": "a", "S": 1}, {"prompt": "", "S": 0}, {"prompt": "c", "S": 0}]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert len(read_labelled(str(tmp_path / "rows.jsonl.gz"), on_bad_row="drop")) == 2
    assert "1 of 3 rows can't be used" in caplog.text


def test_several_sources(tmp_path):
    for name, row in (("one", {"prompt": "a", "S": 1}), ("two", {"text": "b", "labels": {"H": 0}})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    both = [str(tmp_path / "one.jsonl"), {"path": str(tmp_path / "two.jsonl"), "weight": 2}]
    assert [dict(record.labels) for record in read_labelled(both)] == [{"S": True}, {"H": False}, {"H": False}]


def test_held_out_texts_are_left_out_of_training(caplog):
    own = [LabelledText([{"role": "user", "content": text}], {"S": True}) for text in ("a", "b  c", "d")]
    others = [LabelledText([{"role": "user", "content": "b c"}], {"S": False})]
    assert [record.text for record in apart_from(own, others, "train_data")] == ["a", "d"]
    assert "train_data: left out 1 of 3 texts that are held out, too" in caplog.text
    with pytest.raises(InputError, match="every text is held out"):
        apart_from(own[:1], own, "train_data")


def test_texts_of_a_held_out_group_are_left_out_of_training():
    def text(name: str, group: int | None) -> LabelledText:
        columns = {} if group is None else {"split_group": group}
        return LabelledText([{"role": "user", "content": name}], {"S": True}, columns)

    own = [text("a", 7), text("c", 8), text("d", None)]
    assert [record.text for record in apart_from(own, [text("b", 7)], "train_data")] == ["c", "d"]


def test_who_labelled_and_the_group_are_no_categories():
    rows = [
        {"text": "a", "S": 1, "labeler": 0, "split_group": 0},
        {"text": "b", "S": 0, "labeler": 1, "split_group": 1},
    ]
    records = read_labelled(rows)
    assert categories_of(records) == ["S"]
    assert [(record.columns["labeler"], record.columns["split_group"]) for record in records] == [(0, 0), (1, 1)]


def test_the_real_rows(shared_data):
    records = read_labelled(str(shared_data / "moderation.jsonl.gz"))
    assert len(records) == 1200
    assert categories_of(records) == ["S", "H", "V", "HR", "SH", "S3", "H2", "V2"]
    known = {name: sum(name in record.labels for record in records) for name in ("S", "H2")}
    assert known == {"S": 712, "H2": 545}
    assert sum(record.labels.get("V2", False) for record in records) == 16
