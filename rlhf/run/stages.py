"""The stages of a run: their inputs, manifests and states (complete, interrupted or absent).

The files in a stage's folder show its state::

    inputs.json          written when the stage begins: its inputs
    begun.json           until it is complete: when it first began, and how long earlier processes worked at it
    checkpoint-<step>/   the state from which an interrupted stage continues (see `rlhf.run.checkpoint`)
    manifest.json        written last: the stage is complete
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import InputError, short
from rlhf.rows.jsonl import read_object
from rlhf.run import environment, lock
from rlhf.run.changes import Change, changes, shown
from rlhf.run.checkpoint import (
    COMPLETE,
    awaits_mended,
    checkpoints_in,
    plain,
    prune,
    recover,
    remove,
    sync_tree,
    write_json_atomic,
)
from rlhf.run.fingerprint import canonical, data_fingerprint, tokenizer_hash

__all__ = [
    "POLICIES",
    "Inputs",
    "Manifest",
    "State",
    "begin_stage",
    "data_fingerprint",
    "drop_checkpoints",
    "finish_stage",
    "is_resumable",
    "refused",
    "reopen_stage",
    "stage_changes",
    "stage_state",
    "tokenizer_hash",
]

Inputs = Mapping[str, Any]
"""A stage's inputs by name: values that have a JSON form (`rlhf.run.checkpoint.plain`)."""

POLICIES = ("base", "sft", "ppo", "dpo", "kto", "grpo", "rloo")
"""Stages whose folder holds a policy."""

