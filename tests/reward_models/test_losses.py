"""The losses against hand arithmetic and a slow loop."""

import math

import numpy as np
import pytest
import torch
from reference import losses_numpy as slow
from reference.losses_numpy import nll

from reward_models.losses import (
    centering_penalty,
    margin_ranking_loss,
    mean_over_prompts,
    pair_outcomes,
    ranked_pairs,
    ranking_loss,
    smoothed_ranking_loss,
)


def random_rankings(seed: int):
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(5), [2, 4, 3, 2, 6])
    ranks = rng.integers(0, 3, size=len(prompts)).astype(np.float32)
    ranks[:2] = [0, 1]
    scores = rng.normal(size=len(prompts)).astype(np.float32) * 2
    return torch.tensor(scores), torch.tensor(ranks), torch.tensor(prompts)


def test_a_pair_is_bradley_terry():
    loss = ranking_loss(torch.tensor([2.0, 0.5]), torch.tensor([0.0, 1.0]))
    assert loss.item() == pytest.approx(0.20141327798275246, abs=1e-6)  # log(1 + e^-1.5)
    loss = ranking_loss(torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx(1.7014132779827524, abs=1e-6)  # the same + 1.5


def test_four_responses_with_a_tie_by_hand():
    # ranks 1 2 2 3: the two in the middle are a tie, five pairs are left
    scores, ranks = torch.tensor([1.0, 0.0, 3.0, -1.0]), torch.tensor([1.0, 2.0, 2.0, 3.0])
    expected = (nll(1 - 0) + nll(1 - 3) + nll(1 + 1) + nll(0 + 1) + nll(3 + 1)) / 5
    assert ranking_loss(scores, ranks).item() == pytest.approx(expected, abs=1e-6)
    assert len(ranked_pairs(ranks)[0]) == 5


def test_a_prompt_weighs_one_however_many_pairs_it_has():
    scores = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0])
    ranks = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0])
    prompts = torch.tensor([7, 7, 3, 3, 3])
    expected = (nll(-1) + (nll(1) + nll(2) + nll(1)) / 3) / 2
    assert ranking_loss(scores, ranks, prompts).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_against_the_slow_loop(seed):
    scores, ranks, prompts = random_rankings(seed)
    lists = scores.double().tolist(), ranks.tolist(), prompts.tolist()
    assert ranking_loss(scores, ranks, prompts).item() == pytest.approx(slow.ranking_loss(*lists), abs=1e-5)
    assert ranking_loss(scores, ranks, prompts, count=9).item() == pytest.approx(
        slow.ranking_loss(*lists, count=9), abs=1e-5
    )
    smoothed = smoothed_ranking_loss(scores, ranks, 0.1, prompts)
    assert smoothed.item() == pytest.approx(slow.ranking_loss(*lists, epsilon=0.1), abs=1e-5)
    margins = torch.full_like(scores, 0.7)
    with_margin = margin_ranking_loss(scores, ranks, margins, prompts)
    assert with_margin.item() == pytest.approx(slow.ranking_loss(*lists, margins=margins.tolist()), abs=1e-5)


def test_the_margin_is_the_winners():
    scores, ranks, margins = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.25, 9.0])
    assert margin_ranking_loss(scores, ranks, margins).item() == pytest.approx(nll(0.75), abs=1e-6)


def test_smoothing_has_its_minimum_where_the_formula_says():
    best = math.log(0.8 / 0.2)
    difference = torch.tensor(best, requires_grad=True)
    smoothed_ranking_loss(torch.stack([difference, torch.tensor(0.0)]), torch.tensor([0.0, 1.0]), 0.2).backward()
    assert difference.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_gradient_pushes_the_better_up_by_its_probability_of_losing():
    scores = torch.tensor([0.3, -0.2], requires_grad=True)
    ranking_loss(scores, torch.tensor([0.0, 1.0])).backward()
    losing = 1 / (1 + math.exp(0.5))
    assert scores.grad.tolist() == pytest.approx([-losing, losing], abs=1e-6)


def test_micro_batches_add_up_to_the_batch():
    scores, ranks, prompts = random_rankings(11)
    scores.requires_grad_()
    seen = {p for p in prompts.tolist() if len(ranked_pairs(ranks[prompts == p])[0])}
    whole = torch.autograd.grad(ranking_loss(scores, ranks, prompts), scores)[0]
    parts = [
        ranking_loss(scores[chosen], ranks[chosen], prompts[chosen], count=len(seen))
        for chosen in (prompts < 1, (prompts >= 1) & (prompts < 4), prompts >= 4)
    ]
    assert torch.allclose(torch.autograd.grad(sum(parts), scores)[0], whole, atol=1e-6)


def test_only_ties_is_zero_with_a_gradient_and_no_nan():
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([1.0, 1.0]))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [0.0, 0.0]


def test_huge_differences_stay_finite():
    scores = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([0.0, 1.0]))
    loss.backward()
    assert loss.item() == pytest.approx(1000.0)
    assert scores.grad.tolist() == pytest.approx([-1.0, 1.0])


