"""Atomic writing of files and folders, and the checkpoints from which a run continues.

A checkpoint is a folder `checkpoint-<step>` with a file `complete`, written last: the size and sha256 of every other
file, and the settings of the run. A folder without that file is an interrupted save; one that is complete but damaged,
or of another run, is refused with the reason, and the one before it is used.

Everything is written under a temporary name and then renamed, so a killed run leaves the old or the new version, never
half of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from rlhf.errors import InputError, RunStopped, short
from rlhf.run.changes import MISSING, changes, shown
from rlhf.run.readable import require_readable

if TYPE_CHECKING:
    import torch

log = logging.getLogger("rlhf")

COMPLETE = "complete"

Settings = Mapping[str, Any]
"""The settings of a run by name: values for which `plain` has a JSON form."""


# ---------------------------------------------------------------- atomic writing


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes ``path`` and replaces a former one.

    If the body raises, ``path`` stays unchanged. Half-written folders of a killed run are removed.
    """
    path = Path(path)
    writing, replaced = _beside(path, "writing"), _beside(path, "replaced")
    recover(path)
    writing.mkdir(parents=True)
    try:
        yield writing
        sync_tree(writing)
        if path.exists():
            path.rename(replaced)
        writing.rename(path)
        _sync(path.parent)
    except BaseException:
        recover(path)
        raise
    remove(replaced)


def write_json_atomic(path: str | Path, value: object) -> None:
    """Write JSON under a temporary name, then rename it to ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = _beside(path, "writing")
    remove(writing)  # of a killed run; or a link that somebody left there
    with writing.open("x", encoding="utf-8", errors="backslashreplace") as file:  # of a path's odd bytes JSON's escapes
        file.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    writing.replace(path)
    _sync(path.parent)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def recover(path: Path) -> None:
    """Clean up after a run that was killed inside ``atomic_folder``."""
    writing, replaced = _beside(path, "writing"), _beside(path, "replaced")
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    remove(writing)
    remove(replaced)


def remove(path: Path) -> None:
    """Delete a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems can't fsync a folder
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk, and give its files the mode that the umask asks for.

    Files of a run are for whoever the umask lets in. safetensors writes its own for the owner alone.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for inner in folder.rglob("*"):
        if stat.S_IMODE(inner.lstat().st_mode) == 0o600 and inner.is_file() and not inner.is_symlink():
            inner.chmod(0o666 & ~mask)
        _sync(inner)
    _sync(folder)


def plain(value: object) -> Any:
    """Return the JSON form of records, configs, paths and numbers of NumPy or torch. Raises TypeError for others.

    JSON has no NaN, which becomes null, and no infinity, which becomes the text "inf" or "-inf"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(float(value))
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"no JSON form for {type(value).__name__}: {value!r}")


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


# ---------------------------------------------------------------- checkpoints


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Return all `checkpoint-<step>` folders, complete or not, the lowest step first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def mark_complete(checkpoint: Path, settings: Settings) -> None:
    """Flush a checkpoint to disk, then write its file `complete` with file sizes, hashes and the run's settings."""
    sync_tree(checkpoint)
    files = {name: _fingerprint(checkpoint / name) for name in _files(checkpoint)}
    write_json_atomic(checkpoint / COMPLETE, {"files": files, "settings": plain(settings)})


def check_checkpoint(checkpoint: Path, settings: Settings) -> None:
    """Raise InputError unless every saved file is unchanged and the run had the same settings."""
    try:
        marker = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in marker["files"].items()}
        saved = dict(marker["settings"])
    except FileNotFoundError:
        raise InputError(f"{checkpoint}: no complete checkpoint (no file {COMPLETE!r} in it)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{checkpoint}: its file {COMPLETE!r} is damaged: {short(str(error), 160)}") from None
    for name, (size, digest) in sorted(files.items()):
        path = checkpoint / name
        if not path.is_file():
            raise InputError(f"{checkpoint}: {name} is missing")
        if path.stat().st_size != size:
            raise InputError(f"{checkpoint}: {name} has {path.stat().st_size} bytes, {size} were written")
        if _fingerprint(path)[1] != digest:
            raise InputError(f"{checkpoint}: {name} is not what was written (its sha256 differs)")
    require_readable(checkpoint)
    known = {name: now for name, now in plain(settings).items() if name in saved}  # not those of a newer version
    if found := [change for change in changes(saved, known) if change.now is not MISSING and not change.grown]:
        named = "; ".join(f"{name}={shown(before)}, now {shown(now)}" for name, before, now in found)
        raise InputError(f"{checkpoint}: made with {named}; use the same, or another output_dir")


