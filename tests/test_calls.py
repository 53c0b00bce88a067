"""What reward functions are called with, by their signatures, and that nothing they do to it reaches anyone else."""

from __future__ import annotations

import asyncio
import functools
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from reward_models.rules import Rules
from rlhf import scores
from rlhf.calls import call, check_arguments
from rlhf.errors import InputError
from rlhf.rows.records import Prompt, read_prompts

TURN = {"role": "user", "content": "Question?"}
SHARED = Prompt([TURN], {"answer": [1, {"a": [2]}], "array": np.zeros(2), "lock": threading.Lock()})
TINY = {"vocab_size": 9, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
TEXTS, IDS = ["one", "two!"], [[1, 7], [2, 3]]


def run(*functions, prompts=(SHARED, SHARED), **extra):
    return scores.score_responses(functions, [1.0] * len(functions), prompts, TEXTS, IDS, **extra)[0].tolist()


# -- copies ------------------------------------------------------------------------------------------------


def spoils(prompts, completions, completion_ids, answer, array, **columns):
    for prompt, completion, ids, value, numbers in zip(
        prompts, completions, completion_ids, answer, array, strict=True
    ):
        prompt += completion
        prompt[0]["content"] = "spoilt"
        completion[-1]["content"] = "spoilt"
        ids.pop()
        value[1]["a"].append(3)
        numbers += 1
    prompts.clear()
    completions.clear()
    return [0.0, 0.0]


def looks(prompts, completions, completion_ids, answer, array, lock):
    """Score 1 where a response's arguments are as the caller has them, and no row shares an object with another."""
    assert prompts[0] is not prompts[1]
    assert answer[0][1]["a"] is not answer[1][1]["a"]
    assert lock[0] is SHARED.columns["lock"]  # what cannot be copied is shared
    rows = zip(prompts, completions, completion_ids, answer, array, TEXTS, [[1, 7], [2, 3]], strict=True)
    return [
        p == [TURN] and c[-1]["content"] == text and ids == expected and a == [1, {"a": [2]}] and not n.any()
        for p, c, ids, a, n, text, expected in rows
    ]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_what_a_function_changes_is_its_own(timeout):
    assert run(spoils, looks, spoils, looks, timeout_seconds=timeout) == [2.0, 2.0]
    assert SHARED.messages == [{"role": "user", "content": "Question?"}]
    assert SHARED.columns["answer"] == [1, {"a": [2]}]
    assert not SHARED.columns["array"].any()
    assert IDS == [[1, 7], [2, 3]]


def test_the_parts_of_rules_get_copies_of_their_own():
    rules = Rules({"first": (1.0, spoils), "second": (1.0, looks)})
    assert run(rules, looks) == [2.0, 2.0]


# -- signatures --------------------------------------------------------------------------------------------


def without_kwargs(completions, answer):
    return [float(a) for a in answer]


def keyword_only(*, answer, completions):
    return [float(a) for a in answer]


def positional_only(completions, answer, /):
    return [float(a) for a in answer]


def with_default(completions, answer=(), nothing=3):
    return [float(a) + nothing - 3 for a in answer]


def three(completions, factor, answer):
    return [factor * float(a) for a in answer]


def logging_one(completions, answer, log_metric, log_extra, trainer_state):
    log_metric("mean", 1.0)
    log_extra("answer", answer)
    return [float(a) for a in answer]


def decorated(function):
    @functools.wraps(function)
    def timed(*args, **kwargs):
        return function(*args, **kwargs)

    return timed


def consuming(function):
    @functools.wraps(function)
    def taking(completions, trainer_state, **kwargs):
        return function(completions=completions, **kwargs)

    return taking


class Scorer:
    def __call__(self, completions, answer):
        return self.method(completions, answer)

    def method(self, completions, answer):
        return [float(a) for a in answer]

    @decorated
    def timed(self, completions, answer):
        return [float(a) for a in answer]

    @classmethod
    def of_class(cls, completions, answer):
        return [float(a) for a in answer]

    @staticmethod
    def alone(completions, answer):
        return [float(a) for a in answer]

    async def later(self, completions, answer):
        await asyncio.sleep(0)
        return [float(a) for a in answer]


TAKEN = [
    without_kwargs, keyword_only, positional_only, with_default, logging_one, decorated(without_kwargs),
    decorated(decorated(keyword_only)), consuming(without_kwargs), functools.partial(three, factor=1.0),
    functools.partial(three, factor=1.0, answer=None), Scorer(), Scorer().method, Scorer().timed, Scorer.of_class,
    Scorer.alone, Scorer().later, functools.partial(Scorer().method),
    lambda completions, answer: list(map(float, answer)),
    lambda answer, **kwargs: [float(a) + len(kwargs) - 4 for a in answer],
]  # fmt: skip


@pytest.mark.parametrize("function", TAKEN)
def test_a_function_gets_what_its_signature_names(function):
    prompts = [Prompt([TURN], {"answer": 1, "other": "x"}), Prompt([TURN], {"answer": 2, "other": "y"})]
    assert run(function, prompts=prompts) == [1.0, 2.0]


@pytest.mark.parametrize(
    "function", [without_kwargs, keyword_only, decorated(without_kwargs), Scorer(), Scorer().timed]
)
def test_a_missing_column_is_named(function):
    prompts = [Prompt([TURN], {"answers": 1, "other": "x"})] * 2
    message = r"it needs 'answer', and .* has no such column \(columns: answers, other; .*\); did you mean 'answers'\?"
    with pytest.raises(InputError, match=message):
        run(function, prompts=prompts)
    with pytest.raises(InputError, match="and train_dataset has no such"):
        scores.check_columns([len_of, function], prompts, "train_dataset")
    with pytest.raises(InputError, match=r"second: it needs 'solution_str'.*responses come as 'completions'"):
        check_arguments(_named("second", lambda solution_str, extra=None: []), ["completions", "prompts"])


def len_of(completions, **columns):
    return [float(len(c[-1]["content"])) for c in completions]


def _named(name, function):
    function.__name__ = name
    return function


def test_a_column_that_a_batch_lacks_is_none_where_the_data_has_it():
    """A function that requires it must not fail in the update whose prompts happen to have none."""

    def graded(completions, answer):
        return [0.0 if a is None else 1.0 for a in answer]

    prompts = [Prompt([TURN]), Prompt([TURN])]
    assert run(graded, prompts=prompts, columns=["answer"]) == [0.0, 0.0]
    with pytest.raises(InputError, match="it needs 'answer'"):
        run(graded, prompts=prompts)


def test_a_function_written_in_c_gets_everything():
    assert call(dict, {"a": [1], "b": 2}) == {"a": [1], "b": 2}


def test_a_class_and_a_bare_model_are_refused():
    with pytest.raises(InputError, match=r"holds the class Scorer; pass an object: Scorer\(\)"):
        scores.check_functions(Scorer)
    with pytest.raises(InputError, match=r"holds a bare LlamaForSequenceClassification; .*RewardModel\.load"):
        scores.check_functions(LlamaForSequenceClassification(LlamaConfig(**TINY)))

    class Scoring(torch.nn.Module):
        def forward(self, completions, answer):
            return torch.ones(2)

    assert run(Scoring(), prompts=[Prompt([TURN], {"answer": 1})] * 2) == [1.0, 1.0]


def test_every_column_but_the_prompt_arrives_as_in_trl():
    """trl's GRPOTrainer hands over all columns but prompt, completion and completion_ids."""
    turns = [TURN, {"role": "assistant", "content": "x"}]
    rows = [
        {"prompt": "Question?", "chosen": "a", "rejected": "b", "prompt_id": "p", "other": 3},
        {"prompt": "Question?", "responses": ["a", "b"], "ranks": [1, 2], "messages": turns, "completion": "c"},
    ]
    seen = {}

    def function(prompts, completions, **columns):
        seen.update(columns)
        return [0.0, 0.0]

    prompts = read_prompts(rows)
    run(function, prompts=prompts)
    assert prompts[0].text
    expected = {name: [row.get(name) for row in rows] for row in rows for name in row if name != "prompt"}
    assert seen == expected | {"completion_ids": IDS}


# -- what comes back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        np.array([[1.5], [2.0]]), torch.tensor([[1.5], [2.0]], requires_grad=True), [[1.5], [2.0]],
        [torch.tensor([1.5]), torch.tensor([[2.0]])], [np.array([1.5]), np.float32(2.0)], ((1.5,), (2.0,)),
        torch.tensor([[1.5], [2.0]], dtype=torch.bfloat16), [torch.tensor(1.5), 2],
    ],
)  # fmt: skip
def test_a_score_in_a_box_of_its_own(result):
    assert run(lambda completions: result) == [1.5, 2.0]


