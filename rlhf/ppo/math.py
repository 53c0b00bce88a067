"""PPO's mathematics: pure functions of tensors, float32 inside; no model, no configuration, no logging.

B is the number of responses, T the response axis. Responses are right-padded; `mask` is a non-empty prefix of True
that comes from the generated lengths, never from token ids. ``hidden[:, t]`` and ``values[:, t]`` belong to the state
*before* response token t. Outputs are 0 on padding, and no input on padding can change a result.

Sources: Schulman et al. 2017 (PPO, 1707.06347), Schulman et al. 2016 (GAE, 1506.02438), Ziegler et al. 2019
(1909.08593), Stiennon et al. 2020 (2009.01325), Ouyang et al. 2022 (InstructGPT, 2203.02155), Huang et al.
2024 ("The N+ implementation details of RLHF with PPO", 2403.17031).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.models.logprobs import token_logprobs as token_logprobs


class PolicyStats(NamedTuple):
    """Scalar statistics of `policy_loss`. Over micro-batches the first two add up; take the maximum of the last two."""

    clip_fraction: Tensor  # share of tokens whose objective is the clipped one
    approx_kl_nats: Tensor  # mean k3 estimate of KL(old || new)
    ratio_max: Tensor
    ratio_error: Tensor  # largest |ratio - 1|


class ValueStats(NamedTuple):
    """Statistics of `value_loss`. value_clip_fraction: share of tokens whose clipped square is the larger one."""

    value_clip_fraction: Tensor


def kl_estimate(
    logprobs: Float[Tensor, "B T"],
    reference_logprobs: Float[Tensor, "B T"],
    kind: Literal["k1", "k2", "k3"],
) -> Float[Tensor, "B T"]:
    """Estimate KL(policy || reference) per token in nats, from tokens that the policy sampled.

    With ``d = logprobs - reference_logprobs``: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased,
    never negative), k3 = exp(-d) - 1 + d (unbiased, never negative). J. Schulman, "Approximating KL
    divergence" (2020). Only k1 enters the reward.
    """
    difference = logprobs.float() - reference_logprobs.float()
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kind={kind!r}; use 'k1', 'k2' or 'k3'")


def token_rewards(
    scores: Float[Tensor, "B"],
    kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    kl_coef: float,
    step_scores: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """Compute ``reward[t] = -kl_coef * kl[t]``, plus the score at the last real token (InstructGPT, sec. 3.5 eq. 2).

    step_scores: added where they stand, at the last token of each step and 0 elsewhere (Uesato et al. 2022, 2211.14275,
    section 2.5; Lightman et al. 2023, 2305.20050).
    """
    _check_mask(mask)
    rewards = torch.where(mask, -kl_coef * kl.float(), 0.0)
    if step_scores is not None:
        rewards = rewards + torch.where(mask, step_scores.float(), 0.0)
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(-1, last, scores.float()[:, None])


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Compute generalised advantage estimates, and the returns that the value model learns.

    ``delta[t] = reward[t] + gamma * value[t+1] - value[t]``, ``advantage[t] = delta[t] + gamma * lam *
    advantage[t+1]``, ``return[t] = advantage[t] + value[t]`` (1506.02438, eq. 11-16). The value after the last
    real token is 0, for truncated responses too: the score already judges the whole response.
    """
    _check_mask(mask)
    rewards = torch.where(mask, rewards.float(), 0.0)
    values = torch.where(mask, values.float(), 0.0)
    advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(advantage)
    columns = []
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, 0.0)
        next_value = values[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def moments(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Compute mean and population variance over real tokens."""
    mean = masked_mean(x, mask)
    return mean, masked_mean((x.float() - mean).square(), mask)


def standardize(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], mean_var: tuple[Tensor, Tensor] | None = None
) -> Float[Tensor, "B T"]:
    """Compute ``(x - mean) / sqrt(var + 1e-8)`` over real tokens.

    mean_var: mean and variance over the real tokens of several processes; default: of `x` alone."""
    mean, var = moments(x, mask) if mean_var is None else mean_var
    return torch.where(mask, (x.float() - mean) * torch.rsqrt(var + 1e-8), 0.0)


def rescale(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], mean_var: tuple[Tensor, Tensor] | None = None
) -> Float[Tensor, "B T"]:
    """Scale to unit variance and keep the mean: ``(x - mean) / sqrt(var + 1e-8) + mean`` (2403.17031, detail 18)."""
    mean, var = moments(x, mask) if mean_var is None else mean_var
    return torch.where(mask, (x.float() - mean) * torch.rsqrt(var + 1e-8) + mean, 0.0)


def importance_weights(
    logprobs: Float[Tensor, "B T"],
    engine_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    cap: float,
) -> Float[Tensor, "B T"]:
    """Compute ``min(exp(logprobs - engine_logprobs), cap)`` per token; 0 on padding, no gradient.

    Truncated importance sampling (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training"; Ionides 2008) corrects for an engine that samples with the trainer's weights, but in another precision
    or by other kernels, and so from another distribution. `logprobs` are the trainer's before the update
    (`old_logprobs` of `policy_loss`). cap=float("inf") truncates nothing.
    """
    log_ratio = torch.where(mask, logprobs.detach().float() - engine_logprobs.float(), 0.0)
    return torch.where(mask, log_ratio.exp().clamp(max=cap), 0.0)


def policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    clip_ratio: float,
    count: float | Tensor | None = None,
    weights: Float[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, ""], PolicyStats]:
    """Compute PPO's clipped surrogate (1707.06347, eq. 7), a mean over `count` tokens (default: those of `mask`).

    ``ratio = exp(logprobs - old_logprobs)``; ``objective = min(ratio * A, clip(ratio, 1 - c, 1 + c) * A)``;
    ``loss = -objective``. `count` is the number of real tokens in the whole minibatch, over all its
    micro-batches and processes, so that no split changes the gradient. `weights` (`importance_weights`) multiply
    each token's objective and carry no gradient; they enter none of the statistics.
    """
    log_ratio = torch.where(mask, logprobs.float() - old_logprobs.float(), 0.0)
    ratio = log_ratio.exp()
    advantages = torch.where(mask, advantages.float(), 0.0)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_ratio, 1.0 + clip_ratio) * advantages
    objective = torch.minimum(unclipped, clipped)
    if weights is not None:
        objective = objective * torch.where(mask, weights.detach().float(), 0.0)
    with torch.no_grad():
        stats = PolicyStats(
            clip_fraction=masked_mean((clipped < unclipped).float(), mask, count),
            approx_kl_nats=masked_mean(torch.expm1(log_ratio) - log_ratio, mask, count),
            ratio_max=torch.where(mask, ratio, 0.0).max(),  # the ratio is 1 on padding, which could be the maximum
            ratio_error=(ratio - 1.0).abs().max(),
        )
    return -masked_mean(objective, mask, count), stats


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    clip_value: float,
    count: float | Tensor | None = None,
) -> tuple[Float[Tensor, ""], ValueStats]:
    """Compute ``0.5 * max((v - R)^2, (clip(v, old - c, old + c) - R)^2)``, a mean over `count` tokens (2403.17031).

    count: as in `policy_loss`. clip_value=float("inf") gives the plain half squared error.
    """
    old = torch.where(mask, old_values.float(), 0.0)
    new = torch.where(mask, values.float(), 0.0)
    target = torch.where(mask, returns.float(), 0.0)
    squares = (new - target).square()
    clipped = (torch.clamp(new, old - clip_value, old + clip_value) - target).square()
    loss = 0.5 * masked_mean(torch.maximum(squares, clipped), mask, count)
    with torch.no_grad():
        stats = ValueStats(masked_mean((clipped > squares).float(), mask, count))
    return loss, stats


def masked_mean(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], count: float | Tensor | None = None
) -> Float[Tensor, ""]:
    """Sum `x` over real tokens and divide by `count` (default: the number of real tokens)."""
    total = torch.where(mask, x.float(), 0.0).sum()
    return total / (mask.sum() if count is None else count)


def explained_variance(
    values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Compute ``1 - Var(returns - values) / Var(returns)`` over real tokens; 1 is perfect, 0 as good as a constant."""
    _, error = moments(returns.float() - values.float(), mask)
    _, spread = moments(returns, mask)
    return 1.0 - error / (spread + 1e-8)


def adapt_kl_coef(kl_coef: float, kl_nats: float, target_nats: float, responses: int, horizon: int) -> float:
    """Compute the next coefficient: ``coef * (1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon)``.

    Ziegler's controller (1909.08593, section 2.2). kl_nats is the mean over responses of the summed k1; the horizon
    counts responses.
    """
    error = min(max(kl_nats / target_nats - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * responses / horizon)


def _check_mask(mask: Tensor) -> None:
    if not bool(mask[:, 0].all()):
        raise ValueError("mask: a row without a real token; every response holds at least its stop token")
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("mask: a real token after padding; responses are right-padded")
