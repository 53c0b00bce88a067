"""A registry of OpenAI Evals, read as it is: evals/*.yaml, data/, modelgraded/*.yaml.

An entry of a YAML file is an alias (`name: {id: name.dev.v0, metrics: [...]}`) or an eval (`name.dev.v0: {class: ...,
args: {...}}`). What cannot be run here (a class of its own, a solver, data that were not fetched) is a reason of one
line, and stops nothing else. The layout is that of github.com/openai/evals.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.errors import InputError, unknown
from rlhf.evals.grading import Eval, make_eval
from rlhf.evals.modelgraded import Spec, read_spec
from rlhf.rows.files import show, wrong

CLASSES = {
    "evals.elsuite.basic.match:Match": "Match",
    "evals.elsuite.basic.includes:Includes": "Includes",
    "evals.elsuite.basic.fuzzy_match:FuzzyMatch": "FuzzyMatch",
    "evals.elsuite.basic.json_match:JsonMatch": "JsonMatch",
    "evals.elsuite.modelgraded.classify:ModelBasedClassify": "ModelBasedClassify",
}
"""The classes that run here, by their names in a registry."""


@dataclass(frozen=True)
class Entry:
    """What a registry says under one name, and in which line of which file."""

    name: str
    value: Any
    where: str

    @property
    def alias(self) -> str | None:
        """Return the name that this entry stands for; None for an eval."""
        target = self.value.get("id") if isinstance(self.value, dict) else self.value
        return target if isinstance(target, str) else None


@dataclass(frozen=True)
class Unread:
    """An entry, or a file, that cannot be run, and why, in one line."""

    name: str
    reason: str


class Registry:
    """A registry's folder: the one that holds evals/, data/ and modelgraded/. Raises InputError where it is none."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not any((self.folder / "evals").glob("*.yaml")):
            inner = next((p for p in ("evals/registry", "registry") if any((self.folder / p).glob("evals/*.yaml"))), "")
            hint = f"name {self.folder / inner}" if inner else "name the folder that holds evals/, data/, modelgraded/"
            raise InputError(f"{folder}: no evals/*.yaml in it; {hint}")
        self.unread: list[Unread] = []
        """Files that are no YAML, and names that stand in two files."""
        self.entries = self._read("evals")

    def _read(self, kind: str) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for file in sorted((self.folder / kind).glob("*.yaml")):
            try:
                entries = entries_of(file)
            except InputError as error:
                self.unread.append(Unread(file.name, str(error)))
                continue
            for entry in entries:
                if entry.name in found:
                    reason = f"{entry.where}: `{entry.name}` stands already in {found[entry.name].where}; rename one"
                    self.unread.append(Unread(entry.name, reason))
                else:
                    found[entry.name] = entry
        return found

    @cached_property
    def _specs(self) -> dict[str, Entry]:
        return self._read("modelgraded")

    @property
    def names(self) -> list[str]:
        """Return the names of all evals, without aliases."""
        return [name for name, entry in self.entries.items() if entry.alias is None]

    def find(self, patterns: Sequence[str]) -> list[str]:
        """Return the evals that patterns name, each once: names, aliases, and names with * for anything.

        Raises InputError for a pattern that names nothing."""
        found: dict[str, None] = {}
        for pattern in patterns:
            shape = re.compile(re.escape(pattern).replace(r"\*", ".*"))
            named = [name for name in self.entries if shape.fullmatch(name)]
            if not named:
                unknown(pattern, list(self.entries), str(self.folder), "eval")
            found |= dict.fromkeys(self._target(name) for name in named)
        return list(found)

    def _target(self, name: str) -> str:
        """Follow aliases to an eval's own name; one that leads nowhere, or back, stays: `load` says so."""
        seen = [name]
        while name in self.entries and (target := self.entries[name].alias) is not None:
            if target in seen:
                return seen[0]
            seen.append(target)
            name = target
        return name if name in self.entries else seen[0]

    def load(self, name: str) -> Eval | Unread:
        """Read an eval with its samples, or say in one line why it cannot be run."""
        try:
            return self._load(self.entries[name])
        except InputError as error:
            return Unread(name, str(error))

    def _load(self, entry: Entry) -> Eval:
        if entry.alias is not None:
            raise wrong(entry.where, f"{entry.name} stands for {entry.alias}, which is not there", "name another eval")
        if not isinstance(entry.value, dict) or not isinstance(entry.value.get("class"), str):
            raise wrong(entry.where, f"{entry.name} has no class and no id", "an eval has class and args")
        name, arguments = entry.value["class"], entry.value.get("args") or {}
        if name not in CLASSES:
            raise wrong(
                entry.where, f"{entry.name} has a class of its own, {name}", f"{', '.join(CLASSES.values())} run"
            )
        if not isinstance(arguments, dict):
            raise wrong(f"{entry.where}: args", f"got {show(arguments)}", "write argument: value lines")
        return make_eval(entry.name, CLASSES[name], arguments, entry.where, self._file, self._spec)

    def _file(self, given: str) -> Path:
        """Return the file that an argument names, below data/, as the package finds it; a path that leads out of the
        registry is refused, since a registry may be somebody else's."""
        path = self.folder / "data" / given
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise wrong(given, "leads out of the registry", "copy the file into its data/")
        return path

    def _spec(self, name: str) -> Spec:
        if name not in self._specs:
            unknown(name, list(self._specs), str(self.folder / "modelgraded"), "modelgraded spec")
        entry, seen = self._specs[name], [name]
        while isinstance(entry.value, str) and entry.value in self._specs and entry.value not in seen:
            seen.append(entry.value)
            entry = self._specs[entry.value]
        return read_spec(entry.value, f"{entry.where}: {entry.name}")


def entries_of(file: Path) -> list[Entry]:
    """Read the entries of a YAML file, with their lines. Raises InputError; an empty file has none.

    Of a name that stands in it twice the last counts, as in the package."""
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"{file}{f':{mark.line + 1}' if mark else ''}: broken YAML: {problem}") from None
    if tree is None:
        return []
    if file.parent.name == "modelgraded" and isinstance(tree, dict) and "choice_strings" in tree:
        return [Entry(file.stem, tree, f"{file}:1")]  # a spec by itself, named by its file
    if not isinstance(tree, dict):
        raise InputError(f"{file}: expected `name: ...` lines, got {show(tree)}")
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    return [Entry(str(name), value, f"{file}:{lines.get(str(name), 1)}") for name, value in tree.items()]
