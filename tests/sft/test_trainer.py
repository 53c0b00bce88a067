"""Supervised fine-tuning: which tokens carry the loss, its value and gradient, what is saved and resumed."""

from __future__ import annotations

import copy
import logging
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rlhf.chat import prepare_tokenizer
from rlhf.errors import InputError
from rlhf.models.loading import load_policy
from rlhf.rows.records import Demonstration
from rlhf.sft.data import Collator, encode_demonstrations
from rlhf.sft.model import prepare_model, set_dropout
from rlhf.sft.trainer import SFTConfig, SFTTrainer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ROWS = [{"prompt": f"Count to {i + 1}", "completion": ", ".join(WORDS[: 1 + 3 * i % 10])} for i in range(16)]


def settings(folder, **changes) -> SFTConfig:
    small = {"epochs": 1, "batch_size": 4, "microbatch_size": 2, "logging_steps": 1, "save_steps": 0}
    return SFTConfig(**({"output_dir": str(folder), "learning_rate": 1e-2, "max_length": 256} | small | changes))


class Probe(TrainerCallback):
    """A callback that records the gradients of each optimizer step and can stop a run after some steps, like a kill."""

    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_after:
            control.should_training_stop = True


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def chat_rows(tokenizer, rows=ROWS) -> list[dict[str, list[int]]]:
    prepare_tokenizer(tokenizer)
    demonstrations = [
        Demonstration(
            [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ],
            1,
        )
        for row in rows
    ]
    return list(encode_demonstrations(tokenizer, demonstrations, 256, "train"))


def numpy_loss(model, rows) -> float:
    """Compute the mean negative log-probability over all labelled tokens, row by row, no padding, in float64."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double().numpy()
        for t, label in enumerate(row["labels"]):
            if label == -100:
                continue
            before = logits[t - 1]
            total -= before[label] - (before.max() + math.log(np.exp(before - before.max()).sum()))
            count += 1
    return total / count


def bare_tokenizer():
    """Make a base model's tokenizer: bytes and an end of text, no chat tokens, no template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def base_folder(folder, tie: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = bare_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tie,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------- data


def test_loss_is_on_the_assistants_tokens_and_their_end_of_turn(tiny_tokenizer):
    prepare_tokenizer(tiny_tokenizer)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "Two."},
    ]

    def trained(trained_from: int) -> str:
        row = encode_demonstrations(tiny_tokenizer, [Demonstration(messages, trained_from)], 256, "train")[0]
        assert all(a == b for a, b in zip(row["input_ids"], row["labels"], strict=True) if b != -100)
        return tiny_tokenizer.decode([label for label in row["labels"] if label != -100])

    assert trained(0) == "One.<|im_end|>Two.<|im_end|>"
    assert trained(4) == "Two.<|im_end|>"


def test_collator_pads_on_the_right():
    batch = Collator(pad_id=9)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [9], "labels": [9]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [9, -100, -100]]


def test_long_demonstrations_are_left_out_and_named(tiny_tokenizer, tiny_model, tmp_path, caplog):
    rows = [*ROWS[:6], {"prompt": "Count", "completion": "one " * 200}]
    with caplog.at_level(logging.WARNING, "rlhf"):
        trainer = SFTTrainer(tiny_model, settings(tmp_path, max_length=100), rows, processing_class=tiny_tokenizer)
    assert len(trainer.train_dataset) == 6
    assert "1 of 7 demonstrations" in caplog.text
    assert "demonstrations 7" in caplog.text


def test_nothing_fits(tiny_tokenizer, tiny_model, tmp_path):
    with pytest.raises(InputError, match="none of 16 demonstrations fits max_length=5; the shortest has"):
        SFTTrainer(tiny_model, settings(tmp_path, max_length=5), ROWS, processing_class=tiny_tokenizer)


def test_a_prompt_in_both_splits_is_refused(tiny_tokenizer, tiny_model, tmp_path):
    with pytest.raises(InputError, match="eval_dataset"):
        SFTTrainer(tiny_model, settings(tmp_path), ROWS, ROWS[3:4], processing_class=tiny_tokenizer)


# ------------------------------------------------------------------------------------------- loss


