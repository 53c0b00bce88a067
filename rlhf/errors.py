"""Exceptions for a user's mistake and for a stopped run, printed as one line with an exit code; shortening of text."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import errno
import gc
import io
import os
import re
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, NoReturn

_LINE_BREAK = re.compile(r"\s*[\n\r\v\f\x85\u2028\u2029]\s*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_KEY = r"(?:token|secret|password|passwd|api[_-]?key|access[_-]?key|signature|credential|sig|auth)"
_SECRETS = (
    re.compile(r"(?<=://)()[^/?#\s]*(?=@)"),  # user:password@
    re.compile(rf"([?&](?:[\w-]{{0,40}}{_KEY}|key)=)[^&#\s]+", re.IGNORECASE),
    re.compile(rf"(\s--(?:[\w.-]{{0,40}}[_.-])?{_KEY}[=\s])\S+", re.IGNORECASE),
)

_LEFT = re.compile(
    r"connection (was )?(closed|reset) by (the )?peer|remote process exited|clients joined", re.IGNORECASE
)
"""What gloo, NCCL and torch's store say of a process that is no longer there."""

_UNOPENED = re.compile(r"open file failed with strerror: ([^\n]+)")
"""What torch says, in a RuntimeError, of a file that it may not write."""

_NO_WAY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
"""What a path is answered with that is no file's or folder's, or may not be read or written."""


def visible(text: str) -> str:
    """Return a text with its control characters escaped, but for tabs and line breaks.

    Text of data, models and servers then cannot move a terminal's cursor, change its title or reverse its letters.
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def hidden(text: str) -> str:
    """Return a text in which addresses and flags show no password, key or token."""
    for secret in _SECRETS:
        text = secret.sub(r"\1***", text)
    return text


class InputError(ValueError):
    """A mistake in the user's input; its message of one line says where, the value seen, and what to do.

    Recipes print it without a traceback and exit with code 2. The message has no control characters and no secrets.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(hidden(visible(str(message))))


class RunStopped(RuntimeError):
    """A run that cannot continue, with the reason in one line; its files on disk are complete.

    Recipes print it without a traceback and exit with code 1; the same command continues from the last checkpoint. The
    message has no control characters and no secrets.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(hidden(visible(str(message))))


def unknown(name: str, known: Collection[str], where: str, kind: str) -> NoReturn:
    """Raise InputError for a name that is not in ``known``, and suggest the nearest one that is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    shown = [*known][:12] + ["..."] * (len(known) > 12)
    advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(shown)}"
    raise InputError(f"{where}: unknown {kind} {name}; {advice}")


def require_divides(small_name: str, small: int, big_name: str, big: int) -> None:
    """Raise InputError unless ``small`` divides ``big``, naming the nearest numbers that do."""
    if small >= 1 and big >= 1 and big % small == 0:
        return
    if big < 1:
        raise InputError(f"{big_name}={big} must be at least 1")
    divisors = [number for number in range(1, big + 1) if big % number == 0]
    below = [number for number in divisors if number < small][-1:]
    above = [number for number in divisors if number > small][:1]
    advice = " or ".join(map(str, below + above))
    raise InputError(f"{small_name}={small} must divide {big_name}={big}; try {advice}")


def short(text: str, limit: int = 60) -> str:
    """Return a text as one line of at most ``limit`` visible characters; "..." marks a cut."""
    start = text[: 8 * limit]  # of a text of megabytes no more is looked at
    line = visible(_LINE_BREAK.sub(" ", start))
    return line if len(line) <= limit and len(start) == len(text) else f"{line[: limit - 3]}..."


def reason(error: BaseException, limit: int = 160) -> str:
    """Return an exception's message as one short line; if it is empty, the name of its type."""
    return short(str(error).strip(), limit) or type(error).__name__


def run(main: Callable[[list[str]], Any]) -> None:
    """Call ``main`` with the command-line arguments; an error that users can do something about is a line on stderr.

    A process that has joined others ends here (`_leave`): as Python ends, torch's threads may abort it (SIGABRT), after
    a run that is complete, too, and the launcher would tell of that instead of the line that says why."""
    code = 0
    try:
        _told(main)
    except BaseException as end:
        if not _has_joined():
            raise
        code = _shown(end)
    if _has_joined():
        _leave(code)


