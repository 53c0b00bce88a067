"""Devices and precisions on a GPU, without one: forwards on fake CUDA tensors (reference/fake_cuda.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reference.tiny_chain import chain

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "RLHF_CUDA_PYTHON"  # an interpreter with a CUDA build of torch; tests/README.md says how to get one
PROBE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    products = torch.nn.functional.linear(torch.empty(2, 4, device="cuda"), torch.empty(4, 4, device="cuda"))
    print((products + torch.ones(1).to("cuda")).device)
"""


def interpreter() -> str:
    """Return an interpreter whose torch makes fake CUDA tensors: the named one, else this one. Skips without."""
    python = os.environ.get(VARIABLE, sys.executable)
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=120, check=False)
    if done.stdout.strip() != "cuda:0":
        why = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        pytest.skip(f"{python} makes no fake CUDA tensors ({why[:120]}); name another in {VARIABLE}")
    return python


@pytest.mark.long
def test_every_forward_stays_on_its_device_and_in_its_precision(tmp_path, tiny_model, tiny_tokenizer):
    python = interpreter()
    chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    script = ROOT / "tests/reference/fake_cuda.py"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}, "timeout": 600}
    done = subprocess.run([python, script, tmp_path], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    found = results.pop("planted")
    assert "device" in found.lower(), found
    assert len(results) == 54
    assert {title: result for title, result in results.items() if result != "fine"} == {}
