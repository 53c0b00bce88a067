"""Small PPO runs of the tiny models, and what tests look at in them: gradients, weights, logs."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from rlhf.ppo.trainer import PPOConfig, PPOTrainer

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ROWS = [{"prompt": f"Count to {word}" + ", please" * (i % 3), "number": i} for i, word in enumerate(WORDS)]
SMALL = {
    "updates": 2, "rollout_size": 12, "minibatch_size": 6, "inner_epochs": 2, "max_new_tokens": 8,
    "learning_rate": 1e-3,
    "tokens_per_microbatch": 150, "bf16": False,
}  # fmt: skip


def low_share(prompts, completions, completion_ids, **columns):
    """Share of tokens in the vocabulary's first half."""
    return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]


def make(
    folder, model, functions=low_share, rows=ROWS, tokenizer=None, callbacks=None, engine=None, **changes
) -> PPOTrainer:
    value_model = changes.pop("value_model", None)
    eval_rows = changes.pop("eval_rows", None)
    ref_model = changes.pop("ref_model", None)
    own = {"output_dir": str(folder / "run"), "value_model": changes.pop("value_kind", None)}
    return PPOTrainer(
        model, functions, PPOConfig(**(own | SMALL | changes)), rows, eval_rows,
        processing_class=tokenizer, value_model=value_model, ref_model=ref_model, callbacks=callbacks, engine=engine,
    )  # fmt: skip


class Graphs:
    """The autograd graphs that a function's results ended in, each told by an object that its last node holds."""

    def __init__(self) -> None:
        self._marks: list[weakref.ref[Mark]] = []

    @property
    def made(self) -> int:
        return len(self._marks)

    def alive(self) -> int:
        return sum(mark() is not None for mark in self._marks)

    def one_at_a_time(self, compute):
        """Return the function, which asserts at each call that no earlier result's graph is alive."""

        def computed(*args):
            assert self.alive() == 0
            result, mark = compute(*args), Mark()
            for tensor in result if isinstance(result, tuple) else (result,):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.metadata["mark"] = mark
            self._marks.append(weakref.ref(mark))
            return result

        return computed


class Mark:
    """What a graph's node holds."""


def prepared(trainer: PPOTrainer):
    return trainer.advantages(trainer.score(trainer.collect(trainer.next_prompts())))


@torch.no_grad()
def token_logprobs(model: Any, rollout: Any) -> list[torch.Tensor]:
    """Each response's log-probabilities under a model, a row at a time without padding."""
    found = []
    for prompt, response in zip(rollout.prompt_ids, rollout.response_ids, strict=True):
        logprobs = model(torch.tensor([prompt + response], device=model.device)).logits[0].log_softmax(-1)
        found.append(logprobs.cpu()[range(len(prompt) - 1, len(prompt) + len(response) - 1), response])
    return found


def weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    named = trainer.accelerator.unwrap_model(trainer.module).named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}


def watch_steps(trainer: PPOTrainer, step: bool = False) -> list[dict[str, torch.Tensor]]:
    """The gradients that each optimizer step gets; the step itself is left out unless asked for."""
    seen: list[dict[str, torch.Tensor]] = []
    model, plain = trainer.accelerator.unwrap_model(trainer.module), trainer.optimizer.step

    def watched(*args, **kwargs):
        seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        if step:
            plain(*args, **kwargs)

    trainer.optimizer.step = watched
    return seen


def is_value(name: str) -> bool:
    return name.startswith("value") or ".value." in name


def same(one, other, tolerance: float = 1e-5) -> None:
    """Equal up to float32 rounding of sums: relative to each tensor's largest entry."""
    assert one.keys() == other.keys()
    assert one
    for name, tensor in one.items():
        scale = float(other[name].abs().max())
        np.testing.assert_allclose(tensor, other[name], rtol=0, atol=tolerance * scale + 1e-12, err_msg=name)


def norm(gradients: dict[str, torch.Tensor], value: bool) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for name, g in gradients.items() if is_value(name) == value))


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


class StopAfter(TrainerCallback):
    def __init__(self, update: int):
        self.update = update

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.update
