"""PPO's mathematics once more: NumPy float64, one token at a time, no vectorisation, no masks that hide an index.

Written from the papers (1707.06347, 1506.02438, 1909.08593, 2403.17031), not from `rlhf.ppo.math`. A rollout is a
list of rows; a row is a list of its real tokens' numbers, so that padding cannot enter.
"""

from __future__ import annotations

import math

import numpy as np


def token_logprobs(hidden, weight, targets, temperature, after_head=lambda logits: logits):
    """(log-prob of the target, entropy) of one position, by the definition of softmax."""
    logits = after_head(np.asarray(weight, np.float64) @ np.asarray(hidden, np.float64)) / temperature
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    logprobs = [x - top - math.log(total) for x in logits]  # not log(probability): that underflows at -745 nats
    entropy = -sum(math.exp(logp) * logp for logp in logprobs if math.exp(logp) > 0)
    return logprobs[targets], entropy


def kl_estimate(logprob, reference_logprob, kind):
    """One token's estimate of KL(policy || reference), from the probability ratio r = reference / policy."""
    r = math.exp(reference_logprob - logprob)
    return {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": r - 1 - math.log(r)}[kind]


def token_rewards(score, kl, kl_coef):
    rewards = [-kl_coef * k for k in kl]
    rewards[len(kl) - 1] += score
    return rewards


def gae(rewards, values, gamma, lam):
    """Advantages as the explicit double sum of discounted deltas (1506.02438, eq. 16), and returns."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    advantages = [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def moments(rows):
    """Mean and population variance of all real numbers of a ragged rollout."""
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    return mean, sum((x - mean) ** 2 for x in flat) / len(flat)


def standardize(rows, mean_var=None, keep_mean=False):
    """Each number in standard deviations from the mean; `keep_mean` adds the mean again (2403.17031, detail 18)."""
    mean, var = moments(rows) if mean_var is None else mean_var
    return [[(x - mean) / math.sqrt(var + 1e-8) + (mean if keep_mean else 0.0) for x in row] for row in rows]


def masked_mean(rows, count=None):
    flat = [x for row in rows for x in row]
    return sum(flat) / (len(flat) if count is None else count)


def explained_variance(rows, return_rows):
    """Share of the returns' variance that the values explain; 1e-8 keeps equal returns from dividing by 0."""
    values, returns = (np.concatenate([np.asarray(row, np.float64) for row in r]) for r in (rows, return_rows))
    return 1.0 - np.var(returns - values) / (np.var(returns) + 1e-8)


def adapt_kl_coef(kl_coef, kl_nats, target_nats, responses, horizon):
    """Ziegler et al. 2019, section 2.2: a proportional controller of log(coefficient), its error clipped at 20%."""
    return kl_coef + kl_coef * float(np.clip((kl_nats - target_nats) / target_nats, -0.2, 0.2)) * responses / horizon


def importance_weights(rows, engine_rows, cap):
    """Probability of each token under the trainer over that under the engine, at most `cap` (Yao et al. 2025)."""
    return [
        [min(math.exp(ours) / math.exp(theirs), cap) for ours, theirs in zip(row, engine_row, strict=True)]
        for row, engine_row in zip(rows, engine_rows, strict=True)
    ]


def policy_loss(rows, old_rows, advantage_rows, clip_ratio, count=None, weight_rows=None):
    """(loss, share clipped, KL(old || new) by k3, largest ratio, largest |ratio - 1|) of a ragged rollout."""
    objective, clipped, kl, n, largest, error = 0.0, 0, 0.0, 0, 0.0, 0.0
    weight_rows = [[1.0] * len(row) for row in rows] if weight_rows is None else weight_rows
    for row, old, advantages, weights in zip(rows, old_rows, advantage_rows, weight_rows, strict=True):
        for new_logp, old_logp, a, weight in zip(row, old, advantages, weights, strict=True):
            ratio = math.exp(new_logp - old_logp)
            bounded = min(max(ratio, 1 - clip_ratio), 1 + clip_ratio)
            objective += weight * min(ratio * a, bounded * a)
            clipped += bounded * a < ratio * a
            kl += ratio - 1 - (new_logp - old_logp)
            largest, error = max(largest, ratio), max(error, abs(ratio - 1))
            n += 1
    n = n if count is None else count
    return -objective / n, clipped / n, kl / n, largest, error


def value_loss(rows, old_rows, return_rows, clip_value, count=None):
    """(loss, share clipped) of a ragged rollout."""
    loss, clipped, n = 0.0, 0, 0
    for row, old, returns in zip(rows, old_rows, return_rows, strict=True):
        for v, old_v, target in zip(row, old, returns, strict=True):
            bounded = min(max(v, old_v - clip_value), old_v + clip_value)
            loss += 0.5 * max((v - target) ** 2, (bounded - target) ** 2)
            clipped += (bounded - target) ** 2 > (v - target) ** 2
            n += 1
    n = n if count is None else count
    return loss / n, clipped / n


def adam(parameters, gradients, steps, rate, beta1, beta2, epsilon):
    """Adam (1412.6980, algorithm 1) on a vector whose gradient does not change."""
    x, m, v = np.array(parameters, np.float64), 0.0, 0.0
    g = np.array(gradients, np.float64)
    for t in range(1, steps + 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        x = x - rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + epsilon)
    return x