def test_truth_values_of_any_library():
    for result in ([True, np.bool_(False)], [torch.tensor([True]), torch.tensor(False)], np.array([[True], [False]])):
        assert run(lambda completions, result=result: result) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("result", "seen"),
    [
        (np.array(1.0), "returned a ndarray; return a number per response"),
        (torch.tensor(1.0), "returned a Tensor; return a number per response"),
        (np.ones((1, 2)), "returned 1 scores for 2 responses"),
        (np.ones((2, 2)), "returned a ndarray"),
        ([(1.0, "why"), (2.0, "so")], "returned a tuple"),
        ([{"score": 1.0}, {"score": 2.0}], "returned a dict"),
        ([np.array([]), 1.0], "returned a ndarray"),
    ],
)
def test_what_is_no_score_is_named(result, seen):
    with pytest.raises(InputError, match=f"<lambda> {seen}"):
        run(lambda completions: result)


# -- logs --------------------------------------------------------------------------------------------------


def logs():
    metrics, columns = [], {}
    return metrics, columns, {
        "log_metric": lambda name, value: metrics.append((name, value)),
        "log_extra": lambda name, values: columns.setdefault(name, []).extend(values),
    }  # fmt: skip


def test_columns_may_be_logged_in_parts_and_by_trls_names():
    metrics, columns, given = logs()

    def function(completions, log_metric, log_extra):
        for n, _ in enumerate(completions):
            log_extra(column="row", values=[n])
        log_metric(name="mean", value=torch.tensor([0.5]))
        return [1.0, 2.0]

    run(function, **given)
    assert columns == {"row": [0, 1]}
    assert metrics == [("mean", 0.5)]
    assert isinstance(metrics[0][1], float)


