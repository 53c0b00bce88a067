"""Policy and value model at the same time, each in a thread: the same results, and nothing seen of each other."""

from __future__ import annotations

import threading
import time
from contextvars import ContextVar
from functools import partial

import pytest
import torch
from reference.batches import batch_of
from reference.ppo_runs import make, prepared, same, watch_steps, weights
from reference.tiny_chain import chain
from reference.two_processes import GivenResponses

from reward_models import RewardModel
from rlhf.cpu import lora
from rlhf.cpu.side_by_side import SideBySide, cores
from rlhf.models.adapters import adapter_in_use, backbone
from rlhf.ppo.build import build_actor_critic

KINDS = [(False, "separate"), (True, "adapter"), (True, "separate")]
IDS = ["full", "lora adapter", "lora separate"]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=KINDS, ids=IDS)
def trainer_of(request, tmp_path, tiny_model, tiny_tokenizer):
    lora, kind = request.param
    folders = chain(tmp_path, tiny_model, tiny_tokenizer, lora)

    def new(**changes):
        score = RewardModel.load(folders[1])
        return make(tmp_path, folders[0], score, engine=GivenResponses(), **({"value_kind": kind} | changes))

    return new


# -- threads -----------------------------------------------------------------------------------------------


def test_tasks_run_at_the_same_time_and_answer_in_their_order():
    both = threading.Barrier(2)

    def task(number: int) -> tuple[int, int]:
        both.wait(timeout=20)  # each waits for another one: one after the other, this would time out
        return number, threading.get_ident()

    results = SideBySide(2).run([partial(task, number) for number in range(6)])
    assert [number for number, _ in results] == list(range(6))
    assert threading.get_ident() not in {thread for _, thread in results}


def test_each_has_its_share_of_the_threads_and_everyone_else_all_of_them():
    torch.set_num_threads(4)
    pair = SideBySide(2)
    assert pair.run([cores] * 5) == [2] * 5
    assert cores() == 4
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(cores()))
    thread.start()
    thread.join()
    assert later == [4]
    assert pair.run([cores] * 5) == [2] * 5


def test_one_at_once_is_the_caller():
    assert SideBySide().run([threading.get_ident, cores]) == [threading.get_ident(), 2]


def test_an_error_comes_out_once_all_have_ended():
    ended: list[int] = []

    def fails() -> None:
        raise KeyError("first")

    def slow() -> None:
        time.sleep(0.2)
        ended.append(1)

    pair = SideBySide(2)
    with pytest.raises(KeyError, match="first"):
        pair.run([fails, slow])
    assert ended == [1]
    assert pair.run([cores]) == [1]


def test_a_task_sees_what_its_caller_has_set():
    number: ContextVar[int] = ContextVar("number", default=0)
    pair = SideBySide(2)
    number.set(5)
    assert pair.run([number.get, torch.is_grad_enabled]) == [5, True]
    with torch.no_grad():
        assert pair.run([torch.is_grad_enabled] * 2) == [False, False]
    assert pair.run([torch.is_grad_enabled] * 2) == [True, True]


# -- adapters ----------------------------------------------------------------------------------------------


def test_two_adapters_on_one_backbone_at_once(tmp_path, tiny_model, tiny_tokenizer):
    """Both threads stand inside the same layer, each with its adapter on, before either goes on."""
    folders = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    models = build_actor_critic(folders[0], value_model=RewardModel.load(folders[1]))
    alone = [models(batch_of(), 1.0, (role,)) for role in ("policy", "value")]
    expected = [alone[0].logprobs, alone[1].values]
    assert models.side_by_side(processes=1)
    both = threading.Barrier(2)
    layer = backbone(models.policy).layers[1].self_attn.k_proj

    def meet(*_) -> None:
        both.wait(timeout=20)

    layer.register_forward_pre_hook(meet)
    pair = SideBySide(2)
    outputs = pair.run([partial(models, batch_of(), 1.0, (role,)) for role in ("policy", "value")])
    for mine, theirs in zip((outputs[0].logprobs, outputs[1].values), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert models.policy.active_adapter == "default"
    assert adapter_in_use(models.policy) == "default"


def test_where_an_adapter_is_more_than_fused_layers_there_is_one_for_all(tmp_path, tiny_model, tiny_tokenizer):
    folders = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    models = build_actor_critic(folders[0])
    assert lora.by_thread(models.policy)
    models.policy.base_model.model.model.layers[0].mlp.up_proj.lora_dropout["value"] = torch.nn.Dropout(0.1)
    assert not lora.by_thread(models.policy)
    assert not models.side_by_side(processes=1)


# -- PPO ---------------------------------------------------------------------------------------------------


def test_the_same_gradients_and_metrics(trainer_of):
    """And of the metrics only the times differ; micro-batches of two or three rows."""
    seen, logged = [], []
    for together in (True, False):
        trainer = trainer_of(side_by_side=together, tokens_per_microbatch=60)
        assert trainer._side_by_side.at_once == 1 + together
        rollout, steps = prepared(trainer), watch_steps(trainer)
        metrics = trainer.update(rollout)
        seen.append(steps)
        logged.append({name: value for name, value in metrics.items() if "second" not in name})
    assert len(seen[0]) == len(seen[1]) > 1
    for mine, theirs in zip(*seen, strict=True):
        same(mine, theirs)
    assert logged[0].keys() == logged[1].keys()
    for name, value in logged[0].items():
        assert value == pytest.approx(logged[1][name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"inner_epochs": 1, "minibatch_size": 12}])
def test_step_0_is_exact(trainer_of, changes):
    """The last: the forward that collects is the update's, made in one thread and gone back through in another."""
    trainer = trainer_of(side_by_side=True, **changes)
    rollout = prepared(trainer)
    assert (rollout.kl == 0).all()
    metrics = trainer.update(rollout)
    assert metrics["step0_ratio_error"] == 0.0


def test_two_runs_are_equal_to_the_last_bit(trainer_of):
    ends = []
    for _ in range(2):
        trainer = trainer_of(learning_rate=1e-2, tokens_per_microbatch=60, gradient_checkpointing=True)
        for _ in range(2):
            trainer.update(prepared(trainer))
        ends.append(weights(trainer))
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize(
    "why", ["one core", "shared trunk", "compiled", "asked", "rotary positions that grow", "a large head"]
)
def test_where_one_comes_after_the_other(tmp_path, tiny_model, tiny_tokenizer, why):
    folders = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    if why == "one core":
        torch.set_num_threads(1)
    if why == "rotary positions that grow":
        policy = build_actor_critic(folders[0])
        for part in policy.modules():
            if hasattr(part, "rope_type"):
                part.rope_type = "dynamic"
        assert not policy.side_by_side(processes=1)
        return
    if why == "a large head":
        policy = build_actor_critic(folders[0])
        assert policy.side_by_side(processes=1)
        policy.policy.base_model.model.resize_token_embeddings(4000)
        assert not policy.side_by_side(processes=1)
        return
    changes = {
        "shared trunk": {"value_kind": "shared_trunk"}, "compiled": {"compile": True}, "asked": {"side_by_side": False},
    }.get(why, {})  # fmt: skip
    trainer = make(tmp_path, folders[0], engine=GivenResponses(), **changes)
    assert trainer._side_by_side.at_once == 1
    assert not trainer.actor_critic.by_thread


def test_with_two_processes_one_backward_does_both(tmp_path, tiny_model, tiny_tokenizer):
    folders = chain(tmp_path, tiny_model, tiny_tokenizer, lora=True)
    models = build_actor_critic(folders[0])
    assert not models.side_by_side(processes=2)
    assert models.side_by_side(processes=1)
