"""Runs that die: killed at random moments, told to stop, or out of disk. The same command ends as if nothing happened.

The long version (make test-long) kills at least `KILLS` times and prints a table of what each kill hit.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from reference import whole_chain
from reference.whole_chain import STAGES, Forks, Started, copied, differences, fresh, kill_when, whole_checkpoints

from rlhf.run.checkpoint import check_checkpoint

KILLS = 100
SAVING = ("sft", "reward_model", "ppo")
LAST = {"sft": 6, "reward_model": 9, "ppo": 4}  # the step of a stage's last checkpoint


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_chain.undisturbed(tmp_path_factory)


SPACE = 110 * 2**20  # a stage refuses to begin where about 100 MB are not free


def with_disk(folder: Path) -> list[str]:
    """What a command is started under to see a small disk of its own in `folder`; empty where that is not allowed."""
    script = 'mount -t tmpfs -o size="$0" none "$1" && shift && exec "$@"'
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):  # root needs no namespace of users
        command = [*unshare, "sh", "-c", script, str(SPACE), str(folder)]
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def fork(disk: Path) -> Iterator[Forks]:
    forks = Forks(prefix=with_disk(disk))
    yield forks
    forks.close()  # the last process that saw the disk: it is gone with it


# ---------------------------------------------------------------- moments


@dataclass(frozen=True)
class Moment:
    """The moment of a kill: `delay` seconds after a stage begins, begins to save, has a (or its last) checkpoint or a
    file, or is complete."""

    stage: str
    after: str
    delay: float = 0.0

    def seen(self, folder: Path, since: int) -> bool:
        """Return whether the moment has come in a run started at `since`; files of an earlier run do not count."""
        stage = folder / self.stage
        if self.after == "complete" or (stage / "manifest.json").exists():
            return (stage / "manifest.json").exists()
        if self.after == "saves":
            return whole_chain.being_saved(stage, since)
        if not touched(stage, since):
            return False
        if self.after == "begins":
            return True
        if self.after == "checkpoint":
            return any(fresh(file, since) for file in stage.glob("checkpoint-*/complete"))
        if self.stage in LAST:
            return (stage / f"checkpoint-{LAST[self.stage]}" / "complete").exists()
        return any(path.suffix in (".jsonl", ".safetensors") for path in stage.glob("*"))


def touched(stage: Path, since: int) -> bool:
    """Return whether the run started at `since` has begun to work on the stage."""
    return fresh(stage / "inputs.json") and any(fresh(path, since) for path in (stage, *stage.glob("*")))


def random_moments(rng: random.Random, seconds: dict[str, float]) -> Iterator[Moment]:
    """Draw moments for one chain: in each stage's seconds, in its saves, at its end, and sometimes just after."""
    for stage in STAGES:
        kinds = [("begins", max(0.7 * seconds[stage], 0.02))]
        kinds += [("saves", 0.02), ("checkpoint", 0.1), ("saves", 0.02)] if stage in SAVING else []
        kinds += [("ends", 0.05)]
        kinds += [("complete", 0.3)] if rng.random() < 0.3 else []
        for after, longest in kinds:
            yield Moment(stage, after, rng.random() * longest)


def hit(folder: Path, since: int) -> tuple[str, str]:
    """Return what the kill of a run started at `since` hit: the first incomplete stage and its progress."""
    stage = next((name for name in STAGES if not (folder / name / "manifest.json").exists()), None)
    if stage is None:
        return "report", "after the last stage"
    if not touched(folder / stage, since):
        return stage, "on the way to it"
    if whole_chain.being_saved(folder / stage, since):
        return stage, "while saving a checkpoint"
    whole = whole_checkpoints(folder / stage)
    if not whole:
        return stage, "at work, no checkpoint yet"
    return stage, "after its last checkpoint" if whole[-1] == LAST[stage] else "at work, after a checkpoint"


def killed(start: Callable[[Path], Started], folder: Path, moment: Moment) -> tuple[str, str] | None:
    """Start the chain and kill it at the moment; return what the kill hit, or None where the chain ended before."""
    since = time.time_ns()
    started = start(folder)
    kill_when(started, lambda: moment.seen(folder, since), moment.delay)
    code, out, err = started.end()
    if code == 0:
        return None
    assert code == -signal.SIGKILL, f"{moment}: {code}\n{out}{err}"
    return hit(folder, since)


def finish(started: Started) -> str:
    """Let the chain run to its end; return its stdout."""
    code, out, err = started.end()
    assert (code, err) == (0, ""), out + err
    return out


