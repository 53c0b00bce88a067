"""One run per folder: the lock, who it names, and that it ends with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf.errors import InputError
from rlhf.run import lock

HOLD = "import sys, time; from rlhf.run import lock; lock.hold(sys.argv[1]); print('held', flush=True); time.sleep(60)"
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def another_run(folder: Path) -> Iterator[int]:
    """A process that holds a folder; its id."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("inner", [".", "seed-0", "a/b", ".."])
def test_a_second_run_is_refused_in_one_line_that_names_the_first(tmp_path: Path, inner: str) -> None:
    taken = tmp_path / "run" / "stage"
    with another_run(taken) as pid:
        for attempt in (lock.hold, lock.require_free):
            with pytest.raises(InputError, match=rf"process {pid} is running in .*; wait for it") as caught:
                attempt(taken / inner)
            assert "\n" not in str(caught.value)
        lock.require_free(tmp_path / "run" / "other")


def test_a_link_in_the_locks_place_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    other, folder = tmp_path / "other.txt", tmp_path / "run"
    other.write_text("precious")
    folder.mkdir()
    (folder / lock.NAME).symlink_to(other)
    lock.hold(folder)
    assert not (folder / lock.NAME).is_symlink()
    lock.release(folder)
    assert other.read_text() == "precious"


def test_it_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    with another_run(tmp_path) as pid:
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                lock.hold(tmp_path)
                break
            except InputError:
                time.sleep(0.01)
    assert (tmp_path / lock.NAME).read_text().split()[0] == str(os.getpid())
    lock.release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_lends_its_folder_to_a_trainer_and_two_trainers_do_not_share(tmp_path: Path) -> None:
    lock.hold(tmp_path)
    with lock.training_in(tmp_path / "seed-0"):
        with pytest.raises(InputError, match=rf"process {os.getpid()} \(this one\) is running in it"):
            lock.training_in(tmp_path / "seed-0").__enter__()
        with pytest.raises(InputError, match="is running in"):
            lock.training_in(tmp_path).__enter__()
    with lock.training_in(tmp_path):
        pass
    assert (tmp_path / lock.NAME).exists()  # the stage's still
    lock.release(tmp_path)
    with lock.training_in(tmp_path):
        assert (tmp_path / lock.NAME).exists()
    assert not (tmp_path / lock.NAME).exists()


def test_a_worker_that_outlives_its_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = "import os, sys, time; from rlhf.run import lock; lock.hold(sys.argv[1]); os.fork() or time.sleep(30)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=30)
    lock.hold(tmp_path)
    lock.release(tmp_path)
