"""PPO's mathematics against hand arithmetic, closed forms and the slow NumPy loops of tests/reference."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from reference import ppo_numpy as slow

from rlhf.models.logprobs import token_logprobs
from rlhf.ppo import math as ppo_math

LENGTHS = [5, 1, 3, 7, 2]
GARBAGE = [math.nan, math.inf, -math.inf, 1e30, -7.5]


def close(actual, expected, tolerance: float = 1e-5) -> None:
    actual = actual.detach().double().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    np.testing.assert_allclose(actual, np.asarray(expected, np.float64), rtol=tolerance, atol=tolerance)


def prefix_mask(lengths, width: int | None = None) -> torch.Tensor:
    return torch.arange(width or max(lengths))[None] < torch.tensor(lengths)[:, None]


def ragged(seed: int, lengths=LENGTHS, scale: float = 1.0) -> list[list[float]]:
    draw = np.random.default_rng(seed)
    return [(draw.normal(size=n) * scale).tolist() for n in lengths]


def padded(rows, fill: float = 0.0, width: int | None = None) -> torch.Tensor:
    width = width or max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def unpadded(x: torch.Tensor, lengths=LENGTHS) -> list[list[float]]:
    return [row[:n].tolist() for row, n in zip(x.detach(), lengths, strict=True)]


# -- shapes ------------------------------------------------------------------------------------------------


def test_signatures_shapes_are_checked_at_run_time():
    mask = prefix_mask([2, 3])
    with pytest.raises(TypeCheckError):
        ppo_math.gae(torch.zeros(2, 3), torch.zeros(2, 4), mask, 1.0, 0.95)
    with pytest.raises(TypeCheckError):
        ppo_math.token_rewards(torch.zeros(3), torch.zeros(2, 3), mask, 0.1)
    with pytest.raises(TypeCheckError):
        ppo_math.policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), mask.long(), 0.2)


# -- token_logprobs ----------------------------------------------------------------------------------------


def head(seed: int = 0, rows: int = 3, tokens: int = 5, hidden: int = 6, vocabulary: int = 11):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, tokens, hidden, generator=generator),
        torch.randn(vocabulary, hidden, generator=generator),
        torch.randint(vocabulary, (rows, tokens), generator=generator),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_and_entropy_by_the_definition(temperature):
    hidden, weight, targets = head()
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature, chunk=4)
    expected = [
        [slow.token_logprobs(hidden[b, t].tolist(), weight.tolist(), int(targets[b, t]), temperature) for t in range(5)]
        for b in range(3)
    ]
    close(logprobs, [[p[0] for p in row] for row in expected])
    close(entropy, [[p[1] for p in row] for row in expected])


def test_uniform_logits_by_hand():
    logprobs, entropy = token_logprobs(torch.zeros(1, 2, 3), torch.randn(8, 3), torch.tensor([[0, 7]]), 1.0, 1)
    close(logprobs, [[-math.log(8)] * 2])
    close(entropy, [[math.log(8)] * 2])


def test_the_sampled_token_counts_and_not_the_most_likely_one():
    weight = torch.tensor([[2.0], [0.0], [-1.0]])
    logprobs, _ = token_logprobs(torch.ones(1, 3, 1), weight, torch.tensor([[0, 1, 2]]), 1.0, 8)
    normaliser = math.log(math.exp(2) + 1 + math.exp(-1))
    close(logprobs, [[2 - normaliser, -normaliser, -1 - normaliser]])


@pytest.mark.parametrize("chunk", [1, 4, 15, 1000])
def test_chunks_change_neither_values_nor_gradients(chunk):
    hidden, weight, targets = head()
    up = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))

    def run(function):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs = function(h, w)
        (logprobs * up).sum().backward()
        return logprobs, h.grad, w.grad

    ours = run(lambda h, w: token_logprobs(h, w, targets, 0.7, chunk)[0])
    theirs = run(lambda h, w: -F.cross_entropy((h @ w.T / 0.7).transpose(1, 2), targets, reduction="none"))
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other.detach())


def test_logprob_gradient_by_finite_differences():
    hidden, weight, targets = (t.double() if t.is_floating_point() else t for t in head(rows=1, tokens=2))
    leaf = hidden.float().requires_grad_()
    token_logprobs(leaf, weight.float(), targets, 0.9, 1)[0].sum().backward()
    for place in [(0, 0, 0), (0, 1, 3), (0, 1, 5)]:
        sums = []
        for step in (1e-5, -1e-5):
            moved = hidden.numpy().copy()
            moved[place] += step
            sums.append(
                sum(slow.token_logprobs(moved[0, t], weight.numpy(), int(targets[0, t]), 0.9)[0] for t in range(2))
            )
        close(leaf.grad[place], (sums[0] - sums[1]) / 2e-5)


def test_what_a_family_does_after_its_head():
    hidden, weight, targets = head()
    bias = torch.linspace(-1, 1, 11)
    after = lambda logits: torch.tanh((logits + bias) / 3.0) * 3.0  # noqa: E731
    logprobs, entropy = token_logprobs(hidden, weight, targets, 0.8, 4, after)
    cap = lambda x: [3 * math.tanh((v + b) / 3) for v, b in zip(x, bias.tolist(), strict=True)]  # noqa: E731
    expected = [
        slow.token_logprobs(hidden[b, t].numpy(), weight.numpy(), int(targets[b, t]), 0.8, lambda x: np.array(cap(x)))
        for b in range(3)
        for t in range(5)
    ]
    close(logprobs.flatten(), [p[0] for p in expected])
    close(entropy.flatten(), [p[1] for p in expected])


def test_masked_out_tokens_of_a_family_leave_the_entropy_finite():
    after = lambda logits: logits.index_fill(-1, torch.tensor([2]), -math.inf)  # noqa: E731
    hidden = torch.zeros(1, 1, 3, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, torch.ones(4, 3), torch.tensor([[0]]), 1.0, 1, after)
    logprobs.sum().backward()
    close(logprobs, [[-math.log(3)]])
    close(entropy, [[math.log(3)]])
    assert hidden.grad.isfinite().all()


def test_log_softmax_of_bf16_states_is_float32():
    hidden, weight, targets = head(vocabulary=500)
    logprobs, entropy = token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, 1.0, 4)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    assert logprobs.dtype == entropy.dtype == torch.float32
    close(logprobs, logits.double().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1))


def test_log_probability_and_entropy_by_hand():
    # logits 2 ln 3, 0, 0 (hidden 2, weights ln 3, 0, 0); temperature 2 makes them ln 3, 0, 0:
    # probabilities 3/5, 1/5, 1/5, log-prob of token 0: ln 0.6, of token 2: ln 0.2,
    # entropy -(0.6 ln 0.6 + 2 * 0.2 ln 0.2) = 0.306495 + 0.643775 = 0.950271
    weight = torch.tensor([[math.log(3)], [0.0], [0.0]])
    logprobs, entropy = token_logprobs(torch.full((1, 2, 1), 2.0), weight, torch.tensor([[0, 2]]), 2.0, 5)
    close(logprobs, [[-0.5108256, -1.6094379]])
    close(entropy, [[0.9502705, 0.9502705]])


@pytest.mark.parametrize(
    ("chunk", "gradient", "sizes"),
    [
        (4, True, [4, 4, 4, 3] * 2),  # forward, and once more for backward
        (4, False, [4, 4, 4, 3]),
        (14, True, [14, 1] * 2),
        (15, True, [15]),  # one chunk: nothing is saved by computing it again
        (99, True, [15]),
    ],
)
def test_no_more_than_a_chunk_of_logits_exists_at_once(chunk, gradient, sizes):
    hidden, weight, targets = head()
    seen = []

    def note(logits):
        seen.append(tuple(logits.shape))
        return logits

    with torch.set_grad_enabled(gradient):
        logprobs, _ = token_logprobs(hidden.requires_grad_(), weight, targets, 1.0, chunk, note)
    if gradient:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            token_logprobs(hidden, weight, targets, 1.0, chunk, lambda logits: logits)
        assert (max(saved, default=0) < 15 * 11) == (chunk < 15)
        logprobs.sum().backward()
    assert sorted(seen) == sorted((n, 11) for n in sizes)


# -- KL ----------------------------------------------------------------------------------------------------


def test_kl_estimates_by_hand():
    logprobs, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    close(ppo_math.kl_estimate(logprobs, reference, "k1"), [[0.5, -1.0]])
    close(ppo_math.kl_estimate(logprobs, reference, "k2"), [[0.125, 0.5]])
    close(ppo_math.kl_estimate(logprobs, reference, "k3"), [[math.exp(-0.5) - 0.5, math.e - 2.0]])
    with pytest.raises(Exception, match="k4"):
        ppo_math.kl_estimate(logprobs, reference, "k4")


def test_an_unknown_kl_estimate_is_refused_with_the_known_ones(monkeypatch):
    """Without the run-time check of the signature, which users don't have."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"^kind='k4'; use 'k1', 'k2' or 'k3'$"):
        ppo_math.kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


