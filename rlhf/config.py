"""Frozen dataclasses <-> YAML <-> command line.

A config is a ``@dataclass(frozen=True, kw_only=True)``; the string under a field is its help::

    @dataclass(frozen=True, kw_only=True)
    class PPOConfig:
        kl_coef: float = 0.05
        '''Weight of the KL penalty in the reward.'''

    config = load(PPOConfig, sys.argv[1:])      # --config my.yaml --kl_coef 0.1

A flag wins over the YAML file, the file over the default. jsonargparse converts the values and prints
``--help``; walking the sections is ours, so that every mistake is one line with file, line and field.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import textwrap
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from rlhf import InputError
from rlhf.entry import import_function, require_divides, run, training_arguments, unknown

__all__ = [
    "fingerprint",
    "from_dict",
    "import_function",
    "load",
    "read_yaml",
    "require_divides",
    "resume_settings",
    "run",
    "to_dict",
    "to_yaml",
    "training_arguments",
]

Config = TypeVar("Config")
Places = dict[tuple[str, ...], str]  # field -> where it was given: "toy.yaml:12" or "--kl_coef"

INHERITED = ("seed", "output_dir")
"""Fields that a section takes from the level above it when it has no value of its own."""

NO_EFFECT = (
    "output_dir", "overwrite", "report_to", "logging_steps", "save_steps", "save_rollouts", "samples_logged",
    "microbatch_size", "tokens_per_microbatch", "generation_batch_size", "gradient_checkpointing",
    "save_total_limit", "on_alarm", "preflight", "on_score_failure", "score_timeout_seconds", "vllm_server",
)  # fmt: skip
"""Fields that don't change what a run computes, or only what it does when something goes wrong: not part of its
fingerprint, so that an interrupted run may go on with others."""


# ---------------------------------------------------------------- reading


def load(
    cls: type[Config],
    argv: Sequence[str],
    *,
    section: str | None = None,
    known_sections: Collection[str] = (),
    description: str = "",
) -> Config:
    """Build ``cls`` from command-line flags and the YAML file named by ``--config``.

    Nested dataclass fields are dotted flags (``--ppo.kl_coef``); ``--base null`` turns an optional section
    off and ``--base.epochs 3`` turns it on. A section without its own ``seed`` or ``output_dir`` takes the
    level above's (``<output_dir>/<section>``).

    With ``section="ppo"`` the file may be a whole chain's: its ``ppo:`` mapping is read, other keys must be
    among ``known_sections`` (the chain's field names) and are left alone. A file that holds the stage's
    fields flat works too. Raises InputError.
    """
    if "--help" in argv or "-h" in argv:
        _print_help(cls, description)
        raise SystemExit(0)
    known = dict(_flags(cls))
    file, flags = _read_flags(argv, known)
    tree, places = read_yaml(file) if file else ({}, {})
    if file and section:
        own = {name.split(".")[0] for name in known}
        tree, places = _take_section(tree, places, file, section, known_sections, own)
    for path, value in flags:
        _put(tree, path, value)
        places[path] = f"--{'.'.join(path)}"
    _inherit(cls, tree)
    return _build(cls, tree, (), places, str(file or "command line"))


def from_dict(cls: type[Config], mapping: Mapping[str, Any], where: str) -> Config:
    """Build ``cls`` from plain values (``to_dict``'s inverse); ``where`` names their source in errors."""
    return _build(cls, mapping, (), {}, where)


def read_yaml(file: str | Path) -> tuple[dict[str, Any], Places]:
    """A YAML file's mapping, and the line of every key in it. Raises InputError."""
    import yaml

    try:
        text = Path(file).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; --config takes the path of a YAML file") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{file}{line}: broken YAML: {_one_line(problem)}") from None
    if tree is None:
        raise InputError(f"{file}: is empty; write one `field: value` per line, or drop --config")
    if not isinstance(tree, dict):
        raise InputError(f"{file}: expected `field: value` lines, got {_shown(tree)}")
    places: Places = {}
    _mark_lines(node, (), file, places)
    return tree, places


def _mark_lines(node: Any, path: tuple[str, ...], file: str | Path, places: Places) -> None:
    for key, value in node.value if node.id == "mapping" else ():
        here = (*path, str(key.value))
        where = f"{file}:{key.start_mark.line + 1}"
        if here in places:
            raise InputError(f"{where}: `{'.'.join(here)}` is given twice; first at {places[here]}")
        places[here] = where
        _mark_lines(value, here, file, places)


def _take_section(
    tree: dict[str, Any], places: Places, file: str, section: str, known: Collection[str], own: set[str]
) -> tuple[dict[str, Any], Places]:
    sections = {section, *known}
    if not any((key not in own and isinstance(tree[key], dict)) or
               (key in sections and (isinstance(tree[key], dict) or key not in own)) for key in tree):  # fmt: skip
        return tree, places  # flat: the stage's own fields
    for key in tree:
        if key not in sections and key not in INHERITED:
            unknown(key, (*sections, *INHERITED), places.get((key,), file), "section")
    taken = tree.get(section)
    if taken is None:
        taken = {}
    if not isinstance(taken, dict):
        where = places[(section,)]
        raise InputError(f"{where}: {section}: expected a section of fields, got {_shown(taken)}")
    for name in set(INHERITED) & own & set(tree):
        if name not in taken:
            taken[name] = f"{tree[name]}/{section}" if name == "output_dir" else tree[name]
            places[(section, name)] = places[(name,)]
    return taken, {path[1:]: place for path, place in places.items() if path[0] == section and path[1:]}


def _inherit(cls: type, tree: dict[str, Any]) -> None:
    for name, (field, inner, optional) in _sections(cls).items():
        if not optional and field.default is dataclasses.MISSING:
            tree.setdefault(name, {})
        below = tree.get(name)
        if not isinstance(below, dict):
            continue
        for key in set(INHERITED) & set(_hints(inner)) & set(_hints(cls)):
            value = tree.get(key, _field(cls, key).default)
            if key not in below and value is not dataclasses.MISSING and value is not None:
                below[key] = f"{value}/{name}" if key == "output_dir" else value
        _inherit(inner, below)


def _build(cls: Any, tree: Any, path: tuple[str, ...], places: Places, where: str, base: Any = None) -> Any:
    """``cls`` from a nested mapping; fields that it lacks are ``base``'s, or the defaults."""
    here = places.get(path, where)
    if not isinstance(tree, Mapping):
        raise InputError(f"{here}: {'.'.join(path)}: expected a section of fields, got {_shown(tree)}")
    sections, hints, values = _sections(cls), _hints(cls), {}
    for key, value in tree.items():
        at = (*path, str(key))
        if key not in hints:
            unknown(".".join(at), [".".join((*path, name)) for name in hints], places.get(at, here), "key")
        if key not in sections:
            place = places.get(at, here)
            label = place if place.startswith("--") else f"{place}: {'.'.join(at)}"
            values[key] = _convert(hints[key], value, label)
            continue
        field, inner, optional = sections[key]
        if optional and value in (None, "null"):
            values[key] = None
        else:
            default = field.default_factory() if callable(field.default_factory) else field.default
            default = default if isinstance(default, inner) else None
            values[key] = _build(inner, value, at, places, here, default)
    missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in values]
    if missing and base is None:
        name = ".".join((*path, missing[0]))
        raise InputError(f"{here}: `{name}` is required; give --{name}, or {missing[0]}: in the YAML file")
    try:
        return dataclasses.replace(base, **values) if base is not None else cls(**values)
    except ValueError as error:  # a config's own checks
        prefix = f"{'.'.join(path)}: " if path else ""
        raise InputError(_one_line(f"{prefix}{error}")) from None


