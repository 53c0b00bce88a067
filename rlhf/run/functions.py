"""Users' functions that a config names: `path/to/file.py:name` or `package.module:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.errors import InputError, unknown
from rlhf.run.lookup import look_up


def import_function(spec: str) -> Callable[..., Any]:
    """Return the function that ``path/to/file.py:name`` or ``package.module:name`` means.

    A file is looked up in the working directory, then among the recipes. It becomes a module of its own name (the same
    file always the same module), and can import what lies beside it. Raises InputError.
    """
    target, colon, name = spec.rpartition(":")
    if not colon or not target or not name:
        raise InputError(f"function {spec!r}: write path/to/file.py:name or package.module:name")
    if target.endswith(".py"):
        module = _import_file(look_up(target, f"function {spec!r}: no such file {target}"), spec)
    else:
        module = _import_module(target, spec)
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        unknown(name, public, target, "function")
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"function {spec!r}: {name} is a {type(function).__name__}, not a function")
    return function


def _import_file(file: Path, spec: str) -> ModuleType:
    file = file.resolve()
    name = f"_rlhf_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    folder = str(file.parent)
    sys.path.insert(0, folder)  # first while the file is read, as for a script
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"function {spec!r}: {_located(error, file)}") from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # last afterwards, so that it shadows no library
    return module


def _import_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        advice = "a file is written file.py:name"
        raise InputError(f"function {spec!r}: no module {error.name}; {advice}") from None
    except Exception as error:
        raise InputError(f"function {spec!r}: {_located(error, Path(name))}") from error


def _located(error: Exception, file: Path) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    line = frames[-1].lineno if frames else getattr(error, "lineno", None)
    return " ".join(f"{file}{f':{line}' if line else ''}: {type(error).__name__}: {error}".split())
