"""The process trainer: its loss by a slow loop, no batching changes a gradient, exact resuming, what is refused."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    TrainerCallback,
)

from reward_models import ProcessConfig, ProcessModel, ProcessTrainer, RewardConfig
from reward_models.process import About
from reward_models.process_trainer import encode_solutions
from rlhf import chat
from rlhf.errors import InputError
from rlhf.rows.records import StepLabels

WORDS = ("right", "fine", "good", "true")
LONG = pytest.mark.long


@pytest.fixture
def model_folder(tmp_path, tiny_model, tiny_tokenizer):
    """Save a causal language model with a tokenizer that is ready for chat."""
    chat.prepare_tokenizer(tiny_tokenizer)
    folder = tmp_path / "sft"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def solutions(count: int, seed: int = 0, labels=(1, 0, -1, None)) -> list[StepLabels]:
    """Make solutions of 1 to 5 steps. A wrong step has the word `dog`; prompts have lines and a separator of their
    own."""
    rng, records = np.random.default_rng(seed), []
    for number in range(count):
        size = 1 + number % 5
        own = [labels[i] for i in rng.integers(0, len(labels), size)]
        own[0] = 1 if number % 2 else -1
        steps = tuple(
            f"{rng.choice(WORDS)} {' '.join(map(str, rng.integers(0, 99, 1 + rng.integers(0, 4))))}"
            + (" dog" if label == -1 else "")
            for label in own
        )
        prompt = [{"role": "user", "content": f"Question {seed} {number}?\nIn\nlines" + " please" * (number % 4)}]
        records.append(StepLabels(prompt, steps, tuple(own)))
    return records


def config(folder, **changes) -> ProcessConfig:
    defaults = {"solutions_per_batch": 4, "microbatch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "epochs": 1}
    return ProcessConfig(output_dir=str(folder), **(defaults | {"save_steps": 0} | changes))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------ the loss


def logits_by_hand(plain, tokenizer, record: StepLabels) -> list[np.ndarray]:
    """The head's numbers at each step's last token, by the tokenizer's offsets and transformers' own forward."""
    head = f"<|im_start|>user\n{record.prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    text = head + "\n".join(record.steps)
    encoded = tokenizer(text + "<|im_end|>\n", return_offsets_mapping=True, add_special_tokens=False)
    with torch.no_grad():
        hidden = plain.model(torch.tensor([encoded["input_ids"]])).last_hidden_state[0]
        numbers = plain.score(hidden).double().numpy()
    found, place = [], len(head)
    for step in record.steps:
        place += len(step)
        found.append(next(numbers[n] for n, (a, b) in enumerate(encoded["offset_mapping"]) if a <= place - 1 < b))
        place += 1
    return found


def step_loss(logits: np.ndarray, label: int, epsilon: float) -> float:
    """One step's loss in float64: of one number, and of the classes wrong, neutral, right."""
    if len(logits) == 1:
        z = logits[0] if label >= 0 else -logits[0]
        return (1 - epsilon) * math.log(1 + math.exp(-z)) + epsilon * math.log(1 + math.exp(z))
    logs = logits - math.log(sum(math.exp(z) for z in logits))
    share = [epsilon / 2] * 3
    share[{-1: 0, 0: 1, 1: 2}[label]] = 1 - epsilon
    return -sum(s * one for s, one in zip(share, logs, strict=True))


@pytest.mark.parametrize("head", ["scalar", "three_class"])
@pytest.mark.parametrize("epsilon", [0.0, pytest.param(0.1, marks=LONG)])
def test_the_loss_is_that_of_a_slow_loop(tmp_path, model_folder, head, epsilon):
    """A neutral step taken for a wrong one, a label at another token, a step of the prompt trained: all change it."""
    records, held_out = solutions(4), solutions(9, 1)
    args = config(tmp_path / "out", head=head, label_smoothing=epsilon, labeler_weights=None)
    trainer = ProcessTrainer(model_folder, args=args, train_dataset=records, eval_dataset=held_out)
    metrics = trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    losses, right = [], []
    for record in held_out:
        for logits, label in zip(logits_by_hand(plain, trainer.processing_class, record), record.labels, strict=True):
            if label is not None:
                losses.append(step_loss(logits, label, epsilon))
                odds = np.exp(logits - logits.max())
                p = 1 / (1 + math.exp(-logits[0])) if len(logits) == 1 else 1 - odds[0] / odds.sum()
                right.append((p >= 0.5) == (label >= 0))
    assert {0, 1, -1} <= {label for record in held_out for label in record.labels}
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics["eval_step_accuracy"] == pytest.approx(np.mean(right), abs=1e-9)
    assert metrics["eval_solutions"] == 9


