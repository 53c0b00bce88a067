"""SFT and a reward model, trained and saved: in one process, or sharded by FSDP2 as `fsdp_worker` sets it up on CPU.

torchrun --nproc_per_node 2 tests/reference/fsdp_trainers.py CONFIG.yaml FOLDER POLICY
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import transformers.trainer
from torch import distributed

from reference.fsdp_worker import launch_environment, sharded_accelerator
from reference.two_processes import DEMONSTRATIONS, RANKINGS
from reward_models import RewardConfig, RewardTrainer
from rlhf.run.distributed import is_sharded
from rlhf.sft.trainer import SFTConfig, SFTTrainer


def train(folder: Path, policy: str, sharded: bool) -> None:
    """Leave `folder/sft` and `folder/reward_model`."""
    common = {"epochs": 1, "max_length": 256, "learning_rate": 1e-3, "save_steps": 2, "bf16": False}
    sft = SFTTrainer(
        policy, SFTConfig(output_dir=str(folder / "sft"), batch_size=4, microbatch_size=2, **common), DEMONSTRATIONS
    )
    sft.train()
    sft.save_model(str(folder / "sft"))
    config = RewardConfig(
        output_dir=str(folder / "reward_model"), prompts_per_batch=4, microbatch_size=2, normalizer_samples=21, **common
    )
    reward = RewardTrainer(policy, config, train_dataset=RANKINGS[:12], eval_dataset=RANKINGS[12:])
    reward.train()
    reward.evaluate()
    reward.save_model(str(folder / "reward_model"))
    assert is_sharded(sft.model_wrapped) == is_sharded(reward.model_wrapped) == sharded


def main(config: str, folder: str, policy: str) -> None:
    os.environ |= {key: value for key, value in launch_environment(config).items() if key.startswith("FSDP_")}
    transformers.trainer.Accelerator = sharded_accelerator
    train(Path(folder), policy, sharded=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