def test_k1_and_k3_average_to_the_exact_kl_under_the_policy():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = sum(p * math.log(p / q) for p, q in zip([0.5, 0.3, 0.2], [0.2, 0.2, 0.6], strict=True))
    for kind in ("k1", "k3"):
        estimate = ppo_math.kl_estimate(policy.log()[None], reference.log()[None], kind)
        close((policy * estimate).sum(), exact)
    assert exact > 0


def test_kl_keeps_its_gradient_however_large():
    leaf = torch.tensor([[30.0, -30.0]], requires_grad=True)
    ppo_math.kl_estimate(leaf, torch.zeros(1, 2), "k1").sum().backward()
    close(leaf.grad, [[1.0, 1.0]])


# -- rewards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", GARBAGE)
def test_score_lands_on_the_last_real_token_and_kl_costs(fill):
    kl = ragged(1)
    scores = [1.0, -2.0, 0.0, 3.0, 0.5]
    rewards = ppo_math.token_rewards(torch.tensor(scores), padded(kl, fill), prefix_mask(LENGTHS), 0.1)
    close(rewards, padded([slow.token_rewards(s, k, 0.1) for s, k in zip(scores, kl, strict=True)]).numpy())


def test_rewards_by_hand():
    mask = prefix_mask([3, 2])
    rewards = ppo_math.token_rewards(
        torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 2.0, 3.0], [4.0, -5.0, 6.0]]), mask, 0.5
    )
    close(rewards, [[-0.5, -1.0, -0.5], [-2.0, 1.5, 0.0]])


