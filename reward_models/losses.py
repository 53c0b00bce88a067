"""Losses over ranked responses and over labelled steps: tensors in, tensors out, float32 inside.

The responses of several prompts lie on one flat axis ``n``; ``prompts[i]`` is the index of response i's prompt, so
prompts may have different numbers of responses. A smaller rank is better. A pair is two responses to one prompt whose
ranks differ and whose texts differ: ``texts[i]`` numbers the different texts of a prompt (default: all differ).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid


def ranking_loss(
    scores: Float[Tensor, " n"],
    ranks: Float[Tensor, " n"],
    prompts: Int[Tensor, " n"] | None = None,
    texts: Int[Tensor, " n"] | None = None,
    count: Tensor | float | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Compute the Bradley-Terry loss ``-log sigmoid(r_w - r_l)``, mean over a prompt's pairs, then over prompts.

    With K responses to a prompt and no ties this is InstructGPT's equation 1 (section 3.5), whose factor is
    1 / C(K, 2). With ties we divide by the number of pairs that remain, so every prompt weighs the same.

    count: number of prompts to divide by. The trainer passes the number in the whole optimizer step, so that the
        losses of its micro-batches add up to the loss of the batch. Default: the prompts here that have a pair.
    weights: weight of every pair that response i wins (the responses to a prompt usually share one weight).
    """
    better, worse = ranked_pairs(ranks, prompts, texts)
    losses = -logsigmoid(scores.float()[better] - scores.float()[worse])
    return mean_over_prompts(_weighted(losses, better, weights), _pair_prompts(better, prompts), count)