BEGUN = "begun.json"
BEST = "best.safetensors"  # reward_models.best.BEST_FILE: the weights that a training chose so far
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "rlhf-recipes")


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
    """At work, over all processes that a stage which was interrupted took; a killed one's end with its last file."""
    began: str | None = None
    """When the first of them began; None where that is not known."""
    versions: dict[str, str] = field(default_factory=package_versions)
    command: str = field(default_factory=environment.command)
    machine: str = field(default_factory=environment.machine)
    created: str = field(default_factory=lambda: _at(time.time()))

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of all that the next stage depends on: not the time, the speed or the command."""
        apart = ("seconds", "began", "created", "command", "machine", "versions")
        content = {key: value for key, value in plain(self).items() if key not in apart}
        content["outputs"] = {key: value for key, value in self.outputs.items() if "second" not in key}
        return hashlib.sha256(canonical(content)).hexdigest()

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


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    return read_object(path, f"{path.parent} is no folder of a complete stage", kind)


# ---------------------------------------------------------------- stages

State = Literal["complete", "interrupted", "absent"]


def stage_state(folder: str | Path, inputs: Inputs, overwrite: bool = False) -> State:
    """Return whether the stage in ``folder`` is complete, was interrupted, or never began. Changes nothing.

    A complete stage that kept a checkpoint and is to be trained longer counts as interrupted. Raises InputError if the
    folder holds a run with other inputs (with ``overwrite`` that counts as "absent"), or other files that no run of
    this library wrote.
    """
    folder = Path(folder)
    try:
        return _stage_state(folder, inputs, mended=not overwrite)
    except InputError:
        if not overwrite or not _is_stage(folder):
            raise
        return "absent"


def _is_stage(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("manifest.json", "inputs.json"))


def _stage_state(folder: Path, inputs: Inputs, mended: bool) -> State:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder}: is a file; choose another --output_dir")
    if _is_stage(folder):
        if found := stage_changes(folder, inputs, mended):
            raise InputError(refused(folder, found))
        complete = (folder / "manifest.json").exists()
        grown = complete and changes(Manifest.read(folder).inputs, json.loads(canonical(inputs)))
        return "complete" if complete and not grown else "interrupted"
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
    begun = _begun(folder, state)
    if state == "absent" and _is_stage(folder):  # a stage of another run, to be replaced
        remove(folder / "manifest.json")
        for inner in folder.iterdir():
            if inner.name not in ("inputs.json", lock.NAME):  # killed here, it is still a stage; this run has the lock
                remove(inner)
    if state != "complete":
        write_json_atomic(folder / "inputs.json", inputs)
        write_json_atomic(folder / BEGUN, begun)
        remove(folder / "manifest.json")  # of a stage that is extended
    for leftover in [*folder.glob(".*.writing"), *folder.glob(".*.replaced")]:
        recover(folder / leftover.name[1:].rpartition(".")[0])
    for leftover in [*folder.glob(".*.tmp"), *folder.glob(".tmp??????")]:  # from a killed write_jsonl or safetensors
        leftover.unlink()
    return state


def _begun(folder: Path, state: State) -> dict[str, Any]:
    """Return what begun.json holds of a stage that begins now, or goes on."""
    now = time.time()
    if state == "interrupted" and (folder / "manifest.json").exists():
        made = Manifest.read(folder)
        return {"began": made.began, "seconds": made.seconds, "since": now}
    if state == "interrupted" and (folder / BEGUN).exists():
        begun = _read_json(folder / BEGUN, "record of when a stage began")
        work = [folder / BEGUN, folder / "metrics.jsonl", *(place / COMPLETE for place in checkpoints_in(folder))]
        last = max(file.stat().st_mtime for file in work if file.is_file())
        return begun | {"seconds": begun["seconds"] + max(0.0, last - begun["since"]), "since": now}
    return {"began": _at(now) if state == "absent" else None, "seconds": 0.0, "since": now}


def reopen_stage(folder: str | Path, inputs: Inputs) -> None:
    """Let a stage, complete or not, go on in its folder as one with these inputs that was interrupted."""
    folder = Path(folder)
    begun = _begun(folder, "interrupted")
    write_json_atomic(folder / "inputs.json", inputs)
    write_json_atomic(folder / BEGUN, begun)
    remove(folder / "manifest.json")


def finish_stage(folder: str | Path, manifest: Manifest, keep_checkpoints: bool = False) -> Manifest:
    """Mark a stage complete: fsync what it wrote, write its manifest, then drop its checkpoints (or all but the last,
    from which it can be extended). Returns the manifest as written, with the seconds of earlier processes."""
    folder = Path(folder)
    sync_tree(folder)
    if (folder / BEGUN).exists():
        begun = _read_json(folder / BEGUN, "record of when a stage began")
        manifest = replace(manifest, began=begun["began"], seconds=begun["seconds"] + manifest.seconds)
    manifest.write(folder)
    drop_checkpoints(folder, keep=int(keep_checkpoints))
    return manifest


def drop_checkpoints(folder: str | Path, keep: int = 0) -> None:
    """Delete what a complete stage needs no more, also where a killed run left it: begun.json, checkpoints but the
    newest ``keep``, and where none is kept the best weights, which the model has."""
    remove(Path(folder) / BEGUN)
    if keep:
        prune(folder, keep)
    else:
        remove(Path(folder) / BEST)
        for checkpoint in checkpoints_in(folder):
            remove(checkpoint)


def stage_changes(folder: str | Path, inputs: Inputs, mended: bool = True) -> list[Change]:
    """Return what changed since the stage in ``folder`` began; [] where there is none, or where it can go on: longer,
    or (unless `mended` is False) with a mended reward function.

    Raises InputError for a damaged record."""
    folder = Path(folder)
    record = folder / ("manifest.json" if (folder / "manifest.json").exists() else "inputs.json")
    if not record.exists():
        return []
    began = Manifest.read(folder).inputs if record.name == "manifest.json" else _read_json(record, "list of inputs")
    if not isinstance(began, dict):
        raise InputError(f"{record}: expected the inputs of a stage, got {shown(began)}")
    found = changes(began, json.loads(canonical(inputs)))
    extended = [change for change in found if change.grown]
    if record.name == "manifest.json" and not is_resumable(folder):
        return found
    found = [change for change in found if change not in extended]
    newest = [checkpoint for checkpoint in checkpoints_in(folder) if (checkpoint / COMPLETE).exists()][-1:]
    only_code = all(change.name.startswith("code.") for change in found)
    return [] if mended and only_code and any(map(awaits_mended, newest)) else found


def is_resumable(folder: Path) -> bool:
    """Return whether a stage has a complete checkpoint, from which it can be trained on."""
    return any((checkpoint / COMPLETE).exists() for checkpoint in checkpoints_in(folder))


def refused(folder: str | Path, found: Sequence[Change], advice: str = "pass --overwrite to replace that run") -> str:
    """Write the error, one line, for a stage that belongs to another run: it names every change."""
    if all(change.grown for change in found):
        what = "is complete, and kept no checkpoint to go on from (keep_checkpoint keeps it)"
    else:
        what = "belongs to another run"
    readable = [change for change in found if "fingerprint" not in change.name] or found  # no hash of a named field
    named = ", ".join(map(str, readable))
    return f"output_dir {folder} {what}: {named}; {advice}, or choose another --output_dir"
