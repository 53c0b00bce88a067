"""rlhf/ppo/ahead.py: the next rollout sampled while this one trains, against the weights that it must come from."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from reference import ahead_worker, forked, two_processes
from reference.ppo_runs import StopAfter, lines, make, prepared, same, token_logprobs, weights
from reference.tiny_chain import chain

from rlhf.errors import InputError, RunStopped
from rlhf.models.loading import load_policy
from rlhf.ppo import ahead
from rlhf.ppo.trainer import PPOConfig
from rlhf.run.checkpoint import checkpoints_in
from rlhf.sampling.decode import TransformersEngine

FAST = {"learning_rate": 5e-3, "lr_schedule": "constant", "rollouts_ahead": 1, "preflight": False}


@pytest.fixture(params=[pytest.param("full", marks=pytest.mark.slow), "lora"])
def policy(request, tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, request.param == "lora")[0]


@pytest.fixture
def full(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)[0]


def test_responses_come_from_the_weights_before_the_last_update(tmp_path, policy):
    """The first rollout is the policy's own, the second is sampled by the weights as they were at the first."""
    trainer = make(tmp_path, policy, updates=3, **FAST)
    first = prepared(trainer)
    assert first.staleness == 0
    assert (first.engine_logprobs - first.logprobs).abs().max() < 1e-5
    start = load_policy(policy).eval()
    trainer.update(first)
    second = prepared(trainer)
    assert second.staleness == 1
    draws, ids = trainer.draws.sampling(1, 12, "cpu"), second.prompt_ids
    again = TransformersEngine(start, trainer.stop_ids, trainer.pad_id).generate(ids, 8, 1.0, draws)
    assert second.response_ids == again.ids
    apart = 0.0
    for row, expected in enumerate(token_logprobs(start, second)):
        torch.testing.assert_close(second.engine_logprobs[row, : len(expected)], expected, rtol=0, atol=2e-5)
        weight = (second.logprobs[row, : len(expected)] - expected).exp().clamp(max=2.0)
        torch.testing.assert_close(second.importance[row, : len(expected)], weight, rtol=0, atol=1e-4)
        apart = max(apart, float((weight - 1).abs().max()))
    assert apart > 0.01, "the update between them shows"
    metrics = trainer.update(second)
    assert metrics["step0_ratio_error"] == 0.0, "old log-probabilities are the trained weights' own"
    assert metrics["rollout_staleness_updates"] == 1
    third = prepared(trainer)
    assert third.staleness == 1
    assert trainer.ahead.coming is None, "nothing is sampled for an update that never comes"


def test_only_trained_weights_are_copied(tmp_path, policy):
    trainer = make(tmp_path, policy, **FAST)
    trainer.collect(trainer.next_prompts())
    trainer.ahead.wait()
    own = {id(p) for p in trainer.actor_critic.policy.parameters()}
    copied = [name for name, p in trainer.ahead.copy.policy.named_parameters() if id(p) not in own]
    trained = [n.removeprefix("policy.") for n, p in trainer.actor_critic.named_parameters()
               if p.requires_grad and n.startswith("policy.") and ".value." not in n]  # fmt: skip
    assert copied == trained
    assert (len(copied) == len(own)) == (policy.name == "base")
    trainer.update(trainer.advantages(trainer.score(trainer.collect(trainer.next_prompts()))))
    start = dict(load_policy(policy).named_parameters())
    for name in copied:
        assert torch.equal(dict(trainer.ahead.copy.policy.named_parameters())[name], start[name]), name


def test_on_a_gpu_one_stream_samples_every_rollout(tmp_path, full, monkeypatch):
    """What a stream has freed no other one gets: with a new one for each rollout, memory would grow by a cache each."""
    trainer, made, used = make(tmp_path, full, **FAST), [], []
    monkeypatch.setattr(trainer, "device", torch.device("cuda", 0))

    class Stream:
        def __init__(self, device):
            self.device, self.waited = device, 0
            made.append(self)

        def wait_stream(self, other):
            self.waited += other == "default"

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.append(stream) or nullcontext())
    copy = ahead.Copy(trainer)
    for seed in (1, 2, 3):
        copy.generate([[5, 6, 7]], torch.Generator().manual_seed(seed))
    assert used == made * 3
    assert (len(made), made[0].waited) == (1, 3)  # each time after what the trainer has asked of the GPU


