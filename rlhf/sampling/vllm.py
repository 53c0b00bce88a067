"""A vLLM server as the engine that samples. NOT YET RUN ON A GPU: see the class.

trl's public client (`trl.generation.vllm_client.VLLMClient`) does the transport and the weight transfer; this module
builds the requests and the weights, and checks the answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft.tuners.lora import Embedding, Linear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf.errors import InputError, RunStopped
from rlhf.models.adapters import base_model
from rlhf.sampling.engine import Responses, row_seeds
from rlhf.sampling.vllm_connection import REQUESTS_AT_ONCE, START, connect, one_line


class VLLMEngine:
    """An engine that samples with a vLLM server (`vllm serve`, on GPUs of its own) and sends it the policy's weights.

    Not yet run on a GPU: in its tests, trl's client talks to a second process that serves tokens over HTTP; vLLM itself
    and NCCL were never part of them.

    ::

        trainer = PPOTrainer("runs/my/sft", reward_model, args, prompts, engine=VLLMEngine("http://localhost:8000"))

    Before every `generate` it sends the whole policy, a LoRA policy as merged copies of its weights (`policy_weights`);
    the trainer's own tensors never change. Tokens come from the full softmax at the trainer's temperature (no top-k,
    top-p, min-p or penalties) and end at the trainer's stop ids only, not at the hub model's. Every prompt is a request
    of its own, with its own seed drawn from `generator`: vLLM would give all prompts of one request the same seed, and
    so the same random numbers. (Seeds make a run repeatable only as far as vLLM's arithmetic is repeatable, which
    depends on the other rows of its batch.)

    The responses carry the server's log-probabilities, with which PPO corrects for the difference between the server's
    arithmetic and the trainer's (`ppo_math.importance_weights`).

    With several processes each one sends its own prompts, and only the main one sends the weights while the others
    wait.

    url: the server's address. group_port: a free port of the trainer's machine for the connection that carries the
    weights. timeout_seconds: the time limit of one request. Raises InputError if the server cannot be reached or is
    not set up for this, RunStopped if it fails later.
    """

    def __init__(self, url: str, group_port: int = 51216, timeout_seconds: float = 600.0):
        self.url = url.rstrip("/")
        self.client = connect(self.url, group_port, timeout_seconds)
        self.policy: Any = None
        self.stop_ids: tuple[int, ...] = ()
        self._weights_connected = False

    def follow(self, policy: Any, stop_ids: Sequence[int]) -> None:
        """Set the policy whose weights to sample with, and the ids that end a response; the trainer calls it."""
        for _ in policy_weights(policy):  # refuse adapters that can't be sent before anything is computed
            pass
        self.policy, self.stop_ids = policy, tuple(stop_ids)

    @torch.no_grad()
    def generate(
        self, prompt_ids: Sequence[list[int]], max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Responses:
        """Send the policy's weights, then sample one response per prompt."""
        self._send_weights_once()
        seeds = row_seeds(generator, len(prompt_ids))

        def respond(prompt: list[int], seed: int) -> tuple[list[int], list[float]]:
            answer = self.client.generate(
                [prompt],
                n=1,
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                max_tokens=max_new_tokens,
                logprobs=0,  # of the sampled token alone
                generation_kwargs={"seed": seed, "stop_token_ids": list(self.stop_ids), "ignore_eos": True},
            )
            return read_answer(answer, prompt, max_new_tokens, self.stop_ids)

        pool = ThreadPoolExecutor(REQUESTS_AT_ONCE)
        try:
            with stopping(f"{self.url}: sampling"):
                rows = list(pool.map(respond, prompt_ids, seeds))
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, don't send the remaining requests
        ids, logprobs = [row[0] for row in rows], [row[1] for row in rows]
        return Responses(ids, [row[-1] in self.stop_ids for row in ids], logprobs)

    # -- the weights -------------------------------------------------------------------------------------------

    def _send_weights_once(self) -> None:
        """Send the weights from the main process; all processes wait for it, and all raise its error if it fails."""
        if self.policy is None:
            raise ValueError("VLLMEngine: no policy to follow; pass it as PPOTrainer(engine=...), or call follow()")
        state = PartialState()
        state.wait_for_everyone()  # no process is still sampling with the weights that are about to change
        failure: list[Any] = [None]
        if state.is_main_process:
            try:
                self.send_weights()
            except (InputError, RunStopped) as error:
                failure = [error]
        if state.num_processes > 1:
            broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]

    def send_weights(self) -> None:
        """Send the policy's current weights to the server and empty its prefix cache, which holds older states."""
        if not self._weights_connected:
            self.connect_weights()
            self._weights_connected = True
        weights = list(policy_weights(self.policy))
        if any(isinstance(base, DTensor) for _, base, _ in weights):
            raise InputError(f"{self.url}: the policy's weights are sharded; sample inside ActorCritic.sampling()")
        metadata = [(name, str(base.dtype).removeprefix("torch."), list(base.shape)) for name, base, _ in weights]
        # autocast would round a LoRA product to bfloat16
        with stopping(f"{self.url}: sending the weights"), torch.autocast(self.policy.device.type, enabled=False):
            self.client.update_named_params(metadata, ((name, compute()) for name, _, compute in weights))
            self.client.reset_prefix_cache()

    def connect_weights(self) -> None:
        """Join the server's NCCL group for the transfer of weights. Raises InputError if that is impossible."""
        device = self.transfer_device()
        try:
            self._check_settings(self.client.get_server_info())
            self.client.init_communicator(device)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self.url}: {one_line(error)}; start the server with: {START}") from error

    def transfer_device(self) -> torch.device:
        """Return the GPU that sends the weights. Raises InputError if the policy is not on a GPU."""
        device = self.policy.device
        if device.type != "cuda":
            raise InputError(
                f"{self.url}: weights reach a vLLM server over NCCL, from a GPU only, and the policy is on {device}; "
                "leave the engine out to sample with the built-in loop"
            )
        return device

    def _check_settings(self, info: dict[str, Any]) -> None:
        mode = (info.get("model_config") or {}).get("logprobs_mode")
        if mode not in (None, "processed_logprobs"):
            raise InputError(
                f"{self.url}: logprobs_mode={mode!r} gives log-probabilities that leave out the temperature; start the "
                f"server with: {START}"
            )