def test_a_mask_must_be_a_prefix_that_is_not_empty():
    empty = "^mask: a row without a real token; every response holds at least its stop token$"
    hole = "^mask: a real token after padding; responses are right-padded$"
    for mask, words in [([[False] * 3], empty), ([[True, False, True]], hole), ([[False, True, True]], empty),
                        ([[True, True, True], [True, False, True]], hole),
                        ([[True, False, False], [False] * 3], empty)]:  # fmt: skip
        zeros = torch.zeros(len(mask), 3)
        with pytest.raises(ValueError, match=words):
            ppo_math.token_rewards(torch.zeros(len(mask)), zeros, torch.tensor(mask), 0.1)
        with pytest.raises(ValueError, match=words):
            ppo_math.gae(zeros, zeros, torch.tensor(mask), 1.0, 0.95)


# -- GAE ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", GARBAGE)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_gae_against_the_double_sum(gamma, lam, fill):
    rewards, values = ragged(2), ragged(3)
    advantages, returns = ppo_math.gae(
        padded(rewards, fill, 9), padded(values, fill, 9), prefix_mask(LENGTHS, 9), gamma, lam
    )
    expected = [slow.gae(r, v, gamma, lam) for r, v in zip(rewards, values, strict=True)]
    close(advantages, padded([e[0] for e in expected], width=9).numpy())
    close(returns, padded([e[1] for e in expected], width=9).numpy())


def test_gae_by_hand():
    # deltas: 1 + .5*2 - 1 = 1, and 3 - 2 = 1; advantages: 1 + .5*.5*1 = 1.25, and 1
    advantages, returns = ppo_math.gae(
        torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1.0, 2.0, 9.0]]), prefix_mask([2], 3), 0.5, 0.5
    )
    close(advantages, [[1.25, 1.0, 0.0]])
    close(returns, [[2.25, 3.0, 0.0]])


