"""Rows of Parquet, of Arrow's files and of datasets objects: the same as from JSON lines."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Json, List, Value
from reference.templates import ADD, A, Q, tokenizer_for

from rlhf import chat
from rlhf.rows.records import read_demonstrations, read_prompts, write_jsonl


def called(name: str, **arguments) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [Q, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "3"}, A]


def tool(name: str, **properties) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


# Arguments, schemas and settings with other keys in every row.
ROWS = [
    {"messages": called("f", a=1), "tools": [ADD, tool("f", a={"type": "integer"})],
     "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": called("g", b={"c": "x"}, d=[None, "y"]), "tools": [tool("g", b={"description": "A thing."})],
     "chat_template_kwargs": {"strict": True}},
]  # fmt: skip


def as_parquet(folder: Path, rows: Dataset) -> Path:
    rows.to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def as_arrow(folder: Path, rows: Dataset) -> Path:
    table = rows.data.table
    with pyarrow.ipc.new_file(str(folder / "a.arrow"), table.schema) as out:
        out.write_table(table)
    return folder / "a.arrow"


def as_saved(folder: Path, rows: Dataset) -> Path:
    rows.save_to_disk(folder / "saved")
    return folder / "saved"


KINDS = [lambda _, rows: rows, lambda _, rows: rows.to_iterable_dataset(), as_parquet, as_arrow, as_saved]


@pytest.mark.parametrize("kind", KINDS)
def test_objects_of_other_keys_in_every_row(tmp_path, kind):
    read = read_demonstrations(kind(tmp_path, Dataset.from_list(ROWS)))
    assert read == read_demonstrations(ROWS)
    for name in ("qwen3", "llama3_1"):
        tokenizer = tokenizer_for(name)
        for one, row in zip(read, ROWS, strict=True):
            own = read_demonstrations([row])[0]
            ids = chat.encode_demonstration(tokenizer, one.messages, 0, one.columns)
            assert ids == chat.encode_demonstration(tokenizer, own.messages, 0, own.columns)
            assert "null" not in tokenizer.decode(ids[0]).replace("[null", "")


def test_other_columns_keep_their_nulls(tmp_path):
    rows = [{"prompt": "q", "info": {"a": 1, "b": None}, "note": None}, {"prompt": "q", "info": {"a": 2, "b": "x"}}]
    for kind in KINDS:
        prompts = read_prompts(kind(tmp_path, Dataset.from_list(rows)))
        assert prompts[0].columns == {"info": {"a": 1, "b": None}, "note": None}


NULL = tool("f", a={"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None})
JSON_ROWS = [
    {"messages": called("f", a=None), "tools": [NULL], "facts": {"x": 1}},
    {"messages": called("g", b="x"), "tools": [tool("g")], "facts": {"x": "s"}},
]
TURNS = {"role": Value("string"), "content": Value("string"), "tool_calls": List(Json())}


@pytest.mark.parametrize(
    "features", [{"messages": List(TURNS), "tools": List(Json())}, {"messages": List(Json()), "tools": Json()}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_datasets_holds_as_json(tmp_path, kind, features):
    rows = Dataset.from_list(JSON_ROWS, features=Features({**features, "facts": {"x": Json()}}))
    read = read_demonstrations(kind(tmp_path, rows))
    assert read == read_demonstrations(JSON_ROWS)
    assert read[0].columns == {"tools": [NULL], "facts": {"x": 1}}
    assert read[1].columns["facts"] == {"x": "s"}


TIMES = {
    "when": datetime(2026, 1, 2, 3, 4, tzinfo=UTC), "day": date(2026, 1, 2), "lasted": timedelta(seconds=3),
    "cost": Decimal("1.50"), "name": "Größe".encode(), "image": b"\xff\xd8",
}  # fmt: skip
TOLD = {
    "when": "2026-01-02 03:04:00+00:00", "day": "2026-01-02", "lasted": "0:00:03", "cost": "1.50", "name": "Größe",
    "image": "/9g=",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_times_decimals_and_bytes_are_text(tmp_path, kind):
    row = {"prompt": "q", **TIMES, "about": {"inner": [TIMES]}}
    prompts = read_prompts(kind(tmp_path, Dataset.from_list([row])))
    assert prompts[0].columns == TOLD | {"about": {"inner": [TOLD]}}
    write_jsonl(tmp_path / "out.jsonl", prompts)
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8"))["about"] == {"inner": [TOLD]}
