"""Frozen dataclasses <-> YAML <-> command line.

A config is a ``@dataclass(frozen=True, kw_only=True)``; the string under a field is its help::

    @dataclass(frozen=True, kw_only=True)
    class PPOConfig:
        kl_coef: float = 0.05
        '''Weight of the KL penalty in the reward.'''

    config = load(PPOConfig, sys.argv[1:])      # --config my.yaml --kl_coef 0.1

A flag wins over the YAML file, the file over the default. jsonargparse converts the values; walking the sections is
ours, so that every mistake is one line with file, line and field.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf.errors import InputError, reason, require_divides, run, unknown
from rlhf.flags import INHERITED, OF_THE_CHAIN, all_flags, print_help, put, read_flags, unknown_name
from rlhf.hints import (
    allows_none,
    as_written,
    choices_of,
    expected,
    field_of,
    has_mapping,
    hints_of,
    is_list,
    is_required,
    is_text_or_list,
    one_line,
    sections_of,
    shown,
)
from rlhf.run.changes import no_effect
from rlhf.run.functions import import_function
from rlhf.run.lookup import look_up
from rlhf.run.settings import split_names
from rlhf.run.trl_arguments import training_arguments
from rlhf.urls import require_no_secret

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

    ``--config`` is looked up in the working directory, then among the recipes' configs. Nested dataclass fields are
    dotted flags (``--ppo.kl_coef``); ``--base null`` turns an optional section
    off and ``--base.epochs 3`` turns it on. A section without its own ``seed`` or ``output_dir`` takes the
    level above's (``<output_dir>/<section>``).

    With ``section="ppo"`` the file may be a whole chain's: its ``ppo:`` mapping is read, other keys must be
    among ``known_sections`` and are left alone. A file that holds the stage's fields flat works too. Without
    ``section`` the file's sections are ``cls``'s own; the other ``known_sections`` are left alone. Raises InputError.
    """
    if "--help" in argv or "-h" in argv:
        print_help(cls, description)
        raise SystemExit(0)
    known = dict(all_flags(cls))
    file, flags = read_flags(argv, known)
    file = file and str(look_up(file, f"{file}: no such file", "configs"))
    tree, places = read_yaml(file) if file else ({}, {})
    own = list(dict.fromkeys(name.split(".")[0] for name in known))
    if file and section:
        tree, places = _take_section(tree, places, file, section, known_sections, own)
    elif file and known_sections:
        tree = _without_others(tree, places, file, own, known_sections)
    for path, value in flags:
        put(tree, path, value)
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
        tree = _parsed(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; name a YAML file") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{file}{line}: broken YAML: {one_line(problem)}") from None
    if tree is None:
        raise InputError(f"{file}: is empty; write one `field: value` per line")
    if not isinstance(tree, dict):
        raise InputError(f"{file}: expected `field: value` lines, got {shown(tree)}")
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
    tree: dict[str, Any], places: Places, file: str, section: str, known: Collection[str], own: Collection[str]
) -> tuple[dict[str, Any], Places]:
    sections = dict.fromkeys((section, *known))
    if not any((key not in own and isinstance(tree[key], dict)) or
               (key in sections and (isinstance(tree[key], dict) or key not in own)) for key in tree):  # fmt: skip
        return tree, places  # flat: the stage's own fields
    for key in tree:
        if key not in sections and key not in INHERITED + OF_THE_CHAIN:
            unknown(key, (*sections, *INHERITED), places.get((key,), file), "section")
    taken = tree.get(section)
    if taken is None:
        taken = {}
    if not isinstance(taken, dict):
        where = places[(section,)]
        raise InputError(f"{where}: {section}: expected a section of fields, got {shown(taken)}")
    for name in set(INHERITED) & set(own) & set(tree):
        if name not in taken and tree[name] is not None:
            taken[name] = f"{tree[name]}/{section}" if name == "output_dir" else tree[name]
            places[(section, name)] = places[(name,)]
    return taken, {path[1:]: place for path, place in places.items() if path[0] == section and path[1:]}


def _without_others(
    tree: dict[str, Any], places: Places, file: str, own: Collection[str], known: Collection[str]
) -> dict[str, Any]:
    """A config's own fields and sections, without those of other recipes. Raises InputError for any other key."""
    for key in tree:
        if key not in own and key not in known:
            unknown_name(key, dict.fromkeys((*own, *known)), places.get((key,), file), "key")
    return {key: value for key, value in tree.items() if key in own}


