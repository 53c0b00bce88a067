"""The decode loop against transformers' own, the softmax it samples from, batches and micro-batch plans."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from rlhf.padding import make_batch, pad
from rlhf.ppo.plan import plan_minibatches, split_by_tokens
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.draw import draw, sample
from rlhf.sampling.engine import RowGenerator, row_seeds

PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26], [30, 31], [9, 8, 7, 6]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def engine_of(model, stop_ids=(0,), **changes) -> TransformersEngine:
    return TransformersEngine(model, stop_ids, 3, **changes)


@pytest.fixture
def sharp_model(tiny_model):
    """Far from uniform, so that the likeliest token is clear, and with a hub model's usual sampling defaults."""
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(4.0)
    tiny_model.generation_config = GenerationConfig(
        top_k=1, top_p=0.1, temperature=0.3, repetition_penalty=5.0, do_sample=True
    )
    return tiny_model


def hf_greedy(model, prompt, new_tokens, stop_ids):
    model.eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=list(stop_ids), pad_token_id=3)
    model.generation_config = GenerationConfig()
    return model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()


def stops_that_occur(model) -> list[int]:
    """Two tokens that greedy decoding writes somewhere in the middle of two different responses."""
    free = engine_of(model, (399,)).generate(PROMPTS, 12, 0.0, generator()).ids
    return sorted({free[0][4], free[2][6]})


def test_temperature_0_is_greedy_decoding_as_transformers_has_it(sharp_model):
    stops = stops_that_occur(sharp_model)
    responses = engine_of(sharp_model, stops).generate(PROMPTS, 12, 0.0, generator())
    expected = [hf_greedy(sharp_model, prompt, 12, stops) for prompt in PROMPTS]
    assert responses.ids == expected
    assert len({len(row) for row in expected}) > 1, "rows should leave the batch at different steps"
    assert responses.stopped == [row[-1] in stops for row in expected]
    assert {True} <= set(responses.stopped)


@pytest.mark.parametrize("rows_per_batch", [1, 2, 256])
def test_batch_mates_and_left_padding_change_nothing(sharp_model, rows_per_batch):
    stops = stops_that_occur(sharp_model)
    alone = [engine_of(sharp_model, stops).generate([prompt], 12, 0.0, generator()).ids[0] for prompt in PROMPTS]
    for order in (range(5), [4, 2, 0, 1, 3]):
        together = engine_of(sharp_model, stops, rows_per_batch=rows_per_batch).generate(
            [PROMPTS[i] for i in order], 12, 0.0, generator()
        )
        assert together.ids == [alone[i] for i in order]


