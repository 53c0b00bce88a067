"""Fingerprints: of files and folders whose contents change, of models where they are, of reward functions."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf.rows.records import Ranking
from rlhf.run import fingerprint
from rlhf.run.fingerprint import adapter_settings, data_fingerprint, of_rows, of_run
from rlhf.run.objects import of_function, of_weights


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


def test_a_name_that_is_not_utf8_and_a_user_without_a_home(tmp_path: Path, monkeypatch) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    with contextlib.suppress(OSError):  # a file system that takes no such name
        odd.write_bytes(b"0123456789")
    (tmp_path / "large").write_bytes(b"0123456789")
    monkeypatch.setattr(fingerprint, "PART", 4)
    before = data_fingerprint(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError))
    monkeypatch.setattr(fingerprint.time, "time_ns", lambda: odd.parent.stat().st_ctime_ns + 9_000_000_000)
    assert data_fingerprint(tmp_path) == before
    assert len(data_fingerprint(f"{odd}-not-there")) == 64


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


SOURCE = """
import functools, re

WORDS, LIMIT = ("a", "b"), 3

def helper(text, least=1):
    return min(len(text), LIMIT) + least

def made(weight):
    def inner(prompts, completions, **columns):
        return [weight * helper(text) for text in completions]
    return inner

def length(prompts, completions, scale=2.0, **columns):
    return [scale * helper(text) for text in completions if text not in WORDS]

class Scorer:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, prompts, completions, **columns):
        return [self.scale * helper(text) for text in completions]

    def unused(self):
        return 1
"""
BEFORE = {
    "length": "length 5782abb4ec89693dc1a1bf7f2f4bf93d6fc9692795f72fa490c4c25fe5f32818",
    "made(0.5)": "inner f2c33aebcdc37e6ec16de6e556d73c4e60b52ae6bf3bc2ffb5252422c85ff67a",
    "functools.partial(length, scale=3)": "length 2a01a021be3c0f2886249ee475c30f3975c8b065bb4d5dd9ec614dc11975bcdc",
    "Scorer(4)": "Scorer 79d1694d9dfa5f43a240c97ee6762954979093020b1e2df95471c2808ffb7d7f",
    "Scorer(4).__call__": "__call__ 36c3a4a67cacc01a827c8cc0770186aef08f293bb04c22059e7318a38e24246e",
}


def told(expression: str, *changed: tuple[str, str], module: str = "made") -> str:
    """Return the fingerprint of what an expression makes from SOURCE with these texts changed."""
    source, space = SOURCE, {"__name__": module}
    for old, new in changed:
        assert old in source
        source = source.replace(old, new)
    exec(source, space)
    return of_function(eval(expression, space))


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the hashes are of Python 3.11's instructions")
@pytest.mark.parametrize("expression", BEFORE)
def test_a_run_that_was_begun_with_an_earlier_version_goes_on(expression) -> None:
    assert told(expression) == BEFORE[expression]


@pytest.mark.parametrize(
    ("old", "new", "other"),
    [
        ('("a", "b")', '{"a", "b"}', '{"a", "c"}'),
        ('("a", "b")', 'frozenset({"a", "b"})', 'frozenset({"a", "c"})'),
        ('("a", "b")', '{"x": [{"a"}]}', '{"x": [{"b"}]}'),
        ('("a", "b")', '[re.compile("a")]', '[re.compile("b")]'),
        ('("a", "b")', 're.compile("a")', 're.compile("a", re.IGNORECASE)'),
        ('("a", "b")', 'b"a"', 'b"b"'),
        ("scale=2.0", "*, scale=2.0", "*, scale=3.0"),
        ("scale=2.0", "scale=2.0, *, words={1}", "scale=2.0, *, words={2}"),
        ("scale=2.0", 'scale=re.compile("a")', 'scale=re.compile("b")'),
    ],
)
def test_a_constant_or_default_that_json_does_not_hold_counts(old, new, other) -> None:
    assert told("length", (old, new)) == told("length", (old, new))
    assert told("length", (old, new)) != told("length", (old, other))


def test_the_order_of_a_set_does_not_count() -> None:
    """8 and 0 fall on one place of the table, where the first to come goes first."""
    assert [*{8, 0}] != [*{0, 8}]
    assert told("length", ('("a", "b")', "{8, 0}")) == told("length", ('("a", "b")', "{0, 8}"))


def test_patterns_that_a_function_was_made_with_count() -> None:
    assert told("made(re.compile('a'))") != told("made(re.compile('b'))")
    assert told("made(frozenset('a'))") != told("made(frozenset('b'))")
    assert told("made({1})") == told("made({2})"), "where a function may keep what it has seen"


@pytest.mark.parametrize("expression", ["Scorer(4)", "Scorer(4).__call__"])
@pytest.mark.parametrize("kind", ["", "@staticmethod\n    ", "@property\n    "])
def test_the_methods_that_an_object_scores_by_count(expression, kind) -> None:
    own, pair = ("", "Scorer") if kind.startswith("@static") else ("self", "self")
    methods = f"{kind}def one({own}):\n        return {pair}.two\n\n    def two(self):\n        return 2\n"
    calls = ("self.scale * helper", "self.scale * self.one * helper"), ("def unused", f"{methods}\n    def unused")
    before = told(expression, *calls)
    assert told(expression, *calls, (".two\n", ".two + 1\n")) != before
    assert told(expression, *calls, ("return 2", "return 3")) != before
    assert told(expression, *calls, ("return 1", "return 4")) == before, "nothing calls it"
    ours = told(expression, *calls, module="reward_models.scoring")
    assert told(expression, *calls, ("return 2", "return 3"), module="reward_models.scoring") == ours


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
