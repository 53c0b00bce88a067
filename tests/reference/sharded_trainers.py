"""SFT or a reward model: whole, packed, and killed half-way and resumed; in one process, or in two by DDP or FSDP2.

torchrun --nproc_per_node 2 tests/reference/sharded_trainers.py CONFIG.yaml|ddp OUTPUT.pt FOLDER POLICY STAGE
"""

from __future__ import annotations

import json
import logging
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from reference.fsdp_worker import shard, share
from reference.tiny_chain import chain
from reference.two_processes import DEMONSTRATIONS, RANKINGS
from reward_models import RewardConfig, RewardTrainer
from rlhf.metrics import read_metrics
from rlhf.models import packing
from rlhf.run import distributed as sharding
from rlhf.sft.trainer import SFTConfig, SFTTrainer

# 11 rows in steps of 4: the last step of an epoch has 3. A checkpoint after every second of 6 steps.
SETTINGS: dict[str, Any] = {
    "epochs": 2, "max_length": 256, "learning_rate": 1e-4, "save_steps": 2, "eval_steps": 2, "logging_steps": 1,
    "microbatch_size": 1, "max_grad_norm": 0.3, "bf16": False,
}  # fmt: skip
STAGES = ("sft", "reward_model")
FILES = {"full": "model.safetensors", "tied": "model.safetensors", "lora": "adapter_model.safetensors"}


def build(folder: Path, kind: str, model, tokenizer) -> str:
    """A policy's folder: full weights, tied embeddings, or an adapter without dropout (its draws differ by process)."""
    folder.mkdir()
    if kind == "tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    policy = chain(folder, model, tokenizer, kind == "lora")[0]
    for adapter in folder.glob("*/adapter_config.json"):
        adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"lora_dropout": 0.0}))
    return str(policy)


class Killed(Exception):
    pass


class Watch(TrainerCallback):
    """Keep the clipped gradient of every step (on the first process), and die after a step."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.dies_at = dies_at
        self.share = 1.0
        self.units: list[str] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:  # after a step, and no evaluation, which leaves the root's parameters whole
            self.units = sorted({type(module).__name__ for module in model.modules() if sharding.is_sharded(module)})
            self.share = share(model)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.dies_at:
            raise Killed

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len({isinstance(grad, DTensor) for grad in named.values()}) == 1
        whole = sharding.full(named)
        self.gradients.append({name: grad.clone() for name, grad in whole.items() if grad is not None})


class Passed(logging.Handler):
    """The number of checks in the last "preflight: N checks passed"."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"preflight: (\d+) checks passed", record.getMessage()):
            self.count = int(found[1])


def make(stage: str, policy: str, folder: Path, watch: TrainerCallback, keep_best: bool = True, **changes: Any) -> Any:
    config = {"output_dir": str(folder)} | SETTINGS | changes
    if stage == "sft":
        rows, held_out = DEMONSTRATIONS[:11], DEMONSTRATIONS[11:]
        return SFTTrainer(policy, SFTConfig(batch_size=4, **config), rows, held_out, callbacks=[watch])
    config |= {"prompts_per_batch": 4, "normalizer_samples": 21, "keep_best": keep_best}
    rows, held_out = RANKINGS[:11], RANKINGS[11:]
    return RewardTrainer(policy, RewardConfig(**config), train_dataset=rows, eval_dataset=held_out, callbacks=[watch])


def packed(stage: str, policy: str, folder: Path) -> int:
    """Leave `folder`, trained with two rows in a micro-batch, packed; return the number of steps that packed theirs."""
    rows: list[int] = []
    forward = packing.as_one_row

    def watched(model: Any, input_ids: torch.Tensor, *given: Any) -> Any:
        rows.append(len(input_ids))
        return forward(model, input_ids, *given)

    chosen = packing.use_flash
    if stage == "sft":  # as on GPUs: chosen before the weights are cut, and told where rows end
        packing.use_flash = lambda model, *given: packing.set_attention(model, packing.VARLEN)
    trainer = make(stage, policy, folder, Watch(), microbatch_size=2, packing="on")
    before = trainer.training_step
    trainer.training_step = lambda *given, **named: rows.append(0) or before(*given, **named)
    packing.as_one_row = watched
    try:
        trainer.train()
    finally:
        packing.as_one_row, packing.use_flash = forward, chosen
    trainer.save_model(str(folder))
    return sum(before == 0 and packed > 1 for before, packed in pairwise(rows))  # a step, and at once packed rows


def run(stage: str, policy: str, folder: Path) -> dict[str, Any]:
    """Leave `folder`/whole, /resumed and /packed; return what one saw while the first was trained."""
    watch, passed = Watch(), Passed()
    logger = logging.getLogger("rlhf")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(passed)
    whole = make(stage, policy, folder / "whole", watch)
    whole.train(resume_from_checkpoint=True)
    logger.removeHandler(passed)
    logger.setLevel(level)
    evaluated = whole.evaluate()
    whole.save_model(str(folder / "whole"))
    try:
        make(stage, policy, folder / "resumed", Watch(dies_at=3)).train(resume_from_checkpoint=True)
    except Killed:
        whole.accelerator.wait_for_everyone()
    resumed = make(stage, policy, folder / "resumed", Watch())
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model(str(folder / "resumed"))
    whole.accelerator.wait_for_everyone()
    logs = [
        [{name: value for name, value in row.items() if "second" not in name} for row in read_metrics(file)]
        for file in (folder / "whole" / "metrics.jsonl", folder / "resumed" / "metrics.jsonl")
    ]
    evaluated = {name: value for name, value in evaluated.items() if "second" not in name and "runtime" not in name}
    return {
        "gradients": watch.gradients, "units": watch.units, "share": watch.share, "preflight": passed.count,
        "packed": packed(stage, policy, folder / "packed"),
        "logs": logs, "evaluated": evaluated, "best": vars(whole.best) if stage == "reward_model" else {},
        "normalizers": [vars(t.normalizer) for t in (whole, resumed)] if stage == "reward_model" else [],
    }  # fmt: skip


def main(config: str, output: str, folder: str, policy: str, stage: str) -> None:
    if config != "ddp":
        shard(config)
    results = run(stage, policy, Path(folder, stage))
    if distributed.get_rank() == 0:
        torch.save(results, output)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
