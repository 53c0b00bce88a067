"""What a run leaves behind, whole or not at all: atomic folders, checkpoints, stage manifests.

A stage's folder tells its own state::

    inputs.json          written when the stage begins: what it was given
    checkpoint-<step>/   with a file `complete` inside once everything is on disk
    manifest.json        written last: the stage is complete

Everything is written beside its place and renamed, so a killed run leaves the old or the new, never a half.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf import InputError

if TYPE_CHECKING:
    import torch


COMPLETE = "complete"
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "rlhf-recipes")


# ---------------------------------------------------------------- atomic writing


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes ``path``, replacing what was there.

    When the body raises, ``path`` stays as it was. What a killed run left half-written is removed.
    """
    path = Path(path)
    writing, replaced = _beside(path, "writing"), _beside(path, "replaced")
    _recover(path)
    writing.mkdir(parents=True)
    try:
        yield writing
        _sync_tree(writing)
        if path.exists():
            path.rename(replaced)
        writing.rename(path)
        _sync(path.parent)
    except BaseException:
        _recover(path)
        raise
    _remove(replaced)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write JSON beside ``path``, then rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = _beside(path, "writing")
    with writing.open("w", encoding="utf-8") as file:
        file.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    writing.replace(path)
    _sync(path.parent)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _recover(path: Path) -> None:
    """Undo what a run that was killed inside ``atomic_folder`` left."""
    writing, replaced = _beside(path, "writing"), _beside(path, "replaced")
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    _remove(writing)
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems can't fsync a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sync_tree(folder: Path) -> None:
    for inner in folder.rglob("*"):
        _sync(inner)
    _sync(folder)


def require_disk(path: str | Path, needed_bytes: int) -> None:
    """Raise InputError unless the disk that holds ``path`` has ``needed_bytes`` free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise InputError(
            f"output_dir {path}: needs about {needed_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on "
            f"its disk; free some space or choose another --output_dir"
        )


# ---------------------------------------------------------------- fingerprints


def plain(value: Any) -> Any:
    """The JSON form of records, configs, paths and numbers of NumPy or torch."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"no JSON form for {type(value).__name__}: {value!r}")


def _canonical(value: Any) -> bytes:
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def data_fingerprint(source: Any) -> str:
    """sha256 of a dataset's content: a file's bytes, a folder's files, or every record of an iterable.

    A hub id can't be read without loading it; its name is hashed (pass the loaded records to be sure).
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


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides a tokenizer's ids: vocabulary, merges, normalisation, special tokens.

    The padding and truncation that a fast tokenizer remembers from its last call don't count; nor does the
    chat template, which the manifest keeps apart.
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


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a stage was given, what it made, and with what. Written when the stage is complete."""

    stage: str
    inputs: dict[str, Any]
    """Config, data fingerprints, parents' fingerprints: another value here is another run."""
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
    versions: dict[str, str] = field(default_factory=_versions)
    command: str = field(default_factory=lambda: shlex.join([Path(sys.executable).name, *sys.argv]))
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def fingerprint(self) -> str:
        """sha256 of all that the next stage depends on: not when, how fast or by which command."""
        apart = ("seconds", "created", "command", "versions")
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
        content = _read_json(path)
        names = {item.name for item in dataclasses.fields(cls)}
        if not isinstance(content, dict) or not {"stage", "inputs", "seed"} <= set(content):
            raise InputError(f"{path}: is no manifest of a stage (stage, inputs and seed belong in it)")
        content = {key: value for key, value in content.items() if key in names}
        return cls(**content | {"stop_ids": tuple(content.get("stop_ids") or ())})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {path.parent} is no folder of a complete stage") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: broken JSON: {error}") from None


# ---------------------------------------------------------------- stages

State = Literal["complete", "interrupted", "absent"]


