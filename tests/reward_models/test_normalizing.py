"""Scores for the normaliser where every forward is a collective: a process that runs fewer would leave the others
waiting for ever. Independent: the sums of the rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reward_models import normalizing


def scored(sequences: list[list[int]], index: int, processes: int, others: int) -> tuple[list[float], int]:
    """What a process gets, whose neighbour runs `others` forwards; and how many it ran itself."""
    batches: list[Any] = []

    def read(model: Any, batch: Any) -> torch.Tensor:
        batches.append(batch)
        return batch["input_ids"].sum(-1).float()

    accelerator: Any = SimpleNamespace(
        process_index=index,
        num_processes=processes,
        device=torch.device("cpu"),
        unwrap_model=lambda model: model,
        gather=lambda count: torch.cat([count, torch.tensor([others])]),
    )
    return normalizing.shared_scores(accelerator, torch.nn.Linear(1, 1), read, sequences, 0), len(batches)


@pytest.fixture(autouse=True)
def under_zero_3(monkeypatch):
    monkeypatch.setattr("rlhf.run.strategy.partitions", lambda accelerator: True)
    monkeypatch.setattr(normalizing, "TOKENS_PER_MICROBATCH", 4)


@pytest.mark.parametrize(("others", "forwards"), [(1, 3), (3, 3), (7, 7)])
def test_every_process_runs_as_many_forwards(others, forwards):
    assert scored([[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]], 0, 1, others) == ([6.0, 4.0, 11.0, 34.0], forwards)


def test_a_process_without_a_sequence_runs_them_too(monkeypatch):
    monkeypatch.setattr("rlhf.run.distributed.gather_object", lambda own: [[6.0], *own])
    assert scored([[1, 2, 3]], 1, 2, 2) == ([6.0], 2)
