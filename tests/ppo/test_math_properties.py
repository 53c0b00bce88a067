"""The mathematics of PPO and of the ranking losses against float64 loops, whatever the shape, the lengths, the numbers.

`hypothesis` draws the cases, the same ones in every run. Numbers lie on a grid (multiples of 2^-10, of 1 or of 2^-20)
so that sums and differences are exact in float32 and an expectation never hangs on how an input was rounded: what is
left is the rounding of the function under test, a few units of 2^-24, and the tolerances are of that order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import losses_numpy
from reference import ppo_numpy as slow

from reward_models import losses
from rlhf.models.logprobs import token_logprobs
from rlhf.ppo import math as ppo_math

GARBAGE = [math.nan, math.inf, -math.inf, 1e30, -7.5, 0.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

FEW = settings(
    max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
MANY = settings(FEW, max_examples=1000)
PROPERTIES = {}


def holds(**strategies):
    """A property: some dozens of examples in every run, many more behind the marker `long`."""

    def decorate(body):
        PROPERTIES[body.__name__] = MANY(given(**strategies)(body))
        return FEW(given(**strategies)(body))

    return decorate


def near(actual, expected, size, tolerance: float = 2e-6) -> None:
    """|actual - expected| within `tolerance` of `size`, the magnitude of what was summed; -inf only where expected."""
    actual = actual.detach().double().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    with np.errstate(invalid="ignore"):
        good = (np.abs(actual - expected) <= tolerance * np.asarray(size) + 1e-37) | (actual == expected)
    assert good.all(), f"{actual[~good]} instead of {expected[~good]}"


# -- what is drawn -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """The same numbers twice: a padded tensor with garbage on the padding, and rows of Python floats."""

    tensor: torch.Tensor
    rows: list[list[float]]

    @property
    def largest(self) -> float:
        return max(abs(x) for row in self.rows for x in row)

    @property
    def total(self) -> float:
        return sum(abs(x) for row in self.rows for x in row)

    @property
    def mask(self) -> torch.Tensor:
        return torch.arange(self.tensor.shape[1])[None] < torch.tensor([len(row) for row in self.rows])[:, None]


def numbers(draw, shape, limit: float, scales=(1.0,)) -> np.ndarray:
    """Multiples of scale / 1024 up to limit * scale: usual ones, equal ones, or only extreme ones."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    drawn = {
        "usual": lambda: random.normal(size=shape),
        "wide": lambda: random.uniform(-limit, limit, size=shape),
        "equal": lambda: np.full(shape, random.uniform(-limit, limit)),
        "extreme": lambda: random.choice([-limit, limit, 0.0, 1 / 1024], size=shape),
    }[draw(st.sampled_from(["usual", "wide", "equal", "extreme"]))]()
    return np.clip(np.round(drawn * 1024) / 1024, -limit, limit) * draw(st.sampled_from(scales))


def with_padding(rows, width: int, fill: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.float64).to(dtype)