def test_left_padding_with_learned_positions():
    """Rotary positions forgive a shift; GPT-2's learned ones don't."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)
    together = engine_of(model, (399,)).generate(PROMPTS, 8, 0.0, generator()).ids
    assert together == [hf_greedy(model, prompt, 8, (399,)) for prompt in PROMPTS]
    assert len({tuple(row) for row in together}) > 1


def test_every_stop_id_stops_and_is_kept(tiny_model):
    stops = list(range(0, 400, 4))  # a quarter of an almost uniform vocabulary
    responses = engine_of(tiny_model, stops).generate(PROMPTS * 20, 6, 1.0, generator())
    for row, stopped in zip(responses.ids, responses.stopped, strict=True):
        assert 1 <= len(row) <= 6
        assert not any(token in stops for token in row[:-1])
        assert stopped == (row[-1] in stops)
        assert stopped or len(row) == 6
    assert 0 < sum(responses.stopped) < len(responses.stopped)
    assert len({row[-1] for row, s in zip(responses.ids, responses.stopped, strict=True) if s}) > 3


def test_a_pad_token_may_be_sampled_and_may_be_the_stop_token(tiny_model):
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()  # every token is as likely
    responses = TransformersEngine(tiny_model, [3], 3).generate(PROMPTS * 100, 40, 1.0, generator())
    assert any(responses.stopped)
    responses = TransformersEngine(tiny_model, [0], 3).generate(PROMPTS * 100, 40, 1.0, generator())
    assert any(3 in row for row in responses.ids)


def test_max_new_tokens_of_one(tiny_model):
    responses = engine_of(tiny_model).generate(PROMPTS, 1, 1.0, generator())
    assert [len(row) for row in responses.ids] == [1] * 5


def test_sampling_follows_the_full_softmax_at_its_temperature(sharp_model):
    """2,000 samples of two tokens against the model's own probabilities, second token given the first."""
    temperature, count, prompt = 1.7, 2000, [5, 6, 7]
    sharp_model.lm_head.weight.data.mul_(3.0)
    ids = engine_of(sharp_model, (399,)).generate([prompt] * count, 2, temperature, generator()).ids
    with torch.no_grad():
        first = (sharp_model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).double().numpy()
        common = int(np.bincount([row[0] for row in ids]).argmax())
        second = (
            (sharp_model(torch.tensor([[*prompt, common]])).logits[0, -1] / temperature).softmax(-1).double().numpy()
        )
    for tokens, expected in [([r[0] for r in ids], first), ([r[1] for r in ids if r[0] == common], second)]:
        seen = np.bincount(tokens, minlength=400)
        n = len(tokens)
        likely = expected * n >= 5
        statistic = ((seen - expected * n) ** 2 / (expected * n))[likely].sum()
        rest, rest_expected = seen[~likely].sum(), expected[~likely].sum() * n
        statistic += (rest - rest_expected) ** 2 / rest_expected
        freedom = likely.sum()
        assert statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)
        assert freedom > 3


def test_sample_by_hand():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(30000, 3)
    numbers = torch.rand(30000, generator=generator(), dtype=torch.float64)
    seen = torch.bincount(sample(logits, 0.5, numbers), minlength=3) / 30000
    expected = np.exp([0, 2, 4]) / np.exp([0, 2, 4]).sum()
    np.testing.assert_allclose(seen.numpy(), expected, atol=0.01)
    assert sample(logits[:2], 0.0, numbers[:2]).tolist() == [2, 2]


@pytest.mark.parametrize("vocabulary", [3, 256, 700, 1024])
def test_a_draw_is_the_inverse_of_the_cumulative_probabilities(vocabulary):
    """At 2,000 levels, against a binary search in float64."""
    p = torch.rand(vocabulary, generator=generator()).pow(6)
    p[torch.rand(vocabulary, generator=generator(1)) < 0.3] = 0.0
    p = p / p.sum()
    levels = torch.rand(2000, generator=generator(2), dtype=torch.float64)
    seen = draw(p.expand(2000, -1).contiguous(), levels).numpy()
    ends = np.cumsum(p.double().numpy())
    expected = np.searchsorted(ends / ends[-1], levels.numpy(), side="right")
    near = np.abs(ends[:, None] / ends[-1] - levels.numpy()).min(0) < 1e-6  # sums in float32 may decide those
    assert near.mean() < 0.05
    np.testing.assert_array_equal(seen[~near], expected[~near])
    assert (p[torch.from_numpy(seen)] > 0).all()


@pytest.mark.parametrize("place", [0, 255, 256, 699])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0 - 2.0**-53])
def test_a_token_without_probability_is_never_drawn(place, level):
    p = torch.zeros(2, 700)
    p[:, place] = 0.1
    assert draw(p, torch.full((2,), level, dtype=torch.float64)).tolist() == [place, place]


def test_a_draw_from_what_is_not_a_number_stops():
    with pytest.raises(RuntimeError, match="a probability is not a number"):
        draw(torch.tensor([[0.5, 0.5], [float("nan"), 0.5]]), torch.full((2,), 0.5, dtype=torch.float64))


