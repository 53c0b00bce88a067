"""Compute one score per response from reward functions: call them, weigh, normalise, apply the missing-stop rule."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import sysconfig
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.calls import TRAINERS, Logged, call, check_arguments, function_name
from rlhf.errors import InputError, RunStopped, short
from rlhf.rows.records import Prompt

log = logging.getLogger("rlhf")

T = TypeVar("T")

RewardFunction = Callable[..., Any]
"""A function of trl's signature: called with lists, returns a number or None per response; may be async."""
MissingEos = Literal["replace", "subtract", "off"]


def check_functions(reward_funcs: RewardFunction | Sequence[RewardFunction]) -> list[RewardFunction]:
    """Return a list of callables. For a string, the InputError shows how to load a trained reward model."""
    listed: list[Any] = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not listed:
        raise InputError("reward_funcs is empty; pass at least one reward function or RewardModel")
    for function in listed:
        if isinstance(function, str):
            raise InputError(
                f"reward_funcs holds the string {function!r}; load it first: "
                f"from reward_models import RewardModel; RewardModel.load({function!r})"
            )
        if not callable(function):
            raise InputError(f"reward_funcs holds a {type(function).__name__}, which cannot be called")
        if isinstance(function, type):
            raise InputError(f"reward_funcs holds the class {function.__name__}; pass an object: {function.__name__}()")
        if hasattr(function, "get_input_embeddings"):  # one of transformers' models, which reads token ids
            raise InputError(
                f"reward_funcs holds a bare {type(function).__name__}; load its folder as a reward model: "
                "from reward_models import RewardModel; RewardModel.load(folder)"
            )
    return listed


def check_columns(functions: Sequence[RewardFunction], prompts: Sequence[Prompt], name: str) -> None:
    """Raise InputError where a function requires a column that none of the prompts of the dataset `name` has."""
    known = [*TRAINERS, *columns_of(prompts)]
    for function in functions:
        check_arguments(function, known, name)


def columns_of(prompts: Iterable[Prompt]) -> list[str]:
    """Return the names of all columns that one or another prompt has."""
    return sorted({name for prompt in prompts for name in prompt.columns})


def column_names(functions: Sequence[RewardFunction]) -> list[str]:
    """Return ``score/<name>`` of each function; where a name repeats, later ones are numbered: score/f, score/f_2."""
    names: list[str] = []
    for function in functions:
        name = own = f"score/{function_name(function)}"
        number = 1
        while name in names:
            number += 1
            name = f"{own}_{number}"
        names.append(name)
    return names


def score_responses(
    functions: Sequence[RewardFunction],
    weights: Sequence[float],
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    response_ids: Sequence[list[int]],
    *,
    columns: Iterable[str] = (),
    answers: Sequence[Mapping[str, Any]] | None = None,
    timeout_seconds: float | None = None,
    failures: list[str] | None = None,
    step_scores: Float[Tensor, "N T"] | None = None,
    **extra: Any,
) -> tuple[Float[Tensor, "N"], dict[str, Float[Tensor, "N"]]]:
    """Return the weighted sum of the functions' scores and, with several functions, the scores of each by name.

    Functions are called as by trl's GRPOTrainer: ``f(prompts=, completions=, completion_ids=, **columns)``, with
    strings where the prompt was a string and message lists where it was one. Each gets copies of its own, and only what
    its signature names. columns: names of the dataset's columns, None for prompts that lack one. answers: the
    responses as parsed messages (content, reasoning_content), which functions also get as ``parsed_completions``, and
    the raw texts as ``raw_completions``. A function returns a number per response, or an awaitable of them. None means
    "not applicable" and leaves the sum (NaN in the function's own scores); a response for which every function returns
    None is an error, or dropped.

    A function fails on a response where its score is not a finite float32, or is an exception (as from
    ``asyncio.gather(..., return_exceptions=True)``). It fails on all responses where it raises one or is not done after
    `timeout_seconds`. With `failures` None, a failure raises: InputError for a bad number, RunStopped for an exception
    or a time-out. With a list, a line per failed function is appended to it, and the sum and every function's own score
    of a failed response are NaN. A wrong number of scores or of values to log, and an InputError that a function
    raises, always raise InputError.

    step_scores: zeros, a number per response token, to which the step scores that functions give are added, each times
    its function's weight. A function gives them by calling its argument ``give_step_scores`` with a list per response,
    a number per token in it. Raises InputError where none of them does. With None no function is asked for any.
    """
    parsed = answers or [{"role": "assistant", "content": text} for text in texts]
    inputs = {
        "prompts": [p.messages[-1]["content"] if p.text else p.messages for p in prompts],
        "completions": [a["content"] if p.text else [dict(a)] for p, a in zip(prompts, parsed, strict=True)],
        "completion_ids": list(response_ids),
    }
    if answers is not None:
        inputs |= {"parsed_completions": [dict(answer) for answer in answers], "raw_completions": list(texts)}
    named = {name: [p.columns.get(name) for p in prompts] for name in {*columns, *columns_of(prompts)}}
    table = torch.full((len(prompts), len(functions)), math.nan)
    dropped = torch.zeros(len(prompts), dtype=torch.bool)
    given: list[str] = []  # names of the functions that gave step scores
    for j, function in enumerate(functions):
        if step_scores is not None:
            extra["give_step_scores"] = partial(_add_steps, step_scores, response_ids, weights[j], function, given)
        returned = _answers(function, {**named, **extra, **inputs}, len(prompts), timeout_seconds)
        table[:, j], failed = _numbers(returned)
        if failed:
            row, error = next(iter(failed.items()))
            failure = _failure(function, row, error, len(failed), prompts)
            if failures is None:
                raise (RunStopped if isinstance(error, Exception) else InputError)(failure) from _cause(error)
            failures.append(failure)
            dropped[list(failed)] = True
    empty = table.isnan().all(-1) & ~dropped
    if bool(empty.any()):
        row, share = int(empty.nonzero()[0]), f"{int(empty.sum())} of {len(prompts)} responses"
        unscored = f"no reward function scored response {row} ({short(texts[row])!r}); all of them returned None"
        if failures is None:
            raise InputError(f"{unscored}, as for {share}; on_score_failure: drop leaves such responses out")
        failures.append(f"{unscored} ({share})")
        dropped |= empty
    if step_scores is not None and not given and not bool(dropped.any()):
        names = ", ".join(map(function_name, functions))
        raise InputError(f"step_score_coef: none of {names} gives step scores; use a process model, or set it to 0")
    table[dropped] = math.nan
    total = (table * torch.tensor(list(weights))).nansum(-1).masked_fill(dropped, math.nan)
    many = len(functions) > 1
    return total, {name: table[:, j] for j, name in enumerate(column_names(functions)) if many}


