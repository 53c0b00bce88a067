"""Scores from reward functions: calls, weights, normalisation, failures, the missing stop.

The second half is PPO on such scores: dropped responses, a reward model with another tokenizer.

    torchrun --standalone --nproc_per_node 2 tests/test_scores.py FOLDER OUTPUT.pt      # what a test below starts
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import forked, two_processes
from reference.tiny_chain import chain, save_reward_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reward_models import RewardModel
from reward_models.rules import Length, Rules
from rlhf import chat, scores
from rlhf.errors import InputError, RunStopped
from rlhf.ppo.logged import samples
from rlhf.ppo.saved import load_rollout
from rlhf.ppo.trainer import PPOConfig, PPOTrainer
from rlhf.rows.records import Prompt

CHAT = [Prompt([{"role": "user", "content": f"Question {i}?"}], {"answer": i}) for i in range(3)]
TEXT = [Prompt([{"role": "user", "content": f"Question {i}?"}], {"answer": i}, text=True) for i in range(3)]
TEXTS = ["one", "two!", ""]
IDS = [[1], [2, 3], [4]]


def run(functions, weights=None, prompts=CHAT, **extra):
    listed = scores.check_functions(functions)
    return scores.score_responses(listed, weights or [1.0] * len(listed), prompts, TEXTS, IDS, **extra)


def test_a_function_gets_messages_ids_columns_and_extras():
    seen = {}

    def function(prompts, completions, completion_ids, answer, **more):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, more=more)
        return [0.5, 1, -2.0]

    values, own = run(function, trainer_state="state")
    assert values.tolist() == [0.5, 1.0, -2.0]
    assert values.dtype == torch.float32
    assert own == {}
    assert seen["prompts"] == [p.messages for p in CHAT]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert (seen["ids"], seen["answer"], seen["more"]) == (IDS, [0, 1, 2], {"trainer_state": "state"})


def test_text_prompts_reach_it_as_text():
    def function(prompts, completions, **columns):
        assert prompts == ["Question 0?", "Question 1?", "Question 2?"]
        return [float(len(text)) for text in completions]

    assert run(function, prompts=TEXT)[0].tolist() == [3.0, 4.0, 0.0]


def test_each_prompt_of_a_mixed_set_comes_as_it_was():
    def function(prompts, completions, **columns):
        return [float(isinstance(p, str)) + 10 * isinstance(c, str) for p, c in zip(prompts, completions, strict=True)]

    assert run(function, prompts=[CHAT[0], TEXT[1], CHAT[2]])[0].tolist() == [0.0, 11.0, 0.0]


def test_a_column_that_only_some_prompts_have_is_none_elsewhere():
    prompts = [CHAT[0], Prompt(CHAT[1].messages, {"level": "hard"}), CHAT[2]]

    def function(prompts, completions, level, answer, **columns):
        assert level == [None, "hard", None]
        assert answer == [0, None, 2]
        return [1.0] * 3

    run(function, prompts=prompts)


def first(prompts, completions, **columns):
    return [1.0, 2.0, None]


def second(prompts, completions, **columns):
    return [10.0, None, 30.0]


def test_weights_and_none():
    values, own = run([first, second], [2.0, 0.1])
    np.testing.assert_allclose(values, [2 * 1 + 0.1 * 10, 2 * 2, 0.1 * 30], rtol=1e-6)
    assert own.keys() == {"score/first", "score/second"}
    np.testing.assert_equal(own["score/first"].numpy(), [1.0, 2.0, np.nan])
    np.testing.assert_equal(own["score/second"].numpy(), [10.0, np.nan, 30.0])


def test_a_score_of_zero_is_a_score():
    values, _ = run([lambda prompts, completions, **c: [0.0, 0, False], lambda prompts, completions, **c: [None] * 3])
    assert values.tolist() == [0.0, 0.0, 0.0]


def test_none_from_every_function_is_an_error():
    with pytest.raises(InputError, match=r"no reward function scored response 2 \(''\)"):
        run(first)


def test_async_functions_in_a_script_and_in_a_notebook():
    async def function(prompts, completions, **columns):
        await asyncio.sleep(0)
        return [1.0, 2.0, 3.0]

    assert run(function)[0].tolist() == [1.0, 2.0, 3.0]

    async def notebook():  # a notebook's cell runs inside a running event loop
        return run(function)[0].tolist()

    assert asyncio.run(notebook()) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "kind",
    [
        torch.tensor, np.array, tuple, list, iter, lambda x: (value for value in x), lambda x: map(np.float32, x),
        lambda x: [torch.tensor(value) for value in x], lambda x: [int(value) for value in x],
        lambda x: map(Decimal, x), lambda x: torch.tensor(x, dtype=torch.bfloat16, requires_grad=True),
        lambda x: np.array(x, dtype=np.int8), lambda x: dict(zip(x, x, strict=True)).values(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_what_scores_may_come_in(kind, timeout):
    values, _ = run(lambda prompts, completions, **c: kind([1.0, 2.0, 3.0]), timeout_seconds=timeout)
    assert values.tolist() == [1.0, 2.0, 3.0]


def test_truth_values_are_scores():
    for kind in (list, np.array, torch.tensor):
        assert run(lambda prompts, completions, **c: kind([True, False, True]))[0].tolist() == [1.0, 0.0, 1.0]  # noqa: B023


@pytest.mark.parametrize("value", [None, 1.0, "111", {"a": 1, "b": 2, "c": 3}, {1.0, 2.0, 3.0}])
def test_what_is_no_list_of_scores(value):
    with pytest.raises(InputError, match=rf"<lambda> returned a {type(value).__name__}; return a number per response"):
        run(lambda prompts, completions, **c: value, failures=[])


def test_bad_scores_name_the_function():
    def short(prompts, completions, **columns):
        return [1.0]

    def endless(prompts, completions, **columns):
        return [1.0, float("inf"), 1.0]

    with pytest.raises(InputError, match="short returned 1 scores for 3 responses"):
        run(short)
    with pytest.raises(InputError, match="endless returned inf for response 1"):
        run(endless)


def returns(*values):
    def given(prompts, completions, **columns):
        return list(values)

    return given


def raises(prompts, completions, **columns):
    raise KeyError("no such\nthing")


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (float("nan"), "nan"), (float("-inf"), "-inf"), (1e39, r"1e\+39"), (10**400, "1000"),
        ("0.5", r"a str \('0.5'\)"),
        ([1.0], "a list"), (1j, "a complex"), (np.array([1.0, 2.0]), "a ndarray"), (torch.tensor(float("nan")), "nan"),
    ],
)  # fmt: skip
def test_a_bad_number_is_an_error_or_drops_its_row(value, seen):
    with pytest.raises(
        InputError, match=rf"given returned {seen}.* for response 1, to 'Question 1\?'; .*\(1 of 3"
    ) as told:
        run(returns(1.0, value, 3.0))
    assert "\n" not in str(told.value)
    failures: list[str] = []
    values, own = run([returns(1.0, value, None), second, first], failures=failures)
    np.testing.assert_equal(values.numpy(), np.float32([12.0, np.nan, 30.0]))
    assert own.keys() == {"score/given", "score/second", "score/first"}
    np.testing.assert_equal(own["score/second"].numpy(), [10.0, np.nan, 30.0])
    np.testing.assert_equal(own["score/first"].numpy(), [1.0, np.nan, np.nan])  # it said 2 of the dropped response
    assert len(failures) == 1


def test_an_exception_is_an_error_or_drops_all_rows():
    here = Path(__file__).name
    with pytest.raises(
        RunStopped, match=rf"raises failed on 3 of 3 .* KeyError: 'no such.*thing' \({here}:\d+\)$"
    ) as told:
        run(raises)
    assert "\n" not in str(told.value)
    assert isinstance(told.value.__cause__, KeyError)
    failures: list[str] = []
    assert run([raises, second], failures=failures)[0].isnan().all()
    assert failures == [str(told.value)]


def test_an_exception_in_place_of_a_score_is_that_rows():
    async def gathered(prompts, completions, **columns):
        async def one(number):
            if number == 1:
                raise ConnectionError("server gone")
            return float(number)

        return await asyncio.gather(*map(one, range(3)), return_exceptions=True)

    with pytest.raises(RunStopped, match=r"gathered failed on 1 of 3 .*response 1, to .*ConnectionError: server gone"):
        run(gathered)
    np.testing.assert_equal(run(gathered, failures=[])[0].numpy(), np.float32([0.0, np.nan, 2.0]))


def test_mistakes_of_the_user_are_never_dropped():
    def mistaken(prompts, completions, **columns):
        raise InputError("no column 'answer'")

    with pytest.raises(InputError, match="no column 'answer'"):
        run(mistaken, failures=[])
    with pytest.raises(InputError, match="given returned 2 scores for 3 responses"):
        run(returns(1.0, 2.0), failures=[])


def test_none_from_every_function_drops_the_response():
    failures: list[str] = []
    values, own = run([first, returns(4.0, 5.0, None)], failures=failures)
    np.testing.assert_equal(values.numpy(), np.float32([5.0, 7.0, np.nan]))
    assert own["score/first"].isnan().tolist() == [False, False, True]
    assert failures == ["no reward function scored response 2 (''); all of them returned None (1 of 3 responses)"]


def test_a_function_that_is_late():
    done, logged = threading.Event(), []

    def slow(prompts, completions, log_metric, **columns):
        log_metric("seen", 1.0)
        done.wait(20)
        log_metric("seen", 2.0)
        return [1.0] * 3

    start = time.perf_counter()
    with pytest.raises(RunStopped, match=r"slow was not done after score_timeout_seconds=0\.2 on 3 of 3 responses"):
        run(slow, timeout_seconds=0.2, log_metric=lambda *call: logged.append(call), log_extra=None)
    assert time.perf_counter() - start < 10
    done.set()
    for thread in threading.enumerate():
        if thread.name == "score":
            thread.join(20)
    assert logged == [("seen", 1.0)]  # not into a later update


def test_an_async_function_that_is_late_is_cancelled():
    cancelled = threading.Event()

    async def sleepy(prompts, completions, **columns):
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(RunStopped, match=r"sleepy was not done after score_timeout_seconds=0\.2"):
        run(sleepy, timeout_seconds=0.2)
    assert cancelled.wait(10)


def test_a_functions_own_timeout_is_told_as_its_own():
    def client(prompts, completions, **columns):
        raise TimeoutError("read timed out")

    for seconds in (None, 60.0):
        with pytest.raises(RunStopped, match=r"client failed on .*TimeoutError: read timed out"):
            run(client, timeout_seconds=seconds)


def test_functions_of_one_name_are_logged_apart():
    _, own = run([first, partial(second, weight=2), second])
    assert list(own) == ["score/first", "score/second", "score/second_2"]
    _, own = run([returns(1.0, 1.0, 1.0), returns(2.0, 2.0, 2.0)])
    assert {name: float(x[0]) for name, x in own.items()} == {"score/given": 1.0, "score/given_2": 2.0}


def test_what_is_no_function():
    with pytest.raises(InputError, match=r"RewardModel\.load\('runs/reward_model'\)"):
        scores.check_functions("runs/reward_model")
    with pytest.raises(InputError, match=r"RewardModel\.load\('runs/reward_model'\)"):
        scores.check_functions([first, "runs/reward_model"])
    with pytest.raises(InputError, match="empty"):
        scores.check_functions([])
    with pytest.raises(InputError, match="int, which cannot be called"):
        scores.check_functions([7])


def test_running_moments_are_those_of_all_scores():
    draw = np.random.default_rng(0)
    batches = [draw.normal(3, 2, size=n) for n in (1, 7, 64)]
    moments = scores.RunningMoments()
    for batch in batches:
        moments = moments.with_batch(torch.tensor(batch))
    everything = np.concatenate(batches)
    np.testing.assert_allclose([moments.mean, moments.var, moments.count], [everything.mean(), everything.var(), 72])
    np.testing.assert_allclose(
        moments.normalize(torch.tensor([3.0, -1.0])),
        (np.array([3.0, -1.0]) - everything.mean()) / everything.std(),
        rtol=1e-5,
    )


def test_the_missing_stop():
    given, stopped = torch.tensor([2.0, 2.0, -3.0]), torch.tensor([True, False, False])
    assert scores.apply_missing_eos(given, stopped, "replace", 1.5).tolist() == [2.0, -1.5, -1.5]
    assert scores.apply_missing_eos(given, stopped, "subtract", 1.5).tolist() == [2.0, 0.5, -4.5]
    assert scores.apply_missing_eos(given, stopped, "off", 1.5).tolist() == [2.0, 2.0, -3.0]


# -- in PPO ------------------------------------------------------------------------------------------------

BROKEN = (2, 5, 6, 9)
HELD_OUT = [row | {"prompt": f"Again: {row['prompt']}"} for row in two_processes.PROMPTS[:5]]
PLAIN = two_processes.odd_share


def failing_share(prompts, completions, completion_ids, number, **columns):
    """Score like `odd_share`, but fail on some prompts; the other scores don't change."""
    given = PLAIN(prompts=prompts, completions=completions, completion_ids=completion_ids)
    return [float("nan") if n in BROKEN else value for n, value in zip(number, given, strict=True)]