def test_bfloat16_scores_are_compared_in_float32():
    scores = torch.tensor([1.0, 0.0], dtype=torch.bfloat16)
    loss = ranking_loss(scores, torch.tensor([0.0, 1.0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(nll(1.0), abs=1e-6)


def test_outcomes_of_every_pair_are_half_of_equal_scores():
    # prompt 0: a right pair; prompt 1: right, wrong and equal
    scores = torch.tensor([1.0, 0.0, 2.0, 1.0, 2.0])
    ranks = torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0])
    prompts = torch.tensor([0, 0, 1, 1, 1])
    assert sorted(pair_outcomes(scores, ranks, prompts).tolist()) == [0.0, 0.5, 1.0, 1.0]


def test_tied_ranks_are_no_pair_for_the_accuracy():
    assert pair_outcomes(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])).tolist() == [1.0, 1.0]


def test_mean_over_prompts_by_hand():
    values, prompts = torch.tensor([1.0, 3.0, 10.0]), torch.tensor([4, 4, 2])
    assert mean_over_prompts(values, prompts).item() == pytest.approx((2 + 10) / 2)
    assert mean_over_prompts(values, prompts, count=torch.tensor(4.0)).item() == pytest.approx(3.0)
    nothing = torch.zeros(0, requires_grad=True)
    empty = mean_over_prompts(nothing, torch.zeros(0, dtype=torch.long))
    empty.backward()
    assert empty.item() == 0


def test_the_same_text_twice_is_no_pair():
    # ranks 0 1 2; responses 0 and 1 have the same text: the pairs left are (0, 2) and (1, 2)
    ranks, texts = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([4, 4, 6])
    assert [x.tolist() for x in ranked_pairs(ranks, texts=texts)] == [[0, 1], [2, 2]]
    scores = torch.tensor([0.0, 2.0, 1.0])
    assert ranking_loss(scores, ranks, texts=texts).item() == pytest.approx((nll(-1) + nll(1)) / 2, abs=1e-6)
    assert pair_outcomes(scores, ranks, texts=texts).tolist() == [0.0, 1.0]
    # the same number in another prompt is another text
    assert len(ranked_pairs(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), torch.tensor([4, 4]))[0]) == 0


def test_a_smoothed_pair_by_hand():
    # d = ln 3: sigmoid(d) = 3/4; 0.9 * -ln 0.75 + 0.1 * -ln 0.25 = 0.258914 + 0.138629 = 0.397543
    loss = smoothed_ranking_loss(torch.tensor([math.log(3), 0.0]), torch.tensor([0.0, 1.0]), 0.1)
    assert loss.item() == pytest.approx(0.397543, abs=1e-6)


def test_a_margin_by_hand():
    # d - margin = ln 3 + ln 2 - ln 2 = ln 3: -ln(3/4) = 0.287682
    scores, margins = torch.tensor([math.log(6), 0.0]), torch.tensor([math.log(2), 7.0])
    loss = margin_ranking_loss(scores, torch.tensor([0.0, 1.0]), margins)
    assert loss.item() == pytest.approx(0.287682, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_weights_against_the_slow_loop(seed):
    """A prompt's weight multiplies its mean loss; the divisor stays the number of prompts."""
    scores, ranks, prompts = random_rankings(seed)
    of_prompt = np.random.default_rng(seed).uniform(0, 3, size=5).astype(np.float32)
    weights = torch.tensor(of_prompt)[prompts]
    alone = [
        slow.ranking_loss(*(x[prompts == p].double().tolist() for x in (scores, ranks)), count=1) for p in range(5)
    ]
    expected = float(np.dot(of_prompt, alone)) / 7
    found = ranking_loss(scores, ranks, prompts, count=7, weights=weights)
    assert found.item() == pytest.approx(expected, abs=1e-5)
    smoothed = smoothed_ranking_loss(scores, ranks, 0.0, prompts, count=7, weights=weights)
    margin = margin_ranking_loss(scores, ranks, torch.zeros(len(scores)), prompts, count=7, weights=weights)
    assert smoothed.item() == pytest.approx(expected, abs=1e-5)
    assert margin.item() == pytest.approx(expected, abs=1e-5)


def test_centering_by_hand():
    # ranks 1 2 2: pairs (0, 1) and (0, 2); the other prompt's pair (3, 4) weighs twice
    scores, ranks = torch.tensor([1.0, 0.5, -3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 2.0, 5.0, 4.0])
    prompts, weights = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0])
    first, second = (1.5**2 + (-2.0) ** 2) / 2, 3.0**2
    assert centering_penalty(scores, ranks, prompts).item() == pytest.approx((first + second) / 2)
    found = centering_penalty(scores, ranks, prompts, weights=weights, count=4)
    assert found.item() == pytest.approx((first + 2 * second) / 4)
    assert centering_penalty(torch.tensor([2.0, -2.0]), torch.tensor([0.0, 1.0])).item() == 0.0


def test_centering_is_trls():
    """trl 1.16, RewardTrainer.compute_loss: coefficient * mean((chosen + rejected) ** 2) over pairs."""
    chosen, rejected = torch.randn(6, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 2, 6)
    scores, ranks = torch.stack([chosen, rejected], 1).flatten(), torch.tensor([0.0, 1.0] * 6)
    found = centering_penalty(scores, ranks, torch.arange(6).repeat_interleave(2))
    assert found.item() == pytest.approx(torch.mean((chosen + rejected) ** 2).item(), abs=1e-6)