def test_a_response_depends_on_its_own_seed_alone(tiny_model):
    """Not on the rows beside it, their order, how many are sampled at once, or which of them have ended."""
    stops = list(range(0, 400, 9))
    seeds = [100 + i for i in range(len(PROMPTS))]

    def run(rows, at_once=256):
        engine, own = engine_of(tiny_model, stops, rows_per_batch=at_once), [seeds[i] for i in rows]
        return engine.generate([PROMPTS[i] for i in rows], 12, 1.0, RowGenerator.of(own, 7, "cpu")).ids

    together = run(range(len(PROMPTS)))
    assert len({len(row) for row in together}) > 2
    assert run(range(len(PROMPTS)), 2) == together
    assert run(range(len(PROMPTS) - 1, -1, -1)) == together[::-1]
    assert [run([i])[0] for i in range(len(PROMPTS))] == together
    sizes = (256, 2)
    plain = [
        engine_of(tiny_model, stops, rows_per_batch=size).generate(PROMPTS, 12, 1.0, generator()).ids for size in sizes
    ]
    assert plain[0] == plain[1]


def test_a_prompt_with_several_responses_is_read_once(tiny_model):
    """Its rows differ, as their seeds do, and are what each gives alone; the prompts' order is kept."""
    stops, asked = list(range(0, 400, 9)), [PROMPTS[i] for i in (2, 0, 2, 1, 0, 2)]
    read: list[int] = []
    tiny_model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))
    seeds = [50 + i for i in range(len(asked))]
    engine = engine_of(tiny_model, stops)
    together = engine.generate(asked, 12, 1.0, RowGenerator.of(seeds, 7, "cpu"))
    read.clear()
    assert engine.generate(asked, 1, 1.0, RowGenerator.of(seeds, 7, "cpu")).ids == [row[:1] for row in together.ids]
    assert read == [3 * max(len(prompt) for prompt in asked)]
    alone = [
        engine.generate([prompt], 12, 1.0, RowGenerator.of([seed], 7, "cpu")).ids[0]
        for prompt, seed in zip(asked, seeds, strict=True)
    ]
    assert together.ids == alone
    assert len({tuple(row) for row in alone}) == len(alone)


def test_a_plain_engine_reads_a_row_generator_as_any_other():
    first, second = RowGenerator.of([1, 2], 5, "cpu"), torch.Generator().manual_seed(5)
    assert torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))
    assert row_seeds(first, 2) == [1, 2]
    drawn = row_seeds(torch.Generator().manual_seed(5), 2)
    assert len(set(drawn)) == 2
    assert drawn == row_seeds(torch.Generator().manual_seed(5), 2)


def test_the_generator_alone_decides(tiny_model):
    def run(seed: int):
        return engine_of(tiny_model).generate(PROMPTS, 8, 1.0, generator(seed)).ids

    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    assert run(0) == first
    assert run(1) != first


def test_the_model_keeps_its_mode_and_gradient_checkpointing_does_not_matter(sharp_model):
    expected = engine_of(sharp_model).generate(PROMPTS, 8, 0.0, generator()).ids
    sharp_model.activation_checkpointing_enable()
    sharp_model.train()
    assert engine_of(sharp_model).generate(PROMPTS, 8, 0.0, generator()).ids == expected
    assert sharp_model.training


# -- batches -----------------------------------------------------------------------------------------------


def test_pad_takes_its_mask_from_lengths():
    ids, mask = pad([[3, 3], [7]], 3)
    assert ids.tolist() == [[3, 3], [7, 3]]
    assert mask.tolist() == [[True, True], [True, False]]
    ids, mask = pad([[3, 3], [7]], 3, side="left")
    assert ids.tolist() == [[3, 3], [3, 7]]
    assert mask.tolist() == [[True, True], [False, True]]


def test_batch_positions_stand_before_their_tokens():
    prompts, responses = [[10, 11, 12], [20]], [[13, 14], [21, 22, 23]]
    batch = make_batch(prompts, responses, 0, "cpu")
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 23, 0]]
    assert batch.attention_mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert batch.targets.tolist() == [[13, 14, 0], [21, 22, 23]]
    assert batch.mask.tolist() == [[True, True, False], [True] * 3]
    for b, t in itertools.product(range(2), range(3)):
        if batch.mask[b, t]:
            place = batch.positions()[b, t]
            assert batch.input_ids[b, place + 1] == batch.targets[b, t]