def trainer_of(folder, policy, functions, **changes) -> PPOTrainer:
    settings = {
        "output_dir": str(folder / "run"), "updates": 2, "rollout_size": 12, "minibatch_size": 12, "inner_epochs": 1,
        "max_new_tokens": 9, "learning_rate": 0.1, "adam_epsilon": 0.1, "tokens_per_microbatch": 90, "bf16": False,
        "normalize_scores": True, "rescale_rewards": True, "kl_target_nats": 0.01, "kl_horizon": 100,
        "clip_ratio": 0.05, "max_grad_norm": 1e9, "on_score_failure": "drop", "preflight": False,
    }  # fmt: skip
    return PPOTrainer(
        str(policy), functions, PPOConfig(**(settings | changes)), two_processes.PROMPTS, HELD_OUT,
        engine=two_processes.GivenResponses(),
    )  # fmt: skip


def one_update(trainer, prompts):
    """Return the gradient of the last optimizer step, the metrics and the rollout of an update on these prompts."""
    seen, step = [], trainer.optimizer.step

    def watched():
        seen.append(two_processes.of(trainer.actor_critic))
        step()

    trainer.optimizer.step = watched
    rollout = trainer.advantages(trainer.score(trainer.collect(prompts)))
    return seen, trainer.update(rollout), rollout