def _convert(hint: Any, value: Any, label: str) -> Any:
    """One value as its field's type, by jsonargparse: "1e-3" is a number, "[a, b]" a list, 1 is not text."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--value", type=hint)
    try:
        if value is None and not _allows_none(hint):
            raise ValueError
        converted = parser.parse_object({"value": value}).value
        if isinstance(converted, float) and math.isnan(converted):
            raise ValueError
        return converted
    except (jsonargparse.ArgumentError, ValueError, TypeError):
        raise InputError(f"{label}: expected {_expected(hint)}, got {_shown(value)}") from None


# ---------------------------------------------------------------- command line


def _flags(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every flag's dotted name and type; an optional section is a flag too, for `--base null`."""
    sections = _sections(cls)
    for name, hint in _hints(cls).items():
        if name in sections:
            if sections[name][2]:
                yield ".".join((*path, name)), None
            yield from _flags(sections[name][1], (*path, name))
        else:
            yield ".".join((*path, name)), hint


def _read_flags(argv: Sequence[str], known: dict[str, Any]) -> tuple[str | None, list[tuple[tuple[str, ...], str]]]:
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


def _put(tree: dict[str, Any], path: tuple[str, ...], value: str) -> None:
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = value


def _print_help(cls: type, description: str) -> None:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        description=description or inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0],
        usage="%(prog)s [--config FILE.yaml] [--name value ...]",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="a YAML file; flags win over it")
    _add_help(parser, parser, cls, ())
    parser.print_help()


