"""What surrounds a config when a recipe starts: users' functions, trl's arguments, one-line errors."""

from __future__ import annotations

import difflib
import errno
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rlhf import InputError, RunStopped

if TYPE_CHECKING:
    import torch

Arguments = TypeVar("Arguments")


def run(main: Callable[[list[str]], Any]) -> None:
    """Call ``main`` with the command line. A user's mistake is one line on stderr and exit code 2; a run that stopped
    itself, one line and exit code 1."""
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except RunStopped as error:
        print(f"stopped: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"stopped: no space left on the disk{f' of {error.filename}' if error.filename else ''}; what was complete "
            "is kept: free some space and run the same command again",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def unknown(name: str, known: Collection[str], where: str, kind: str) -> NoReturn:
    """Raise InputError for a name that isn't ``known``, with the nearest one that is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    shown = [*known][:12] + ["..."] * (len(known) > 12)
    advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(shown)}"
    raise InputError(f"{where}: unknown {kind} {name}; {advice}")


# ---------------------------------------------------------------- users' own functions


def import_function(spec: str) -> Callable[..., Any]:
    """The function that ``path/to/file.py:name`` or ``package.module:name`` means.

    A file becomes a module of its own name (the same file always the same module), and can import what
    lies beside it. Raises InputError.
    """
    target, colon, name = spec.rpartition(":")
    if not colon or not target or not name:
        raise InputError(f"function {spec!r}: write path/to/file.py:name or package.module:name")
    module = _import_file(Path(target), spec) if target.endswith(".py") else _import_module(target, spec)
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        unknown(name, public, target, "function")
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"function {spec!r}: {name} is a {type(function).__name__}, not a function")
    return function


def _import_file(file: Path, spec: str) -> ModuleType:
    if not file.is_file():
        raise InputError(f"function {spec!r}: no such file {file} (looked from {Path.cwd()})")
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


# ---------------------------------------------------------------- arithmetic and arguments


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


_SAME_NAME = (
    "output_dir", "seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "max_steps", "max_grad_norm", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "logging_steps", "save_steps", "report_to", "gradient_checkpointing",
)  # fmt: skip
_RENAMED = {
    "epochs": "num_train_epochs",
    "lr_schedule": "lr_scheduler_type",
    "warmup_fraction": "warmup_steps",
}


def training_arguments(config: Any, cls: type[Arguments], **extra: Any) -> Arguments:
    """Our config as the TrainingArguments (or trl's SFTConfig, RewardConfig) that trainers receive.

    ``batch_size`` counts rows per optimizer step over all processes, ``microbatch_size`` rows per forward on
    one: gradient accumulation is what lies between. A ``warmup_fraction`` below 1 is a share of all steps
    (transformers reads ``warmup_steps`` that way). bf16 where CUDA has it unless the config says otherwise.
    ``extra`` overrides anything.
    """
    import torch

    values = {name: getattr(config, name) for name in _SAME_NAME if hasattr(config, name)}
    values |= {theirs: getattr(config, ours) for ours, theirs in _RENAMED.items() if hasattr(config, ours)}
    if hasattr(config, "batch_size"):
        values |= _batch_arithmetic(config.batch_size, getattr(config, "microbatch_size", None))
    if "save_steps" in values:
        values["save_strategy"] = "steps" if values["save_steps"] else "no"
        values["save_steps"] = values["save_steps"] or 500
        values["save_total_limit"] = None  # ours deletes older ones, once the newest is complete
    if "report_to" in values:
        values["report_to"] = list(values["report_to"] or [])
    on_cuda = torch.cuda.is_available()
    values |= {
        "bf16": use_bf16(getattr(config, "bf16", "auto")),
        "use_cpu": not on_cuda,
        "dataloader_pin_memory": on_cuda,
        "disable_tqdm": True,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
    }
    if values.get("gradient_checkpointing"):
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return cls(**(values | extra))


def use_bf16(setting: bool | str | None) -> bool:
    """True or False as the user said; "auto" or None: where CUDA supports it."""
    import torch

    if setting in (None, "auto"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return bool(setting)


def compute_dtype(setting: bool | str | None) -> torch.dtype:
    """bfloat16 or float32, by `use_bf16`."""
    import torch

    return torch.bfloat16 if use_bf16(setting) else torch.float32


def _batch_arithmetic(batch_size: int, microbatch_size: int | None) -> dict[str, int]:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    require_divides("number of processes", processes, "batch_size", batch_size)
    share = batch_size // processes
    if microbatch_size is None:
        microbatch_size = share
    big_name = "batch_size" if processes == 1 else f"batch_size/{processes} processes"
    require_divides("microbatch_size", microbatch_size, big_name, share)
    return {
        "per_device_train_batch_size": microbatch_size,
        "per_device_eval_batch_size": microbatch_size,
        "gradient_accumulation_steps": share // microbatch_size,
    }
