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

from rlhf.errors import InputError, RunStopped, short
from rlhf.records import Prompt

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
    return listed


def function_name(function: RewardFunction) -> str:
    inner = function.func if isinstance(function, partial) else function
    return getattr(inner, "__name__", type(inner).__name__)


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
    timeout_seconds: float | None = None,
    failures: list[str] | None = None,
    **extra: Any,
) -> tuple[Float[Tensor, "N"], dict[str, Float[Tensor, "N"]]]:
    """Return the weighted sum of the functions' scores and, with several functions, the scores of each by name.

    Functions are called as by trl's GRPOTrainer: ``f(prompts=, completions=, completion_ids=, **columns)``, with
    strings where the prompt was a string and message lists where it was one. A function returns a number per response,
    or an awaitable of them. None means "not applicable" and leaves the sum (NaN in the function's own scores); a
    response for which every function returns None is an error.

    A function fails on a response where its score is not a finite float32, or is an exception (as from
    ``asyncio.gather(..., return_exceptions=True)``). It fails on all responses where it raises one or is not done after
    `timeout_seconds`. With `failures` None, a failure raises: InputError for a bad number, RunStopped for an exception
    or a time-out. With a list, a line per failed function is appended to it, and the sum and every function's own score
    of a failed response are NaN. A wrong number of scores, and an InputError that a function raises, always raise
    InputError.
    """
    inputs = {
        "prompts": [p.messages[-1]["content"] if p.text else p.messages for p in prompts],
        "completions": [
            text if p.text else [{"role": "assistant", "content": text}] for p, text in zip(prompts, texts, strict=True)
        ],
        "completion_ids": list(response_ids),
    }
    names = sorted({name for prompt in prompts for name in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    table = torch.full((len(prompts), len(functions)), math.nan)
    dropped = torch.zeros(len(prompts), dtype=torch.bool)
    for j, function in enumerate(functions):
        answers = _answers(function, {**columns, **extra, **inputs}, len(prompts), timeout_seconds)
        table[:, j], failed = _numbers(answers)
        if failed:
            row, error = next(iter(failed.items()))
            failure = _failure(function, row, error, len(failed), prompts)
            if failures is None:
                raise (RunStopped if isinstance(error, Exception) else InputError)(failure) from _cause(error)
            failures.append(failure)
            dropped[list(failed)] = True
    empty = table.isnan().all(-1) & ~dropped
    if bool(empty.any()):
        row = int(empty.nonzero()[0])
        raise InputError(f"no reward function scored response {row} ({short(texts[row])!r}); all of them returned None")
    table[dropped] = math.nan
    total = (table * torch.tensor(list(weights))).nansum(-1).masked_fill(dropped, math.nan)
    many = len(functions) > 1
    return total, {name: table[:, j] for j, name in enumerate(column_names(functions)) if many}


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
    late = threading.Event()
    muted = {name: _until(late, arguments[name]) for name in ("log_metric", "log_extra") if name in arguments}

    def answer() -> list[object]:
        result: Any = function(**arguments | muted)
        if inspect.isawaitable(result):  # in a thread: a notebook's own already runs an event loop
            # cancelled 0.1 s after the time-out, so that always the wait below is the one that raises _TimedOut
            awaited = result if seconds is None else asyncio.wait_for(result, seconds + 0.1)
            result = _in_thread(lambda: asyncio.run(_wait(awaited)), None)
        if isinstance(result, Tensor) and result.dim() > 0:
            return result.detach().cpu().tolist()
        if isinstance(result, str | bytes | Mapping | set | frozenset) or not isinstance(result, Iterable):
            raise InputError(
                f"{function_name(function)} returned a {type(result).__name__}; return a number per response"
            )
        return list(result)

    try:
        answers = answer() if seconds is None else _in_thread(answer, seconds)
    except InputError:
        raise
    except _TimedOut as error:
        late.set()
        return [error] * count
    except Exception as error:
        return [error] * count
    if len(answers) != count:
        raise InputError(f"{function_name(function)} returned {len(answers)} scores for {count} responses")
    return answers


async def _wait(awaitable: Awaitable[T]) -> T:
    return await awaitable


def _until(late: threading.Event, log_call: Callable[..., None]) -> Callable[..., None]:
    def call(*args: object) -> None:
        if not late.is_set():
            log_call(*args)

    return call


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
        single = answer.item() if hasattr(answer, "item") and getattr(answer, "ndim", 0) == 0 else answer
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