@st.composite
def ragged(draw, columns: int, limit: float = 30.0, scales=(2.0**-10, 1.0, 2.0**10)) -> list[Column]:
    """`columns` tensors of one random shape: 1 to 6 rows of 1 to 12 numbers, 0 to 2 columns of nothing but padding."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    width = max(lengths) + draw(st.integers(0, 2))
    result = []
    for _ in range(columns):
        dtype = draw(st.sampled_from(DTYPES))
        values = numbers(draw, (len(lengths), width), limit, scales)
        rows = [torch.tensor(row[:n]).to(dtype).tolist() for row, n in zip(values, lengths, strict=True)]
        result.append(Column(with_padding(rows, width, draw(st.sampled_from(GARBAGE)), dtype), rows))
    return result


def counts(n: int):
    """What a caller may pass as `count`, and the number it stands for."""
    return [(None, n), (3 * n, 3 * n), (2.5 * n, 2.5 * n), (torch.tensor(n + 7), n + 7), (torch.tensor(0.5), 0.5)]


def padded_like(column: Column, rows) -> np.ndarray:
    """Rows as an array with zeros on padding: what every function must return there."""
    return with_padding(rows, column.tensor.shape[1], 0.0, torch.float64).numpy()


# -- log-probabilities -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    temperature: float
    chunk: int


@st.composite
def heads(draw, dtypes=DTYPES, scales=(0.125, 1.0, 64.0)) -> Head:
    """Integers for half precision, so that the logits are exact there too and only the softmax is on trial."""
    rows, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    size, vocabulary = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype, weight_dtype = draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))
    if dtype == weight_dtype == torch.float32:
        hidden, weight = (random.normal(size=n) for n in ((rows, tokens, size), (vocabulary, size)))
        weight = weight * draw(st.sampled_from(scales))
    else:
        hidden, weight = (random.integers(-3, 4, size=n) for n in ((rows, tokens, size), (vocabulary, size)))
    return Head(
        torch.tensor(hidden, dtype=dtype),
        torch.tensor(weight, dtype=weight_dtype),
        torch.tensor(random.integers(vocabulary, size=(rows, tokens))),
        draw(st.sampled_from([0.25, 0.7, 1.0, 3.0])),
        draw(st.integers(1, rows * tokens + 3)),
    )


@holds(head=heads(), blocked=st.sets(st.integers(0, 8)))
def test_log_probabilities_are_those_of_the_softmax(head, blocked):
    """`blocked` tokens get a logit of -inf, as some families do after their head; token 0 always stays possible."""
    out = sorted(v for v in blocked if 0 < v < len(head.weight))

    def after_ours(logits):
        return logits.index_fill(-1, torch.tensor(out, dtype=torch.long), -math.inf)

    def after_slow(logits):
        logits[out] = -math.inf
        return logits

    logprobs, entropy = token_logprobs(
        head.hidden, head.weight, head.targets, head.temperature, head.chunk, after_ours if out else None
    )
    assert logprobs.dtype == entropy.dtype == torch.float32
    weight = head.weight.double().numpy()
    expected = [
        [slow.token_logprobs(h, weight, y, head.temperature, after_slow) for h, y in zip(hs, ys, strict=True)]
        for hs, ys in zip(head.hidden.double().numpy(), head.targets.tolist(), strict=True)
    ]
    size = 1 + (head.hidden.double().abs() @ head.weight.double().abs().T).max().item() / head.temperature
    near(logprobs, [[p[0] for p in row] for row in expected], size)
    near(entropy, [[p[1] for p in row] for row in expected], size)


@holds(head=heads(), place=st.integers(0, 71), fill=st.sampled_from(GARBAGE))
def test_a_position_says_nothing_about_the_others(head, place, fill):
    """The states of padded positions may be anything."""
    place = divmod(place % head.targets.numel(), head.targets.shape[1])
    spoiled = head.hidden.clone()
    spoiled[place] = fill
    others = torch.ones_like(head.targets, dtype=torch.bool)
    others[place] = False
    rest = head.weight, head.targets, head.temperature, head.chunk
    for clean, dirty in zip(token_logprobs(head.hidden, *rest), token_logprobs(spoiled, *rest), strict=True):
        assert torch.equal(clean[others], dirty[others])


@holds(head=heads([torch.float32], (0.125, 1.0, 2.0)), seed=st.integers(0, 2**32 - 1))
def test_log_probability_gradients_by_finite_differences(head, seed):
    random = np.random.default_rng(seed)
    up = random.normal(size=head.targets.shape).astype(np.float32)
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, head.targets, head.temperature, head.chunk)
    (logprobs * torch.tensor(up)).sum().backward()
    assert not entropy.requires_grad

    arrays = {"hidden": hidden.detach().double().numpy(), "weight": weight.detach().double().numpy()}

    def total() -> float:
        return sum(
            float(up[b, t]) * slow.token_logprobs(arrays["hidden"][b, t], arrays["weight"], int(y), head.temperature)[0]
            for b, row in enumerate(head.targets)
            for t, y in enumerate(row)
        )

    step = 1e-5
    for name, gradient in (("hidden", hidden.grad), ("weight", weight.grad)):
        moved = arrays[name]
        for _ in range(2):
            place = tuple(int(random.integers(n)) for n in moved.shape)
            start = moved[place]
            sums = []
            for sign in (1, -1):
                moved[place] = start + sign * step
                sums.append(total())
            moved[place] = start
            size = np.abs(up).sum() * max(1.0, np.abs(arrays["hidden"]).max(), np.abs(arrays["weight"]).max())
            near(gradient[place], (sums[0] - sums[1]) / (2 * step), size / head.temperature, 1e-5)


# -- KL, rewards, advantages -------------------------------------------------------------------------------


@holds(columns=ragged(2, scales=(1.0,)), kind=st.sampled_from(["k1", "k2", "k3"]))
def test_kl_estimates(columns, kind):
    new, reference = columns
    ours = ppo_math.kl_estimate(new.tensor, reference.tensor, kind)
    for b, (row, other) in enumerate(zip(new.rows, reference.rows, strict=True)):
        expected = [slow.kl_estimate(p, q, kind) for p, q in zip(row, other, strict=True)]
        size = np.abs(expected) + np.abs(np.subtract(row, other))
        near(ours[b, : len(row)], expected, size)
        assert kind == "k1" or (ours[b, : len(row)] >= 0).all()


@holds(
    columns=ragged(1),
    scores=st.lists(st.integers(-(10**6), 10**6), min_size=6, max_size=6),
    dtype=st.sampled_from(DTYPES),
    kl_coef=st.sampled_from([0.0, 0.02, 1.0, 7.5]),
)
def test_token_rewards(columns, scores, dtype, kl_coef):
    (kl,) = columns
    scores = (torch.tensor(scores[: len(kl.rows)]) / 64).to(dtype)
    ours = ppo_math.token_rewards(scores, kl.tensor, kl.mask, kl_coef)
    expected = [slow.token_rewards(s, row, kl_coef) for s, row in zip(scores.tolist(), kl.rows, strict=True)]
    size = kl_coef * kl.largest + scores.double().abs()[:, None].numpy()
    near(ours, padded_like(kl, expected), size)
    assert (ours[~kl.mask] == 0).all()


@holds(columns=ragged(2), gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]), lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae(columns, gamma, lam):
    rewards, values = columns
    expected = [slow.gae(r, v, gamma, lam) for r, v in zip(rewards.rows, values.rows, strict=True)]
    for ours, rows in zip(
        ppo_math.gae(rewards.tensor, values.tensor, rewards.mask, gamma, lam), zip(*expected, strict=True), strict=True
    ):
        near(ours, padded_like(rewards, rows), rewards.total + values.total)
        assert (ours[~rewards.mask] == 0).all()


@holds(columns=ragged(1))
def test_moments_and_masked_mean(columns):
    (x,) = columns
    mean, var = ppo_math.moments(x.tensor, x.mask)
    expected = slow.moments(x.rows)
    near(mean, expected[0], x.largest)
    near(var, expected[1], expected[1] + 1e-6 * x.largest**2)
    for count, meant in counts(int(x.mask.sum())):
        near(ppo_math.masked_mean(x.tensor, x.mask, count), slow.masked_mean(x.rows, meant), x.total / meant)


@holds(
    columns=ragged(1),
    keep_mean=st.booleans(),
    mean_var=st.sampled_from([None, (0.0, 1.0), (-3.25, 0.0), (2.0, 17.5)]),
)
def test_standardize_and_rescale(columns, keep_mean, mean_var):
    (x,) = columns
    function = ppo_math.rescale if keep_mean else ppo_math.standardize
    given_moments = None if mean_var is None else (torch.tensor(mean_var[0]), torch.tensor(mean_var[1]))
    ours = function(x.tensor, x.mask, given_moments)
    expected = slow.standardize(x.rows, mean_var, keep_mean)
    mean, var = slow.moments(x.rows) if mean_var is None else mean_var
    spread = math.sqrt(var + 1e-8)
    near(ours, padded_like(x, expected), (x.largest + abs(mean)) / spread + abs(mean))
    assert (ours[~x.mask] == 0).all()


@holds(columns=ragged(1))
def test_equal_numbers_have_no_variance_and_standardize_to_nothing(columns):
    (x,) = columns
    equal = torch.where(x.mask, x.tensor[0, 0], x.tensor)
    assert ppo_math.moments(equal, x.mask)[1] == 0
    assert (ppo_math.standardize(equal, x.mask) == 0).all()
    assert torch.equal(ppo_math.rescale(equal, x.mask), torch.where(x.mask, x.tensor[0, 0].float(), 0.0))


# -- losses of PPO -----------------------------------------------------------------------------------------

CLIPS = st.sampled_from([0.1, 0.2, 0.5])
VALUE_CLIPS = st.sampled_from([2.0**-6, 0.2, 0.5, math.inf])


@st.composite
def policies(draw) -> list[Column]:
    """New and old log-probs at most 60 nats apart (the ratio stays a float32), and advantages up to 30,000."""
    new, old, _ = draw(ragged(3, scales=(1.0,)))
    if draw(st.booleans()):  # the usual case: new stays close to old
        rows = [[x + y / 64 for x, y in zip(a, b, strict=True)] for a, b in zip(old.rows, new.rows, strict=True)]
        new = Column(with_padding(rows, old.tensor.shape[1], draw(st.sampled_from(GARBAGE))), rows)
    rows = [row[: len(other)] for row, other in zip(
        numbers(draw, old.tensor.shape, 30.0, (2.0**-10, 1.0, 2.0**10)).tolist(), old.rows, strict=True
    )]  # fmt: skip
    return [new, old, Column(with_padding(rows, old.tensor.shape[1], draw(st.sampled_from(GARBAGE))), rows)]


def flat(column: Column) -> np.ndarray:
    return np.array([x for row in column.rows for x in row])


@holds(columns=policies(), clip=CLIPS, which=st.integers(0, 4))
def test_policy_loss(columns, clip, which):
    new, old, advantages = columns
    count, meant = counts(int(new.mask.sum()))[which]
    loss, stats = ppo_math.policy_loss(new.tensor, old.tensor, advantages.tensor, new.mask, clip, count)
    expected = slow.policy_loss(new.rows, old.rows, advantages.rows, clip, meant)
    ratio = np.exp(flat(new) - flat(old))
    # a ratio below 1 - clip still counts as much as the bound, one above it as itself
    near(loss, expected[0], (np.maximum(ratio, 1) * np.abs(flat(advantages))).sum() / meant)
    near(stats.clip_fraction, expected[1], len(ratio) / meant)
    near(stats.approx_kl_nats, expected[2], (ratio + np.abs(flat(new) - flat(old))).sum() / meant)
    near(stats.ratio_max, expected[3], expected[3])
    near(stats.ratio_error, expected[4], 1 + expected[3])


@holds(columns=policies(), clip=CLIPS)
def test_policy_gradient_by_finite_differences(columns, clip):
    new, old, advantages = columns
    n = int(new.mask.sum())
    leaf = new.tensor.float().clone().requires_grad_()
    ppo_math.policy_loss(leaf, old.tensor, advantages.tensor, new.mask, clip)[0].backward()
    assert (leaf.grad[~new.mask] == 0).all()
    step = 1e-5
    for gradient, p, q, a in zip(leaf.grad[new.mask], flat(new), flat(old), flat(advantages), strict=True):
        ratio = math.exp(p - q)
        if min(abs(ratio - 1 - clip), abs(ratio - 1 + clip)) < 1e-4:
            continue  # a kink: no derivative there
        ends = [slow.policy_loss([[p + d]], [[q]], [[a]], clip, n)[0] for d in (step, -step)]
        near(gradient, (ends[0] - ends[1]) / (2 * step), abs(a) * max(ratio, 1) / n)


CAPS = st.sampled_from([1.0, 1.5, 2.0, math.inf])


@holds(columns=policies(), cap=CAPS)
def test_importance_weights(columns, cap):
    ours, engine, _ = columns
    weights = ppo_math.importance_weights(ours.tensor, engine.tensor, ours.mask, cap)
    expected = padded_like(ours, slow.importance_weights(ours.rows, engine.rows, cap))
    near(weights, expected, expected)
    assert weights.dtype == torch.float32


@holds(columns=policies(), engine=st.data(), clip=CLIPS, cap=CAPS, which=st.integers(0, 4))
def test_weighted_policy_loss(columns, engine, clip, cap, which):
    """The engine's log-probs are another draw of the same shape: the old ones, some of them moved."""
    new, old, advantages = columns
    count, meant = counts(int(new.mask.sum()))[which]
    moved = numbers(engine.draw, old.tensor.shape, 4.0)
    rows = [[x + d for x, d in zip(row, ds[: len(row)], strict=True)] for row, ds in zip(old.rows, moved, strict=True)]
    theirs = with_padding(rows, old.tensor.shape[1], engine.draw(st.sampled_from(GARBAGE)), torch.float64)
    weights = ppo_math.importance_weights(old.tensor, theirs, new.mask, cap)
    weights = torch.where(new.mask, weights, engine.draw(st.sampled_from(GARBAGE)))
    loss, stats = ppo_math.policy_loss(new.tensor, old.tensor, advantages.tensor, new.mask, clip, count, weights)
    factors = slow.importance_weights(old.rows, rows, cap)
    expected = slow.policy_loss(new.rows, old.rows, advantages.rows, clip, meant, factors)
    terms = np.concatenate(factors) * np.maximum(np.exp(flat(new) - flat(old)), 1) * np.abs(flat(advantages))
    near(loss, expected[0], terms.sum() / meant)
    plain = ppo_math.policy_loss(new.tensor, old.tensor, advantages.tensor, new.mask, clip, count)[1]
    assert all(torch.equal(one, other) for one, other in zip(stats, plain, strict=True))


