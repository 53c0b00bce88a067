"""Weights over NCCL to a vLLM server: trl's client, with limits to the time and size of its answers.

NOT YET RUN ON A GPU: in its tests, trl's client talks to a server that takes tensors over HTTP.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import requests
import torch
import urllib3
from requests.adapters import HTTPAdapter
from torch.distributed.tensor import DTensor
from trl.generation.vllm_client import VLLMClient

from rlhf.errors import InputError, RunStopped, short
from rlhf.sampling.vllm_weights import policy_weights

CONNECTIONS = 64
LARGEST_ANSWER = 256 * 2**20  # bytes


def connect(url: str, group_port: int, timeout_seconds: float, device: torch.device) -> VLLMClient:
    """Connect trl's client to a server that is up, and join the server's NCCL group. Raises InputError."""
    try:
        client = BoundedClient(url, group_port, timeout_seconds)
        client.init_communicator(device)
    except ImportError:
        raise InputError(
            "vllm is not installed here, and trl's client needs it to send weights; pip install 'trl[vllm]', or take "
            "transport lora or folder"
        ) from None
    except Exception as error:
        raise InputError(f"{url}: {one_line(error)}") from error
    return client


def update(client: VLLMClient, policy: Any) -> None:
    """Send the policy's merged weights and empty the server's prefix cache, which holds older states."""
    weights = list(policy_weights(policy))
    if any(isinstance(base, DTensor) for _, base, _ in weights):
        raise InputError("vLLM: the policy's weights are sharded; sample inside ActorCritic.sampling()")
    metadata = [(name, str(base.dtype).removeprefix("torch."), list(base.shape)) for name, base, _ in weights]
    try:
        client.update_named_params(metadata, ((name, compute()) for name, _, compute in weights))
        client.reset_prefix_cache()
    except Exception as error:
        raise RunStopped(f"{client.base_url}: sending the weights failed: {one_line(error)}") from error


class BoundedClient(VLLMClient):
    """trl's client, which would wait without a limit, read answers of any size and follow redirects to other hosts."""

    def __init__(self, url: str, group_port: int, timeout_seconds: float):
        self.timeout_seconds = timeout_seconds
        super().__init__(base_url=url, group_port=group_port)

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """Bound the session's requests, before its first one. The server was asked before whether it is up."""
        self.session.max_redirects = 0
        # trl repeats a request up to 5 times after a read error; once is enough for a stale connection
        adapter: Any = self.session.get_adapter(self.base_url)
        retries = adapter.max_retries.new(read=1)
        bounded = BoundedAdapter(self.timeout_seconds, max_retries=retries, pool_maxsize=CONNECTIONS)
        self.session.mount(self.base_url, bounded)


class BoundedAdapter(HTTPAdapter):
    """An HTTP adapter whose answers have limits of time and size."""

    def __init__(self, timeout_seconds: float, **kwargs: Any):
        self.timeout_seconds = timeout_seconds
        super().__init__(**kwargs)

    def send(self, request: Any, **kwargs: Any) -> requests.Response:  # type: ignore[override]
        timeout = kwargs.get("timeout") or self.timeout_seconds
        answer = super().send(request, **(kwargs | {"timeout": timeout}))
        answer.raw = BoundedBody(answer.raw, time.monotonic() + timeout)
        return answer


class BoundedBody:
    """An answer's body, to be read until a time and up to a size."""

    def __init__(self, raw: Any, until: float):
        self.raw, self.until = raw, until

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[bytes]:
        """Yield the body in pieces, as urllib3's responses do."""
        size, end = 0, threading.Timer(max(0.0, self.until - time.monotonic()), self._end)
        end.daemon = True
        end.start()
        try:
            for piece in self.raw.stream(*args, **kwargs):
                size += len(piece)
                if size > LARGEST_ANSWER:
                    raise ValueError(f"its answer has more than {LARGEST_ANSWER} bytes")
                yield piece
        except urllib3.exceptions.HTTPError:
            if time.monotonic() < self.until:
                raise
        finally:
            end.cancel()
        if time.monotonic() >= self.until:
            raise requests.Timeout("its answer did not end in time")

    def _end(self) -> None:
        with contextlib.suppress(Exception):  # read to its end meanwhile
            self.raw.shutdown()  # wakes whoever waits for the next byte, which a server may send one by one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, shortened to 240 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = f"it sent no {text}" if isinstance(error, KeyError) else text
    return short(text, 240)
