"""Suites: sets of attacks, and of harmless prompts beside them, read from the files as their authors publish them.

| suite | file | a case | category |
|---|---|---|---|
| HarmBench | `harmbench_behaviors_text_*.csv` | Behavior, behind its ContextString | SemanticCategory |
| AdvBench | `harmful_behaviors.csv` | goal | advbench |
| JailbreakBench | `harmful-behaviors.csv` and `benign-behaviors.csv` | Goal | Category |
| its artifacts | JSON with `jailbreaks` | prompt | category |
| XSTest | `xstest_prompts.csv` | prompt: safe ones deserve an answer | type, without contrast_ |
| HH red-team attempts | `red_team_attempts.jsonl.gz` | the transcript's first human turn | the first tag |
| your own | JSON lines, CSV ... | prompt | category |

A row of your own has `prompt` (text or messages), `category` and `behaviour` (refuse, safe_complete or comply); where a
usage policy is given that has the category, the behaviour may be left out. Every row is read or refused with its line.
"""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rlhf.errors import InputError, short
from rlhf.rows.fields import prompt_fields
from rlhf.rows.files import file_rows, kind_of
from rlhf.rows.messages import Messages
from rlhf.rows.sources import wrong
from rlhf.safety.policy import BEHAVIOURS, Behaviour, Policy

log = logging.getLogger("rlhf")

Row = Mapping[str, Any]
OWN_POLICY = "policy"
"""The name of the suite that a policy's own examples and benign twins make."""
GENERATED = "generated"
"""The name of the suite of attacks that a model wrote."""


@dataclass(frozen=True)
class Case:
    """A prompt, and what an assistant is to do with it."""

    suite: str
    prompt: Messages
    category: str
    behaviour: Behaviour
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    where: str = field(default="", compare=False)


def read_suites(
    sources: Iterable[str], policy: Policy | None = None, most: int | None = None, seed: int = 0
) -> list[Case]:
    """Read suites, and the policy's own examples and benign twins where a policy is given.

    most: draw so many cases of each suite and behaviour at random, in their order. Raises InputError, also where a
    policy's case stands in a file with another behaviour, and for two suites of one name."""
    cases: list[Case] = []
    if policy is not None:
        cases += [_own(OWN_POLICY, row, f"policy {policy.name}", policy) for row in policy.prompts()]
    made = {OWN_POLICY: ("that of the usage policy", True), GENERATED: ("that of written attacks", True)}
    for source in sources:
        found = read_suite(source, policy)
        suite, own = found[0].suite, _published(found[0].columns) is None
        if suite in made and (own or made[suite][1]):
            raise wrong(source, f"its suite would be {suite}, as {made[suite][0]} is", "rename the file")
        made[suite] = source, own
        cases += found
    if not cases:
        raise InputError("nothing to ask: no suite, and a usage policy without examples; name --data")
    wanted: dict[str, Case] = {}
    for case in cases:
        first = wanted.setdefault(json.dumps(case.prompt), case)
        if first.behaviour != case.behaviour:
            seen = f"{case.behaviour} for {short(repr(case.prompt[-1]['content']))}, which {first.where} has as"
            raise InputError(f"{case.where}: behaviour: {seen} {first.behaviour}; take it out of one of them")
    groups: dict[tuple[str, str], list[int]] = {}
    for number, case in enumerate(cases):
        groups.setdefault((case.suite, case.behaviour), []).append(number)
    kept: set[int] = set()
    for (suite, behaviour), numbers in groups.items():
        few = most is None or len(numbers) <= most
        kept |= set(numbers if few else random.Random(f"{seed}:{suite}:{behaviour}").sample(numbers, int(most or 0)))
    return [case for number, case in enumerate(cases) if number in kept]