@holds(columns=ragged(3), clip=VALUE_CLIPS, which=st.integers(0, 4))
def test_value_loss(columns, clip, which):
    new, old, returns = columns
    count, meant = counts(int(new.mask.sum()))[which]
    loss, stats = ppo_math.value_loss(new.tensor, old.tensor, returns.tensor, new.mask, clip, count)
    expected = slow.value_loss(new.rows, old.rows, returns.rows, clip, meant)
    size = (np.abs(flat(new)) + np.abs(flat(old)) + np.abs(flat(returns))) ** 2
    near(loss, expected[0], size.sum() / meant)
    near(stats.value_clip_fraction, expected[1], flat(new).size / meant)


@holds(columns=ragged(3), clip=VALUE_CLIPS)
def test_value_gradient_by_finite_differences(columns, clip):
    new, old, returns = columns
    n = int(new.mask.sum())
    leaf = new.tensor.float().clone().requires_grad_()
    ppo_math.value_loss(leaf, old.tensor, returns.tensor, new.mask, clip)[0].backward()
    assert (leaf.grad[~new.mask] == 0).all()
    for gradient, v, before, target in zip(leaf.grad[new.mask], flat(new), flat(old), flat(returns), strict=True):
        size = abs(v) + abs(before) + abs(target) + 2.0**-20
        step = 2.0**-14 * size
        bounds = [before - clip, before + clip]
        if any(abs(v - kink) < 2 * step for bound in bounds for kink in (bound, 2 * target - bound)):
            continue  # where the clip begins, and where the other square becomes the larger one
        ends = [slow.value_loss([[v + d]], [[before]], [[target]], clip, n)[0] for d in (step, -step)]
        near(gradient, (ends[0] - ends[1]) / (2 * step), size / n)


