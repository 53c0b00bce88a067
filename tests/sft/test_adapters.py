"""LoRA from fine-tuning to PPO by the trainers themselves: chat tokens that the base never learned, saved modules, and
what is held in float32 over a frozen base in bfloat16."""

from __future__ import annotations

import copy
import io
from itertools import product

import pytest
import torch
from peft import LoraConfig, PeftModel
from reference.ppo_runs import make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from reward_models import RewardConfig, RewardModel, RewardTrainer
from rlhf.errors import InputError
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.sft.trainer import SFTConfig, SFTTrainer

WORDS = ["one", "two", "three", "four", "five", "six"]
ROWS = [{"prompt": f"Say {word}", "completion": f"The {word}."} for word in WORDS]
PAIRS = [{"prompt": f"Say {word}", "chosen": f"The {word}.", "rejected": f"No {word}."} for word in WORDS]


def base_folder(folder, tie: bool, knows_chatml: bool = False, family: str = "llama") -> str:
    """A base model without a chat template; ChatML's tokens are in its vocabulary or not."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", *(["<|im_start|>", "<|im_end|>"] if knows_chatml else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([row["completion"] for row in ROWS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": tie,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)) if family == "llama" else PhiForCausalLM(PhiConfig(**shape))
    with torch.no_grad():
        if getattr(model.lm_head, "bias", None) is not None:
            model.lm_head.bias.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sft(base, out, peft_config=None, **changes) -> SFTTrainer:
    small = {"epochs": 2, "batch_size": 3, "microbatch_size": 3, "save_steps": 0, "learning_rate": 1e-2, "bf16": False}
    config = SFTConfig(output_dir=str(out), **(small | changes))
    trainer = SFTTrainer(base, config, ROWS, peft_config=peft_config)
    trainer.train()
    trainer.save_model(str(out))
    return trainer


def reward_model(base, out, tokenizer=None, **changes) -> RewardTrainer:
    small = {
        "prompts_per_batch": 3,
        "microbatch_size": 3,
        "save_steps": 0,
        "learning_rate": 1e-2,
        "normalizer_samples": 8,
        "bf16": False,
    }
    args = RewardConfig(output_dir=str(out), **(small | changes))
    trainer = RewardTrainer(base, args=args, train_dataset=PAIRS, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(out))
    return trainer


@torch.no_grad()
def own_logprobs(model, rollout) -> list[torch.Tensor]:
    """The responses' log-probabilities by the model's own logits, one row at a time."""
    rows = []
    for prompt, response in zip(rollout.prompt_ids, rollout.response_ids, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        rows.append(logits[range(len(response)), response])
    return rows


def gap(rollout, rows) -> float:
    return max(float((mine[: len(row)] - row).abs().max()) for mine, row in zip(rollout.logprobs, rows, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward_from", "knows_chatml", "tie"),
    [
        ("sft", False, True),
        ("base", True, False),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in product(["sft", "base"], [True, False], [True, False])
            if case not in [("sft", False, True), ("base", True, False)]
        ),
    ],
)
def test_chat_tokens_that_the_base_never_learned_go_through_the_chain(tmp_path, tie, knows_chatml, reward_from):
    base = base_folder(tmp_path / "base", tie, knows_chatml)
    sft(base, tmp_path / "sft", lora_rank=4)
    if reward_from == "sft":
        reward = reward_model(str(tmp_path / "sft"), tmp_path / "rm")
    else:  # an adapter over the base itself, with the fine-tuned model's tokenizer
        tokenizer = load_tokenizer(tmp_path / "sft")
        reward = reward_model(base, tmp_path / "rm", tokenizer, lora_rank=4)
    scorer = RewardModel.load(tmp_path / "rm")
    trained = RewardModel(reward.model, reward.processing_class, reward.normalizer)
    talks = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}] for row in PAIRS
    ]
    assert torch.equal(scorer.score(talks), trained.score(talks))
    trainer = make(tmp_path, str(tmp_path / "sft"), scorer, rows=[{"prompt": row["prompt"]} for row in ROWS],
                   rollout_size=6, minibatch_size=3, learning_rate=1e-2)  # fmt: skip
    rollout = trainer.collect(trainer.next_prompts())
    assert gap(rollout, own_logprobs(load_policy(tmp_path / "sft").eval(), rollout)) < 1e-5
    assert torch.equal(rollout.logprobs, rollout.reference_logprobs)
    trainer.train()
    trainer.save_model(tmp_path / "ppo")
    rollout = trainer.collect(trainer.next_prompts())
    assert gap(rollout, own_logprobs(load_policy(tmp_path / "ppo").eval(), rollout)) < 1e-5
    assert float((rollout.logprobs - rollout.reference_logprobs).abs().max()) > 1e-3


def trained_dtypes(model) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad}


def test_saved_modules_are_trained_saved_and_taken_over(tmp_path):
    base = base_folder(tmp_path / "base", tie=False)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"], task_type="CAUSAL_LM")
    kept = copy.deepcopy(lora)
    trainer = sft(base, tmp_path / "sft", lora)
    assert lora == kept, "the user's object stays as it is"
    again = load_policy(tmp_path / "sft")
    ids = torch.tensor([[5, 6, len(trainer.processing_class) - 1]])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, trainer.model.eval()(ids).logits, atol=1e-6, rtol=0)
    norm = again.get_base_model().model.norm
    assert not torch.equal(norm.modules_to_save["default"].weight, norm.original_module.weight)
    reward = reward_model(str(tmp_path / "sft"), tmp_path / "rm", epochs=1, learning_rate=1e-12)
    mine = reward.model.get_base_model().model.norm.modules_to_save["default"].weight
    torch.testing.assert_close(mine.detach(), norm.modules_to_save["default"].weight.detach(), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["base", "adapter"])
def test_a_frozen_trunk_is_bfloat16_where_it_is_asked_for_and_what_is_trained_float32(tmp_path, start):
    base = base_folder(tmp_path / "base", tie=False)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    tuned = sft(base, tmp_path / "sft", lora, bf16=True, epochs=1)
    asked = {"lora_rank": 2} if start == "base" else {}
    source, tokenizer = (base, load_tokenizer(tmp_path / "sft")) if start == "base" else (str(tmp_path / "sft"), None)
    reward = reward_model(source, tmp_path / "rm", tokenizer, bf16=True, **asked)
    for model in (tuned.model, reward.model):
        assert trained_dtypes(model) == {torch.float32}
        frozen = {p.dtype for name, p in model.named_parameters() if "base_layer" in name}
        assert frozen == {torch.bfloat16}
    loaded = RewardModel.load(tmp_path / "rm", dtype=torch.bfloat16)
    talk = [{"role": "user", "content": "Say one"}, {"role": "assistant", "content": "The one."}]
    whole = RewardModel.load(tmp_path / "rm")
    spread = float(whole.score([talk])) - float(loaded.score([talk]))
    assert abs(spread) < 0.2
    assert torch.equal(  # the head is not rounded
        loaded.model.get_base_model().score.modules_to_save["default"].weight,
        whole.model.get_base_model().score.modules_to_save["default"].weight,
    )


def test_a_head_with_a_bias_keeps_it_beside_trained_tokens(tmp_path):
    """peft's wrapper of trained tokens leaves a head's bias out, so such a head is saved whole."""
    base = base_folder(tmp_path / "base", tie=False, family="phi")
    trainer = sft(base, tmp_path / "sft", lora_rank=2)
    head = trainer.model.get_base_model().lm_head
    assert float(head.bias.detach().abs().max()) > 0.5
    policy = load_policy(tmp_path / "sft").eval()
    ids = torch.tensor([[5, 6, 7, len(trainer.processing_class) - 1]])
    with torch.no_grad():
        hidden = policy.get_base_model().model(ids).last_hidden_state
        logits = policy(ids).logits
        active = policy.get_base_model().lm_head.modules_to_save["default"]
    torch.testing.assert_close(logits, hidden @ active.weight.T + active.bias, atol=1e-5, rtol=0)
    trainer = make(tmp_path, str(tmp_path / "sft"), rows=[{"prompt": row["prompt"]} for row in ROWS],
                   rollout_size=6, minibatch_size=3)  # fmt: skip
    rollout = trainer.collect(trainer.next_prompts())
    assert gap(rollout, own_logprobs(policy, rollout)) < 1e-5


@pytest.mark.parametrize(
    "wrong", [{"init_lora_weights": "pissa"}, {"bias": "all"}, {"target_modules": ["q_proj", "lm_head"]}]
)
def test_an_adapter_that_later_stages_could_not_continue_is_refused_before_training(tmp_path, wrong):
    base = base_folder(tmp_path / "base", tie=False)
    lora = LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | wrong))
    for begin in (
        lambda: sft(base, tmp_path / "sft", lora),
        lambda: RewardTrainer(base, args=RewardConfig(output_dir=str(tmp_path / "rm")), train_dataset=PAIRS,
                              peft_config=lora),
        lambda: load_policy(base, lora=lora),
    ):  # fmt: skip
        with pytest.raises(InputError, match="peft_config: "):
            begin()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "checkpointing"), [(0, True), (4, False)])
def test_every_model_that_is_handed_back_can_be_pickled_and_copied(tmp_path, rank, checkpointing):
    base = base_folder(tmp_path / "base", tie=False)
    tuned = sft(base, tmp_path / "sft", lora_rank=rank, gradient_checkpointing=checkpointing, epochs=1)
    reward = reward_model(str(tmp_path / "sft"), tmp_path / "rm", gradient_checkpointing=checkpointing)
    scorer = RewardModel.load(tmp_path / "rm")
    ids = torch.tensor([[5, 6, 7]])
    for model in (tuned.model, reward.model, scorer.model):
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        again = torch.load(stream, weights_only=False)
        with torch.no_grad():
            assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
            assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
        assert isinstance(again, PeftModel) == bool(rank)


def test_a_generic_reward_model_can_be_pickled(tmp_path):
    """Its class is made here, since transformers has none for the family."""
    from transformers import GraniteConfig, GraniteForCausalLM

    from rlhf.models.scalar import new_scalar_model

    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = GraniteForCausalLM(GraniteConfig(**shape, num_attention_heads=2, num_key_value_heads=2))
    scalar = new_scalar_model(model, seed=0).eval()
    stream = io.BytesIO()
    torch.save(scalar, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert type(again) is type(scalar)
