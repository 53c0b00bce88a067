"""Responses kept on disk: more of them are those that would have been drawn at once."""

from __future__ import annotations

import json

import pytest

from rlhf import chat
from rlhf.errors import InputError
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.kept import KeptSamples, key_of, seed_of

PROMPTS = [[5, 6, 7], [9, 8], [11, 12, 13, 14]]


@pytest.fixture
def engine(tiny_model, tiny_tokenizer):
    chat.prepare_tokenizer(tiny_tokenizer)
    return TransformersEngine(tiny_model, (2,), chat.pad_id(tiny_tokenizer))


def drawn(file, engine, n, prompts=PROMPTS, seed=0, rows_at_once=4) -> KeptSamples:
    kept = KeptSamples(file, seed)
    settings = {"max_new_tokens": 6, "temperature": 1.0, "rows_at_once": rows_at_once, "device": "cpu"}
    kept.draw(engine, prompts, n, lambda ids: " ".join(map(str, ids)), **settings)
    return kept


def test_more_are_those_that_would_have_been_drawn_at_once(tmp_path, engine):
    file = tmp_path / "a.jsonl"
    first = drawn(file, engine, 2).of(PROMPTS, 2)
    asked = []
    generate = engine.generate
    engine.generate = lambda ids, *rest: (asked.extend(ids), generate(ids, *rest))[1]
    more = drawn(file, engine, 5, rows_at_once=2).of(PROMPTS, 5)
    assert len(asked) == 3 * 3  # the new ones only
    once = drawn(tmp_path / "b.jsonl", engine, 5, PROMPTS[::-1], rows_at_once=99).of(PROMPTS, 5)
    assert more == once
    assert [row for row in more if row.k < 2] == first
    assert len({tuple(row.ids) for row in more}) > 10
    assert drawn(tmp_path / "c.jsonl", engine, 2, seed=1).of(PROMPTS, 2) != first
    assert json.loads(file.read_text().partition("\n")[0])["text"] == " ".join(map(str, first[0].ids))


def test_a_killed_run_goes_on(tmp_path, engine):
    whole = drawn(tmp_path / "a.jsonl", engine, 3)
    text = (tmp_path / "a.jsonl").read_bytes()
    for cut in (
        len(text) - 1,
        len(text) - 30,
        text.index(b"\n") + 1,
        5,
    ):  # before a line's end, within one, between two
        (tmp_path / "b.jsonl").write_bytes(text[:cut])
        again = drawn(tmp_path / "b.jsonl", engine, 3)
        assert again.rows == whole.rows
        assert KeptSamples(tmp_path / "b.jsonl", 0).rows == whole.rows


def test_another_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:1: is no kept response"):
        KeptSamples(tmp_path / "a.jsonl", 0)


def test_seeds_hang_on_seed_prompt_and_number():
    keys = [key_of(ids) for ids in ([1, 23], [12, 3], [1, 2, 3])]
    assert len(set(keys)) == 3
    seeds = {seed_of(seed, key, k) for seed in (0, 1) for key in keys for k in range(3)}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**62 for seed in seeds)
