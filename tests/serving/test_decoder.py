"""Rows that join and leave a batch between two steps are written as alone; scores are a plain forward's."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from reference.families import EXPERTS, FAMILIES, MORE, VARIANTS, new_model
from transformers import DynamicCache, GenerationConfig

from rlhf.errors import InputError
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.engine import RowGenerator
from rlhf.serving import cache as caches
from rlhf.serving.decoder import Decoder, Row, next_tokens, nucleus, scored_prompts

STOP, PAD = 0, 3
QUICK = ("llama", "mistral", "gemma3_text", "gpt2", "bloom", "lfm2", "qwen3_5_text")
TOO = [name for name in (*FAMILIES, *VARIANTS, *MORE, *EXPERTS) if name not in QUICK]


def drawn_rows(seed: int, count: int, temperatures=(0.0, 0.7, 1.0), top=None) -> list[Row]:
    rng = random.Random(seed)
    return [
        Row(
            [rng.randrange(4, 400) for _ in range(rng.choice((1, 3, 9, 14)))],
            rng.randrange(1, 15),
            rng.choice(temperatures),
            1.0,
            rng.randrange(2**31),
            top,
        )
        for _ in range(count)
    ]


def written(decoder: Decoder, rows: list[Row], seed: int) -> dict[Row, list]:
    """Decode rows that join at steps drawn by the seed, and leave at a stop token or their most tokens."""
    rng, waiting, found = random.Random(seed), list(rows), {row: [] for row in rows}
    while waiting or decoder.rows:
        joining = []
        while waiting and rng.random() < 0.6 and decoder.fits(waiting[0], joining):
            joining.append(waiting.pop(0))
        drawn = decoder.admit(joining) if joining else []
        for row, token in drawn + (decoder.step() if decoder.rows and not drawn else []):
            found[row].append(token)
            row.done = token.id == STOP or row.written == row.max_tokens
        decoder.leave()
    return found


def alone(model, row: Row) -> list[int]:
    """What our sampler writes for the same prompt and seed."""
    engine = TransformersEngine(model, [STOP], PAD)
    seeded = RowGenerator.of([row.seed], 0, "cpu")
    return engine.generate([row.prompt], row.max_tokens, row.temperature, seeded).ids[0]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in TOO)])
def test_rows_that_join_and_leave_are_written_as_alone(name):
    model = new_model(name)
    rows = drawn_rows(1, 16)
    found = written(Decoder(model, PAD, 8, 10_000), rows, seed=2)
    assert [[token.id for token in found[row]] for row in rows] == [alone(model, row) for row in rows]
    assert len({len(tokens) for tokens in found.values()}) > 3


def test_greedy_rows_are_transformers_own_generate():
    model = new_model("llama")
    rows = drawn_rows(3, 6, temperatures=(0.0,))
    found = written(Decoder(model, PAD, 4, 10_000), rows, seed=4)
    for row in rows:
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=row.max_tokens, eos_token_id=[STOP], pad_token_id=PAD
        )
        whole = model.generate(torch.tensor([row.prompt]), generation_config=settings)[0].tolist()
        assert [token.id for token in found[row]] == whole[len(row.prompt) :]


def test_choices_of_one_prompt_share_its_forward(monkeypatch):
    model = new_model("llama")
    prompt = [5, 6, 7, 8]
    rows = [Row(prompt, 6, 1.0, 1.0, seed) for seed in range(5)]
    shapes = []
    monkeypatch.setattr("rlhf.serving.decoder.next_logits", spying(shapes))
    found = written(Decoder(model, PAD, 8, 1000), rows, seed=0)
    assert shapes[0][1] == len(prompt)
    assert shapes[0][0] == 1
    assert [[token.id for token in found[row]] for row in rows] == [alone(model, row) for row in rows]
    assert len({tuple(token.id for token in tokens) for tokens in found.values()}) == 5


def spying(shapes):
    from rlhf.sampling.decode import next_logits

    def spy(model, ids, *rest):
        shapes.append(tuple(ids.shape))
        return next_logits(model, ids, *rest)

    return spy


def test_columns_that_nobody_uses_are_cut_off():
    model = new_model("llama")
    decoder = Decoder(model, PAD, 8, 10_000)
    long, short = Row([9] * 40, 2, 1.0, 1.0, 1), Row([5, 6], 30, 1.0, 1.0, 2)
    decoder.admit([long, short])
    assert decoder.attention.shape == (2, 40)
    long.done = True
    decoder.leave()
    assert decoder.attention.shape == (1, 2)
    assert decoder.cache.get_seq_length() == 2
    decoder.step()
    assert decoder.attention.shape == (1, 3)
    short.done = True
    decoder.leave()
    assert decoder.rows == []


def test_the_cache_has_a_limit():
    decoder = Decoder(new_model("llama"), PAD, most_rows=3, most_columns=40)
    row = Row([5] * 6, 4, 1.0, 1.0, 0)
    assert decoder.fits(row)
    assert decoder.fits(row, [row, row])
    assert not decoder.fits(row, [row, row, row])  # rows
    assert decoder.fits(Row([5] * 16, 4, 1.0, 1.0, 0), [row])  # 2 x 20
    assert not decoder.fits(Row([5] * 17, 4, 1.0, 1.0, 0), [row])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gptj"])
def test_scores_are_a_plain_forwards(name):
    """Of sampled tokens at any temperature, and of prompts: the whole softmax at temperature 1. Families whose logits
    are changed after the head are among them."""
    model = new_model(name)
    rows = drawn_rows(5, 6, top=3)
    found = written(Decoder(model, PAD, 8, 10_000), rows, seed=6)
    prompts = scored_prompts(model, [row.prompt for row in rows], PAD, 3)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = row.prompt + [token.id for token in found[row]]
        expected = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        told = [*prompt, *found[row]]
        assert [token.id for token in told] == ids[1:]
        for place, token in enumerate(told):
            likely = expected[place].topk(3)
            assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-5)
            assert [i for i, _ in token.top] == likely.indices.tolist()
            np.testing.assert_allclose([value for _, value in token.top], likely.values, atol=1e-5)


def test_rows_ask_for_different_numbers_of_likely_tokens():
    model = new_model("llama")
    rows = [Row([5, 6], 1, 1.0, 1.0, 0, top) for top in (None, 0, 2)]
    drawn = [token for _, token in Decoder(model, PAD, 8, 100).admit(rows)]
    assert [(token.logprob is None, len(token.top)) for token in drawn] == [(True, 0), (False, 0), (False, 2)]


def test_nucleus_by_hand():
    """Holtzman et al. 2020: the fewest tokens that reach the share."""
    probabilities = torch.tensor([[0.1, 0.5, 0.05, 0.35], [0.1, 0.5, 0.05, 0.35], [0.25, 0.25, 0.25, 0.25]])
    kept = nucleus(probabilities, torch.tensor([0.6, 0.4, 0.5]))
    np.testing.assert_allclose(kept, [[0, 0.5, 0, 0.35], [0, 0.5, 0, 0], [0.25, 0.25, 0, 0]])


def test_top_p_and_temperature_are_each_rows_own():
    logits = torch.tensor([[0.0, 2.0, 1.0, -3.0]]).repeat(4, 1)
    softmax = np.exp([0.0, 2.0, 1.0, -3.0])
    softmax /= softmax.sum()
    rows = [
        Row([1], 1, temperature, top_p, 0) for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.8), (0.5, 1.0))
    ]
    seen = np.zeros((4, 4))
    count = 500
    for number in np.linspace(0, 1, count, endpoint=False):
        for row in rows:
            row.numbers = [float(number)] if row.temperature else []
        for place, token in enumerate(next_tokens(logits, rows).tolist()):
            seen[place, token] += 1 / count
    cooler = np.exp([0.0, 4.0, 2.0, -6.0])
    two = softmax * [0, 1, 1, 0]
    for place, expected in enumerate([np.array([0, 1.0, 0, 0]), softmax, two / two.sum(), cooler / cooler.sum()]):
        np.testing.assert_allclose(seen[place], expected, atol=5e-3)


def test_a_cache_that_rows_cannot_join_is_refused():
    class Odd:
        pass

    cache = DynamicCache(config=new_model("llama").config)
    caches.check(cache)
    cache.layers[0] = Odd()
    with pytest.raises(InputError, match="Odd: rows cannot join"):
        caches.check(cache)