def _add_help(parser: Any, group: Any, cls: type, path: tuple[str, ...]) -> None:
    sections, docs = _sections(cls), _docs(cls)
    for field in dataclasses.fields(cls):
        if field.name not in sections:
            factory = field.default_factory
            default = factory() if callable(factory) else field.default
            more = {"required": True} if default is dataclasses.MISSING else {"default": default}
            flag = "--" + ".".join((*path, field.name))
            group.add_argument(flag, type=_hints(cls)[field.name], help=docs.get(field.name, "-"), **more)
    for name, (_, inner, optional) in sections.items():
        title = ".".join((*path, name)) + (" (null turns it off)" if optional else "")
        _add_help(parser, parser.add_argument_group(title, docs.get(name)), inner, (*path, name))


# ---------------------------------------------------------------- dataclasses


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@cache
def _sections(cls: Any) -> dict[str, tuple[dataclasses.Field, Any, bool]]:
    """Fields that are dataclasses themselves: name -> (field, class, may be None)."""
    found = {}
    for field in dataclasses.fields(cls):
        hint = _hints(cls)[field.name]
        for choice in _choices(hint):
            if dataclasses.is_dataclass(choice):
                found[field.name] = (field, choice, _allows_none(hint))
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
                docs[line.target.id] = _one_line(below.value.value)
    return docs


def _is_text(line: Any) -> bool:
    value = line.value if isinstance(line, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _field(cls: type, name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(cls) if field.name == name)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _allows_none(hint: Any) -> bool:
    return hint is Any or types.NoneType in _choices(hint)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_NAMES[types.NoneType] = "null"


def _expected(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if len(_choices(hint)) > 1:
        return " or ".join(_expected(choice) for choice in _choices(hint))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (list, tuple):
        return "a list of " + " and ".join(_expected(arg) for arg in args if arg is not ...)
    if origin is dict:
        return f"a mapping to {_expected(args[1])}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


# ---------------------------------------------------------------- writing


def to_dict(config: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """A config as plain JSON/YAML values, leaving out the fields named in ``without`` at every level."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value) if field.name not in without]
            return {name: plain(getattr(value, name)) for name in names}
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def to_yaml(config: Any) -> str:
    """A config as YAML that ``load`` reads back."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)


def fingerprint(config: Any) -> str:
    """sha256 of the canonical JSON of what a run computes (everything but ``NO_EFFECT``)."""
    text = json.dumps(to_dict(config, NO_EFFECT), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def resume_settings(config: Any, cls: type) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it: the fields of ``cls`` that change its weights.

    ``cls`` is the trainer's config; what a recipe's config adds to it (paths) may have moved.
    """
    names = {item.name for item in dataclasses.fields(cls)} - {*NO_EFFECT, "eval_steps"}
    return {name: value for name, value in to_dict(config).items() if name in names}
