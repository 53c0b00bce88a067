"""The stages of a run: their inputs, manifests and states (complete, interrupted or absent).

The files in a stage's folder show its state::

    inputs.json          written when the stage begins: its inputs
    checkpoint-<step>/   the state from which an interrupted stage continues (see `rlhf.run.checkpoint`)
    manifest.json        written last: the stage is complete
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.errors import InputError, short
from rlhf.run import environment
from rlhf.run.checkpoint import checkpoints_in, plain, recover, remove, sync_tree, write_json_atomic
from rlhf.small_files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Inputs = Mapping[str, Any]
"""A stage's inputs by name: values that have a JSON form (`rlhf.run.checkpoint.plain`)."""

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "rlhf-recipes")


# ---------------------------------------------------------------- fingerprints


def _canonical(value: object) -> bytes:
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def data_fingerprint(source: str | Path | Iterable[object]) -> str:
    """Compute the sha256 of a dataset's content: a file's bytes, a folder's files, or every record of an iterable.

    Of a hub id only the name is hashed, because its content isn't loaded; pass the loaded records to be sure.
    """
    digest = hashlib.sha256()
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.exists():
            return hashlib.sha256(f"hub:{source}".encode()).hexdigest()
        inner = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
        for file in inner:
            if path.is_dir():
                digest.update(f"{file.relative_to(path)}\n".encode())
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    else:
        for record in source:
            digest.update(_canonical(record) + b"\n")
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Compute the sha256 of what decides a tokenizer's ids: vocabulary, merges, normalisation, special tokens.

    The padding and truncation settings that a fast tokenizer keeps from its last call don't count; nor does the chat
    template, which has its own field in the manifest.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        core = json.loads(backend.to_str())
        core = {key: value for key, value in core.items() if key not in ("padding", "truncation")}
    else:
        core = {"vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return hashlib.sha256(_canonical({"core": core, "special": special})).hexdigest()


# ---------------------------------------------------------------- manifests


def package_versions() -> dict[str, str]:
    """Return the versions of this package and of those that it stands on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of a complete stage: its inputs, its outputs, and the software that it ran with."""

    stage: str
    inputs: Inputs
    """Config, data fingerprints, fingerprints of earlier stages; with other values it is another run."""
    seed: int
    base_model: str | None = None
    base_revision: str | None = None
    tokenizer_hash: str | None = None
    template_hash: str | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    outputs: dict[str, Any] = field(default_factory=dict)
    """The stage's results; numbers named `...second...` are not part of the fingerprint."""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=package_versions)
    command: str = field(default_factory=environment.command)
    machine: str = field(default_factory=environment.machine)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of all that the next stage depends on: not the time, the speed or the command."""
        apart = ("seconds", "created", "command", "machine", "versions")
        content = {key: value for key, value in plain(self).items() if key not in apart}
        content["outputs"] = {key: value for key, value in self.outputs.items() if "second" not in key}
        return hashlib.sha256(_canonical(content)).hexdigest()

    def write(self, folder: str | Path) -> Path:
        """Write ``manifest.json`` into ``folder``."""
        path = Path(folder) / "manifest.json"
        write_json_atomic(path, self)
        return path

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read ``folder/manifest.json``. Raises InputError when it isn't there or is no manifest."""
        path = Path(folder) / "manifest.json"
        content = _read_json(path, "manifest of a stage")
        names = {item.name for item in dataclasses.fields(cls)}
        if not {"stage", "inputs", "seed"} <= set(content):
            raise InputError(f"{path}: is no manifest of a stage (it must have stage, inputs and seed)")
        content = {key: value for key, value in content.items() if key in names}
        for name, kind in {"stage": str, "inputs": dict, "outputs": dict, "stop_ids": list, "seconds": float}.items():
            value = content.get(name)
            if value is not None and not isinstance(value, (float, int) if kind is float else kind):
                raise InputError(f"{path}: {name} is {short(repr(value))}; the file is damaged")
        return cls(**content | {"stop_ids": tuple(content.get("stop_ids") or ())})


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    return read_object(path, f"{path.parent} is no folder of a complete stage", kind)


# ---------------------------------------------------------------- stages

State = Literal["complete", "interrupted", "absent"]


def stage_state(folder: str | Path, inputs: Inputs, overwrite: bool = False) -> State:
    """Return whether the stage in ``folder`` is complete, was interrupted, or never began. Changes nothing.

    Raises InputError if the folder holds a run with other inputs (with ``overwrite`` that counts as "absent"), or
    other files that no run of this library wrote.
    """
    folder = Path(folder)
    try:
        return _stage_state(folder, inputs)
    except InputError:
        if not overwrite or not _is_stage(folder):
            raise
        return "absent"


def _is_stage(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("manifest.json", "inputs.json"))


def _stage_state(folder: Path, inputs: Inputs) -> State:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder}: is a file; choose another --output_dir")
    if (folder / "manifest.json").exists():
        _require_same(Manifest.read(folder).inputs, inputs, folder)
        return "complete"
    if (folder / "inputs.json").exists():
        _require_same(_read_json(folder / "inputs.json", "list of inputs"), inputs, folder)
        return "interrupted"
    if folder.exists() and any(not item.name.startswith(".") for item in folder.iterdir()):
        raise InputError(f"output_dir {folder}: holds files but no run of ours; choose another --output_dir")
    return "absent"


def begin_stage(folder: str | Path, inputs: Inputs, overwrite: bool = False) -> State:
    """Record a stage's inputs before its work begins; return the folder's state before the call.

    With ``overwrite`` a stage with other inputs is deleted first. A folder that is no stage is never deleted, and a
    stage with equal inputs continues as without ``overwrite``.
    """
    folder = Path(folder)
    state = stage_state(folder, inputs, overwrite)
    if state == "absent":
        if _is_stage(folder):  # a stage of another run, to be replaced
            shutil.rmtree(folder)
        write_json_atomic(folder / "inputs.json", inputs)
    for leftover in [*folder.glob(".*.writing"), *folder.glob(".*.replaced")]:
        recover(folder / leftover.name[1:].rpartition(".")[0])
    for leftover in [*folder.glob(".*.tmp"), *folder.glob(".tmp??????")]:  # from a killed write_jsonl or safetensors
        leftover.unlink()
    return state


def finish_stage(folder: str | Path, manifest: Manifest, keep_checkpoints: bool = False) -> None:
    """Mark a stage complete: fsync what it wrote, write its manifest, then drop its checkpoints."""
    folder = Path(folder)
    sync_tree(folder)
    manifest.write(folder)
    if not keep_checkpoints:
        drop_checkpoints(folder)


def drop_checkpoints(folder: str | Path) -> None:
    """Delete a complete stage's checkpoints, which a run killed right after writing the manifest leaves behind."""
    for checkpoint in checkpoints_in(folder):
        remove(checkpoint)


def _require_same(recorded: Inputs, inputs: Inputs, folder: Path) -> None:
    differences = list(_differences(recorded, json.loads(_canonical(inputs)), ""))
    if not differences:
        return
    # prefer a readable field to a hash that depends on it
    name, before, now = min(differences, key=lambda found: "fingerprint" in found[0])
    raise InputError(
        f"output_dir {folder} belongs to another run: {name} was {_shown(before)}, now {_shown(now)}; "
        f"pass --overwrite to replace that run, or choose another --output_dir"
    )


def _differences(before: object, now: object, name: str) -> Iterator[tuple[str, object, object]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if re.fullmatch(r'"[0-9a-f]{64}"', text):
        return text[1:13]
    return short(text, 80)
