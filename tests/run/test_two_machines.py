"""Processes on two machines: their folder must be one. Two network namespaces stand for the machines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reference import forked
from reference.launched import STAGES, World
from reference.tiny_chain import chain
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


def on_both(machines: list[list[str]], commands: list[list[str]], folders: list[Path]) -> list[tuple[str, str, int]]:
    """Run a command on each machine in a folder of its own; return what each printed on stdout and stderr, and its
    exit code."""
    environment = os.environ | forked.ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "cable"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    processes = [
        subprocess.Popen(
            [*machine, sys.executable, *command], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for machine, command, folder in zip(machines, commands, folders, strict=True)
    ]  # fmt: skip
    return [(*process.communicate(timeout=forked.LIMIT), process.returncode) for process in processes]


def require_close(one: Path, two: Path) -> None:
    mine, expected = (load_file(folder / "model.safetensors") for folder in (two, one))
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(mine[name], tensor, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("shared", [True, False], ids=["one disk", "two disks"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_machines_train_as_one(tmp_path, machines, tiny_model, tiny_tokenizer, stage, shared):
    """The command of each trainer, by DDP."""
    world = World(tmp_path, tiny_model, tiny_tokenizer)
    folders, commands = [], []
    for rank in (0, 1):
        folders.append(tmp_path / ("disk" if shared else f"disk{rank}"))
        folders[-1].mkdir(exist_ok=True)
        flags = ["--num_machines", "2", "--machine_rank", str(rank), "--num_processes", "2"]
        flags += ["--main_process_ip", "10.77.0.1", "--main_process_port", "29577"]
        commands.append(["-m", "rlhf.cli", stage, *flags, *world.command(stage, Path("run", stage))[1:]])
    ended = on_both(machines, commands, folders)
    if not shared:
        for _, err, code in ended:
            assert (code, err.count("process 1 on ")) == (2, 1), err
            assert NOT_SHARED in err
            assert "Traceback" not in err
        return
    assert [(err, code) for _, err, code in ended] == [("", 0)] * 2
    require_close(world.alone(stage), folders[0] / "run" / stage)


TRAINS = """
from pathlib import Path
from reference import fsdp_worker, sharded_trainers
from reference.two_processes import GivenResponses
from rlhf.errors import run
from rlhf.run.distributed import is_sharded
def main(argv):
    config, stage, folder, policy, reward = argv
    if config != "alone":
        fsdp_worker.shard(config)
    if stage == "ppo":
        trainer = fsdp_worker.make(Path(folder), policy, reward, GivenResponses())
    else:
        trainer = sharded_trainers.make(stage, policy, Path(folder), sharded_trainers.Watch())
    trainer.train()
    module = trainer.actor_critic if stage == "ppo" else trainer.model
    assert any(map(is_sharded, module.modules())) == (config != "alone")
    trainer.save_model(folder)
run(main)
"""


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_two_machines_share_a_models_parts(tmp_path, machines, tiny_model, tiny_tokenizer, stage):
    """Under FSDP2, each trainer started by torchrun."""
    models = chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)
    worker = tmp_path / "trains.py"
    worker.write_text(TRAINS)
    config = str(ROOT / "recipes" / "configs" / "accelerate" / "fsdp2.yaml")
    flags = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "10.77.0.1", "--master_port", "29577"]
    words = [str(worker), config, stage, "two", *map(str, models)]
    commands = [["-m", "torch.distributed.run", *flags, "--node_rank", rank, *words] for rank in "01"]
    ended = on_both(machines, commands, [tmp_path, tmp_path])
    assert [code for *_, code in ended] == [0, 0], ended
    done = forked.shared().run([worker, "alone", stage, "one", *models], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    require_close(tmp_path / "one", tmp_path / "two")
