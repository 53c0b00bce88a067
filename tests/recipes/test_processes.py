"""The recipes in several processes, as users launch them: killed and run again, they end as in one process.

`forked` starts a recipe as torchrun does, without its seconds of imports; the long tests use the real launchers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import forked
from reference.tiny_chain import chain
from reference.two_processes import DEMONSTRATIONS, PROMPTS, RANKINGS
from reference.whole_chain import untimed
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
LONG = pytest.mark.long
STAGES = ("sft", "reward_model", "ppo")
LAUNCHERS = {
    "torchrun 1": ["torch.distributed.run", "--standalone", "--nproc_per_node", "1"],
    "torchrun 2": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate 2": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                     "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}  # fmt: skip
FLAGS = {
    # A checkpoint, and with it a line of the log, after every step: SIGTERM then adds none, wherever it arrives.
    "sft": "--epochs 2 --batch_size 8 --microbatch_size 4 --max_length 256 --learning_rate 1e-3 --save_steps 1",
    "reward_model": "--epochs 2 --prompts_per_batch 4 --max_length 256 --save_steps 1 --normalizer_samples 20",
    "ppo": "--updates 3 --rollout_size 8 --minibatch_size 4 --inner_epochs 2 --max_new_tokens 8 --save_steps 1"
    " --eval_steps 3 --learning_rate 1e-4",
}


class World:
    """A tiny chain's folders and data, and runs of recipes on them."""

    def __init__(self, folder: Path, model: Any, tokenizer: Any) -> None:
        self.folder = folder
        self.base, self.judge = chain(folder, model, tokenizer, lora=False)
        data = {"demonstrations": DEMONSTRATIONS, "rankings": RANKINGS[:12], "held_out": RANKINGS[12:]}
        data |= {"prompts": PROMPTS[:8], "eval": PROMPTS[8:]}
        for name, rows in data.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(self, stage: str, output: Path) -> list[str]:
        inputs = {
            "sft": {"model": self.base, "train_data": "demonstrations"},
            "reward_model": {"model": self.base, "train_data": "rankings", "eval_data": "held_out"},
            "ppo": {"model": self.base, "reward_model": self.judge, "train_data": "prompts", "eval_data": "eval"},
        }[stage]
        words = [f"recipes/{stage}.py", "--output_dir", str(output), "--bf16", "false", *FLAGS[stage].split()]
        for name, value in inputs.items():
            words += [f"--{name}", str(value if isinstance(value, Path) else self.folder / f"{value}.jsonl")]
        return words

    def alone(self, stage: str) -> Path:
        """The folder that one ordinary process leaves."""
        output = self.folder / "alone" / stage
        if not output.exists():
            done = forked.shared().run(self.command(stage, output))  # with as many threads as each of several has
            assert done.returncode == 0, done.stdout + done.stderr
        return output

    def forked(self, stage: str, output: Path, processes: int, until: Callable[[], bool] = lambda: False) -> int:
        done = forked.shared().together(self.command(stage, output), processes, until=until)
        assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
        return done.returncode

    def launched(self, launcher: str, stage: str, output: Path, until: Callable[[], bool] | None = None) -> int:
        """By the real launcher; SIGTERM, as from a cluster, once `until` holds."""
        command = [sys.executable, "-m", *LAUNCHERS[launcher], *self.command(stage, output)]
        own = forked.ENVIRONMENT | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while until is not None and process.poll() is None and not until():
            time.sleep(0.01)
        if until is not None:
            process.terminate()
        out, _ = process.communicate(timeout=forked.LIMIT)
        assert process.returncode == 0 or until is not None, out
        return process.returncode


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
