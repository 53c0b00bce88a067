"""The search for the origin of a NaN or an infinity: prompt, token, tensor. A run stops on one, never trains on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import RunStopped, short
from rlhf.ppo.actor_critic import ActorCritic, Outputs
from rlhf.ppo.rollout import ReadyRollout, Rollout

COLLECTED = ("logprobs", "reference_logprobs", "values")
READY = (*COLLECTED, "scores", "advantages", "returns")


def broken_number(rollout: Rollout, names: Sequence[str] = COLLECTED, rows: Iterable[int] | None = None) -> str | None:
    """Describe the first NaN or infinity in a rollout's columns, with its prompt and token; None if there is none."""
    for name in names:
        values: Tensor = getattr(rollout, name)
        for row in range(len(rollout)) if rows is None else rows:
            bad = ~values[row].isfinite()
            if values.dim() == 2:
                bad = bad & rollout.mask[row]
            if bool(bad.any()):
                token = int(bad.nonzero()[0]) if values.dim() == 2 else None
                number = float(values[row] if token is None else values[row, token])
                return f"{name.removesuffix('s').replace('_', ' ')} is {number} {location(rollout, row, token)}"
    return None


def stop_on(broken: str | None, update: int) -> None:
    """Raise RunStopped with the description `broken`, if there is one; `update` counts from 1."""
    if broken is not None:
        raise RunStopped(
            f"update {update}: {broken}; no step was taken on it. Lower learning_rate, or look at that row and the "
            "scores; the last checkpoint is good"
        )


@contextmanager
def sampling_explained(
    models: ActorCritic, prompt_ids: Sequence[list[int]], tokenizer: Any, update: int
) -> Iterator[None]:
    """Turn the error of sampling from NaN probabilities into RunStopped that names the prompt or weights at fault.

    Enter it inside `ActorCritic.lent_to`: there a policy that FSDP2 cuts is whole, so that one process can look at its
    weights, and run it, while the others still sample."""
    try:
        yield
    except RuntimeError as error:
        if "probability" not in str(error):  # in torch.multinomial's message about a NaN, as in our own
            raise
        with models.active("policy") as policy:
            found = broken_prompt(policy, prompt_ids, tokenizer)
        stop_on(found or "sampling: a probability is not a number", update)


def location(rollout: Rollout, row: int, token: int | None) -> str:
    """Describe a row of a rollout, and a token of its response, for an error message."""
    prompt, response = rollout.prompts[row].messages[-1]["content"], rollout.texts[row]
    at = "" if token is None else f"at response token {token} (id {rollout.response_ids[row][token]}) "
    return f"{at}in row {row}, prompt {short(prompt)!r}, response {short(response)!r}"


@torch.no_grad()
def broken_prompt(model: Any, prompt_ids: Sequence[list[int]], tokenizer: Any) -> str | None:
    """Name the first weights that are not finite, else the first prompt and token whose logits are NaN; else None."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the policy's weights {name} are not finite"
    for row, ids in enumerate(prompt_ids):
        bad = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].isnan().any(-1)
        if bool(bad.any()):
            token = int(bad.nonzero()[0])
            return (
                f"logits are NaN at token {token} (id {ids[token]}) of prompt {row}, {short(tokenizer.decode(ids))!r}"
            )
    return None


def explain_step(
    rollout: ReadyRollout, minibatch: list[list[int]], module: nn.Module, outputs: Callable[..., Outputs]
) -> str:
    """Explain why an optimizer step's gradient is not finite: search the rollout's columns, the weights, then each row.

    ``outputs(rollout, [row])`` computes a row's log-probabilities and values again. All this runs only after a
    failure, so it may be slow.
    """
    rows = [row for micro_batch in minibatch for row in micro_batch]
    found = broken_number(rollout, READY, rows)
    if found:
        return found
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for name, parameter in named:
        if not bool(parameter.detach().isfinite().all()):
            return f"the weights {name} are not finite already"
    for row in rows:
        loss = _unclipped_loss(rollout, row, outputs(rollout, [row]))
        if not bool(loss.isfinite()):
            return f"loss is {loss.item()} {location(rollout, row, None)}"
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        for (name, _), gradient in zip(named, gradients, strict=True):
            if gradient is not None and not bool(gradient.isfinite().all()):
                return f"gradient of {name} is not finite {location(rollout, row, None)}"
    return "the gradient is finite row by row, and overflows in their sum"


def _unclipped_loss(rollout: ReadyRollout, row: int, outputs: Outputs) -> Tensor:
    """Compute the sum of one row's losses without clipping; if it is finite, so are the clipped losses."""
    old = rollout.columns([row], outputs.logprobs.device)
    ratio = (outputs.logprobs - old.logprobs).exp()
    return 0.5 * (outputs.values - old.returns).square().sum() - (ratio * old.advantages).sum()
