"""The types of a config's fields: what a field takes, in words, and whether a value is of that type."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
import types
import typing
from collections.abc import Mapping
from datetime import date
from functools import cache
from typing import Any

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """Return every field's type by its name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@cache
def sections_of(cls: Any) -> dict[str, tuple[dataclasses.Field, Any, bool]]:
    """Return the fields that are dataclasses themselves: name -> (field, class, may be None)."""
    found = {}
    for field in dataclasses.fields(cls):
        hint = hints_of(cls)[field.name]
        for choice in choices_of(hint):
            if dataclasses.is_dataclass(choice):
                found[field.name] = (field, choice, allows_none(hint))
    return found


def field_of(cls: type, name: str) -> dataclasses.Field:
    """Return a dataclass's field by its name."""
    return next(field for field in dataclasses.fields(cls) if field.name == name)


def is_required(field: dataclasses.Field) -> bool:
    """Return whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union; of any other type, the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def allows_none(hint: Any) -> bool:
    """Return whether None is a value of this type."""
    return hint is Any or types.NoneType in choices_of(hint)


def is_list(hint: Any) -> bool:
    """Return whether a list or tuple is a value of this type, and no plain text."""
    return str not in choices_of(hint) and _has_list(hint)


def is_text_or_list(hint: Any) -> bool:
    """Return whether both a text and a list are values of this type: sources of data."""
    return str in choices_of(hint) and _has_list(hint)


def has_mapping(hint: Any) -> bool:
    """Return whether a mapping is a value of this type."""
    return any(typing.get_origin(choice) is dict for choice in choices_of(hint))


def _has_list(hint: Any) -> bool:
    return any(typing.get_origin(choice) in (list, tuple) for choice in choices_of(hint))


def expected(hint: Any) -> str:
    """Write what a type takes, as in "a number or null"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if len(choices_of(hint)) > 1:
        return " or ".join(expected(choice) for choice in choices_of(hint))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (list, tuple):
        return "a list of " + " and ".join(expected(arg) for arg in args if arg is not ...)
    if origin is dict:
        return f"a mapping to {expected(args[1])}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def shown(value: Any) -> str:
    """Write a value in at most 80 characters; None as null."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def as_written(value: Any) -> Any:
    """Return what YAML read as it was written: text and dates are text, but for numbers that YAML takes for text
    (1e-3)."""
    if isinstance(value, Mapping):
        return {str(key): as_written(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_written(item) for item in value]
    if isinstance(value, date):
        return value.isoformat()
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if number else value


def one_line(text: str) -> str:
    """Return a text with every run of white space as one space."""
    return " ".join(str(text).split())


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a field's type: True is no number, 1 is a number, NaN is none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if len(choices_of(hint)) > 1:
        return any(fits(value, choice) for choice in choices_of(hint))
    if origin is typing.Literal:
        return value in args and not isinstance(value, bool)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            fits(key, args[0]) and fits(item, args[1]) for key, item in value.items()
        )
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
    return isinstance(value, hint)
