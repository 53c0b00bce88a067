"""One run per folder: a lock of the operating system on `<folder>/.lock`, which ends with the process that holds it.

A run also keeps others out of the folders within its own and of those around it: it may replace what is in them. The
file holds the process id and the machine of the run, for the message that the second run gets.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from rlhf.errors import InputError
from rlhf.run.owner import by_main, is_main, on_each

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("rlhf")

NAME = ".lock"

_held: dict[Path, int] = {}
"""The folders that this process holds, with the open file of each lock."""
_training: list[Path] = []
"""The folders in which trainers of this process run."""


@contextlib.contextmanager
def training_in(folder: str | Path) -> Iterator[None]:
    """Hold a folder while a trainer runs in it; a stage of this process that holds it (or one around it) lends it.

    Raises InputError, one line that names the holder, where another run works in the folder, within it or around it,
    and where a process of this run, on another machine, doesn't see what the first one writes there.
    """
    folder = Path(folder).resolve()
    lent = by_main(lambda: _enter(folder))
    try:
        _require_shared(folder)
        yield
    finally:
        if is_main():
            _training.remove(folder)
            if not lent:
                release(folder)


def _require_shared(folder: Path) -> None:
    """Raise InputError on all processes unless each of them reads the main one's lock."""
    first, written = by_main(lambda: (folder, _text(folder / NAME)))

    def look() -> str | None:
        for _ in range(20):
            if _text(folder / NAME) == written:
                return None
            time.sleep(0.25)  # a disk on the network may show it late
        return (
            f"output_dir {folder}: process {os.environ.get('RANK')} on {socket.gethostname()} does not see what the "
            f"first process writes in {first}; put it on a disk that all machines see"
        )

    on_each(look)


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8")
    return None


def _enter(folder: Path) -> bool:
    """Hold a folder for a trainer; return whether a stage had it already."""
    for other in _training:
        if other == folder or other in folder.parents or folder in other.parents:
            raise _refused(folder, other, f"{os.getpid()} (this one)")
    lent = folder in _held
    hold(folder)
    _training.append(folder)
    return lent


def hold(folder: str | Path) -> None:
    """Take a folder's lock, if this process has not; it ends with `release`, or with the process."""
    folder = Path(folder).resolve()
    if fcntl is None or (folder in _held and _same(_held[folder], folder / NAME)):
        return
    release(folder)  # of a folder that was deleted meanwhile
    require_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = _locked(folder / NAME)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            raise
        log.warning("%s: its file system has no locks; start no second run in this folder", folder)
        return
    if file is None:
        raise _refused(folder, folder, _holder(folder / NAME))
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    with contextlib.suppress(OSError):
        os.fsync(file)  # other machines are to read it now
    _held[folder] = file


def release(folder: str | Path) -> None:
    """Give a folder's lock back."""
    path = Path(folder).resolve()
    file = _held.pop(path, None)
    if file is not None:
        if _same(file, path / NAME):
            (path / NAME).unlink(missing_ok=True)  # before the lock ends: afterwards it may be another run's
        os.close(file)


def is_free(folder: str | Path) -> bool:
    """Return whether no other process runs in a folder; a file that a killed run left there is deleted."""
    folder = Path(folder).resolve()
    try:
        if folder not in _held and (folder / NAME).exists():
            hold(folder)
            release(folder)
    except InputError:
        return False
    return True


def require_free(folder: str | Path) -> None:
    """Raise InputError where another process runs in a folder, in one around it or in one within it."""
    folder = Path(folder).resolve()
    if fcntl is None:
        return
    within = [file for level in (f"*/{NAME}", f"*/*/{NAME}") for file in folder.glob(level)]
    for file in (folder / NAME, *(around / NAME for around in folder.parents), *within):
        if file.parent not in _held and _is_locked(file):
            raise _refused(folder, file.parent, _holder(file))


def _locked(path: Path) -> int | None:
    """Open and lock a file; None if another holds it. A look at it (`_is_locked`) takes the lock for a moment."""
    for _ in range(20):
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            path.unlink(missing_ok=True)  # a link that somebody left there, whose target is none of ours
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(file, path):
                return file
        except BlockingIOError:
            time.sleep(0.01)
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # locked, or deleted by the run that has just ended
    return None


def _is_locked(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return _same(file, path)
    except OSError:
        return False
    finally:
        os.close(file)


def _same(file: int, path: Path) -> bool:
    """Return whether an open file still bears its name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        pid, host = path.read_text(encoding="utf-8").split()
        return pid if host == socket.gethostname() else f"{pid} on {host}"
    return "another"


def _refused(folder: Path, taken: Path, holder: str) -> InputError:
    where = "in it" if taken == folder else f"in {taken}"
    return InputError(
        f"output_dir {folder}: process {holder} is running {where}; wait for it, end it, or choose another --output_dir"
    )


def _forget() -> None:
    """Leave the locks to the parent: a forked worker would keep them when the run is gone."""
    for file in _held.values():
        os.close(file)
    _held.clear()
    _training.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
