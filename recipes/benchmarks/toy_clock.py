"""Prepare the toy world for time to quality: settings, gold score, and a clock that stops while gold is measured."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from jobs import Job
from transformers import TrainerCallback

from rlhf import chat, evaluate
from rlhf import config as configs
from rlhf.rows.records import Prompt, read_prompts
from rlhf.run.lookup import look_up
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.engine import model_stop_ids

TOY = look_up("toy.yaml", "toy.yaml: no such file", "configs")


def settings() -> dict[str, Any]:
    """Return the toy config's sections."""
    return configs.read_yaml(TOY)[0]


def judge() -> Any:
    """Return the gold score, which the toy config names under `evaluation.judge`."""
    return configs.import_function(settings()["evaluation"]["judge"])


def held_out(run: Path) -> list[Prompt]:
    """Return the run's evaluation prompts."""
    return read_prompts(str(run / "data/eval_prompts.jsonl"))


def sampled(model: Any, tokenizer: Any, prompts: list[Prompt], seed: int, n: int = 1) -> evaluate.PolicySamples:
    """Return n responses of a policy to every prompt."""
    engine = TransformersEngine(model, model_stop_ids(model, tokenizer), chat.pad_id(tokenizer))
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = settings()["evaluation"]["max_new_tokens"]
    return evaluate.sample_policy(
        prompts, tokenizer, engine, max_new_tokens=tokens, generator=generator, temperature=1.0, n=n
    )


class MarkPassed(Exception):
    """End training when the gold score has passed the mark, or time is up."""


class GoldClock(TrainerCallback):
    """Record the gold score on held-out prompts after every update, and the seconds of training until then.

    The clock stands still while gold is measured. Ends training (MarkPassed) when the score reaches the job's `mark`,
    or without it after `at_most` seconds of training (None: never). Sampling has a generator of its own, so that it
    does not change the training it watches.
    """

    def __init__(self, job: Job, tokenizer: Any):
        self.prompts, self.tokenizer, self.seed = held_out(Path(job["run"])), tokenizer, job["seed"]
        self.mark, self.at_most = job["mark"], job.get("at_most")
        self.judge = judge()
        self.history: list[dict[str, float]] = []
        self.seconds: float | None = None  # until the mark
        self._spent, self._since = 0.0, time.perf_counter()

    def start(self) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._spent += time.perf_counter() - self._since
        model = kwargs["model"]
        gold = self.gold(getattr(model, "policy", model))  # trl hands over policy and value model in one
        self.history.append({"update": len(self.history) + 1, "seconds": self._spent, "gold_score": gold})
        print(self.history[-1], flush=True)
        if gold >= self.mark:
            self.seconds = self._spent
            raise MarkPassed
        if self.at_most is not None and self._spent >= self.at_most:
            raise MarkPassed
        self._since = time.perf_counter()

    def gold(self, policy: Any) -> float:
        with torch.no_grad():
            scores = evaluate.judge_samples(sampled(policy, self.tokenizer, self.prompts, self.seed), self.judge)
        return sum(scores) / len(scores)

    def result(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "trained_seconds": self._spent, "history": self.history}
