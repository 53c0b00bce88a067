"""Other programs on the same cores: seen by the time that our threads wait for one, answered by one more team."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rlhf.models import pretrained, waiting
from rlhf.models.loading import load_policy

CPU = torch.device("cpu")
CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1

TEAM = """
import os, torch
from rlhf.models.waiting import Crowd

def threads():
    return len(os.listdir("/proc/self/task"))

torch.ones(2**20).neg_()
before, crowd = threads(), Crowd()
crowd.come()
torch.ones(2**20).neg_()
while threads() < before + torch.get_num_threads():
    pass  # the new team is about to start; the test's time limit ends this
here = threads()
crowd.go()
print(torch.get_num_threads(), here - before)
while threads() > before:
    pass  # the team's threads are about to end
print("gone")
"""


@pytest.mark.slow
@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_a_crowd_is_one_more_team_and_leaves_nothing_behind():
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(CORES))
    done = subprocess.run(
        [sys.executable, "-c", TEAM], capture_output=True, text=True, check=True, env=env, timeout=100
    )
    assert done.stdout.split() == [str(CORES), str(CORES), "gone"]


def test_a_crowd_comes_above_one_share_and_goes_below_another():
    crowd, there = waiting.Crowd(), []
    for waited in (0.0, 0.2, 0.5, 0.2, 0.2, 0.1, 0.2, 2.0, 0.0):
        crowd.decide(waited)
        there.append(crowd.there)
    assert there == [False, False, True, True, True, False, False, True, False]


@pytest.mark.slow
@pytest.mark.skipif(CORES < 2, reason="two threads on one core always wait")
def test_waited_seconds_count_the_time_without_a_core():
    code = """
import os, threading
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from rlhf.models import waiting
start = os.times().user
before = waiting.waited_seconds()
other = os.fork()
while os.times().user < start + 0.4: pass
waited = waiting.waited_seconds() - before
if other:
    os.waitpid(other, 0)
    print(waited)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.1 < float(done.stdout) < 5  # two programs on one core: each waits about as long as it runs


def test_nothing_watches_where_it_could_not_help(monkeypatch):
    started = []
    monkeypatch.setattr(waiting.threading.Thread, "start", lambda self: started.append(self.name))
    monkeypatch.setattr(waiting, "_started", waiting.threading.Lock())
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(waiting.torch, "get_num_threads", lambda: 1)
    waiting.give_way(CPU)
    monkeypatch.setattr(waiting.torch, "get_num_threads", lambda: CORES + 1)
    waiting.give_way(torch.device("meta"))
    for name in waiting.SET_BY_USERS:
        with monkeypatch.context() as users:
            users.setenv(name, "1")
            waiting.give_way(CPU)
    assert started == []
    waiting.give_way(CPU)
    waiting.give_way(CPU)
    assert started == (["rlhf-waiting"] if sys.platform == "linux" else [])


def test_whoever_loads_a_model_gives_way(monkeypatch, tmp_path, tiny_model):
    """Scoring, evals and servers compute without a trainer: beside a busy process they took three times as long."""
    asked = []
    monkeypatch.setattr(pretrained, "give_way", lambda device: asked.append(device))
    tiny_model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    load_policy(tmp_path / "model")
    assert asked == []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    load_policy(tmp_path / "model")
    assert asked == [CPU]