def everywhere(hits: Counter[tuple[str, str]]) -> bool:
    """Return whether every stage was hit, every saving of a checkpoint, and one trainer after its last checkpoint."""
    saving = {stage for stage, state in hits if state == "while saving a checkpoint"}
    last = {stage for stage, state in hits if state == "after its last checkpoint"}
    return {stage for stage, _ in hits} >= set(STAGES) and saving == set(SAVING) and bool(last & set(SAVING))


# ---------------------------------------------------------------- kills


@pytest.mark.slow
def test_killed_four_times_it_ends_as_if_nothing_happened(tmp_path: Path, undisturbed: Path, fork: Forks) -> None:
    """After a checkpoint of sft, in a save, after a checkpoint, in the next save."""
    run = tmp_path / "run"
    moments = [Moment("sft", "checkpoint"), Moment("reward_model", "saves"), Moment("ppo", "checkpoint"),
               Moment("ppo", "saves")]  # fmt: skip
    hits, done = list[object](), whole_chain.manifests(run)
    for moment in moments:
        hits.append(killed(fork, run, moment))
        now = whole_chain.manifests(run)
        assert done.items() <= now.items(), "a complete stage was done again"
        done = now
    assert hits[1:] == [
        ("reward_model", "while saving a checkpoint"),
        ("ppo", "at work, after a checkpoint"),
        ("ppo", "while saving a checkpoint"),
    ]
    out = finish(fork(run))
    assert out.count("complete, skipped") == len(done)
    assert [*differences(run, undisturbed)] == []


