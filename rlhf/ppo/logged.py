"""The metrics of a PPO update, over all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.ppo import math as ppo_math
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.rollout import ReadyRollout
from rlhf.run import distributed

LARGEST = ("ratio_max", "ratio_error")  # statistics of which the maximum is logged, not the mean


def rollout_metrics(
    rollout: ReadyRollout, accelerator: Accelerator, args: PPOConfig, kl_coef: float
) -> dict[str, float]:
    """Average the rollout's numbers over the responses of all processes.

    `kl_nats` is the mean over responses of the summed k1, the same numbers that enter the reward. `score` is the raw
    score, `objective` the processed score minus its KL cost. A reward function's own mean is over the responses that
    it scored (`own_scores` is NaN where it does not apply). Unused responses (`rollout.used` False) are left out.
    """
    mask, kl = rollout.mask, rollout.kl
    lengths = rollout.response_tokens.float()
    entropies = (rollout.entropy * mask).sum(-1) / lengths
    used = rollout.used.float()
    columns = [rollout.raw_scores, rollout.scores, kl.sum(-1), entropies, lengths, rollout.stopped.float(), used]
    table = accelerator.gather(torch.stack(columns, dim=1).to(accelerator.device)).double().cpu()
    responses, table = len(table), table[table[:, -1] == 1, :-1]
    score, processed, kl_nats, entropy, tokens, stopped = table.unbind(1)
    per_token = torch.stack([rollout.values, rollout.returns, rollout.trained_mask.float()], dim=-1).to(
        accelerator.device
    )
    per_token = accelerator.gather(accelerator.pad_across_processes(per_token, dim=1))
    values, returns, real = per_token.cpu().unbind(-1)
    correlation = torch.corrcoef(torch.stack([score, tokens]))[0, 1].nan_to_num(0.0)
    steps = {}
    if rollout.step_scores is not None:
        summed = distributed.total(accelerator, rollout.step_scores[rollout.used].double().sum())
        steps = {"step_score": summed / distributed.total(accelerator, used.sum())}
    means = {
        name: float(accelerator.gather(own.to(accelerator.device)).nanmean())
        for name, own in rollout.own_scores.items()
    }
    return {
        "score": float(score.mean()),
        "score_std": float(score.std(correction=0)),
        "kl_nats": float(kl_nats.mean()),
        "objective": float((processed - kl_coef * kl_nats).mean()),
        **steps,
        "entropy_nats": float(entropy.mean()),
        "response_tokens": float(tokens.mean()),
        "eos_rate": float(stopped.mean()),
        "score_length_correlation": float(correlation),
        "explained_variance": float(ppo_math.explained_variance(values, returns, real.bool())),
        **({} if args.on_score_failure == "error" else {"dropped_responses": float(responses - len(table))}),
        **{name: mean for name, mean in means.items() if not math.isnan(mean)},
    }


def engine_metrics(rollout: ReadyRollout, accelerator: Accelerator, cap: float) -> dict[str, float]:
    """Measure the difference between the engine's and the trainer's probabilities, per token, over all processes.

    Return the mean importance weight, the share of weights cut to `cap`, KL(engine || trainer) in nats (k3) and, with
    rollouts_ahead, the updates between the two; {} if the engine reports no log-probabilities."""
    if rollout.engine_logprobs is None:
        return {}
    mask = rollout.trained_mask
    old, engine = (torch.where(mask, x, 0.0) for x in (rollout.logprobs, rollout.engine_logprobs))
    weights = ppo_math.importance_weights(old, engine, mask, cap)
    kl = ppo_math.kl_estimate(engine, old, "k3")
    sums = torch.stack([x.double().sum() for x in (weights, mask & (old - engine > math.log(cap)), kl, mask)])
    weight, capped, kl_nats, tokens = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
    return {
        "importance_weight": weight / tokens,
        "importance_capped": capped / tokens,
        "engine_kl_nats": kl_nats / tokens,
        **({} if rollout.staleness is None else {"rollout_staleness_updates": rollout.staleness}),
    }


def samples(rollout: ReadyRollout, step: int, count: int) -> list[dict[str, Any]]:
    """Return the rollout's first ``count`` rows as lines of samples.jsonl, with each reward function's own score.

    A score is null where the function does not apply, or scoring failed and the response was dropped."""
    scores = {"score": rollout.raw_scores, **rollout.own_scores}
    return [
        {
            "step": step,
            "prompt": rollout.prompts[i].messages,
            "response": rollout.texts[i],
            **{name: None if x[i].isnan() else float(x[i]) for name, x in scores.items()},
            "kl_nats": float(rollout.kl[i].sum()),
            "stopped": bool(rollout.stopped[i]),
        }
        for i in range(min(count, len(rollout)))
    ]


class StepStatistics:
    """The statistics of one optimizer step, collected over its micro-batches.

    Each micro-batch adds its share of a mean over the minibatch's tokens; of the names in LARGEST the maximum is kept.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, **shares: Tensor) -> None:
        """Add one micro-batch's shares."""
        for name, share in shares.items():
            value = share.detach()
            if name in self.totals:
                value = (torch.maximum if name in LARGEST else torch.add)(self.totals[name], value)
            self.totals[name] = value

    def over(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the statistics over all processes."""
        return distributed.joined(accelerator, self.totals, LARGEST)


def update_metrics(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the statistics of an update's optimizer steps: means, the largest ratio, and the first step's error."""
    metrics = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0] if name != "ratio_error"}
    metrics["ratio_max"] = max(step["ratio_max"] for step in steps)
    metrics["step0_ratio_error"] = steps[0]["ratio_error"]
    metrics["optimizer_steps"] = len(steps)
    return metrics


class Clock:
    """A clock of one update: wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new update."""
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys(("generate", "score", "logprobs", "update"), 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time spent inside the context to a phase."""
        begun = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - begun

    def metrics(self, response_tokens: float) -> dict[str, float]:
        """Return the seconds of each phase and of the whole update, and its response tokens per second."""
        total = time.perf_counter() - self.started
        phases = {f"{phase}_seconds": seconds for phase, seconds in self.seconds.items()}
        return phases | {"step_seconds": total, "tokens_per_second": response_tokens / total}
