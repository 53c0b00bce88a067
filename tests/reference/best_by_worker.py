"""`best_by` on five prompts and on one: the mean scores, and the prompts that this process sampled for.

python tests/reference/best_by_worker.py FOLDER POLICY OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import distributed

from reference.two_processes import DEMONSTRATIONS, PROMPTS
from rlhf.rows.records import read_prompts
from rlhf.sft.trainer import SFTConfig, SFTTrainer
from rlhf_recipes.best_by import BestByScore

ROWS = [{"prompt": row["prompt"]} for row in PROMPTS[:5]]


def scored(folder: Path, policy: str) -> list[tuple[float, list[str]]]:
    config = SFTConfig(output_dir=str(folder), batch_size=2, microbatch_size=1, bf16=False)
    trainer = SFTTrainer(policy, config, DEMONSTRATIONS[:4])
    found = []
    for rows in (ROWS, ROWS[:1]):
        seen: list[str] = []

        def score(prompts: list[str], completion_ids: list[list[int]], seen: list[str] = seen, **columns: Any) -> Any:
            seen.extend(prompts)
            return [sum(ids) / 1000 for ids in completion_ids]

        found.append((BestByScore(trainer, score, read_prompts(rows), 6, 3).score(), seen))
    return found


def main(folder: str, policy: str, output: str) -> None:
    Path(output + os.environ["RANK"]).write_text(json.dumps(scored(Path(folder), policy)))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
