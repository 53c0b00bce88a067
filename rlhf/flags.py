"""A config class's fields as command-line flags, and its --help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
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


WIDTH, COLUMN = 80, 28  # of the help; where the text beside a flag begins


@dataclasses.dataclass(frozen=True)
class Entry:
    """A flag in the help."""

    name: str
    takes: str
    text: str
    group: str

    def shown(self, width: int) -> str:
        """Return the flag with its text beside it, or below it where the flag is long."""
        flag, column = f"  --{self.name} {self.takes}", min(COLUMN, width // 3)
        lines = textwrap.wrap(self.text, width - column, break_long_words=False)
        head = f"{flag:<{column}}{lines.pop(0)}" if len(flag) + 2 <= column else flag
        return "\n".join([head, *(" " * column + line for line in lines)])


def print_help(cls: type, description: str) -> None:
    """Print what a recipe does, its examples as they are written, and its flags.

    The flags that `cls.MOST_USED` names come first, the others in groups: in a config's class, a string that stands by
    itself begins one.
    """
    width = min(WIDTH, shutil.get_terminal_size().columns)
    print(f"usage: {_program()} [--config FILE.yaml] [--name value ...]\n")
    for paragraph in (description or inspect.cleandoc(cls.__doc__ or "")).strip().split("\n\n"):
        as_written = paragraph.startswith("    ")
        print(paragraph if as_written else textwrap.fill(one_line(paragraph), width), end="\n\n")
    entries = list(_entries(cls, (), ""))
    used = [entry for name in getattr(cls, "MOST_USED", ()) for entry in entries if entry.name == name]
    config = Entry("config", "FILE.yaml", "a YAML file, here or among those of `rlhf list`; flags win over it", "")
    blocks = {"Most used" if used else "Flags": [config, *used]}
    for entry in entries:
        if entry not in used:
            blocks.setdefault(entry.group or "Flags", []).append(entry)
    for title, listed in blocks.items():
        print(f"{title}:", *(entry.shown(width) for entry in listed), sep="\n", end="\n\n")


def _entries(cls: type, path: tuple[str, ...], title: str) -> Iterator[Entry]:
    """Every flag: a class's own before those that it inherits, sections last."""
    sections, hints, docs = sections_of(cls), hints_of(cls), _docs(cls)
    for name in sorted(hints, key=[*docs, *hints].index):
        if name not in sections:
            text, group = docs.get(name, ("", ""))
            field = field_of(cls, name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if is_required(field):
                text += " (required)"
            elif default not in ("", None) or not re.search(r"\b(null|default)\b", text):
                text += f" (default: {_plain(default)})"
            group = ": ".join(part for part in (title, group) if part)
            yield Entry(".".join((*path, name)), _takes(hints[name]), text, group)
    for name, (_, inner, optional) in sections.items():
        dotted = (*path, name)
        yield from _entries(inner, dotted, ".".join(dotted) + (" (null turns it off)" if optional else ""))


def _takes(hint: Any) -> str:
    """What a flag takes, in a word."""
    kind = next(choice for choice in _choices(hint) if choice is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    names = {
        int: "N",
        float: "NUMBER",
        bool: "true|false",
        str: "TEXT",
        list: "[A, B]",
        tuple: "[A, B]",
        dict: "{A: B}",
    }
    return names.get(typing.get_origin(kind) or kind, "VALUE")


def _plain(value: Any) -> str:
    """A default as YAML would write it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _program() -> str:
    """The command as it was typed: `rlhf ppo`, or the script."""
    name = Path(sys.argv[0]).name
    return " ".join(["rlhf", *sys.argv[1:2]]) if name.split(".")[0] in ("rlhf", "cli") else f"python {sys.argv[0]}"


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
def _docs(cls: type) -> dict[str, tuple[str, str]]:
    """The string under each field and the group that it is in; a class's own fields before those that it inherits."""
    docs: dict[str, tuple[str, str]] = {}
    for owner in cls.__mro__[:-1]:
        try:
            tree: Any = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue
        group, above = "", None
        for line in tree.body:
            if _is_text(line) and isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name):
                docs.setdefault(above.target.id, (one_line(line.value.value), group))
            elif _is_text(line) and above is not None:  # the first string is the class's own
                group = line.value.value
            above = line
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
