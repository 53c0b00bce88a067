"""Models and adapters as they lie in a folder or on a hub: found, read whole, or refused by naming what is wrong.

No code from a model's folder runs, and no tensor is drawn at random because the files lack it: transformers would do
the second with a table of warnings, and ask for the first on stdin.
"""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from rlhf.errors import InputError, reason
from rlhf.models import memory
from rlhf.models.adapter_check import read_adapter
from rlhf.models.adapters import is_adapter, train_in_float32
from rlhf.models.waiting import give_way

log = logging.getLogger("rlhf")

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
UNREADABLE = (
    OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, EOFError, pickle.UnpicklingError,
    SafetensorError,
)  # fmt: skip
"""What transformers, peft and safetensors raise for files that they cannot load."""


def check_folder(path: str | Path) -> None:
    """Raise InputError for a local path without a model, before transformers looks for it on a hub."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not is_adapter(folder):
            inside = sorted(
                file.parent.name for name in ("", "adapter_") for file in folder.glob(f"*/{name}config.json")
            )
            hint = (
                f"a saved model's folder, {' or '.join(inside[:4])} in it for example"
                if inside
                else ("a folder with a saved model")
            )
            raise InputError(f"{path}: no config.json and no adapter_config.json; name {hint}")
    elif folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1 or folder.is_file():
        raise InputError(f"{path}: no such model folder; name a saved model's folder or a hub id")


def config_of(path: str | Path) -> PreTrainedConfig:
    """Load a model's configuration. Raises InputError if there is none."""
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except UNREADABLE as error:
        raise unreadable(path, "no model configuration", error) from error


def unreadable(path: str | Path, what: str, error: BaseException) -> InputError:
    """Return the InputError for files that could not be loaded."""
    if "trust_remote_code" in str(error):
        return InputError(
            f"{path}: this model needs code from its own folder, which is never run from here; load it yourself with "
            "trust_remote_code=True, and pass the model object and its tokenizer to the trainer"
        )
    return InputError(f"{path}: {what} could be loaded ({reason(error, 200)})")


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' table of missing weights inside the context: what is missing is refused afterwards."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _nothing(model: PreTrainedModel) -> Collection[str]:
    return ()