def stage_state(folder: str | Path, inputs: Mapping[str, Any], overwrite: bool = False) -> State:
    """Whether the stage in ``folder`` is complete, was interrupted, or never began. Changes nothing.

    Raises InputError when the folder holds a run with other inputs (with ``overwrite`` that counts as "absent"), or
    something that is no run of ours.
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


def _stage_state(folder: Path, inputs: Mapping[str, Any]) -> State:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder}: is a file; choose another --output_dir")
    if (folder / "manifest.json").exists():
        _require_same(Manifest.read(folder).inputs, inputs, folder)
        return "complete"
    if (folder / "inputs.json").exists():
        _require_same(_read_json(folder / "inputs.json"), inputs, folder)
        return "interrupted"
    if folder.exists() and any(not item.name.startswith(".") for item in folder.iterdir()):
        raise InputError(f"output_dir {folder}: holds files but no run of ours; choose another --output_dir")
    return "absent"


def begin_stage(folder: str | Path, inputs: Mapping[str, Any], overwrite: bool = False) -> State:
    """Record a stage's inputs before its work begins; returns the state that the folder was in.

    With ``overwrite`` another run's stage in the folder is deleted first; a folder that is no stage never is,
    and the same run (equal inputs) goes on as without it.
    """
    folder = Path(folder)
    state = stage_state(folder, inputs, overwrite)
    if state == "absent":
        if _is_stage(folder):  # another run's, to be replaced
            shutil.rmtree(folder)
        write_json_atomic(folder / "inputs.json", inputs)
    for leftover in [*folder.glob(".*.writing"), *folder.glob(".*.replaced")]:
        _recover(folder / leftover.name[1:].rpartition(".")[0])
    return state


def finish_stage(folder: str | Path, manifest: Manifest, keep_checkpoints: bool = False) -> None:
    """Mark a stage complete: fsync what it wrote, write its manifest, then drop its checkpoints."""
    folder = Path(folder)
    _sync_tree(folder)
    manifest.write(folder)
    if not keep_checkpoints:
        for checkpoint in _checkpoints(folder):
            _remove(checkpoint)


def _require_same(recorded: Mapping[str, Any], inputs: Mapping[str, Any], folder: Path) -> None:
    differences = list(_differences(recorded, json.loads(_canonical(inputs)), ""))
    if not differences:
        return
    # a readable field says more than a hash that follows from it
    name, before, now = min(differences, key=lambda found: "fingerprint" in found[0])
    raise InputError(
        f"output_dir {folder} belongs to another run: {name} was {_short(before)}, now {_short(now)}; "
        f"pass --overwrite to replace that run, or choose another --output_dir"
    )


def _differences(before: Any, now: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if re.fullmatch(r'"[0-9a-f]{64}"', text):
        return text[1:13]
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------- checkpoints


def _checkpoints(folder: Path) -> list[Path]:
    """All `checkpoint-<step>` folders, oldest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest `checkpoint-<step>` folder that was written completely, or None."""
    whole = [path for path in _checkpoints(Path(folder)) if (path / COMPLETE).exists()]
    return whole[-1] if whole else None


def mark_complete(checkpoint: Path) -> None:
    """Fsync a checkpoint that someone else wrote, then mark it."""
    _sync_tree(checkpoint)
    (checkpoint / COMPLETE).touch()
    _sync(checkpoint)


def save_checkpoint(folder: str | Path, step: int, write: Callable[[Path], Any], keep: int = 2) -> Path:
    """Let ``write`` fill a temporary folder and make it `checkpoint-<step>`; keep the newest ``keep``."""
    folder = Path(folder)
    path = folder / f"checkpoint-{step}"
    with atomic_folder(path) as temporary:
        write(temporary)
        (temporary / COMPLETE).touch()
    whole = [item for item in _checkpoints(folder) if (item / COMPLETE).exists()]
    for old in _checkpoints(folder):
        if old not in whole[-keep:] and old != path:
            _remove(old)
    return path


# ---------------------------------------------------------------- random numbers


def random_state(*generators: torch.Generator) -> dict[str, Any]:
    """The state of torch's, NumPy's and Python's global generators and of the given ones.

    Only tensors, numbers and tuples: ``torch.save`` it, ``torch.load(..., weights_only=True)`` reads it.
    """
    import numpy as np
    import torch

    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generators": [generator.get_state() for generator in generators],
    }


def restore_random_state(state: Mapping[str, Any], *generators: torch.Generator) -> None:
    """Put back what ``random_state`` took, with the same number of generators in the same order."""
    import numpy as np
    import torch

    if len(generators) != len(state["generators"]):
        raise ValueError(f"{len(state['generators'])} generators were saved, {len(generators)} were given")
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():  # another machine: its CUDA streams differ anyway
        torch.cuda.set_rng_state_all([item.cpu() for item in state["cuda"]])
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved.cpu())