def test_the_first_steps_logged_loss_is_the_mean_over_all_its_labelled_steps(tmp_path, model_folder):
    records = solutions(4)
    trainer = ProcessTrainer(model_folder, args=config(tmp_path / "out"), train_dataset=records)
    expected = trainer.evaluate(records)
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "loss" in log)
    assert logged["loss"] == pytest.approx(expected["eval_loss"], abs=1e-4)  # the log is rounded
    assert logged["step_accuracy"] == pytest.approx(expected["eval_step_accuracy"])


def test_weights_of_labelers_reach_the_loss(tmp_path, model_folder):
    records = [StepLabels(r.prompt, r.steps, r.labels, {"labeler": "ann" if n % 2 else "bob"})
               for n, r in enumerate(solutions(4))]  # fmt: skip
    args = config(tmp_path / "out", labeler_weights={"ann": 3.0, "bob": 1.0})
    trainer = ProcessTrainer(model_folder, args=args, train_dataset=records)
    assert trainer.train_dataset["weight"][:] == [0.5, 1.5, 0.5, 1.5]
    each = [trainer.evaluate([record]) for record in records]  # of one row, the weight is 1
    steps = [sum(label is not None for label in record.labels) for record in records]
    expected = sum(w * n * e["eval_loss"] for w, n, e in zip((0.5, 1.5) * 2, steps, each, strict=True)) / sum(steps)
    assert trainer.evaluate(records)["eval_loss"] == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------ invariance


class FirstStep(TrainerCallback):
    """Keeps the gradient of the first optimizer step, as the optimizer gets it, and ends the run there."""

    class Reached(Exception):
        pass

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        raise self.Reached


def gradients(folder, model, records, trainer_class=ProcessTrainer, **changes) -> dict[str, torch.Tensor]:
    size, first = len(records), FirstStep()
    settings = {"solutions_per_batch": size, "microbatch_size": size, "max_grad_norm": 0, "preflight": False}
    args = config(folder, **(settings | changes))
    with pytest.raises(FirstStep.Reached):
        trainer_class(model, args=args, train_dataset=records, callbacks=[first]).train()
    return first.gradients


class Wide(ProcessTrainer):
    """Pads every batch further, with real tokens on the padding."""

    def collator(self):
        collate = super().collator()

        def wide(rows):
            batch = collate(rows)
            pad = torch.nn.functional.pad
            batch["input_ids"] = pad(batch["input_ids"], (0, 7), value=9)
            batch["attention_mask"] = pad(batch["attention_mask"], (0, 7), value=0)
            return batch

        return wide


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["full", *(pytest.param(kind, marks=LONG) for kind in ("lora", "three_class", "outcome"))]
)
def test_micro_batches_padding_and_order_change_no_gradient(tmp_path, model_folder, kind):
    changes: dict = {"lora": {"lora_rank": 4}, "three_class": {"head": "three_class"}, "outcome": {"kind": "outcome"}}
    own = changes.get(kind, {})
    records = solutions(6, labels=(1, -1) if kind == "outcome" else (1, 0, -1, None))
    plain = gradients(tmp_path / "a", model_folder, records, **own)
    for name, other in {
        "micro": gradients(tmp_path / "b", model_folder, records, **own, microbatch_size=1),
        "wide": gradients(tmp_path / "c", model_folder, records, Wide, **own, microbatch_size=3),
        "order": gradients(tmp_path / "d", model_folder, records[::-1], **own, microbatch_size=2),
    }.items():
        assert other.keys() == plain.keys()
        assert any("score" in key for key in plain)
        for key, gradient in plain.items():
            scale = float(gradient.abs().max())
            assert float((other[key] - gradient).abs().max()) <= 1e-5 * scale + 1e-8, (name, key)


@pytest.mark.slow
def test_resuming_is_exact(tmp_path, model_folder):
    records = solutions(16)
    whole = ProcessTrainer(model_folder, args=config(tmp_path / "whole"), train_dataset=records)
    whole.train()

    class Stop(Exception):
        pass

    args = config(tmp_path / "halves", save_steps=2)
    first = ProcessTrainer(model_folder, args=args, train_dataset=records)
    log = first.log

    def stopping(*given, **more):
        if first.state.global_step == 3:
            raise Stop
        log(*given, **more)

    first.log = stopping
    with pytest.raises(Stop):
        first.train()
    second = ProcessTrainer(model_folder, args=args, train_dataset=records)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    for name, weight in weights(whole.model).items():
        assert torch.equal(weights(second.model)[name], weight), name


