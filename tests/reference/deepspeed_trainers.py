"""SFT and a reward model by DeepSpeed's ZeRO in several gloo processes: whole, and killed half-way and resumed.

torchrun --nproc_per_node 2 tests/reference/deepspeed_trainers.py zero2.yaml|zero3.yaml|alone FOLDER POLICY
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from torch import distributed
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from reference.sharded_trainers import STAGES, Killed
from reference.sharded_trainers import make as make_trainer

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs" / "accelerate"


class DiesAt(TrainerCallback):
    def __init__(self, step: int | None = None) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def on_cpus(config: str) -> None:
    """Let trainers in this process use ZeRO as `accelerate launch --config_file CONFIG` has them do on GPUs: accelerate
    leaves DeepSpeed out where it is told to use CPUs."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "recipes/sft.py"])
    args, defaults, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as launch_command does
    environment = prepare_deepspeed_cmd_env(args)[1].items()
    os.environ |= {key: value for key, value in environment if key.startswith("ACCELERATE_")}
    os.environ |= {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
    post_init = TrainingArguments.__post_init__

    def not_told_of_cpus(self: TrainingArguments) -> None:
        self.use_cpu, self.ddp_backend = False, "gloo"
        post_init(self)

    TrainingArguments.__post_init__ = not_told_of_cpus


def make(*given: Any) -> Any:
    unset_hf_deepspeed_config()  # as in a process that has made no trainer yet: its model is loaded whole
    return make_trainer(*given, keep_best=False)  # ZeRO-3 refuses it


def run(stage: str, policy: str, folder: Path) -> None:
    """Leave `folder`/whole and `folder`/resumed."""
    whole = make(stage, policy, folder / "whole", DiesAt())
    whole.train(resume_from_checkpoint=True)
    whole.save_model(str(folder / "whole"))
    assert (type(whole.model_wrapped).__name__ == "DeepSpeedEngine") == distributed.is_initialized()
    try:
        make(stage, policy, folder / "resumed", DiesAt(3)).train(resume_from_checkpoint=True)
    except Killed:
        whole.accelerator.wait_for_everyone()
    resumed = make(stage, policy, folder / "resumed", DiesAt())
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model(str(folder / "resumed"))
    whole.accelerator.wait_for_everyone()


def main(config: str, folder: str, policy: str) -> None:
    if config != "alone":
        on_cpus(config)
    for stage in STAGES:
        run(stage, policy, Path(folder, stage))
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
