"""A process that imports the libraries once and forks for every command: a command costs no seconds of imports.

    python tests/reference/forked.py MODULE ...

imports the modules and then reads lines of JSON. {"argv": ...} starts a child that runs what `python ARGV` would run,
as a process group of its own, and answers with its process id; {"wait": id} answers with [exit code, stdout, stderr].
`Forker` is the other end. The process that forks runs nothing itself, so a child differs from a fresh process only in
that the modules are imported.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 300  # seconds for one command, on a machine with other work
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
LIBRARIES = ("accelerate", "datasets", "hypothesis", "peft", "transformers.models.llama.modeling_llama", "trl")
OURS = ("rlhf.ppo.trainer", "rlhf.sft.trainer", "reward_models.trainer", "reward_models.scoring")


class Started:
    """A command under way, in a process group of its own."""

    def __init__(self, pid: int, ended: Callable[[float], int | None], written: Callable[[], tuple[str, str]]):
        self.pid, self._ended, self._written = pid, ended, written

    def running(self) -> bool:
        return self._ended(0) is None

    def signal(self, number: int) -> None:
        """Send it to the command and to all that it started."""
        if self.running():
            os.killpg(self.pid, number)

    def end(self, limit: float = LIMIT) -> tuple[int, str, str]:
        """Wait: exit code (minus the signal's number where one ended it), stdout, stderr."""
        code = self._ended(limit)
        if code is None:
            self.signal(signal.SIGKILL)
            self._ended(LIMIT)
        assert code is not None, f"still running after {limit} s"
        return code, *self._written()


class Forker:
    """Starts commands by forking; `prefix` is a command that the forking process is itself started under."""

    def __init__(self, modules: Sequence[str] = LIBRARIES + OURS, prefix: Sequence[str] = (), cwd: Path = ROOT):
        self.process = subprocess.Popen(
            [*prefix, sys.executable, __file__, *modules], cwd=cwd, text=True,
            env=_environment({}), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._answer()  # everything is imported

    def start(
        self, argv: Sequence[object], cwd: Path = ROOT, env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> Started:
        """Run `python ARGV`: a script with its arguments, `-c code` or `-m module`; `env` is added to ours."""
        words = [os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in argv]
        job = {"argv": words, "cwd": str(cwd), "env": _environment(env or {}), "stdin": stdin}
        pid, done = self._ask(job), list[tuple[int, str, str]]()

        def ended(seconds: float) -> int | None:
            deadline = time.monotonic() + seconds
            while not done:
                if _process_state(pid) in ("Z", None):
                    done.append(tuple(self._ask({"wait": pid})))
                elif time.monotonic() >= deadline:
                    return None
                else:
                    time.sleep(0.002)
            return done[0][0]

        return Started(pid, ended, lambda: done[0][1:])

    def run(self, argv: Sequence[object], limit: float = LIMIT, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(list(argv), *self.start(argv, **options).end(limit))

    def together(
        self, argv: Sequence[object], processes: int = 2, limit: float = LIMIT, env: Mapping[str, str] | None = None,
        until: Callable[[], bool] = lambda: False, **options: Any,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """The command in several processes on gloo, as `torchrun --nproc_per_node` starts them; none is left behind
        where one fails or the limit passes. All are killed once `until` holds."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), **(env or {})}
        started = [
            self.start(argv, env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
            for rank in range(processes)
        ]
        deadline = time.monotonic() + limit
        while any(one.running() for one in started):
            failed = [one for one in started if not one.running() and one.end()[0]]
            if failed or until() or time.monotonic() > deadline:
                for one in started:
                    one.signal(signal.SIGKILL)
            time.sleep(0.005)
        codes, outs, errs = zip(*(one.end() for one in started), strict=True)
        first = next((code for code in codes if code not in (0, -signal.SIGKILL)), max(codes, key=abs))
        return subprocess.CompletedProcess(list(argv), first, "".join(outs), "".join(errs))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(LIMIT)

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that forks has died; its stderr is above"
        return json.loads(line)


@functools.cache
def shared() -> Forker:
    """The one of this session, with our modules imported; it ends with the session, which holds its stdin."""
    return Forker()


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": path} | ENVIRONMENT | more


def _process_state(pid: int) -> str | None:
    """One letter, Z for one that ended and was not asked yet; None: there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


# ---------------------------------------------------------------- the process that forks


def child(job: dict[str, Any], files: Sequence[Any]) -> None:
    """Run the command, and end without the parent's cleaning up."""
    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    (first, *rest), code = job["argv"], 0
    script = first not in ("-c", "-m")
    own = str(Path(first).resolve().parent) if script else os.getcwd() if first == "-m" else ""
    sys.path[:0] = [own, *job["env"]["PYTHONPATH"].split(os.pathsep)]
    sys.argv = job["argv"] if script else [first, *rest[1:]]
    try:
        if script:
            runpy.run_path(first, run_name="__main__")
        elif first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(*modules: str) -> None:
    sys.path.pop(0)  # this file's folder
    for module in modules:
        importlib.import_module(module)
    print(json.dumps("ready"), flush=True)
    files: dict[int, list[Any]] = {}
    while line := sys.stdin.readline():
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            written = []
            for file in files.pop(job["wait"]):
                file.seek(0)
                written.append(file.read())
                file.close()
            print(json.dumps([os.waitstatus_to_exitcode(status), *written[1:]]), flush=True)
            continue
        opened = [tempfile.TemporaryFile("w+") for _ in range(3)]  # noqa: SIM115
        opened[0].write(job["stdin"])
        opened[0].seek(0)
        pid = os.fork()
        if pid == 0:
            child(job, opened)
        os.setpgid(pid, pid)  # in both: whoever comes first
        files[pid] = opened
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