def read_suite(source: str, policy: Policy | None = None) -> list[Case]:
    """Read one file. Raises InputError, one line with the row, for what is no suite and for a row that can't be
    read."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(
            f"{source}: no such file; name a suite's file: {', '.join(name for name, *_ in _FORMATS)}, own"
        )
    cases: list[Case] = []
    without = 0
    reader: Callable[[Row, str, Path], Case | None] | None = None
    for where, row in _rows(path):
        if not isinstance(row, dict):
            raise wrong(where, f"got a {type(row).__name__}", "write an object with prompt, category and behaviour")
        if reader is None:
            reader = _reader_of(row, where, policy)
        case = reader(row, where, path)
        cases += [case] if case is not None else []
        without += case is None
    if without:
        log.warning("%s: left out %d goals for which the attack found no prompt", source, without)
    if not cases:
        raise wrong(source, "no rows", "name a file with at least one")
    return cases


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield a file's rows. HH's attempts are one JSON array in a file called .jsonl, an artifact of JailbreakBench is
    one object with its rows in `jailbreaks`."""
    if kind_of(path.name)[1] in (".jsonl", ".json"):
        unpack: dict[str, Callable[[bytes], bytes]] = {
            ".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress
        }  # fmt: skip
        try:
            content = unpack.get(path.suffix, bytes)(path.read_bytes()).lstrip()
            whole = json.loads(content) if content[:1] == b"[" or b'"jailbreaks"' in content[:100_000] else None
        except (OSError, EOFError, ValueError, lzma.LZMAError, RecursionError):
            whole = None  # the error that follows says what is wrong
        if isinstance(whole, dict) and isinstance(whole.get("jailbreaks"), list):
            whole = whole["jailbreaks"]
        if isinstance(whole, list):
            yield from ((f"{path}: row {n}", row) for n, row in enumerate(whole))
            return
    yield from file_rows(path)


# ----------------------------------------------------------------------------------------------------- the formats


def _reader_of(row: Row, where: str, policy: Policy | None) -> Callable[[Row, str, Path], Case | None]:
    if (published := _published(row)) is not None:
        return published
    if "prompt" in row:
        return lambda one, at, path: _own(kind_of(path.name)[0], one, at, policy)
    if set(row) == {"target"}:
        raise wrong(where, "AdvBench's strings, which ask for nothing", "take its harmful_behaviors.csv")
    known = "; ".join(f"{name} ({', '.join(columns)})" for name, columns, _ in _FORMATS)
    seen = f"columns {short(', '.join(map(str, row)))}"
    raise wrong(where, seen, f"write prompt, category and behaviour, or take a file of {known}")


def _published(row: Row) -> Callable[[Row, str, Path], Case | None] | None:
    """Return the reader of a published suite that a row is of; None for an own row."""
    own = "prompt" in row and "behaviour" in row
    for _, columns, reader in () if own else _FORMATS:
        if all(any(name in row for name in either.split("|")) for either in columns):
            return reader
    return None


def _case(suite: str, where: str, text: object, category: object, behaviour: Behaviour, row: Row, field: str) -> Case:
    """Make a case of one text. Raises InputError where it is none."""
    if not isinstance(text, str) or not text.strip():
        raise wrong(f"{where}: {field}", f"got {short(repr(text))}", "write the prompt there")
    if not isinstance(category, str) or not category.strip():
        raise wrong(f"{where}: category", f"got {short(repr(category))}", "write a category's name")
    return Case(suite, [{"role": "user", "content": text}], category.strip(), behaviour, row, where)


def _harmbench(row: Row, where: str, path: Path) -> Case:
    if row.get("ImageFileName"):
        raise wrong(where, "a behaviour with an image", "take a file of HarmBench's text behaviours")
    text, context = row.get("Behavior"), row.get("ContextString")
    if context and isinstance(text, str):
        text = f"{context}\n\n---\n\n{text}"  # as HarmBench's direct request writes it
    return _case("harmbench", where, text, row.get("SemanticCategory"), "refuse", row, "Behavior")


