"""A kept update: comes back exactly, holds what was logged and the state before it, and changes nothing of the run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import ppo_numpy as slow
from reference.saved_run import ROWS, SMALL, make
from reference.tiny_chain import chain
from transformers import TrainerCallback

from rlhf.config import resume_settings
from rlhf.errors import InputError
from rlhf.ppo import run as ppo_run
from rlhf.ppo.rollout import ReadyRollout
from rlhf.ppo.saved import Origin, load_rollout, read_logged, save_rollout, saved_updates, update_folder
from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.rows.records import Prompt


@pytest.fixture
def folders(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_rollout(one: ReadyRollout, other: ReadyRollout) -> None:
    for item in dataclasses.fields(ReadyRollout):
        a, b = getattr(one, item.name), getattr(other, item.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert a.numpy().tobytes() == b.numpy().tobytes(), item.name  # -0.0 and NaN too
        else:
            assert a == b, item.name


def odd_rollout(rows: int = 3, width: int = 4, update: int = 6, first: float = 0.0) -> ReadyRollout:
    """Every number another one, among them those that text would not keep."""
    lengths = [width - i % 2 for i in range(rows)]
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    columns = {}
    for place, name in enumerate(
        ("logprobs", "reference_logprobs", "entropy", "values", "rewards", "advantages", "returns", "engine_logprobs")
    ):
        numbers = first + place + torch.arange(rows * width).view(rows, width) / 7
        columns[name] = torch.where(mask, numbers, 0.0)
    columns["values"][0, 0], columns["returns"][0, 1] = -0.0, math.nan
    columns["advantages"][0, 1] = math.inf
    messages = [{"role": "system", "content": "Ünïcode\n\x00"}, {"role": "user", "content": "<b> ☃"}]
    return ReadyRollout(
        prompts=[Prompt(messages, {"n": i, "deep": [1, {"x": None}], "f": 0.1}, i == 0) for i in range(rows)],
        prompt_ids=[[5, 6, 7 + i] for i in range(rows)],
        response_ids=[[10 + i] * n for i, n in enumerate(lengths)],
        texts=[f"text {i}\ud7ff" for i in range(rows)],
        stopped=torch.tensor([i % 2 == 0 for i in range(rows)]),
        mask=mask,
        plan=[[[0], list(range(1, rows))]],
        update=update,
        raw_scores=torch.arange(rows) / 3 + first,
        scores=torch.arange(rows) / 9 + first,
        own_scores={},
        used=torch.arange(rows) % 2 == 0,
        **columns,
    )


# -- the file ----------------------------------------------------------------------------------------------


def test_a_rollout_comes_back_exactly(tmp_path):
    rollout = odd_rollout()
    path = save_rollout(tmp_path, rollout, 0)
    assert path.name == "rollout-0.pt"
    same_rollout(load_rollout(tmp_path), rollout)
    same_rollout(load_rollout(tmp_path, 0), rollout)
    silent = dataclasses.replace(rollout, engine_logprobs=None, importance=None)
    save_rollout(tmp_path, silent, 0)
    same_rollout(load_rollout(tmp_path), silent)


def test_columns_that_json_does_not_know_become_text(tmp_path):
    rollout = odd_rollout()
    prompts = [Prompt(p.messages, {"when": Path("a/b")}) for p in rollout.prompts]
    save_rollout(tmp_path, dataclasses.replace(rollout, prompts=prompts), 0)
    assert load_rollout(tmp_path).prompts[0].columns == {"when": "a/b"}


def test_the_rows_of_all_processes(tmp_path):
    one, two = odd_rollout(3, 4), odd_rollout(2, 6, first=100.0)
    save_rollout(tmp_path, one, 0)
    save_rollout(tmp_path, two, 1)
    both = load_rollout(tmp_path)
    same_rollout(load_rollout(tmp_path, 1), two)
    assert len(both) == 5
    assert both.texts == one.texts + two.texts
    assert both.prompt_ids == one.prompt_ids + two.prompt_ids
    assert both.plan == [[[0], [1, 2], [3], [4]]]
    assert both.logprobs.shape == (5, 6)
    for i in range(5):
        own, row = (one, i) if i < 3 else (two, i - 3)
        n = len(own.response_ids[row])
        for name in ("logprobs", "entropy", "values", "rewards", "engine_logprobs"):
            np.testing.assert_array_equal(getattr(both, name)[i, :n], getattr(own, name)[row, :n])
            assert (getattr(both, name)[i, n:] == 0).all()
        assert both.mask[i].tolist() == [True] * n + [False] * (6 - n)
        assert both.scores[i] == own.scores[row]
    (tmp_path / "rollout-0.pt").unlink()
    with pytest.raises(InputError, match=r"rollout-0\.pt: no such file"):
        load_rollout(tmp_path)


@pytest.mark.parametrize("what", ["short", "empty", "text", "other", "missing", "narrow", "mask", "prompts"])
def test_a_file_that_is_not_whole_is_refused_in_one_line(tmp_path, what):
    path = save_rollout(tmp_path, odd_rollout(), 0)
    content = torch.load(path, weights_only=True)
    if what in ("short", "empty", "text"):
        whole = path.read_bytes()
        path.write_bytes({"short": whole[:-500], "empty": b"", "text": b"hello\nworld"}[what])
    else:
        changes: Any = {
            "other": {"some": "thing"},
            "missing": {name: value for name, value in content.items() if name != "mask"},
            "narrow": content | {"rewards": content["rewards"][:, :2]},
            "mask": content | {"mask": torch.ones_like(content["mask"])},
            "prompts": content | {"prompts": "[]"},
        }
        torch.save(changes[what], path)
    with pytest.raises(InputError, match=r"rollout-0\.pt: cut short or no saved rollout") as caught:
        load_rollout(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


# -- a run that keeps updates ------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_run_keeps(tmp_path, folders):
    """Every second update; what was logged of it; the state is the checkpoint before it, bit for bit."""
    run = tmp_path / "run"
    kept: dict[int, dict] = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            step = state.global_step
            kept[step] = torch.load(run / f"checkpoint-{step}/ppo.pt", weights_only=True)

    make(run, *folders, callbacks=[Keep()]).train()
    assert saved_updates(run) == [2, 4]
    for update in (2, 4):
        folder = update_folder(run, update)
        line = lines(run)[update - 1]
        assert line["step"] == update
        assert read_logged(folder) == line
        assert load_rollout(folder).update == update - 1
        state = torch.load(folder / "state/ppo.pt", weights_only=True)
        assert state["update_index"] == update - 1
        before = kept[update - 1]
        assert state.keys() == before.keys()
        assert all(torch.equal(state["trained"][name], tensor) for name, tensor in before["trained"].items())
        assert str(state["optimizer"]) == str(before["optimizer"])
        assert str(state["random"]) == str(before["random"])
        rest = set(state) - {"trained", "optimizer", "random"}
        assert {name: state[name] for name in rest} == {name: before[name] for name in rest}
    assert not list((run / "rollouts").glob(".*"))

    other = make(tmp_path / "other", *folders)  # the saved state is a checkpoint: a run can go on from it
    other.train(resume_from_checkpoint=update_folder(run, 2) / "state")
    plain = [{name: value for name, value in row.items() if "second" not in name} for row in lines(run)[1:]]
    again = [{name: value for name, value in row.items() if "second" not in name} for row in lines(tmp_path / "other")]
    assert again == plain


def test_keeping_changes_nothing_of_the_run(tmp_path, folders):
    seen = []
    for every in (0, 1):
        run = tmp_path / f"every{every}"
        make(run, *folders, save_rollouts=every, updates=2, save_steps=2).train()
        seen.append([{name: value for name, value in row.items() if "second" not in name} for row in lines(run)])
        assert saved_updates(run) == [1, 2][: 2 * every]
        assert (run / "rollouts").exists() == bool(every)
    assert seen[0] == seen[1]
    keys = [resume_settings(PPOConfig(save_rollouts=every), PPOConfig) for every in (0, 3)]
    assert keys[0] == keys[1]  # so a run may be resumed with another value
    with pytest.raises(InputError, match="save_rollouts=-1 must be 0 or more"):
        PPOConfig(save_rollouts=-1)


def test_an_update_that_fails_leaves_nothing(tmp_path, folders):
    run = tmp_path / "run"
    trainer = make(run, *folders)
    plain = trainer.update

    def failing(rollout):
        if trainer.update_index == 1:
            assert (run / "rollouts/.update-2.writing/state/ppo.pt").is_file()  # the state, before the update
            raise RuntimeError("out of memory")
        return plain(rollout)

    trainer.update = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert saved_updates(run) == []
    assert list((run / "rollouts").iterdir()) == []
    make(run, *folders).train(resume_from_checkpoint=True)
    assert saved_updates(run) == [2, 4]


def test_saved_numbers_against_the_slow_loops(tmp_path, folders):
    """From the file alone: rewards, returns and advantages follow from the saved columns, and the log from them."""
    run = tmp_path / "run"
    make(run, *folders, normalize_scores=False, missing_eos="subtract", missing_eos_penalty=0.5).train()
    folder = update_folder(run, 4)
    rollout, logged = load_rollout(folder), read_logged(folder)
    lengths = [len(ids) for ids in rollout.response_ids]
    rows = lambda x: [row[:n].double().tolist() for row, n in zip(x, lengths, strict=True)]  # noqa: E731
    logprobs, reference = rows(rollout.logprobs), rows(rollout.reference_logprobs)
    kl = [[p - q for p, q in zip(a, b, strict=True)] for a, b in zip(logprobs, reference, strict=True)]
    scores = [float(raw) - 0.5 * (not stop) for raw, stop in zip(rollout.raw_scores, rollout.stopped, strict=True)]
    np.testing.assert_allclose(rollout.scores, scores, atol=1e-6)
    coefficient = logged["kl_coef"]
    assert coefficient != 0.3  # adapted since
    rewards = [slow.token_rewards(score, row, coefficient) for score, row in zip(scores, kl, strict=True)]
    both = [slow.gae(r, v, 0.98, 0.9) for r, v in zip(rewards, rows(rollout.values), strict=True)]
    mean, var = slow.moments([advantages for advantages, _ in both])
    for i, (advantages, returns) in enumerate(both):
        np.testing.assert_allclose(rows(rollout.rewards)[i], rewards[i], atol=1e-5)
        np.testing.assert_allclose(rows(rollout.returns)[i], returns, atol=1e-5)
        np.testing.assert_allclose(
            rows(rollout.advantages)[i], (np.array(advantages) - mean) / math.sqrt(var), atol=2e-5
        )
    np.testing.assert_allclose(logged["kl_nats"], np.mean([sum(row) for row in kl]), atol=1e-6)
    np.testing.assert_allclose(logged["score"], np.mean(rollout.raw_scores.numpy()), atol=1e-6)
    np.testing.assert_allclose(logged["response_tokens"], np.mean(lengths), atol=1e-9)
    np.testing.assert_allclose(logged["entropy_nats"], np.mean([np.mean(r) for r in rows(rollout.entropy)]), atol=1e-6)


# -- where a run came from ---------------------------------------------------------------------------------


def test_the_origin_of_a_run(tmp_path, folders, tiny_tokenizer, monkeypatch):
    policy, reward = folders
    monkeypatch.chdir(tmp_path)  # a relative name is kept so that it holds elsewhere
    changes = {"save_rollouts": 1, "updates": 1, "clip_value": math.inf}
    make(Path("run"), policy.relative_to(tmp_path), reward.relative_to(tmp_path), **changes).train()
    monkeypatch.chdir("/")
    origin = Origin.read(update_folder(tmp_path / "run", 1))
    assert (origin.model, origin.value_model, origin.value_from_policy) == (str(policy), str(reward), False)
    assert origin.args() == PPOConfig(**SMALL | changes | {"output_dir": "run"})
    assert origin.args(report_to=None, output_dir="x").output_dir == "x"
    assert origin.differences() == []
    there = dataclasses.replace(origin, machine=origin.machine | {"torch": "1.0", "threads": 99})
    assert [text.split(" then")[0] for text in there.differences()] == ["threads 99", "torch 1.0"]


def test_objects_have_no_place(tmp_path, folders, tiny_model, tiny_tokenizer):
    config = PPOConfig(**{"output_dir": str(tmp_path / "run")} | SMALL | {"save_rollouts": 1, "updates": 1})
    score = lambda completions, **columns: [float(len(text)) for text in completions]  # noqa: E731
    PPOTrainer(tiny_model, score, config, ROWS, processing_class=tiny_tokenizer).train()
    origin = Origin.read(update_folder(tmp_path / "run", 1))
    assert (origin.model, origin.value_model, origin.value_from_policy) == (None, None, True)
    (update_folder(tmp_path / "run", 1) / "run.json").write_text('{"some": "thing"}')
    with pytest.raises(InputError, match=r"run\.json: was not written by save_rollouts"):
        Origin.read(update_folder(tmp_path / "run", 1))


def test_the_other_processes_wait_while_the_first_writes(tmp_path, folders, monkeypatch):
    seen: list[list[str]] = []
    kept = tmp_path / "run" / "rollouts"
    monkeypatch.setattr(ppo_run, "wait_for_all", lambda: seen.append([path.name for path in kept.iterdir()]))
    make(tmp_path / "run", *folders, save_rollouts=1, updates=1).train()
    assert seen == [[".update-1.writing"], ["update-1"]]
