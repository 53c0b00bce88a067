"""The comparison of a vLLM server's log-probabilities with the trainer's, after each time it was sent the weights.

Samplers that kept old weights, or never applied the adapter, went unnoticed for months in other trainers
(verl#7495, verl#5220, miles#2075): rewards move all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor

from rlhf.errors import RunStopped
from rlhf.models.adapters import adapter_of
from rlhf.sampling.vllm_connection import Server

SAMPLED = 16  # tokens
LONGEST = 256  # tokens of the prompt
FLOAT32, SIXTEEN_BITS = 1e-3, 0.1
"""Limits of the mean difference, in nats. In float32, server and trainer agree to about 1e-5."""

TEMPERATURE = "its --logprobs-mode is not processed_logprobs: they leave out the temperature"
CUT = "it samples at another temperature, or cuts the distribution (top-k, top-p, penalties)"
KEPT = "they are those from before: it kept the weights that it had"
BASE = "they are those of the model that it was started with: the adapter is not applied"
HEAD = (
    "its head may be the old one: some versions of vLLM keep a copy of a tied head; train an adapter (transport lora), "
    "or serve a model with tie_word_embeddings: false"
)
OTHER = "it serves another model than the policy's, or in another precision (--dtype float32 for bf16: false)"
PIECE = 2**22  # weights that are summed at once: torch copies them into 64 bits for it
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Seen(NamedTuple):
    """The log-probabilities of one text and one sampled response, in nats."""

    text: list[float]
    """Of the text's tokens but the first, at temperature 1."""
    sampled: list[float]
    """Of the response's tokens, at the run's temperature."""


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the mean difference of two rows of numbers."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / max(1, len(one))


def fault(
    server: Seen,
    trainer: Seen,
    limit: float,
    before: tuple[Sequence[float], Sequence[float] | None],
    base: Sequence[float] | None,
    plain: Sequence[float],
    still: float,
    unknown: str = OTHER,
) -> tuple[float, str] | None:
    """Return by how much the server is off, and the likely cause; None if it agrees.

    before: the server's and the trainer's numbers of the text when the server's last changed (None: not known). base:
    the text's under the server's own model, where weights are sent as an adapter. plain: the trainer's numbers of the
    response at temperature 1. still: by how much the trainer's numbers may move while the server's stand still.

    A server whose numbers did not change in any bit while the trainer's moved has kept its weights, though both agree
    within the limit; otherwise a difference above the limit counts."""
    off, same = apart(server.text, trainer.text), list(before[0]) == server.text
    moved = 0.0 if before[1] is None else apart(before[1], trainer.text)
    if off > limit or (same and moved > still):
        applied = base is None or list(base) != server.text
        return max(off, moved), BASE if not applied else KEPT if same else unknown
    off = apart(server.sampled, trainer.sampled)
    if off > limit:
        return off, TEMPERATURE if apart(server.sampled, plain) <= limit else CUT
    return None


class Asked(NamedTuple):
    """What a server was asked after it was sent the weights, and its answers."""

    model: str
    """The name of the model that has the weights."""
    text: list[int]
    response: list[int]
    """The tokens of the prompt and of the response sampled to it."""
    start: int
    """Where the response begins."""
    said: Seen
    unmoved: bool
    """The text's numbers are those that the server had when they last changed."""


class Own(NamedTuple):
    """The trainer's answers to the same."""

    said: Seen
    plain: list[float]
    """Of the response's tokens, at temperature 1."""
    again: list[float]
    """Of the text, computed a second time where that counts: two forwards in 16 bits may differ on a GPU."""
    exact: bool
    """Computed in float32."""
    weights: list[int]
    """`marks` of the weights; in float32 they don't count."""


class Before(NamedTuple):
    """The numbers when the server's last changed; of the trainer, None before it has sent anything."""

    server: list[float]
    trainer: list[float] | None = None
    weights: Sequence[int] = ()


