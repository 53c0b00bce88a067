"""Asking, with a target that counts: nothing is asked twice, also after a kill; judges, pass@k, comparison."""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
from dataclasses import replace

import numpy as np
import pytest

from rlhf.errors import InputError
from rlhf.evals.asking import Asker, Sampler, seed_of
from rlhf.evals.asks import Answered, NoAnswer
from rlhf.evals.cache import Answers, key_of
from rlhf.evals.classes import Match
from rlhf.evals.compare import Earlier, chance, compare
from rlhf.evals.grading import Eval
from rlhf.evals.measure import calibration_error, metrics_of, pass_at_k
from rlhf.evals.modelgraded import INVALID, ModelBasedClassify, Spec
from rlhf.evals.outcome import Outcome
from rlhf.evals.run import run_by_likelihood, run_eval
from rlhf.evals.samples import Sample
from rlhf.evals.targets import Answer, Prompt
from rlhf.intervals import proportion


class Counting:
    """Answers a prompt by its last word, then the seed's parity; dies at the call of a given number."""

    def __init__(self, dies_at: int | None = None, fingerprint: str = "a model") -> None:
        self.name, self.fingerprint, self.dies_at = "counting", fingerprint, dies_at
        self.asked: list[tuple[str, int]] = []
        self.calls = 0

    def prompt(self, messages):
        return Prompt(messages, tuple(messages[-1]["content"].encode()))

    def check(self, prompts, max_new_tokens):
        pass

    def sample(self, prompts, seeds, max_new_tokens, temperature):
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.asked += [(prompt.messages[-1]["content"], seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        texts = [p.messages[-1]["content"].split()[-1] + str(s % 2) for p, s in zip(prompts, seeds, strict=True)]
        return [Answer(text[:max_new_tokens], True, 1) for text in texts]

    def logprobs(self, prompt, answers):
        self.calls += 1
        return [-float(len(text)) for text in answers]

    def asks(self):
        def ask(questions, choices):
            self.calls += len(questions)
            found = []
            for question in questions:
                text = question[-1]["content"]
                shares = tuple(float(f"is {choice}" in text) for choice in choices)
                found.append(Answered(shares, 0.9) if sum(shares) else NoAnswer("none"))
            return found

        return ask


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def samples(count: int) -> tuple[Sample, ...]:
    return tuple(Sample(user(f"say {n}"), (f"{n}0",), {"prompt": f"say {n}"}, f"a.jsonl:{n}") for n in range(count))


@pytest.fixture
def answers(tmp_path):
    with Answers(tmp_path / "deep/answers.sqlite") as file:
        yield file


def test_a_kill_in_the_middle_costs_one_batch(tmp_path):
    """25 items, batches of 4: the third call dies. The next run asks the other 17, each once."""
    one, sampler = Eval("e", Match(), samples(25), "e"), Sampler(8, 0.7)
    first = Counting(dies_at=3)
    with Answers(tmp_path / "a.sqlite") as file, pytest.raises(KeyboardInterrupt):
        run_eval(one, Asker(first, file, 4), sampler)
    assert len(first.asked) == 8
    second = Counting()
    with Answers(tmp_path / "a.sqlite") as file:
        asker = Asker(second, file, 4)
        resumed = run_eval(one, asker, sampler)
    assert (asker.asked, asker.known) == (17, 8)
    assert sorted(first.asked + second.asked) == sorted({*first.asked, *second.asked})
    assert len(first.asked + second.asked) == 25
    with Answers(tmp_path / "b.sqlite") as file:
        whole = run_eval(one, Asker(Counting(), file, 100), sampler)
    assert [item.trials for item in resumed.items] == [item.trials for item in whole.items]
    third = Counting()
    with Answers(tmp_path / "a.sqlite") as file:
        run_eval(one, Asker(third, file, 4), sampler)
    assert third.calls == 0


def test_what_decides_an_answer_is_in_its_key(answers):
    prompts, sampler = [Counting().prompt(user("say x"))], Sampler(8, 0.7)
    Asker(Counting(), answers, 4).sample(prompts, [1], sampler)

    def asked(target: Counting, seed: int = 1, sampler: Sampler = sampler, text: str = "say x") -> int:
        Asker(target, answers, 4).sample([target.prompt(user(text))], [seed], sampler)
        return target.calls

    assert asked(Counting()) == 0
    assert asked(Counting(fingerprint="another model")) == 1
    assert asked(Counting(), seed=2) == 1
    assert asked(Counting(), sampler=Sampler(9, 0.7)) == 1
    assert asked(Counting(), sampler=Sampler(8, 0.8)) == 1
    assert asked(Counting(), text="say y") == 1
    greedy = Sampler(8, 0.0)
    assert [asked(Counting(), seed=seed, sampler=greedy) for seed in (1, 2)] == [1, 0]


def test_equal_questions_are_asked_once(answers):
    target = Counting()
    asker = Asker(target, answers, 4)
    found = asker.sample([target.prompt(user("say x"))] * 3, [5, 5, 6], Sampler(8, 1.0))
    assert sorted(target.asked) == [("say x", 5), ("say x", 6)]
    assert [answer.text for answer in found] == ["x1", "x1", "x0"]


def test_progress_counts_what_is_known_and_asked(answers):
    target, seen = Counting(), []
    prompts = [target.prompt(user(f"say {n}")) for n in range(5)]
    Asker(target, answers, 4).sample(prompts[:2], [0] * 2, Sampler(8, 1.0))
    Asker(target, answers, 2, seen.append).sample(prompts, [0] * 5, Sampler(8, 1.0))
    assert seen == [2, 2, 1]


def test_seeds_depend_on_the_prompt_and_the_number_alone():
    assert seed_of(0, user("a"), 0) == seed_of(0, user("a"), 0)
    seeds = {seed_of(seed, user(text), n) for seed in (0, 1) for text in "ab" for n in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_file_that_holds_no_answers_is_refused(tmp_path):
    (tmp_path / "text.sqlite").write_text("hello, this is no database at all" * 100)
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE rollouts (x)")
    for name in ("text.sqlite", "other.sqlite"):
        with pytest.raises(InputError, match=f"{name}: .*--answers"):
            Answers(tmp_path / name)


def test_keys_are_hashes_of_all_parts():
    assert key_of(a=1, b="x") == key_of(b="x", a=1)
    assert len({key_of(a=1), key_of(a="1"), key_of(b=1), key_of(a=1, b=None)}) == 4


# ---------------------------------------------------------------- several samples, pass@k


def test_several_answers_are_one_cluster(answers):
    """Right is an even seed: with 4 answers to each of 30 items, the mean and pass@k by hand."""
    one = Eval("e", Match(), samples(30), "e")
    result = run_eval(one, Asker(Counting(), answers, 64), Sampler(8, 1.0), seed=3, samples=4)
    right = [[seed_of(3, s.messages, n) % 2 == 0 for n in range(4)] for s in one.samples]
    metrics = metrics_of(result, [1, 2, 4])
    share = sum(map(sum, right)) / 120
    assert abs(metrics["e/accuracy"]["value"] - share) < 1e-12
    assert metrics["e/accuracy"]["n"] == 30
    assert abs(metrics["e/pass@1"]["value"] - share) < 1e-12
    pairs = [any(pair) for row in right for pair in itertools.combinations(row, 2)]
    assert abs(metrics["e/pass@2"]["value"] - sum(pairs) / len(pairs)) < 1e-12
    assert abs(metrics["e/pass@4"]["value"] - sum(map(any, right)) / 30) < 1e-12
    for metric in metrics.values():
        assert metric["low"] <= metric["value"] <= metric["high"]


def test_one_answer_per_item_has_wilsons_interval(answers):
    one = Eval("e", Match(), samples(12), "e")
    result = run_eval(one, Asker(Counting(), answers, 64), Sampler(8, 0.0))
    metric = metrics_of(result)["e/accuracy"]
    right = sum(item.trials[0].verdict.numbers["accuracy"] == 1.0 for item in result.items)
    assert (metric["value"], metric["low"], metric["high"]) == tuple(proportion(right, 12))


def test_items_of_a_group_are_one_cluster(answers):
    """Ten groups of three items alike tell no more than ten items."""
    three = tuple(replace(s, columns={**s.columns, "split_group": n}) for n, s in enumerate(samples(10)) for _ in "abc")
    grouped = tuple(replace(s, columns={**s.columns, "row": n}) for n, s in enumerate(three))
    sampler = Sampler(8, 0.0)
    asker = Asker(Counting(), answers, 64)
    found, ten = (
        metrics_of(run_eval(Eval("e", Match(), asked, "e"), asker, sampler))["e/accuracy"]
        for asked in (grouped, samples(10))
    )
    assert (found["n"], found["value"]) == (30, ten["value"])
    assert found["low"] <= ten["low"] < ten["high"] <= found["high"]


@pytest.mark.parametrize(("n", "right", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 2), (6, 1, 6), (10, 3, 4)])
def test_pass_at_k_is_the_share_of_all_draws(n, right, k):
    """Every set of k of the n answers, by enumeration."""
    marks = [True] * right + [False] * (n - right)
    draws = [any(draw) for draw in itertools.combinations(marks, k)]
    assert abs(pass_at_k(n, right, k) - sum(draws) / len(draws)) < 1e-12


def test_calibration_error_by_hand():
    """Bin 0.2-0.3: two items at .25, one right, off by .25 each; bin 0.9-1: one right at 1.0, off by 0: 0.5 / 3."""
    pairs = np.array([[1.0, 0.25], [0.0, 0.25], [1.0, 1.0]])
    assert abs(calibration_error(pairs) - 0.5 / 3) < 1e-12


def test_an_evals_own_limits_come_first(answers):
    one = Eval("e", Match(), samples(2), "e", max_new_tokens=1, temperature=0.0)
    result = run_eval(one, Asker(Counting(), answers, 64), Sampler(8, 1.0))
    assert [item.trials[0].answers["completion"] for item in result.items] == ["0", "1"]
    with pytest.raises(InputError, match="its own temperature 0 would give 3 equal answers"):
        run_eval(one, Asker(Counting(), answers, 64), Sampler(8, 1.0), samples=3)


# ---------------------------------------------------------------- judges, likelihood


def graded(kind: str, **settings) -> ModelBasedClassify:
    spec = Spec(user("Q {input} A {completion}: is A or is B?"), ("A", "B"), {"input": "completion"}, kind,
                {"A": 1.0, "B": -1.0}, {"completion": "{i}={output} "})  # fmt: skip
    return ModelBasedClassify(spec, **settings)


def test_a_judge_is_asked_for_a_letter(answers):
    """The judge here finds "is A" and "is B" in its question, and chooses the first."""
    rows = [{"input": "say 1"}, {"input": "say 2"}]
    items = tuple(Sample(user(row["input"]), (), row, "") for row in rows)
    one = Eval("e", graded("classify"), items, "e")
    with pytest.raises(InputError, match="--judge"):
        run_eval(one, Asker(Counting(), answers, 64), Sampler(8, 0.0))
    judge = Counting(fingerprint="the judge")
    result = run_eval(one, Asker(Counting(), answers, 64), Sampler(8, 0.0), judge=Asker(judge, answers, 64))
    assert [item.trials[0].verdict.picked for item in result.items] == ["A", "A"]
    metrics = metrics_of(result)
    assert metrics["e/score"]["value"] == 1.0
    assert metrics["e/score"]["low"] >= -1.0
    assert (metrics["e/choice_A"]["value"], metrics["e/invalid"]["value"]) == (1.0, 0.0)
    again = Counting(fingerprint="the judge")
    run_eval(one, Asker(Counting(), answers, 64), Sampler(8, 0.0), judge=Asker(again, answers, 64))
    assert again.calls == 0


def test_a_judge_that_reasons_is_parsed(answers):
    """The judge's reply here is its question's last word and a digit, "B?0", which names B at its beginning."""
    items = (Sample(user("say 1"), (), {"input": "say 1"}, ""),)
    one = Eval("e", graded("cot_classify"), items, "e")
    judge = Asker(Counting(), answers, 64)
    (item,) = run_eval(one, judge, Sampler(8, 0.0), judge=judge).items
    assert (item.trials[0].reply, item.trials[0].verdict.picked) == ("B?0", "B")


def test_several_answers_side_by_side(answers):
    items = (Sample(user("say 1"), (), {"input": "say 1"}, ""),)
    one = Eval("e", graded("cot_classify", compared=2), items, "e", temperature=1.0)
    judge = Asker(Counting(), answers, 64)
    (item,) = run_eval(one, judge, Sampler(8, 0.0), judge=judge).items
    assert list(item.trials[0].answers) == ["completion 1", "completion 2"]


def test_choices_in_the_sample_are_judged_without_asking(answers):
    rows = [{"input": "q", "completion": "it is B", "choice": "B"}]
    spec = Spec(user("{completion}?"), ("A", "B"), {"input": "completion"}, "classify")
    one = Eval("e", ModelBasedClassify(spec, metaeval=True), (Sample(user("q"), (), rows[0], ""),), "e")
    policy = Counting()
    result = run_eval(one, Asker(policy, answers, 4), Sampler(8, 0.0), judge=Asker(Counting(), answers, 4))
    # the column `completion` fills the place by itself
    assert policy.calls == 0
    assert result.items[0].trials[0].verdict.numbers == {
        "metascore": 1.0, "choice_A": 0.0, "choice_B": 1.0, "invalid": 0.0,
    }  # fmt: skip


def test_likelihood_by_hand(answers):
    """A choice's log-probability here is minus its length, so the shortest wins; per byte all are equal, and the first
    wins."""
    rows = [("bb", ["bb", "a"]), ("a", ["bb", "a"])]
    items = tuple(Sample(user(f"q {n}"), (ideal,), {"choices": c}, "") for n, (ideal, c) in enumerate(rows))
    one = Eval("e", Match(), items, "e")
    result = run_by_likelihood(one, Asker(Counting(), answers, 4))
    assert [dict(item.trials[0].verdict.numbers) for item in result.items] == [
        {"accuracy": 0.0, "accuracy_per_byte": 1.0, "confidence": pytest.approx(math.e / (1 + math.e))},
        {"accuracy": 1.0, "accuracy_per_byte": 0.0, "confidence": pytest.approx(math.e / (1 + math.e))},
    ]
    error = metrics_of(result)["e/calibration_error"]
    assert error["value"] == pytest.approx(math.e / (1 + math.e) - 0.5)
    assert error["low"] <= error["value"] <= error["high"]
    twice = run_by_likelihood(Eval("e", Match(), items * 8, "e"), Asker(Counting(), answers, 4))
    assert metrics_of(twice)["e/calibration_error"] == pytest.approx(error), "asked again, it is the same item"
    with pytest.raises(InputError, match="a judge reads its answers"):
        run_by_likelihood(Eval("e", graded("classify"), items, "e"), Asker(Counting(), answers, 4))


def test_a_judge_that_names_nothing_is_invalid(answers):
    (row,) = Asker(Counting(), answers, 4).choose([user("neither")], ["A", "B"])
    assert row["choice"] == INVALID


# ---------------------------------------------------------------- comparison


def rows_of(name: str, right: list[list[int]]) -> list[dict]:
    return [
        {"eval": name, "key": f"k{n}", "prompt": user("q"), "ideal": ["a"],
         "trials": [{"answers": {"completion": "a"}, "numbers": {"accuracy": float(x)}} for x in trials]}
        for n, trials in enumerate(right)
    ]  # fmt: skip


ABOUT = {"e": {"metric": "accuracy", "bounds": [0.0, 1.0]}}


def test_paired_comparison_by_hand():
    """Ten items: five gained, one lost, four alike: +0.4 on ten shared items, of which one more is here alone."""
    ours, theirs = [1, 1, 1, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    earlier = Earlier("x", "m", ABOUT, tuple(rows_of("e", [[x] for x in theirs])))
    (one,) = compare(ABOUT, rows_of("e", [[x] for x in [*ours, 1]]), earlier)
    assert abs(one.difference["value"] - 0.4) < 1e-12
    assert one.difference["n"] == 10
    assert one.difference["low"] < 0.4 < one.difference["high"]
    assert (one.gained, one.lost, one.apart) == (("k0", "k1", "k2", "k3", "k4"), ("k5",), 1)
    assert chance([one]) is None
    assert "2 evals are compared" in chance([one, one])


def test_a_clear_difference_and_too_few_to_tell():
    theirs = tuple(rows_of("e", [[0]] * 100))
    (better,) = compare(ABOUT, rows_of("e", [[1]] * 100), Earlier("x", "m", ABOUT, theirs))
    assert better.sentence.startswith("better by +1.000")
    (alike,) = compare(ABOUT, rows_of("e", [[0]] * 97 + [[1]] * 3), Earlier("x", "m", ABOUT, theirs))
    assert alike.sentence.startswith("no clear difference")
    assert alike.sentence.endswith(" tell")


def test_items_of_a_group_are_compared_as_one():
    theirs, ours = [0, 1] * 30, [1, 1, 0, 1] * 15
    alone, together = (
        compare(
            ABOUT,
            [
                row | ({"group": f"group {n // 6}"} if grouped else {})
                for n, row in enumerate(rows_of("e", [[x] for x in ours]))
            ],
            Earlier("x", "m", ABOUT, tuple(rows_of("e", [[x] for x in theirs]))),
        )[0].difference
        for grouped in (False, True)
    )
    assert alone["value"] == together["value"]
    assert (alone["low"], alone["high"]) != (together["low"], together["high"])


def test_pairing_makes_the_interval_narrower():
    """Two policies that agree on 190 of 200 items: paired, the difference is known far better than from two shares."""
    theirs = [n % 2 for n in range(200)]
    ours = [1 if n < 20 else x for n, x in enumerate(theirs)]
    earlier = Earlier("x", "m", ABOUT, tuple(rows_of("e", [[x] for x in theirs])))
    (one,) = compare(ABOUT, rows_of("e", [[x] for x in ours]), earlier)
    width = one.difference["high"] - one.difference["low"]
    a, b = (proportion(sum(x), 200) for x in (ours, theirs))
    assert width < 0.5 * ((a.high - a.low) ** 2 + (b.high - b.low) ** 2) ** 0.5
    assert one.difference["low"] > 0


def test_other_metrics_and_other_evals_are_not_compared():
    ours = rows_of("e", [[1]]) + rows_of("f", [[1]])
    about = {**ABOUT, "f": {"metric": "score", "bounds": [0.0, 1.0]}, "g": {"metric": "ppl", "bounds": None}}
    before = Earlier("x", "m", {"f": {"metric": "accuracy"}}, tuple(rows_of("f", [[1]])))
    assert compare(about, ours, before) == []


def test_files_of_a_run(tmp_path, answers):
    """run_evals.json, items, the hub's files and a page that shows texts as text and every item."""
    outcome = Outcome(not_run={"bad.dev.v0": "no such file <x>"})
    mean = Sample(user("say <script>alert(1)</script>"), ("yes",), {"prompt": "x"}, "a.jsonl:9")
    one = Eval("own", Match(), (*samples(6), mean), "own.yaml", dataset=None)
    outcome.add(run_eval(one, Asker(Counting(), answers, 64), Sampler(60, 0.0)), "temperature 0", [])
    theirs = tuple({**row, "trials": [{"answers": {"completion": "zz"}, "numbers": {"accuracy": 0.0}}]}
                   for row in outcome.rows)  # fmt: skip
    earlier = Earlier("other/run_evals.json", "sft", outcome.evals, theirs)
    (one,) = outcome.write(tmp_path, {"model": "ppo <b>"}, earlier)
    content = json.loads((tmp_path / "run_evals.json").read_text())
    assert set(content["metrics"]) == {"own/accuracy", "own/accuracy_difference"}
    assert all(set(metric) == {"value", "low", "high", "n"} for metric in content["metrics"].values())
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 7
    page = (tmp_path / "run_evals.html").read_text()
    assert "<script>alert" not in page
    assert "<b>" not in page
    for text in ("say 0", "say 5", "a.jsonl:9", "&lt;script&gt;alert(1)", "no such file &lt;x&gt;", "gained", "before"):
        assert text in page, text
    import yaml
    from huggingface_hub import parse_eval_result_entries

    (entry,) = [
        e for e in parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results/own.yaml").read_text()))
        if e.task_id == "accuracy"
    ]  # fmt: skip
    assert entry.value == content["metrics"]["own/accuracy"]["value"]
    assert entry.notes.startswith("not a data set of the hub: accuracy, 7 items, temperature 0")