def weighted_policy_loss(new, old, advantages, engine, mask, clip, count):
    weights = ppo_math.importance_weights(old, engine, mask, 2.0)
    return ppo_math.policy_loss(new, old, advantages, mask, clip, count, weights)


@holds(
    columns=ragged(4, limit=4.0, scales=(1.0,)),
    which=st.sampled_from(["policy", "weighted policy", "value"]),
    data=st.data(),
)
def test_rows_apart_padded_otherwise_and_in_another_order_add_up_to_the_whole(columns, which, data):
    """The contract behind micro-batches: with the whole count, any split gives the same loss, gradient and metrics."""
    function = {
        "policy": ppo_math.policy_loss, "weighted policy": weighted_policy_loss, "value": ppo_math.value_loss,
    }[which]  # fmt: skip
    columns = columns[: 4 if which == "weighted policy" else 3]
    lengths = [len(row) for row in columns[0].rows]
    leaves = [torch.tensor(row, requires_grad=True) for row in columns[0].rows]
    order = data.draw(st.permutations(range(len(lengths))))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(lengths)))) | {0, len(lengths)})

    def run(groups):
        for leaf in leaves:
            leaf.grad = None
        losses, stats = [], []
        for group in groups:
            width = max(lengths[i] for i in group) + data.draw(st.integers(0, 2))
            fill = data.draw(st.sampled_from(GARBAGE))
            stacked = torch.stack([torch.cat([leaves[i], torch.full((width - lengths[i],), fill)]) for i in group])
            others = [with_padding([column.rows[i] for i in group], width, fill) for column in columns[1:]]
            mask = torch.arange(width)[None] < torch.tensor([lengths[i] for i in group])[:, None]
            loss, parts = function(stacked, *others, mask, 0.2, sum(lengths))
            loss.backward()
            losses.append(loss.item())
            stats.append([part.item() for part in parts])
        joined = [max(part) if i in (2, 3) else sum(part) for i, part in enumerate(zip(*stats, strict=True))]
        return sum(losses), joined, torch.cat([leaf.grad for leaf in leaves])

    whole = run([list(range(len(lengths)))])
    split = run([order[a:b] for a, b in itertools.pairwise(cuts)])
    size = 16 * math.exp(8)  # the largest ratio times the largest advantage and weight, and room
    near(split[0], whole[0], size)
    near(split[1], whole[1], size)
    near(split[2], whole[2], size / sum(lengths))


