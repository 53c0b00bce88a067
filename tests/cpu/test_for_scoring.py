"""Scoring lends a model another attention, also where threads share the model."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from reference.tiny_chain import chain

from reward_models import RewardModel
from rlhf import cpu
from rlhf.cpu import attention

PROMPTS = ["Say hi.", "What is the capital of France?", "Count to ten", "x"]
COMPLETIONS = ["Hi", "Paris", "one two three four five six seven eight nine ten", "word " * 60]


@pytest.fixture
def reward_model(tmp_path, tiny_model, tiny_tokenizer):
    return RewardModel.load(chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)[1], device="cpu")


def test_the_last_to_leave_puts_the_attention_back(reward_model):
    model = reward_model.model
    first, second = cpu.for_scoring(model), cpu.for_scoring(model)
    assert first.__enter__()
    assert second.__enter__()
    first.__exit__(None, None, None)
    assert attention.uses_short_rows(model), "the second is still inside"
    second.__exit__(None, None, None)
    assert not attention.uses_short_rows(model)
    attention.use_short_rows(model)
    with cpu.for_scoring(model):
        pass
    assert attention.uses_short_rows(model), "as it was before"


def test_threads_that_share_a_model_get_the_scores_of_one(reward_model):
    alone = reward_model(PROMPTS, COMPLETIONS)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(reward_model, PROMPTS[k % 3 :], COMPLETIONS[k % 3 :]) for k in range(60)]
            for k, answer in enumerate(asked):
                np.testing.assert_allclose(answer.result(), alone[k % 3 :], atol=1e-5)
    finally:
        sys.setswitchinterval(before)
    assert not attention.uses_short_rows(reward_model.model)
