"""The recipes in several processes, as users launch them: killed and run again, they end as in one process.

`forked` starts a recipe as torchrun does, without its seconds of imports; the long tests use the real launchers.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.launched import LAUNCHERS, STAGES, World
from reference.whole_chain import untimed
from safetensors.torch import load_file

LONG = pytest.mark.long
WORLDS: list[World] = []  # of this session


@pytest.fixture
def world(tmp_path_factory, tiny_model, tiny_tokenizer) -> World:
    if not WORLDS:
        WORLDS.append(World(tmp_path_factory.mktemp("processes"), tiny_model, tiny_tokenizer))
    return WORLDS[0]


def checkpoint_in(folder: Path) -> Callable[[], bool]:
    return lambda: any(folder.glob("checkpoint-*/complete"))


def require_same(one: Path, other: Path, tolerance: float) -> None:
    """Weights and numbers; the same files, and of each one copy."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(mine[name], tensor, rtol=0, atol=tolerance, err_msg=name)
    outputs = [untimed(json.loads((folder / "manifest.json").read_text())["outputs"]) for folder in (one, other)]
    require_close(*outputs, tolerance)
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, other)]
    require_close(*map(untimed, logs), tolerance)


def require_close(one: Any, other: Any, tolerance: float) -> None:
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for name in other:
            require_close(one[name], other[name], tolerance)
    elif isinstance(other, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            require_close(mine, theirs, tolerance)
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=10 * tolerance, abs=10 * tolerance)
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "processes", "tolerance"),
    [
        ("sft", 2, 0.0),
        pytest.param("reward_model", 2, 1e-6, marks=LONG),
        ("ppo", 2, 1e-6),
        pytest.param("ppo", 1, 1e-6, marks=LONG),
    ],
)
def test_killed_and_run_again_it_ends_as_in_one_process(world, tmp_path, stage, processes, tolerance):
    output = tmp_path / stage
    assert world.forked(stage, output, processes, until=checkpoint_in(output)) == -signal.SIGKILL
    assert checkpoint_in(output)()
    assert not (output / "manifest.json").exists()
    assert world.forked(stage, output, processes) == 0
    require_same(output, world.alone(stage), tolerance)


@pytest.mark.slow
@LONG
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_starts_in_a_row(world, tmp_path, stage):
    for number in range(20):
        assert world.forked(stage, tmp_path / str(number), 2) == 0
        require_same(tmp_path / str(number), tmp_path / "0", 0.0)


@pytest.mark.slow
@LONG
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_real_launchers(world, tmp_path, launcher, stage):
    """Ended by SIGTERM after the first checkpoint and launched again."""
    output = tmp_path / stage
    world.launched(launcher, stage, output, until=checkpoint_in(output))
    assert world.launched(launcher, stage, output) == 0
    require_same(output, world.alone(stage), 0.0 if stage == "sft" else 1e-6)
