"""One fingerprint for whatever a run is given: files, folders, rows, models, reward functions, tokenizers.

Two things with the same fingerprint make the same run, so a stage is skipped or resumed only where all of them agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import fnmatch
import functools
import hashlib
import inspect
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from rlhf.rows.sources import path_of
from rlhf.run.checkpoint import plain, write_json_atomic

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

PART = 2**26
"""Bytes of a large file that are hashed at once; a smaller file's digest is its plain sha256."""

NOT_LOADED = (".*", "__pycache__", "checkpoint-*", "refused-checkpoint-*", "earlier-*", "rollouts")
"""What lies in a folder and is no part of the model or data that it holds."""

WRITTEN_BESIDE = (
    "manifest.json", "inputs.json", "begun.json", "metrics.jsonl", "samples.jsonl", "training_args.bin",
    "best.safetensors", "sizes.json", "evaluation.json", "process_reward.json", "moderation.json", "*report*.json",
    "*.html", "*.md", "*.png",
)  # fmt: skip
"""What a stage writes beside its model or data: logs and reports, some of which tell the time."""


SETS = ("STORE_DEREF", "STORE_GLOBAL")
"""Instructions by which a function keeps a count of its own: such a name is no constant."""


SPEED = ("tokens_per_microbatch", "timeout", "retries", "at_once", "name")
"""Arguments of an object that scores which change no score."""


def canonical(value: object) -> bytes:
    """Return the JSON form of a value in which equal values are equal bytes."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="surrogatepass")


# ---------------------------------------------------------------- files and folders


def of_path(path: str | Path) -> str:
    """Compute the sha256 of a file's content, or of a folder's files and their names.

    An adapter's folder counts its base too, if that is a folder. Of a hub id only the name is hashed.
    """
    digest, path = hashlib.sha256(), Path(path)
    if not path.exists():
        return hashlib.sha256(f"hub:{path}".encode()).hexdigest()
    for file in files_of(path):
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\n".encode())
        digest.update(_digest_of_file(file))
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        with contextlib.suppress(ValueError, OSError):  # a damaged one is named where the model is loaded
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
            if base and Path(base).is_dir() and Path(base).resolve() != path.resolve():
                digest.update(of_path(base).encode())
    return digest.hexdigest()


def data_fingerprint(source: str | Path | Iterable[object]) -> str:
    """Compute the fingerprint of a dataset: of a path's content, with the part and split of a folder that the source
    names behind it, or of every row of an iterable."""
    if not isinstance(source, str | Path):
        return of_rows(source)
    path, part = placed(source)
    return f"{of_path(path or source)}{part}"


def placed(source: str | Path) -> tuple[Path | None, str]:
    """Return the file or folder that a source of data names, and what it names of that folder (":part@split", or "");
    None where it is not on this machine."""
    path = path_of(source)
    part = "" if path is None else str(Path(source).expanduser()).removeprefix(str(path))
    return (None, "") if path is None or (part and not path.is_dir()) else (path, part)


def files_of(path: Path) -> list[Path]:
    """Return the file, or the files of a folder that are its content: no logs, checkpoints or reports of a stage."""
    if not path.is_dir():
        return [path]
    apart = NOT_LOADED + (WRITTEN_BESIDE if (path / "manifest.json").is_file() else ())

    def counts(file: Path) -> bool:
        parts = file.relative_to(path).parts
        return not any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in apart)

    return sorted(file for file in path.rglob("*") if file.is_file() and counts(file))


def _digest_of_file(file: Path) -> bytes:
    """Hash a file; a large one in parts side by side, and only if it changed since the last time.

    Unchanged means: the same inode, size, mtime and ctime. No program can set ctime, so a file that was written, or
    replaced by one of the same size and mtime, has another; a change within the clock's tick is excluded by trusting
    only a file that had been left alone for two seconds.
    """
    stat = file.stat()
    if stat.st_size <= PART:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    key, state = str(file.resolve()), [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    known = _known()
    if known.get(key, [None])[0] == state:
        return bytes.fromhex(known[key][1])
    begun = time.time_ns()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets other threads run
        parts = pool.map(functools.partial(_digest_of_part, file), range(0, stat.st_size, PART))
        digest = hashlib.sha256(b"".join(parts)).digest()
    if begun - stat.st_ctime_ns > 2e9:
        with contextlib.suppress(OSError):
            write_json_atomic(_cache(), _known() | {key: [state, digest.hex()]})
    return digest


def _digest_of_part(file: Path, start: int) -> bytes:
    digest, left = hashlib.sha256(), PART
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while left and (piece := opened.read(min(left, 2**20))):
            digest.update(piece)
            left -= len(piece)
    return digest.digest()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf" / "fingerprints.json"


def _known() -> dict[str, Any]:
    try:
        found = json.loads(_cache().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home
        return {}
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------- rows, models, functions, tokenizers


def of_rows(rows: Iterable[object]) -> str:
    """Compute the sha256 of every row of an iterable; of values that JSON cannot hold only the type counts, and fields
    of a record whose metadata say `apart` don't."""
    digest = hashlib.sha256()
    for row in rows:
        if dataclasses.is_dataclass(row) and not isinstance(row, type):
            named = [item.name for item in dataclasses.fields(row) if not item.metadata.get("apart")]
            row = {name: getattr(row, name) for name in named}
        try:
            digest.update(canonical(row) + b"\n")
        except TypeError:
            text = json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__)
            digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def of_model(source: Any) -> str | None:
    """Compute the fingerprint of what a trainer starts from: a folder, a hub id, a model object, or an object that
    holds one (a reward model)."""
    if source is None:
        return None
    if isinstance(source, str | Path):
        return of_path(source)
    inner = getattr(source, "model", None)
    return of_weights(source if hasattr(source, "named_parameters") or inner is None else inner)