@pytest.fixture
def folders(tmp_path, tiny_model, tiny_tokenizer):
    return chain(tmp_path, tiny_model, tiny_tokenizer, lora=False)


def test_dropped_rows_leave_nothing_behind(tmp_path, folders, caplog):
    """Gradient, metrics, KL coefficient and running moments equal those of a rollout without the dropped rows."""
    functions = [failing_share, two_processes.some_lengths]
    whole = trainer_of(tmp_path, folders[0], functions)
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        gradients, metrics, rollout = one_update(whole, whole.prompts)
    assert "responses dropped: failing_share returned nan for response 2, to 'Count to two, please!!'" in caplog.text
    part = trainer_of(tmp_path, folders[0], [PLAIN, two_processes.some_lengths])
    kept = [p for p in part.prompts if p.columns["number"] not in BROKEN]
    expected, plain, smaller = one_update(part, kept)
    assert metrics.pop("dropped_responses") == 4.0
    assert plain.pop("dropped_responses") == 0.0
    assert len(gradients) == len(expected) == 1
    for name, gradient in expected[0].items():
        scale = float(gradient.abs().max())
        np.testing.assert_allclose(gradients[0][name], gradient, rtol=0, atol=1e-5 * scale + 1e-12, err_msg=name)
    metrics = {name.replace("failing", "odd"): value for name, value in metrics.items()}
    assert metrics.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(whole.kl_coef, part.kl_coef, rtol=1e-7)
    np.testing.assert_allclose(*([*vars(t.moments).values()] for t in (whole, part)), rtol=1e-6)
    assert metrics["step0_ratio_error"] == 0.0  # micro-batches are those of the collection, so it is exact
    used = [n not in BROKEN for n in range(12)]
    assert rollout.used.tolist() == used
    assert (rollout.advantages[~rollout.used] == 0).all()
    columns = rollout.advantages[rollout.used, : smaller.mask.shape[1]]
    np.testing.assert_allclose(columns, smaller.advantages, atol=1e-5)
    rows = samples(rollout, 1, 4)
    assert [row["score"] is None for row in rows] == [False, False, True, False]
    assert rows[0].keys() >= {"score/failing_share", "score/some_lengths"}
    json.loads(json.dumps(rows, allow_nan=False))