def test_without_discount_and_smoothing_returns_are_the_reward_to_go():
    rewards, values = ragged(4), ragged(5)
    _, returns = ppo_math.gae(padded(rewards), padded(values), prefix_mask(LENGTHS), 1.0, 1.0)
    close(returns, padded([np.cumsum(r[::-1])[::-1].tolist() for r in rewards]).numpy())


def test_right_values_have_no_advantage():
    rewards = ragged(6)
    values = [np.cumsum(r[::-1])[::-1].tolist() for r in rewards]
    advantages, _ = ppo_math.gae(padded(rewards), padded(values), prefix_mask(LENGTHS), 1.0, 0.95)
    close(advantages, np.zeros((5, 7)))


def test_gae_of_three_tokens_by_hand():
    # gamma 0.9, lambda 0.5; rewards 0 0 2, values 1 -1 0.5
    # deltas: 0 + 0.9 * -1 - 1 = -1.9;  0 + 0.9 * 0.5 + 1 = 1.45;  2 + 0 - 0.5 = 1.5
    # advantages, last first: 1.5;  1.45 + 0.45 * 1.5 = 2.125;  -1.9 + 0.45 * 2.125 = -0.94375
    # returns: -0.94375 + 1, 2.125 - 1, 1.5 + 0.5
    advantages, returns = ppo_math.gae(
        torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[1.0, -1.0, 0.5]]), prefix_mask([3]), 0.9, 0.5
    )
    close(advantages, [[-0.94375, 2.125, 1.5]])
    close(returns, [[0.05625, 1.125, 2.0]])


# -- standardizing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", GARBAGE)
def test_standardize_and_rescale_over_real_tokens(fill):
    rows = ragged(7, scale=3.0)
    mean, var = slow.moments(rows)
    x, mask = padded(rows, fill), prefix_mask(LENGTHS)
    close(ppo_math.standardize(x, mask), padded([[(v - mean) / math.sqrt(var) for v in r] for r in rows]).numpy())
    close(ppo_math.rescale(x, mask), padded([[(v - mean) / math.sqrt(var) + mean for v in r] for r in rows]).numpy())
    close(torch.stack(ppo_math.moments(x, mask)), [mean, var])


def test_standardize_by_hand():
    x, mask = torch.tensor([[1.0, 3.0], [5.0, 100.0]]), prefix_mask([2, 1])  # mean 3, variance 8/3
    spread = math.sqrt(8 / 3)
    close(ppo_math.standardize(x, mask), [[-2 / spread, 0.0], [2 / spread, 0.0]])
    close(ppo_math.rescale(x, mask), [[3 - 2 / spread, 3.0], [3 + 2 / spread, 0.0]])


def test_moments_of_several_processes_can_be_handed_in():
    rows = ragged(8)
    mean, var = slow.moments(rows)
    mean_var = (torch.tensor(mean).float(), torch.tensor(var).float())
    halves = [rows[:2], rows[2:]]
    for function in (ppo_math.standardize, ppo_math.rescale):
        whole = unpadded(function(padded(rows), prefix_mask(LENGTHS)))
        parts = []
        for half in halves:
            lengths = list(map(len, half))
            parts += unpadded(function(padded(half), prefix_mask(lengths), mean_var), lengths)
        for one, other in zip(whole, parts, strict=True):
            close(one, other)


def test_equal_numbers_standardize_to_zero():
    close(ppo_math.standardize(torch.full((2, 3), 4.0), prefix_mask([3, 2])), np.zeros((2, 3)))


