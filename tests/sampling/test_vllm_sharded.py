"""The vLLM engine for a policy that FSDP2 cuts over two processes, by each transport that needs no GPU.

The server (`reference/fake_vllm.py`) loads what it is sent with peft and safetensors, and must end with the weights of
the folder that the trainer saved. The processes look at what they hold meanwhile (`reference/vllm_sharded.py`).
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from reference import forked, vllm_sharded
from reference.fake_vllm import FakeVLLM
from reference.tiny_chain import TARGETS, save_base, shake
from transformers import AutoModelForCausalLM

from rlhf.models.adapters import lora_config
from rlhf.models.loading import load_policy

CONFIG = Path(__file__).resolve().parents[2] / "recipes" / "configs" / "accelerate" / "fsdp2.yaml"
CASES = {
    "full": "folder",
    "tied": "folder",
    "adapter": "lora",
    "adapter merged": "folder",
    "trained tokens": "folder",
}
"""Its transport, by what is trained."""
DIES = "adapter merged"
"""The case whose server dies in the middle of a rollout, and comes back as it was started."""


def build(folder: Path, case: str, model, tokenizer) -> tuple[Path, Path]:
    """Build (base, policy)."""
    folder.mkdir(parents=True)
    if case in ("tied", "trained tokens"):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    base = save_base(folder, model, tokenizer)
    if case in ("full", "tied"):
        return base, base
    tokens = [1, 2] if case == "trained tokens" else None
    adapter = get_peft_model(load_policy(base), lora_config(4, 8.0, target_modules=TARGETS, trainable_tokens=tokens))
    shake(adapter, 1, only="lora_")
    adapter.save_pretrained(str(folder / "sft"))
    tokenizer.save_pretrained(folder / "sft")
    return base, folder / "sft"


class Launched(NamedTuple):
    """The one launch of both processes, and what each case's server was sent."""

    done: CompletedProcess[str]
    folder: Path
    servers: dict[str, FakeVLLM]
    deaths: list[int]
    """How many requests the dying server had answered."""


LAUNCHED: list[Launched] = []  # of this module


@pytest.fixture(scope="module", autouse=True)
def servers_end() -> Iterator[None]:
    yield
    for launch in LAUNCHED:
        for server in launch.servers.values():
            server.stop()


@pytest.fixture
def launched(tmp_path_factory, tiny_model, tiny_tokenizer) -> Launched:
    if not LAUNCHED:
        shake(tiny_model, 0, 0.05)
        folder, servers, arguments = tmp_path_factory.mktemp("vllm_sharded"), {}, []
        for case, transport in CASES.items():
            base, policy = build(folder / "models" / case, case, copy.deepcopy(tiny_model), tiny_tokenizer)
            servers[case] = FakeVLLM(base)
            arguments += [case, transport, servers[case].url, policy]
        dying, deaths = servers[DIES], []
        dying.dies_after = 14
        back = lambda: (dying.dead.wait(), deaths.append(len(dying.log)), time.sleep(0.1), dying.start())  # noqa: E731
        threading.Thread(target=back, daemon=True).start()
        command = [vllm_sharded.__file__, CONFIG, folder, *arguments]
        LAUNCHED.append(Launched(forked.shared().together(command, limit=120), folder, servers, deaths))
    assert LAUNCHED[0].done.returncode == 0, LAUNCHED[0].done.stderr[-3000:]
    return LAUNCHED[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_server_has_the_weights_that_are_saved(launched, case):
    server, saved, base = launched.servers[case], launched.folder / case, launched.folder / "models" / case / "base"
    assert len(launched.deaths) == 1
    if case in ("full", "tied"):
        expected = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    else:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        expected = PeftModel.from_pretrained(plain, saved).merge_and_unload()
    paths = {"lora": "/v1/load_lora_adapter", "folder": "/collective_rpc"}
    assert {name for name, path in paths.items() if path in server.paths()} == {CASES[case]}
    own = dict(list(server.models.values())[-1].named_parameters(remove_duplicate=False))
    for name, tensor in expected.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(own[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
