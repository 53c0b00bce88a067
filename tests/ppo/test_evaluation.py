"""PPO's evaluation: the processes share the prompts, each is scored once, and their number changes no result."""

from __future__ import annotations

import json

import pytest
from reference import evaluation_worker, forked
from reference.ppo_runs import make
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


def test_processes_wait_for_the_slowest_reward_function(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """In a group without a limit: what comes next asks NCCL, which gives up after ten minutes."""
    events: list[str] = []
    monkeypatch.setattr(scoring, "wait_for_all", lambda: events.append("wait"))

    def score(completions, **columns):
        events.append("score")
        return [1.0] * len(completions)

    trainer = make(tmp_path, chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)[0], score)
    for prompts, expected in ((trainer.prompts[:1], ["score", "wait"]), ([], ["wait"])):
        events.clear()
        scoring.raw_scores(trainer, prompts, ["one"][: len(prompts)], [[5]][: len(prompts)])
        assert events == expected
