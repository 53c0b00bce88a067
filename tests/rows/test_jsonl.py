"""JSON lines hold any text: every line break but the line feed is a part of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.errors import InputError
from rlhf.rows.jsonl import lines_of, read_rows, to_line
from rlhf.rows.records import read_prompts, write_jsonl
from rlhf.run.loop import CallbackLoop
from rlhf.run.report import write_report

BREAKS = "".join(map(chr, (0x0B, 0x0C, 0x0D, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029)))


def test_every_text_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [{"text": BREAKS.join("abc")}, {"text": "\n"}, {"text": "\ud83d"}, {"text": "ä\U0001f600"}]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"".join(map(to_line, rows)))
    assert [row for _, row in read_rows(file)] == rows
    assert len(lines_of(file)) == len(rows)
    write_jsonl(tmp_path / "b.jsonl", rows)
    assert (tmp_path / "b.jsonl").read_bytes() == file.read_bytes()
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": BREAKS.join("abc")}])
    assert read_prompts(tmp_path / "c.jsonl")[0].messages[0]["content"] == BREAKS.join("abc")


def test_a_cut_last_line_is_left_out_and_another_broken_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"a": "\xe2\x80')
    assert list(read_rows(file)) == [(1, {"a": 1})]
    file.write_bytes(b'{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: broken JSON"):
        list(read_rows(file))
    file.write_bytes(b"[1]\n")
    with pytest.raises(InputError, match=r"a\.jsonl:1: .*expected an object, got a list"):
        list(read_rows(file))


def test_a_row_nested_too_deep_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{" + '"a":{' * 100_000 + "}" * 100_001 + "\n")
    with pytest.raises(InputError, match=r"rows.jsonl:1: broken JSON"):
        list(read_rows(tmp_path / "rows.jsonl"))


def test_not_a_number_becomes_null_and_infinity_text() -> None:
    row = {"a": float("nan"), "b": [float("inf"), -float("inf"), 1.0], "c": "NaN"}
    assert to_line(row) == b'{"a": null, "b": ["inf", "-inf", 1.0], "c": "NaN"}\n'


def test_a_report_shows_such_texts_and_a_resumed_run_keeps_them(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "evaluation" / "samples.jsonl", [{"prompt": "Hi", "sft": "a", "ppo": f"one{BREAKS}two"}])
    page = write_report(tmp_path, {"evaluation": {"sft": {"score": 0.0}, "ppo": {"score": 1.0}}}).read_text("utf-8")
    assert "two" in page
    loop = object.__new__(CallbackLoop)
    loop.samples = tmp_path / "samples.jsonl"
    write_jsonl(loop.samples, [{"step": step, "prompt": f"one{BREAKS}two"} for step in (1, 1, 2, 3)])
    loop._truncate_samples(2)
    assert [row["step"] for _, row in read_rows(loop.samples)] == [1, 1, 2]
    assert all(json.loads(line)["prompt"] == f"one{BREAKS}two" for line in lines_of(loop.samples))
