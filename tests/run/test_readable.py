"""Files that somebody damaged or planted: refused in one line, never followed, never run; and the modes of files."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.tiny_chain import chain
from safetensors.torch import save_file

from reward_models import RewardModel
from rlhf.errors import InputError
from rlhf.metrics import truncate
from rlhf.ppo.saved import Origin, read_logged
from rlhf.rows.records import write_jsonl
from rlhf.run.checkpoint import (
    COMPLETE,
    atomic_folder,
    check_checkpoint,
    latest_checkpoint,
    mark_complete,
    write_json_atomic,
)
from rlhf.run.readable import require_readable
from rlhf.run.stages import Manifest, begin_stage, stage_state

BROKEN = {
    "empty": b"",
    "cut": b'{"stage": "sft", "inp',
    "list": b"[1, 2]",
    "null": b"null",
    "no_utf8": b"\xff\xfe\x00\x01",
    "deep": b"[" * 100_000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "escape": b'{"\x1b[2J',
}


class Evil:
    """A class that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "\x1b" not in text
    assert len(text) < 500
    return text


# -- small files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_small_files_are_refused_in_one_line(tmp_path, content):
    def refused(name: str, read):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path / name))}: ") as told:
            read()
        one_line(told)
        (tmp_path / name).unlink()

    refused("manifest.json", lambda: Manifest.read(tmp_path))
    refused("manifest.json", lambda: stage_state(tmp_path, {"a": 1}))
    refused("inputs.json", lambda: stage_state(tmp_path, {"a": 1}))
    refused("run.json", lambda: Origin.read(tmp_path))
    refused("metrics.json", lambda: read_logged(tmp_path))
    refused("trainer_state.json", lambda: require_readable(tmp_path))


@pytest.mark.parametrize(
    "field", [{"inputs": 3}, {"inputs": []}, {"outputs": [1]}, {"stop_ids": 5}, {"stage": {}}, {"seconds": "x"}]
)
def test_a_manifest_with_a_field_of_another_type_is_refused(tmp_path, field):
    (tmp_path / "manifest.json").write_text(json.dumps({"stage": "sft", "inputs": {}, "seed": 0} | field))
    with pytest.raises(InputError, match=rf"manifest.json: {next(iter(field))} is .*; the file is damaged") as told:
        Manifest.read(tmp_path)
    one_line(told)


@pytest.mark.parametrize(
    "content",
    [*BROKEN.values(), b"{}", b'{"mean": "x", "std": 1}', b'{"mean": 0, "std": 0}', b'{"mean": 0, "std": NaN}'],
)
def test_a_broken_normaliser_is_refused_in_one_line(tmp_path, tiny_model, tiny_tokenizer, content):
    folder = Path(chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)[1])
    (file,) = (path for path in folder.glob("*.json") if "mean" in path.read_text())
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name}: ") as told:
        RewardModel.load(folder, device="cpu")
    one_line(told)


# -- checkpoints -------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, step: int = 1) -> Path:
    """What transformers' Trainer and PPO write besides the models."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).state_dict(), path / "scheduler.pt")
    state = {"python": (3, (1, 2), None), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(state, path / "rng_state.pth")
    torch.save({"random": [], "policy": {"w": torch.ones(2)}}, path / "ppo.pt")
    (path / "trainer_state.json").write_text('{"global_step": 1, "log_history": []}')
    mark_complete(path, {})
    return path


STATES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "ppo.pt"]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "text":
        path.write_bytes(b"not a state\x1b[2J")
    elif how == "list":
        torch.save([1, 2], path)
    elif how == "other":
        torch.save({"something": "else"}, path)
    elif how == "foreign":
        torch.save({"state": Evil(path.parent.parent / "evil")}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(path.parent.parent / "evil"), protocol=2))


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("how", ["empty", "cut", "text", "list", "other", "foreign", "pickle"])
def test_a_damaged_state_is_refused_and_the_checkpoint_before_it_is_used(tmp_path, name, how):
    """Also where the list of hashes was written for the damaged file."""
    for step in (1, 2):
        check_checkpoint(make_checkpoint(tmp_path, step), {})
    newest = tmp_path / "checkpoint-2"
    damage(newest / name, how)
    with pytest.raises(InputError, match=f"{name} has|{name} is not what"):
        check_checkpoint(newest, {})
    (newest / COMPLETE).unlink()
    mark_complete(newest, {})
    with pytest.raises(InputError, match=rf"{re.escape(str(newest / name))}: ") as told:
        check_checkpoint(newest, {})
    one_line(told)
    assert latest_checkpoint(tmp_path, {}) == tmp_path / "checkpoint-1"
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "content", [*BROKEN.values(), b'{"files": {"a": 3}, "settings": {}}', b'{"files": {"a": [1, 2, 3]}}']
)
def test_a_damaged_list_of_hashes_is_refused_in_one_line(tmp_path, content):
    (make_checkpoint(tmp_path) / COMPLETE).write_bytes(content)
    with pytest.raises(InputError, match="its file 'complete' is damaged") as told:
        check_checkpoint(tmp_path / "checkpoint-1", {})
    one_line(told)


# -- links and modes ---------------------------------------------------------------------------------------


def test_a_planted_link_is_never_written_through(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    folder.mkdir()
    victim.write_text("precious")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    def fill() -> None:
        with atomic_folder(folder / "model") as inner:
            (inner / "weights").write_text("new")

    writes = {
        ".x.json.writing": lambda: write_json_atomic(folder / "x.json", {"a": 1}),
        ".manifest.json.writing": lambda: Manifest(stage="sft", inputs={}, seed=0).write(folder),
        ".metrics.jsonl.writing": lambda: truncate(folder / "metrics.jsonl", 1),
        f".rows.jsonl.{os.getpid()}.tmp": lambda: write_jsonl(folder / "rows.jsonl", [{"a": 1}]),
        ".model.writing": fill,
        ".inputs.json.writing": lambda: begin_stage(tmp_path / "stage", {"a": 1}),
    }
    (tmp_path / "stage").mkdir()
    for name, write in writes.items():
        place = (tmp_path / "stage" if "inputs" in name else folder) / name
        for target in (victim, tmp_path / "nothing"):
            place.symlink_to(target)
            write()
            assert victim.read_text() == "precious", name
            assert not (tmp_path / "nothing").exists(), name
            assert not place.is_symlink(), name
            if "inputs" in name:
                for written in (tmp_path / "stage").iterdir():
                    written.unlink()
    for name in ("x.json", "manifest.json", "metrics.jsonl", "rows.jsonl", "model/weights"):
        assert (folder / name).is_file()
        assert not (folder / name).is_symlink()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_all_files_of_a_run_have_the_mode_of_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "model") as inner:
            save_file({"w": torch.ones(2)}, inner / "model.safetensors")
            (inner / "config.json").write_text("{}")
        write_json_atomic(tmp_path / "manifest.json", {})
        assert os.umask(mask) == mask  # as it was
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}