# ------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("kind", [pytest.param("full", marks=LONG), "lora", "three_class"])
def test_a_saved_model_gives_the_probabilities_of_training(tmp_path, model_folder, kind):
    changes: dict = {"lora": {"lora_rank": 4}, "three_class": {"head": "three_class"}}
    args = config(tmp_path / "out", **changes.get(kind, {}))
    trainer = ProcessTrainer(model_folder, args=args, train_dataset=solutions(8))
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, weight in weights(trainer.model).items() if not torch.equal(weight, before[name])}
    assert isinstance(trainer.model, PeftModel) == (kind == "lora")
    assert any("score" in name for name in moved)
    trainer.save_model()
    loaded = ProcessModel.load(tmp_path / "out", device="cpu")
    assert loaded.about == trainer.about
    assert loaded.about.template_hash == chat.template_hash(trainer.processing_class)
    talks = [[*r.prompt, {"role": "assistant", "content": "\n".join(r.steps)}] for r in solutions(5, 3)]
    here = ProcessModel(trainer.model, trainer.processing_class, trainer.about)
    assert loaded.step_probabilities(talks) == here.step_probabilities(talks)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["scalar", pytest.param("three_class", marks=LONG)])
def test_wrong_words_are_learnt(tmp_path, model_folder, head):
    args = config(tmp_path / "out", head=head, epochs=6, learning_rate=3e-3)
    trainer = ProcessTrainer(model_folder, args=args, train_dataset=solutions(40))
    trainer.train()
    assert trainer.evaluate(solutions(20, 5))["eval_step_accuracy"] > 0.9


def test_an_outcome_model_learns_from_whole_solutions(tmp_path, model_folder, caplog):
    records = [*solutions(6, labels=(1, -1)), StepLabels(solutions(1)[0].prompt, ("a", "b"), (1, None)),
               StepLabels(solutions(1)[0].prompt, ("a", "b"), (None, -1), {"alternative": True})]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer = ProcessTrainer(model_folder, args=config(tmp_path / "out", kind="outcome"), train_dataset=records)
    assert "left out 2 of 8 solutions without a label to learn" in caplog.text
    rows = trainer.train_dataset
    end = chat.end_of_turn_id(trainer.processing_class)
    for row, record in zip(rows, records, strict=False):
        assert row["labels"] == [-1 if -1 in record.labels else 1]
        assert row["sequences"][0][-1] == end
        assert row["ends"] == [[len(row["sequences"][0]) - 1]]


def test_alternatives_read_the_same_steps_before_them(tmp_path, model_folder):
    prompt = [{"role": "user", "content": "Why?"}]
    path = StepLabels(prompt, ("one", "two", "three"), (1, -1, None))
    other = StepLabels(prompt, ("one", "other"), (None, 1), {"alternative": True})
    trainer = ProcessTrainer(model_folder, args=config(tmp_path / "out", preflight=False), train_dataset=[path, other])
    first, second = trainer.train_dataset
    assert (first["labels"], second["labels"]) == ([1, -1], [1])
    shared = first["ends"][0][0] + 1
    assert first["sequences"][0][:shared] == second["sequences"][0][:shared]
    assert first["ends"][0][1] == len(first["sequences"][0]) - 1  # nothing behind the last label is read


# ------------------------------------------------------------------------------------------------ encoders


@pytest.fixture
def bert_folder(tmp_path):
    text = "user assistant : ? question please right fine good true dog in lines 0 1 2 3 4 5 6 7 8 9"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *text.split(), *(f"##{n}" for n in range(10))]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **size, max_position_embeddings=96))
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_an_encoder_reads_a_solution_up_to_each_step(tmp_path, bert_folder):
    trainer = ProcessTrainer(bert_folder, args=config(tmp_path / "out"), train_dataset=solutions(8))
    assert trainer.config.learning_rate == 1e-3
    bias = next(p for name, p in trainer.model.named_parameters() if name == "classifier.bias")
    before = bias.detach().clone()
    trainer.train()
    assert bias.requires_grad
    assert not torch.equal(bias, before)  # a probability has a level, other than a comparison
    trainer.save_model()
    model = ProcessModel.load(tmp_path / "out", device="cpu")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    for record in solutions(4, 2):
        asked = record.prompt[0]["content"]
        talk = [record.prompt[0], {"role": "assistant", "content": "\n".join(record.steps)}]
        for count, p in enumerate(model.step_probabilities([talk])[0], start=1):
            text = f"[CLS]user: {asked}[SEP]assistant: " + "\n".join(record.steps[:count]) + "[SEP]"
            ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                expected = torch.sigmoid(plain(**ids).logits)[0, 0].item()
            assert p == pytest.approx(expected, abs=1e-5)
    default = ProcessTrainer(bert_folder, args=config(tmp_path / "b", learning_rate=None), train_dataset=solutions(8))
    assert default.config.learning_rate == 5e-5
    assert AutoModel.from_pretrained(tmp_path / "out").config.num_labels == 1


