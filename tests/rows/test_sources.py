"""Where rows come from: files of every kind, what is in the wrong container, folders and their splits, name@split."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
import zipfile
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.errors import InputError
from rlhf.rows.records import HELD_OUT, read_demonstrations, read_prompts, read_rankings
from rlhf.rows.sources import path_of, require_there

ROWS = [
    {"prompt": "Name a fruit.", "chosen": "An apple,\nred.", "rejected": 'A "pear"', "margin": 0.5},
    {"prompt": "12", "chosen": "None", "rejected": "NA", "margin": 2.0},
    {"prompt": "Größe?\u2028", "chosen": "007", "rejected": "1.50", "margin": 1.0},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(raw: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(raw)
    return sink.getvalue().to_pybytes()


def write_table(path: Path, delimiter: str, lineterminator: str = "\r\n", mark: str = "") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(mark)
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter, lineterminator=lineterminator)
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow(path: Path, kind) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with kind(str(path), table.schema) as out:
        out.write_table(table)


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.ndjson": lambda path: path.write_bytes(LINES.replace(b"\n", b"\r\n")),
    "a.txt": lambda path: path.write_bytes(LINES),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json.zst": lambda path: path.write_bytes(zstd(json.dumps(ROWS).encode())),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(LINES)),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES)),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES)),
    "packed.jsonl": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.csv": lambda path: write_table(path, ","),
    "unix.csv": lambda path: write_table(path, ",", "\n", "\ufeff"),
    "german.csv": lambda path: write_table(path, ";"),
    "a.tsv": lambda path: write_table(path, "\t"),
    "a.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2),
    "stream.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_stream),
    "file.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_every_kind_holds_the_same(tmp_path, name):
    WRITERS[name](tmp_path / name)
    rankings = read_rankings(tmp_path / name)
    assert rankings == read_rankings(ROWS)
    assert [ranking.columns for ranking in rankings] == [{"margin": row["margin"]} for row in ROWS]
    assert rankings[1].responses == ("None", "NA")  # pandas would read both as missing
    assert rankings[0].where.startswith(f"{tmp_path / name}:")


def test_rows_know_their_lines(tmp_path):
    write_table(tmp_path / "a.csv", ",")
    assert [r.where.rpartition(":")[2] for r in read_rankings(tmp_path / "a.csv")] == ["3", "4", "5"]
    (tmp_path / "a.jsonl").write_bytes(b"\n" + LINES)
    assert [r.where for r in read_prompts(tmp_path / "a.jsonl")] == [f"{tmp_path}/a.jsonl:{n}" for n in (2, 3, 4)]
    assert [p.where for p in read_prompts(read_rankings(ROWS))] == ["row 0", "row 1", "row 2"]
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nq,a,b\nq,a,\n")
    with pytest.raises(InputError, match=r"a\.csv:3: rejected: got null"):
        read_rankings(tmp_path / "a.csv")


def test_a_text_file_is_a_prompt_per_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"Name a fruit.\r\n\r\nName a tree.\xe2\x80\xa8 Now.\n")
    prompts = read_prompts(tmp_path / "prompts.txt")
    assert [(p.messages[0]["content"], p.text) for p in prompts] == [
        ("Name a fruit.", True),
        ("Name a tree.\u2028 Now.", True),
    ]
    assert [p.where.rpartition(":")[2] for p in prompts] == ["1", "3"]


def test_numbers_of_a_table_that_are_no_text(tmp_path):
    (tmp_path / "a.csv").write_text(
        ",prompt,completion,answer,weight,code,label\n0,1,2,3,4,007,true\n1,5,6,7.5,,1,false\n"
    )
    (row,) = read_demonstrations(tmp_path / "a.csv")  # the other one's label is false
    assert row.messages[0]["content"] == "1"
    assert row.columns == {"answer": "3", "weight": 4, "code": "007", "label": "true"}
    prompts = read_prompts(tmp_path / "a.csv")
    assert prompts[1].columns == {"completion": "6", "answer": "7.5", "weight": None, "code": "1", "label": "false"}


def test_answers_of_a_table_stay_text_where_all_are_numbers(tmp_path):
    file = tmp_path / "a.csv"
    for question, answer in (("question", "target"), ("problem", "solution"), ("request", "completion")):
        file.write_text(f"{question},{answer},weight\n1+1?,2,3\n2+2?,4.0,5\n")
        columns = {} if answer == "completion" else {"columns": {"prompt": question, "completion": answer}}
        for source in (file, [{"path": file, **columns}]):
            rows = read_demonstrations(source)
            assert [row.response for row in rows] == ["2", "4.0"]
            assert rows[0].columns["weight"] == 3
    file.write_text("frage,antwort,gewicht\n1+1?,2,3\n2+2?,4.0,5\n")
    columns = {"prompt": "frage", "completion": "antwort", "weight": "gewicht"}
    for path in (file, tmp_path):
        rows = read_demonstrations([{"path": path, "columns": columns}])
        assert [(row.response, row.columns["weight"]) for row in rows] == [("2", 3), ("4.0", 5)]
    file.write_text("prompt,response_1,response_2,winner\n1+1?,2,3,model_a\n2+2?,5,4,model_b\n")
    assert [ranking.responses for ranking in read_rankings(file)] == [("2", "3"), ("5", "4")]


def test_messages_in_a_table_are_json(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], [json.dumps(turns)]])
    assert read_demonstrations(tmp_path / "a.csv")[0].messages == turns
    (tmp_path / "c.csv").write_text(f"prompt,n,other,long\nq,12,1\u0662,{'9' * 5000}\n", encoding="utf-8")
    assert read_prompts(tmp_path / "c.csv")[0].columns == {"n": 12, "other": "1\u0662", "long": "9" * 5000}
    (tmp_path / "b.csv").write_text('prompt,responses,ranks\nq,"[""a"", ""b""]","[2, 1]"\n')
    assert read_rankings(tmp_path / "b.csv")[0].pairs() == [(1, 0)]
    text = [{"prompt": "[1, 2] sorted?", "chosen": "[1, 2]", "rejected": "[2, 1]"}]
    assert read_rankings(text)[0].responses == ("[1, 2]", "[2, 1]")


def test_times_and_decimals_of_a_table_are_text(tmp_path):
    rows = [{"prompt": "q", "when": datetime(2026, 1, 2), "much": Decimal("1.50"), "turn": {"n": 1}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    columns = read_prompts(tmp_path / "a.parquet")[0].columns
    assert (columns["much"], columns["turn"]) == ("1.50", {"n": 1})
    assert columns["when"].startswith("2026-01-02")


# -- what is in the wrong container ------------------------------------------------------------------------

PARQUET = b"PAR1" + bytes(64)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", PARQUET, "a Parquet file; name it .parquet"),
        ("a.csv", PARQUET, "a Parquet file; name it .parquet"),
        ("a.jsonl", b"ARROW1\0\0" + bytes(64), "an Arrow file; name it .arrow"),
        ("a.json", b"\xff\xff\xff\xff\x90\0\0\0" + bytes(64), "an Arrow file; name it .arrow"),
        ("a.jsonl", POINTER, "a Git LFS pointer and not the data; run git lfs pull"),
        ("a.parquet", POINTER, "a Git LFS pointer and not the data; run git lfs pull"),
        ("a.arrow", POINTER, "a Git LFS pointer and not the data; run git lfs pull"),
        ("a.jsonl.gz", POINTER, "a Git LFS pointer and not the data; run git lfs pull"),
        ("a.jsonl", b"\n<!DOCTYPE html>\n<html></html>", "a web page; download the file itself"),
        ("a.parquet", b"<html>404</html>", "a web page; download the file itself"),
        ("a.jsonl", b'<?xml version="1.0"?><Error/>', "an XML document; "),
        ("a.jsonl", "\ufeff".encode("utf-16-le") + '{"prompt": "q"}'.encode("utf-16-le"), "UTF-16 or UTF-32 text; "),
        ("a.csv", '\ufeff"prompt"'.encode("utf-16-be"), "UTF-16 or UTF-32 text; save the file as UTF-8"),
        ("a.jsonl", '{"prompt": "q"}'.encode("utf-16-le"), "UTF-16 text without its mark; save the file as UTF-8"),
        ("a.jsonl", '{"prompt": "q"}'.encode("utf-16-be"), "UTF-16 text without its mark; save the file as UTF-8"),
        ("a.jsonl", '{"prompt": "q"}'.encode("utf-32"), "UTF-16 or UTF-32 text; save the file as UTF-8"),
        ("a.jsonl", b"SQLite format 3\0" + bytes(90), "an SQLite database; "),
        ("a.jsonl", b"%PDF-1.7 ...", "a PDF document; "),
        ("a.jsonl", b"\x80\x04\x95\x10", "a Python pickle; "),
        ("a.jsonl", gzip.compress(bytes(257) + b"ustar", mtime=0), "a tar archive; unpack it"),
        ("a.jsonl", gzip.compress(PARQUET, mtime=0), "a Parquet file; name it .parquet"),
        ("a.jsonl", b"\x01\x02\x00\x00\x00", "binary data; "),
        ("a.parquet", LINES, "not a Parquet file; take .parquet off its name"),
        ("a.parquet", PARQUET, "a Parquet file that can't be read"),
        ("a.parquet", b"", "the file is empty"),
        ("a.arrow", b"", "the file is empty"),
        ("a.arrow", LINES, "not an Arrow file; take .arrow off its name"),
        ("a.jsonl.zst", LINES, "not a zstd file; take .zst off its name or compress it"),
        ("a.jsonl.zst", zstd(LINES)[:-20], "a damaged zstd file"),
        ("a.jsonl.bz2", bz2.compress(LINES)[:-20], "a damaged bzip2 file"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-20], "a damaged xz file"),
        ("a.jsonl", b"prompt,chosen,rejected\na,b,c\n", "broken JSON at column 1, .*; .*name a table .csv or .tsv"),
        ("a.jsonl", b"[" * 100_000, "JSON that can't be read"),
        ("a.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", "JSON that can't be read"),
        ("a.csv", b"prompt,chosen,rejected\na,b,c,d\n", "4 cells for 3 columns .*; quote cells"),
        ("a.csv", b'prompt,chosen\n"a"b,c\n', "a broken cell"),
        ("a.csv", b'prompt,chosen\n"a,c\n', "a broken cell"),
        ("a.csv", b"prompt,prompt\na,c\n", "two columns are called 'prompt'"),
        ("a.csv", b"prompt\ncaf\xe9\n", "byte 10 isn't UTF-8; save the file as UTF-8"),
        ("a.csv", b"prompt,chosen\n", "the file is empty"),
        ("a.txt", b"\n\n", "the file is empty"),
        (
            "a.json",
            b'{\n"data": [\n{"prompt": "q"}]}\n',
            "one object over several lines, with data; write one",
        ),
        ("a.json", b'{"prompt": {"0": "q", "1": "r"}}', "a table by columns; write it by rows"),
    ],
)
def test_what_a_file_is_instead(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}:")
    assert "\n" not in str(caught.value)


def test_a_workbook_and_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.csv", "w") as archive:
        archive.writestr("rows.jsonl", LINES)
    with pytest.raises(InputError, match="a zip archive or a workbook; unpack it; save a workbook as CSV"):
        read_prompts(tmp_path / "a.csv")


# -- splits ------------------------------------------------------------------------------------------------


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({"prompt": name}) + "\n")
    return path


def names_in(source, split: str = "train") -> list[str]:
    return [prompt.messages[0]["content"] for prompt in read_prompts(source, split)]


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (["pairs.jsonl", "pairs_test.jsonl"], ["pairs.jsonl"], ["pairs_test.jsonl"]),
        (["pairs.jsonl", "pairs.test.jsonl"], ["pairs.jsonl"], ["pairs.test.jsonl"]),
        (["a.jsonl", "test-00000-of-00001.jsonl"], ["a.jsonl"], ["test-00000-of-00001.jsonl"]),
        (["my_train.jsonl", "my_val.jsonl", "other.jsonl"], ["my_train.jsonl"], ["my_val.jsonl"]),
        (["train.jsonl", "train-2.jsonl", "dev.json"], ["train-2.jsonl", "train.jsonl"], ["dev.json"]),
        (["TRAIN.jsonl", "Test.jsonl"], ["TRAIN.jsonl"], ["Test.jsonl"]),
        (["training.jsonl", "validation.jsonl", "test.jsonl"], ["training.jsonl"], ["test.jsonl"]),
        (["train.jsonl", "held_out.jsonl", "eval_prompts.jsonl"], ["train.jsonl"], ["held_out.jsonl"]),
        (["train1.jsonl", "valid1.jsonl"], ["train1.jsonl"], ["valid1.jsonl"]),
        (["data.jsonl", "train_eval.jsonl"], ["data.jsonl"], ["train_eval.jsonl"]),
        (["latest.jsonl", "contest.jsonl"], ["contest.jsonl", "latest.jsonl"], ["contest.jsonl", "latest.jsonl"]),
        (["train.jsonl", ".test.jsonl", "notes.md"], ["train.jsonl"], ["train.jsonl"]),
        (["a.jsonl", "LICENSE.txt", "LICENSE-MIT.txt", "readme.txt", "NOTICE.txt"], ["a.jsonl"], ["a.jsonl"]),
        (["a.jsonl", "requirements.txt", "dataset_infos.json", "dataset_info.json"], ["a.jsonl"], ["a.jsonl"]),
        (["licensed.txt", "notices.jsonl"], ["licensed.txt", "notices.jsonl"], ["licensed.txt", "notices.jsonl"]),
    ],
)
def test_files_of_a_folder_belong_to_splits(tmp_path, names, train, held_out):
    folder(tmp_path, *names)
    assert names_in(tmp_path) == train
    assert names_in(tmp_path, HELD_OUT) == held_out


def test_a_folder_of_test_files_is_no_training_data(tmp_path):
    folder(tmp_path, "test.jsonl", "my_dev.jsonl")
    with pytest.raises(InputError, match=r"no file for split 'train' among my_dev\.jsonl, test\.jsonl"):
        read_prompts(tmp_path)
    folder(tmp_path / "more", "train.jsonl", "other.jsonl")
    with pytest.raises(InputError, match="no file for split 'held_out' among"):
        read_prompts(tmp_path / "more", HELD_OUT)


def test_a_file_in_two_formats_is_not_read_twice(tmp_path):
    folder(tmp_path, "train.jsonl", "train.csv")
    with pytest.raises(InputError, match=r"train\.csv and train\.jsonl have one name; delete one"):
        read_prompts(tmp_path)


def test_a_split_is_named_after_an_at(tmp_path):
    data = folder(tmp_path / "my@data", "train.jsonl", "test.jsonl", "dev.jsonl", "judge.jsonl")
    assert names_in(str(data)) == ["train.jsonl"]
    for split in ("train", "test", "dev", "judge"):
        assert names_in(f"{data}@{split}") == [f"{split}.jsonl"]
        assert names_in(Path(f"{data}@{split}"), HELD_OUT) == [f"{split}.jsonl"]  # what is named, counts
    assert names_in(f"{data}@validation") == ["dev.jsonl"]
    with pytest.raises(InputError, match="no file for split 'tset'"):
        read_prompts(f"{data}@tset")
    with pytest.raises(InputError, match=r"a file has no split 'test'; name .*train\.jsonl"):
        read_prompts(f"{data}/train.jsonl@test")
    for source in (f"{data}@test", f"{data}/train.jsonl", "org/name@test", "org/name:part@test", str(data)):
        require_there(source)
    with pytest.raises(InputError, match="no such file or folder"):
        require_there(f"{tmp_path}/nowhere@test")
    assert path_of(f"{data}@test") == data
    assert path_of("org/name@test") is None
    with pytest.raises(InputError, match=r"^https://hub/x\.jsonl: an address; download the file"):
        require_there("https://hub/x.jsonl?token=secret")


def dataset(*splits: str):
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_list([{"prompt": split}]) for split in splits})


def test_splits_of_a_dataset(caplog):
    assert names_in(dataset("train", "test", "validation"), HELD_OUT) == ["test"]
    assert names_in(dataset("train", "validation"), HELD_OUT) == ["validation"]
    assert names_in(dataset("train_sft", "test_sft")) == ["train_sft"]
    assert names_in(dataset("train_sft", "test_sft"), HELD_OUT) == ["test_sft"]
    with caplog.at_level(logging.INFO, logger="rlhf"):
        assert names_in(dataset("train"), HELD_OUT) == ["train"]
    assert "split train is read as held_out" in caplog.text
    assert names_in(dataset("latest")) == ["latest"]
    with pytest.raises(InputError, match=r"'train' may be train_prefs, train_sft; .* as NAME@train_prefs"):
        read_prompts(dataset("train_prefs", "train_sft", "test_prefs"))
    with pytest.raises(InputError, match="no 'train' among test; name one of these"):
        read_prompts(dataset("test"))


def test_a_saved_dataset_and_its_split(tmp_path):
    dataset("train", "test").save_to_disk(tmp_path / "saved")
    assert names_in(f"{tmp_path / 'saved'}@test") == names_in(tmp_path / "saved", HELD_OUT) == ["test"]


def test_the_snapshot_of_a_hub_data_set(tmp_path, monkeypatch):
    """As the hub's cache holds it: a card, and a data folder of Parquet files (here by links, as there)."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    blobs, data = tmp_path / "blobs", tmp_path / "snapshot" / "data"
    blobs.mkdir()
    data.mkdir(parents=True)
    (tmp_path / "snapshot" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "snapshot" / "LICENSE.txt").write_text("MIT License\n\nCopyright\n")
    (tmp_path / "snapshot" / "dataset_infos.json").write_text('{\n"default": {}}')
    with pytest.raises(InputError, match=r"snapshot: no \.jsonl, .* file in this folder"):
        read_prompts(tmp_path / "snapshot")
    for split in ("train", "test"):
        table = pyarrow.Table.from_pylist([{"prompt": split, "n": 1}])
        pyarrow.parquet.write_table(table, blobs / split)
        (data / f"{split}-00000-of-00001.parquet").symlink_to(blobs / split)
    assert names_in(tmp_path / "snapshot") == ["train"]
    assert names_in(tmp_path / "snapshot", HELD_OUT) == names_in(f"{tmp_path / 'snapshot'}@test") == ["test"]
    assert names_in(f"{tmp_path / 'snapshot'}:data@test") == ["test"]


def test_the_cases_that_were_refused(shared_cases, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    asked = ["Name a red fruit.", "How do I boil an egg?", "What is 7 + 5?", "Give a synonym of quick."]
    chosen = ["An apple is a red fruit.", "Put it into boiling water for eight minutes.", "7 + 5 = 12.", "Fast."]
    rejected = ["Bananas.", "I don't know.", "It is 75.", "Slow, I think."]
    expected = [([user(text)], pair, (1, 2)) for text, *pair in zip(asked, chosen, rejected, strict=True)]
    for name in ("pairs.parquet", "pairs.csv", "pairs.tsv", "snapshot"):
        found = read_rankings(shared_cases / "24" / name)
        assert [(one.prompt, [*one.responses], one.ranks) for one in found] == expected, name
    things = [f"Name a {thing}." for thing in ("fruit", "tree", "car", "dog")]
    found = read_prompts(shared_cases / "24/prompts.txt")
    assert [(one.messages, one.columns) for one in found] == [([user(text)], {}) for text in things]
    found = read_prompts(shared_cases / "24/verl.parquet")
    assert [one.messages for one in found] == [[user(text)] for text in asked]
    assert [one.columns["reward_model"] for one in found] == [{"style": "rule", "ground_truth": t} for t in chosen]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