@pytest.mark.parametrize(
    ("log", "seen"),
    [
        (
            lambda metric, extra: extra("kind", ["a"]),
            r"log_extra\('kind'\) got 1 values for 2 responses; log one value",
        ),
        (lambda metric, extra: extra("kind", ["a"] * 3), r"log_extra\('kind'\) got 3 values for 2 responses"),
        (lambda metric, extra: extra("kind", "ab"), r"log_extra\('kind'\) got 'ab'; log a list"),
        (lambda metric, extra: metric("mean", [1.0, 2.0]), r"log_metric\('mean'\) got \[1.0, 2.0\]; log one number"),
        (lambda metric, extra: metric("mean", None), r"log_metric\('mean'\) got None; log one number"),
    ],
)
@pytest.mark.parametrize("failures", [None, []])
def test_a_wrong_log_call_is_a_mistake_of_the_user(log, seen, failures):
    def function(completions, log_metric, log_extra):
        log(log_metric, log_extra)
        return [1.0, 2.0]

    _, columns, given = logs()
    with pytest.raises(InputError, match=f"function: {seen}"):
        run(function, failures=failures, **given)
    assert columns == {}


def test_a_function_that_fails_logs_no_half_of_a_column():
    _, columns, given = logs()

    def function(completions, log_extra, **rest):
        log_extra("row", [1])
        raise ConnectionError("gone")

    assert np.isnan(run(function, failures=[], **given)).all()
    assert columns == {}


# -- beside trl itself -------------------------------------------------------------------------------------


def test_the_same_arguments_as_from_trls_trainer(monkeypatch):
    """The installed GRPOTrainer's own scoring of the same rows; we add only `completion`, which it leaves out."""
    import trl.trainer.grpo_trainer as theirs

    rows = [
        {"prompt": [TURN], "chosen": "a", "messages": [TURN], "prompt_id": "p", "completion": "c", "label": True},
        {"prompt": [TURN], "chosen": "b", "messages": [TURN], "prompt_id": "q", "completion": "d", "label": False},
    ]
    seen = []

    def first(prompts, completions, completion_ids, **columns):
        seen.append(("first", prompts, completions, completion_ids, columns))
        return [1.0, None]

    async def second(prompts, completions, completion_ids, **columns):
        seen.append(("second", prompts, completions, completion_ids, columns))
        return [0.5, 2.0]

    prompts = read_prompts(rows)
    ours = scores.score_responses([first, second], [1.0, 1.0], prompts, TEXTS, IDS, trainer_state=None,
                                  log_metric=print, log_extra=print)[1]  # fmt: skip
    mine = {given[0]: given[1:] for given in seen}
    seen.clear()
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    stub = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), reward_funcs=[first, second], reward_processing_classes=[None] * 2,
        reward_func_names=["first", "second"], state=None, environments=None, async_loop=loop,
        _log_completion_extra=print, _log_metric=print,
    )  # fmt: skip
    monkeypatch.setattr(theirs, "profiling_context", lambda *_: nullcontext())
    monkeypatch.setattr(theirs, "gather", lambda tensor: tensor)
    answers = [[{"role": "assistant", "content": text}] for text in TEXTS]
    table = theirs.GRPOTrainer._calculate_rewards.__wrapped__(stub, rows, [row["prompt"] for row in rows], answers, IDS)
    loop.call_soon_threadsafe(loop.stop)
    for name, *given in seen:
        *lists, columns = mine[name]
        assert columns.pop("completion") == ["c", "d"]
        assert {n: v for n, v in columns.items() if not callable(v)} == {
            n: v for n, v in given[-1].items() if not callable(v)
        }
        assert columns.keys() == given[-1].keys()
        assert lists == given[:-1]
    assert len(seen) == 2
    np.testing.assert_equal(np.stack([ours["score/first"], ours["score/second"]], 1), table.numpy())
