"""The loss of one micro-batch: the rollout's columns and the models' outputs, put into `ppo_math`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.ppo import math as ppo_math
from rlhf.ppo.actor_critic import Outputs, Role
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.rollout import Rollout


def losses(
    rollout: Rollout, rows: list[int], outputs: Outputs, roles: Sequence[Role], count: float, args: PPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of `rows` for the models in `roles`, and its statistics, each divided by the minibatch's `count`.

    outputs: of these rows, [B, T] each.
    """
    some = outputs.logprobs if outputs.logprobs is not None else outputs.values
    assert some is not None
    index, width, device = torch.tensor(rows), some.shape[1], some.device

    def column(values: Tensor | None) -> Tensor:
        assert values is not None
        return values[index, :width].to(device)

    mask = column(rollout.trained_mask)
    loss, stats = torch.zeros((), device=device), {}
    if "policy" in roles:
        assert outputs.logprobs is not None
        old_logprobs, weights = column(rollout.logprobs), None
        if rollout.engine_logprobs is not None:
            theirs = column(rollout.engine_logprobs)
            weights = ppo_math.importance_weights(old_logprobs, theirs, mask, args.importance_cap)
        policy_loss, policy = ppo_math.policy_loss(
            outputs.logprobs, old_logprobs, column(rollout.advantages), mask, args.clip_ratio, count, weights
        )
        error = torch.where(mask, (outputs.logprobs.detach() - old_logprobs).exp() - 1.0, 0.0).abs().max()
        stats = {"policy_loss": policy_loss.detach(), "ratio_error": error} | policy._asdict()
        loss = loss + policy_loss
    if "value" in roles:
        assert outputs.values is not None
        value_loss, value = ppo_math.value_loss(
            outputs.values, column(rollout.values), column(rollout.returns), mask, args.clip_value, count
        )
        stats |= {"value_loss": value_loss.detach()} | value._asdict()
        loss = loss + (args.value_loss_coef if args.value_model == "shared_trunk" else 1.0) * value_loss
    return loss, stats
