"""Recipes on a tiny chain's folders and data, in several processes as users launch them, and in one."""

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

from reference import forked
from reference.tiny_chain import chain
from reference.two_processes import DEMONSTRATIONS, PROMPTS, RANKINGS

ROOT = Path(__file__).resolve().parent.parent.parent
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