# ---------------------------------------------------------------- errors and answers


@contextmanager
def stopping(what: str) -> Iterator[None]:
    """Turn any error inside the context into RunStopped with a message of one line."""
    try:
        yield
    except Exception as error:
        raise RunStopped(
            f"{what} failed: {one_line(error)}; look at the server's log, restart it and run the same command again"
        ) from error


def read_answer(
    answer: dict[str, Any], prompt: list[int], max_new_tokens: int, stop_ids: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Read one response's token ids and their log-probabilities. Raises ValueError if they cannot be right."""
    if answer["prompt_ids"] != [prompt]:
        raise ValueError(f"it answered to other tokens than the {len(prompt)} of the prompt that it was sent")
    (ids,) = answer["completion_ids"]
    if not ids or len(ids) > max_new_tokens:
        raise ValueError(f"a response of {len(ids)} tokens, from 1 to {max_new_tokens} were asked for")
    if any(token in stop_ids for token in ids[:-1]):
        raise ValueError("a response goes on after a stop token")
    if len(ids) < max_new_tokens and ids[-1] not in stop_ids:
        raise ValueError(
            f"a response ended after {len(ids)} tokens of {max_new_tokens} without a stop token (is the server's "
            "--max-model-len too small?)"
        )
    if answer["logprobs"] is None:
        raise ValueError("it sent no log-probabilities")
    (values,), (tokens,) = answer["logprobs"], answer["logprob_token_ids"]
    if not len(values) == len(tokens) == len(ids):
        raise ValueError(f"{len(values)} log-probabilities for {len(ids)} tokens")
    logprobs = []
    for position, (token, others, numbers) in enumerate(zip(ids, tokens, values, strict=True)):
        value = numbers[others.index(token)] if token in others else None
        if value is None or not math.isfinite(value) or value > 1e-3:
            raise ValueError(f"the log-probability of response token {position} (id {token}) is {value}")
        logprobs.append(min(value, 0.0))
    return ids, logprobs


# ---------------------------------------------------------------- the policy's weights, merged and named


def policy_weights(policy: Any) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
    """Yield every weight under its name in the plain model: (name, a tensor of its shape and type, its value).

    The value is a function. For a LoRA layer it computes ``W + scaling * B @ A`` of the active adapters as a new
    tensor; with trained token embeddings, the embeddings with those rows replaced. The policy does not change. A tied
    weight comes once. Raises InputError for adapters that cannot be merged so (DoRA, biases in LoRA, copies of whole
    modules, quantized weights).
    """
    plain = base_model(policy)
    layers = {name: layer for name, layer in plain.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, weight in plain.named_parameters():
        owner = name
        while owner and owner not in layers:
            owner = owner.rpartition(".")[0]
        rest = name.removeprefix(f"{owner}.")
        if owner and not rest.startswith("base_layer."):
            continue  # the adapter's own weight
        _check_sendable(name, weight, layers.get(owner))
        if not owner:
            yield name, weight, weight.detach
            continue
        tail = rest.removeprefix("base_layer.")
        layer = layers[owner] if tail == "weight" else None
        full_name = f"{owner.removesuffix('.token_adapter')}.{tail}"
        yield full_name, weight, partial(merged, weight, layer)


@torch.no_grad()
def merged(weight: Tensor, layer: Any) -> Tensor:
    """Merge a layer's weight with its active adapters (those that peft has not merged already), summed in float32."""
    if layer is None:
        return weight.detach()
    adapters = [name for name in layer.active_adapters if name not in layer.merged_adapters]
    if isinstance(layer, TrainableTokensLayer):
        return layer.get_merged_weights(adapters).detach()
    parts = [layer.get_delta_weight(name).float() for name in adapters if name in layer.scaling]
    return sum(parts, start=weight.float()).to(weight.dtype)


def _check_sendable(name: str, weight: Tensor, layer: Any) -> None:
    if not weight.is_floating_point():
        raise InputError(f"VLLMEngine: {name} is quantized ({weight.dtype}), which is not sent; leave the engine out")
    if "modules_to_save" in name or "original_module" in name or name.count(".base_layer.") > 1:
        raise InputError(f"VLLMEngine: {name} is a module with two adaptations or a copy of its own; use plain LoRA")
    if layer is None or isinstance(layer, TrainableTokensLayer):
        return
    special = any(layer.lora_variant.get(adapter) or layer.lora_bias.get(adapter) for adapter in layer.active_adapters)
    if not isinstance(layer, Linear | Embedding) or special:
        kind = "DoRA, or a LoRA with biases" if special else f"peft's {type(layer).__name__}"
        raise InputError(f"VLLMEngine: {name} is adapted by {kind}, which is not sent; use plain LoRA of linear layers")
