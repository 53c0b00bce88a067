"""Make a toy chain up to its reward model, and measure the mark: midway between the gold scores of SFT and of its
best-of-16.

python recipes/benchmarks/toy_mark.py job.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf.run import console

console.quiet()

import numpy as np  # noqa: E402
from jobs import BENCHMARKS, Job, Result, serve  # noqa: E402
from toy_clock import TOY, held_out, judge, sampled  # noqa: E402

from reward_models import RewardModel  # noqa: E402
from rlhf import config as configs  # noqa: E402
from rlhf import evaluate  # noqa: E402
from rlhf.models import loading as models  # noqa: E402

BEST_OF = 16


def work(job: Job) -> Result:
    """{"sft", "best_of_16", "mark"}: gold scores on the held-out prompts."""
    run = Path(job["run"])
    make_chain(run, job["seed"])  # also where it is complete: another chain's mark would be another one
    model, tokenizer = models.load_policy(str(run / "sft")).eval(), models.load_tokenizer(str(run / "sft"))
    prompts, gold = held_out(run), judge()
    samples = sampled(model, tokenizer, prompts, job["seed"], n=BEST_OF)
    golds = np.array(evaluate.judge_samples(samples, gold)).reshape(len(prompts), BEST_OF)
    scores = evaluate.judge_samples(samples, RewardModel.load(str(run / "reward_model")))
    picked = evaluate.best_of_n(np.array(scores).reshape(len(prompts), BEST_OF))
    best = float(golds[np.arange(len(prompts)), picked].mean())
    sft = float(golds.mean())
    return {"sft": sft, f"best_of_{BEST_OF}": best, "mark": (sft + best) / 2}


def make_chain(run: Path, seed: int, last: str = "reward_model") -> None:
    """Run the toy chain's stages up to one, by the recipes' own functions; complete stages are skipped."""
    sys.path.insert(0, str(BENCHMARKS.parent))
    import chain

    config = configs.load(chain.ChainConfig, ["--config", str(TOY), "--output_dir", str(run), "--seed", str(seed)])
    for step in chain.steps_of(config):
        step.run(step.config)
        if step.name == last:
            break


if __name__ == "__main__":
    serve(work)
