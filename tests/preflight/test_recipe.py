"""Tests of the preflight recipe."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from reference.prepared import prepared_models
from transformers import Gemma2Config, Gemma2ForCausalLM, GPTJConfig, GPTJForCausalLM, GraniteConfig, GraniteForCausalLM

from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.scalar import ScoreNormalizer, new_scalar_model
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.inputs import prompts_of, value_start
from rlhf.ppo.preflight import check_logits
from rlhf.rows.records import Prompt

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = list(range(5, 25))


def families():
    more = {"intermediate_size": 32, "num_key_value_heads": 2}
    yield GPTJForCausalLM(GPTJConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=64))
    yield Gemma2ForCausalLM(Gemma2Config(**SMALL, **more, head_dim=8, final_logit_softcapping=0.05))
    yield GraniteForCausalLM(GraniteConfig(**SMALL, **more, logits_scaling=3.0))


def test_what_known_families_do_after_their_head_is_known():
    for model in families():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
        check_logits(prepared_models(model), IDS, 1e-5)


def test_an_unknown_change_of_logits_is_refused(tiny_model):
    plain = type(tiny_model).forward

    class Odd(type(tiny_model)):
        def forward(self, *args, **kwargs):
            outputs = plain(self, *args, **kwargs)
            outputs.logits = outputs.logits * 1.5 + torch.linspace(0, 1, 400)
            return outputs

    tiny_model.__class__ = Odd
    with pytest.raises(InputError, match=r"preflight: log-probabilities differ from the model's own by .* nats"):
        check_logits(prepared_models(tiny_model), IDS, 1e-4)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": text}]) for text in texts]


def test_long_prompts_are_left_out_and_named(tiny_tokenizer, caplog):
    chat.prepare_tokenizer(tiny_tokenizer)
    rows = prompts("Hi", "Please count " + "one two three " * 30, "What is the capital?")
    lengths = [len(chat.encode_prompt(tiny_tokenizer, p.messages)) for p in rows]
    limit = max(lengths[0], lengths[2])
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        kept, ids = prompts_of("train_dataset", rows, tiny_tokenizer, PPOConfig(max_prompt_tokens=limit))
    assert kept == [rows[0], rows[2]]
    assert ids == [chat.encode_prompt(tiny_tokenizer, p.messages) for p in kept]
    assert (
        f"train_dataset: 1 of 3 prompts longer than max_prompt_tokens={limit} left out: 'Please count one"
        in caplog.text
    )
    with pytest.raises(
        InputError, match=rf"all 3 prompts are longer than max_prompt_tokens=2 \(shortest: {lengths[0]} tokens\)"
    ):
        prompts_of("train_dataset", rows, tiny_tokenizer, PPOConfig(max_prompt_tokens=2))


def reward_model(model, tokenizer):
    return SimpleNamespace(model=new_scalar_model(model, seed=0), tokenizer=tokenizer, normalizer=ScoreNormalizer())


def test_the_value_model_starts_from_the_first_reward_model_that_reads_the_same_tokens(
    tiny_model, tiny_tokenizer, caplog
):
    chat.prepare_tokenizer(tiny_tokenizer)
    other = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    other.add_tokens(["<extra>"])
    chat.prepare_tokenizer(other)
    foreign, own = reward_model(tiny_model, other), reward_model(tiny_model, tiny_tokenizer)
    function = lambda prompts, completions, **columns: [0.0]  # noqa: E731
    assert value_start(None, [function], tiny_tokenizer, PPOConfig()) is None
    assert value_start(None, [function, own], tiny_tokenizer, PPOConfig()) is own
    assert value_start(own, [function], tiny_tokenizer, PPOConfig()) is own
    assert value_start(own.model, [function], tiny_tokenizer, PPOConfig()) is own.model
    assert caplog.text == ""
    assert value_start(foreign, [], tiny_tokenizer, PPOConfig()) is None
    assert "reads other tokens than the policy" in caplog.text
    assert value_start(None, [foreign, own], tiny_tokenizer, PPOConfig()) is own