def staleness(tmp_path, folder, name: str) -> list[tuple[float, float]]:
    (tmp_path / name).mkdir()
    make(tmp_path / name, folder, updates=3, **FAST).train()
    return [
        (row["rollout_staleness_updates"], row["engine_kl_nats"]) for row in lines(tmp_path / name, "metrics.jsonl")
    ]


def test_planted_staleness_shows(tmp_path, full, monkeypatch):
    """Weights that are taken once and never again are counted, and show in the KL."""
    fresh = staleness(tmp_path, full, "fresh")
    assert [count for count, _ in fresh] == [0, 1, 1]
    assert fresh[0][1] < 1e-8 < fresh[1][1]
    refresh = ahead.Copy.refresh
    with monkeypatch.context() as patch:
        taken: list[ahead.Copy] = []
        patch.setattr(ahead.Copy, "refresh", lambda copy: taken or taken.append(copy) or refresh(copy))
        stale = staleness(tmp_path, full, "stale")
    assert [count for count, _ in stale] == [0, 1, 2]
    assert stale[1] == fresh[1]
    assert stale[2][1] > 1.2 * fresh[2][1]


@pytest.mark.slow
def test_a_copy_that_copies_nothing_shows_in_the_kl(tmp_path, full, monkeypatch):
    fresh, refresh = staleness(tmp_path, full, "fresh"), ahead.Copy.refresh
    monkeypatch.setattr(ahead.Copy, "refresh", lambda copy: copy.pairs.clear() or refresh(copy))
    broken = staleness(tmp_path, full, "broken")
    assert [count for count, _ in broken] == [0, 1, 1]
    assert broken[2][1] > 1.2 * fresh[2][1]


@pytest.mark.slow
def test_resume_is_exact(tmp_path, policy):
    settings = FAST | {"updates": 4, "save_steps": 2, "eval_steps": 1, "eval_rows": [{"prompt": "Count to more"}]}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = make(tmp_path / "a", policy, **settings)
    whole.train()
    make(tmp_path / "b", policy, callbacks=[StopAfter(3)], **settings).train()
    for beyond in checkpoints_in(tmp_path / "b" / "run")[1:]:  # what the end before its time has written
        (beyond / "complete").unlink()
    resumed = make(tmp_path / "b", policy, **settings)
    resumed.train(resume_from_checkpoint=True)
    one, two = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    drop = lambda row: {k: v for k, v in row.items() if "second" not in k}  # noqa: E731
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [drop(row) for row in lines(tmp_path / "a", name)] == [drop(row) for row in lines(tmp_path / "b", name)]
    assert [row["rollout_staleness_updates"] for row in lines(tmp_path / "b", "metrics.jsonl")] == [0, 1, 1, 1]


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_resume(tmp_path, full):
    """Each has its own share in hand; the checkpoint holds both."""
    alone = ahead_worker.run(tmp_path / "alone", full)
    found = []
    for updates in (2, 4):
        output = tmp_path / f"{updates}.pt"
        done = forked.shared().together([ahead_worker.__file__, tmp_path / "two", full, output, updates])
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(output, weights_only=True))
    assert found[0]["responses"] + found[1]["responses"] == alone["responses"]
    same(found[1]["weights"], alone["weights"], 1e-3)
    assert [row["rollout_staleness_updates"] for row in found[1]["logs"]] == [0, 1, 1, 1]
    for one, other in zip(found[1]["logs"], alone["logs"], strict=True):
        assert one["engine_kl_nats"] == pytest.approx(other["engine_kl_nats"], rel=1e-2, abs=1e-7)