def test_a_minibatch_of_which_nothing_is_left_takes_no_step(tmp_path, folders):
    """Not even Adam's momentum moves a weight."""
    trainer = trainer_of(tmp_path, folders[0], failing_share, minibatch_size=1, value_warmup_updates=0)
    gradients, metrics, _ = one_update(trainer, trainer.prompts)
    assert len(gradients) == metrics["optimizer_steps"] == 8
    assert metrics["dropped_responses"] == 4


def test_all_rows_dropped_end_the_run(tmp_path, folders):
    def none(prompts, completions, **columns):
        raise ConnectionError("no server")

    trainer = trainer_of(tmp_path, folders[0], none)
    with pytest.raises(
        RunStopped, match=r"no response of the rollout has a score: none failed on 12 of 12 .*no server"
    ):
        trainer.train()
    with pytest.raises(RunStopped, match="none failed on"):
        trainer_of(tmp_path / "strict", folders[0], none, on_score_failure="error").train()


def test_whole_runs_that_drop(tmp_path, folders):
    """With preflight, evaluation, logs and samples; parts of Rules and each function's own score are written."""
    calls = []

    def sometimes(prompts, completions, **columns):
        calls.append(len(prompts))
        return [None if i else float("nan") for i in range(len(prompts))]

    rules = Rules({"length": (1.0, Length(1, 3, 20)), "long": (0.1, Length(5, 90, 5))})
    trainer = trainer_of(
        tmp_path, folders[0], [rules, sometimes], preflight=True, eval_steps=1, save_rollouts=2, samples_logged=3
    )
    trainer.train()
    assert load_rollout(tmp_path / "run/rollouts/update-2").used.tolist() == [False] + [True] * 11
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["dropped_responses"] for line in lines] == [1.0, 1.0]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert {"score/Rules", "score/length", "score/long", "eval_score", "eval_score/length"} <= lines[0].keys()
    assert "score/sometimes" not in lines[0]  # it has no score of its own that would be used
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [row["score"] is None for row in rows] == [True, False, False] * 2
    assert rows[1]["score/Rules"] == pytest.approx(rows[1]["score/length"] + 0.1 * rows[1]["score/long"])


