"""PPO-ptx on fixed responses: what each optimizer step was given and what was logged, in one process or in several.

python tests/reference/ptx_worker.py FOLDER KIND DATA OUTPUT.pt      FOLDER as in two_processes.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from reference import two_processes


def run(root: str | Path, kind: str, data: str | Path, folder: str | Path, **changes: Any) -> dict[str, Any]:
    """Two updates of four optimizer steps each, with a large coefficient."""
    settings = {"pretraining_data": str(data), "pretraining_coef": 3.0, "pretraining_rows": 4, "pretraining_length": 24}
    settings |= {"pretraining_held_out": 3} | two_processes.mode("ppo", kind) | changes
    return two_processes.ppo(*two_processes.folders(root, kind), str(folder), **settings)


def main(root: str, kind: str, data: str, output: str) -> None:
    found = run(root, kind, data, Path(output).with_suffix(""), tokens_per_microbatch=60)
    if torch.distributed.get_rank() == 0:
        torch.save(found, output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
