"""One step off: the next rollout's responses are sampled while this rollout trains (`rollouts_ahead: 1`).

A thread samples them from a copy of the policy's trained weights, taken before the update. When their turn comes they
are one update old: their log-probabilities under the weights that sampled them are kept, and importance weights
(`rlhf.ppo.math.importance_weights`) correct for the difference, as they do for an engine's other arithmetic.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from threading import Thread

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlhf.errors import InputError
from rlhf.models import packing
from rlhf.ppo import finite
from rlhf.ppo.protocol import InHandState, Trainer
from rlhf.run import distributed
from rlhf.sampling.decode import TransformersEngine
from rlhf.sampling.engine import Engine, Follower, Responses

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class InHand:
    """One process's responses for an update, and where they come from."""

    update: int
    """The update that they are for, counted from 0."""
    weights: int
    """The number of updates that had been made when the weights that sampled them were taken."""
    prompt_ids: list[list[int]]
    responses: Responses


class Ahead:
    """The responses of a trainer's rollouts: sampled when they are needed, or, with `rollouts_ahead: 1`, one ahead.

    In hand at an update are its own responses and, in a thread, those of the next. A checkpoint holds the responses of
    the update that follows it, so a resumed run trains on the same. Raises InputError where the policy is sharded, and
    for an engine that cannot sample from the copy.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.current: InHand | None = None  # of the update that runs, or of the next one after it
        self.coming: Future[InHand] | None = None
        self.copy: Copy | None = None  # made when it is first needed
        if trainer.args.rollouts_ahead:
            _check(trainer)
            if isinstance(trainer.engine, TransformersEngine):
                trainer.engine.reports_logprobs = True
            else:  # it follows the copy for good: to follow the policy in between would be to send everything anew
                self.copy = Copy(trainer)

    def responses(self, prompt_ids: list[list[int]]) -> tuple[Responses, int | None]:
        """Return the current update's responses, and how many updates old their weights are (None: not asked for).

        With `rollouts_ahead: 1` the next update's responses are being sampled from now on."""
        trainer, update = self.trainer, self.trainer.update_index
        if not trainer.args.rollouts_ahead:
            return trainer.generate(prompt_ids, trainer.draws.sampling(update, len(prompt_ids), trainer.device)), None
        found = self._in_hand(update)
        if found is not None and found.prompt_ids != prompt_ids:
            log.warning("update %d: other prompts than those that were sampled ahead; they are sampled now", update + 1)
            found = None
        if found is None:  # the first of a run, too
            generator = trainer.draws.sampling(update, len(prompt_ids), trainer.device)
            found = InHand(update, update, prompt_ids, trainer.generate(prompt_ids, generator))
        if found.responses.logprobs is None:
            raise InputError(
                f"rollouts_ahead=1: {type(trainer.engine).__name__} reports no log-probabilities for this model, "
                "without which older responses cannot be corrected; set rollouts_ahead to 0"
            )
        self.current = found
        if update + 1 < trainer.args.updates:
            self._begin(update + 1)
        return found.responses, update - found.weights

    def wait(self) -> None:
        """Wait until nothing is being sampled; an engine with weights of its own then samples with the current ones."""
        if self.coming is not None:
            self.coming.exception()
        if self.copy is not None and self.copy.followed:
            self.copy.refresh()

    def state(self) -> InHandState:
        """Return, for a checkpoint, the responses that every process has for the update that follows; a collective.

        If sampling them has failed there are none, and the error waits for the update that needs them: so the
        checkpoint before it is written."""
        if not self.trainer.args.rollouts_ahead:
            return {}
        found = None
        with suppress(Exception):
            found = self._in_hand(self.trainer.update_index)
        return {"ahead": gather_object([None if found is None else asdict(found)])}

    def load(self, state: InHandState) -> None:
        """Restore what `state` returned. With another number of processes the rollout is sampled anew."""
        held, accelerator = state.get("ahead") or [], self.trainer.accelerator
        self.wait()
        self.current = self.coming = None
        own = held[accelerator.process_index] if len(held) == accelerator.num_processes else None
        if own is not None:
            self.current = InHand(**own | {"responses": Responses(**own["responses"])})

    def _in_hand(self, update: int) -> InHand | None:
        """Return the responses for an update, if they have been sampled or are being sampled."""
        if (self.current is None or self.current.update != update) and self.coming is not None:
            models, tokenizer, ids = self.trainer.actor_critic, self.trainer.processing_class, self.trainer.prompt_ids
            with finite.sampling_explained(models, ids[:64], tokenizer, update + 1):
                self.current = self.coming.result()
            self.coming = None
        return self.current if self.current is not None and self.current.update == update else None

    def _begin(self, update: int) -> None:
        """Sample the responses of an update in a thread, from a copy of the weights as they are now."""
        if self.coming is not None:
            return  # begun already: `collect` was called again
        trainer = self.trainer
        self.copy = self.copy or Copy(trainer)
        self.copy.refresh()
        weights = self.copy.weights
        rows = trainer.draws.prompt_rows(update, trainer.args.rollout_size, len(trainer.prompts))
        prompt_ids = [trainer.prompt_ids[row] for row in rows]
        generator = trainer.draws.sampling(update, len(rows), trainer.device)
        future: Future[InHand] = Future()

        def run(made: Copy) -> None:
            try:
                future.set_result(InHand(update, weights, prompt_ids, made.generate(prompt_ids, generator)))
            except BaseException as error:  # raised again where the responses are needed
                future.set_exception(error)

        self.coming = future
        Thread(target=run, args=(self.copy,), name="rlhf-rollout").start()