def _inherit(cls: type, tree: dict[str, Any]) -> None:
    for name, (field, inner, optional) in sections_of(cls).items():
        if not optional and field.default is dataclasses.MISSING:
            tree.setdefault(name, {})
        below = tree.get(name)
        if not isinstance(below, dict):
            continue
        for key in set(INHERITED) & set(hints_of(inner)) & set(hints_of(cls)):
            value = tree.get(key, field_of(cls, key).default)
            if key not in below and value is not dataclasses.MISSING and value is not None:
                below[key] = f"{value}/{name}" if key == "output_dir" else value
        _inherit(inner, below)


def _build(cls: Any, tree: Any, path: tuple[str, ...], places: Places, where: str, base: Any = None) -> Any:
    """``cls`` from a nested mapping; fields that it lacks are ``base``'s, or the defaults."""
    here = places.get(path, where)
    if not isinstance(tree, Mapping):
        raise InputError(f"{here}: {'.'.join(path)}: expected a section of fields, got {shown(tree)}")
    sections, hints, values = sections_of(cls), hints_of(cls), {}
    for key, value in tree.items():
        at = (*path, str(key))
        if key not in hints:
            unknown_name(".".join(at), [".".join((*path, name)) for name in hints], places.get(at, here), "key")
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
    missing = [f.name for f in dataclasses.fields(cls) if is_required(f) and f.name not in values]
    if missing and base is None:
        name = ".".join((*path, missing[0]))
        raise InputError(f"{here}: `{name}` is required; give --{name}, or {missing[0]}: in the YAML file")
    try:
        return dataclasses.replace(base, **values) if base is not None else cls(**values)
    except ValueError as error:  # a config's own checks
        prefix = f"{'.'.join(path)}: " if path else ""
        raise InputError(one_line(f"{prefix}{error}")) from None


def _convert(hint: Any, value: Any, label: str) -> Any:
    """One value as its field's type, by jsonargparse: "1e-3" is a number, "[a, b]" and "a,b" are lists, 1 no text."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--value", type=hint)
    if is_list(hint) and isinstance(value, str) and not value.startswith("[") and value != "null":
        value = split_names(value)
    try:
        if is_text_or_list(hint) and isinstance(value, str) and value.startswith("["):
            value = _read(value)
        if value is None and not allows_none(hint):
            raise ValueError
        if value in ("inf", "-inf") and float in choices_of(hint):  # as our JSON writes infinity
            value = float(value)
        mapping = _of_any_type(value) if dict[str, Any] in choices_of(hint) else None
        converted: Any = mapping
        if str in choices_of(hint) and isinstance(value, str) and value.lstrip().startswith("#"):
            converted = value  # for YAML a comment, which is null
        elif mapping is None:
            read = _read(value) if isinstance(value, str) and has_mapping(hint) else None
            given = read if isinstance(read, Mapping) else value
            converted = parser.parse_object({"value": given}).value
        if isinstance(converted, float) and math.isnan(converted):
            raise ValueError
    except (jsonargparse.ArgumentError, ValueError, TypeError, OverflowError, RecursionError):
        raise InputError(f"{label}: expected {expected(hint)}, got {shown(value)}") from None
    require_no_secret(converted, label)
    return converted


def _of_any_type(value: Any) -> dict[str, Any] | None:
    """Return a mapping whose values may be of any type as it was written (`as_written`); None for what is none."""
    tree = _read(value) if isinstance(value, str) else value
    return as_written(tree) if isinstance(tree, Mapping) else None


def _read(text: str) -> Any:
    import yaml

    try:
        return _parsed(text)
    except yaml.YAMLError:
        raise ValueError from None


def _parsed(text: str) -> Any:
    """Return what YAML says, its keys as they are written: `no` and `1` are names. Raises YAMLError."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            self.flatten_mapping(node)
            for key, _ in node.value:
                key.tag = "tag:yaml.org,2002:str" if key.id == "scalar" else key.tag
            return super().construct_mapping(node, deep)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep=True)  # deep: what holds itself is refused
            except yaml.YAMLError:
                raise
            except Exception as error:  # what int, float and date raise
                raise yaml.constructor.ConstructorError(None, None, reason(error), node.start_mark) from None

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


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
    """sha256 of the canonical JSON of what a run computes (see `rlhf.run.changes`)."""
    text = json.dumps(to_dict(config, no_effect(config)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def resume_settings(config: Any, cls: type) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it: the fields of ``cls`` that change its weights.

    ``cls`` is the trainer's config; what a recipe's config adds to it (paths) may have moved.
    """
    names = {item.name for item in dataclasses.fields(cls)} - {*no_effect(config)}
    return {name: value for name, value in to_dict(config).items() if name in names}