def test_eval_loss_is_the_mean_over_all_tokens(tiny_tokenizer, tiny_model, tmp_path):
    # 3 rows of very different lengths in micro-batches of 2: a mean of batch means would differ
    rows = [ROWS[0], ROWS[9], ROWS[3]]
    trainer = SFTTrainer(tiny_model, settings(tmp_path), ROWS[10:], rows, processing_class=tiny_tokenizer)
    expected = numpy_loss(tiny_model, chat_rows(tiny_tokenizer, rows))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert trainer.evaluate(ROWS[1:2])["eval_loss"] == pytest.approx(
        numpy_loss(tiny_model, chat_rows(tiny_tokenizer, ROWS[1:2])), abs=1e-5
    )


@pytest.mark.parametrize("microbatch_size", [1, 2, 4])
def test_gradient_is_that_of_the_token_mean_whatever_the_split(tiny_tokenizer, tiny_model, tmp_path, microbatch_size):
    probe, twin = Probe(), copy.deepcopy(tiny_model)
    config = settings(tmp_path, microbatch_size=microbatch_size, max_grad_norm=0, lr_schedule="constant")
    trainer = SFTTrainer(tiny_model, config, ROWS[:4], processing_class=tiny_tokenizer, callbacks=[probe])
    trainer.train()
    rows = chat_rows(tiny_tokenizer, ROWS[:4])
    count = sum(label != -100 for row in rows for label in row["labels"])
    loss = torch.tensor(0.0)
    for row in rows:
        logprobs = twin(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for t, label in enumerate(row["labels"]):
            if label != -100:
                loss = loss - logprobs[t - 1, label] / count
    loss.backward()
    assert len(probe.gradients) == 1
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(probe.gradients[0][name], parameter.grad, atol=1e-6, rtol=1e-5)


def test_training_lowers_the_loss_and_the_cosine_ends_at_a_tenth(tiny_tokenizer, tiny_model, tmp_path):
    before = numpy_loss(tiny_model, chat_rows(tiny_tokenizer))
    trainer = SFTTrainer(tiny_model, settings(tmp_path, epochs=3), ROWS, ROWS_HELD_OUT, processing_class=tiny_tokenizer)
    trainer.train()
    assert numpy_loss(tiny_model, chat_rows(tiny_tokenizer)) < 0.7 * before
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    expected = [1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 12))) for step in range(12)]
    assert rates == pytest.approx(expected, rel=1e-6)
    assert sum("eval_loss" in line for line in trainer.state.log_history) == 3


ROWS_HELD_OUT = [{"prompt": "Count to a hundred", "completion": "one, two"}]


# ------------------------------------------------------------------------------------------- models


def test_saved_model_reloads_with_plain_transformers(tiny_tokenizer, tiny_model, tmp_path):
    trainer = SFTTrainer(tiny_model, settings(tmp_path), ROWS[:8], processing_class=tiny_tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    ids = torch.tensor([tokenizer.encode("one two")])
    tiny_model.eval()
    assert torch.equal(again(ids).logits, tiny_model(ids).logits)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in again.generation_config.eos_token_id
    assert tokenizer.chat_template == tiny_tokenizer.chat_template


def test_model_is_an_ordinary_one_after_training(tiny_tokenizer, tiny_model, tmp_path):
    trainer = SFTTrainer(tiny_model, settings(tmp_path), ROWS[:8], processing_class=tiny_tokenizer)
    trainer.train()
    twin = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    assert trainer.model(torch.tensor([[5, 6]])).logits.abs().max() == 0
    assert twin(torch.tensor([[5, 6]])).logits.abs().max() > 0
    trainer.train()  # and trl's forward is there again when it is needed


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_resume_is_exact(tmp_path, lora_rank):
    base = base_folder(tmp_path / "base", tie=True)

    def trainer(name: str, **kwargs) -> SFTTrainer:
        config = settings(tmp_path / name, save_steps=2, lora_rank=lora_rank, dropout=0.1, lora_dropout=0.1)
        return SFTTrainer(base, config, ROWS, **kwargs)

    whole = trainer("whole")
    whole.train()
    assert whole.state.global_step == 4
    first = trainer("cut", callbacks=[Probe(stop_after=2)])
    first.train()
    assert first.state.global_step == 2
    second = trainer("cut")
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    expected, seen, halfway = weights(whole.model), weights(second.model), weights(first.model)
    assert all(torch.equal(expected[name], seen[name]) for name in expected)
    assert not all(torch.equal(expected[name], halfway[name]) for name in expected)


def test_resume_ignores_a_checkpoint_cut_short(tiny_tokenizer, tiny_model, tmp_path):
    config = settings(tmp_path, save_steps=1)
    trainer = SFTTrainer(tiny_model, config, ROWS[:8], processing_class=tiny_tokenizer)
    trainer.train()
    (tmp_path / "checkpoint-1" / "complete").unlink()
    (tmp_path / "checkpoint-2" / "complete").unlink()
    trainer.train(resume_from_checkpoint=True)  # nothing to go on from: starts anew instead of failing
    assert trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "complete").is_file()