def of_weights(module: nn.Module) -> str:
    """Compute the fingerprint of a model's parameters where they are: sums of their bits, exact on every device."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if "original_module" in name:  # peft's unused original of a saved module, such as a head drawn at random
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {_checksum(parameter)}\n".encode())
    return digest.hexdigest()


def _checksum(tensor: Tensor) -> int:
    """Sum a tensor's bits, each word multiplied by an odd number of its own, modulo 2^64."""
    import torch

    if tensor.device.type == "meta":
        return 0
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = bits.view(torch.int32) if bits.numel() % 4 == 0 else bits
    total = 0
    for start in range(0, words.numel(), 2**22):
        part = words[start : start + 2**22].long()
        odd = torch.arange(start, start + len(part), device=part.device) * 0x9E3779B1 * 2 + 1
        total += int((part * odd).sum())
    return total % 2**64


def of_function(function: Any, depth: int = 0) -> str:
    """Return a reward function's name and the sha256 of what it computes: its code, its helpers in the same file, its
    constants; of an object the class, its arguments and the weights that it holds. No value appears in it: one may be a
    password."""
    if hasattr(function, "named_parameters"):
        name, content = type(function).__qualname__, of_weights(function)
    elif isinstance(function, functools.partial):
        inner = of_function(function.func, depth)
        name, content = inner.split()[0], repr([inner, _value(function.args), _constant(function.keywords)])
    elif inspect.ismethod(function):
        name = function.__func__.__qualname__
        content = repr([of_function(function.__func__, depth), of_function(function.__self__, depth + 1)])
    elif inspect.isfunction(function):
        name, content = function.__qualname__, _code(function, depth)
    else:
        kind, own = type(function), getattr(function, "__dict__", {})
        call = inspect.getattr_static(kind, "__call__", None)
        given = {name for name in inspect.signature(kind.__init__).parameters if name in own} - {*SPEED}
        described = {name: _value(own[name], depth) for name in sorted(given)}
        code = of_function(call, depth) if inspect.isfunction(call) else ""
        name, content = kind.__qualname__, repr([code, described])
    return f"{name.rpartition('.')[2]} {hashlib.sha256(content.encode()).hexdigest()}"


