"""Several sources as one, with weights; columns that have other names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from reference import recipe

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.mixed import Sources, mapped, paths_of, weighed
from rlhf.rows.records import read_demonstrations, read_prompts, read_rankings
from rlhf.run.settings import settle


def lines(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(path: Path, *names: str) -> str:
    return lines(path, [{"prompt": name} for name in names])


def asked(source) -> list[str]:
    return [prompt.messages[0]["content"] for prompt in read_prompts(source)]


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (1, "abcde"),
        (2, "aabbccddee"),
        (0.5, "bd"),  # floor((n + 1) / 2) - floor(n / 2) is 1 for every second n
        (1.5, "abbcdde"),
        (0.4, "ce"),
        (0.01, ""),
    ],
)
def test_a_weight_is_how_often_a_record_is_there(weight, expected):
    assert "".join(weighed("abcde", weight)) == expected


def test_parts_follow_each_other(tmp_path):
    one, two = prompts(tmp_path / "a.jsonl", "1", "2"), prompts(tmp_path / "b.jsonl", "3", "4", "5", "6")
    assert asked([one, Path(two)]) == ["1", "2", "3", "4", "5", "6"]
    source = [{"path": one, "weight": 2}, {"path": two, "weight": 0.5}]
    assert asked(source) == ["1", "1", "2", "2", "4", "6"] == asked(source)
    assert paths_of(source) == [one, two]
    assert (paths_of(one), paths_of(None)) == ([one], [])
    folder = tmp_path / "folder"
    folder.mkdir()
    prompts(folder / "train.jsonl", "7"), prompts(folder / "test.jsonl", "8")
    assert asked([one, f"{folder}@test"]) == ["1", "2", "8"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"path": "a.jsonl", "weight": 0}, "a.jsonl: weight: got 0; write a number above 0"),
        ({"path": "a.jsonl", "weight": True}, "weight: got True"),
        ({"path": "a.jsonl", "weight": "2"}, "weight: got '2'"),
        ({"path": "a.jsonl", "weight": float("nan")}, "weight: got nan"),
        ({"path": ""}, "path: got ''; name a file"),
        ({"path": "a.jsonl", "columns": {"prompt": 3}}, "columns: got {'prompt': 3}; write our names with theirs"),
        ({"path": "no/such/a.jsonl"}, "no/such/a.jsonl: no such file or folder"),
    ],
)
def test_parts_that_are_wrong(part, message):
    with pytest.raises(InputError, match=message):
        read_prompts([part])


def test_columns_under_other_names(tmp_path):
    rows = [{"frage": "Who?", "antwort": {"text": "I."}, "id": 3}]
    file = lines(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "frage", "completion": "antwort.text"}
    (demonstration,) = read_demonstrations(mapped(file, columns))
    assert [m["content"] for m in demonstration.messages] == ["Who?", "I."]
    assert demonstration.columns == {"antwort": {"text": "I."}, "id": 3}
    assert mapped(file, None) is file
    rows = lines(tmp_path / "b.jsonl", [{"question": {"full_text": "Who?", "id": "q1"}, "a": "I.", "b": "You."}])
    columns = {"prompt": "question.full_text", "chosen": "a", "rejected": "b"}
    assert read_rankings(mapped(rows, columns))[0].prompt == [{"role": "user", "content": "Who?"}]
    columns = {"prompt": "question.full_text", "completion": "a"}
    (demonstration,) = read_demonstrations(mapped(rows, columns))
    assert (demonstration.response, demonstration.columns) == ("I.", {"b": "You."})
    assert mapped(None, columns) is None
    own = [{"path": file, "columns": {"prompt": "id"}}, file]
    assert [part["columns"] for part in mapped(own, columns)] == [{"prompt": "id"}, columns]
    with pytest.raises(
        InputError, match=r"a\.jsonl:1: columns: prompt: no 'question' among frage, antwort, id; name a"
    ):
        read_demonstrations(mapped(file, {"prompt": "question"}))
    with pytest.raises(InputError, match=r"columns: frage: no 'prompt' among frage, .*; write prompt: frage, our name"):
        read_demonstrations(mapped(file, {"frage": "prompt"}))


def test_a_mapped_column_takes_another_ones_place(tmp_path):
    safe = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
    file = lines(tmp_path / "a.jsonl", [safe])
    assert read_rankings(file)[0].ranks == (2, 1)
    assert read_rankings(mapped(file, {"better_response_id": "safer_response_id"}))[0].ranks == (1, 2)
    pair = lines(tmp_path / "b.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert read_rankings(mapped(pair, {"chosen": "rejected", "rejected": "chosen"}))[0].responses == ("b", "a")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that read data."""

    MOST_USED: ClassVar = ()

    train_data: Sources | None = None
    """Data."""
    columns: dict[str, str] | None = None
    """Names."""
    names: list[str] | None = None
    """A list of text."""

    def __post_init__(self) -> None:
        settle(self)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--train_data", "a, b.jsonl"], "a, b.jsonl"),
        (["--train_data", "[a.jsonl, b.jsonl]"], ["a.jsonl", "b.jsonl"]),
        (["--train_data", "[{path: a.jsonl, weight: 2}, b.jsonl]"], [{"path": "a.jsonl", "weight": 2}, "b.jsonl"]),
        (["--train_data", "null"], None),
    ],
)
def test_sources_as_flags(argv, expected):
    settings = configs.load(Settings, argv)
    assert settings.train_data == expected
    assert configs.from_dict(Settings, configs.to_dict(settings), "again") == settings