# -- metrics and the controller ----------------------------------------------------------------------------


@holds(columns=ragged(2))
def test_explained_variance(columns):
    values, returns = columns
    error = np.std(flat(returns) - flat(values))
    spread = math.sqrt(np.var(flat(returns)) + 1e-8)
    # a difference, or a mean, of numbers of size m is off by 2^-24 m or so in float32: what that does to each variance
    blur = 2.0**-22 * np.array([values.largest + returns.largest, returns.largest])
    wrong = (2 * blur * [error, spread] + blur**2) / spread**2
    share = (error / spread) ** 2
    ours = ppo_math.explained_variance(values.tensor, returns.tensor, values.mask)
    expected = slow.explained_variance(values.rows, returns.rows)
    near(ours, expected, 1 + share + (wrong[0] + share * wrong[1]) / 2e-6)


@holds(
    coef=st.floats(1e-6, 1e3),
    kl=st.floats(-1e3, 1e3),
    target=st.floats(1e-3, 100),
    responses=st.integers(1, 10**4),
    horizon=st.integers(10**4, 10**6),
)
def test_the_kl_controller(coef, kl, target, responses, horizon):
    ours = ppo_math.adapt_kl_coef(coef, kl, target, responses, horizon)
    near(ours, slow.adapt_kl_coef(coef, kl, target, responses, horizon), coef, 1e-12)
    assert 0.8 * coef * (1 - 1e-12) <= ours <= 1.2 * coef * (1 + 1e-12)  # one update moves it by a fifth at most


