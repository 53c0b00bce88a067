"""A tiny chain under thinking templates, with thinking on and off: what is trained, sampled, and shown to rewards."""

from __future__ import annotations

import pytest
import torch
from reference.templates import tokenizer_for
from transformers import LlamaConfig, LlamaForCausalLM

from reward_models import RewardConfig, RewardModel, RewardTrainer
from rlhf import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer, chat
from rlhf.models.scalar import new_scalar_model
from rlhf.padding import IGNORED
from rlhf.sampling.engine import Responses

Q = {"role": "user", "content": "Name a fruit."}
ANSWERS = ["An apple.", "A pear.", "A fig."]
THOUGHTS = ["They want one.", "Green ones, too.", "Sweet?"]
# template: settings, what the assistant writes before and after its thinking, or before an answer without; its end
WRITTEN = {
    ("qwen3_6", True): (None, "", "\n</think>\n\n", "<|im_end|>"),
    ("qwen3_6", False): ({"enable_thinking": False}, "", None, "<|im_end|>"),
    ("glm4moe", True): (None, "\n<think>", "</think>\n", "<|user|>"),
    ("glm4moe", False): ({"enable_thinking": False}, "\n", None, "<|user|>"),
    ("gptoss", True): (
        None, "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>", "<|return|>",
    ),
    ("gptoss", False): (None, "<|channel|>final<|message|>", None, "<|return|>"),
}  # fmt: skip


class Given:
    """An engine whose policy has answered already."""

    def __init__(self, tokenizer, texts):
        self.ids = [tokenizer.encode(text) for text in texts]

    def generate(self, prompt_ids, max_new_tokens, temperature, generator):
        self.prompts = prompt_ids
        return Responses([self.ids[n % len(self.ids)] for n in range(len(prompt_ids))], [True] * len(prompt_ids))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "thinks"), WRITTEN)
def test_a_chain(tmp_path, name, thinks):
    kwargs, before, between, end = WRITTEN[name, thinks]
    tokenizer = tokenizer_for(name)
    texts = [
        f"{before}{thought}{between}{answer}{end}" if thinks else f"{before}{answer}{end}"
        for thought, answer in zip(THOUGHTS, ANSWERS, strict=True)
    ]
    messages = [
        {"role": "assistant", "content": answer} | ({"reasoning_content": thought} if thinks else {})
        for thought, answer in zip(THOUGHTS, ANSWERS, strict=True)
    ]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    sft = SFTTrainer(
        model,
        SFTConfig(output_dir=str(tmp_path / "sft"), epochs=1, batch_size=3, microbatch_size=3, learning_rate=1e-3,
                  chat_template_kwargs=kwargs, bf16=False, save_steps=0),
        [{"messages": [Q, message]} for message in messages],
        processing_class=tokenizer,
    )  # fmt: skip
    rows = [[label for label in row["labels"] if label != IGNORED] for row in sft.train_dataset]
    assert [tokenizer.decode(row) for row in rows] == texts
    sft.train()
    sft.save_model(str(tmp_path / "sft"))

    rankings = [{"prompt": [Q], "chosen": ANSWERS[0], "rejected": answer} for answer in ANSWERS[1:]]
    judge = RewardTrainer(
        str(tmp_path / "sft"),
        args=RewardConfig(
            output_dir=str(tmp_path / "rm"), prompts_per_batch=2, microbatch_size=2, bf16=False, save_steps=0
        ),
        train_dataset=rankings,
    )
    judge.train()
    judge.fit_normalizer()
    judge.save_model(str(tmp_path / "rm"))

    seen = {}

    def watch(prompts, completions, raw_completions, **columns):
        seen.update(completions=completions, raw=raw_completions)
        return [0.0] * len(prompts)

    reward_model = RewardModel.load(tmp_path / "rm", device="cpu")
    assert chat.template_kwargs(reward_model.tokenizer) == (kwargs or {})
    engine = Given(tokenizer, texts)
    trainer = PPOTrainer(
        str(tmp_path / "sft"), [reward_model, watch],
        PPOConfig(output_dir=str(tmp_path / "ppo"), updates=1, rollout_size=3, minibatch_size=3, inner_epochs=1,
                  max_prompt_tokens=999, max_new_tokens=64, bf16=False, preflight=False),
        [{"prompt": [Q]}] * 3, engine=engine,
    )  # fmt: skip
    rollout = trainer.score(trainer.collect(trainer.next_prompts()))
    assert [p + r for p, r in zip(rollout.prompt_ids, rollout.response_ids, strict=True)] == [
        chat.encode_conversation(trainer.processing_class, [Q, message])[0] for message in messages
    ]
    assert seen["completions"] == [[message] for message in messages]
    assert [text.strip() for text in seen["raw"]] == [text.removesuffix(end).strip() for text in texts]
    assert rollout.stopped.all()
    answers = [[Q, {"role": "assistant", "content": answer}] for answer in ANSWERS]
    own = rollout.own_scores["score/rm"].tolist()
    assert own == pytest.approx(reward_model.score(answers).tolist(), abs=1e-5)
    assert set(trainer.stop_ids) >= {tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id}
    trainer.update(trainer.advantages(rollout))


def test_the_models_own_stops_are_stops_wherever_one_samples(tmp_path, tiny_model, tiny_tokenizer):
    from rlhf.evaluate import sample_policy
    from rlhf.rows.records import Prompt
    from rlhf.sampling.decode import TransformersEngine
    from rlhf.sampling.engine import model_stop_ids

    chat.prepare_tokenizer(tiny_tokenizer)
    third = tiny_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert third not in chat.stop_ids(tiny_tokenizer)
    with torch.no_grad():
        tiny_model.lm_head.weight[third] += 2 * tiny_model.lm_head.weight[third].sign()
    tiny_model.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, third, 99999]
    stops = model_stop_ids(tiny_model, tiny_tokenizer)
    assert stops == (tiny_tokenizer.eos_token_id, third)
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    judge = RewardModel(new_scalar_model(tiny_model, seed=0), tiny_tokenizer)
    trainer = PPOTrainer(
        str(tmp_path), judge,
        PPOConfig(output_dir=str(tmp_path / "ppo"), updates=1, rollout_size=32, minibatch_size=32, max_new_tokens=24,
                  bf16=False),
        [{"prompt": f"Count to {n}"} for n in range(8)],
    )  # fmt: skip
    assert set(stops) <= set(trainer.stop_ids)
    rollout = trainer.collect(trainer.next_prompts())
    assert any(ids[-1] == third for ids in rollout.response_ids)
    assert not any(third in ids[:-1] for ids in rollout.response_ids)
    assert not any("<|endoftext|>" in text for text in rollout.texts)
    assert rollout.stopped.tolist() == [ids[-1] in stops for ids in rollout.response_ids]
    questions, ends = [p.messages for p in rollout.prompts], [*stops[:1]]
    own = [ids[:-1] + ends if ids[-1] == third else ids for ids in rollout.response_ids]
    read = judge(questions, rollout.texts, completion_ids=own, processing_class=trainer.processing_class)
    assert trainer.score(rollout).raw_scores.tolist() == pytest.approx(read, abs=1e-5)
    engine = TransformersEngine(tiny_model, stops, chat.pad_id(tiny_tokenizer))
    prompts = [Prompt([{"role": "user", "content": f"Count to {n}"}]) for n in range(8)]
    samples = sample_policy(
        prompts, tiny_tokenizer, engine, max_new_tokens=24, generator=torch.Generator().manual_seed(0), n=4
    )
    assert not any("<|endoftext|>" in text for text in samples.responses)
    assert any(ids[-1] == third for ids in samples.ids)