# -- losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", GARBAGE)
def test_policy_loss_against_the_slow_loop(fill):
    new, old, advantages = ragged(9, scale=0.3), ragged(10, scale=0.3), ragged(11)
    loss, stats = ppo_math.policy_loss(
        padded(new, fill), padded(old, -fill), padded(advantages, fill), prefix_mask(LENGTHS), 0.2
    )
    close(
        [loss.item(), *(number.item() for number in stats)],
        slow.policy_loss(new, old, advantages, 0.2),
    )
    ratios = [math.exp(a - b) for r, o in zip(new, old, strict=True) for a, b in zip(r, o, strict=True)]
    close(stats.ratio_max, max(ratios))
    assert 0 < stats.clip_fraction < 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0.0),
        (1.5, 2.0, -2.4, 0.0, 1.0),  # too likely already and good: clipped
        (0.5, 2.0, -1.0, -1.0, 0.0),  # too unlikely but good: the gradient stays
        (0.5, -2.0, 1.6, 0.0, 1.0),  # too unlikely already and bad: clipped
        (1.5, -2.0, 3.0, 3.0, 0.0),  # too likely and bad: the gradient stays
    ],
)
def test_clipping_by_hand_on_both_sides_of_both_signs(ratio, advantage, loss, slope, clipped):
    leaf = torch.tensor([[math.log(ratio)]], requires_grad=True)
    value, stats = ppo_math.policy_loss(leaf, torch.zeros(1, 1), torch.tensor([[advantage]]), prefix_mask([1]), 0.2)
    value.backward()
    close(
        [value.item(), leaf.grad.item(), stats.clip_fraction.item()], [loss, slope, clipped]
    )  # d loss / d logp = -A * ratio


def test_policy_statistics_by_hand():
    # ratios 1.5, 0.5 and 0.9, advantages 2, 2 and -1, clip 0.2, on padding anything
    # objectives: min(3, 2.4) = 2.4;  min(1, 1.6) = 1;  min(-0.9, -0.9) = -0.9;  mean 2.5 / 3
    # one token of three is clipped; approximate KL: mean of ratio - 1 - ln ratio
    ratios = [1.5, 0.5, 0.9]
    new = torch.tensor([[math.log(1.5), math.log(0.5)], [math.log(0.9), math.nan]])
    old, mask = torch.zeros(2, 2), prefix_mask([2, 1])
    advantages = torch.tensor([[2.0, 2.0], [-1.0, math.inf]])
    loss, stats = ppo_math.policy_loss(new, old, advantages, mask, 0.2)
    kl = sum(r - 1 - math.log(r) for r in ratios)
    close([loss, stats.clip_fraction, stats.approx_kl_nats, stats.ratio_max], [-2.5 / 3, 1 / 3, kl / 3, 1.5])
    # the same as a part of a minibatch of ten tokens
    loss, stats = ppo_math.policy_loss(new, old, advantages, mask, 0.2, 10)
    close([loss, stats.clip_fraction, stats.approx_kl_nats, stats.ratio_max], [-0.25, 0.1, kl / 10, 1.5])


def test_importance_weights_by_hand():
    # probabilities under the trainer 0.5, 0.1, 0.9, under the engine 0.25, 0.2, 0.1: ratios 2, 0.5, 9
    logprobs = torch.tensor([[math.log(0.5), math.log(0.1)], [math.log(0.9), math.nan]], requires_grad=True)
    engine = torch.tensor([[math.log(0.25), math.log(0.2)], [math.log(0.1), math.inf]])
    mask = prefix_mask([2, 1])
    weights = ppo_math.importance_weights(logprobs, engine, mask, 3.0)
    close(weights, [[2.0, 0.5], [3.0, 0.0]])
    assert not weights.requires_grad
    close(ppo_math.importance_weights(logprobs, engine, mask, math.inf), [[2.0, 0.5], [9.0, 0.0]])
    close(ppo_math.importance_weights(logprobs, logprobs.detach(), mask, 1.0), [[1.0, 1.0], [1.0, 0.0]])


def test_a_weight_multiplies_its_tokens_objective_and_gradient():
    # objectives 2.4 (clipped), 1 and -0.9 as in test_policy_statistics_by_hand, weights 0.5, 2 and 1.5
    new = torch.tensor([[math.log(1.5), math.log(0.5)], [math.log(0.9), 0.0]], requires_grad=True)
    old, mask = torch.zeros(2, 2), prefix_mask([2, 1])
    advantages = torch.tensor([[2.0, 2.0], [-1.0, math.inf]])
    weights = torch.tensor([[0.5, 2.0], [1.5, math.nan]], requires_grad=True)
    loss, stats = ppo_math.policy_loss(new, old, advantages, mask, 0.2, None, weights)
    close(loss, -(0.5 * 2.4 + 2.0 * 1.0 + 1.5 * -0.9) / 3)
    _, unweighted = ppo_math.policy_loss(new, old, advantages, mask, 0.2)
    close(list(stats), list(unweighted))
    loss.backward()
    close(new.grad, [[0.0, -2.0 * 0.5 * 2.0 / 3], [1.5 * 0.9 * 1.0 / 3, 0.0]])  # -weight * ratio * A / 3; clipped: 0
    assert weights.grad is None


