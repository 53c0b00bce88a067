"""One fingerprint for whatever a run is given: files, folders, rows, models, reward functions, tokenizers.

Two things with the same fingerprint make the same run, so a stage is skipped or resumed only where all of them agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.rows.sources import path_of
from rlhf.run.checkpoint import plain, write_json_atomic
from rlhf.run.objects import of_function, of_weights

if TYPE_CHECKING:
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
        return hashlib.sha256(f"hub:{path}".encode(errors="surrogatepass")).hexdigest()
    for file in files_of(path):
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\n".encode(errors="surrogatepass"))
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
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home
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


# ---------------------------------------------------------------- rows, models, tokenizers, runs


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