@pytest.mark.long
def test_killed_a_hundred_times_at_random_every_chain_ends_the_same(
    tmp_path: Path, undisturbed: Path, fork: Forks, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, seconds = random.Random(0), whole_chain.read(undisturbed / "summary.json")["seconds"]
    hits, chains, began = Counter[tuple[str, str]](), 0, time.monotonic()
    while hits.total() < KILLS or not everywhere(hits):  # on a busy machine few moments of saving are hit
        run = tmp_path / f"run-{chains}"
        for moment in random_moments(rng, seconds):
            found = killed(fork, run, moment)
            if found is None:
                break
            hits[found] += 1
        finish(fork(run))
        assert [*differences(run, undisturbed)] == [], f"chain {chains}"
        shutil.rmtree(run)
        chains += 1
        assert chains < 30, hits
    with capsys.disabled():
        print(f"\n{hits.total()} kills in {chains} chains, all recovered, {time.monotonic() - began:.0f} s")
        order = {name: place for place, name in enumerate((*STAGES, "report"))}
        for (stage, state), count in sorted(hits.items(), key=lambda item: (order[item[0][0]], item[0][1])):
            print(f"{count:4d}  {stage:<13} {state}")


@pytest.mark.long
def test_the_real_command_killed_at_random_ends_the_same(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As above without forks, wherever the chain is up to two seconds after a stage set to work."""
    rng, run, hits = random.Random(1), tmp_path / "run", list[tuple[str, str]]()
    for stage in STAGES:
        since = time.time_ns()
        started = whole_chain.command(run)
        kill_when(started, lambda: touched(run / stage, since), rng.uniform(0, 2))  # noqa: B023
        code, out, err = started.end()
        if code == 0:
            break
        assert code == -signal.SIGKILL, out + err
        hits.append(hit(run, since))
    finish(whole_chain.command(run))
    assert [*differences(run, undisturbed)] == []
    with capsys.disabled():
        print(f"\nthe real command, killed: {hits}")
    assert len({stage for stage, _ in hits}) > 1


@pytest.mark.long
@pytest.mark.parametrize("stage", SAVING)
def test_told_to_stop_it_saves_exits_143_and_goes_on_to_the_same_weights(
    tmp_path: Path, undisturbed: Path, stage: str
) -> None:
    """SIGTERM to the real command, in the middle of a stage."""
    run = copied(undisturbed, tmp_path / "run", before=stage)
    flags = ["--sft.save_steps", "0", "--reward_model.save_steps", "0", "--ppo.save_steps", "0"]
    since, started = time.time_ns(), whole_chain.command(run, *flags)
    assert kill_when(started, lambda: stepped(run / stage), number=signal.SIGTERM)
    code, out, err = started.end()
    assert code == 143, out + err
    assert err == ""
    (step,) = whole_checkpoints(run / stage)
    assert 0 < step < LAST[stage]
    assert hit(run, since) == (stage, "at work, after a checkpoint")
    assert f"{stage:<14}was interrupted: going on" in finish(whole_chain.command(run))
    assert {line for line in differences(run, undisturbed) if "metrics" not in line} == set()


def stepped(stage: Path) -> bool:
    """Return whether the first step was logged."""
    return (stage / "metrics.jsonl").is_file() and bool((stage / "metrics.jsonl").read_text())


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(fork: Forks, disk: Path) -> tuple[Forks, Path]:
    """Return the start of a command line whose process sees a small disk of its own, and the disk's path."""
    if not with_disk(disk):
        pytest.skip("no right to mount a tmpfs, not even in a namespace of users (unshare -rm)")
    return fork, disk


def on_disk(folder: Path) -> int:
    """Return the bytes that a folder's files take, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Full:
    """A disk that fills up after a stage's checkpoint (0: as it begins), except for some free space."""

    stage: str
    step: int
    room: Callable[[int, int], int]
    """From the size of a checkpoint and of a model, in bytes."""
    kept: int
    """The last good checkpoint's step; 0: none."""

    def seen(self, stage: Path) -> bool:
        last = stage / f"checkpoint-{self.step}" / "complete" if self.step else stage / "inputs.json"
        return last.exists()


FULL = {
    "in ppo's second checkpoint": Full("ppo", 2, lambda checkpoint, model: checkpoint // 2, 2),
    "in ppo's log": Full("ppo", 2, lambda checkpoint, model: 0, 2),
    "in ppo's model, after its last checkpoint": Full("ppo", 2, lambda checkpoint, model: checkpoint + model // 2, 4),
    "in ppo's first checkpoint": Full("ppo", 0, lambda checkpoint, model: 200_000, 0),
    "in sft's second checkpoint": Full("sft", 2, lambda checkpoint, model: checkpoint // 2, 2),
    "in sft's log": Full("sft", 2, lambda checkpoint, model: 0, 2),
    "in the reward model's second checkpoint": Full("reward_model", 4, lambda checkpoint, model: checkpoint // 2, 4),
    "in the base model": Full("base", 0, lambda checkpoint, model: model // 2, 0),
    "in the rankings": Full("rankings", 0, lambda checkpoint, model: 0, 0),
    "in the evaluation": Full("evaluation", 0, lambda checkpoint, model: 0, 0),
}
BRIEFLY = ("in ppo's second checkpoint",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in BRIEFLY else pytest.mark.long) for case in FULL]
)
def test_a_disk_that_fills_up_costs_one_line_and_nothing_else(
    small_disk: tuple[Forks, Path], undisturbed: Path, case: str
) -> None:
    """Exit code 1 and the last good checkpoint; refused while the disk is full; then the same end as undisturbed."""
    (starter, disk), full = small_disk, FULL[case]
    here = Path(f"/proc/{starter.process.pid}/root{disk}")  # the disk as this process sees it
    run, filler = copied(undisturbed, here / "run", before=full.stage), here / "filler"
    stage = run / full.stage
    try:
        started = starter(disk / "run")
        assert kill_when(started, lambda: full.seen(stage), number=signal.SIGSTOP)
        room = full.room(on_disk(stage / f"checkpoint-{full.step}"), on_disk(undisturbed / "ppo"))
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(here).free - room)
        started.signal(signal.SIGCONT)
        code, out, err = started.end()
        assert code == 1, out + err
        assert len(err.splitlines()) == 1, err
        assert re.match(r"stopped: .*no space left on (its|the) disk", err)
        assert "Traceback" not in out
        kept = whole_checkpoints(stage)
        assert kept[-1:] == [full.kept] * bool(full.kept)
        assert not whole_chain.being_saved(stage) or full.stage != "ppo"  # transformers leaves its half; ours don't
        for step in kept:
            check_checkpoint(stage / f"checkpoint-{step}", {})
        if kept:
            assert f"the last good checkpoint is checkpoint-{full.kept}" in err
        code, out, err = starter(disk / "run").end()
        assert (code, len(err.splitlines())) == (2, 1), out + err
        assert "needs about" in err
        assert whole_checkpoints(stage) == kept
        filler.unlink()
        assert f"{full.stage:<14}was interrupted: going on" in finish(starter(disk / "run"))
        assert [*differences(run, undisturbed)] == []
    finally:
        filler.unlink(missing_ok=True)
        shutil.rmtree(run)
