"""A few responses, sampled and scored as the run will do it, for the preflight checks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rlhf import chat
from rlhf.padding import Batch, make_batch
from rlhf.ppo.actor_critic import ActorCritic, Outputs
from rlhf.ppo.protocol import Trainer
from rlhf.preflight.measure import PROMPT_TOKENS, RESPONSE_TOKENS, ROWS, is_exact, spread
from rlhf.rows.records import Prompt
from rlhf.sampling.draw import draw
from rlhf.sampling.engine import Responses


@dataclass(frozen=True)
class Trial:
    """A few prompts of the run, shortest first, with the engine's responses.

    drawn: the log-probability by which each token was drawn; None if the engine draws them elsewhere (a server)."""

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    responses: Responses
    texts: list[str]
    batch: Batch
    drawn: list[list[float]] | None


class Watched(TorchFunctionMode):
    """A context that records every draw by torch.multinomial or `sampling.draw`: tokens and their log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[list[int], list[float]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is draw or (func in (torch.multinomial, Tensor.multinomial) and result.dim() == 2):
            weights, tokens = (args[0] if args else (kwargs or {})["input"]).double(), result.view(len(result), -1)
            chosen = weights.gather(-1, tokens) / weights.sum(-1, keepdim=True)
            self.steps.append((tokens[:, 0].tolist(), chosen[:, 0].log().tolist()))
        return result


def sample_trial(trainer: Trainer) -> Trial:
    """Sample short responses to a few prompts of different lengths, as the run will."""
    at_most = getattr(trainer.engine, "rows_per_batch", ROWS)
    rows = spread([len(ids) for ids in trainer.prompt_ids[:256]], PROMPT_TOKENS)[:at_most]
    prompt_ids = [trainer.prompt_ids[i] for i in rows]
    generator = torch.Generator(trainer.device).manual_seed(trainer.args.seed)
    most, sampling = min(RESPONSE_TOKENS, trainer.args.max_new_tokens), trainer.actor_critic.lent_to(trainer.engine)
    at_once = getattr(trainer.engine, "leaving_at_once", nullcontext)()
    with torch.no_grad(), trainer.accelerator.autocast(), sampling, at_once, Watched() as draws:
        responses = trainer.engine.generate(prompt_ids, most, trainer.args.temperature, generator)
    return Trial(
        [trainer.prompts[i] for i in rows],
        prompt_ids,
        responses,
        [chat.decode_response(trainer.processing_class, ids, trainer.stop_ids) for ids in responses.ids],
        make_batch(prompt_ids, responses.ids, trainer.pad_id, trainer.device),
        _drawn(draws, responses.ids),
    )


def _drawn(draws: Watched, ids: list[list[int]]) -> list[list[float]] | None:
    """Return the log-probabilities of each row's draws; None if the recorded draws are not the rows' tokens."""
    found: list[list[float]] = [[] for _ in ids]
    for step in range(max(map(len, ids))):
        going = [row for row, tokens in enumerate(ids) if len(tokens) > step]
        if step >= len(draws.steps) or draws.steps[step][0] != [ids[row][step] for row in going]:
            return None
        for row, logprob in zip(going, draws.steps[step][1], strict=True):
            found[row].append(logprob)
    return found


@dataclass(frozen=True)
class TrialOutputs:
    """The models' outputs on the trial: `collected` without gradient (as in `collect`), `trained` with it (as in the
    first optimizer step). exact: the run computes in float32, so both must agree to the last bit."""

    collected: Outputs
    trained: Outputs
    mask: Tensor
    exact: bool


def score_trial(trainer: Trainer, own: ActorCritic, trial: Trial) -> TrialOutputs:
    """Run the three models on the trial, without and with gradient."""
    temperature = trainer.args.temperature
    with torch.no_grad():
        collected = own(trial.batch, temperature, ("policy", "reference", "value"))
    trained = own(trial.batch, temperature, ("policy", "value"))
    # torch.compile uses different kernels with and without gradient
    exact = is_exact(trainer.accelerator, own) and not trainer.args.compile
    return TrialOutputs(collected, trained, trial.batch.mask, exact)