# -- losses over rankings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    """`n` responses; prompts and texts are lists or None."""

    scores: torch.Tensor
    ranks: torch.Tensor
    margins: torch.Tensor
    prompts: list[int] | None
    texts: list[int] | None

    def tensors(self) -> dict:
        lists = {"prompts": self.prompts, "texts": self.texts}
        return {name: None if x is None else torch.tensor(x) for name, x in lists.items()}

    def lists(self) -> tuple:
        return self.scores.tolist(), self.ranks.tolist(), self.prompts, self.texts


@st.composite
def rankings(draw) -> Ranked:
    n = draw(st.integers(1, 10))
    few = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    scores = torch.tensor(numbers(draw, n, 30.0, (2.0**-10, 1.0, 2.0**10)))
    return Ranked(
        scores.to(draw(st.sampled_from(DTYPES))),
        torch.tensor(draw(few)) / 2,
        torch.tensor(numbers(draw, n, 3.0)).to(draw(st.sampled_from(DTYPES))),
        draw(st.none() | few),
        draw(st.none() | few),
    )


def versions(case: Ranked, epsilon: float):
    """Our three losses, each as a function of scores and count, with the slow loss's keywords."""
    kw = case.tensors()
    return [
        (lambda s, count: losses.ranking_loss(s, case.ranks, **kw, count=count), {}),
        (
            lambda s, count: losses.smoothed_ranking_loss(s, case.ranks, epsilon, **kw, count=count),
            {"epsilon": epsilon},
        ),
        (
            lambda s, count: losses.margin_ranking_loss(s, case.ranks, case.margins, **kw, count=count),
            {"margins": case.margins.tolist()},
        ),
    ]


