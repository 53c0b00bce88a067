"""Runs that die at any moment: atomic folders, whole and damaged checkpoints, random numbers."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.errors import InputError, RunStopped
from rlhf.run.callbacks import MarkComplete
from rlhf.run.checkpoint import (
    COMPLETE,
    atomic_folder,
    check_checkpoint,
    full_disk_explained,
    latest_checkpoint,
    random_state,
    require_disk,
    restore_random_state,
    save_checkpoint,
    write_json_atomic,
)


class Killed(BaseException):
    """Raised in place of a SIGKILL."""


def fill(folder: Path, text: str) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- atomic folders


def test_an_atomic_folder_appears_whole_and_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for text in ("old", "new"):
        with atomic_folder(path) as temporary:
            assert temporary != path
            fill(temporary, text)
    assert (path / "model" / "weights").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_failing_body_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_folder(path) as temporary:
        fill(temporary, "old")
    with pytest.raises(FileNotFoundError), atomic_folder(path) as temporary:
        (temporary / "half" / "file").touch()
    assert (path / "model" / "weights").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_run_killed_while_renaming_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    import rlhf.checkpoint

    path = tmp_path / "out"
    with atomic_folder(path) as temporary:
        fill(temporary, "old")
    done = []
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise Killed
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying)
        patched.setattr(rlhf.run.checkpoint, "remove", lambda path: None)  # a killed process cleans nothing up
        patched.setattr(rlhf.run.checkpoint, "recover", lambda path: None)
        if renames < 2:
            with pytest.raises(Killed), atomic_folder(path) as temporary:
                fill(temporary, "new")
        else:
            with atomic_folder(path) as temporary:
                fill(temporary, "new")
    with pytest.raises(RuntimeError), atomic_folder(path):  # the next process begins to write, and fails
        raise RuntimeError
    assert (path / "model" / "weights").read_text() == ("new" if renames == 2 else "old")
    assert names(tmp_path) == ["out"]


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json_atomic(path, {"t": (1, 2), "n": np.float32(0.5), "p": Path("x"), "w": torch.ones(2)})
    assert json.loads(path.read_text()) == {"t": [1, 2], "n": 0.5, "p": "x", "w": [1.0, 1.0]}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"bad": object()})
    assert json.loads(path.read_text())["n"] == 0.5
    odd = {"path": os.fsdecode(b"caf\xe9"), "text": 'no\u00e9l \ud83d "\\"'}
    write_json_atomic(path, odd)
    assert json.loads(path.read_text(encoding="utf-8")) == odd
    assert "no\u00e9l" in path.read_text(encoding="utf-8")


def test_a_full_disk_is_refused_in_one_line(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(InputError, match=r"needs about 1000000\.00 GB, .* are free") as caught:
        require_disk(tmp_path / "not" / "yet", 10**15)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- checkpoints

SETTINGS = {"seed": 0, "kl_coef": 0.05, "sizes": [1, 2]}


def write(text: str):
    def fill_checkpoint(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text(text * 1000)
        (folder / "state").write_text(text)

    return fill_checkpoint


def save(folder: Path, *steps: int, keep: int = 2, settings: dict[str, Any] = SETTINGS) -> None:
    for step in steps:
        save_checkpoint(folder, step, write(str(step)), settings, keep)


def test_only_whole_checkpoints_count_and_the_newest_stay(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, SETTINGS) is None
    (tmp_path / "checkpoint-3").mkdir()  # transformers was killed while writing it
    (tmp_path / "checkpoint-best").mkdir()
    save(tmp_path, 2, 9, 10)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9", "checkpoint-best"]
    latest = latest_checkpoint(tmp_path, SETTINGS)
    assert latest is not None
    assert (latest.name, (latest / "state").read_text()) == ("checkpoint-10", "10")

    def dying(path: Path) -> None:
        (path / "state").touch()
        raise Killed

    with pytest.raises(Killed):
        save_checkpoint(tmp_path, 11, dying, SETTINGS)
    assert latest_checkpoint(tmp_path, SETTINGS) == latest
    save(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-best"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


DAMAGE = {
    "inner/weights has 1999 bytes, 2000 were written": lambda folder: cut(folder / "inner" / "weights"),
    "inner/weights is not what was written": lambda folder: flip(folder / "inner" / "weights"),
    "state is missing": lambda folder: (folder / "state").unlink(),
    "its file 'complete' is damaged": lambda folder: cut(folder / COMPLETE) or cut(folder / COMPLETE),
    "made with kl_coef=0.05, now 0.1": lambda folder: (folder / COMPLETE).write_text(
        (folder / COMPLETE).read_text().replace('"kl_coef": 0.1', '"kl_coef": 0.05')
    ),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_refused_and_the_one_before_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    settings = SETTINGS | {"kl_coef": 0.1}
    save(tmp_path, 9, 10, settings=settings)
    DAMAGE[reason](tmp_path / "checkpoint-10")
    with pytest.raises(InputError, match="checkpoint-10: " + re.escape(reason)):
        check_checkpoint(tmp_path / "checkpoint-10", settings)
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        assert latest_checkpoint(tmp_path, settings) == tmp_path / "checkpoint-9"
    (message,) = caplog.messages
    assert f"checkpoint-10: {reason}" in message
    assert message.endswith("going on from checkpoint-9 instead")
    assert names(tmp_path) == ["checkpoint-9", "refused-checkpoint-10"]  # nothing counts it, nothing was deleted
    DAMAGE[reason](tmp_path / "checkpoint-9") if "weights" not in reason else (tmp_path / "checkpoint-9/state").unlink()
    with pytest.raises(InputError, match="checkpoint-9: "):  # none is left: not silently from the beginning
        latest_checkpoint(tmp_path, settings)
    assert (tmp_path / "checkpoint-9").is_dir()


def test_an_interrupted_save_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 4)
    write("6")(Path(tmp_path / "checkpoint-6").mkdir() or tmp_path / "checkpoint-6")
    with pytest.raises(InputError, match="no complete checkpoint"):
        check_checkpoint(tmp_path / "checkpoint-6", SETTINGS)
    assert latest_checkpoint(tmp_path, SETTINGS) == tmp_path / "checkpoint-4"
    assert names(tmp_path) == ["checkpoint-4"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail] . No space left on device"),
        ValueError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_while_saving_leaves_the_last_good_one(tmp_path: Path, error: Exception) -> None:
    save(tmp_path, 1)

    def full(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise error

    with pytest.raises(
        RunStopped, match=r"no space left on its disk while saving; the last good checkpoint is checkpoint-1"
    ):
        save_checkpoint(tmp_path, 2, full, SETTINGS)
    assert names(tmp_path) == ["checkpoint-1"]
    check_checkpoint(tmp_path / "checkpoint-1", SETTINGS)
    with pytest.raises(RuntimeError, match="another"), full_disk_explained(tmp_path):
        raise RuntimeError("another failure stays what it was")


def test_transformers_checkpoints_are_marked_when_saved(tmp_path: Path) -> None:
    for step in (4, 5, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model").write_text(str(step))
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        MarkComplete(SETTINGS, keep=2).on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    assert latest_checkpoint(tmp_path, SETTINGS) == tmp_path / "checkpoint-6"
    with pytest.raises(InputError, match="made with seed=0, now 1"):
        latest_checkpoint(tmp_path, SETTINGS | {"seed": 1})


# ---------------------------------------------------------------- random numbers


def draw() -> tuple[Any, ...]:
    return (torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random(), random.gauss(0, 1))


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    draw()
    torch.save(random_state(), tmp_path / "random.pt")
    expected = draw()
    assert draw() != expected
    restore_random_state(torch.load(tmp_path / "random.pt", weights_only=True))
    assert draw() == expected
