"""How the policy's weights reach a vLLM server: an adapter's folder, a folder of all weights, or NCCL.

A transport writes the weights with `write`, on all processes, and sends them with `send`, on the first: it returns the
name of the model to sample from then on.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from rlhf.errors import InputError, RunStopped
from rlhf.sampling.vllm_connection import Server
from rlhf.sampling.vllm_weights import adapter_refusal, policy_weights, save_adapter, save_weights

Kind = Literal["lora", "folder", "nccl"]
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank


class Transport(Protocol):
    """A way to send weights."""

    @property
    def start(self) -> str:
        """Return the command that starts a fitting server."""

    def check(self, policy: Any) -> None:
        """Raise InputError if the policy's weights cannot be sent so."""

    def write(self, policy: Any, main: bool) -> None:
        """Write the policy's current weights to where the server will read them; a collective where FSDP2 shards them,
        of which the main process writes."""

    def send(self, policy: Any) -> str:
        """Have the server take the weights; return the name of the model that has them."""


class LoraTransport:
    """The adapter alone, through a folder that the server sees: each version under a new name, over the server's base.

    A version's name is new in every run too, so neither an adapter of the same name nor its prefix cache can be
    taken for it."""

    def __init__(self, server: Server, base: str, folder: Path):
        self.server, self.folder, self.rank = server, folder, 0
        self.run, self.version = secrets.token_hex(4), 0

    @property
    def start(self) -> str:
        """Return the command that starts a fitting server."""
        return (
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora "
            f"--max-lora-rank {self.rank} --logprobs-mode processed_logprobs"
        )

    def check(self, policy: Any) -> None:
        """Raise InputError if a server cannot load the policy's adapter."""
        refusal = adapter_refusal(policy)
        if refusal:
            raise InputError(
                f"{self.server.url}: transport lora sends an adapter, but {refusal}; take transport folder"
            )
        config = policy.peft_config["default"]
        rank = max([config.r, *(config.rank_pattern or {}).values()])
        self.rank = next((size for size in LORA_RANKS if size >= rank), rank)

    def write(self, policy: Any, main: bool) -> None:
        """Write the adapter."""
        folder = fresh(self.folder / f"{self.run}-{self.version + 1}") if main else None
        save_adapter(policy, folder)
        readable(folder)

    def send(self, policy: Any) -> str:
        """Have the server load the adapter in place of the version before."""
        before, name = f"{self.run}-{self.version}", f"{self.run}-{self.version + 1}"
        if self.version:  # first, for a server that holds one adapter; one that was restarted has none (404)
            self.server.post("/v1/unload_lora_adapter", {"lora_name": before}, known=(200, 404))
            shutil.rmtree(self.folder / before, ignore_errors=True)
        self.version += 1
        self.server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self.folder / name)})
        return name


class FolderTransport:
    """All weights, merged, through a folder that the server sees and reloads its weights from."""

    start = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"

    def __init__(self, server: Server, base: str, folder: Path):
        self.server, self.base, self.folder = server, base, folder

    def check(self, policy: Any) -> None:
        """Raise InputError if the policy's weights cannot be merged."""
        for _ in policy_weights(policy):
            pass

    def write(self, policy: Any, main: bool) -> None:
        """Write the weights."""
        folder = fresh(self.folder / "weights") if main else None
        save_weights(policy, folder)
        readable(folder)

    def send(self, policy: Any) -> str:
        """Have the server read the weights while it samples nothing; its prefix cache is emptied."""
        folder = self.folder / "weights"
        self.server.post("/pause?mode=wait")
        try:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self.server.post("/collective_rpc", reload)
            self.server.post("/reset_prefix_cache")
        finally:
            self.server.post("/resume")
        shutil.rmtree(folder)
        return self.base


class NCCLTransport:
    """All weights, merged, from the trainer's GPU to the server's, by trl's client. Not yet run on a GPU."""

    start = (
        'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
        "--logprobs-mode processed_logprobs"
    )

    def __init__(self, server: Server, base: str, group_port: int):
        self.server, self.base, self.group_port = server, base, group_port
        self.client: Any = None

    def check(self, policy: Any) -> None:
        """Raise InputError if the policy's weights cannot be merged, or are not on a GPU."""
        for _ in policy_weights(policy):
            pass
        self.device(policy)

    def device(self, policy: Any) -> torch.device:
        """Return the GPU that sends the weights. Raises InputError if the policy is not on one."""
        found: torch.device = policy.device
        if found.type != "cuda":
            raise InputError(
                f"{self.server.url}: transport nccl sends weights from a GPU only, and the policy is on {found}; take "
                "transport lora or folder"
            )
        return found

    def write(self, policy: Any, main: bool) -> None:
        """Do nothing: no process writes them."""

    def send(self, policy: Any) -> str:
        """Send the weights and empty the server's prefix cache."""
        from rlhf.sampling.vllm_nccl import connect, update

        try:
            if self.client is None:
                self.client = connect(self.server.url, self.group_port, self.server.caller.timeout, self.device(policy))
            update(self.client, policy)
        except (InputError, RunStopped):
            self.client = None  # a server that was restarted knows nothing of the connection
            raise
        return self.base


def make(kind: Kind | None, server: Server, base: str, policy: Any, folder: Path, group_port: int) -> Transport:
    """Make the transport for a policy: of the kind named, or lora if the server can load its adapter, else folder."""
    if kind == "nccl":
        transport: Transport = NCCLTransport(server, base, group_port)
    elif kind == "lora" or (kind is None and adapter_refusal(policy) is None):
        transport = LoraTransport(server, base, folder)
    else:
        transport = FolderTransport(server, base, folder)
    transport.check(policy)
    return transport


def fresh(folder: Path) -> Path:
    """Make an empty folder in place of whatever is there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder.resolve()


def readable(folder: Path | None) -> None:
    """Let everyone read a folder's files: the server may run as another user, and safetensors writes for its own."""
    for file in folder.iterdir() if folder else ():
        file.chmod(0o644)