def test_the_steps_of_an_encoder_are_separate_rows_of_one_solution(tmp_path, bert_folder):
    records = solutions(6)
    trainer = ProcessTrainer(bert_folder, args=config(tmp_path / "out"), train_dataset=records)
    for row, record in zip(trainer.train_dataset, records, strict=True):
        known = [label for label in record.labels if label is not None]
        assert row["labels"] == known
        assert len(row["sequences"]) == len(known)
    plain = gradients(tmp_path / "a", bert_folder, records)
    micro = gradients(tmp_path / "b", bert_folder, records, microbatch_size=1)
    for key, gradient in plain.items():
        assert float((micro[key] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max()) + 1e-8, key


# ------------------------------------------------------------------------------------------------ refused, left out


def test_long_solutions_are_left_out_counted_and_named(tmp_path, model_folder, caplog):
    long = StepLabels([{"role": "user", "content": "A long one"}], ("word " * 300, "end"), (1, -1))
    with caplog.at_level(logging.WARNING):
        trainer = ProcessTrainer(
            model_folder, args=config(tmp_path / "out", max_length=200), train_dataset=[*solutions(4), long]
        )
    assert len(trainer.train_dataset) == 4
    (message,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    for part in ("left out 1 of 5 solutions", "5 ('A long one')", "max_length=200 tokens"):
        assert part in message
    with pytest.raises(InputError, match="nothing is left: raise max_length to"):
        ProcessTrainer(model_folder, args=config(tmp_path / "out", max_length=200), train_dataset=[long])


def test_a_step_of_the_separator_alone_is_refused(tiny_tokenizer):
    chat.prepare_tokenizer(tiny_tokenizer)
    about, record = About(separator="###"), solutions(1)[0]
    blank = replace(record, steps=("one", "###", "two"), labels=(1, 0, -1))
    with pytest.raises(InputError, match="steps: 3 steps, of which 2 are not blank"):
        encode_solutions(tiny_tokenizer, [blank], about, False, 200, "train_dataset")


def test_a_separator_within_a_step_is_told_of(tmp_path, model_folder, caplog):
    record = StepLabels([{"role": "user", "content": "Why?"}], ("one\n\ntwo", "three"), (1, -1))
    with caplog.at_level(logging.WARNING):
        trainer = ProcessTrainer(model_folder, args=config(tmp_path / "out"), train_dataset=[record])
    assert "1 steps hold the separator '\\n', which became a space" in caplog.text
    text = trainer.processing_class.decode(trainer.train_dataset[0]["sequences"][0])
    assert text.endswith("assistant\none two\nthree")


@pytest.mark.parametrize("labels", [(1, 1), (-1, None)])
def test_labels_that_all_say_the_same_are_refused(tmp_path, model_folder, labels):
    records = [StepLabels([{"role": "user", "content": f"Why {n}?"}], ("a", "b"), labels) for n in range(4)]
    trainer = ProcessTrainer(model_folder, args=config(tmp_path / "out"), train_dataset=records)
    with pytest.raises(InputError, match=r"labels: .* say wrong; there is nothing to tell apart"):
        trainer.train()


def test_a_problem_in_both_splits_and_another_config_are_refused(tmp_path, model_folder):
    with pytest.raises(InputError, match="in both"):
        ProcessTrainer(model_folder, args=config(tmp_path), train_dataset=solutions(4), eval_dataset=solutions(1))
    with pytest.raises(TypeError, match=r"expected reward_models\.ProcessConfig"):
        ProcessTrainer(model_folder, args=RewardConfig(output_dir=str(tmp_path)), train_dataset=solutions(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"microbatch_size": 3}, "microbatch_size=3 must divide solutions_per_batch=4"),
        ({"kind": "outcome", "head": "three_class"}, "head=three_class: an outcome is right or wrong"),
        ({"separator": ""}, "separator is empty"),
        ({"head": "many"}, "head='many'"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        config("out", **changes)


def test_settings_of_rankings_are_none_of_solutions():
    for name in ("prompts_per_batch", "center_rewards_coefficient", "normalizer_samples"):
        with pytest.raises(TypeError, match=name):
            ProcessConfig(**{name: 1})
