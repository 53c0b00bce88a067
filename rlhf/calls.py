"""Call users' functions (scores, labelers, judges) with copies of the arguments that their signatures name.

A function may name any of the arguments, with or without a ``**kwargs`` for the rest. What it gets is its own: whatever
it does to lists, dicts and arrays in it changes nothing for the caller or for the next function.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from inspect import Parameter
from typing import Any

from rlhf.errors import InputError, short

TRAINERS = (
    "prompts", "completions", "parsed_completions", "raw_completions", "completion_ids", "processing_class", "stop_ids",
    "trainer_state", "log_metric", "log_extra", "give_step_scores",
)  # fmt: skip
"""Arguments that come from a trainer; all others are columns of the data."""


def _log_nothing(*args: object, **kwargs: object) -> None:
    """Take a log call where nothing is logged."""


_DEFAULTS = {
    "trainer_state": None, "log_metric": _log_nothing, "log_extra": _log_nothing, "give_step_scores": _log_nothing,
}  # fmt: skip


def function_name(function: Callable[..., Any]) -> str:
    """Return a function's name; of an object that can be called, the name of its type."""
    inner = function.func if isinstance(function, partial) else function
    return getattr(inner, "__name__", type(inner).__name__)


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call `function` with copies of those `arguments` that its signature names, or of all if it takes ``**kwargs``.

    A list is copied item by item, so that rows which share an object get one each. Raises InputError where the function
    requires an argument that is not among them; where nothing is logged, its log calls do nothing.
    """
    named, open_ended = _parameters(function)
    check_arguments(function, arguments)
    given = dict(arguments) if open_ended else {name: arguments[name] for name in named if name in arguments}
    given |= {name: _DEFAULTS[name] for name in _required(named) if name not in given}
    given = {name: own(value) for name, value in given.items()}
    first = [given.pop(n) for n, p in named.items() if p.kind is Parameter.POSITIONAL_ONLY and n in given]
    return function(*first, **given)


def check_arguments(function: Callable[..., Any], known: Collection[str], where: str = "") -> None:
    """Raise InputError where `function` requires an argument that is not in `known`. where: names the data."""
    named, _ = _parameters(function)
    missing = [name for name in _required(named) if name not in known and name not in _DEFAULTS]
    if not missing:
        return
    columns = sorted(name for name in known if name not in TRAINERS)
    near = get_close_matches(missing[0], [*columns, *TRAINERS], n=1, cutoff=0.8)
    advice = f"did you mean {near[0]!r}?" if near else "rename a column, or give the parameter a default"
    raise InputError(
        f"{function_name(function)}: it needs {missing[0]!r}, and {where or 'the data'} has no such column (columns: "
        f"{', '.join(columns) or 'none'}; responses come as 'completions'); {advice}"
    )


def own(value: Any) -> Any:
    """Return a list with a copy of each of its items; another value as it is."""
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value


def _copied(value: Any) -> Any:
    """Copy a value with all that it holds; an object that cannot be copied (a lock, an open file) is shared."""
    if isinstance(value, list) and all(type(item) in (int, float, str) for item in value):
        return list(value)  # token ids: ten times as fast as a deep copy
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever an object's own __reduce__ raises
        return value


def _parameters(function: Any) -> tuple[dict[str, Parameter], bool]:
    """Return the parameters that a call can set, and whether it takes any other name, too.

    A decorator that passes ``**kwargs`` on (functools.wraps) takes what the function inside it takes.
    """
    if hasattr(function, "register_forward_hook"):  # a torch module, whose own __call__ names nothing
        function = function.forward
    named: dict[str, Parameter] = {}
    for follow in (False, True):
        try:
            parameters = inspect.signature(function, follow_wrapped=follow).parameters.values()
        except (TypeError, ValueError):  # written in C
            return named, True
        variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        named |= {p.name: p for p in parameters if p.kind not in variable}
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
            return named, False
    return named, True


def _required(named: Mapping[str, Parameter]) -> Iterable[str]:
    return [name for name, parameter in named.items() if parameter.default is Parameter.empty]


class Logged:
    """What one function logs and gives beside its scores: numbers are passed on at once, columns and step scores when
    it is done. Calls that come late, after the time-out, are ignored."""

    def __init__(self, function: Callable[..., Any], arguments: Mapping[str, Any]):
        self._name = function_name(function)
        self._metric, self._extra = arguments.get("log_metric"), arguments.get("log_extra")
        self._give: Callable[..., None] | None = arguments.get("give_step_scores")
        self._steps: Sequence[Sequence[float]] | None = None
        self._columns: dict[str, list[object]] = {}
        self._late = threading.Event()

    def arguments(self) -> dict[str, Any]:
        """Return what the function gets in place of the trainer's own functions."""
        given = {"log_metric": self._metric and self.metric, "log_extra": self._extra and self.extra}
        given["give_step_scores"] = self._give and self.steps
        return {name: log for name, log in given.items() if log is not None}

    def metric(self, name: str, value: Any) -> None:
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):  # torch raises the last for a tensor of several numbers
            raise InputError(f"{self._name}: log_metric({name!r}) got {short(repr(value))}; log one number") from None
        if self._metric is not None and not self._late.is_set():
            self._metric(name, number)

    def extra(self, column: str, values: Iterable[object]) -> None:
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InputError(f"{self._name}: log_extra({column!r}) got {short(repr(values))}; log a list")
        self._columns.setdefault(column, []).extend(values)

    def steps(self, values: Sequence[Sequence[float]]) -> None:
        self._steps = values

    def close(self, count: int | None) -> None:
        """Pass columns and step scores on, with values for all `count` responses; with None, drop them and what
        follows."""
        for column, values in self._columns.items() if count is not None else ():
            if len(values) != count:
                seen = f"{self._name}: log_extra({column!r}) got {len(values)} values for {count} responses"
                raise InputError(f"{seen}; log one value per response, None where there is none")
            if self._extra is not None:
                self._extra(column, values)
        if count is not None and self._give is not None and self._steps is not None:
            self._give(self._steps)
        self._late.set()
