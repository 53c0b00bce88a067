"""PPO-ptx: its gradient by hand, what may not change it, the rows of each step, resume, the alignment tax."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import forked, ptx_worker
from reference.ppo_runs import Graphs, StopAfter, is_value, lines, make, prepared, same, watch_steps, weights
from reference.prepared import prepared_models
from reference.tiny_chain import chain

from reward_models import RewardModel
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models import packing
from rlhf.models.loading import load_tokenizer
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.pretraining_mix import read_documents

FOX, TEN = "The quick brown fox jumps over the lazy dog. ", "Count to ten. "
TEXTS = [{"text": FOX * (1 + n % 4) + TEN * (n % 3)} for n in range(14)]
TALKS = [
    {"prompt": f"Count to {n}.", "completion": "one two three " * n, "source": "a book"} for n in range(1, 7)
]  # rows with a column of their own
SETTINGS = {"pretraining_coef": 3.0, "pretraining_rows": 4, "pretraining_length": 48, "pretraining_held_out": 3}
ONE_STEP = {"inner_epochs": 1, "minibatch_size": 12, "max_grad_norm": 1e9}


def written(path: Path, rows=(*TEXTS, *TALKS)) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(params=["full", "lora"])
def folders(request, tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, request.param == "lora")


@pytest.fixture
def full(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)


def ptx(tmp_path: Path, model, functions=None, data: str | None = None, **changes):
    data = data or written(tmp_path / "pretraining.jsonl")
    given = {} if functions is None else {"functions": functions}
    return make(tmp_path, model, **given, **(SETTINGS | {"pretraining_data": data} | changes))


# -- the gradient ----------------------------------------------------------------------------------------------


def test_no_graph_outlives_its_micro_batch(tmp_path, folders):
    trainer, graphs = ptx(tmp_path, folders[0], **ONE_STEP, tokens_per_microbatch=1), Graphs()
    rollout, mix = prepared(trainer), trainer.pretraining
    mix._loss = graphs.one_at_a_time(mix._loss)
    trainer.update(rollout)
    assert graphs.made > 1
    assert graphs.alive() == 0


def test_the_gradient_is_ppos_plus_that_of_cross_entropy_by_hand(tmp_path, folders):
    """Every row alone through the model's own logits, without padding, and PyTorch's cross entropy."""
    trainer = ptx(tmp_path, folders[0], RewardModel.load(folders[1]), **ONE_STEP)
    mix, seen = trainer.pretraining, watch_steps(trainer)
    metrics = trainer.update(prepared(trainer))
    plain = make(tmp_path, folders[0], RewardModel.load(folders[1]), **ONE_STEP)
    alone = watch_steps(plain)
    plain.update(prepared(plain))
    fresh = prepared_models(folders[0], value_model=folders[1])
    rows = [mix.rows[i] for i in mix.draws.prompt_rows(0, 4, len(mix.rows))]
    total, count = torch.zeros(()), sum(sum(row.trained) for row in rows)
    with fresh.active("policy") as model:
        for row in rows:
            logits = model(torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[1:]), reduction="none")
            total = total + losses[torch.tensor(row.trained)].sum()
        (3.0 * total / count).backward()
    by_hand = {name: p.grad for name, p in fresh.named_parameters() if p.grad is not None}
    assert by_hand
    assert not any(is_value(name) for name in by_hand)
    expected = {name: gradient + by_hand.get(name, 0.0) for name, gradient in alone[0].items()}
    same(seen[0], expected)
    assert metrics["pretraining_loss"] == pytest.approx(float(total.detach()) / count, abs=1e-5)
    moved = max(float((seen[0][name] - alone[0][name]).abs().max()) for name in by_hand)
    assert moved > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, pytest.param(True, marks=pytest.mark.long)])
def test_micro_batches_change_no_gradient(tmp_path, folders, padded, monkeypatch):
    if padded:
        monkeypatch.setattr(packing, "can_pack", lambda model: False)
    gradients, losses = [], []
    for tokens in (10**6, 50, 1):
        trainer = ptx(tmp_path, folders[0], tokens_per_microbatch=tokens, inner_epochs=1, max_grad_norm=1e9)
        seen = watch_steps(trainer)
        losses.append(trainer.update(prepared(trainer))["pretraining_loss"])
        gradients.append(seen[0])
    same(gradients[1], gradients[0])
    same(gradients[2], gradients[0])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_a_coefficient_of_0_is_ppo_without_it_to_the_last_bit(tmp_path, full):
    results = []
    for name, data in (("a", None), ("b", written(tmp_path / "pretraining.jsonl"))):
        (tmp_path / name).mkdir()
        changes = {} if data is None else {**SETTINGS, "pretraining_data": data, "pretraining_coef": 0.0}
        trainer = make(tmp_path / name, full[0], RewardModel.load(full[1]), **changes)
        trainer.train()
        rows = [{k: v for k, v in row.items() if "second" not in k} for row in lines(tmp_path / name, "metrics.jsonl")]
        results.append((weights(trainer), trainer.optimizer.state_dict()["state"], rows))
    (one, adam, plain), (two, other, measured) = results
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(torch.as_tensor(adam[i][k]), torch.as_tensor(other[i][k])) for i in adam for k in adam[i])
    new = {"eval_pretraining_loss", "alignment_tax_nats"}
    assert [{k: v for k, v in row.items() if k not in new} for row in measured] == plain
    assert new <= measured[-1].keys()
    assert "pretraining_loss" not in measured[-1]


def test_the_policy_stands_still_while_the_value_model_warms_up(tmp_path, full):
    trainer = ptx(tmp_path, full[0], value_warmup_updates=1)
    start = weights(trainer)
    assert "pretraining_loss" not in trainer.update(prepared(trainer))
    assert all(torch.equal(start[name], tensor) for name, tensor in weights(trainer).items() if not is_value(name))
    assert "pretraining_loss" in trainer.update(prepared(trainer))


@pytest.mark.slow
def test_training_with_it_lowers_the_held_out_loss(tmp_path, full):
    """And without it the loss stays where it was or rises: the tax is measured against the policy before PPO."""
    taxes = []
    for name, coefficient in (("with", 27.8), ("without", 0.0)):
        (tmp_path / name).mkdir()
        data = written(tmp_path / "pretraining.jsonl", TEXTS)
        changes = {"pretraining_coef": coefficient, "updates": 4, "preflight": False}
        trainer = ptx(tmp_path / name, full[0], data=data, **changes)
        at_step_0 = trainer.pretraining.alignment_tax(trainer.module)
        assert at_step_0["alignment_tax_nats"] == 0.0
        trainer.train()
        last = lines(tmp_path / name, "metrics.jsonl")[-1]
        taxes.append(last["alignment_tax_nats"])
        assert last["eval_pretraining_loss"] == pytest.approx(at_step_0["eval_pretraining_loss"] + taxes[-1], abs=1e-5)
    assert taxes[0] < -0.05
    assert taxes[0] < taxes[1] - 0.05


# -- rows ------------------------------------------------------------------------------------------------------


def config(path: str, **changes) -> PPOConfig:
    return PPOConfig(**{"pretraining_data": path, "pretraining_length": 8, **changes})


def test_every_token_of_a_text_but_the_first_is_predicted_once(tmp_path, full):
    tokenizer = load_tokenizer(full[0])
    documents = read_documents(config(written(tmp_path / "a.jsonl", TEXTS)), tokenizer)
    assert len(documents) == 14
    for row, pieces in zip(TEXTS, documents, strict=True):
        ids = tokenizer(row["text"])["input_ids"]
        assert max(len(piece.ids) for piece in pieces) <= 8
        assert all(all(piece.trained) and len(piece.trained) == len(piece.ids) - 1 for piece in pieces)
        assert [token for piece in pieces for token in piece.ids[1:]] == ids[1:]
        assert [piece.ids[0] for piece in pieces[1:]] == [piece.ids[-1] for piece in pieces[:-1]]


def test_a_text_ends_with_eos_unless_that_ends_a_turn(tmp_path, full):
    tokenizer = load_tokenizer(full[0])
    assert chat.end_of_turn_id(tokenizer) == tokenizer.eos_token_id  # ChatML's
    path = written(tmp_path / "a.jsonl", [{"text": "the fox"}, {"prompt": "the dog"}])
    rows = [pieces[0].ids for pieces in read_documents(config(path), tokenizer)]
    assert rows == [tokenizer("the fox")["input_ids"], tokenizer("the dog")["input_ids"]]
    tokenizer.eos_token = "<|endoftext|>"
    ended = [pieces[0].ids for pieces in read_documents(config(path), tokenizer)]
    assert ended == [[*ids, tokenizer.eos_token_id] for ids in rows]


def test_a_conversation_is_trained_where_a_demonstration_is(tmp_path, full, caplog):
    tokenizer = load_tokenizer(full[0])
    path = written(tmp_path / "a.jsonl", TALKS)
    (first,), *_ = read_documents(config(path, pretraining_length=200), tokenizer)
    trained = [token for token, flag in zip(first.ids[1:], first.trained, strict=True) if flag]
    assert trained == chat.encode_response(tokenizer, TALKS[0]["completion"])
    with caplog.at_level("WARNING"):
        assert len(read_documents(config(path, pretraining_length=len(first.ids)), tokenizer)) < 6
    assert "longer than pretraining_length" in caplog.text


def test_the_rows_of_a_step_follow_from_seed_and_step(tmp_path, full):
    """All come once before any comes twice, over updates and inner epochs; held-out documents never come."""
    trainer = ptx(tmp_path, full[0], pretraining_rows=3)
    mix, loss = trainer.pretraining, trainer.pretraining._loss
    seen: list[int] = []
    place = {id(row): number for number, row in enumerate(mix.rows)}
    mix._loss = lambda module, rows, role: (seen.extend(place[id(row)] for row in rows), loss(module, rows, role))[1]
    for _ in range(6):
        trainer.update(prepared(trainer))
    assert len(seen) == 6 * 4 * 3
    whole = len(seen) // len(mix.rows)
    assert whole >= 1
    for epoch in range(whole):
        part = seen[epoch * len(mix.rows) : (epoch + 1) * len(mix.rows)]
        assert len(part) - len(set(part)) <= 4  # a step that holds the end of one epoch sorts it into the next
    assert len(mix.held_out) > 0
    held = {tuple(row.ids) for row in mix.held_out}
    assert len(held) < len({tuple(row.ids) for row in mix.rows})
    again = ptx(tmp_path, full[0], pretraining_rows=3).pretraining
    assert again.rows == mix.rows
    assert again.draws.prompt_rows(7, 3, len(again.rows)) == mix.draws.prompt_rows(7, 3, len(mix.rows))
    assert ptx(tmp_path, full[0], seed=1).pretraining.rows != mix.rows


# -- resume, processes -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resume_is_exact_and_other_data_are_refused(tmp_path, folders):
    data = written(tmp_path / "pretraining.jsonl")
    settings = {"updates": 4, "save_steps": 2, "data": data, "preflight": False, "inner_epochs": 1}
    (tmp_path / "a").mkdir()
    whole = ptx(tmp_path / "a", folders[0], RewardModel.load(folders[1]), **settings)
    whole.train()
    (tmp_path / "b").mkdir()
    ptx(tmp_path / "b", folders[0], RewardModel.load(folders[1]), callbacks=[StopAfter(3)], **settings).train()
    torch.manual_seed(12345)
    moved = {**settings, "data": written(tmp_path / "moved.jsonl")}
    resumed = ptx(tmp_path / "b", folders[0], RewardModel.load(folders[1]), **moved)
    resumed.train(resume_from_checkpoint=True)
    one, two = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    drop = lambda row: {k: v for k, v in row.items() if "second" not in k}  # noqa: E731
    logs = [[drop(row) for row in lines(tmp_path / name, "metrics.jsonl")] for name in "ab"]
    assert [row.get("pretraining_loss") for row in logs[0]] == [row.get("pretraining_loss") for row in logs[1]]
    assert logs[0][-1] == logs[1][-1]
    other = {**settings, "data": written(tmp_path / "other.jsonl", TEXTS[:12]), "updates": 5}
    with pytest.raises(InputError, match="pretraining_data"):
        ptx(tmp_path / "b", folders[0], RewardModel.load(folders[1]), **other).train(resume_from_checkpoint=True)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "lora", "lora shared_trunk"])
def test_two_processes_do_what_one_does(tmp_path, tiny_model, tiny_tokenizer, kind):
    folder = tmp_path / kind.split()[0]
    folder.mkdir()
    chain(folder, tiny_model, tiny_tokenizer, kind.startswith("lora"))
    data = written(tmp_path / "pretraining.jsonl")
    alone = ptx_worker.run(tmp_path, kind, data, tmp_path / "alone")
    script = [ptx_worker.__file__, tmp_path, kind, data, tmp_path / "together.pt"]
    done = forked.shared().together(script)
    assert done.returncode == 0, done.stderr[-3000:]
    together = torch.load(tmp_path / "together.pt", weights_only=True)
    assert together["processes"] == 2
    same(together["gradients"][0], alone["gradients"][0])
    for one, other in zip(together["gradients"], alone["gradients"], strict=True):
        same(one, other, 2e-4)  # after the first step, the weights contain its rounding
    for one, other in zip(together["logs"], alone["logs"], strict=True):
        assert one.keys() == other.keys()
        for name in ("pretraining_loss", "eval_pretraining_loss", "alignment_tax_nats"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretraining_coef": -1.0}, r"pretraining_coef=-1\.0 must be 0 or more"),
        ({"pretraining_rows": 0}, "pretraining_rows=0 must be at least 1"),
        ({"pretraining_length": 1}, "pretraining_length=1 must be at least 2"),
    ],
)
def test_settings_that_cannot_be_right(changes, message):
    with pytest.raises(InputError, match=message):
        PPOConfig(**changes)


def test_rows_and_data_that_cannot_be_right(tmp_path, full):
    with pytest.raises(InputError, match="number of processes=3 must divide pretraining_rows=64"):
        PPOConfig(minibatch_size=96, rollout_size=96, pretraining_data="x").check_processes(3)
    empty = written(tmp_path / "a.jsonl", [{"text": ""}, *TEXTS])
    with pytest.raises(InputError, match=r"a\.jsonl:1: text: 0 tokens"):
        ptx(tmp_path, full[0], data=empty)
    assert len(ptx(tmp_path, full[0], data=empty, on_bad_row="drop").pretraining.rows) > 0
    with pytest.raises(InputError, match="no such file"):
        ptx(tmp_path, full[0], data=str(tmp_path / "absent.jsonl"))
    long = written(tmp_path / "b.jsonl", [{"text": "the fox " * 900}])
    with pytest.raises(InputError, match="the longest row has 600 tokens"):
        ptx(tmp_path, full[0], data=long, pretraining_length=600)
    with pytest.raises(InputError, match="nothing is left to train on"):
        ptx(tmp_path, full[0], data=written(tmp_path / "c.jsonl", TALKS), pretraining_length=3)