def _add_steps(
    to: Tensor, ids: Sequence[list[int]], weight: float, function: RewardFunction, given: list[str],
    values: Sequence[Sequence[float]],
) -> None:  # fmt: skip
    """Add a function's step scores to those of others, in place; `given` gets its name."""
    name = function_name(function)
    if len(values) != len(ids):
        raise InputError(f"{name} gave step scores of {len(values)} responses, asked for {len(ids)}")
    for row, (own, tokens) in enumerate(zip(values, ids, strict=True)):
        if len(own) != len(tokens):
            raise InputError(f"{name} gave {len(own)} step scores for the {len(tokens)} tokens of response {row}")
        try:
            scores = torch.tensor(list(own), dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):  # None, text
            scores = torch.tensor([math.nan])
        if not bool(scores.isfinite().all()):
            raise InputError(f"{name} gave a step score for response {row} that is no finite number")
        to[row, : len(own)] += weight * scores
    given.append(name)


def require_some(scored: float, failures: Sequence[str]) -> None:
    """Raise RunStopped if no response of a rollout has a score, else log the failures.

    scored: number of responses with a score, over all processes. failures: this process's, from `score_responses`.
    """
    if scored == 0:
        raise RunStopped(f"no response of the rollout has a score: {'; '.join(failures) or 'see the other processes'}")
    for failure in failures:
        log.warning("responses dropped: %s", failure)


# ---------------------------------------------------------------- one function's answers


class _TimedOut(Exception):
    pass


def _answers(function: RewardFunction, arguments: dict[str, Any], count: int, seconds: float | None) -> list[object]:
    """Call a function; return its answers to `count` responses, or `count` times the exception that it raised.

    With a time-out the function runs in a thread of its own. Python cannot stop a thread: a late one goes on until the
    process ends, and its log calls are ignored.
    """
    logged = Logged(function, arguments)

    def answer() -> list[object]:
        result: Any = call(function, arguments | logged.arguments())
        if inspect.isawaitable(result):  # in a thread: a notebook's own already runs an event loop
            # cancelled 0.1 s after the time-out, so that always the wait below is the one that raises _TimedOut
            awaited = result if seconds is None else asyncio.wait_for(result, seconds + 0.1)
            result = _in_thread(lambda: asyncio.run(_wait(awaited)), None)
        return _listed(function, result)

    try:
        answers = answer() if seconds is None else _in_thread(answer, seconds)
    except InputError:
        raise
    except Exception as error:
        logged.close(None)
        return [error] * count
    if len(answers) != count:
        raise InputError(f"{function_name(function)} returned {len(answers)} scores for {count} responses")
    logged.close(count)
    return answers