def test_the_largest_ratio_is_not_that_of_padding():
    """On padding new and old are taken as equal: a ratio of 1, larger than that of any token here."""
    leaf = torch.tensor([[math.log(0.5), 0.0, 0.0]], requires_grad=True)
    _, stats = ppo_math.policy_loss(leaf, torch.zeros(1, 3), torch.ones(1, 3), prefix_mask([1], 3), 0.2)
    close(stats.ratio_max, 0.5)
    assert not any(number.requires_grad for number in stats)


def test_a_step_along_the_gradient_makes_good_tokens_likelier():
    leaf = torch.zeros(1, 2, requires_grad=True)
    ppo_math.policy_loss(leaf, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), prefix_mask([2]), 0.2)[0].backward()
    assert leaf.grad[0, 0] < 0 < leaf.grad[0, 1]


@pytest.mark.parametrize("fill", GARBAGE)
@pytest.mark.parametrize("clip", [0.2, math.inf])
def test_value_loss_against_the_slow_loop(fill, clip):
    new, old, returns = ragged(12), ragged(13), ragged(14)
    loss, stats = ppo_math.value_loss(
        padded(new, fill), padded(old, fill), padded(returns, -fill), prefix_mask(LENGTHS), clip
    )
    close([loss.item(), stats.value_clip_fraction.item()], slow.value_loss(new, old, returns, clip))
    assert (stats.value_clip_fraction > 0) == (clip == 0.2)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope", "clipped"),
    [
        (0.1, 1.0, 0.405, -0.9, 0.0),  # within the clip
        (0.5, 1.0, 0.32, 0.0, 1.0),  # moved too far towards the return: (0.2 - 1)^2 / 2 and no gradient
        (0.5, -1.0, 1.125, 1.5, 0.0),  # moved away from it: the unclipped square is the larger
        (-0.5, -1.0, 0.32, 0.0, 1.0),
    ],
)
def test_value_clipping_by_hand(value, target, loss, slope, clipped):
    leaf = torch.tensor([[value]], requires_grad=True)
    result, stats = ppo_math.value_loss(leaf, torch.zeros(1, 1), torch.tensor([[target]]), prefix_mask([1]), 0.2)
    result.backward()
    close([result.item(), leaf.grad.item(), stats.value_clip_fraction.item()], [loss, slope, clipped])


def test_value_loss_of_three_tokens_by_hand():
    # values 1, 0.5, -2; old 0, 0.5, -1; returns 2, 0, -1; clip 0.25
    # squares (v - R)^2: 1, 0.25, 1; clipped values 0.25, 0.5, -1.25, their squares: 3.0625, 0.25, 0.0625
    # the larger ones: 3.0625, 0.25, 1, half their mean: 4.3125 / 6; only the first token is clipped
    rows = [[1.0, 0.5, -2.0], [0.0, 0.5, -1.0], [2.0, 0.0, -1.0]]
    values, old, returns = (torch.tensor([row]) for row in rows)
    loss, stats = ppo_math.value_loss(values.requires_grad_(), old, returns, prefix_mask([3]), 0.25)
    close([loss.item(), stats.value_clip_fraction], [4.3125 / 6, 1 / 3])
    assert not stats.value_clip_fraction.requires_grad
    # not clipped: half the mean of 1, 0.25, 1
    close(ppo_math.value_loss(values, old, returns, prefix_mask([3]), math.inf)[0], 2.25 / 6)


@pytest.mark.parametrize("fill", GARBAGE)
@pytest.mark.parametrize("name", ["policy", "value"])
def test_nothing_on_padding_reaches_a_gradient(name, fill):
    """The model's outputs, too, may hold anything there: the gradient on padding is 0, elsewhere unchanged."""
    a, b, c = ragged(15, scale=0.3), ragged(16, scale=0.3), ragged(17)
    function = ppo_math.policy_loss if name == "policy" else ppo_math.value_loss

    def gradient(filling: float) -> torch.Tensor:
        leaf = padded(a, filling).requires_grad_()
        function(leaf, padded(b, filling), padded(c, filling), prefix_mask(LENGTHS), 0.2)[0].backward()
        return leaf.grad

    assert torch.equal(gradient(fill), gradient(0.0))
    assert (gradient(fill)[~prefix_mask(LENGTHS)] == 0).all()


