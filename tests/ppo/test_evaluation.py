"""PPO's evaluation: the processes share the prompts, each is scored once, and their number changes no result."""

from __future__ import annotations

import json

import pytest
from reference import evaluation_worker, forked
from reference.tiny_chain import chain

from rlhf.ppo import scoring


def test_two_processes_share_the_prompts(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(scoring, "FORWARD_ROWS", scoring.FORWARD_ROWS)  # the worker changes it; put back afterwards
    policy = str(chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)[0])
    one, scored = evaluation_worker.evaluated(tmp_path / "one", policy)
    done = forked.shared().together([evaluation_worker.__file__, tmp_path / "two", policy, tmp_path / "two-"])
    assert done.returncode == 0, done.stderr
    two = [json.loads((tmp_path / f"two-{rank}").read_text()) for rank in (0, 1)]
    assert sorted(scored) == sorted(two[0][1] + two[1][1]) == sorted(r["prompt"] for r in evaluation_worker.ROWS)
    assert all(prompts for _, prompts in two)
    assert abs(one["eval_kl_nats"]) > 0.01
    for metrics, _ in two:
        assert metrics == pytest.approx(one, rel=1e-6)
