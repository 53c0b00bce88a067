"""Evaluation: hand arithmetic, plain loops, and the bootstrap's coverage on simulated data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf.errors import InputError
from rlhf.evals.judge import Pair, Verdict, compared
from rlhf.evaluate import JudgeCard, PolicySamples, choose_best, compare, judge_samples, sample_policy, side_by_side
from rlhf.intervals import (
    best_of_n,
    best_of_n_kl,
    bootstrap_interval,
    clustered_accuracy,
    score_length_correlation,
    student_mean,
    win_rate,
    wins,
)
from rlhf.rows.records import Prompt


def prompts(*texts: str, families: tuple[str, ...] = ()) -> tuple[Prompt, ...]:
    columns = [{"family": family} for family in families] or [{} for _ in texts]
    return tuple(
        Prompt([{"role": "user", "content": text}], column, text=True)
        for text, column in zip(texts, columns, strict=True)
    )


def samples(asked: tuple[Prompt, ...], lengths: list[int], n: int = 1, **measured) -> PolicySamples:
    return PolicySamples(
        prompts=asked,
        responses=tuple(f"answer {i}" for i in range(len(lengths))),
        ids=tuple(tuple(range(length)) for length in lengths),
        stopped=measured.pop("stopped", tuple(True for _ in lengths)),
        n=n,
        **measured,
    )


# ------------------------------------------------------------------------------------------- statistics


@pytest.mark.slow
@pytest.mark.long
def test_bootstrap_covers_the_true_mean_about_95_times_in_100():
    draw, hits = np.random.default_rng(0), 0
    for trial in range(200):
        found = bootstrap_interval(draw.exponential(2.0, 120), seed=trial, samples=400)
        hits += found.low <= 2.0 <= found.high
    assert 0.89 <= hits / 200 <= 0.98


def test_bootstrap_width_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap_interval(values, seed=0)
    assert found.value == pytest.approx(sum(values) / 400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    narrow = bootstrap_interval(values, seed=0, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * values.std() / 20, rel=0.08)


def test_bootstrap_depends_on_the_seed_alone():
    values = list(range(200))
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_bootstrap_of_another_statistic():
    found = bootstrap_interval([1.0, 1.0, 1.0, 1.0, 100.0], seed=0, statistic=lambda rows: float(np.median(rows)))
    assert (found.value, found.low) == (1.0, 1.0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses(values):
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval(values, seed=0)


def test_win_rate_counts_ties_half():
    assert wins([2.0, 1.0, 5.0, 0.0], [1.0, 1.0, 7.0, 0.0]).tolist() == [1.0, 0.5, 0.0, 0.5]
    found = win_rate([2.0, 1.0, 5.0, 0.0], [1.0, 1.0, 7.0, 0.0], seed=0)
    assert found.value == 0.5
    assert found.low < 0.5 < found.high
    assert win_rate([1.0, 3.0], [0.0, 2.0]).interval == pytest.approx([0.342, 1.0], abs=1e-3)  # Wilson: 2 of 2


def test_win_rate_over_several_responses_is_the_mean_over_all_meetings():
    a, b = np.array([[1.0, 4.0], [2.0, 2.0]]), np.array([[3.0, 1.0, 0.0], [2.0, 5.0, 1.0]])
    expected = []
    for row_a, row_b in zip(a, b, strict=True):
        meetings = [1.0 if x > y else 0.5 if x == y else 0.0 for x in row_a for y in row_b]
        expected.append(sum(meetings) / len(meetings))
    assert wins(a, b).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([math.nan, 1.0], [1.0, 2.0])])
def test_win_rate_refuses(a, b):
    with pytest.raises(ValueError, match="win rates"):
        wins(a, b)


def test_accuracy_is_over_pairs_and_its_interval_over_prompts():
    # prompt x has three pairs, y one: 3.5 of 4 right
    found = clustered_accuracy([1, 1, 1, 0.5], ["x", "x", "x", "y"])
    assert found.value == pytest.approx(3.5 / 4)
    assert found.interval == [0.0, 1.0], "two prompts say next to nothing"
    # 40 prompts whose 10 pairs agree entirely: as uncertain as 40 pairs, not as 400
    right = [float(i % 2) for i in range(40)]
    together = clustered_accuracy(np.repeat(right, 10), np.repeat(np.arange(40), 10).tolist())
    alone = clustered_accuracy(right, range(40))
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.08)  # t instead of z
    assert together.high - together.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(40), rel=0.1)


def test_best_of_n_kl():
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(1.3862943611 - 0.75)
    # the KL of the best of n continuous scores: density n u^(n-1) on [0, 1], integrated by a plain sum
    for n in (2, 8, 64):
        u = (np.arange(400_000) + 0.5) / 400_000
        log_density = math.log(n) + (n - 1) * np.log(u)
        assert best_of_n_kl(n) == pytest.approx(float((np.exp(log_density) * log_density).mean()), abs=1e-4)
    with pytest.raises(ValueError, match="n=0"):
        best_of_n_kl(0)


def test_best_of_n_takes_the_first_of_the_highest():
    assert best_of_n(np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 4.0]])).tolist() == [1, 0]
    with pytest.raises(ValueError, match="finite"):
        best_of_n(np.array([[1.0, math.nan]]))


def test_score_length_correlation():
    assert score_length_correlation([1.0, 2.0, 3.0], [10, 20, 30]) == pytest.approx(1.0)
    assert score_length_correlation([1.0, 2.0, 4.0], [3, 1, 2]) == pytest.approx(-0.327326835)
    assert score_length_correlation([1.0, 1.0], [3, 4]) is None


# ------------------------------------------------------------------------------------------- sampling and judging


class Parrot:
    """An engine that answers the k-th copy of a prompt with its first token, k + 1 times, then stops."""

    def __init__(self, stop: int):
        self.stop, self.seen = stop, []

    def generate(self, prompt_ids, max_new_tokens, temperature, generator):
        self.seen.append((max_new_tokens, temperature))
        ids, stopped = [], []
        for index, _ in enumerate(prompt_ids):
            count = index % 3 + 1
            ids.append([65] * count + ([self.stop] if count < 3 else []))
            stopped.append(count < 3)
        return SimpleNamespace(ids=ids, stopped=stopped)


def test_sample_policy_keeps_a_prompts_responses_together(tiny_tokenizer):
    from rlhf.chat import end_of_turn_id, prepare_tokenizer

    prepare_tokenizer(tiny_tokenizer)
    engine = Parrot(end_of_turn_id(tiny_tokenizer))
    found = sample_policy(
        prompts("one?", "two?"), tiny_tokenizer, engine, max_new_tokens=3, generator=torch.Generator(), n=3
    )
    letter = tiny_tokenizer.decode([65])
    assert found.responses == (letter, letter * 2, letter * 3) * 2
    assert found.response_tokens == (2, 3, 3) * 2
    assert found.stopped == (True, True, False) * 2
    assert engine.seen == [(3, 1.0)]
    assert found.by_prompt(range(6)).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_judge_gets_trls_arguments_one_per_response():
    asked = (
        Prompt([{"role": "user", "content": "a"}], {"answer": 1}),
        Prompt([{"role": "user", "content": "b"}], {"other": 2}),
    )
    seen = {}

    def judge(prompts, completions, answer, other, **kwargs):
        seen.update(prompts=prompts, completions=completions, answer=answer, other=other)
        return [float(len(turns[0]["content"])) for turns in completions]

    drawn = replace(samples(asked, [1, 2, 3, 4], n=2), responses=("x", "xx", "xxx", ""))
    assert judge_samples(drawn, judge) == (1.0, 2.0, 3.0, 0.0)
    assert seen["prompts"] == [asked[0].messages] * 2 + [asked[1].messages] * 2
    assert seen["completions"][1] == [{"role": "assistant", "content": "xx"}]
    assert seen["answer"] == [1, 1, None, None]
    assert seen["other"] == [None, None, 2, 2]


@pytest.mark.parametrize(
    ("scores", "message"), [([1.0], "1 scores for 2"), ([1.0, None], "None"), ([1.0, math.nan], "nan")]
)
def test_judge_must_score_every_response(scores, message):
    with pytest.raises(InputError, match=message):
        judge_samples(samples(prompts("a", "b"), [1, 1]), lambda **kwargs: scores)


def test_choose_best_keeps_what_was_measured_on_the_chosen():
    drawn = samples(
        prompts("a", "b"), [1, 2, 3, 4], n=2,
        scores=(0.0, 1.0, 5.0, 4.0), gold_scores=(10.0, 11.0, 12.0, 13.0), gold_parts={"brevity": (0.0, 1.0, 2.0, 3.0)},
    )  # fmt: skip
    best = choose_best(drawn)
    assert best.n == 1
    assert best.responses == ("answer 1", "answer 2")
    assert best.response_tokens == (2, 3)
    assert best.gold_scores == (11.0, 12.0)
    assert best.gold_parts == {"brevity": (1.0, 2.0)}
    with pytest.raises(ValueError, match="scores"):
        choose_best(replace(drawn, scores=None))


# ------------------------------------------------------------------------------------------- comparison


def example():
    asked = prompts("a", "b", "c", "d", families=("count", "count", "list", "list"))
    sft = samples(
        asked, [4, 4, 6, 6], stopped=(True, True, True, False), scores=(0.0, 0.0, 1.0, 1.0),
        gold_scores=(5.0, 5.0, 5.0, 5.0), refused=(False, False, False, True),
        gold_parts={"courtesy": (0.0, 1.0, 0.0, 0.0)},
    )  # fmt: skip
    ppo = samples(
        asked, [5, 7, 5, 3], scores=(1.0, 2.0, 3.0, 4.0), gold_scores=(6.0, 5.0, 7.0, 4.0),
        kl_nats=(1.0, 2.0, 3.0, 6.0),
        refused=(True, False, False, False), gold_parts={"courtesy": (1.0, 1.0, 1.0, 0.0)},
    )  # fmt: skip
    return asked, sft, ppo


def test_compare_by_gold():
    asked, sft, ppo = example()
    candidates = samples(
        asked, [1, 2] * 4, n=2, scores=(0.0, 1.0) * 4, gold_scores=(0.0, 6.0, 0.0, 5.0, 0.0, 6.0, 0.0, 5.0)
    )
    result = compare(sft, {"ppo": ppo}, JudgeCard("gold", "toy"), candidates=candidates, seed=1)
    assert list(result) == ["sft", "ppo", "best_of_n", "judge"]
    entry = result["ppo"]
    assert entry["prompts"] == 4
    assert (entry["score"], entry["gold_score"], entry["kl_nats"]) == (2.5, 5.5, 3.0)
    assert (entry["response_tokens"], entry["eos_rate"], entry["refusal_rate"]) == (5.0, 1.0, 0.25)
    assert entry["win_rate_vs_sft"] == 0.625  # won, tied, won, lost
    assert entry["win_rate_ci"][0] < 0.625 < entry["win_rate_ci"][1]
    assert entry["gold_parts"] == {"courtesy": 0.75}
    of_families = [entry["families"][name].pop("win_rate_ci") for name in ("count", "list")]
    assert of_families[1] == pytest.approx([0.0945, 0.9055], abs=1e-4)  # one of two: .5 -+ sqrt(z^2 .25 / (2 + z^2))
    assert of_families[0][0] < 0.75 < of_families[0][1] <= 1
    assert entry["families"] == {
        "count": {"n": 2, "score": 1.5, "gold_score": 5.5, "win_rate_vs_sft": 0.75, "refusal_rate": 0.5},
        "list": {"n": 2, "score": 3.5, "gold_score": 5.5, "win_rate_vs_sft": 0.5, "refusal_rate": 0.0},
    }
    assert entry["win_rate_vs_best_of_n"] == 0.5  # 6:6, 5:5, 7:6, 4:5
    assert "win_rate_vs_sft" not in result["sft"]
    assert (result["sft"]["kl_nats"], result["sft"]["eos_rate"]) == (0.0, 0.75)
    best = result["best_of_n"]
    assert (best["n"], best["gold_score"], best["win_rate_vs_sft"]) == (2, 5.5, 0.75)
    assert best["kl_nats"] == pytest.approx(math.log(2) - 0.5)
    assert "win_rate_vs_best_of_n" not in best
    assert result["judge"] == {"kind": "gold", "name": "toy", "accuracy": None, "accuracy_ci": None}
    assert json.loads(json.dumps(result)) == result


def test_compare_by_an_unseen_reward_model():
    _, sft, ppo = example()
    card = JudgeCard("reward_model", "other half", 0.66, (0.6, 0.72))
    with pytest.raises(ValueError, match="needs judge_scores"):
        compare(sft, {"ppo": ppo}, card)
    sft = replace(sft, judge_scores=(0.0, 0.0, 0.0, 0.0), gold_scores=None, gold_parts={})
    ppo = replace(ppo, judge_scores=(1.0, 1.0, 1.0, -1.0), gold_scores=None, gold_parts={})
    result = compare(sft, {"ppo": ppo}, card)
    assert result["ppo"]["gold_score"] is None
    assert (result["ppo"]["win_rate_vs_sft"], result["ppo"]["judge_score"]) == (0.75, 0.5)
    assert "best_of_n" not in result
    assert result["judge"]["accuracy_ci"] == [0.6, 0.72]


def test_intervals_go_by_the_groups_that_splits_go_by():
    """Four groups of 25 prompts, alike within each: 75% of prompts, and as little as four answers tell."""
    asked = tuple(Prompt([{"role": "user", "content": f"q{n}"}], {"split_group": n // 25, "family": "f"})
                  for n in range(100))  # fmt: skip
    for won in (1.0, 8.0):  # a share; a score without bounds
        gold = np.repeat([won, won, won, 0.0], 25)
        sft, ppo = (samples(asked, [1] * 100, gold_scores=tuple(own)) for own in (np.full(100, 0.5), gold))
        entry = compare(sft, {"ppo": ppo}, JudgeCard("gold", "toy"))["ppo"]
        assert (entry["win_rate_vs_sft"], entry["win_rate_ci"]) == (0.75, [0.0, 1.0])
        assert entry["families"]["f"]["win_rate_ci"] == [0.0, 1.0]
        low, high = entry["gold_score_ci"]
        assert high - low >= 0.5 * won
    assert (low, high) == pytest.approx(student_mean(gold[::25]).interval)
    won_by = [1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.5, 1.0, 0.0]
    asked = tuple(Prompt([{"role": "user", "content": "q"}], {"split_group": n // 3}) for n in range(10))
    pairs = [Pair(prompt.messages, "one", "two", prompt.columns) for prompt in asked]
    judged = compared(pairs, [Verdict(win, win) for win in won_by])["win_rate"]
    same = samples(asked, [1] * 10)
    entry = compare(same, {"ppo": same}, JudgeCard("model", "m"), won=lambda first, second: np.array(won_by))["ppo"]
    assert entry["win_rate_ci"] == pytest.approx([judged["low"], judged["high"]])


def test_compare_refuses_different_prompts():
    _, sft, ppo = example()
    with pytest.raises(ValueError, match="different prompts"):
        compare(sft, {"ppo": replace(ppo, prompts=prompts("a", "b", "c", "z"))}, JudgeCard("gold", "toy"))


def test_side_by_side_rows():
    _, sft, ppo = example()
    rows = side_by_side({"sft": sft, "ppo": ppo}, limit=2)
    assert rows[1] == {
        "prompt": "b", "sft": "answer 1", "ppo": "answer 1", "score_sft": 0.0, "score_ppo": 2.0,
        "gold_score_sft": 5.0, "gold_score_ppo": 5.0, "family": "count",
    }  # fmt: skip
    assert len(rows) == 2
    talk = Prompt([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}])
    assert side_by_side({"sft": samples((talk,), [1])})[0]["prompt"] == "system: Be kind.\nuser: Hi"