@holds(case=rankings(), epsilon=st.sampled_from([0.0, 0.1, 0.5]), count=st.sampled_from([None, 1, 7.5]))
def test_ranking_losses(case, epsilon, count):
    scores, ranks, prompts, texts = case.lists()
    size = 1 + max(map(abs, scores))
    for function, formula in versions(case, epsilon):
        expected = losses_numpy.ranking_loss(scores, ranks, prompts, texts, count, **formula)
        ours = function(case.scores, None if count is None else torch.tensor(count))
        assert ours.dtype == torch.float32
        near(ours, expected, 12 * size)  # up to 4 prompts, each of them at most 2 * size + 3
        near(function(case.scores, count), expected, 12 * size)


@holds(case=rankings(), epsilon=st.sampled_from([0.0, 0.1, 0.5]))
def test_ranking_gradients_by_finite_differences(case, epsilon):
    scores, ranks, prompts, texts = case.lists()
    step = 1e-4
    for function, formula in versions(case, epsilon):
        leaf = case.scores.float().clone().requires_grad_()
        function(leaf, None).backward()
        for i, gradient in enumerate(leaf.grad):
            ends = []
            for sign in (1, -1):
                moved = [s + sign * step * (i == j) for j, s in enumerate(scores)]
                ends.append(losses_numpy.ranking_loss(moved, ranks, prompts, texts, **formula))
            near(gradient, (ends[0] - ends[1]) / (2 * step), 1.0)


@holds(case=rankings())
def test_pairs_and_outcomes(case):
    scores, ranks, prompts, texts = case.lists()
    expected = losses_numpy.outcomes(scores, ranks, prompts, texts)
    better, worse = losses.ranked_pairs(case.ranks, **case.tensors())
    ours = losses.pair_outcomes(case.scores, case.ranks, **case.tensors())
    pairs = list(zip(better.tolist(), worse.tolist(), strict=True))
    assert len(pairs) == len(expected)
    assert dict(zip(pairs, ours.tolist(), strict=True)) == expected


@holds(case=rankings(), count=st.sampled_from([None, 2, 0.5]))
def test_mean_over_prompts(case, count):
    prompts = case.prompts or [5] * len(case.scores)
    values = case.scores.float()
    means = [np.mean([v for v, p in zip(values.tolist(), prompts, strict=True) if p == q]) for q in set(prompts)]
    ours = losses.mean_over_prompts(values, torch.tensor(prompts), count)
    near(ours, sum(means) / (len(means) if count is None else count), 8 * values.abs().max().item())


@holds(case=rankings(), order=st.randoms(use_true_random=False))
def test_the_order_of_responses_and_a_shift_of_all_scores_change_no_loss(case, order):
    places = list(range(len(case.scores)))
    order.shuffle(places)
    kw = case.tensors()
    moved = {name: None if x is None else x[places] for name, x in kw.items()}
    whole = losses.ranking_loss(case.scores, case.ranks, **kw)
    size = 1 + case.scores.float().abs().max().item()
    near(losses.ranking_loss(case.scores[places], case.ranks[places], **moved), whole.item(), size)
    near(losses.ranking_loss(case.scores.float() + 16.0, case.ranks, **kw), whole.item(), size)


# -- many examples -----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", PROPERTIES)
def test_with_many_examples(name):
    PROPERTIES[name]()