def test_sources_in_a_file(tmp_path):
    text = (
        "train_data:\n  - {path: a.jsonl, weight: 0.5, columns: {prompt: q}}\n  - b.jsonl\ncolumns: {prompt: frage}\n"
    )
    (tmp_path / "my.yaml").write_text(text)
    settings = configs.load(Settings, ["--config", str(tmp_path / "my.yaml")])
    assert settings.train_data == [{"path": "a.jsonl", "weight": 0.5, "columns": {"prompt": "q"}}, "b.jsonl"]
    assert settings.columns == {"prompt": "frage"}
    for argv in (["--train_data", "[3]"], ["--train_data", "[{path: "], ["--columns", "3"]):
        with pytest.raises(InputError, match=f"{argv[0]}: expected "):
            configs.load(Settings, argv)
    assert configs.load(Settings, ["--names", "a,b"]).names == ["a", "b"]


def test_the_rankings_stage_reads_a_mixture(tmp_path):
    """Two shapes under other names, one of them twice; another weight is another run."""
    pairs = lines(tmp_path / "a.jsonl", [{"frage": f"Name {n}.", "chosen": "x", "rejected": "y"} for n in range(6)])
    battles = [{"question": f"Say {n}.", "response_j": "x", "response_k": "y"} for n in range(4)]
    stack = lines(tmp_path / "b.jsonl", battles)

    def run(weight: float):
        source = f"[{{path: {pairs}, columns: {{prompt: frage}}}}, {{path: {stack}, weight: {weight}}}]"
        out = ("--output_dir", tmp_path / "run" / "rankings", "--held_out_fraction", "0.2")
        return recipe.run("rankings", "--rankings", source, *out)

    result = run(2)
    assert (result.code, result.err) == (0, "")
    folder = tmp_path / "run" / "rankings"
    rows = [r for name in ("train", "held_out") for r in read_rankings(folder / f"{name}.jsonl")]
    assert sorted(r.prompt[0]["content"] for r in rows) == sorted(
        [f"Name {n}." for n in range(6)] + [f"Say {n}." for n in range(4)] * 2
    )
    assert "4 rows of StackExchange pairs give 4 rankings" in " ".join(result.out.split())
    assert "complete, skipped" in run(2).out
    assert "belongs to another run: rankings was" in run(1).err
