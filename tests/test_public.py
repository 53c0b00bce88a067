"""What is public by `__all__`: its annotations can be read, as notebooks, beartype and pages of documentation do."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Iterator
from types import FunctionType

import pytest


def functions(found: object) -> Iterator[tuple[str, FunctionType]]:
    """Yield a public function, or the methods and properties of a class that are our own and public."""
    if isinstance(found, FunctionType):
        yield found.__name__, found
    for base in reversed(found.__mro__) if isinstance(found, type) else ():
        for name, value in vars(base).items():
            plain = getattr(value, "fget", None) or getattr(value, "__func__", value)
            ours = isinstance(plain, FunctionType) and plain.__module__.startswith(("rlhf", "reward_models"))
            if ours and (name[0] != "_" or name == "__init__"):
                yield name, plain


@pytest.mark.parametrize("package", ["rlhf", "reward_models"])
def test_hints_can_be_read(package):
    module, trainers = importlib.import_module(package), []
    for name in module.__all__:
        found = getattr(module, name)
        if isinstance(found, type):
            typing.get_type_hints(found)
        hints = {method: typing.get_type_hints(function) for method, function in functions(found)}
        if "Trainer" in name:
            assert hints["plot"]["return"].__module__ == "matplotlib.figure"
            trainers.append(name)
    assert len(trainers) > 1
