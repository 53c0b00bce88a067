"""Fingerprints: of files and folders whose contents change, of models where they are, of reward functions."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf.rows.records import Ranking
from rlhf.run import fingerprint
from rlhf.run.fingerprint import adapter_settings, data_fingerprint, of_function, of_rows, of_run, of_weights


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fingerprint, "PART", 4)  # so that these bytes count as a large file's
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"0123456789")
    parts = b"".join(hashlib.sha256(part).digest() for part in (b"0123", b"4567", b"89"))
    expected = hashlib.sha256(hashlib.sha256(parts).digest()).hexdigest()
    assert data_fingerprint(file) == expected
    before = file.stat()
    monkeypatch.setattr(fingerprint.time, "time_ns", lambda: before.st_ctime_ns + 3_000_000_000)
    assert data_fingerprint(file) == expected  # written to the cache now
    assert fingerprint._known()[str(file)][1] == hashlib.sha256(parts).hexdigest()
    monkeypatch.setattr(fingerprint, "_digest_of_part", None)  # from here on the cache alone may answer
    assert data_fingerprint(file) == expected
    monkeypatch.undo()
    monkeypatch.setattr(fingerprint, "PART", 4)
    file.write_bytes(b"0123456780")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert data_fingerprint(file) != expected


def test_a_stage_folder_is_its_model_and_not_its_logs(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "manifest.json").write_text("{}")
    before = data_fingerprint(tmp_path)
    for log in ("metrics.jsonl", "training_args.bin", "report.html", ".lock", "checkpoint-3"):
        (tmp_path / log).write_text("later")
    assert data_fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert data_fingerprint(tmp_path) != before


def test_an_adapter_counts_its_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    (base / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = data_fingerprint(adapter)
    (base / "config.json").write_text('{"a": 1}')
    assert data_fingerprint(adapter) != before


def test_rows_with_any_values_have_one(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028", "image": object()}, {"prompt": "\ud800"}]
    assert of_rows(rows) == of_rows([{"prompt": "a\u2028", "image": object()}, {"prompt": "\ud800"}])
    assert of_rows(rows) != of_rows(rows[:1])


def test_weights_differ_by_one_bit_by_place_and_by_type() -> None:
    model = nn.Linear(3, 2)
    before = of_weights(model)
    assert of_weights(model) == before
    with torch.no_grad():
        model.weight[1, 2] = torch.nextafter(model.weight[1, 2], torch.tensor(9.0))
    assert of_weights(model) != before
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, 0] = 1.0
        first = of_weights(model)
        model.weight.zero_()
        model.weight[0, 1] = 1.0
    assert of_weights(model) != first
    assert of_weights(model.bfloat16()) != of_weights(model.float())


def make(source: str, limit: int = 3):
    space = {"LIMIT": limit, "__name__": "made"}
    exec(source, space)
    return space["length"]


def test_a_function_is_its_code_its_helpers_and_its_constants() -> None:
    source = (
        "def helper(t):\n return min(len(t), LIMIT)\n"
        "def length(prompts, completions):\n return [helper(t) for t in completions]"
    )
    told = of_function(make(source))
    assert of_function(make("\n\n" + source.replace("return min", "  return min"))) == told  # no line numbers
    assert of_function(make(source.replace(":\n return [", ":\n 'It says more.'\n return ["))) == told
    assert of_function(make(source, 4)) != told
    assert of_function(make(source.replace("min", "max"))) != told
    assert of_function(make(source.replace("[helper(t)", "[-helper(t)"))) != told


def test_what_a_function_counts_is_no_part_of_it() -> None:
    def counting(weight):
        seen, calls = [], 0

        def reward(prompts, completions, **columns):
            nonlocal calls
            calls += 1
            seen.extend(completions)
            return [weight * calls] * len(prompts)

        return reward

    used = counting(1.0)
    used([1], ["a"])
    assert of_function(used) == of_function(counting(1.0))
    assert of_function(used) != of_function(counting(2.0))
    assert of_function(functools.partial(used, weight=1)) != of_function(functools.partial(used, weight=2))


class Scorer:
    def __init__(self, model, scale=1.0):
        self.model, self.scale, self.calls = model, scale, 0

    def __call__(self, prompts, completions, **columns):
        self.calls += 1
        return [self.scale] * len(prompts)


def test_an_object_is_its_class_its_arguments_and_its_weights() -> None:
    model = nn.Linear(2, 1)
    one = Scorer(model)
    told = of_function(one)
    one([1], ["a"])
    assert of_function(one) == told
    assert of_function(Scorer(model, 2.0)) != told
    assert of_function(Scorer(nn.Linear(2, 1))) != told


def test_the_settings_of_an_adapter_are_those_that_a_user_gave(tiny_model, tiny_tokenizer) -> None:
    given = LoraConfig(r=4, lora_alpha=6, target_modules={"v_proj", "q_proj"}, use_dora=True)
    told = "r=4, target_modules=['q_proj', 'v_proj'], lora_alpha=6, use_dora=True"
    assert adapter_settings(given) == told
    tiny_model.name_or_path = "a/folder/that/may/move"
    adapted = get_peft_model(tiny_model, given)  # which writes into it
    assert given.base_model_name_or_path == "a/folder/that/may/move"
    assert of_run(tiny_tokenizer, [], model=adapted)["peft_config"] == told
    assert adapter_settings(None) is None
    assert of_run(tiny_tokenizer, [], model="a/hub-id")["peft_config"] is None


@pytest.mark.parametrize("columns", [{"n": 1}, {"image": object()}])
def test_fields_that_came_later_do_not_change_what_a_run_was_begun_with(columns) -> None:
    """A reward model reads neither thinking nor whether a prompt was text."""
    fields = {"prompt": [{"role": "user", "content": "Hi"}], "responses": ["a", "b"], "ranks": [1, 2]}
    row = {**fields, "columns": columns, "where": "f:1"}
    ranking = Ranking(fields["prompt"], ("a", "b"), (1, 2), columns, ("so", ""), True, "f:1")
    assert of_rows([ranking]) == of_rows([Ranking(fields["prompt"], ("a", "b"), (1, 2), columns, where="f:1")])
    assert of_rows([ranking]) == of_rows([row])
