"""Losses over ranked responses: tensors in, tensors out, float32 inside.

Responses of several prompts lie in one flat axis ``n``; ``prompts[i]`` says to which prompt response i
belongs, so prompts may have different numbers of responses. A smaller rank is better, equal ranks are a
tie, and a tie is no pair. Nor are two responses of the same text, whatever their ranks: ``texts[i]`` numbers
the different texts of a prompt (default: all differ).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid


def ranking_loss(
    scores: Float[Tensor, " n"],
    ranks: Float[Tensor, " n"],
    prompts: Int[Tensor, " n"] | None = None,
    texts: Int[Tensor, " n"] | None = None,
    count: Tensor | float | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Bradley-Terry over rankings: ``-log sigmoid(r_w - r_l)``, mean over a prompt's pairs, then over prompts.

    With K responses to a prompt and no ties this is InstructGPT's equation 1 (section 3.5), whose factor is
    1 / C(K, 2); with ties we divide by the pairs that are left, so every prompt weighs the same.

    count: the number of prompts to divide by; the trainer passes the number in the whole optimizer step, so
        that the losses of its micro-batches add up to the loss of the batch. Default: the prompts here that
        have a pair.
    weights: what each pair that the response wins counts (a prompt's responses usually share one).
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
    """`ranking_loss` with label smoothing: each pair is taken to be the wrong way round with probability epsilon.

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
    """`ranking_loss` where the better response must win by a margin: ``-log sigmoid(r_w - r_l - margin)``.

    margins: the margin of each pair that the response wins (a prompt's responses usually share one). Llama 2
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
    """``(r_w + r_l)^2``, mean over a prompt's pairs, then over prompts: added to the loss with a small coefficient
    (0.01) it keeps scores around 0, which Bradley-Terry leaves free, for every prompt (Eisenstein et al.
    2312.09244, section 2; trl's `center_rewards_coefficient`). Arguments as in `ranking_loss`.
    """
    better, worse = ranked_pairs(ranks, prompts, texts)
    squares = (scores.float()[better] + scores.float()[worse]) ** 2
    return mean_over_prompts(_weighted(squares, better, weights), _pair_prompts(better, prompts), count)


def pair_outcomes(
    scores: Float[Tensor, " n"],
    ranks: Float[Tensor, " n"],
    prompts: Int[Tensor, " n"] | None = None,
    texts: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, " pairs"]:
    """One number per pair, in the order of `ranked_pairs`: 1 where the scores agree with the ranks, 0 where they
    contradict them, 0.5 where the two scores are equal (a coin would be right half the time)."""
    better, worse = ranked_pairs(ranks, prompts, texts)
    return (torch.sign(scores.float()[better] - scores.float()[worse]) + 1) / 2


def ranked_pairs(
    ranks: Float[Tensor, " n"],
    prompts: Int[Tensor, " n"] | None = None,
    texts: Int[Tensor, " n"] | None = None,
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Indices (better, worse) of every pair of responses to the same prompt whose ranks and texts differ."""
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
    """Mean over each prompt's pairs, summed over the prompts and divided by `count` (default: prompts seen).

    Without a pair the result is 0 and still carries a gradient (of zero)."""
    _, index, pairs = prompts.unique(return_inverse=True, return_counts=True)
    divisor = max(len(pairs), 1) if count is None else count
    return (values / pairs.to(values.dtype)[index]).sum() / divisor


def _pair_prompts(better: Int[Tensor, " pairs"], prompts: Int[Tensor, " n"] | None) -> Int[Tensor, " pairs"]:
    return torch.zeros_like(better) if prompts is None else prompts[better]


def _weighted(
    values: Float[Tensor, " pairs"], better: Int[Tensor, " pairs"], weights: Float[Tensor, " n"] | None
) -> Float[Tensor, " pairs"]:
    return values if weights is None else values * weights[better]