def test_by_default_nothing_is_ahead(tmp_path, full):
    trainer = make(tmp_path, full)
    rollout = prepared(trainer)
    assert (rollout.staleness, rollout.engine_logprobs, rollout.importance) == (None, None, None)
    assert "rollout_staleness_updates" not in trainer.update(rollout)
    assert "ahead" not in trainer.state_dict()
    assert (trainer.ahead.copy, trainer.ahead.coming) == (None, None)


class Server:
    """An engine with weights of its own: it samples with the policy that it follows, and remembers which."""

    def __init__(self) -> None:
        self.inner: TransformersEngine | None = None
        self.followed: list[Any] = []
        self.sampled: list[Any] = []

    def follow(self, policy, stop_ids):
        self.followed.append(policy)
        self.inner = TransformersEngine(policy, stop_ids, 3)
        self.inner.reports_logprobs = True

    def generate(self, *given):
        self.sampled.append(self.inner.model)
        return self.inner.generate(*given)


@pytest.mark.slow
def test_an_engine_that_follows_takes_the_copy_once_and_evaluates_with_current_weights(tmp_path, full):
    settings = FAST | {"updates": 3, "eval_steps": 1, "eval_rows": [{"prompt": "Count to more"}]}
    engine = Server()
    (tmp_path / "server").mkdir()
    served = make(tmp_path / "server", full, engine=engine, **settings)
    served.train()
    assert engine.followed == [served.actor_critic.policy, served.ahead.copy.policy]
    assert len(engine.sampled) == 2 * 3
    assert all(model is served.ahead.copy.policy for model in engine.sampled)
    plain = make(tmp_path, full, **settings)
    plain.train()
    one, two = weights(served), weights(plain)
    assert all(torch.equal(one[name], two[name]) for name in one)
    for mine, other in zip(lines(tmp_path / "server", "metrics.jsonl"), lines(tmp_path, "metrics.jsonl"), strict=True):
        assert {n: v for n, v in mine.items() if "second" not in n} == {
            n: v for n, v in other.items() if "second" not in n
        }


@pytest.mark.slow
def test_an_update_is_saved_before_failed_sampling_ends_the_run(tmp_path, full, monkeypatch):
    generate = ahead.Copy.generate

    def failing(copy, *given):
        if copy.weights == 1:
            raise RunStopped("the server is gone")
        return generate(copy, *given)

    with monkeypatch.context() as patch:
        patch.setattr(ahead.Copy, "generate", failing)
        trainer = make(tmp_path, full, updates=4, save_steps=1, **FAST)
        with pytest.raises(RunStopped, match="the server is gone"):
            trainer.train()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    resumed = make(tmp_path, full, updates=4, save_steps=1, **FAST)
    resumed.train(resume_from_checkpoint=True)
    assert [row["rollout_staleness_updates"] for row in lines(tmp_path, "metrics.jsonl")] == [0, 1, 0, 1]


def test_other_prompts_than_the_runs_own_are_sampled_now(tmp_path, full, caplog):
    trainer = make(tmp_path, full, updates=3, **FAST)
    trainer.update(prepared(trainer))
    rollout = trainer.collect(trainer.next_prompts()[::-1])
    assert rollout.staleness == 0
    assert "other prompts than those that were sampled ahead" in caplog.text


def test_what_cannot_be_sampled_ahead_is_refused(tmp_path, full, monkeypatch):
    with pytest.raises(InputError, match="rollouts_ahead=2 must be 0 or 1"):
        PPOConfig(rollouts_ahead=2)
    with pytest.raises(InputError, match="GivenResponses has no method `follow`"):
        make(tmp_path, full, engine=two_processes.GivenResponses(), rollouts_ahead=1)
    colocated = Server()
    colocated.colocated = True
    with pytest.raises(InputError, match="a colocated server sleeps while the policy trains"):
        make(tmp_path, full, engine=colocated, rollouts_ahead=1)
    monkeypatch.setattr("rlhf.sampling.decode.can_decode", lambda *given: False)
    trainer = make(tmp_path, full, rollouts_ahead=1)
    with pytest.raises(InputError, match="TransformersEngine reports no log-probabilities for this model"):
        trainer.collect(trainer.next_prompts())