@pytest.mark.parametrize("name", ["policy", "value"])
def test_micro_batches_with_the_whole_count_add_up(name):
    a, b, c = ragged(18, scale=0.3), ragged(19, scale=0.3), ragged(20)
    function = ppo_math.policy_loss if name == "policy" else ppo_math.value_loss

    def run(groups) -> tuple[float, float, list[list[float]]]:
        leaves = [torch.tensor(row, requires_grad=True) for row in a]
        loss = share = 0.0
        for group in groups:
            lengths = [LENGTHS[i] for i in group]
            stacked = torch.nn.utils.rnn.pad_sequence([leaves[i] for i in group], batch_first=True)
            part, stats = function(
                stacked,
                padded([b[i] for i in group]),
                padded([c[i] for i in group]),
                prefix_mask(lengths),
                0.2,
                sum(LENGTHS),
            )
            part.backward()
            loss, share = loss + part.item(), share + stats[0].item()
        return loss, share, [leaf.grad.tolist() for leaf in leaves]

    whole = run([[0, 1, 2, 3, 4]])
    for groups in ([[0], [1], [2], [3], [4]], [[3, 1], [4, 0, 2]], [[4, 3, 2, 1, 0]]):
        split = run(groups)
        close(split[:2], whole[:2])
        for one, other in zip(split[2], whole[2], strict=True):
            close(one, other)
    expected = (slow.policy_loss if name == "policy" else slow.value_loss)(a, b, c, 0.2)
    close(whole[:2], expected[:2])


@pytest.mark.parametrize("fill", GARBAGE)
def test_masked_mean_and_its_count(fill):
    x, mask = torch.tensor([[1.0, 2.0, fill], [6.0, fill, fill]]), prefix_mask([2, 1], 3)
    close(ppo_math.masked_mean(x, mask), 3.0)
    close(ppo_math.masked_mean(x, mask, 18), 0.5)
    close(ppo_math.masked_mean(x, mask, torch.tensor(9)), 1.0)


# -- metrics and the controller ----------------------------------------------------------------------------


@pytest.mark.parametrize("fill", GARBAGE)
def test_explained_variance(fill):
    values, returns = ragged(21), ragged(22)
    mask = prefix_mask(LENGTHS)
    flat = [np.concatenate([np.array(row) for row in rows]) for rows in (values, returns)]
    expected = 1 - np.var(flat[1] - flat[0]) / np.var(flat[1])
    close(ppo_math.explained_variance(padded(values, fill), padded(returns, fill), mask), expected)
    close(ppo_math.explained_variance(padded(returns, fill), padded(returns, fill), mask), 1.0)
    constant = padded([[3.0] * n for n in LENGTHS], fill)
    close(ppo_math.explained_variance(constant, padded(returns, fill), mask), 0.0)


def test_explained_variance_by_hand():
    # returns 1, 2, 3 (variance 2/3), errors 0, 1, -1 (variance 2/3): nothing explained; equal errors: all of it
    mask = prefix_mask([3])
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    close(ppo_math.explained_variance(torch.tensor([[1.0, 1.0, 4.0]]), returns, mask), 0.0)
    close(ppo_math.explained_variance(returns - 0.5, returns, mask), 1.0)
    # equal returns: 1 - variance of the errors / 1e-8; errors 0, 0, 0.0003: variance 2e-8
    close(ppo_math.explained_variance(torch.tensor([[0.0, 0.0, 3e-4]]), torch.zeros(1, 3), mask), -1.0, 1e-4)


@pytest.mark.parametrize(
    ("kl_nats", "expected"),
    [
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 512 / 10000)),
        (60.0, 0.1 * (1 + 0.2 * 512 / 10000)),
        (0.0, 0.1 * (1 - 0.2 * 512 / 10000)),
    ],
)
def test_the_kl_controller_by_hand(kl_nats, expected):
    close(ppo_math.adapt_kl_coef(0.1, kl_nats, 6.0, 512, 10000), expected, 1e-9)
