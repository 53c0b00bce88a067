"""SFT, then PPO of its adapter, over a base in 4 bits: whole, and killed half-way and resumed; in one process or two.

torchrun --nproc_per_node 2 tests/reference/quantized_worker.py BASE FOLDER OUTPUT.pt
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from reference import fsdp_worker, sharded_trainers
from reference.sharded_trainers import Killed, Watch
from reference.two_processes import GivenResponses
from rlhf.models.loading import in_4_bits, is_quantized

HOLDERS = ("rlhf.sft.model", "reward_models.model", "rlhf.ppo.build")
"""The modules that ask `held_in_4_bits`."""


def on_cpu(model: Any, dtype: torch.dtype, adapted: bool) -> dict[str, Any]:
    """What `held_in_4_bits` returns on a GPU: bitsandbytes computes slowly on a CPU, and rightly."""
    return {"quantization_config": in_4_bits(dtype, "cpu")["quantization_config"]}


def sft(base: str, folder: Path) -> dict[str, Any]:
    """Leave `folder`/whole and /resumed."""

    def make(name: str, dies_at: int | None = None) -> Any:
        changes = {"lora_rank": 4, "load_in_4bit": True, "learning_rate": 1e-3, "eval_steps": 0}
        return sharded_trainers.make("sft", base, folder / name, Watch(dies_at), **changes)

    for name, deaths in (("whole", ()), ("resumed", (3,))):
        for dies_at in (*deaths, None):
            trainer = make(name, dies_at)
            start = trained(trainer.model)
            try:
                trainer.train(resume_from_checkpoint=True)
            except Killed:
                trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(folder / name))
        trainer.accelerator.wait_for_everyone()
    return {"start": start, "quantized": is_quantized(trainer.model)}


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def ppo(policy: Path, folder: Path) -> dict[str, Any]:
    def make(name: str, callbacks: Any = None) -> Any:
        changes: dict[str, Any] = {"load_in_4bit": True, "save_steps": 1, "callbacks": callbacks}
        changes |= {"max_grad_norm": 1e9, "learning_rate": 0.01, "value_learning_rate": 0.03}
        return fsdp_worker.make(folder / name, str(policy), None, GivenResponses(), **changes)

    whole = make("whole")
    result = {"start": trained(whole.actor_critic), "quantized": is_quantized(whole.actor_critic.policy)}
    result["whole"] = fsdp_worker.run(whole)["state"]
    make("resumed", [fsdp_worker.StopAfterOne()]).train()
    return result | {"resumed": fsdp_worker.run(make("resumed"), resume=True)["state"]}


def run(base: str, folder: Path) -> dict[str, Any]:
    result = {"sft": sft(base, folder / "sft")}
    return result | {"ppo": ppo(folder / "sft" / "whole", folder / "ppo")}


def main(base: str, folder: str, output: str) -> None:
    for module in HOLDERS:
        importlib.import_module(module).held_in_4_bits = on_cpu
    result = run(base, Path(folder))
    if distributed.get_rank() == 0:
        torch.save(result | {"processes": distributed.get_world_size()}, output)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
