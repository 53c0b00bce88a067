"""rlhf/sft/forward.py: the labelled tokens' numbers, against the model's own logits and trl's own loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference.families import new_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from rlhf.models import forward as forwards
from rlhf.sft import forward
from rlhf.sft import trainer as trainers
from rlhf.sft.forward import agrees, by_position, labelled
from rlhf.sft.trainer import SFTConfig, SFTTrainer

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 21, 22, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
LABELS = torch.tensor([[-100, -100, 7, 8, -100, 10], [-100, 21, 22, -100, -100, -100]])
PLACES = ([0, 0, 0, 1, 1], [2, 3, 5, 1, 2])
ROWS = [{"prompt": f"Count to {i}", "completion": "one, two, three " * (1 + i % 3)} for i in range(6)]


@pytest.mark.parametrize(
    ("family", "packs"), [("llama", False), ("llama", True), ("granite", True), ("gptj", False)]
)  # granite has a scale behind its head, gptj a bias
def test_numbers_and_gradients_are_those_of_the_models_own_logits(family, packs):
    model = new_model(family).eval()
    twin = copy.deepcopy(model)
    assert agrees(model)
    seen = labelled(model, IDS, MASK, LABELS, packs)
    logits = twin(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    rows, places = (torch.tensor(part) for part in PLACES)
    distribution = logits[rows, places - 1].log_softmax(-1)
    expected = distribution.gather(-1, IDS[rows, places][:, None])[:, 0]
    torch.testing.assert_close(seen.log_probs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.entropy, -(distribution.exp() * distribution).sum(-1), rtol=0, atol=1e-5)
    assert seen.is_top1.tolist() == (distribution.argmax(-1) == IDS[rows, places]).tolist()
    at = by_position(seen)
    assert at.shape == (2, 5)
    torch.testing.assert_close(at[rows, places - 1], expected, rtol=0, atol=1e-5)
    assert int((at != 0).sum()) == int(seen.label_mask.sum()) == 5
    seen.log_probs.sum().backward()
    expected.sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5 * scale + 1e-9, msg=name)


def test_rows_without_a_label_give_a_loss_and_a_gradient_of_0():
    model = new_model("llama")
    seen = labelled(model, IDS, MASK, torch.full_like(LABELS, -100))
    assert (float(seen.log_probs.detach().sum()), int(seen.label_mask.sum()), int(seen.is_top1.sum())) == (0.0, 0, 0)
    seen.log_probs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_family_whose_logits_are_unknown_is_noticed(monkeypatch):
    monkeypatch.setattr(forward, "logits_function", lambda model: None)
    assert agrees(new_model("llama"))
    assert not agrees(new_model("granite"))


class Largest(TorchDispatchMode):
    """The most numbers that a tensor of logits has held: with the vocabulary as its last dimension, but not the head's
    weight."""

    def __init__(self, vocabulary: int, hidden: int):
        super().__init__()
        self.vocabulary, self.hidden, self.numbers = vocabulary, hidden, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            shape = tensor.shape if isinstance(tensor, torch.Tensor) else ()
            if len(shape) > 1 and shape[-1] == self.vocabulary and shape[-2] != self.hidden:
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_no_more_logits_exist_at_once_than_a_chunk_of_tokens_has(monkeypatch):
    model = new_model("llama")
    vocabulary, hidden = model.config.vocab_size, model.config.hidden_size
    monkeypatch.setitem(forwards.LOGITS_PER_CHUNK, "cpu", 2 * vocabulary)
    with Largest(vocabulary, hidden) as largest:
        labelled(model, IDS, MASK, LABELS).log_probs.sum().backward()
    assert largest.numbers == 2 * vocabulary
    with Largest(vocabulary, hidden) as largest:
        model(input_ids=IDS, attention_mask=MASK)
    assert largest.numbers == IDS.numel() * vocabulary


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("lora_rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_a_run_is_that_of_trls_own_loss(tiny_tokenizer, tiny_model, tmp_path, monkeypatch, lora_rank):
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")

    def run(name: str) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, float]]]:
        probe = Gradients()
        config = SFTConfig(
            output_dir=str(tmp_path / name), epochs=1, batch_size=3, microbatch_size=3, logging_steps=1, save_steps=0,
            learning_rate=1e-3, lora_rank=lora_rank, bf16=False,
        )  # fmt: skip
        trainer = SFTTrainer(str(tmp_path / "base"), config, ROWS, ROWS_HELD_OUT, callbacks=[probe])
        trainer.train()
        return probe.seen, trainer.state.log_history

    ours, logs = run("ours")
    monkeypatch.setattr(trainers, "agrees", lambda model: False)
    monkeypatch.setattr("rlhf.run.callbacks.cpu.for_training", plain)
    theirs, expected = run("trl")
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, gradient in mine.items():
            scale = float(other[name].abs().max())
            torch.testing.assert_close(gradient, other[name], rtol=0, atol=1e-5 * scale + 1e-9, msg=name)
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "eval_loss", "eval_mean_token_accuracy"):
        numbers = [[row[name] for row in rows if name in row] for rows in (logs, expected)]
        assert numbers[0], name
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-6), name


ROWS_HELD_OUT = [{"prompt": "Count to a hundred", "completion": "one, two"}]


def plain(model: Any) -> Any:
    from contextlib import nullcontext

    return nullcontext()
