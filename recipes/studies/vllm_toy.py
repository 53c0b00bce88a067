"""Study 17: PPO reaches the same gold score with vLLM as the sampler, and one step off, as with the built-in engine.

    make vllm-env
    python recipes/studies/vllm_toy.py

vLLM runs in an environment of its own (`python`), on half of this machine's cores, and the trainer beside it on the
others: as on two devices, what one step off saves is then the time that each would wait for the other.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf import config as configs
from rlhf.client import Client
from rlhf.errors import InputError, RunStopped
from rlhf.intervals import bootstrap_interval
from rlhf.metrics import read_metrics
from rlhf_recipes.ppo import PPORecipe, ppo
from rlhf_recipes.studies.proxy_runs import samples
from rlhf_recipes.studies.shared_runs import WATCHED, chain, stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

GOLD, PACE = "gold", "pace"
BUILT_IN, VLLM, AHEAD = "built-in", "vLLM", "vLLM, one step off"
FULL, LORA = "full weights", "LoRA"
NEAR = 0.3
LAST = 3
"""Updates at the end of a run over which gold is measured."""
SERVER = {
    "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VLLMConfig(StudyConfig):
    """Settings of the study."""

    python: str = ".venv-vllm/bin/python"
    """Python of the environment in which vLLM is installed (`make vllm-env`)."""
    updates: int = 12
    """PPO's updates."""
    rollout_size: int = 256
    """Responses per update."""
    minibatch_size: int = 64
    """Responses per optimizer step."""
    lora_rank: int = 16
    """Rank of the runs with LoRA."""
    lora_learning_rate: float = 1.0e-3
    """Learning rate of the runs with LoRA."""
    starting_seconds: float = 300.0
    """Time for the server to come up."""

    def check(self) -> None:
        if not Path(self.python).is_file():
            raise InputError(f"python={self.python}: not there; install vLLM with `make vllm-env`, or name its Python")


@contextmanager
def half_of_the_cores() -> Iterator[set[int]]:
    """Keep this process to the first half of its cores inside the context; yields the others."""
    cores, threads = sorted(os.sched_getaffinity(0)), torch.get_num_threads()
    half = max(1, len(cores) // 2)
    keep_to(cores[:half], half)
    try:
        yield set(cores[-half:])
    finally:
        keep_to(cores, threads)


def keep_to(cores: Sequence[int], threads: int) -> None:
    """Keep every thread of this process to these cores, and let torch compute with so many."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)
    torch.set_num_threads(threads)


@contextmanager
def serving(config: VLLMConfig, model: Path, cores: set[int], *flags: str) -> Iterator[str]:
    """Serve a model by vLLM in float32 on these cores and a free port; its address."""
    python = Path(config.python).absolute()  # not resolved: a link leads out of the environment
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1", "--port",
        port, "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "64", "--enforce-eager",
        "--logprobs-mode", "processed_logprobs", *flags,
    ]  # fmt: skip
    log = config.shared / "vllm.log"
    with log.open("ab") as out:
        env = os.environ | SERVER | {"OMP_NUM_THREADS": str(len(cores))}
        command = ["taskset", "--cpu-list", ",".join(map(str, sorted(cores))), *command]
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        yield up(f"http://127.0.0.1:{port}", server, log, config.starting_seconds)
    finally:
        with suppress(ProcessLookupError):  # one that died has said why in its log
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def up(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float) -> str:
    """Wait until a server answers; its address. Raises RunStopped where it ends before, or does not come up in time."""
    until = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < until:
        try:
            Client(url, retries=0, timeout=5).models()
            return url
        except (InputError, RunStopped, OSError):
            time.sleep(1)
    raise RunStopped(f"vLLM did not come up in {seconds:.0f} s; {log} says why")


def trained(config: VLLMConfig, out: str, **settings: Any) -> Path:
    """Train a policy beside the seed's chain while gold watches; its folder."""
    common: dict[str, Any] = {
        "updates": config.updates, "rollout_size": config.rollout_size, "minibatch_size": config.minibatch_size,
        "lr_schedule": "constant", "save_steps": 0, "samples_logged": 10**6, **WATCHED,
    }  # fmt: skip
    return stage(config, ppo, PPORecipe, "ppo", out, **common, **settings)


def runs(config: VLLMConfig) -> Iterator[tuple[str, Path]]:
    """Train every policy: what it is, and its folder."""
    sft = chain(config, "reward_model") / "sft"
    lora = {"lora_rank": config.lora_rank, "learning_rate": config.lora_learning_rate}
    rank = max(8, 1 << (config.lora_rank - 1).bit_length())  # vLLM takes powers of 2, from 8
    kinds: tuple[tuple[str, dict[str, Any], list[str]], ...] = (
        (FULL, {}, []),
        (LORA, lora, ["--enable-lora", "--max-lora-rank", str(rank)]),
    )
    for kind, settings, flags in kinds:
        name = kind.split()[0].lower()
        yield f"{BUILT_IN}, {kind}", trained(config, f"ppo_built_in_{name}", **settings)
        with half_of_the_cores() as cores, serving(config, sft, cores, *flags) as url:
            yield f"{VLLM}, {kind}", trained(config, f"ppo_vllm_{name}", vllm_server=url, **settings)
            ahead = {"vllm_server": url, "rollouts_ahead": 1, **settings}
            yield f"{AHEAD}, {kind}", trained(config, f"ppo_vllm_ahead_{name}", **ahead)


def run(config: VLLMConfig) -> Iterator[Row]:
    for name, folder in runs(config):
        gold = [row["score/gold"] for rows in samples(folder)[-LAST:] for row in rows]
        found = bootstrap_interval(np.asarray(gold, dtype=np.float64), config.seed)
        yield Row(name, found.value, None, found.low, found.high, len(gold), GOLD)
        seconds = [row["step_seconds"] for row in read_metrics(folder / "metrics.jsonl")]
        yield Row(name, 60 / float(np.median(seconds)), panel=PACE)


def near(one: str, kind: str, rows: Sequence[Row]) -> float:
    """Return by how much the distance in gold to the built-in engine's run stays below NEAR."""
    return NEAR - abs(at(rows, f"{one}, {kind}", panel=GOLD) - at(rows, f"{BUILT_IN}, {kind}", panel=GOLD))


def faster(kind: str, rows: Sequence[Row]) -> float:
    return at(rows, f"{AHEAD}, {kind}", panel=PACE) / at(rows, f"{VLLM}, {kind}", panel=PACE) - 1


STUDY = Study(
    name="vllm_toy",
    number=17,
    title="vLLM as the sampler, and one step off",
    claim="Responses sampled by another engine, or by the policy of one update before, train as well when their "
    "probabilities are corrected.",
    source="Noukhovitch et al. 2410.18252 (asynchronous RLHF)",
    miniature="PPO on the toy world by the built-in engine, by vLLM for CPUs (adapters, folders), and by vLLM while "
    "the update before trains, each of the two on half the cores; gold of the last three of twelve updates.",
    panels=[Panel(GOLD, y="gold score"), Panel(PACE, y="updates per minute (median)")],
    checks=[
        *(
            Check(f"{one}, {kind}: gold within {NEAR} of the built-in engine's", partial(near, one, kind))
            for kind in (FULL, LORA)
            for one in (VLLM, AHEAD)
        ),
        *(Check(f"{kind}: more updates per minute one step off", partial(faster, kind)) for kind in (FULL, LORA)),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, VLLMConfig, __file__, argv))