def _value(value: Any, depth: int = 0) -> Any:
    """Return the JSON form of a value that stays as it is; of others the weights, the code, or only the type: a list
    may be where a function keeps what it has seen."""
    if isinstance(value, str | int | float | bool | tuple | Path) or value is None or dataclasses.is_dataclass(value):
        with contextlib.suppress(TypeError):
            return plain(value)
    if isinstance(value, tuple):
        return [_value(item, depth) for item in value]
    known = hasattr(value, "named_parameters") or (callable(value) and not isinstance(value, type))
    return of_function(value, depth + 1) if known and depth < 3 else type(value).__name__


def _code(function: Any, depth: int) -> str:
    """Return a function's instructions, constants, defaults, closure, and the helpers and constants of its file that
    it names; neither comments nor line numbers."""
    code: CodeType = function.__code__
    named = {name for inner in _inner(code) for name in inner.co_names}
    around = {name: function.__globals__[name] for name in sorted(named) if name in function.__globals__}
    helpers = [
        of_function(value, depth + 1)
        for value in around.values()
        if inspect.isfunction(value) and value.__module__ == function.__module__ and depth < 3 and value is not function
    ]
    set_here = {step.argval for inner in _inner(code) for step in dis.get_instructions(inner) if step.opname in SETS}
    constants = {name: _constant(value) for name, value in around.items() if name.isupper() and name not in set_here}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    closure = [_value(cell.cell_contents, depth) for name, cell in cells if name not in set_here and _filled(cell)]
    steps = [(inner.co_code.hex(), _constants(inner, function.__doc__), inner.co_names) for inner in _inner(code)]
    return repr((steps, function.__defaults__ and _value(function.__defaults__), closure, helpers, constants))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


def _inner(code: CodeType) -> list[CodeType]:
    found = [code]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += _inner(constant)
    return found


def _constant(value: Any) -> Any:
    try:
        return plain(value)
    except TypeError:
        return _value(value)


def _constants(code: CodeType, doc: str | None) -> list[str]:
    plain_ones = [value for value in code.co_consts if not isinstance(value, CodeType) and value != doc]
    return [repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value) for value in plain_ones]


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
    return hashlib.sha256(canonical({"core": core, "special": special})).hexdigest()


NOT_TRAINED = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
"""Fields of a LoraConfig that peft writes itself, and that change no weight."""


def adapter_settings(config: Any) -> str | None:
    """Write the settings of a LoraConfig that are not peft's defaults; None for no config."""
    if config is None:
        return None
    from peft import LoraConfig

    usual, given = LoraConfig().to_dict(), config.to_dict()
    told = {name: sorted(value) if isinstance(value, set) else value for name, value in given.items()}
    return ", ".join(f"{k}={v}" for k, v in told.items() if k not in NOT_TRAINED and (k not in usual or v != usual[k]))


def of_run(
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Iterable[object],
    functions: Iterable[Any] = (),
    peft_config: Any = None,
    **models: Any,
) -> Mapping[str, Any]:
    """Describe what a trainer was given, for its checkpoints: another run's are not resumed from."""
    held = getattr(models.get("model"), "peft_config", None) or {}  # of a PeftModel
    given: dict[str, Any] = {"train_dataset": of_rows(train_dataset), "processing_class": tokenizer_hash(tokenizer)}
    given["chat_template"] = hashlib.sha256(canonical(tokenizer.chat_template)).hexdigest()
    given |= {name: of_model(model) for name, model in models.items()}
    given["peft_config"] = adapter_settings(peft_config or held.get("default"))
    described = [of_function(function) for function in functions]
    return given | ({"reward_funcs": described} if described else {})
