"""Models' positions: what each family has, that longer rows are refused before a run begins, and that rows within
them do not depend on their neighbours."""

from __future__ import annotations

import copy

import pytest
import torch
from reference.families import new_model
from reference.ppo_runs import make
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Phi3Config,
    Phi3ForCausalLM,
)

from reward_models import ProcessModel, RewardConfig, RewardEnsemble, RewardModel, RewardTrainer
from reward_models.process import About
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.forward import response_logprobs
from rlhf.models.positions import positions_of
from rlhf.models.scalar import new_scalar_model
from rlhf.padding import make_batch
from rlhf.sampling.decode import TransformersEngine
from rlhf.sft.trainer import SFTConfig, SFTTrainer

LONG = "one two three four five six seven eight nine ten " * 4


def llama(**settings):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes | {"max_position_embeddings": 100} | settings))


ROPES = {
    "plain": ({}, 100),
    "linear": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, 400),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                  "original_max_position_embeddings": 100}}, 400),
    "yarn, said twice": ({"max_position_embeddings": 400, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 100}}, 400),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, 100),
    "llama3": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 25}}, 100),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_positions(kind):
    settings, limit = ROPES[kind]
    assert positions_of(llama(**settings)).limit == limit


@pytest.mark.parametrize(
    ("family", "limit"),
    [("gpt2", 512), ("opt", 512), ("mistral", 512), ("gemma3_text", 512), ("mpt", 512), ("bloom", None),
     ("falcon_alibi", None), ("mamba", None)],
)  # fmt: skip
def test_a_familys_positions(family, limit):
    """Sliding windows set no limit, ALiBi and recurrent states have none."""
    found = positions_of(new_model(family))
    assert (None if found is None else found.limit) == limit


