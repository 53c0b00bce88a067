"""A vLLM server as the engine that samples, over vLLM's own HTTP.

`vllm_connection` holds the requests, `vllm_transport` the ways of the weights, `vllm_check` what is compared each time
they were sent.
"""

from __future__ import annotations

import logging
import secrets
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from rlhf.errors import InputError, RunStopped
from rlhf.sampling.engine import Responses, row_seeds
from rlhf.sampling.vllm_check import HEAD, OTHER, Asked, Check, answer
from rlhf.sampling.vllm_connection import Server, ServerGone
from rlhf.sampling.vllm_transport import FolderTransport, Kind, LoraTransport, NCCLTransport, Transport, make
from rlhf.sampling.vllm_weights import is_tied

log = logging.getLogger("rlhf")

REQUESTS_AT_ONCE = 64
RETURNS = 3  # of the server, in one rollout: one that dies of our requests would come back for ever
START = "vllm serve MODEL --logprobs-mode processed_logprobs (recipes/guides/vllm.md)"

Result = TypeVar("Result")


class VLLMEngine:
    """An engine that samples with a vLLM server (`vllm serve`) and sends it the policy's weights.

    ::

        trainer = PPOTrainer("runs/my/sft", reward_model, args, prompts, engine=VLLMEngine("http://localhost:8000"))

    Before every `generate` it sends the policy's weights: with transport "lora" the adapter, over the server's base;
    with "folder" all weights, merged; with "nccl" the same, by trl's client, which needs vllm in the trainer's
    environment and two GPUs (not yet run). The trainer's own tensors never change. Then the server's log-probabilities
    of one prompt and response are compared with the trainer's; RunStopped names the likely cause where they differ
    (old weights, an adapter that is not applied, another temperature).

    Tokens come from the full softmax at the trainer's temperature (no top-k, top-p, min-p or penalties) and end at the
    trainer's stop ids only, not at the hub model's. Every prompt is a request of its own, with its own seed drawn from
    `generator`: vLLM would give all prompts of one request the same seed, and so the same random numbers. (Seeds make a
    run repeatable only as far as vLLM's arithmetic is repeatable, which depends on the other rows of its batch.)

    The responses carry the server's log-probabilities, with which PPO corrects for the difference between the server's
    arithmetic and the trainer's (`ppo_math.importance_weights`).

    With several processes each one sends its own prompts, and only the main one sends the weights. Of a policy that
    FSDP2 cuts, "lora" and "folder" gather one tensor at a time, and one layer at a time for the comparison: no process
    holds it whole. If the server dies, all wait up to `wait_seconds` until it is back, send the weights again and
    sample the whole rollout again, with the same seeds.

    url: the server's address. transport: None: "lora" if the policy is an adapter that vLLM can load, else "folder".
    folder: where the weights pass, which the server sees under the same path; None: a temporary one of this machine.
    tolerance_nats: the largest mean difference of the compared log-probabilities; None: 0.001 where the trainer
    computes in float32, else 0.1. timeout_seconds: the limit of one request. group_port: nccl's port on the trainer's
    machine. colocated: the server shares the trainer's GPU, and sleeps (`vllm serve --enable-sleep-mode`) but while it
    samples; not yet run on a GPU. Raises InputError if the server cannot be reached or is not set up for this,
    RunStopped if it fails later.
    """

    def __init__(
        self,
        url: str,
        transport: Kind | None = None,
        folder: str | Path | None = None,
        wait_seconds: float = 300.0,
        timeout_seconds: float = 600.0,
        tolerance_nats: float | None = None,
        group_port: int = 51216,
        colocated: bool = False,
    ):
        self.kind, self.group_port, self.colocated = transport, group_port, colocated
        self.wait_seconds, self.tolerance_nats = wait_seconds, tolerance_nats
        self.server = Server(url, timeout_seconds)
        self.url = self.server.url
        if not self.server.healthy():
            raise InputError(
                f"{self.url}: no vLLM server in good health; start it with: {START}; or name another address"
            )
        self.base = self.server.base_model()
        self.folder = Path(folder or tempfile.gettempdir()).resolve() / f"vllm-{secrets.token_hex(8)}"
        weakref.finalize(self, rmtree, self.folder, ignore_errors=True)
        self.policy: Any = None
        self.stop_ids: tuple[int, ...] = ()
        self.transport: Transport | None = None
        self.check: Check | None = None  # None: the server has not been asked yet, or has been away
        self.model = self.base  # the name under which the server has the policy's weights

    def follow(self, policy: Any, stop_ids: Sequence[int]) -> None:
        """Set the policy whose weights to sample with, and the ids that end a response; the trainer calls it."""
        self.transport = make(self.kind, self.server, self.base, policy, self.folder, self.group_port)
        self.policy, self.stop_ids = policy, tuple(stop_ids)
        log.info("%s: gets the weights by %s", self.url, type(self.transport).__name__)

    @property
    def gathers(self) -> bool:
        """Return whether a sharded policy need not be whole: see `Gatherer`."""
        return not isinstance(self.transport, NCCLTransport)

    @torch.no_grad()
    def generate(
        self, prompt_ids: Sequence[list[int]], max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Responses:
        """Send the policy's weights, then sample one response per prompt."""
        seeds = row_seeds(generator, len(prompt_ids))
        for returns in range(RETURNS + 1):
            try:
                self.send_weights(max(prompt_ids, key=len), max_new_tokens, temperature)
                return self.sample(prompt_ids, max_new_tokens, temperature, seeds)
            except ServerGone as gone:
                if returns == RETURNS:
                    raise RunStopped(f"{gone}, {returns + 1} times in one rollout; look at the server's log") from None
                log.warning("%s; waiting up to %g seconds until it is back", gone, self.wait_seconds)
                together(partial(self.server.wait, gone, self.wait_seconds))
                log.warning("%s: the server is back; it is sent the weights again", self.url)
                self.check = None
        raise AssertionError("unreachable")

    def send_weights(self, prompt: list[int], max_new_tokens: int, temperature: float) -> None:
        """Send the policy's current weights from the main process, and compare log-probabilities on `prompt`.

        All processes gather the weights and compute the log-probabilities, which they only can together where the
        policy is sharded."""
        if self.transport is None:
            raise ValueError("VLLMEngine: no policy to follow; pass it as PPOTrainer(engine=...), or call follow()")
        transport, policy = self.transport, self.policy

        def send() -> Asked:
            with self._gone_or(transport.start):
                if self.colocated:
                    self.server.post("/wake_up")
                check = self.check = self.check or self._new_check(prompt, max_new_tokens)
                with torch.autocast(policy.device.type, enabled=False):
                    model = transport.send(policy)
            with self._gone_or():
                return check.ask(model, max_new_tokens, temperature)

        def judge() -> None:
            if self.check is not None:
                self.check.judge(asked, own)

        with torch.autocast(policy.device.type, enabled=False):  # it would round a LoRA product
            transport.write(policy, PartialState().is_main_process)
        asked = on_main(send)
        own = answer(policy, asked, temperature)
        on_main(judge)
        self.model = asked.model

    def sample(
        self, prompt_ids: Sequence[list[int]], max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Responses:
        """Sample one response per prompt with the weights that the server was sent last."""

        def respond(prompt: list[int], seed: int) -> tuple[list[int], list[float]]:
            return self.server.sample(self.model, prompt, max_new_tokens, temperature, seed, self.stop_ids)

        rows: list[tuple[list[int], list[float]]] = []

        def respond_to_all() -> None:
            pool = ThreadPoolExecutor(REQUESTS_AT_ONCE)
            try:
                with self._gone_or(model=self.model):
                    rows.extend(pool.map(respond, prompt_ids, seeds))
            finally:
                pool.shutdown(cancel_futures=True)  # after a failure, don't send the remaining requests

        together(respond_to_all)
        if self.colocated:  # all processes are done
            on_main(partial(self.server.post, "/sleep?level=1"))  # its weights go to the CPU's memory, its cache away
        ids, logprobs = [row[0] for row in rows], [row[1] for row in rows]
        return Responses(ids, [row[-1] in self.stop_ids for row in ids], logprobs)

    def _new_check(self, prompt: list[int], tokens: int) -> Check:
        adapter = isinstance(self.transport, LoraTransport)
        unknown = HEAD if isinstance(self.transport, FolderTransport) and is_tied(self.policy) else OTHER
        return Check(self.server, self.base, prompt, tokens, self.tolerance_nats, adapter, unknown)

    @contextmanager
    def _gone_or(self, start: str = "", model: str = "") -> Iterator[None]:
        """Turn errors inside into ServerGone if the server is down, or up again without `model`, the adapter it was
        sent; else add how to start it."""
        try:
            yield
        except ServerGone:
            raise
        except (InputError, RunStopped) as error:
            if not self.server.healthy() or (model and not self.server.serves(model)):
                raise ServerGone(str(error)) from None
            if not start:
                raise
            raise type(error)(f"{error}; the server must be started with: {start}") from None


def on_main(action: Callable[[], Result]) -> Result:
    """Call `action` on the main process; return its result, or raise its error, on every process."""
    results: list[Any] = together(lambda: action() if PartialState().is_main_process else None)
    found: Result = results[0]
    return found


def together(action: Callable[[], Result]) -> list[Result]:
    """Call `action` on every process and return all results, by process; an error of one is raised on all."""
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except (InputError, RunStopped) as error:
        failure = error
    found = gather_object([(result, failure)]) if PartialState().num_processes > 1 else [(result, failure)]
    for _, raised in found:
        if raised is not None:
            raise raised
    return [result for result, _ in found]