@pytest.mark.parametrize("tie", [True, False])
def test_lora_trains_and_saves_the_chat_tokens_that_the_base_never_knew(tmp_path, tie):
    base = base_folder(tmp_path / "base", tie)
    trainer = SFTTrainer(base, settings(tmp_path / "sft", lora_rank=4), ROWS)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in changed)
    assert sum("trainable_tokens_delta" in name for name in changed) >= (1 if tie else 2)
    trainer.save_model(str(tmp_path / "sft"))
    again = load_policy(str(tmp_path / "sft"))
    ids = torch.tensor([chat_rows(trainer.processing_class)[0]["input_ids"]])
    trainer.model.eval()
    torch.testing.assert_close(again.eval()(ids).logits, trainer.model(ids).logits, atol=1e-6, rtol=1e-6)
    assert trainer.evaluate(ROWS[:2])["eval_loss"] == pytest.approx(
        numpy_loss(again, chat_rows(trainer.processing_class, ROWS[:2])), abs=1e-5
    )


@pytest.mark.slow
def test_an_adapter_is_continued_over_the_same_base(tmp_path):
    base = base_folder(tmp_path / "base", tie=True)
    first = SFTTrainer(base, settings(tmp_path / "one", lora_rank=4), ROWS)
    first.train()
    first.save_model(str(tmp_path / "one"))
    second = SFTTrainer(str(tmp_path / "one"), settings(tmp_path / "two"), ROWS)
    start, again = weights(second.model), weights(first.model)
    assert all(torch.equal(start[name], again[name]) for name in start if "lora_" in name or "delta" in name)
    second.train()
    assert not torch.equal(*(next(v for k, v in w.items() if "lora_B" in k) for w in (start, weights(second.model))))
    assert second.model.peft_config["default"].base_model_name_or_path == base
    with pytest.raises(InputError, match="already an adapter"):
        SFTTrainer(str(tmp_path / "one"), settings(tmp_path / "two", lora_rank=4), ROWS)


def test_new_embeddings_start_at_the_mean_of_the_old(tmp_path):
    base = base_folder(tmp_path / "base", tie=False)
    trainer = SFTTrainer(base, settings(tmp_path / "sft"), ROWS)
    old = AutoModelForCausalLM.from_pretrained(base)
    for new, known in (
        (trainer.model.get_input_embeddings(), old.get_input_embeddings()),
        (trainer.model.get_output_embeddings(), old.get_output_embeddings()),
    ):
        assert len(new.weight) == len(trainer.processing_class) > len(known.weight)
        torch.testing.assert_close(new.weight[: len(known.weight)], known.weight)
        for row in new.weight[len(known.weight) :]:
            torch.testing.assert_close(row, known.weight.mean(0), atol=1e-6, rtol=1e-5)


def test_dropout_is_set_without_touching_the_saved_config(tiny_tokenizer, tiny_model, tmp_path):
    prepare_tokenizer(tiny_tokenizer)
    model, _ = prepare_model(tiny_model, tiny_tokenizer, settings(tmp_path, dropout=0.3))
    assert all(layer.self_attn.attention_dropout == 0.3 for layer in model.model.layers)
    assert model.config.attention_dropout == 0.0
    with pytest.raises(InputError, match="has no dropout"):
        set_dropout(torch.nn.Linear(2, 2), 0.3)


# ------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 8, "microbatch_size": 3}, "microbatch_size=3 must divide batch_size=8; try 2 or 4"),
        ({"epochs": 0}, "epochs=0.0 must be positive"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in"),
        ({"save_steps": -1}, "save_steps=-1 must be 0 or more"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        SFTConfig(**changes)


def test_missing_pieces(tiny_tokenizer, tiny_model, tmp_path):
    with pytest.raises(InputError, match="train_dataset is missing"):
        SFTTrainer(tiny_model, settings(tmp_path), processing_class=tiny_tokenizer)
    with pytest.raises(InputError, match="processing_class"):
        SFTTrainer(tiny_model, settings(tmp_path), ROWS)
    with pytest.raises(InputError, match="no such model folder"):
        SFTTrainer(str(tmp_path / "nowhere"), settings(tmp_path), ROWS)
