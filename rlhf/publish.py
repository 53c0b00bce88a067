"""What of a model's folder may leave this machine: an allow-list of files, with the paths of this machine taken out.

Samples, checkpoints, rollouts, stores, logs, manifests and caches are never on the list, whatever they are called.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import InputError, hidden, short
from rlhf.evals.hub_results import FOLDER, NO_DATASET
from rlhf.rows.jsonl import read_object

ALLOWED = (
    "README.md", "LICENSE*", "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors", "score_normalizer.json",
    "process.json", "categories.json", "words.npz",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip
"""Names, at the folder's top alone, of what transformers, peft and our own models load, and of the card."""

_BASE = "base_model_name_or_path"
_OWN_PATHS = ("_name_or_path", "name_or_path")
_ABSOLUTE = re.compile(r"(?<![\w.:/<~-])(?:/([\w.@+-]+)(?:/[\w.@+-]+)+|[A-Za-z]:\\[\w.\\-]+)")
_ROOTS = ("home", "root", "Users", "mnt", "tmp", "var", "opt", "srv", "usr", "etc", "scratch", "private")
"""The first folders of paths; those that this machine has count, too."""


@dataclass(frozen=True)
class Outgoing:
    """A file as it would be pushed: its path in the repository, and its content where it is not the file's own."""

    path: str
    file: Path
    content: bytes | None = None

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return self.file.stat().st_size if self.content is None else len(self.content)

    @property
    def sha256(self) -> str:
        """Return the hash of what would be pushed."""
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest()
        with self.file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()


def outgoing(folder: str | Path, base_model: str | None = None, evals: str | Path | None = None) -> list[Outgoing]:
    """Return the files of a model's folder that may be pushed.

    base_model: the hub id that an adapter's configuration names in place of a path of this machine; one without an
    owner (gpt2) counts only here, since a folder has such a name, too. evals: a folder of
    `rlhf run_evals`, whose results for data sets of the hub go along. Raises InputError where there is no model, and
    for a text that still names a path of this machine.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{folder}: no config.json and no adapter_config.json; name a saved model's folder")
    found = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in ALLOWED):
            found.append(Outgoing(file.name, file, _cleaned(file, base_model)))
    if not any(one.path.endswith(".safetensors") for one in found):
        raise InputError(f"{folder}: holds no weights as safetensors; save the model again")
    if evals is not None:
        found += _results(Path(evals))
    for one in found:
        _refuse_paths(one)
    return found


def left_behind(folder: str | Path, files: list[Outgoing]) -> list[str]:
    """Return the names in a folder that are not pushed, for the dry run."""
    pushed = {one.file for one in files}
    return sorted(
        f"{path.name}/" if path.is_dir() else path.name for path in Path(folder).iterdir() if path not in pushed
    )


def _cleaned(file: Path, base_model: str | None) -> bytes | None:
    """Return a configuration's content without the paths that transformers and peft note; None where it stays."""
    if file.name not in ("config.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json"):
        return None
    before = read_object(file)
    after: dict[str, Any] = {name: value for name, value in before.items() if name not in _OWN_PATHS}
    if file.name == "adapter_config.json":
        base = base_model or str(after.get(_BASE) or "")
        known = r"[\w.-]+/[\w.-]+" if base_model is None else r"([\w.-]+/)?[\w.-]+"  # gpt2 has no owner
        if not re.fullmatch(known, base) or Path(base).exists():
            seen = short(base)
            raise InputError(
                f"{file}: {_BASE} is {seen!r}, which only this machine has; name the hub's: --base_model ID"
            )
        after[_BASE] = base
    return None if after == before else (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode()


def _results(folder: Path) -> Iterator[Outgoing]:
    """Yield the results of evals whose data sets the hub has."""
    files = sorted((folder / FOLDER).glob("*.yaml"))
    if not files:
        raise InputError(f"{folder}: no {FOLDER}/*.yaml; name a folder of `rlhf run_evals`")
    for file in files:
        if NO_DATASET not in file.read_text(encoding="utf-8"):
            yield Outgoing(f"{FOLDER}/{file.name}", file)


def _refuse_paths(one: Outgoing) -> None:
    """Raise InputError for a text that names a path of this machine, or holds a password or token."""
    if one.path.endswith((".safetensors", ".model", ".npz")):
        return
    raw = one.file.read_bytes() if one.content is None else one.content
    if one.path in ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"):
        return  # words of a vocabulary look like anything
    for number, line in enumerate(raw.decode(errors="replace").split("\n"), 1):
        paths = [found for found in _ABSOLUTE.finditer(line) if _of_a_machine(found[1])]
        if paths:
            seen = f"names a path of this machine, {short(paths[0][0])!r}"
            raise InputError(f"{one.file}:{number}: {seen}; take it out, or write the file again")
        if hidden(line) != line:
            raise InputError(f"{one.file}:{number}: holds a password or token; take it out")


def _of_a_machine(first: str | None) -> bool:
    """Return whether a path with this first folder is one of a machine; a JSON pointer (/inputs/model) is none."""
    return first is None or first in _ROOTS or Path(f"/{first}").is_dir()
