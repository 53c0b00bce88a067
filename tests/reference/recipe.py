"""A recipe run in this process as its command line would: imports are paid once, nothing global stays changed."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rlhf import errors
from rlhf.run import console

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def load(name: str) -> ModuleType:
    """recipes/<name>.py as a module of the package."""
    with _restored():
        return importlib.import_module(f"rlhf_recipes.{name}")


def run(name: str, *flags: object) -> Result:
    """Exit code, stdout and stderr of `python recipes/<name>.py <flags>`."""
    module, out, err, code = load(name), io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [f"recipes/{name}.py", *map(str, flags)]
    try:
        with _restored(), contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            console.quiet()
            errors.run(module.main)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
    return Result(code, out.getvalue(), err.getvalue())


def load_benchmark(name: str) -> ModuleType:
    """recipes/benchmarks/<name>.py, as a script there would import it."""
    folder = str(ROOT / "recipes/benchmarks")
    with _restored():
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(folder)


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Our loggers as they were (console.quiet takes them from caplog), and no warning filters of ours."""
    loggers = [logging.getLogger(name) for name in ("rlhf", "reward_models")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
