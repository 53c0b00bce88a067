"""Policies that are only sampled: the responses of several processes are one process's, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference.several import playing
from reference.tiny_chain import chain

from rlhf import chat, policies
from rlhf.models.loading import load_tokenizer
from rlhf.run import owner
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.engine import RowGenerator, model_stop_ids

PROMPTS = [[7, 8, 9], [5, 6], [7, 8, 9], [11, 12, 13, 14], [5, 6], [9, 9, 9], [8]]
"""Of several lengths, some twice."""


@pytest.fixture(params=[False, True], ids=["full", "lora"])
def folder(request: Any, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=request.param)[0]


def engine_of(folder: Path, rows: int = 256) -> policies.SharedEngine:
    model, tokenizer = policies.load(folder, torch.float32), load_tokenizer(folder)
    return policies.SharedEngine(model, model_stop_ids(model, tokenizer), chat.pad_id(tokenizer), rows)


def drawn(engine: Any, prompts: list[list[int]], temperature: float) -> tuple[Any, ...]:
    """Two draws with one generator, and what it gives next."""
    generator = torch.Generator().manual_seed(3)
    found = [engine.generate(prompts, 9, temperature, generator) for _ in range(2)]
    return *((one.ids, one.stopped) for one in found), int(torch.randint(2**40, (), generator=generator))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_number_of_processes_changes_no_response(folder: Path, temperature: float) -> None:
    engine = engine_of(folder, rows=3)
    expected = drawn(TransformersEngine(engine.model, engine.stop_ids, engine.alone.pad_id, 3), PROMPTS, temperature)
    assert drawn(engine, PROMPTS, temperature) == expected
    for processes in (2, 3, 9):
        with playing(processes) as exchanges:
            assert drawn(engine, PROMPTS, temperature) == expected, processes
            assert exchanges == [processes, processes]
            assert engine.rows_at_once == 3 * processes
            assert drawn(engine, PROMPTS[:1], temperature) == drawn(engine.alone, PROMPTS[:1], temperature)
            assert len(exchanges) == 2, "one row is not shared out"
    assert engine.rows_at_once == 3


def test_each_response_has_the_seed_of_its_row(folder: Path) -> None:
    engine, seeds = engine_of(folder), [40 + row for row in range(len(PROMPTS))]
    expected = [
        engine.alone.generate([prompt], 9, 1.0, RowGenerator.of([seed], 0, "cpu")).ids[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    with playing(3):
        assert engine.generate(PROMPTS, 9, 1.0, RowGenerator.of(seeds, 0, "cpu")).ids == expected


def test_the_others_have_the_weights_of_the_folder(folder: Path) -> None:
    engine = engine_of(folder)
    with playing(2):
        drawn(engine, PROMPTS, 1.0)
        copies = [thing for thing in owner.held.values() if isinstance(thing, torch.nn.Module)]
        assert len(copies) == 1
        assert copies[0] is not engine.model
        for name, weight in engine.model.state_dict().items():
            assert torch.equal(weight, copies[0].state_dict()[name]), name


def test_a_family_without_seeds_per_row_is_sampled_by_one_process(folder: Path) -> None:
    engine = engine_of(folder)
    engine.alone._own_loop = False
    expected = drawn(engine, PROMPTS, 1.0)
    with playing(2) as exchanges:
        assert drawn(engine, PROMPTS, 1.0) == expected
        assert exchanges == []