def smoothed_ranking_loss(
    scores: Float[Tensor, " n"],
    ranks: Float[Tensor, " n"],
    epsilon: float,
    prompts: Int[Tensor, " n"] | None = None,
    texts: Int[Tensor, " n"] | None = None,
    count: Tensor | float | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Compute `ranking_loss` with label smoothing: each pair's label is assumed wrong with probability epsilon.

    ``-(1 - epsilon) log sigmoid(d) - epsilon log sigmoid(-d)``, d = r_w - r_l; its minimum is at
    d = log((1 - epsilon) / epsilon) instead of infinity (Mitchell, "A note on DPO with noisy preferences", 2023;
    Wang et al. 2401.06080, section 3.1).
    """
    better, worse = ranked_pairs(ranks, prompts, texts)
    difference = scores.float()[better] - scores.float()[worse]
    losses = -(1 - epsilon) * logsigmoid(difference) - epsilon * logsigmoid(-difference)
    return mean_over_prompts(_weighted(losses, better, weights), _pair_prompts(better, prompts), count)


def margin_ranking_loss(
    scores: Float[Tensor, " n"],
    ranks: Float[Tensor, " n"],
    margins: Float[Tensor, " n"],
    prompts: Int[Tensor, " n"] | None = None,
    texts: Int[Tensor, " n"] | None = None,
    count: Tensor | float | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Compute `ranking_loss` with a margin by which the better response must win: ``-log sigmoid(r_w - r_l - margin)``.

    margins: margin of every pair that response i wins (the responses to a prompt usually share one). Llama 2
    (2307.09288, equation 2) derives it from how much better the labelers found the response.
    """
    better, worse = ranked_pairs(ranks, prompts, texts)
    losses = -logsigmoid(scores.float()[better] - scores.float()[worse] - margins.float()[better])
    return mean_over_prompts(_weighted(losses, better, weights), _pair_prompts(better, prompts), count)


def centering_penalty(
    scores: Float[Tensor, " n"],
    ranks: Float[Tensor, " n"],
    prompts: Int[Tensor, " n"] | None = None,
    texts: Int[Tensor, " n"] | None = None,
    count: Tensor | float | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Compute ``(r_w + r_l)^2``, mean over a prompt's pairs, then over prompts. Arguments as in `ranking_loss`.

    Bradley-Terry leaves the level of each prompt's scores free. Added to the loss with a small coefficient (0.01), this
    keeps them around 0 (Eisenstein et al. 2312.09244, section 2; trl's `center_rewards_coefficient`).
    """
    better, worse = ranked_pairs(ranks, prompts, texts)
    squares = (scores.float()[better] + scores.float()[worse]) ** 2
    return mean_over_prompts(_weighted(squares, better, weights), _pair_prompts(better, prompts), count)


def step_loss(
    logits: Float[Tensor, " n"],
    labels: Int[Tensor, " n"],
    count: Tensor | float | None = None,
    weights: Float[Tensor, " n"] | None = None,
    epsilon: float = 0.0,
) -> Float[Tensor, ""]:
    """Compute ``-log sigmoid(z)`` for a step that is not wrong (label 1 or 0) and ``-log sigmoid(-z)`` for a wrong one
    (label -1), summed and divided by `count` (default: the number of steps).

    sigmoid(z) is then the probability that a step is not wrong: a neutral one counts as right (Lightman et al.
    2305.20050, appendix F). epsilon: the assumed probability that a label is wrong; it weighs the other term.
    """
    signed = torch.where(labels < 0, -logits.float(), logits.float())
    losses = -(1 - epsilon) * logsigmoid(signed) - epsilon * logsigmoid(-signed)
    return _mean(losses, count, weights)


def step_class_loss(
    logits: Float[Tensor, "n 3"],
    labels: Int[Tensor, " n"],
    count: Tensor | float | None = None,
    weights: Float[Tensor, " n"] | None = None,
    epsilon: float = 0.0,
) -> Float[Tensor, ""]:
    """Compute ``-log softmax(z)[label + 1]``, whose classes are wrong, neutral and right, summed and divided by `count`
    (default: the number of steps).

    epsilon: the assumed probability that a label is wrong, shared by the two other classes.
    """
    logs = log_softmax(logits.float(), dim=-1)
    own = logs.gather(1, labels.long()[:, None] + 1).squeeze(1)
    losses = -(1 - epsilon) * own - epsilon / 2 * (logs.sum(-1) - own)
    return _mean(losses, count, weights)


def category_loss(
    logits: Float[Tensor, "n K"],
    labels: Int[Tensor, "n K"],
    count: Tensor | float | None = None,
    weights: Float[Tensor, " n"] | None = None,
    epsilon: float = 0.0,
) -> Float[Tensor, ""]:
    """Compute ``-log sigmoid(z)`` for a category that a text has (label 1) and ``-log sigmoid(-z)`` for one that it has
    not (label 0), summed over all known labels and divided by `count` (default: their number). An unknown label (-1)
    adds nothing, and no gradient.

    weights: of the texts. epsilon: the assumed probability that a label is wrong; it weighs the other term.
    """
    known = labels >= 0
    signed = torch.where(labels > 0, logits.float(), -logits.float())
    losses = -(1 - epsilon) * logsigmoid(signed) - epsilon * logsigmoid(-signed)
    losses = torch.where(known, losses, 0.0)
    losses = losses if weights is None else losses * weights[:, None]
    return losses.sum() / (known.sum().clamp(min=1) if count is None else count)


def _mean(
    values: Float[Tensor, " n"], count: Tensor | float | None, weights: Float[Tensor, " n"] | None
) -> Float[Tensor, ""]:
    total = (values if weights is None else values * weights).sum()
    return total / (max(len(values), 1) if count is None else count)


def pair_outcomes(
    scores: Float[Tensor, " n"],
    ranks: Float[Tensor, " n"],
    prompts: Int[Tensor, " n"] | None = None,
    texts: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, " pairs"]:
    """Return one number per pair, in the order of `ranked_pairs`: 1 where the scores agree with the ranks, 0 where they
    contradict them, 0.5 where the two scores are equal."""
    better, worse = ranked_pairs(ranks, prompts, texts)
    return (torch.sign(scores.float()[better] - scores.float()[worse]) + 1) / 2


def ranked_pairs(
    ranks: Float[Tensor, " n"],
    prompts: Int[Tensor, " n"] | None = None,
    texts: Int[Tensor, " n"] | None = None,
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Return indices (better, worse) of every pair of responses to the same prompt whose ranks and texts differ."""
    wins: Bool[Tensor, "n n"] = ranks[:, None] < ranks[None, :]
    if prompts is not None:
        wins = wins & (prompts[:, None] == prompts[None, :])
    if texts is not None:
        wins = wins & (texts[:, None] != texts[None, :])
    better, worse = wins.nonzero(as_tuple=True)
    return better, worse


def mean_over_prompts(
    values: Float[Tensor, " pairs"], prompts: Int[Tensor, " pairs"], count: Tensor | float | None = None
) -> Float[Tensor, ""]:
    """Average over each prompt's pairs, sum over the prompts, divide by `count` (default: prompts with a pair).

    Without a pair the result is 0 and still has a gradient, of 0."""
    _, index, pairs = prompts.unique(return_inverse=True, return_counts=True)
    divisor = max(len(pairs), 1) if count is None else count
    return (values / pairs.to(values.dtype)[index]).sum() / divisor


def _pair_prompts(better: Int[Tensor, " pairs"], prompts: Int[Tensor, " n"] | None) -> Int[Tensor, " pairs"]:
    return torch.zeros_like(better) if prompts is None else prompts[better]


def _weighted(
    values: Float[Tensor, " pairs"], better: Int[Tensor, " pairs"], weights: Float[Tensor, " n"] | None
) -> Float[Tensor, " pairs"]:
    return values if weights is None else values * weights[better]
