"""One inner epoch of one minibatch in one piece: the forward that collects is the update's, and no other is made."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from reference import two_processes
from reference.ppo_runs import is_value, make, norm, prepared, same, watch_steps, weights
from reference.tiny_chain import chain

from reward_models import RewardModel
from rlhf.errors import RunStopped
from rlhf.models.adapters import backbone
from rlhf.models.logprobs import token_logprobs
from rlhf.ppo import actor_critic
from rlhf.ppo.build import build_actor_critic
from rlhf.ppo.trainer import PPOTrainer

WHOLE = {"inner_epochs": 1, "minibatch_size": 12, "tokens_per_microbatch": 10**6}
KINDS = [(False, "separate"), (True, "adapter"), (False, "shared_trunk"), (True, "shared_trunk"), (True, "separate")]
IDS = ["full separate", "lora adapter", "full shared_trunk", "lora shared_trunk", "lora separate"]


TWO = pytest.mark.parametrize("kind", KINDS[1:3], ids=IDS[1:3], indirect=True)  # where the others would say no more


@pytest.fixture(params=KINDS, ids=IDS)
def kind(request, tmp_path, tiny_model, tiny_tokenizer) -> tuple[Any, str]:
    """(policy and reward model folders, what the value model is)."""
    lora, name = request.param
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora), name


@pytest.fixture
def trainer_of(tmp_path, kind):
    """A new trainer of this kind; responses are given, so that every forward is one of the stages'."""
    folders, name = kind

    def new(**changes: Any) -> PPOTrainer:
        score = RewardModel.load(folders[1])
        settings = {"value_kind": name, "value_loss_coef": 0.3} | WHOLE | changes
        return make(tmp_path, folders[0], score, engine=two_processes.GivenResponses(), **settings)

    return new


def without_keeping(trainer: PPOTrainer) -> PPOTrainer:
    collect = trainer.collect

    def forgetful(prompts):
        rollout = collect(prompts)
        trainer._kept = None
        return rollout

    trainer.collect = forgetful  # type: ignore[method-assign]
    return trainer


def watch_forwards(trainer: PPOTrainer, monkeypatch) -> list[str]:
    """Whose trunk was run, or "head" for log-probabilities, with a + where a graph was recorded."""
    seen: list[str] = []
    models, plain = trainer.actor_critic, token_logprobs

    def note(name: str) -> None:
        who = getattr(models.policy, "active_adapter", name) if name == "policy" else name
        seen.append(who + "+" * torch.is_grad_enabled())

    for name in ("policy", "reference", "value"):
        if getattr(models, name) is not None:
            backbone(getattr(models, name)).register_forward_hook(lambda *_, name=name: note(name))
    monkeypatch.setattr(actor_critic, "token_logprobs", lambda *args: note("head") or plain(*args))
    return seen


def test_each_model_runs_once_per_update(trainer_of, kind, monkeypatch):
    """With both, the language head runs once for the policy and once for the reference."""
    trainer = trainer_of(side_by_side=False)  # which has an order
    seen = watch_forwards(trainer, monkeypatch)
    lora, own = trainer.actor_critic.reference is None, kind[1] == "separate"
    policy = ["default+" if lora else "policy+", "head+"]
    value = {"separate": ["value+"], "adapter": ["value+"], "shared_trunk": []}[kind[1]]
    for _ in range(2):
        seen.clear()
        rollout = prepared(trainer)
        assert seen == [*policy, *value, "reference", "head"]
        assert trainer._kept is not None
        assert not any(getattr(rollout, name).requires_grad for name in ("logprobs", "values", "entropy"))
        trainer.update(rollout)
        assert seen == [*policy, *value, "reference", "head"], "the update made another forward"
        assert trainer._kept is None
    assert (trainer.actor_critic.value is not None) == own
    forgetful = without_keeping(trainer_of(side_by_side=False))  # what is saved by that
    seen = watch_forwards(forgetful, monkeypatch)
    forgetful.update(prepared(forgetful))
    assert [name.strip("+") for name in seen].count("head") == 3


def test_weights_after_two_updates_are_the_same_to_the_last_bit(trainer_of):
    one, two = trainer_of(), without_keeping(trainer_of())
    start = weights(one)
    for _ in range(2):
        mine, theirs = (trainer.update(prepared(trainer)) for trainer in (one, two))
        assert mine == theirs
        assert mine["step0_ratio_error"] == 0.0
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(two)[name]), name
        assert not torch.equal(tensor, start[name]), name


def test_the_gradient_is_the_papers(trainer_of, kind):
    """At ratio 1: -sum(A * grad logp) / tokens, and sum((V - R) * grad V) / tokens, from models built anew."""
    folders, name = kind
    trainer = trainer_of(max_grad_norm=1e9, temperature=0.8)
    rollout, seen = prepared(trainer), watch_steps(trainer)
    assert trainer._kept is not None
    trainer.update(rollout)
    fresh = build_actor_critic(folders[0], value_model=None if name == "shared_trunk" else folders[1], value_kind=name)
    tokens = sum(map(len, rollout.response_ids))
    outputs = fresh(rollout.batch(range(12), 3, "cpu"), 0.8, ("policy",))
    (-(rollout.advantages * outputs.logprobs).sum() / tokens).backward()
    outputs = fresh(rollout.batch(range(12), 3, "cpu"), 0.8, ("value",))
    weight = 0.3 if name == "shared_trunk" else 1.0
    (weight * 0.5 * (outputs.values - rollout.returns).square().sum() / tokens).backward()
    same(seen[0], {name: p.grad for name, p in fresh.named_parameters() if p.grad is not None})


