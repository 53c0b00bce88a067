"""Step scores in PPO: where they land, that 0 changes nothing, exact resuming, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import ppo_numpy as slow
from reference import tiny_chain
from reference.ppo_runs import StopAfter, lines, make, prepared, weights

from reward_models import ProcessModel
from reward_models.process import About, step_changes
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.scalar import new_scalar_model
from rlhf.ppo import math as ppo_math
from rlhf.ppo.saved import load_rollout, save_rollout
from rlhf.rows.records import Prompt
from rlhf.scores import score_responses


@pytest.fixture
def base(tmp_path, tiny_model, tiny_tokenizer):
    tiny_chain.shake(tiny_model, 0, 0.05)
    return tiny_chain.save_base(tmp_path, tiny_model, tiny_tokenizer)


def even_tokens(prompts, completions, completion_ids, give_step_scores=None, **columns):
    """Score 1 for every response; at every even token of it, a step score of its id / 1000."""
    if give_step_scores:
        give_step_scores([[i / 1000 if n % 2 == 0 else 0.0 for n, i in enumerate(ids)] for ids in completion_ids])
    return [1.0 + len(ids) / 10 for ids in completion_ids]


def without(prompts, completions, completion_ids, **columns):
    return even_tokens(prompts, completions, completion_ids)


def test_token_rewards_add_step_scores_where_they_stand():
    scores, kl = torch.tensor([2.0, -1.0]), torch.tensor([[0.5, 1.0, 7.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    steps = torch.tensor([[0.25, 0.0, 99.0], [0.0, -0.5, 0.125]])
    expected = torch.tensor([[0.25 - 0.05, 2.0 - 0.1, 0.0], [-0.1, -0.5 - 0.2, -1.0 + 0.125 - 0.3]])
    torch.testing.assert_close(ppo_math.token_rewards(scores, kl, mask, 0.1, steps), expected, atol=1e-6, rtol=0)
    plain = ppo_math.token_rewards(scores, kl, mask, 0.1)
    assert torch.equal(ppo_math.token_rewards(scores, kl, mask, 0.1, torch.zeros_like(kl)), plain)


def test_rewards_hold_the_step_scores_times_weight_and_coefficient(tmp_path, base):
    trainer = make(tmp_path, base, even_tokens, step_score_coef=0.5, reward_weights=[2.0], missing_eos="off")
    rollout = prepared(trainer)
    for row, ids in enumerate(rollout.response_ids):
        kl = rollout.kl[row, : len(ids)].tolist()
        expected = slow.token_rewards(float(rollout.scores[row]), kl, trainer.kl_coef)
        expected = [
            r + (0.5 * 2.0 * i / 1000 if n % 2 == 0 else 0.0)
            for n, (r, i) in enumerate(zip(expected, ids, strict=True))
        ]
        np.testing.assert_allclose(rollout.rewards[row, : len(ids)].numpy(), expected, atol=1e-6)
        assert not rollout.rewards[row, len(ids) :].any()
    np.testing.assert_allclose(
        rollout.raw_scores, [2.0 * (1 + len(ids) / 10) for ids in rollout.response_ids], rtol=1e-6
    )
    metrics = trainer.update(rollout)
    assert metrics["step_score"] == pytest.approx(float(rollout.step_scores.sum()) / len(rollout), rel=1e-6)


@pytest.mark.slow
def test_a_coefficient_of_0_is_to_the_bit_the_run_without(tmp_path, base):
    runs = {}
    for name, function, changes in [
        ("plain", without, {}),
        ("zero", even_tokens, {"step_score_coef": 0.0}),
        ("some", even_tokens, {"step_score_coef": 0.5}),
    ]:  # fmt: skip
        (tmp_path / name).mkdir()
        trainer = make(tmp_path / name, base, function, **changes)
        trainer.train()
        runs[name] = weights(trainer)
    assert all(torch.equal(runs["plain"][key], runs["zero"][key]) for key in runs["plain"])
    assert not all(torch.equal(runs["plain"][key], runs["some"][key]) for key in runs["plain"])


def save_process_model(folder, base, tokenizer):
    model = new_scalar_model(base, seed=3)
    tiny_chain.shake(model, 3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    About(separator=" ", template_hash=chat.template_hash(tokenizer)).save(folder)
    return folder


def test_a_process_models_step_scores_sum_to_its_score_less_1(tmp_path, base, tiny_tokenizer):
    folder = save_process_model(tmp_path / "prm", base, tiny_tokenizer)
    model = ProcessModel.load(folder, device="cpu")
    trainer = make(tmp_path, base, model, step_score_coef=1.0, missing_eos="off", temperature=0.8)
    rollout = prepared(trainer)
    for row, text in enumerate(rollout.texts):
        turns = [*rollout.prompts[row].messages, {"role": "assistant", "content": text}]
        steps = [] if not text.strip() else step_changes(model.step_probabilities([turns])[0], "min")
        sums = float(rollout.step_scores[row].sum())
        assert sums == pytest.approx(float(rollout.raw_scores[row]) - 1 if text.strip() else 0.0, abs=1e-5)
        assert int((rollout.step_scores[row] != 0).sum()) <= len(steps)
    assert float(rollout.step_scores.abs().sum()) > 0
    save_rollout(tmp_path, rollout)
    assert torch.equal(load_rollout(tmp_path).step_scores, rollout.step_scores)


@pytest.mark.slow
def test_resume_with_step_scores_is_exact(tmp_path, base, tiny_tokenizer):
    folder = save_process_model(tmp_path / "prm", base, tiny_tokenizer)
    settings = {"updates": 4, "save_steps": 2, "step_score_coef": 0.5}
    functions = lambda: [ProcessModel.load(folder, device="cpu"), even_tokens]  # noqa: E731
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = make(tmp_path / "a", base, functions(), **settings)
    whole.train()
    make(tmp_path / "b", base, functions(), callbacks=[StopAfter(3)], **settings).train()
    torch.manual_seed(12345)
    resumed = make(tmp_path / "b", base, functions(), **settings)
    resumed.train(resume_from_checkpoint=True)
    one, two = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    drop = lambda row: {k: v for k, v in row.items() if "second" not in k}  # noqa: E731
    assert [*map(drop, lines(tmp_path / "a", "metrics.jsonl"))] == [*map(drop, lines(tmp_path / "b", "metrics.jsonl"))]
    other = make(tmp_path / "b", base, functions(), **(settings | {"step_score_coef": 0.25}))
    with pytest.raises(InputError, match=r"made with step_score_coef=0\.5, now 0\.25"):
        other.train(resume_from_checkpoint=True)


# ------------------------------------------------------------------------------------------------ refused

PROMPTS = [Prompt([{"role": "user", "content": text}]) for text in ("a", "b")]
IDS = [[1, 2, 3], [4]]


def scored(*functions, weights=(1.0, 1.0), **more):
    steps = torch.zeros(2, 3)
    score_responses(functions, weights[: len(functions)], PROMPTS, ["x", "y"], IDS, step_scores=steps, **more)
    return steps


def giving(values):
    def function(prompts, completions, give_step_scores, **columns):
        give_step_scores(values)
        return [0.0] * len(prompts)

    return function


def test_several_functions_add_up_by_their_weights():
    steps = scored(giving([[1, 0, 2], [3]]), giving([[0, 1, 0], [1]]), weights=(1.0, -0.5))
    assert steps.tolist() == [[1.0, -0.5, 2.0], [2.5, 0.0, 0.0]]
    assert scored(giving([[1, 0, 2], [3]]), lambda prompts, **columns: [0.0, 0.0]).tolist() == [[1, 0, 2], [3, 0, 0]]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([[1, 0, 2]], "gave step scores of 1 responses, asked for 2"),
        ([[1, 0], [3]], "gave 2 step scores for the 3 tokens of response 0"),
        ([[1, 0, 2], [float("nan")]], "a step score for response 1 that is no finite number"),
        ([[1, None, 2], [3]], "a step score for response 0 that is no finite number"),
        ([[1, "x", 2], [3]], "a step score for response 0 that is no finite number"),
    ],
)
def test_wrong_step_scores_are_refused(values, says):
    with pytest.raises(InputError, match=says):
        scored(giving(values))


def test_a_run_that_asks_for_step_scores_needs_a_function_that_gives_them():
    with pytest.raises(InputError, match=r"step_score_coef: none of <lambda> gives step scores; use a process model"):
        scored(lambda prompts, **columns: [0.0, 0.0])


def test_step_scores_that_come_too_late_are_dropped():
    import time

    def late(prompts, completions, give_step_scores, **columns):
        time.sleep(0.3)
        give_step_scores([[1, 1, 1], [1]])
        return [0.0, 0.0]

    failures: list[str] = []
    steps = torch.zeros(2, 3)
    score_responses([late], [1.0], PROMPTS, ["x", "y"], IDS, step_scores=steps, timeout_seconds=0.05, failures=failures)
    time.sleep(0.4)
    assert failures
    assert not steps.any()