def _listed(function: RewardFunction, result: Any) -> list[object]:
    """Return what a function returned as a list; of an array or list of shape (N, 1), its N numbers."""
    single = isinstance(result, str | bytes | Mapping | set | frozenset) or not isinstance(result, Iterable)
    if single or getattr(result, "ndim", 1) == 0:
        raise InputError(f"{function_name(function)} returned a {type(result).__name__}; return a number per response")
    answers: list[Any] = result.detach().cpu().tolist() if isinstance(result, Tensor) else list(result)
    if answers and all(isinstance(answer, list | tuple) and len(answer) == 1 for answer in answers):
        return [answer[0] for answer in answers]
    return answers


async def _wait(awaitable: Awaitable[T]) -> T:
    return await awaitable


def _in_thread(work: Callable[[], T], seconds: float | None) -> T:
    """Run `work()` in a thread that doesn't keep the process alive. Raises _TimedOut after `seconds`.

    The thread gets the caller's gradient mode and current device, which are a thread's own.
    """
    result: Future[T] = Future()
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
    gradients = torch.is_grad_enabled()

    def run() -> None:
        try:
            if device is not None:
                torch.accelerator.set_device_index(device)
            with torch.set_grad_enabled(gradients):
                result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="score").start()
    wait([result], seconds)
    if not result.done():
        raise _TimedOut(f"not done after score_timeout_seconds={seconds:g}")
    return result.result()


def _numbers(answers: Sequence[object]) -> tuple[Float[Tensor, "N"], dict[int, Exception | str]]:
    """Return the scores as float32 (NaN for None and for bad ones), and by row what is wrong with a bad one."""
    values = torch.full((len(answers),), math.nan)
    failed: dict[int, Exception | str] = {}
    for row, answer in enumerate(answers):
        if answer is None:
            continue
        if isinstance(answer, Exception):
            failed[row] = answer
            continue
        item = getattr(answer, "item", None)  # an array's or tensor's
        single = item() if item is not None and math.prod(getattr(answer, "shape", ())) == 1 else answer
        if not isinstance(single, Real | Decimal):
            failed[row] = f"a {type(answer).__name__} ({short(str(answer))!r})"
            continue
        with suppress(OverflowError):  # an int of hundreds of digits
            values[row] = torch.tensor(float(single), dtype=torch.float64)  # above float32's range: inf
        if not bool(values[row].isfinite()):
            failed[row] = str(single)
    values[list(failed)] = math.nan
    return values, failed


def _failure(function: RewardFunction, row: int, error: Exception | str, failed: int, prompts: Sequence[Prompt]) -> str:
    """Describe a function's failure in one line: its first row, and the number of rows."""
    where = f"response {row}, to {short(prompts[row].messages[-1]['content'])!r}"
    name, share = function_name(function), f"{failed} of {len(prompts)} responses"
    if isinstance(error, str):
        return f"{name} returned {error} for {where}; scores must be finite numbers ({share} failed)"
    if isinstance(error, _TimedOut):
        return f"{name} was {error} on {share}, the first of them {where}"
    own = [f for f in traceback.extract_tb(error.__traceback__) if not _of_a_library(f.filename)]
    location = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    message = short(f"{type(error).__name__}: {error}", 300)
    return f"{name} failed on {share}, the first of them {where}: {message}{location}"


def _of_a_library(file: str) -> bool:
    """Return whether a file is not the user's own: Python's, an installed package's, or this module."""
    return file == __file__ or file.startswith(("<frozen", sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")))


def _cause(error: Exception | str) -> Exception | None:
    return error if isinstance(error, Exception) else None


@dataclass(frozen=True)
class RunningMoments:
    """Mean and population variance of all scores so far, merged batch by batch (Chan et al. 1979)."""

    mean: float = 0.0
    var: float = 0.0
    count: int = 0

    def with_batch(self, scores: Float[Tensor, "N"]) -> RunningMoments:
        values = scores.double()
        count, mean, var = len(values), float(values.mean()), float(values.var(correction=0))
        total = self.count + count
        delta = mean - self.mean
        spread = self.var * self.count + var * count + delta * delta * self.count * count / total
        return RunningMoments(self.mean + delta * count / total, spread / total, total)

    def normalize(self, scores: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        return (scores - self.mean) / math.sqrt(self.var + 1e-8)


def apply_missing_eos(
    scores: Float[Tensor, "N"], stopped: Bool[Tensor, "N"], rule: MissingEos, penalty: float
) -> Float[Tensor, "N"]:
    """Change the scores of responses without a stop token: "replace" -> ``-penalty`` (2403.17031, detail 12; OpenAI's
    summaries), "subtract" -> ``score - penalty`` (trl's convention), "off" -> unchanged."""
    if rule == "replace":
        return torch.where(stopped, scores, -penalty)
    if rule == "subtract":
        return torch.where(stopped, scores, scores - penalty)
    return scores
