"""PPO's evaluation on nine prompts, two to a forward: what came out, and which prompts this process scored.

python tests/reference/evaluation_worker.py FOLDER POLICY OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch import distributed

from reference.ppo_runs import WORDS, low_share, make
from reference.tiny_chain import shake
from rlhf.ppo import scoring

ROWS = [{"prompt": f"Say {word}" + " again" * (i % 3)} for i, word in enumerate(WORDS[:9])]


def evaluated(folder: Path, policy: str) -> tuple[dict[str, float], list[str]]:
    scoring.FORWARD_ROWS = 2
    seen: list[str] = []

    def score(prompts, completions, completion_ids, **columns):
        seen.extend(prompts)
        return low_share(prompts, completions, completion_ids)

    trainer = make(folder, policy, score, eval_rows=ROWS, temperature=0.8)
    shake(trainer.actor_critic.policy, 5, 0.05)  # away from the reference
    return trainer.evaluate(), seen


def main(folder: str, policy: str, output: str) -> None:
    Path(output + os.environ["RANK"]).write_text(json.dumps(evaluated(Path(folder), policy)))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