class Check:
    """Compares a server with the policy on one text: a prompt, and a response to it that is sampled at first.

    base: the name of the server's own model, which is asked before it is sent any weights. tokens: as many as a
    response of the run may have. limit: the largest mean difference in nats; None: by the precision in which the
    trainer computes. adapter: whether weights are sent as an adapter over the server's own model. unknown: the cause of
    a difference that nothing else explains."""

    def __init__(
        self,
        server: Server,
        base: str,
        prompt: list[int],
        tokens: int,
        limit: float | None,
        adapter: bool,
        unknown: str = OTHER,
    ):
        self.server, self.prompt, self.limit, self.unknown = server, prompt[-LONGEST:], limit, unknown
        ids, _ = self._sampled(base, tokens, 1.0)
        self.text = self.prompt + ids[:-1]  # vLLM samples one token more, for which there must be a position
        own = server.prompt_logprobs(base, self.text)
        self.base = own if adapter else None
        self.before = Before(own)

    def ask(self, model: str, tokens: int, temperature: float) -> Asked:
        """Ask the server for its numbers for `model`, at the run's temperature too."""
        ids, sampled = self._sampled(model, tokens, temperature)
        said = Seen(self.server.prompt_logprobs(model, self.text), sampled)
        return Asked(model, self.text, self.prompt + ids, len(self.prompt), said, said.text == self.before.server)

    def judge(self, asked: Asked, own: Own) -> None:
        """Raise RunStopped if the server's numbers are not the trainer's."""
        limit, text = self.limit or (FLOAT32 if own.exact else SIXTEEN_BITS), asked.said.text
        before = self.before.server, self.before.trainer
        still = self._still(own, limit)
        found = fault(asked.said, own.said, limit, before, self.base, own.plain, still, self.unknown)
        if self.before.trainer is None or text != self.before.server:  # else what the trainer moved since adds up
            self.before = Before(text, own.said.text, own.weights)
        if found is not None:
            off, cause = found
            raise RunStopped(
                f"{self.server.url}: after it was sent the weights, its log-probabilities of one text differ from the "
                f"trainer's by {off:.2g} nats per token (at most {limit:g}); {cause}"
            )

    def _still(self, own: Own, limit: float) -> float:
        """Return by how much the trainer's numbers may move while the server's stand still.

        In float32 they say how far the weights went. In 16 bits a change of theirs is rounding, whatever its size, and
        so are the server's: they all change with any weights that do. The weights must have, which a learning rate of
        0 leaves as they are, and the trainer's numbers by more than they do from one forward to the next."""
        if own.exact:
            return limit / 10
        return math.inf if own.weights == self.before.weights else 2 * apart(own.said.text, own.again)

    def _sampled(self, model: str, tokens: int, temperature: float) -> tuple[list[int], list[float]]:
        return self.server.sample(model, self.prompt, min(tokens, SAMPLED), temperature, 0, ())


def answer(policy: Any, asked: Asked, temperature: float) -> Own:
    """Compute the trainer's numbers for what a server was asked."""
    exact = precision(policy) == torch.float32
    (text,) = logprobs(policy, asked.text, 1, [1.0])
    (again,) = [text] if exact or not asked.unmoved else logprobs(policy, asked.text, 1, [1.0])
    sampled, plain = logprobs(policy, asked.response, asked.start, [temperature, 1.0])
    return Own(Seen(text, sampled), plain, again, exact, [] if exact else marks(policy))


@torch.no_grad()
def marks(policy: Any) -> list[int]:
    """Return a number for each weight that is sent (of a sharded one: this process's part) that follows from its bits:
    another one, all but surely, after a step."""
    adapter = isinstance(policy, PeftModel)
    own = [p for name, p in policy.named_parameters() if not adapter or adapter_of(name) == "default"]
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in own]
    bits = [part.view(INTEGERS[part.element_size()]).flatten() for part in parts]
    sums = [torch.stack([piece.sum(dtype=torch.int64) for piece in one.split(PIECE)]).sum() for one in bits]
    found: list[int] = torch.stack(sums).tolist()
    return found


@torch.no_grad()
def logprobs(policy: Any, ids: list[int], start: int, temperatures: Sequence[float]) -> list[list[float]]:
    """Return the policy's log-probabilities of the tokens from `start` on, at each temperature, in the precision that
    it trains in."""
    training = policy.training
    policy.eval()
    try:
        logits = policy(input_ids=torch.tensor([ids], device=policy.device), use_cache=False).logits[0, start - 1 : -1]
    finally:
        policy.train(training)
    tokens = torch.tensor(ids[start:], device=logits.device)[:, None]
    return [(logits.float() / t).log_softmax(-1).gather(1, tokens)[:, 0].tolist() for t in temperatures]


def precision(policy: Any) -> torch.dtype:
    """Return the type that the policy's products are computed in."""
    kind = policy.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else policy.dtype