@pytest.mark.parametrize("changes", [{"on_score_failure": "skip"}, {"score_timeout_seconds": 0.0}])
def test_settings_that_cannot_be_right(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        PPOConfig(**changes)


# -- another tokenizer -------------------------------------------------------------------------------------


def other_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with another, smaller vocabulary in another order and a template of its own."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = [*map(chr, range(32, 127)), "\n"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<end>", "<ask>", "<say>", *reversed(characters)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<ask>", "<say>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('<say>' if m['role'] == 'assistant' else '<ask>') + m['content'] + '<end>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<say>' }}{% endif %}"
    )
    return tokenizer


def test_a_reward_model_with_another_tokenizer(tmp_path, folders, caplog):
    """The scores equal those of the text in the reward model's own template and vocabulary, computed by hand."""
    theirs = other_tokenizer()
    chat.prepare_tokenizer(theirs)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(theirs), num_key_value_heads=2, **shape))
    other = tmp_path / "other"
    model.save_pretrained(other / "base")
    theirs.save_pretrained(other / "base")
    judge = RewardModel.load(save_reward_model(other, other / "base", theirs), device="cpu")
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        trainer = trainer_of(
            tmp_path, folders[0], judge, on_score_failure="error", preflight=True, normalize_scores=False
        )
    assert "other tokens than the policy: the value model starts from the policy" in caplog.text
    assert len(trainer.processing_class) > 2 * len(theirs)
    rollout = trainer.score(trainer.collect(trainer.prompts))
    assert (rollout.values == 0).all()  # the policy under a zero head
    assert max(map(max, rollout.response_ids)) >= len(theirs)  # these ids mean nothing to the reward model
    words = theirs.get_vocab()
    for row in range(4):
        said = [words.get(c, 0) for c in rollout.texts[row]]
        asked = [words[c] for c in rollout.prompts[row].messages[0]["content"]]
        ids = [words["<ask>"], *asked, words["<end>"], words["<say>"], *said, words["<end>"]]
        raw = judge.model(input_ids=torch.tensor([ids])).logits.detach()[0, 0]
        expected = (float(raw) - judge.normalizer.mean) / judge.normalizer.std
        np.testing.assert_allclose(float(rollout.raw_scores[row]), expected, atol=1e-5)
    metrics = trainer.train()
    assert np.isfinite(metrics["score"])
    assert metrics["score_std"] > 0


