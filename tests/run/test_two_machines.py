"""Processes on two machines: their folder must be one. Two network namespaces stand for the machines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reference import forked
from reference.tiny_chain import chain
from reference.two_processes import DEMONSTRATIONS
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
NOT_SHARED = "does not see what the first process writes in"

IN_OWN_FOLDERS = """
import os, sys
from rlhf.errors import run
from rlhf.run import lock
os.chdir(sys.argv[1 + int(os.environ["RANK"])])
def main(argv):
    with lock.training_in("run"):
        print("trains")
run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_every_process_must_see_the_folder_of_the_first(tmp_path, shared):
    folders = [tmp_path / "one", tmp_path / ("one" if shared else "other")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    done = forked.shared().together(["-c", IN_OWN_FOLDERS, *folders])
    assert (done.returncode, done.stdout.count("trains")) == ((0, 2) if shared else (2, 0)), done.stderr
    assert not (folders[0] / "run" / ".lock").exists()
    if not shared:
        line = f"error: output_dir {folders[1] / 'run'}: process 1 on "
        assert done.stderr.startswith(line)
        assert f"{NOT_SHARED} {folders[0] / 'run'}; put it on a disk that all machines see\n" in done.stderr


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """The beginnings of two commands that each run in a network namespace of its own, joined by a cable."""
    names = [f"rlhf{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    if shutil.which("ip") is None or not all(ip("netns", "add", name) for name in names):
        for name in names:
            shutil.which("ip") and ip("netns", "delete", name)
        pytest.skip("needs the command ip, and the right to make network namespaces")
    try:
        made = ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            made &= ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            made &= ip("-n", name, "link", "set", "lo", "up") and ip("-n", name, "link", "set", "cable", "up")
        if not made:
            pytest.skip("no pair of virtual network devices can be made")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.long
@pytest.mark.parametrize("shared", [True, False])
def test_two_machines_train_as_one(tmp_path, machines, tiny_model, tiny_tokenizer, shared):
    base = chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)[0]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    recipe = ["--model", str(base), "--train_data", str(rows), "--epochs", "2", "--batch_size", "8", "--bf16", "false"]
    recipe += ["--max_length", "256", "--learning_rate", "1e-3", "--save_steps", "1", "--output_dir"]
    environment = os.environ | forked.ENVIRONMENT | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "cable"}
    processes = []
    for rank, machine in enumerate(machines):
        here = tmp_path / ("disk" if shared else f"disk{rank}")
        here.mkdir(exist_ok=True)
        flags = ["--num_machines", "2", "--machine_rank", str(rank), "--num_processes", "2"]
        flags += ["--main_process_ip", "10.77.0.1", "--main_process_port", "29577"]
        command = [*machine, sys.executable, "-m", "rlhf.cli", "sft", *flags, *recipe, "run/sft"]
        processes.append(
            subprocess.Popen(
                command, cwd=here, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    ended = [(*process.communicate(timeout=forked.LIMIT), process.returncode) for process in processes]
    if not shared:
        for _, err, code in ended:
            assert (code, err.count("process 1 on ")) == (2, 1), err
            assert NOT_SHARED in err
            assert "Traceback" not in err
        return
    assert [code for *_, code in ended] == [0, 0], ended
    done = forked.shared().run([ROOT / "recipes" / "sft.py", *recipe, tmp_path / "alone" / "sft"])
    assert done.returncode == 0, done.stderr
    one, two = (load_file(f / "sft" / "model.safetensors") for f in (tmp_path / "alone", tmp_path / "disk" / "run"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(two[name], tensor, rtol=0, atol=1e-5, err_msg=name)