def test_encoders_are_shortened_but_where_their_positions_are_rotary():
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "pad_token_id": 0, "max_position_embeddings": 100}  # fmt: skip
    assert positions_of(BertForSequenceClassification(BertConfig(**sizes))) is None
    modern = ModernBertConfig(**sizes, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    assert positions_of(ModernBertForSequenceClassification(modern)).limit == 100


def gpt2(tokenizer, positions: int = 48):
    chat.prepare_tokenizer(tokenizer)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=positions, n_embd=32, n_layer=2, n_head=4, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


def test_ppo_refuses_before_it_begins(tmp_path, tiny_tokenizer):
    model = gpt2(tiny_tokenizer)
    message = r"policy: the longest prompt \(\d+ tokens\) and max_new_tokens=64 make \d+ tokens, and GPT2LMHeadModel "
    with pytest.raises(InputError, match=message + r"has positions for 48; lower max_new_tokens"):
        make(tmp_path, model, tokenizer=tiny_tokenizer, max_new_tokens=64)
    rows = [{"prompt": "Go"}] * 4 + [{"prompt": LONG}]
    with pytest.raises(InputError, match="has positions for 48"):
        make(tmp_path, model, rows=rows[:4], eval_rows=rows[4:], tokenizer=tiny_tokenizer, max_new_tokens=4)
    make(tmp_path, model, rows=rows, tokenizer=tiny_tokenizer, max_new_tokens=4, max_prompt_tokens=44)


def test_ppo_asks_its_reference_too(tmp_path, tiny_tokenizer):
    from rlhf.ppo.config import PPOConfig
    from rlhf.ppo.trainer import PPOTrainer

    wide, narrow = gpt2(tiny_tokenizer, 200), gpt2(tiny_tokenizer)
    with pytest.raises(InputError, match="reference: the longest prompt"):
        PPOTrainer(
            wide, lambda prompts, completions, **_: [0.0] * len(prompts), PPOConfig(max_new_tokens=64, bf16=False),
            [{"prompt": "Go"}], processing_class=tiny_tokenizer, ref_model=narrow,
        )  # fmt: skip


def test_ppo_asks_its_reward_models_too(tmp_path, tiny_tokenizer):
    """They read the longest response and an end of turn; a process model reads no further than the last step."""
    wide = gpt2(tiny_tokenizer, 200)
    longest = len(chat.encode_prompt(tiny_tokenizer, [{"role": "user", "content": "Go"}])) + 8
    exact, tight = (new_scalar_model(gpt2(tiny_tokenizer, longest + more), seed=0) for more in (1, 0))
    given = {"rows": [{"prompt": "Go"}] * 12, "tokenizer": tiny_tokenizer, "value_kind": "shared_trunk"}
    make(tmp_path, copy.deepcopy(wide), RewardModel(exact, tiny_tokenizer), **given, missing_eos="off").train()
    make(tmp_path, copy.deepcopy(wide), ProcessModel(tight, tiny_tokenizer, About()), **given)
    what = (
        rf"the longest prompt \({longest - 8} tokens\) and max_new_tokens=8, with an end of turn, make {longest + 1} "
    )
    pair = [RewardModel(exact, tiny_tokenizer), RewardModel(tight, tiny_tokenizer)]
    for function in (pair[1], RewardEnsemble(pair), ProcessModel(tight, tiny_tokenizer, About(kind="outcome"))):
        with pytest.raises(InputError, match=r"(reward|process)_model: " + what):
            make(tmp_path, wide, function, **given)
    given["rows"] = [{"prompt": "Go", "scored_prompt": "G"}] * 12
    make(tmp_path, wide, pair[1], **given)


def test_sft_and_reward_models_name_the_row(tmp_path, tiny_tokenizer):
    model = gpt2(tiny_tokenizer)
    rows = [{"prompt": "Count", "completion": "one"}] * 3 + [{"prompt": "Count", "completion": LONG}]
    where = r"demonstration 4 has \d+ tokens, and GPT2LMHeadModel has positions for 48; max_length=48 leaves such out"
    for train, held_out, name in ((rows, None, "train_dataset"), (rows[:1], [{**rows[3], "prompt": "A"}], "eval_dat")):
        where = where.replace("4 has", r"\d has")
        with pytest.raises(InputError, match=name + r"\w*: " + where):
            SFTTrainer(copy.deepcopy(model), SFTConfig(output_dir=str(tmp_path)), train, held_out, tiny_tokenizer)
    pairs = [{"prompt": f"Count {n}", "chosen": "one", "rejected": "two"} for n in range(3)]
    long = [{"prompt": "Count", "chosen": LONG, "rejected": "x"}]
    settings = {"args": RewardConfig(output_dir=str(tmp_path)), "processing_class": tiny_tokenizer}
    with pytest.raises(InputError, match=r"train_dataset: ranking 4 has \d+ tokens, and GPT2ForSeq\w* has positions"):
        RewardTrainer(copy.deepcopy(model), **settings, train_dataset=pairs + long)
    fits = {"args": RewardConfig(output_dir=str(tmp_path), max_length=48), "processing_class": tiny_tokenizer}
    trainer = RewardTrainer(copy.deepcopy(model), **fits, train_dataset=pairs + long)
    assert len(trainer.train_dataset) == 3


def test_sampling_and_scoring_refuse(tiny_tokenizer):
    model = gpt2(tiny_tokenizer)
    engine = TransformersEngine(model, [0], 3)
    with pytest.raises(InputError, match=r"longest prompt \(5 tokens\) and max_new_tokens=44 make 49 tokens, and GPT2"):
        engine.generate([[5, 6], [5, 6, 7, 8, 9]], 44, 1.0, torch.Generator().manual_seed(0))
    assert engine.generate([[5, 6, 7, 8, 9]], 43, 1.0, torch.Generator().manual_seed(0)).ids
    judge = RewardModel(new_scalar_model(model, seed=0), tiny_tokenizer)
    short, long = ([{"role": "user", "content": "Go"}, {"role": "assistant", "content": text}] for text in ("x", LONG))
    assert judge.score([short]).isfinite().all()
    with pytest.raises(InputError, match="the longest conversation has"):
        judge.score([short, long])


def longrope(original: int = 40):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 8.0]}
    config = Phi3Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, original_max_position_embeddings=original,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
        rope_parameters=rope | {"original_max_position_embeddings": original},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Phi3ForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.15
    return model


def test_longrope_ends_at_its_original_length():
    """Up to there a row is computed alike beside any other; one token more, and it is not."""
    model = longrope()
    found = positions_of(model)
    assert (found.limit, found.of) == (40, "Phi3ForCausalLM's longrope computes a row alike beside any other up to")

    def beside(length: int) -> torch.Tensor:
        prompts, responses = [[5, 6, 7], list(range(2, 2 + length - 4))], [[8, 9, 10], [3, 4, 5, 6]]
        with torch.no_grad():
            return response_logprobs(model, make_batch(prompts, responses, 0, torch.device("cpu")), 1.0)[0][0, :3]

    torch.testing.assert_close(beside(40), beside(8), atol=1e-6, rtol=0)
    assert (beside(41) - beside(8)).abs().max() > 1e-3