# -- two processes -----------------------------------------------------------------------------------------


def dropping_run(folder: str, output: str) -> dict:
    two_processes.odd_share = failing_share
    settings = {"on_score_failure": "drop", "preflight": False, "tokens_per_microbatch": 60}
    try:
        return two_processes.ppo(*two_processes.folders(folder, "full"), output, **settings)
    finally:
        two_processes.odd_share = PLAIN


@pytest.mark.slow
def test_two_processes_drop_as_one_does(tmp_path, tiny_model, tiny_tokenizer):
    """In every update the two processes lose different responses and different numbers of them."""
    chain(tmp_path / "full", tiny_model, tiny_tokenizer, lora=False)
    done = forked.shared().together([__file__, tmp_path, tmp_path / "two.pt"])
    assert done.returncode == 0, done.stderr[-3000:]
    alone = dropping_run(str(tmp_path), str(tmp_path / "alone"))
    together = torch.load(tmp_path / "two.pt", weights_only=True)
    assert [row["dropped_responses"] for row in alone["logs"]] == [
        sum(n in BROKEN for n in numbers) for numbers in alone["prompts"]
    ]
    assert any(row["dropped_responses"] for row in alone["logs"])
    assert together["prompts"] == alone["prompts"]
    np.testing.assert_allclose(together["kl_coef"], alone["kl_coef"], rtol=1e-5)
    assert together["moments"] == pytest.approx(alone["moments"], rel=1e-5)
    for mine, theirs in zip(together["logs"], alone["logs"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for mine, theirs in zip(together["gradients"], alone["gradients"], strict=True):
        for name, gradient in theirs.items():
            scale = float(gradient.abs().max())
            np.testing.assert_allclose(mine[name], gradient, rtol=0, atol=2e-4 * scale + 1e-12, err_msg=name)


if __name__ == "__main__":
    outcome = dropping_run(sys.argv[1], sys.argv[2].removesuffix(".pt"))
    if torch.distributed.get_rank() == 0:
        torch.save(outcome, sys.argv[2])
    torch.distributed.destroy_process_group()