@pytest.mark.parametrize("every", [2, 3, 50])
def test_rows_that_leave_later_write_nothing_more(tiny_model, every):
    """As on a GPU, where finished rows stay in the batch for some steps; greedy, so that rows don't share draws."""
    prompts = [[5, 6, 7], [9], [20, 21, 22, 23, 24], [11, 12]]
    first = TransformersEngine(tiny_model, (), 0).generate(prompts, 12, 0.0, generator())
    stops = sorted({first.ids[0][2], first.ids[1][5], first.ids[2][0]})
    engine = TransformersEngine(tiny_model, stops, 0)
    expected = engine.generate(prompts, 12, 0.0, generator())
    assert {len(ids) for ids in expected.ids} != {12}
    engine.check_every = every
    assert engine.generate(prompts, 12, 0.0, generator()) == expected
    with engine.leaving_at_once():
        assert engine.check_every == 1
    assert engine.check_every == every


# -- micro-batch plans -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 40, 100, 10**9])
def test_a_plan_holds_every_row_once_within_its_sizes(tokens):
    lengths = torch.randint(1, 60, (48,), generator=generator()).tolist()
    plan = plan_minibatches(lengths, 8, tokens, generator(3))
    assert [sum(map(len, minibatch)) for minibatch in plan] == [8] * 6
    assert sorted(row for minibatch in plan for rows in minibatch for row in rows) == list(range(48))
    for rows in (rows for minibatch in plan for rows in minibatch):
        assert rows
        assert len(rows) == 1 or max(lengths[row] for row in rows) * len(rows) <= tokens
    if tokens == 10**9:
        assert all(len(minibatch) == 1 for minibatch in plan)
    if tokens == 1:
        assert all(len(minibatch) == 8 for minibatch in plan)


def test_tokens_per_microbatch_does_not_change_the_minibatches():
    lengths = torch.randint(1, 60, (48,), generator=generator()).tolist()

    def members(tokens: int):
        plan = plan_minibatches(lengths, 8, tokens, generator(3))
        return [sorted(row for rows in minibatch for row in rows) for minibatch in plan]

    assert members(1) == members(100) == members(10**9)
    other = plan_minibatches(lengths, 8, 100, generator(4))
    assert members(100) != [sorted(row for rows in minibatch for row in rows) for minibatch in other]


def test_a_split_by_hand():
    assert list(split_by_tokens([0, 1, 2, 3], [4, 2, 9, 2], 8)) == [[1, 3], [0], [2]]
    assert list(split_by_tokens([], [], 8)) == []


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        (0, [[1, 3], [0], [2]]),  # no padding at all
        (3, [[1, 3], [0], [2]]),  # 4 + 4 + 9 and three starts: 26; with [1, 3, 0], 12 + 9 and two: 27
        (5, [[1, 3, 0], [2]]),  # 31 against 32 for three, and 41 for one
        (16, [[1, 3, 0, 2]]),  # 36 + 16 against 21 + 32
    ],
)
def test_of_all_splits_the_cheapest(launch, expected):
    assert split_by_tokens([0, 1, 2, 3], [4, 2, 9, 2], 100, launch) == expected


def test_no_split_is_cheaper():
    """Against every way to cut a sorted list."""
    lengths = torch.randint(1, 60, (9,), generator=generator()).tolist()
    order = sorted(range(9), key=lambda r: lengths[r])

    def cost(cuts: tuple[int, ...]) -> float:
        parts = [order[a:b] for a, b in itertools.pairwise((0, *cuts, 9))]
        sizes = [max(lengths[r] for r in part) * len(part) for part in parts]
        return sum(sizes) + 20 * len(parts) if all(size <= 120 for size in sizes) else float("inf")

    best = min(cost(cuts) for n in range(9) for cuts in itertools.combinations(range(1, 9), n))
    found = split_by_tokens(range(9), lengths, 120, 20)
    assert sum(max(lengths[r] for r in part) * len(part) + 20 for part in found) == best
