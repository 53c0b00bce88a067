"""Check a config's values, and read trackers and layer names as users of transformers write them.

A config calls `settle` first in its `__post_init__`. YAML and flags have been converted by type before; values given in
Python have not.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import os
import re
from typing import Any

from rlhf.errors import InputError, unknown
from rlhf.hints import allows_none, choices_of, expected, field_of, fits, hints_of, is_list, shown

TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",),
    "mlflow": ("mlflow",), "comet_ml": ("comet_ml",), "swanlab": ("swanlab",), "clearml": ("clearml",),
    "dvclive": ("dvclive",), "neptune": ("neptune",), "codecarbon": ("codecarbon",), "dagshub": ("dagshub",),
    "flyte": ("flytekit",), "azure_ml": ("azureml",), "kubeflow": (),
}  # fmt: skip
"""transformers' names of trackers -> packages, of which one must be installed."""
OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"), ""),
    **dict.fromkeys((
        "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit",
        "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit",
        "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    ), "bitsandbytes"),
    **dict.fromkeys(("adamw_torch_8bit", "adamw_torch_4bit"), "torchao"),
}  # fmt: skip
"""transformers' names of optimizers, and ours of its default -> the package that they need."""
INSTALLED_AS = {"comet_ml": "comet-ml", "flyte": "flytekit", "azure_ml": "azureml-sdk"}
_NAME = re.compile(r"[\w.\-]+")
_MEANT = {
    "yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False,
}  # fmt: skip


def settle(config: Any) -> None:
    """Check the type of every field of a frozen dataclass and bring values that mean the same into one form.

    A path becomes text, a whole number where a fraction may stand a float, a tuple or a text of names a list;
    `report_to` "none" and `lora_target_modules` "all-linear" become None, our word for both. Raises InputError that
    names the field, the value seen and what it takes.
    """
    cls: Any = type(config)
    for name, hint in hints_of(cls).items():
        value = _plain(getattr(config, name), hint)
        if not fits(value, hint):
            raise InputError(f"{name}={shown(value)} must be {_words(hint)}{_advice(value, hint)}")
        if name == "report_to":
            value = trackers(value)
        if name == "lora_target_modules":
            value = layer_names(value)
        if name == "optimizer":
            check_optimizer(value)
        object.__setattr__(config, name, value)


def require_needed(config: Any, needed: str, *names: str) -> None:
    """Raise InputError where one of the fields ``names`` differs from its default while the field ``needed``, without
    which nothing reads it, is unset (None, empty or False)."""
    for name in () if getattr(config, needed) else names:
        value = getattr(config, name)
        if value != field_of(type(config), name).default:
            seen = f"{name}={shown(value)} does nothing without {needed}"
            raise InputError(f"{seen}; give {needed} too, or leave {name} out")


def split_names(text: str) -> list[str]:
    """Split "a, b" at the commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def trackers(names: list[str] | None) -> list[str] | None:
    """Return the trackers to report to: None for none, ["all"] for all that are installed (transformers finds them).

    Raises InputError for one that transformers does not know or that is not installed.
    """
    if not names or names == ["none"]:
        return None
    for name in names if names != ["all"] else ():
        if name not in TRACKERS:
            unknown(name, [*TRACKERS, "none", "all"], "report_to", "tracker")
        packages = TRACKERS[name]
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            install = f"pip install {INSTALLED_AS.get(name, packages[0])}"
            raise InputError(f"report_to: {name} is not installed; {install}, or leave it out (metrics.jsonl stays)")
    return names


def check_optimizer(name: str) -> None:
    """Raise InputError for an optimizer that is unknown here, or whose package is not installed."""
    if name not in OPTIMIZERS:
        unknown(name, OPTIMIZERS, "optimizer", "optimizer")
    package = OPTIMIZERS[name]
    if package and importlib.util.find_spec(package) is None:
        raise InputError(f"optimizer: {name} needs {package}, which is not installed; pip install {package}")


def layer_names(names: list[str] | None) -> list[str] | None:
    """Return the layers that get LoRA weights; None (peft's "all-linear") for every linear one but the head."""
    if not names or names == ["all-linear"]:
        return None
    for name in names:
        if not _NAME.fullmatch(name):
            raise InputError(f"lora_target_modules: {name!r} is no layer's name; write q_proj,v_proj or all-linear")
    return names


def _plain(value: Any, hint: Any) -> Any:
    choices = choices_of(hint)
    if isinstance(value, os.PathLike) and str in choices:
        return os.fspath(value)
    if is_list(hint) and isinstance(value, str):
        return split_names(value)
    if isinstance(value, list | tuple):
        of = next((choice.__args__[0] for choice in choices if getattr(choice, "__origin__", None) is list), None)
        return value if of is None else [_plain(item, of) for item in value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if float in choices and int not in choices:
            return float(value)
        if isinstance(value, numbers.Integral):
            return int(value)  # NumPy's too
    return value


def _words(hint: Any) -> str:
    """Write what a field takes in Python's words."""
    return expected(hint).replace("true or false", "True or False").replace("null", "None")


def _advice(value: Any, hint: Any) -> str:
    """Name the value that a text stands for, where it stands for one."""
    if not isinstance(value, str):
        return ""
    text = value.strip().lower()
    if text in ("none", "null") and allows_none(hint):
        return "; write None, without quotes"
    if bool in choices_of(hint):
        return f"; write {_MEANT[text]}, without quotes" if text in _MEANT else ""
    kind = next((kind for kind in (int, float) if kind in choices_of(hint)), None)
    try:
        number = kind is not None and math.isfinite(kind(text))
    except ValueError:
        return ""
    note = " (in YAML 1e-5 is text: write 1.0e-5)" if "e" in text else ""
    return f"; write {value.strip()}, without quotes{note}" if number else ""