@TWO
def test_gradient_checkpointing_recomputes_what_is_kept(trainer_of):
    """Each piece under the adapter that was active when it was collected."""
    plain, checkpointed = trainer_of(), trainer_of(gradient_checkpointing=True)
    seen = []
    for trainer in (checkpointed, plain):
        rollout, steps = prepared(trainer), watch_steps(trainer)
        assert trainer._kept is not None
        trainer.update(rollout)
        seen.append(steps[0])
    same(*seen, tolerance=1e-6)


@TWO
@pytest.mark.parametrize(
    "changes", [{"inner_epochs": 2}, {"minibatch_size": 6}, {"tokens_per_microbatch": 150}], ids=lambda c: next(iter(c))
)
def test_nothing_is_kept_where_the_update_needs_more(trainer_of, changes):
    trainer = trainer_of(**changes)
    rollout = prepared(trainer)
    assert trainer._kept is None
    assert not rollout.logprobs.requires_grad
    assert trainer.update(rollout)["step0_ratio_error"] == 0.0


@TWO
def test_nothing_is_kept_with_several_processes(trainer_of, monkeypatch):
    """DDP sums gradients for the forward that it saw last."""
    trainer = trainer_of()
    rollout = prepared(trainer)
    assert trainer._kept is not None
    trainer._kept = None
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
    lengths = [len(p) + len(r) for p, r in zip(rollout.prompt_ids, rollout.response_ids, strict=True)]
    assert not trainer._fits_at_once(rollout.plan, lengths)
    outputs = trainer._collected(rollout, rollout.plan[0][0], ("policy", "value"))
    assert trainer._kept is None
    assert outputs.values is not None


# -- stages by hand ----------------------------------------------------------------------------------------


@TWO
def test_a_rollout_may_be_used_twice(trainer_of):
    """The second time from the weights as they are then: a ratio that is no longer 1."""
    one, two = trainer_of(learning_rate=1e-2), without_keeping(trainer_of(learning_rate=1e-2))
    for trainer in (one, two):
        rollout = prepared(trainer)
        first, second = trainer.update(rollout), trainer.update(rollout)
        assert first["step0_ratio_error"] == 0.0
        assert second["step0_ratio_error"] > 1e-3
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(two)[name]), name


@TWO
def test_rollouts_may_be_used_in_another_order(trainer_of):
    """What is kept is the last one's; an update on another one makes its own forward, and so does the last one's later,
    since the weights have moved."""
    settings = {"learning_rate": 1e-2, "updates": 9}
    one, two = trainer_of(**settings), without_keeping(trainer_of(**settings))
    for trainer in (one, two):
        older = prepared(trainer)
        trainer.update_index += 1
        newer = prepared(trainer)
        assert older.response_ids != newer.response_ids
        assert trainer.update(older)["step0_ratio_error"] == 0.0
        assert trainer.update(newer)["step0_ratio_error"] > 1e-3
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(two)[name]), name


@TWO
def test_evaluating_between_the_stages_changes_nothing(trainer_of):
    rows = [{"prompt": "Count to two", "number": 2}]
    one, two = trainer_of(eval_rows=rows), trainer_of(eval_rows=rows)
    rollout = prepared(one)
    one.evaluate()
    one.update(rollout)
    two.update(prepared(two))
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(two)[name]), name


@TWO
def test_a_broken_row_is_found_and_no_step_is_taken(trainer_of):
    """A return so large that its square is infinite: only that row's own loss shows it."""
    trainer = trainer_of()
    before, rollout = weights(trainer), prepared(trainer)
    assert trainer._kept is not None
    rollout.returns[3, 0] = 1e30
    with pytest.raises(RunStopped, match=r"update 1: loss is inf in row 3, prompt 'Count to "):
        trainer.update(rollout)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    rollout.advantages[5, 0] = math.nan
    with pytest.raises(RunStopped, match=r"advantage is nan at response token 0 \(id \d+\) in row 5"):
        trainer.update(rollout)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


@TWO
def test_a_broken_model_is_found_while_collecting(trainer_of):
    trainer = trainer_of()
    with torch.no_grad():
        trainer.actor_critic.value_head.bias.fill_(math.nan)
    with pytest.raises(RunStopped, match=r"value is nan at response token 0"):
        trainer.collect(trainer.next_prompts())


@TWO
def test_norms_are_of_what_is_clipped(trainer_of, kind):
    """Policy and value model each on its own; on a shared trunk all together, under one name."""
    free, clipped = trainer_of(max_grad_norm=1e9), trainer_of(max_grad_norm=1e-3)
    steps = [watch_steps(trainer) for trainer in (free, clipped)]
    metrics = [trainer.update(prepared(trainer)) for trainer in (free, clipped)]
    if kind[1] == "shared_trunk":
        whole = [math.hypot(norm(seen[0], False), norm(seen[0], True)) for seen in steps]
        assert "value_grad_norm" not in metrics[0]
        assert [m["policy_grad_norm"] for m in metrics] == pytest.approx([whole[0]] * 2, rel=1e-4)
        assert whole[1] == pytest.approx(1e-3, rel=1e-2)
        for name, gradient in steps[1][0].items():  # one factor for all
            np.testing.assert_allclose(gradient, steps[0][0][name] * (1e-3 / whole[0]), rtol=2e-3, atol=1e-9)
        assert any(is_value(name) for name in steps[1][0])
        return
    for value, name in ((False, "policy_grad_norm"), (True, "value_grad_norm")):
        assert metrics[0][name] == pytest.approx(norm(steps[0][0], value), rel=1e-4)
        assert norm(steps[1][0], value) == pytest.approx(1e-3, rel=1e-2)
