"""Fingerprints of what is in memory: of a model's weights where they are, of a reward function by what it computes."""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from rlhf.run.checkpoint import plain

if TYPE_CHECKING:
    from torch import Tensor, nn

SETS = ("STORE_DEREF", "STORE_GLOBAL")
"""Instructions by which a function keeps a count of its own: such a name is no constant."""

SPEED = ("tokens_per_microbatch", "timeout", "retries", "at_once", "name")
"""Arguments of an object that scores which change no score."""

OURS = ("rlhf", "reward_models", "rlhf_recipes")
"""Packages whose methods count by their names: a run goes on with this library's next version."""


def of_weights(module: nn.Module) -> str:
    """Compute the fingerprint of a model's parameters where they are: sums of their bits, exact on every device."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if "original_module" in name:  # peft's unused original of a saved module, such as a head drawn at random
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {_checksum(parameter)}\n".encode())
    return digest.hexdigest()


def _checksum(tensor: Tensor) -> int:
    """Sum a tensor's bits, each word multiplied by an odd number of its own, modulo 2^64."""
    import torch

    if tensor.device.type == "meta":
        return 0
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = bits.view(torch.int32) if bits.numel() % 4 == 0 else bits
    total = 0
    for start in range(0, words.numel(), 2**22):
        part = words[start : start + 2**22].long()
        odd = torch.arange(start, start + len(part), device=part.device) * 0x9E3779B1 * 2 + 1
        total += int((part * odd).sum())
    return total % 2**64


def of_function(function: Any, depth: int = 0) -> str:
    """Return a reward function's name and the sha256 of what it computes: its code, its helpers in the same file, its
    constants; of an object the class, its arguments and the weights that it holds. No value appears in it: one may be a
    password."""
    if hasattr(function, "named_parameters"):
        name, content = type(function).__qualname__, of_weights(function)
    elif isinstance(function, functools.partial):
        inner = of_function(function.func, depth)
        name, content = inner.split()[0], repr([inner, _constant(function.args), _constant(function.keywords)])
    elif inspect.ismethod(function):
        name, called = function.__func__.__qualname__, function.__func__
        methods = _methods(type(function.__self__), called, depth)
        content = repr([of_function(called, depth), of_function(function.__self__, depth + 1), *methods])
    elif inspect.isfunction(function):
        name, content = function.__qualname__, _code(function, depth)
    else:
        kind, own = type(function), getattr(function, "__dict__", {})
        call = inspect.getattr_static(kind, "__call__", None)
        given = {name for name in inspect.signature(kind.__init__).parameters if name in own} - {*SPEED}
        described = {name: _value(own[name], depth) for name in sorted(given)}
        code, methods = "", list[str]()
        if inspect.isfunction(call):
            code, methods = of_function(call, depth), _methods(kind, call, depth)
        name, content = kind.__qualname__, repr([code, described, *methods])
    return f"{name.rpartition('.')[2]} {hashlib.sha256(content.encode()).hexdigest()}"


def _methods(kind: type, function: Any, depth: int) -> list[str]:
    """Return the fingerprints of the methods, of a class and its file, that one of them names, and that these name."""
    found, left = dict[str, Any](), [function]
    while left and depth < 3 and kind.__module__.partition(".")[0] not in OURS:
        for name in {name for inner in _inner(left.pop().__code__) for name in inner.co_names}:
            held = inspect.getattr_static(kind, name, None)
            method = getattr(held, "__func__", getattr(held, "fget", held))  # of a static one, or a property
            if inspect.isfunction(method) and method.__module__ == kind.__module__ and method is not function:
                left += [] if name in found else [method]
                found[name] = method
    return [of_function(method, depth + 1) for _, method in sorted(found.items())]


def _value(value: Any, depth: int = 0) -> Any:
    """Return the JSON form of a value that stays as it is; of others the weights, the code, or only the type: a list
    may be where a function keeps what it has seen."""
    if isinstance(value, str | int | float | bool | tuple | Path) or value is None or dataclasses.is_dataclass(value):
        with contextlib.suppress(TypeError):
            return plain(value)
    if isinstance(value, frozenset | re.Pattern):
        with contextlib.suppress(TypeError):
            return _fixed(value)
    if isinstance(value, tuple):
        return [_value(item, depth) for item in value]
    known = hasattr(value, "named_parameters") or (callable(value) and not isinstance(value, type))
    return of_function(value, depth + 1) if known and depth < 3 else type(value).__name__


def _code(function: Any, depth: int) -> str:
    """Return a function's instructions, constants, defaults, closure, and the helpers and constants of its file that
    it names; neither comments nor line numbers."""
    code: CodeType = function.__code__
    names = {name for inner in _inner(code) for name in inner.co_names}
    around = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    helpers = [
        of_function(value, depth + 1)
        for value in around.values()
        if inspect.isfunction(value) and value.__module__ == function.__module__ and depth < 3 and value is not function
    ]
    set_here = {step.argval for inner in _inner(code) for step in dis.get_instructions(inner) if step.opname in SETS}
    constants = {name: _constant(value) for name, value in around.items() if name.isupper() and name not in set_here}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    closure = [_value(cell.cell_contents, depth) for name, cell in cells if name not in set_here and _filled(cell)]
    steps = [(inner.co_code.hex(), _constants(inner, function.__doc__), inner.co_names) for inner in _inner(code)]
    defaults, by_name = function.__defaults__, function.__kwdefaults__
    named = [{name: _constant(value) for name, value in by_name.items()}] if by_name else []
    return repr((steps, defaults and _constant(defaults), closure, helpers, constants, *named))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


def _inner(code: CodeType) -> list[CodeType]:
    found = [code]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += _inner(constant)
    return found


def _constant(value: Any) -> Any:
    for form in (plain, _fixed):
        with contextlib.suppress(TypeError):
            return form(value)
    return _value(value)


def _fixed(value: Any) -> Any:
    """Return the JSON form of a value in which there are sets, patterns or bytes. Raises TypeError for others."""
    if isinstance(value, re.Pattern):
        return ["pattern", repr(value.pattern), value.flags]
    if isinstance(value, set | frozenset):
        return ["set", *sorted(json.dumps(_fixed(item), sort_keys=True) for item in value)]
    if isinstance(value, Mapping):
        return {str(key): _fixed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_fixed(item) for item in value]
    return repr(value) if isinstance(value, bytes | range | Decimal) else plain(value)


def _constants(code: CodeType, doc: str | None) -> list[str]:
    plain_ones = [value for value in code.co_consts if not isinstance(value, CodeType) and value != doc]
    return [repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value) for value in plain_ones]
