"""A config class's fields as command-line flags, and its --help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from rlhf.errors import InputError, unknown


def all_flags(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every flag's dotted name and type; an optional section is a flag too, for `--base null`."""
    sections = sections_of(cls)
    for name, hint in hints_of(cls).items():
        if name in sections:
            if sections[name][2]:
                yield ".".join((*path, name)), None
            yield from all_flags(sections[name][1], (*path, name))
        else:
            yield ".".join((*path, name)), hint


def read_flags(argv: Sequence[str], known: dict[str, Any]) -> tuple[str | None, list[tuple[tuple[str, ...], str]]]:
    file, flags, rest = None, [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise InputError(f"command line: unexpected {word!r}; options are written `--name value`")
        name, equals, value = word[2:].partition("=")
        if name != "config" and name not in known:
            unknown(f"--{name}", ["--config", *(f"--{flag}" for flag in known)], "command line", "flag")
        if not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif known.get(name) is bool:
                value = "true"
            else:
                raise InputError(f"command line: --{name} needs a value")
        if name != "config":
            flags.append((tuple(name.split(".")), value))
        elif file:
            raise InputError(f"command line: --config is given twice: {file} and {value}")
        else:
            file = value
    return file, flags


def put(tree: dict[str, Any], path: tuple[str, ...], value: str) -> None:
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = value


def print_help(cls: type, description: str) -> None:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        description=description or inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0],
        usage="%(prog)s [--config FILE.yaml] [--name value ...]",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="a YAML file; flags win over it")
    _add_help(parser, parser, cls, ())
    parser.print_help()


def _add_help(parser: Any, group: Any, cls: type, path: tuple[str, ...]) -> None:
    sections, docs = sections_of(cls), _docs(cls)
    for field in dataclasses.fields(cls):
        if field.name not in sections:
            factory = field.default_factory
            default = factory() if callable(factory) else field.default
            more = {"required": True} if default is dataclasses.MISSING else {"default": default}
            flag = "--" + ".".join((*path, field.name))
            group.add_argument(flag, type=hints_of(cls)[field.name], help=docs.get(field.name, "-"), **more)
    for name, (_, inner, optional) in sections.items():
        title = ".".join((*path, name)) + (" (null turns it off)" if optional else "")
        _add_help(parser, parser.add_argument_group(title, docs.get(name)), inner, (*path, name))


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@cache
def sections_of(cls: Any) -> dict[str, tuple[dataclasses.Field, Any, bool]]:
    """Fields that are dataclasses themselves: name -> (field, class, may be None)."""
    found = {}
    for field in dataclasses.fields(cls):
        hint = hints_of(cls)[field.name]
        for choice in _choices(hint):
            if dataclasses.is_dataclass(choice):
                found[field.name] = (field, choice, allows_none(hint))
    return found


@cache
def _docs(cls: type) -> dict[str, str]:
    """The string under each field."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        try:
            tree: Any = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue
        for line, below in itertools.pairwise(tree.body):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_text(below):
                docs[line.target.id] = one_line(below.value.value)
    return docs


def _is_text(line: Any) -> bool:
    value = line.value if isinstance(line, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def field_of(cls: type, name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(cls) if field.name == name)


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def allows_none(hint: Any) -> bool:
    return hint is Any or types.NoneType in _choices(hint)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


_NAMES[types.NoneType] = "null"


def expected(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if len(_choices(hint)) > 1:
        return " or ".join(expected(choice) for choice in _choices(hint))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (list, tuple):
        return "a list of " + " and ".join(expected(arg) for arg in args if arg is not ...)
    if origin is dict:
        return f"a mapping to {expected(args[1])}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(text: str) -> str:
    return " ".join(str(text).split())
