"""Tokenizers in which nothing is left to pad with: any id can pad where a model is only run."""

from __future__ import annotations

import pytest
import torch
from reference.ppo_runs import ROWS, make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reward_models import RewardModel
from rlhf import chat
from rlhf.models.loading import load_tokenizer, tokenizer_of
from rlhf.models.scalar import new_scalar_model

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    """A byte-level one whose only special token ends every turn, without pad and unk."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: n for n, t in enumerate([*alphabet, "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A model with exactly that vocabulary."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, max_position_embeddings=256))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_no_token_is_added_that_the_model_has_no_embedding_for(folder, tokenizer):
    size = len(tokenizer)
    loaded = load_tokenizer(folder)
    assert len(loaded) == size
    assert chat.pad_id(loaded) < size
    trained = tokenizer_of(folder, None)  # a trainer adds the embedding
    assert trained.pad_token == "<|pad|>"
    assert chat.pad_id(trained) == size


@pytest.mark.parametrize("given", [False, True])
def test_ppo_and_scores_with_such_a_tokenizer(tmp_path, folder, tokenizer, given):
    scalar = new_scalar_model(folder, seed=0)
    scalar.save_pretrained(tmp_path / "reward_model")
    tokenizer.save_pretrained(tmp_path / "reward_model")
    scorer = RewardModel.load(tmp_path / "reward_model")
    talks = [[{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}] for n in (1, 30)]
    apart = torch.cat([scorer.score(talks[:1]), scorer.score(talks[1:])])
    torch.testing.assert_close(scorer.score(talks), apart, atol=1e-6, rtol=0)
    trainer = make(tmp_path, str(folder), scorer, rows=ROWS, tokenizer=tokenizer if given else None, updates=1)
    trainer.train()
    trainer.save_model(tmp_path / "ppo")
    assert len(load_tokenizer(tmp_path / "ppo")) == len(tokenizer) == trainer.actor_critic.policy.config.vocab_size