class Copy:
    """A copy of the policy to sample from while the policy trains: its modules, around the same frozen tensors.

    Only the trained weights are copied (LoRA: the adapter). weights: the updates that had been made when they were.
    followed: whether an engine with weights of its own follows it in place of the policy.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.weights = trainer, trainer.update_index
        policy = trainer.actor_critic.policy
        trained = {id(parameter) for parameter in trainer.actor_critic.policy_parameters()}
        shared = {id(t): t for t in [*policy.parameters(), *policy.buffers()] if id(t) not in trained}
        self.policy = copy.deepcopy(policy, shared)
        if packing.is_flash(self.policy):
            packing.set_attention(self.policy, "sdpa")  # as `ActorCritic.sampling` does for the policy
        own = dict(self.policy.named_parameters())
        self.pairs: list[tuple[Tensor, Tensor]] = [
            (own[name], parameter) for name, parameter in policy.named_parameters() if id(parameter) in trained
        ]
        # One for good: the memory that a stream gives back is for that stream alone.
        self.stream = torch.cuda.Stream(trainer.device) if trainer.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.engine: Engine = trainer.engine
        self.followed = isinstance(trainer.engine, Follower)
        if isinstance(trainer.engine, Follower):
            trainer.engine.follow(self.policy, trainer.stop_ids)
        elif isinstance(trainer.engine, TransformersEngine):
            own_engine = copy.copy(trainer.engine)
            own_engine.model = self.policy
            self.engine = own_engine

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the policy's weights as they are now."""
        for own, trained in self.pairs:
            own.copy_(trained)
        self.weights = self.trainer.update_index

    def generate(self, prompt_ids: list[list[int]], generator: torch.Generator) -> Responses:
        """Sample one response per prompt from the copy; called in a thread."""
        trainer, args = self.trainer, self.trainer.args
        with trainer.accelerator.autocast(), beside(self.stream):
            return self.engine.generate(prompt_ids, args.max_new_tokens, args.temperature, generator)


@contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run on a GPU's stream, after what has been asked of the GPU so far; without one do nothing."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.default_stream(stream.device))
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


def _check(trainer: Trainer) -> None:
    """Raise InputError where responses cannot be sampled ahead."""
    engine, follows = trainer.engine, isinstance(trainer.engine, Follower)
    if distributed.is_sharded(trainer.module):
        raise InputError("rollouts_ahead=1: not where FSDP2 shards the policy; set it to 0, or use DDP")
    if not follows and not isinstance(engine, TransformersEngine):
        raise InputError(
            f"rollouts_ahead=1: {type(engine).__name__} has no method `follow` to be given the weights to sample from; "
            "set it to 0, or leave the engine out"
        )
    if getattr(engine, "colocated", False):
        raise InputError("rollouts_ahead=1: a colocated server sleeps while the policy trains; set it to 0")
    if follows and trainer.accelerator.num_processes > 1:
        raise InputError(
            f"rollouts_ahead=1: {type(engine).__name__} sends its weights from one process while the others wait, "
            "which they cannot while they train; set it to 0, or use one process"
        )
