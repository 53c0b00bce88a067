"""Where a NaN or an infinity came from: prompt, token, tensor. A run stops on one, it never trains on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import short
from rlhf.ppo.rollout import Rollout

COLLECTED = ("logprobs", "reference_logprobs", "values", "scores", "advantages", "returns")


def broken_place(rollout: Rollout, names: Sequence[str] = COLLECTED, rows: Iterable[int] | None = None) -> str | None:
    """The first number of a rollout's columns that is NaN or infinite, with its prompt and token; None: all fine."""
    for name in names:
        values: Tensor | None = getattr(rollout, name)
        if values is None:
            continue
        for row in range(len(rollout)) if rows is None else rows:
            bad = ~values[row].isfinite()
            if values.dim() == 2:
                bad = bad & rollout.mask[row]
            if bool(bad.any()):
                token = int(bad.nonzero()[0]) if values.dim() == 2 else None
                where = float(values[row] if token is None else values[row, token])
                return f"{name.removesuffix('s').replace('_', ' ')} is {where} {place(rollout, row, token)}"
    return None


def place(rollout: Rollout, row: int, token: int | None) -> str:
    prompt, response = rollout.prompts[row].messages[-1]["content"], rollout.texts[row]
    at = "" if token is None else f"at response token {token} (id {rollout.response_ids[row][token]}) "
    return f"{at}in row {row}, prompt {short(prompt)}, response {short(response)}"


@torch.no_grad()
def broken_prompt(model: Any, prompt_ids: Sequence[list[int]], tokenizer: Any) -> str | None:
    """The first prompt on which a causal model's logits are not finite, and the token; or the weights that are not."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the policy's weights {name} are not finite"
    for row, ids in enumerate(prompt_ids):
        bad = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].isnan().any(-1)
        if bool(bad.any()):
            token = int(bad.nonzero()[0])
            return f"logits are NaN at token {token} (id {ids[token]}) of prompt {row}, {short(tokenizer.decode(ids))}"
    return None


def broken_step(
    rollout: Rollout, rows: Sequence[int], module: nn.Module, loss_of: Callable[[list[int]], Tensor]
) -> str:
    """Why an optimizer step's loss or gradient is not finite: looked for in what was collected, then row by row.

    ``loss_of([row])`` computes one row's loss again; called only once something is broken, so it may be slow.
    """
    found = broken_place(rollout, rows=rows)
    if found:
        return found
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for name, parameter in named:
        if not bool(parameter.detach().isfinite().all()):
            return f"the weights {name} are not finite already"
    for row in rows:
        loss = loss_of([row])
        if not bool(loss.isfinite()):
            return f"loss is {loss.item()} {place(rollout, row, None)}"
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        for (name, _), gradient in zip(named, gradients, strict=True):
            if gradient is not None and not bool(gradient.isfinite().all()):
                return f"gradient of {name} is not finite {place(rollout, row, None)}"
    return "the gradient is finite row by row, and overflows in their sum"
