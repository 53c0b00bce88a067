"""Run ours on the toy world until the gold score passes the mark. Started by the benchmark, on a job file."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from rlhf.run import console

console.quiet()

from jobs import Job, Result, serve  # noqa: E402
from toy_clock import GoldClock, MarkPassed, settings  # noqa: E402

from reward_models import RewardModel  # noqa: E402
from rlhf import config as configs  # noqa: E402
from rlhf.models import loading as models  # noqa: E402
from rlhf.ppo.trainer import PPOConfig, PPOTrainer  # noqa: E402


def work(job: Job) -> Result:
    """Return gold score and seconds of training after every update, and seconds until the mark, None if it is never
    passed.

    `settings` win over the toy config's."""
    run = Path(job["run"])
    args = configs.from_dict(
        PPOConfig, settings()["ppo"] | job["settings"] | {"output_dir": job["folder"]}, "toy.yaml: ppo"
    )
    args = replace(args, seed=job["seed"], save_steps=0, updates=job["updates"] or args.updates)
    clock = GoldClock(job, models.load_tokenizer(str(run / "sft")))
    trainer = PPOTrainer(
        str(run / "sft"),
        RewardModel.load(str(run / "reward_model")),
        args=args,
        train_dataset=str(run / "rankings/prompts.jsonl"),
        callbacks=[clock],
    )
    clock.start()
    with contextlib.suppress(MarkPassed):
        trainer.train()
    return clock.result()


if __name__ == "__main__":
    serve(work)
