"""What annotators are asked: a title, guidelines, criteria to rate by, flags; read from a YAML file.

title: Helpful answers
guidelines: guidelines.md        # a file beside this one
criteria:
  - {name: helpfulness, scale: 5, text: "Does it do what was asked?"}
  - {name: tone, scale: [rude, plain, kind]}
flags: [unsafe, personal data, broken prompt]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.config import read_yaml
from rlhf.errors import InputError, short, unknown

MOST_POINTS, MOST_FLAGS, MOST_CRITERIA = 10, 9, 12
LARGEST_GUIDELINES = 200_000  # characters
FLAGS = ("unsafe", "personal data", "broken prompt")


@dataclass(frozen=True)
class Criterion:
    """One thing that every response is rated by, as a whole number from 1 to the number of `scale`'s points."""

    name: str
    scale: tuple[str, ...]
    """What each point is called on the page, the worst first."""
    text: str = ""


@dataclass(frozen=True)
class Project:
    """What annotators see beside the responses."""

    title: str = "Ranking responses"
    guidelines: str = ""
    """Markdown, of which the page shows headings, lists, bold and code; all else as it is written."""
    criteria: tuple[Criterion, ...] = ()
    flags: tuple[str, ...] = FLAGS

    @property
    def guideline(self) -> str:
        """Return all that judgments depend on, as text: the store keeps it, and each judgment names its hash."""
        if not self.criteria:
            return self.guidelines
        asked = [asdict(criterion) for criterion in self.criteria]
        return f"{self.guidelines}\n\n{json.dumps({'criteria': asked}, ensure_ascii=False)}"

    def to_json(self) -> dict[str, Any]:
        """Write the project as the page and `from_json` read it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Project:
        """Read what `to_json` wrote."""
        criteria = (Criterion(one["name"], tuple(one["scale"]), one["text"]) for one in content["criteria"])
        return cls(content["title"], content["guidelines"], tuple(criteria), tuple(content["flags"]))


def read_project(file: str | Path) -> Project:
    """Read a project from YAML. Raises InputError with file and line."""
    tree, places = read_yaml(file)

    def where(*path: str) -> str:
        return f"{places.get(path, str(file))}: {path[-1]}"

    for key in tree:
        if key not in ("title", "guidelines", "criteria", "flags"):
            unknown(key, ("title", "guidelines", "criteria", "flags"), places.get((key,), str(file)), "key")
    title = _text(tree.get("title", Project.title), where("title"), 200)
    guidelines = ""
    if tree.get("guidelines") is not None:
        name = _text(tree["guidelines"], where("guidelines"), 1000)
        guidelines = _read_text(Path(file).parent / name, where("guidelines"))
    criteria = tuple(
        _criterion(entry, f"{where('criteria')}[{n}]")
        for n, entry in enumerate(_list(tree.get("criteria"), where("criteria"), MOST_CRITERIA))
    )
    _distinct([criterion.name for criterion in criteria], where("criteria"))
    listed = _list(tree.get("flags", list(FLAGS)), where("flags"), MOST_FLAGS)
    flags = tuple(_text(flag, f"{where('flags')}[{n}]", 60) for n, flag in enumerate(listed))
    _distinct(flags, where("flags"))
    return Project(title, guidelines, criteria, flags)


def check_ratings(ratings: Mapping[Any, Mapping[str, float]], project: Project) -> None:
    """Raise InputError for a rating by an unknown criterion, or off its scale."""
    scales = {criterion.name: len(criterion.scale) for criterion in project.criteria}
    for given in ratings.values():
        for name, rating in given.items():
            if name not in scales:
                unknown(short(name), scales or ["none"], "ratings", "criterion")
            if rating not in range(1, scales[name] + 1):
                raise InputError(f"ratings.{name}: got {rating}; send a whole number from 1 to {scales[name]}")


def _criterion(entry: object, where: str) -> Criterion:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: got {short(repr(entry))}; write {{name: helpfulness, scale: 5, text: ...}}")
    for key in entry:
        if key not in ("name", "scale", "text"):
            unknown(str(key), ("name", "scale", "text"), where, "key")
    name = _text(entry.get("name"), f"{where}.name", 60)
    text = _text(entry.get("text", ""), f"{where}.text", 1000, least=0)
    scale = entry.get("scale", 5)
    if isinstance(scale, int) and not isinstance(scale, bool):
        if not 2 <= scale <= MOST_POINTS:
            raise InputError(f"{where}.scale: got {scale}; use 2 to {MOST_POINTS} points, or a list of their names")
        return Criterion(name, tuple(str(point) for point in range(1, scale + 1)), text)
    points = [_text(point, f"{where}.scale[{n}]", 40) for n, point in enumerate(_list(scale, f"{where}.scale", 10))]
    if len(points) < 2:
        raise InputError(f"{where}.scale: got {len(points)} names; a scale has 2 to {MOST_POINTS} points")
    _distinct(points, f"{where}.scale")
    return Criterion(name, tuple(points), text)


def _text(value: object, where: str, most: int, least: int = 1) -> str:
    """Return a text without white space around it; numbers and yes/no, which YAML makes of some words, are refused."""
    if not isinstance(value, str) or not least <= len(value.strip()) <= most:
        raise InputError(f"{where}: got {short(repr(value))}; write text of {least} to {most} characters, in quotes")
    return value.strip()


def _list(value: object, where: str, most: int) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > most:
        raise InputError(f"{where}: got {short(repr(value))}; write a list of at most {most}")
    return value


def _distinct(names: tuple[str, ...] | list[str], where: str) -> None:
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise InputError(f"{where}: {short(twice)!r} is given twice; leave one out")


def _read_text(path: Path, where: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{where}: {path} is not UTF-8 text") from None
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"{where}: {path}: {what}; paths are relative to the project file") from None
    if len(text) > LARGEST_GUIDELINES:
        raise InputError(f"{where}: {path} has {len(text)} characters; the page shows {LARGEST_GUIDELINES}")
    return text