def _shown(end: BaseException) -> int:
    """Print what Python would of what has ended a process; return the exit code."""
    if isinstance(end, SystemExit) and (end.code is None or isinstance(end.code, int)):
        return end.code or 0
    if isinstance(end, SystemExit):
        print(end.code, file=sys.stderr)
    elif isinstance(end, KeyboardInterrupt):  # while it waited to tell why it ends
        return 130
    else:
        sys.excepthook(type(end), end, end.__traceback__)
    return 1


def _leave(code: int) -> NoReturn:
    """End this process at once, after what Python does first: threads end, exit functions are called, files written.

    A run that went well waits for all that other threads still write; one that did not, 10 s: then others wait for it.
    """
    late = threading.Timer(10, _end, [code])
    late.daemon = True
    if code:
        late.start()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except KeyboardInterrupt:
        code = code or 130
    late.cancel()
    _end(code)


def _end(code: int) -> NoReturn:
    atexit._run_exitfuncs()
    for file in [sys.stdout, sys.stderr, *_open_files()]:
        with contextlib.suppress(OSError, ValueError):
            file.flush()
    os._exit(code)


def _open_files() -> list[Any]:
    """Return the open files on disk that may hold what is not written yet, as a score function's own log."""
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    found = []
    for file in gc.get_objects():
        with contextlib.suppress(OSError, ValueError):  # closed, or no file of the system
            if issubclass(type(file), kinds) and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                found.append(file)
    return found


def _has_joined() -> bool:
    """Return whether this process is one of several of torch.distributed."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed and distributed.is_available() and distributed.is_initialized()
    return bool(joined and distributed and distributed.get_world_size() > 1)


def _told(main: Callable[[list[str]], Any]) -> None:
    """Call ``main``, and print and exit for what it raises.

    InputError, and a path that may not be read or written, become one line on stderr and exit code 2; RunStopped and a
    full disk, one line and exit code 1; so does the end of another process of the same run, whose own line is the one
    to read."""
    try:
        try:
            main(sys.argv[1:])
        finally:
            sys.stdout.flush()  # here, not at exit: a reader that is gone (`| head`) is dealt with below
    except InputError as error:
        _tell(f"error: {error}")
        raise SystemExit(2) from None
    except RunStopped as error:
        _tell(f"stopped: {error}")
        raise SystemExit(1) from None
    except BrokenPipeError:
        if not _reader_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `rlhf list | head` has read enough
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno in _NO_WAY and error.filename:
            _tell(f"error: {visible(str(error.filename))}: {error.strerror}; check the path and its permissions")
            raise SystemExit(2) from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        of = f" of {visible(str(error.filename))}" if error.filename else ""
        print(
            f"stopped: no space left on the disk{of}; completed stages and checkpoints are kept: free some space and "
            "run the same command again",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except RuntimeError as error:
        if unopened := _UNOPENED.search(str(error)):
            _tell(f"error: a file cannot be written: {unopened[1].strip()}; check output_dir and its permissions")
            raise SystemExit(2) from None
        if not another_ended(error):
            raise
        time.sleep(5)  # usually the launcher, which has seen the one that failed, ends this one meanwhile
        print("stopped: another process of this run has ended; its own line says why", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if first_of_its_machine():
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def first_of_its_machine() -> bool:
    """Return whether this is the only process of a run on this machine, or the first: it tells of what all get."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def another_ended(error: BaseException) -> bool:
    """Return whether an error is what a process gets to see of another one that has left the run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and bool(_LEFT.search(str(error)))


def _reader_gone() -> bool:
    """Return whether nobody reads stdout any more."""
    try:
        sys.stdout.flush()
        asked = select.poll()
        asked.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError, AttributeError):  # no file behind it, or no poll on this system
        return False


def _tell(line: str) -> None:
    """Print a line on stderr. Other processes than the first wait 2 s before: usually the launcher ends them when the
    first one exits, so the line appears once; on a terminal it begins below the first one's bar."""
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        time.sleep(2)
    below = "" if first or not sys.stderr.isatty() else "\n"
    print(below + " ".join(line.split()), file=sys.stderr)
