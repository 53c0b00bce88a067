"""PPO with `rollouts_ahead: 1`, in one process or in several: the responses, weights and log of a run.

python tests/reference/ahead_worker.py FOLDER POLICY OUTPUT.pt UPDATES      goes on from what FOLDER holds
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from reference.ppo_runs import StopAfter, lines, make, weights


def run(folder: str | Path, policy: str | Path, updates: int = 4) -> dict[str, Any]:
    """Train for four updates, a checkpoint after each; end after `updates` of them."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    trainer = make(
        folder, policy, callbacks=[StopAfter(updates)], updates=4, save_steps=1, learning_rate=5e-3, rollouts_ahead=1,
        preflight=False, lr_schedule="constant",
    )  # fmt: skip
    responses: list[list[list[int]]] = []
    collect = trainer.collect

    def watched(prompts):
        rollout = collect(prompts)
        responses.append(rollout.response_ids)
        return rollout

    trainer.collect = watched
    trainer.train(resume_from_checkpoint=True)
    shares = gather_object([responses])
    together = [[ids for row in zip(*parts, strict=True) for ids in row] for parts in zip(*shares, strict=True)]
    return {"responses": together, "weights": weights(trainer), "logs": lines(folder, "metrics.jsonl")}


def main(folder: str, policy: str, output: str, updates: str) -> None:
    found = run(folder, policy, int(updates))
    if torch.distributed.get_rank() == 0:
        torch.save(found, output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