def awaits_mended(checkpoint: Path) -> bool:
    """Return whether PPO kept a complete checkpoint when a reward function failed: it names no function, so that the
    run can go on with a mended one."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        saved = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["settings"]
        return "rollout_size" in saved and "reward_funcs" not in saved
    return False


def latest_checkpoint(folder: str | Path, settings: Settings) -> Path | None:
    """Return the newest checkpoint to continue from; None if there is none yet.

    A damaged checkpoint, or one of another run, is named in a warning with the reason and renamed to
    `refused-checkpoint-<step>`; the one before it is used. Raises InputError if there are complete checkpoints but none
    can be used: only the user may decide to start again. Interrupted saves are removed.
    """
    refused: list[tuple[Path, InputError]] = []
    for path in reversed(checkpoints_in(folder)):
        if not (path / COMPLETE).exists():
            remove(path)
            continue
        try:
            check_checkpoint(path, settings)
        except InputError as error:
            refused.append((path, error))
            continue
        for other, reason in refused:
            log.warning("%s; going on from %s instead", reason, path.name)
            remove(other.with_name(f"refused-{other.name}"))
            other.rename(other.with_name(f"refused-{other.name}"))
        return path
    if refused:
        raise refused[0][1]
    return None


def save_checkpoint(
    folder: str | Path, step: int, write: Callable[[Path], None], settings: Settings, keep: int = 2
) -> Path:
    """Let ``write`` fill a temporary folder and make it `checkpoint-<step>`; keep the newest ``keep``.

    Raises RunStopped if the disk is full; the checkpoint before it is then still there.
    """
    path = Path(folder) / f"checkpoint-{step}"
    with full_disk_explained(folder):
        with atomic_folder(path) as temporary, full_disk_explained(folder):  # inside, before clean-up frees space
            write(temporary)
            mark_complete(temporary, settings)
        prune(folder, keep)
    return path


def prune(folder: str | Path, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints; called when the newest is complete."""
    whole = [path for path in checkpoints_in(folder) if (path / COMPLETE).exists()]
    for old in checkpoints_in(folder):
        if old not in whole[-keep:]:
            remove(old)


@contextlib.contextmanager
def full_disk_explained(folder: str | Path) -> Iterator[None]:
    """Turn any error of torch or safetensors into RunStopped with one line if the disk of ``folder`` is full."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, _safetensor_error()) as error:
        if isinstance(error, InputError | RunStopped) or not _is_disk_full(error, Path(folder)):
            raise
        whole = [path.name for path in checkpoints_in(folder) if (path / COMPLETE).exists()]
        kept = f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
        raise RunStopped(
            f"{folder}: no space left on its disk while saving; {kept}. Free some space (or lower save_total_limit) "
            "and run the same command again"
        ) from error


def _is_disk_full(error: BaseException, folder: Path) -> bool:
    """Return whether an error comes from a full disk.

    torch and safetensors raise their own errors, whose text names the full disk, or only says that a write failed."""
    text = ""
    cause: BaseException | None = error
    while cause is not None:  # torch hides the first error behind one about closing the file
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text += f"{cause}\n".lower()
        cause = cause.__cause__ or cause.__context__
    if "no space left" in text or "os error 28" in text:
        return True
    while not folder.exists():
        folder = folder.absolute().parent
    failed = any(words in text for words in ("write", "writing", "iostream error", "unexpected pos"))
    return failed and shutil.disk_usage(folder).free < 2**20


def _safetensor_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _files(folder: Path) -> list[str]:
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in files if name != COMPLETE and not name.endswith(".writing"))


def _fingerprint(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- random numbers


class RandomState(TypedDict):
    """The states of the global random generators, in a form that ``torch.load(..., weights_only=True)`` reads."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: torch.Tensor
    cuda: list[torch.Tensor]


def random_state() -> RandomState:
    """Return the state of torch's, NumPy's and Python's global generators."""
    import numpy as np
    import torch

    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: RandomState) -> None:
    """Restore the states that ``random_state`` returned."""
    import numpy as np
    import torch

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():  # elsewhere, random streams differ anyway
        torch.cuda.set_rng_state_all([item.cpu() for item in state["cuda"]])