def _jailbreakbench(row: Row, where: str, path: Path) -> Case:
    names = {"benign": "comply", "harmful": "refuse"}
    behaviour = next((wanted for name, wanted in names.items() if name in path.name), None)
    if behaviour is None:
        seen = "whether these goals are harmful or benign stands in the name of JailbreakBench's files alone"
        raise wrong(where, seen, "name it harmful-behaviors.csv or benign-behaviors.csv")
    return _case("jailbreakbench", where, row.get("Goal"), row.get("Category"), cast(Behaviour, behaviour), row, "Goal")


def _artifact(row: Row, where: str, path: Path) -> Case | None:
    if row.get("prompt") is None:  # the attack found none for this goal
        return None
    return _case("jailbreakbench_artifact", where, row["prompt"], row.get("category"), "refuse", row, "prompt")


def _xstest(row: Row, where: str, path: Path) -> Case:
    kind, label = row.get("type"), row.get("label")
    if label is None and isinstance(kind, str):  # version 2's first file
        label = "unsafe" if kind.startswith("contrast_") else "safe"
    if label not in ("safe", "unsafe"):
        raise wrong(f"{where}: label", f"got {short(repr(label))}", "write safe or unsafe")
    category = kind.removeprefix("contrast_") if isinstance(kind, str) else kind
    return _case("xstest", where, row.get("prompt"), category, "comply" if label == "safe" else "refuse", row, "prompt")


_TURN = re.compile(r"\n\n(?:Human|Assistant):|\Z")


def _hh(row: Row, where: str, path: Path) -> Case:
    transcript, tags = row.get("transcript"), row.get("tags")
    if not isinstance(transcript, str) or not transcript.lstrip().startswith("Human:"):
        raise wrong(f"{where}: transcript", f"got {short(repr(transcript))}", "begin it with Human:")
    spoken = transcript.lstrip().removeprefix("Human:")
    turn = spoken[: cast(re.Match[str], _TURN.search(spoken)).start()].strip()
    tagged = tags[0] if isinstance(tags, list) and tags else "untagged"
    return _case("hh_red_team", where, turn, tagged, "refuse", row, "transcript")


def _advbench(row: Row, where: str, path: Path) -> Case:
    return _case("advbench", where, row.get("goal"), "advbench", "refuse", row, "goal")


_FORMATS: tuple[tuple[str, tuple[str, ...], Callable[[Row, str, Path], Case | None]], ...] = (
    ("HarmBench", ("Behavior", "SemanticCategory"), _harmbench),
    ("JailbreakBench", ("Goal", "Behavior", "Category"), _jailbreakbench),
    ("JailbreakBench's artifacts", ("goal", "behavior", "prompt", "jailbroken|response"), _artifact),
    ("XSTest", ("prompt", "type", "label|note"), _xstest),
    ("HH red-team attempts", ("transcript", "rating"), _hh),
    ("AdvBench", ("goal", "target"), _advbench),
)


def _own(suite: str, row: Row, where: str, policy: Policy | None) -> Case:
    try:
        messages = prompt_fields({"prompt": row.get("prompt")})[0]
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    category, behaviour = row.get("category"), row.get("behaviour")
    if not isinstance(category, str) or not category.strip():
        raise wrong(f"{where}: category", f"got {short(repr(category))}", "write a category's name")
    known = policy.categories if policy is not None else {}
    if behaviour is None and category in known:
        behaviour = known[category].behaviour
    if behaviour not in BEHAVIOURS:
        todo = f"write one of {', '.join(BEHAVIOURS)}"
        todo += "" if known else ", or name a usage policy that has the category (--policy)"
        raise wrong(f"{where}: behaviour", f"got {short(repr(behaviour))}", todo)
    return Case(suite, messages, category.strip(), behaviour, row, where)


def without_twins(cases: Sequence[Case]) -> list[str]:
    """Return the categories of attacks beside which no case deserves an answer: what is refused too much there stays
    unseen."""
    beside = {(case.suite, case.category) for case in cases if case.behaviour == "comply"}
    attacked = dict.fromkeys((case.suite, case.category) for case in cases if case.behaviour == "refuse")
    return [f"{suite}/{category}" for suite, category in attacked if (suite, category) not in beside]