def from_pretrained(
    cls: type[AutoModelForCausalLM | AutoModelForSequenceClassification],
    path: str | Path,
    dtype: torch.dtype | None,
    new: Callable[[PreTrainedModel], Collection[str]] = _nothing,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a whole model from a folder or hub id, by default in float32.

    new: returns the names of the modules that the files may lack, since they are drawn or loaded afterwards. A folder's
    path is kept absolute in `name_or_path`, which an adapter's configuration repeats. Raises InputError if the model
    cannot be loaded, or if tensors are missing or have other shapes.
    """
    check_folder(path)
    if not torch.accelerator.is_available():
        give_way(torch.device("cpu"))  # who loads a model is about to compute
    try:
        with quietly():
            loaded: Any = cls.from_pretrained(
                os.path.abspath(path) if os.path.isdir(path) else str(path),
                dtype=dtype or torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **kwargs,
            )
    except UNREADABLE as error:
        raise unreadable(path, "no model", error) from error
    model: PreTrainedModel = loaded[0]
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"{path}: this is an adapter; download it (`hf download {path}`) and name its folder")
    _check_whole(path, model, loaded[1], set(new(model)))
    mend_generation_config(model, path)
    if model.device.type == "cpu":
        # safetensors maps weights at unaligned addresses, which change how a CPU's kernels round. Copied to torch's own
        # (aligned) addresses, a model gives the same numbers to the last bit from any file.
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.clone()
        memory.release_freed_memory()
    return model


def _check_whole(path: str | Path, model: PreTrainedModel, info: dict[str, Any], new: set[str]) -> None:
    def expected(key: str) -> bool:  # the new modules are a head, or children of the trunk
        return not new.isdisjoint(key.split(".")[:2])

    family, remedy = type(model).__name__, "save or copy the whole model again, or name another folder"
    missing = sorted(key for key in info["missing_keys"] if not expected(key))
    if missing:
        raise InputError(
            f"{path}: its files lack {len(missing)} tensors of {family}, first {', '.join(missing[:3])}; {remedy}"
        )
    shapes = sorted(entry for entry in info["mismatched_keys"] if not expected(entry[0]))
    if shapes:
        key, found, wanted = shapes[0]
        raise InputError(
            f"{path}: {len(shapes)} tensors have other shapes than its config.json says, first {key}: {list(found)} "
            f"instead of {list(wanted)}; {remedy}"
        )
    trunk = f"{model.base_model_prefix}."
    unused = sorted(key for key in info["unexpected_keys"] if not new or key.startswith(trunk))
    if unused:
        log.warning("%s: %s does not use %d tensors of its files, first %s", path, family, len(unused), unused[0])


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def mend_generation_config(model: Any, path: str | Path = "the model") -> None:
    """Take out of a model's generation config what transformers would refuse to save, after hours of training.

    Published ones have sampling settings without do_sample; they have no effect. What is still refused then keeps its
    token ids alone.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _saves(config):
        return
    before = config.to_dict()
    dropped = (() if config.do_sample else _SAMPLING) + (_BEAMS if (config.num_beams or 1) == 1 else ())
    for name in dropped:
        setattr(config, name, None)
    if not _saves(config):
        ids = {name: getattr(config, name) for name in _TOKENS}
        config = GenerationConfig(**{name: value for name, value in ids.items() if value != -1})
    model.generation_config = config
    changed = sorted(name for name, value in config.to_dict().items() if before.get(name) != value)
    log.warning("%s: generation_config.json cannot be saved as it is: dropped %s", path, ", ".join(changed))


def _saves(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def base_of(adapter: str | Path) -> str:
    """Return the folder or hub id of an adapter's base model; a relative path may start at the adapter's own folder.

    Raises InputError if the adapter names none, a folder that is not there, or another adapter."""
    base = read_adapter(adapter).base_model_name_or_path
    where = f"{adapter}/adapter_config.json: base_model_name_or_path"
    if not base:
        raise InputError(f"{where} is empty; write the base's path there")
    if not Path(base).is_dir() and Path(adapter, base).is_dir():
        base = str(Path(adapter, base))
    try:
        check_folder(base)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if is_adapter(base):
        raise InputError(
            f"{where}: {base} is itself an adapter; merge it first, and write the merged folder's path there"
        )
    return base


def load_adapter(base: PreTrainedModel, folder: str | Path, *, trainable: bool) -> PeftModel:
    """Put a folder's adapter on its base, under the name "default".

    Weights to be trained are float32. Raises InputError if the file lacks a weight of the adapter, or has one too many.
    """
    config = read_adapter(folder)
    config.inference_mode = not trainable
    where = next((file for name in WEIGHTS if (file := Path(folder, name)).is_file()), None)
    if where is None:
        raise InputError(f"{folder}: {WEIGHTS[0]} is missing; save or copy the adapter again")
    tied = _tied_head(base)
    try:
        with warnings.catch_warnings(action="ignore"):  # the base's path is written anew
            model = get_peft_model(base, config)
            train_in_float32(model)
            result: Any = model.load_adapter(
                str(folder),
                "default",
                is_trainable=trainable,
                key_mapping=getattr(base, "_checkpoint_conversion_mapping", {}),
            )
    except KeyError as error:
        raise InputError(f"{where} lacks {error}; save or copy the adapter again") from error
    except UNREADABLE as error:
        raise unreadable(folder, "no adapter", error) from error
    if result.missing_keys:
        keys = result.missing_keys
        raise InputError(f"{where} lacks {len(keys)} tensors, first {keys[0]}; save or copy the adapter again")
    # trained rows of tied embeddings are saved under both names, and loaded under one
    twins = (".modules_to_save.", *([f".{tied}."] if tied else []))
    keys = [key for key in result.unexpected_keys if not any(twin in key for twin in twins)]
    if keys:
        raise InputError(
            f"{where} holds {len(keys)} tensors that adapter_config.json does not name or the base has no place for, "
            f"first {keys[0]}; copy both files again, and look at base_model_name_or_path"
        )
    return model


def adapter_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file, without the second copy of a saved module.

    peft saves a module by its own name, and once more with the embeddings where the vocabulary grew."""
    weights = load_peft_weights(str(folder), device="cpu")
    return {name: tensor for name, tensor in weights.items() if ".modules_to_save." not in name}


def _tied_head(model: PreTrainedModel) -> str | None:
    """Return the language head's name if its weight is that of the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return None
    return next(name for name, module in model.named_modules() if module is head)


def load_base(
    cls: type[AutoModelForCausalLM | AutoModelForSequenceClassification],
    adapter: str | Path,
    dtype: torch.dtype | None,
    new: Callable[[PreTrainedModel], Collection[str]] = _nothing,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load an adapter's base model."""
    revision = read_adapter(adapter).revision
    return from_pretrained(cls, base_of(adapter), dtype, new, **({"revision": revision} if revision else {}), **kwargs)


@torch.no_grad()
def fit_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Enlarge the embeddings to `rows`; never shrink them (bases pad their vocabulary).

    New rows start at the mean of the old ones, so that no new token is likelier than the average (Hewitt 2021)."""
    before = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embeddings is not None:
            weight = cast(Tensor, embeddings.weight)
            weight[before:] = weight[:before].float().mean(0).to(weight.dtype)


def saved_rows(adapter: str | Path, model: PreTrainedModel) -> int:
    """Return the number of input embeddings that an adapter's file holds; 0 if it holds none."""
    file = Path(adapter, WEIGHTS[0])
    if not file.is_file():
        return 0
    module = model.get_input_embeddings()
    name = next(name for name, part in model.named_modules() if part is module)
    with safe_open(file, "pt") as tensors:
        every = tensors.keys()
        keys = [key for key in every if f".{name}." in key and key.endswith(".weight")]
        return max((tensors.get_slice(key).get_shape()[0] for key in keys), default=0)
